"""The loss of a head by rows: equal to cross entropy over all logits, which is the oracle here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from isoflop.arch import gpt
from isoflop.arch.spec import Head
from isoflop.model import build, loss
from isoflop.model.loss import head_loss
from isoflop.model.parts import HeadModule, ProjectedHead

D, V, ROWS = 6, 11, 7


def made(head: Head, dtype: torch.dtype = torch.float64, *, projected: bool = False):
    """A head, vectors and a table of an embedding, drawn."""
    torch.manual_seed(0)
    module = ProjectedHead(head, V, D, 4) if projected else HeadModule(head, V, D)
    module = module.to(dtype)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 10, D, dtype=dtype, requires_grad=True)
    table = torch.randn(V, 4 if projected else D, dtype=dtype, requires_grad=True)
    targets = torch.randint(V - 2, (2, 10))
    targets[0, 3] = targets[1, 9] = -100
    return module, x, table, targets


def in_one(module, x, table, targets, vocab_size: int = V):
    logits = module(x, table)[..., :vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


HEADS = {
    "own": (Head(tied=False), {}),
    "tied": (Head(tied=True), {}),
    "bias": (Head(tied=False, bias=True), {}),
    "scale": (Head(tied=True, scale=0.3), {}),
    "softcap": (Head(tied=False, bias=True, scale=2.0, softcap=1.5), {}),
    "projected": (Head(tied=True), {"projected": True}),
}


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """So few at a time that 20 rows take three goes, the last one short."""
    monkeypatch.setattr(loss, "ROWS", ROWS)


@pytest.mark.parametrize("vocab_size", [V, V - 2])
@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_the_loss_and_gradients_of_all_logits_at_once(name, vocab_size):
    head, how = HEADS[name]
    module, x, table, targets = made(head, **how)
    wanted = [x, table, *module.parameters()]
    expected = in_one(module, x, table, targets, vocab_size)
    found = head_loss(module, x, table, targets, vocab_size)
    assert torch.allclose(found, expected, rtol=1e-12)
    # A factor in front of the loss reaches every gradient.
    grads = [
        torch.autograd.grad(3 * value, wanted, allow_unused=True) for value in (found, expected)
    ]
    for ours, oracle in zip(*grads, strict=True):
        assert (ours is None) == (oracle is None)
        assert oracle is None or torch.allclose(ours, oracle, rtol=1e-10, atol=1e-14)


def test_no_more_logits_than_some_rows_are_ever_kept():
    module, x, table, targets = made(Head(tied=True))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.shape) or t, lambda t: t
    ):
        head_loss(module, x, table, targets, V)
    assert sizes
    assert (20, V) not in sizes


def test_logits_far_apart_have_a_finite_loss():
    module, x, table, targets = made(Head(tied=True))
    with torch.no_grad():
        apart = head_loss(module, 1e4 * x, table, targets, V)
        assert torch.allclose(apart, in_one(module, 1e4 * x, table, targets), rtol=1e-12)
    assert math.isfinite(apart)
    assert apart > 1000


def test_without_gradients_the_loss_is_the_same_and_has_none():
    module, x, table, targets = made(Head(tied=False))
    with torch.no_grad():
        plain = head_loss(module, x, table, targets, V)
    assert not plain.requires_grad
    assert torch.equal(plain, head_loss(module, x, table, targets, V).detach())


def test_a_frozen_head_passes_the_gradient_on():
    module, x, table, targets = made(Head(tied=False))
    module.requires_grad_(requires_grad=False)
    (grad,) = torch.autograd.grad(head_loss(module, x, table, targets, V), [x])
    (oracle,) = torch.autograd.grad(in_one(module, x, table, targets), [x])
    assert torch.allclose(grad, oracle)


def test_autocast_multiplies_in_bfloat16_and_sums_in_single_precision():
    module, x, table, targets = made(Head(tied=True), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = head_loss(module, x, table, targets, V)
        logits = module(x, table)
    assert cast.dtype == torch.float32
    # The oracle has the same rounded logits, and full sums.
    assert torch.allclose(cast, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))
    grad_x, grad_table = torch.autograd.grad(cast, [x, table])
    exact = torch.autograd.grad(in_one(module, x, table, targets), [x, table])
    for ours, oracle in zip((grad_x, grad_table), exact, strict=True):
        assert ours.dtype == torch.float32
        assert torch.allclose(ours, oracle, atol=0.02 * float(oracle.abs().max()))


def test_a_target_outside_the_vocabulary_is_an_error():
    module, x, table, targets = made(Head(tied=True))
    for wrong in (V, -1):
        targets[0, 0] = wrong
        with pytest.raises((IndexError, RuntimeError)):
            head_loss(module, x, table, targets, V)


def test_a_models_loss_is_that_of_its_logits():
    arch = gpt("t", d_model=8, n_layers=1, n_heads=2, vocab_size=13, max_seq_len=16)
    model, tokens = build(arch), torch.randint(13, (3, 16))
    logits = model(tokens)
    assert torch.allclose(
        model.loss(tokens, tokens), F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    )

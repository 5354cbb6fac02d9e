"""muP: what a step changes does not grow with the width, rates go by the table, bits are kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isoflop.arch import Arch, llama
from isoflop.arch.families import gpt_oss, mixtral
from isoflop.errors import InputError
from isoflop.model import build_decoder
from isoflop.model.experts import record_routing
from isoflop.train import Recipe
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import train
from isoflop.train.optim import Optimizer, adamw, widening
from isoflop.train.trained import load_trained

BASE, WIDTHS = 32, (32, 64, 128, 256)
RECIPE = Recipe(seq_len=32, batch_size=4, steps=4, learning_rate=1e-2, min_lr_ratio=1.0,
                eval_bytes=256, mup_base_width=BASE)  # fmt: skip
CORPUS = ByteCorpus.python_library(100_000)
TEXT = CORPUS.validation[:64].long().view(2, 32)

PARTS = {"attention.q", "attention.out", "feed_forward.up", "feed_forward.down"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def of_width(d_model: int, *, scale: float = 1.0) -> Arch:
    arch = llama("w", d_model=d_model, n_layers=2, n_heads=d_model // 16, d_ff=2 * d_model,
                 vocab_size=256, max_seq_len=32)  # fmt: skip
    return replace(arch, head=replace(arch.head, scale=scale))


def of_experts(d_model: int, *, scale: float = 1.0) -> Arch:
    arch = mixtral("e", d_model=d_model, n_layers=2, n_heads=d_model // 16, n_kv_heads=2,
                   d_ff=d_model, vocab_size=256, max_seq_len=32, n_experts=4, n_active=2)  # fmt: skip
    return replace(arch, head=replace(arch.head, scale=scale))


def given_by(model: nn.Module) -> dict[str, Tensor]:
    """What parts of the last layer give, and the logits, for one text."""
    given: dict[str, Tensor] = {}
    last = dict(model.layers[1].named_modules())
    for name in PARTS & last.keys():
        last[name].register_forward_hook(lambda _m, _x, y, name=name: given.update({name: y}))
    with torch.no_grad(), record_routing(model) as routings:
        given["logits"] = model(TEXT)
    return given | {name: routing.logits for name, routing in routings.items()}


def changes(arch: Arch, recipe: Recipe, folder: Path) -> dict[str, float]:
    """How much the first steps change what each part gives: the root mean square, by part."""
    train(recipe, arch, CORPUS, folder)
    init = "gpt2" if recipe.mup_base_width is None else "mup"
    before = given_by(build_decoder(arch, init=init))
    after = given_by(load_trained(folder).model)
    return {name: float((after[name] - y).square().mean().sqrt()) for name, y in before.items()}


# --- coordinate check ---------------------------------------------------------------------------


def slopes(sizes: list[dict[str, float]]) -> dict[str, float]:
    """The power of the width with which each part's size grows, between the ends."""
    ends = math.log(WIDTHS[-1] / WIDTHS[0])
    return {name: math.log(sizes[-1][name] / sizes[0][name]) / ends for name in sizes[0]}


@pytest.mark.parametrize("make", [of_width, of_experts])
def test_what_steps_change_does_not_grow_with_the_width_in_mup_and_does_without(make, tmp_path):
    plain = replace(RECIPE, mup_base_width=None)
    mup = [changes(make(w, scale=BASE / w), RECIPE, tmp_path / f"mup{w}") for w in WIDTHS]
    without = [changes(make(w), plain, tmp_path / f"plain{w}") for w in WIDTHS]
    assert all(power < 0.3 for power in slopes(mup).values())
    assert all(power > 0.45 for power in slopes(without).values())


# --- rates --------------------------------------------------------------------------------------


def test_matrices_and_routers_have_the_rate_of_the_table_and_all_else_the_recipes_own():
    arch = gpt_oss("oss", d_model=64, n_layers=1, n_heads=4, d_ff=8, vocab_size=256,
                   max_seq_len=8, n_experts=3, n_active=2)  # fmt: skip
    model = build_decoder(arch)
    recipe = replace(RECIPE, weight_decay=0.1, warmup_steps=0)
    optimizer = Optimizer(adamw(model, recipe, 4.0), recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step(model.parameters(), 0)
    slow = ("q.weight", "k.weight", "v.weight", "out.weight", "router.weight", "gate.weight",
            "up.weight", "down.weight")  # fmt: skip
    for name, parameter in model.named_parameters():
        rate = 1e-2 / 4 if name.endswith(slow) else 1e-2
        decays = name.endswith((*slow, "tokens.weight", "head.weight"))
        # Adam's first step is the rate, whatever the gradient; decay takes 0.1 * 1e-2 of each.
        expected = before[name] * (1 - 1e-3 * decays) - rate
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_at_the_base_width_rates_are_the_recipes_and_no_multiplier_is_asked_for(tmp_path):
    model = build_decoder(of_width(BASE))
    groups = adamw(model, RECIPE, widening(RECIPE, of_width(BASE))).param_groups
    assert [group["rate_share"] for group in groups] == [1.0, 1.0]
    train(replace(RECIPE, steps=1), of_width(BASE), CORPUS, tmp_path)


def test_a_run_begins_with_mups_weights(tmp_path):
    arch = of_width(64, scale=0.5)
    train(RECIPE, arch, CORPUS, tmp_path, stop_after=0)
    pairs = zip(load_trained(tmp_path).model.parameters(),
                build_decoder(arch, init="mup").parameters(), strict=True)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_routers_first_weights_are_drawn_as_an_outputs_are():
    for d_model in (64, 256):
        router = build_decoder(of_experts(d_model), init="mup").layers[0].feed_forward.router
        assert math.isclose(router.weight.detach().std() * d_model, 1, rel_tol=0.15)


def test_logits_without_a_multiplier_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"head\.scale=1\.0.*head\.scale = 0\.25 in the spec"):
        train(RECIPE, of_width(128), CORPUS, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="mup_base_width=0"):
        replace(RECIPE, mup_base_width=0)


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    arch = of_width(64, scale=0.5)
    for stop in (2, None):
        train(RECIPE, arch, CORPUS, tmp_path / "stopped", stop_after=stop)
    train(RECIPE, arch, CORPUS, tmp_path / "straight")
    models = [load_trained(tmp_path / name).model for name in ("stopped", "straight")]
    pairs = zip(*(model.parameters() for model in models), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

"""Recipes, steps and the loop: what is refused, what is skipped, and that it learns."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isoflop.arch import llama
from isoflop.arch.families import gpt_oss, stablelm
from isoflop.errors import InputError
from isoflop.model import build
from isoflop.runs import read_metrics
from isoflop.train import Recipe, loop, parse_recipe, read_recipe
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import read_result, train
from isoflop.train.markov import Markov
from isoflop.train.optim import Diverged, Optimizer, adamw, learning_rate

ARCH = llama("tiny", d_model=32, n_layers=2, n_heads=2, d_ff=64, vocab_size=256, max_seq_len=64)
RECIPE = Recipe(seq_len=32, batch_size=4, steps=6, learning_rate=1e-2, eval_bytes=256)


@pytest.fixture(scope="module")
def corpus() -> ByteCorpus:
    return ByteCorpus.python_library(300_000)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- recipe -----------------------------------------------------------------------------


def test_a_recipe_lists_all_that_is_wrong_at_once():
    table = {"seq_len": 8.0, "batch_size": 0, "steps": True, "learning_rate": math.nan,
             "precision": "fp8", "betas": [0.9, 1.0], "warmup": 3, "weight_decay": -1}  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_recipe(table)
    fields = {problem.field for problem in caught.value.problems}
    assert fields == set(table)
    assert "did you mean warmup_steps?" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "rule"),
    [({"warmup_steps": 6}, "less than steps=6"), ({"eval_bytes": 31}, "at least seq_len=32"),
     ({"min_lr_ratio": 1.5}, "at most 1"), ({"data": ""}, "a path or python-library")],
)  # fmt: skip
def test_rules_between_fields_hold(change, rule):
    with pytest.raises(InputError, match=rule):
        replace(RECIPE, **change)


def test_a_recipe_is_read_from_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        "seq_len=32\nbatch_size=4\nsteps=6\nlearning_rate=1e-2\neval_bytes=256\nbetas=[0.9, 0.95]"
    )
    assert read_recipe(path) == RECIPE
    path.write_text("model = 'gpt2'\nsteps=6")
    with pytest.raises(InputError) as caught:
        read_recipe(path)
    assert [p.field for p in caught.value.problems] == ["seq_len", "batch_size", "learning_rate"]
    path.write_bytes(b"steps = \xff")
    with pytest.raises(InputError, match="be UTF-8"):
        read_recipe(path)
    with pytest.raises(InputError, match="No such file"):
        read_recipe(tmp_path / "none.toml")


# --- schedule ---------------------------------------------------------------------------


@given(st.integers(1, 300), st.data(), st.floats(0, 1), st.floats(1e-6, 10))
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(steps, data, ratio, peak):
    warmup = data.draw(st.integers(0, steps - 1))
    recipe = replace(
        RECIPE, steps=steps, warmup_steps=warmup, min_lr_ratio=ratio, learning_rate=peak
    )
    rates = [learning_rate(step, recipe) for step in range(steps)]
    assert all(rate > 0 or ratio == 0 for rate in rates[:-1])
    assert math.isclose(max(rates), peak)
    assert math.isclose(rates[warmup], peak)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if warmup < steps - 1:
        assert math.isclose(rates[-1], ratio * peak, abs_tol=1e-12)
        middle = (warmup + steps - 1) / 2
        if middle == int(middle):
            assert math.isclose(rates[int(middle)], (1 + ratio) / 2 * peak)


# --- optimizer --------------------------------------------------------------------------


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 3), nn.LayerNorm(3), nn.Linear(3, 2))


def test_only_matrices_decay():
    model, recipe = small_model(), replace(RECIPE, weight_decay=0.5, learning_rate=1.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(adamw(model, recipe), recipe).step(model.parameters(), 0)
    for name, parameter in model.named_parameters():
        share = 0.5 if name in {"0.weight", "2.weight"} else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * share)


def test_biases_of_experts_norms_of_heads_and_sinks_do_not_decay():
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_ff": 4, "vocab_size": 9,
             "max_seq_len": 8}  # fmt: skip
    for arch in (
        gpt_oss("oss", n_experts=3, n_active=2, **shape),
        stablelm("lm", qk_norm=True, **shape),
    ):
        model = build(arch)
        groups = adamw(model, RECIPE).param_groups
        decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        left = {name for name, p in model.named_parameters() if id(p) not in decaying}
        vectors = {name for name, p in model.named_parameters() if p.ndim < 2}
        kept_whole = {
            "oss": {f"layers.0.feed_forward.experts.{x}.bias" for x in ("gate", "up", "down")},
            "lm": {f"layers.0.attention.{x}_norm.weight" for x in "qk"},
        }
        assert left == vectors | kept_whole[arch.name]


def test_a_step_is_adam_on_the_clipped_gradient():
    model = nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().clone()
    recipe = replace(RECIPE, steps=1, weight_decay=0.0, grad_clip=1.0, learning_rate=0.1)
    optimizer = Optimizer(adamw(model, recipe), recipe)
    model.weight.grad = torch.tensor([[3.0, -4.0]])
    assert optimizer.step(model.parameters(), 0) == 5.0
    torch.testing.assert_close(model.weight.detach(), weight - torch.tensor([[0.1, -0.1]]))
    moment = optimizer.adamw.state[model.weight]["exp_avg"]  # 0.1 of the clipped gradient
    torch.testing.assert_close(moment, torch.tensor([[0.06, -0.08]]))
    assert model.weight.grad is None


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_gradients_that_are_not_finite_change_nothing_and_ten_in_a_row_end_it(poison):
    model = small_model()
    optimizer = Optimizer(adamw(model, RECIPE), RECIPE)
    before = [p.detach().clone() for p in model.parameters()]

    def step(value: float, number: int) -> float:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        next(iter(model.parameters())).grad[0, 0] = value
        return optimizer.step(model.parameters(), number)

    for number in range(9):
        assert not math.isfinite(step(poison, number))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    step(1.0, 9)  # one good step, and the count starts again
    for number in range(10, 19):
        step(poison, number)
    with pytest.raises(Diverged, match="10 steps in a row, 10 to 19, are not finite"):
        step(poison, 19)


# --- loop -------------------------------------------------------------------------------


def test_a_tiny_model_beats_the_bytes_frequencies_and_is_scored_on_text_it_never_saw(
    tmp_path, corpus
):
    recipe = replace(RECIPE, steps=120, batch_size=8, warmup_steps=5, eval_bytes=8192)
    result = train(recipe, ARCH, corpus, tmp_path / "run")
    assert result.val_loss is not None
    assert result.val_loss < Markov.fit(corpus.train, 0).nats_per_byte(corpus.validation)
    assert (result.state, result.step, result.tokens) == ("finished", 120, 120 * 8 * 32)
    first = read_metrics(tmp_path / "run")[0]
    assert math.isclose(first["loss"], math.log(256), rel_tol=0.02)  # it starts from no knowledge


def test_rows_say_what_happened_and_the_callback_sees_each_step(tmp_path, corpus):
    recipe = replace(RECIPE, eval_every=4, log_every=3)
    seen = []
    before = torch.get_rng_state()
    result = train(recipe, ARCH, corpus, tmp_path, flops_per_token=1e6, on_step=seen.append)
    assert torch.equal(before, torch.get_rng_state())
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    rows = read_metrics(tmp_path)
    assert [(row["step"], "val_loss" in row) for row in rows] == [(3, False), (4, True), (6, True)]
    assert rows[-1]["tokens"] == 6 * 4 * 32
    assert all(math.isclose(r["flops_per_second"] * r["seconds"], 4 * 32 * 1e6) for r in rows)
    assert result == read_result(tmp_path)
    assert result.seconds_steps == tuple(row["seconds"] for row in rows)


def test_bf16_trains_near_fp32_with_fp32_weights(tmp_path, corpus):
    losses = {}
    for precision in ("fp32", "bf16"):
        recipe = replace(RECIPE, precision=precision)
        losses[precision] = train(recipe, ARCH, corpus, tmp_path / precision).loss
    assert losses["fp32"] != losses["bf16"]
    assert math.isclose(losses["fp32"], losses["bf16"], rel_tol=0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(tmp_path, corpus, number):
    handler = signal.getsignal(number)

    def send(row: dict[str, object]) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), number)

    result = train(RECIPE, ARCH, corpus, tmp_path, on_step=send)
    assert (result.state, result.reason, result.step) == ("stopped", number.name, 2)
    assert (tmp_path / "checkpoints" / "step-00000002").is_dir()
    assert signal.getsignal(number) is handler


def test_a_nan_step_is_logged_skipped_and_survived(tmp_path, corpus, monkeypatch):
    original = loop.Trainer._loss
    calls = []

    def poisoned(self, tokens_BT, targets_BT):
        calls.append(0)
        return original(self, tokens_BT, targets_BT) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(loop.Trainer, "_loss", poisoned)
    result = train(replace(RECIPE, log_every=6), ARCH, corpus, tmp_path)
    row = read_metrics(tmp_path)[0]
    assert (row["step"], row["loss"], row["grad_norm"], row["skipped"]) == (3, None, None, True)
    assert (result.state, result.skipped) == ("finished", 1)
    assert result.loss is not None
    assert result.loss < 6


def test_divergence_ends_the_run_and_its_status_says_why(tmp_path, corpus, monkeypatch):
    original = loop.Trainer._loss
    monkeypatch.setattr(loop.Trainer, "_loss", lambda *a: original(*a) * math.nan)
    with pytest.raises(Diverged):
        train(replace(RECIPE, steps=30), ARCH, corpus, tmp_path)
    result = read_result(tmp_path)
    assert result.state == "failed"
    assert "10 steps in a row" in result.reason


def test_parts_that_do_not_fit_are_refused_together_before_anything_is_written(tmp_path):
    arch = llama("t", d_model=32, n_layers=1, n_heads=2, d_ff=64, vocab_size=255, max_seq_len=16)
    with pytest.raises(InputError) as caught:
        train(RECIPE, arch, ByteCorpus.from_documents("x", [b"abc"]), tmp_path / "run")
    fields = [problem.field for problem in caught.value.problems]
    assert fields == ["vocab_size", "seq_len", "data", "eval_bytes"]
    assert not (tmp_path / "run").exists()


# --- compiled -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's tracing itself
def test_compiled_layers_train_to_the_same_losses_and_evaluate_as_they_are_written(
    corpus, tmp_path, monkeypatch
):
    """A stand-in for the compiler's last stage runs the traced graph: no C++ is needed here."""
    traced = []

    def interpret(graph, _inputs):
        traced.append(graph)
        return graph.forward

    def compile_layers(model):
        for layer in model.layers:
            layer.compile(dynamic=False, backend=interpret)

    monkeypatch.setattr(loop, "compile_problems", lambda _device: [])
    monkeypatch.setattr(loop, "compile_layers", compile_layers)
    recipe = replace(RECIPE, steps=3, eval_every=1)
    written = train(recipe, ARCH, corpus, tmp_path / "a")
    compiled = train(replace(recipe, compile=True), ARCH, corpus, tmp_path / "b")
    assert len(traced) == 1  # both layers in one, no break, nothing for evaluations
    rows = [read_metrics(found.run_dir) for found in (written, compiled)]
    for ours, theirs in zip(*rows, strict=True):
        for name in ("loss", "val_loss"):
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-5)


def test_a_machine_without_a_compiler_is_told_so(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"compile=True.*C\+\+ compiler.*install no-such-compiler"):
        train(replace(RECIPE, compile=True), ARCH, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()

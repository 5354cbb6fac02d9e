"""Models of experts in training: balance by losses or corrections, room, what is refused."""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from isoflop.arch import Arch, llama
from isoflop.arch.families import mixtral
from isoflop.arch.toml import spec_from_table
from isoflop.errors import InputError
from isoflop.model import build_decoder
from isoflop.model.experts import Capacity, Dropless, ExpertsModule, Router, record_routing
from isoflop.runs import read_metrics
from isoflop.train import Balance, Recipe, loop, parse_recipe
from isoflop.train.data import ByteCorpus
from isoflop.train.loop import train
from isoflop.train.trained import load_trained

ARCH = mixtral("moe", d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, d_ff=24, vocab_size=256,
               max_seq_len=32, n_experts=8, n_active=2)  # fmt: skip
RECIPE = Recipe(seq_len=32, batch_size=4, steps=60, learning_rate=1e-2, eval_bytes=256)
CORPUS = ByteCorpus.python_library(100_000)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def with_experts(**changes: object) -> Arch:
    """`ARCH` with other fields of its experts."""
    layers = [
        replace(layer, feed_forward=replace(layer.feed_forward, **changes)) for layer in ARCH.layers
    ]
    return replace(ARCH, layers=tuple(layers))


CORRECTED = with_experts(score_correction=True)


@pytest.fixture
def skewed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers that send nearly all tokens to expert 0 from the start."""
    build = loop.build_decoder

    def build_skewed(*arguments: Any, **options: Any) -> Any:
        model = build(*arguments, **options)
        with torch.no_grad():
            model.embedding.tokens.weight[:, 0] = 0.03  # what all tokens have in common
            for module in model.modules():
                if isinstance(module, Router):
                    module.weight *= 20  # tokens differ in what they choose
                    module.weight[:, 0] = torch.arange(8) == 0
        return model

    monkeypatch.setattr(loop, "build_decoder", build_skewed)


def loads(run: Path) -> list[float]:
    return [row["load_max_over_mean"] for row in read_metrics(run)]


def bits(run: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The log without its clock, and the digests of the last checkpoint."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(run)]
    last = max((run / "checkpoints").glob("step-*"))
    return rows, {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in last.glob("*.safetensors")
    }


# --- balance ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("skewed")
@pytest.mark.parametrize(
    ("arch", "balance", "rate"),
    [(ARCH, Balance(aux_loss_weight=0.05), 1e-3),
     (ARCH, Balance(aux_loss_weight=0.05, aux_loss_per="sequence"), 1e-3),
     (CORRECTED, Balance(bias_update_rate=0.01), 1e-5)],  # only the correction moves much
    ids=["batch", "sequence", "correction"],
)  # fmt: skip
def test_a_skewed_router_becomes_balanced_by_losses_or_corrections_and_not_without(
    arch, balance, rate, tmp_path
):
    recipe = replace(RECIPE, steps=60, learning_rate=rate)
    still = Balance(bias_update_rate=0.0) if arch is CORRECTED else None
    train(replace(recipe, balance=still), arch, CORPUS, tmp_path / "left")
    train(replace(recipe, balance=balance), arch, CORPUS, tmp_path / "balanced")
    left, balanced = loads(tmp_path / "left"), loads(tmp_path / "balanced")
    assert left[0] == balanced[0] > 2.9
    assert mean(left[-10:]) > 2.9
    assert mean(balanced[-10:]) < 2.5


def test_corrections_move_by_deepseeks_rate_where_none_is_given_and_not_in_skipped_steps(
    tmp_path, monkeypatch
):
    original = loop.Trainer._loss
    calls = []

    def poisoned(self, tokens_BT, targets_BT):
        calls.append(0)
        return original(self, tokens_BT, targets_BT) * (math.nan if len(calls) == 2 else 1.0)

    monkeypatch.setattr(loop.Trainer, "_loss", poisoned)
    train(replace(RECIPE, steps=3), CORRECTED, CORPUS, tmp_path)
    for module in load_trained(tmp_path).model.modules():
        if isinstance(module, Router):
            thousandths = module.correction * 1000
            assert torch.allclose(thousandths, thousandths.round(), atol=1e-4)
            assert 0 < thousandths.abs().max() < 2.5  # two moves, not three


def test_the_reported_loss_is_the_cross_entropy_and_the_others_stand_beside_it(tmp_path):
    weights = {"aux_loss_weight": 0.5, "z_loss_weight": 0.25}
    train(replace(RECIPE, steps=3), ARCH, CORPUS, tmp_path / "plain")
    train(replace(RECIPE, steps=3, balance=Balance(**weights)), ARCH, CORPUS, tmp_path / "both")
    plain, both = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "both")
    assert plain[0]["loss"] == both[0]["loss"]
    assert plain[0]["grad_norm"] != both[0]["grad_norm"]
    assert plain[2]["loss"] != both[2]["loss"]
    assert not {"aux_loss", "z_loss", "dropped_share"} & set(plain[0])
    assert math.isclose(both[0]["aux_loss"], 1, rel_tol=0.02)  # scores are near even at first
    assert math.isclose(both[0]["z_loss"], math.log(8) ** 2, rel_tol=0.02)


def test_the_gradient_is_that_of_the_weighted_sum_over_layers(tmp_path):
    """The norm of the first step, against the sum put together by hand."""
    train(replace(RECIPE, steps=1, balance=Balance(0.5, "batch", 0.25)), ARCH, CORPUS, tmp_path)
    model = build_decoder(ARCH)
    with record_routing(model) as routings:
        total = model.loss(*loop._training(RECIPE, CORPUS)(0))
    for routing in routings.values():
        share_E = routing.load / routing.load.sum()
        probability_E = routing.logits.softmax(-1).mean((0, 1))
        total = total + 0.5 * 8 * (share_E * probability_E).sum()
        total = total + 0.25 * routing.logits.exp().sum(-1).log().square().mean()
    total.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert math.isclose(read_metrics(tmp_path)[0]["grad_norm"], norm, rel_tol=1e-5)


# --- room ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("skewed")
def test_room_is_limited_in_training_and_evaluations_serve_every_choice(tmp_path, monkeypatch):
    seen = []
    forward = ExpertsModule.forward

    def spy(self, x_BTD):
        seen.append((self.training, self.dispatch))
        return forward(self, x_BTD)

    monkeypatch.setattr(ExpertsModule, "forward", spy)
    recipe = replace(RECIPE, steps=4, eval_every=2, balance=Balance(capacity_factor=1.0))
    train(recipe, ARCH, CORPUS, tmp_path)
    assert set(seen) == {(True, Capacity(1.0)), (False, Dropless())}
    for row in read_metrics(tmp_path):
        # Of 8 experts with room for 1/8 of the choices each, one has `load_max_over_mean`.
        assert (row["load_max_over_mean"] - 1) / 8 <= row["dropped_share"] < 1


def test_an_evaluation_moves_no_correction_and_adds_no_loss(tmp_path):
    arch, balance = CORRECTED, Balance(aux_loss_weight=1.0, z_loss_weight=1.0)
    often = replace(RECIPE, steps=4, eval_every=1, balance=balance)
    train(often, arch, CORPUS, tmp_path / "often")
    train(replace(often, eval_every=0), arch, CORPUS, tmp_path / "once")
    rows = [bits(tmp_path / name) for name in ("often", "once")]
    assert rows[0][1] == rows[1][1]
    model = load_trained(tmp_path / "once").model
    batches = loop._validation(often, CORPUS)
    with torch.no_grad():
        expected = mean(float(model.loss(*batch)) for batch in batches)
    assert math.isclose(rows[1][0][-1]["val_loss"], expected, rel_tol=1e-6)


# --- resuming, compiling ------------------------------------------------------------------------


def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(tmp_path):
    balance = Balance(0.01, "sequence", 0.001, 0.01, 1.25)
    recipe = replace(RECIPE, steps=8, eval_every=4, checkpoint_every=3, balance=balance)
    train(recipe, CORRECTED, CORPUS, tmp_path / "straight")
    for stop in (2, 5, None):
        train(recipe, CORRECTED, CORPUS, tmp_path / "stopped", stop_after=stop)
    assert bits(tmp_path / "straight") == bits(tmp_path / "stopped")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # PyTorch's tracing itself
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # and this
def test_compiled_layers_are_compiled_once_and_balance_as_those_as_written(tmp_path, monkeypatch):
    """A stand-in for the compiler's last stage runs the traced graph: no C++ is needed here."""
    traced = []

    def interpret(graph, _inputs):
        traced.append(graph)
        return graph.forward

    def compile_layers(model):
        for layer in model.layers:
            layer.compile(dynamic=False, backend=interpret, fullgraph=True)

    monkeypatch.setattr(loop, "compile_problems", lambda _device: [])
    monkeypatch.setattr(loop, "compile_layers", compile_layers)
    balance = Balance(0.01, "batch", 0.001, 0.01, 1.25)
    recipe = replace(RECIPE, steps=4, eval_every=2, balance=balance)
    train(recipe, CORRECTED, CORPUS, tmp_path / "a")
    train(replace(recipe, compile=True), CORRECTED, CORPUS, tmp_path / "b")
    assert len(traced) == 1  # both layers, all steps
    for ours, theirs in zip(*(read_metrics(tmp_path / name) for name in "ab"), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(math.isclose(ours[x], theirs[x], rel_tol=1e-4) for x in ours if x != "seconds")


# --- recipes ------------------------------------------------------------------------------------


def test_balance_is_read_from_a_table_and_all_that_is_wrong_in_it_is_listed():
    table = {"seq_len": 8, "batch_size": 2, "steps": 4, "learning_rate": 0.1, "eval_bytes": 64}
    recipe = parse_recipe(
        {**table, "balance": {"aux_loss_weight": 0.01, "aux_loss_per": "sequence"}}
    )
    assert recipe.balance == Balance(0.01, "sequence")
    wrong = {"aux_loss_weight": -1, "aux_loss_per": "layer", "z_loss": 1, "capacity_factor": 0,
             "bias_update_rate": True}  # fmt: skip
    with pytest.raises(InputError) as caught:
        parse_recipe({**table, "steps": 0, "balance": wrong})
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {*(f"balance.{name}" for name in wrong), "steps"}
    assert "did you mean z_loss_weight?" in str(caught.value)
    with pytest.raises(InputError, match="balance=3: must be a table"):
        parse_recipe({**table, "balance": 3})


def test_the_recipe_of_the_page_trains(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "training.md"
    (text,) = re.findall(r"```toml\n(.*?)```", page.read_text(), re.DOTALL)
    recipe = replace(parse_recipe(tomllib.loads(text)), steps=16, eval_bytes=256)
    train(recipe, spec_from_table(recipe.model, "page"), CORPUS, tmp_path)
    told = {"load_max_over_mean", "aux_loss", "z_loss", "dropped_share"}
    assert told <= read_metrics(tmp_path)[-1].keys()


def test_a_balance_that_the_model_has_no_use_for_is_refused(tmp_path):
    dense = llama("d", d_model=16, n_layers=1, n_heads=2, d_ff=24, vocab_size=256, max_seq_len=32)

    def said(arch: Arch, **fields: float) -> str:
        with pytest.raises(InputError) as caught:
            train(replace(RECIPE, balance=Balance(**fields)), arch, CORPUS, tmp_path / "run")
        return str(caught.value)

    assert "balance=given: must be left out: this model has no experts" in said(dense)
    both = said(ARCH, bias_update_rate=0.001, capacity_factor=4.5)
    assert "balance.bias_update_rate=0.001" in both
    assert "score_correction = true" in both
    assert "balance.capacity_factor=4.5: must be at most n_experts / n_active = 4" in both
    assert not (tmp_path / "run").exists()

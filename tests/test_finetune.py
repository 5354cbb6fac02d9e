"""Fine-tuning: trained parameters against a model with updates put in by hand, and memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.arch import Arch, llama
from isoflop.arch.spec import Rope
from isoflop.arch.zoo import entry
from isoflop.count import (
    FORMATS,
    TRAINING_STATES,
    Adapters,
    Full,
    Kernels,
    Lora,
    Only,
    Precision,
    Workload,
    bytes_weights,
    finetune_memory,
    memory_training,
    params,
    params_trained,
)
from isoflop.count.memory_saved import FLASH
from isoflop.errors import InputError, UnknownName
from isoflop.model import build
from isoflop.quantity.expr import FUNCTIONS
from strategies import llamas

TINY = llama(
    "tiny", d_model=16, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=40, max_seq_len=64
)
STATE = TRAINING_STATES["bf16"]
WORK = Workload.train(2, 8)
MATRICES = ("q", "k", "v", "out", "gate", "up", "down")


def trained_by_hand(arch: Arch, rank: int, targets: set[str]) -> int:
    """Freeze a model on the meta device, put two thin matrices beside each target, count."""
    model = build(arch, device="meta")
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        if name.rsplit(".", maxsplit=1)[-1] in targets and weight is not None and weight.dim() == 2:
            for update, shape in {"lora_a": weight.shape[1:], "lora_b": weight.shape[:1]}.items():
                module.register_parameter(
                    update, torch.nn.Parameter(torch.empty(rank, *shape, device="meta"))
                )
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def unscaled(arch: Arch) -> Arch:
    """Rotary positions without scaling, which not every model that is built has."""
    layer = arch.layers[0]
    layer = replace(layer, attention=replace(layer.attention, position=Rope()))
    return replace(arch, layers=(layer,) * arch.n_layers)


@given(llamas().map(unscaled), st.integers(1, 9), st.sets(st.sampled_from(MATRICES), min_size=1))
@settings(max_examples=25, deadline=None)
def test_updates_count_what_a_model_with_them_has(arch: Arch, rank: int, targets: set[str]) -> None:
    tree = params_trained(arch, Lora(rank, tuple(sorted(targets))))
    assert tree.value == trained_by_hand(arch, rank, targets)


@pytest.mark.parametrize(
    ("name", "trained"), [("llama-2-7b", 4_194_304), ("llama-2-13b", 6_553_600)]
)
def test_lora_of_rank_8_on_q_and_v_trains_the_published_numbers(name: str, trained: int) -> None:
    # LitGPT's tutorials/resource-tables.md, "Trainable parameters".
    assert params_trained(entry(name).arch, Lora(8)).value == trained


def test_adapters_count_two_bottlenecks_per_layer() -> None:
    # Houlsby 2019, section 2.1: 2 m d + d + m per adapter.
    assert params_trained(TINY, Adapters(5)).value == 3 * 2 * (2 * 5 * 16 + 16 + 5)


def test_parts_may_train_as_they_are() -> None:
    assert params_trained(TINY, Full()).value == params(TINY).value
    assert params_trained(TINY, Only(("head",))).value == 40 * 16
    assert params_trained(TINY, Only(("attention/k", "embedding"))).value == 3 * 16 * 8 + 40 * 16
    beside = params_trained(TINY, Lora(2, ("q",), whole=("head",))).value
    assert beside == 3 * 2 * (16 + 16) + 40 * 16


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_a_rank_below_one_is_refused(rank: object) -> None:
    with pytest.raises(InputError, match="whole number of at least 1"):
        Lora(rank)  # type: ignore[arg-type]


def test_a_target_that_is_not_there_is_named_with_what_is() -> None:
    with pytest.raises(UnknownName, match="it has q, k, v, out, gate, up, down, head"):
        params_trained(TINY, Lora(2, ("w1",)))
    with pytest.raises(UnknownName, match="did you mean gate"):
        params_trained(TINY, Lora(2, ("gatee",)))
    with pytest.raises(InputError, match="at least one part"):
        params_trained(TINY, Lora(2, ()))


# --- memory ---------------------------------------------------------------------------------


def test_training_everything_is_training() -> None:
    assert (
        finetune_memory(TINY, WORK, Full(), STATE).value == memory_training(TINY, WORK, STATE).value
    )


def test_gradients_and_optimizer_are_for_the_updates_alone() -> None:
    tree = finetune_memory(TINY, WORK, Lora(4), STATE)
    trained = 3 * 4 * (16 + 16 + 16 + 8)
    assert tree.find("bytes_weights").value == 2 * params(TINY).value
    assert tree.find("bytes_added").value == tree.find("bytes_grads").value == 2 * trained
    assert tree.find("bytes_optimizer").value == 12 * trained


def test_a_frozen_matrix_keeps_no_input_but_a_target_does() -> None:
    tokens = 16

    def layer(method: Lora) -> int:
        tree = finetune_memory(TINY, WORK, method, STATE).find("bytes_activations/layer")
        return int(tree.size.value)

    whole = int(memory_training(TINY, WORK, STATE).find("bytes_activations/layer").size.value)
    # Frozen: the inputs of q (shared with k, v), gate (shared with up) and down have no use.
    on_q, on_v = (layer(Lora(4, (name,))) for name in ("q", "v"))
    assert whole - on_q == 2 * tokens * (16 + 24) - 2 * tokens * 4  # rank-wide inputs come on top
    assert on_q == on_v, "q and v read the same input"
    assert layer(Lora(4, ("down",))) - on_q == 2 * tokens * (24 - 16)
    assert layer(Lora(4, ("q", "gate", "down"))) == whole + 3 * 2 * tokens * 4


def test_dropout_before_an_update_keeps_a_copy_and_a_mask_in_place_of_the_input() -> None:
    tokens, D = 16, 16

    def layer(kernels: Kernels, *, dropout: bool) -> int:
        lora = Lora(4, ("q", "v"), dropout=dropout)
        tree = finetune_memory(TINY, WORK, lora, STATE, kernels=kernels)
        return int(tree.find("bytes_activations/layer").size.value)

    for kernels, copies in ((FLASH, 2), (replace(FLASH, fused_qkv=True), 1)):
        input_, dropped = 2 * tokens * D, copies * 3 * tokens * D
        both = layer(kernels, dropout=True) - layer(kernels, dropout=False)
        assert both == dropped - input_, "16 bits and a byte of mask for each matrix of updates"


def test_a_quantised_head_stands_in_16_bits_twice_while_it_goes_backward() -> None:
    format_ = FORMATS["nf4"]
    ends, head = (
        finetune_memory(TINY, WORK, Lora(4), STATE, base=f)
        for f in (format_, replace(format_, head=True))
    )
    size = 16 * TINY.vocab_size
    assert head.find("head_dequantized").value == 2 * 2 * size
    saved = ends.find("bytes_weights/head").value - head.find("bytes_weights/head").value
    assert saved == pytest.approx(size * (2 - 4.5 / 8), rel=0.02)
    assert not any(child.name == "head_dequantized" for child in ends.children)


def test_qlora_stores_the_base_in_4_127_bits_and_lora_is_the_same_otherwise() -> None:
    arch = entry("llama-2-7b").arch
    work = Workload.train(1, 512)
    plain, quantised = (
        finetune_memory(arch, work, Lora(16), STATE, base=b) for b in (None, "nf4-dq")
    )
    for part in ("bytes_added", "bytes_grads", "bytes_optimizer", "bytes_activations"):
        assert plain.find(part).value == quantised.find(part).value
    inside = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    ends = params(arch).value - inside
    expected = inside * 4.127 / 8 + 2 * ends
    assert float(quantised.find("bytes_weights").value) == pytest.approx(expected, rel=1e-4)
    assert plain.find("bytes_weights").value == bytes_weights(arch, Precision.BF16).value


def test_a_base_that_trains_is_stored_as_training_says() -> None:
    with pytest.raises(InputError, match="own weights train"):
        finetune_memory(TINY, WORK, Full(), STATE, base="nf4")


@given(llamas(), st.integers(1, 8), st.sampled_from(["none", "selective", "full"]))
@settings(max_examples=25, deadline=None)
def test_the_tree_adds_up_reads_back_and_rank_never_shrinks(
    arch: Arch, rank: int, recompute: str
) -> None:
    work = Workload.train(1, min(8, arch.max_seq_len))
    tree, more = (
        finetune_memory(arch, work, Lora(r, ("q", "down")), STATE, recompute=recompute)  # type: ignore[arg-type]
        for r in (rank, rank + 1)
    )
    assert tree.value == sum(child.value for child in tree.children)
    assert more.value >= tree.value
    for path, node in tree.walk():
        names = {name: symbol.value for name, symbol in node.total.symbols().items()}
        again = eval(node.total.text, dict(FUNCTIONS), names)
        assert math.isclose(again, node.value, rel_tol=1e-12), path

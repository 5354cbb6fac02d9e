"""Activations that a built model keeps from forward to backward, by saved-tensor hooks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields as fields_of
from dataclasses import is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from isoflop.arch import Arch
from isoflop.arch.spec import Attention, LatentAttention, Rope
from isoflop.check.paths import AtWork, Shallow
from isoflop.check.row import Row, leaf_values
from isoflop.check.work import inputs_for, loss_of_whole_logits, sample_of
from isoflop.count import Kernels, Precision, Recompute, Workload, bytes_saved
from isoflop.count.memory_saved import RECOMPUTES
from isoflop.model import build
from isoflop.model.layer import LayerModule
from isoflop.model.recompute import set_recompute

#: Long enough that attention's kernels keep no scores, and that what grows with the square of the
#: tokens would show.
SEQ_LEN, SOURCE_LEN = 1024, 768
#: The part by which the sums may differ, beside `bytes_turns`.
ALLOWED = 0.02
#: What this model keeps: masks in the precision of what they multiply, one fp32 tensor of logits.
OWN = Kernels("isoflop", "isoflop.model with fused attention", bytes_mask=None)

#: Paths, and why what is kept there differs: what the description leaves out as it is small, or
#: what this model's way of computing adds.
REASONS = (
    (r".*/(attention|cross)/core", "turns of positions, masks, biases; a value that is a part of what made it too"),
    (r".*/distances|.*relative_bias.*", "sine waves, buckets; a layer made again is given biases"),
    (r".*norm.*", "a weight with 1 added"),
    (r".*/router", "scores, choices, gates"),
    (r".*/feed_forward/sum", "gates, and which token a row is of"),
    (r".*/experts/.*", "where each expert's rows end, and whose they are"),
    (r".*/shared_gate", "a gate per token"),
    (r".*positions.*", "their numbers"),
    (r"vision", "where tokens of windows stand"),
    (r"loss", "the count of tokens that is divided by"),
    (r"(encoder|embedding)/tokens", "one table reads source and target"),
    (r"(encoder/)?output|.*/cross/k", "the encoder's output, under the first layer that reads it"),
    (r"(encoder)?", "what layers are given, places of image tokens, masks of what a stack gives"),
)  # fmt: skip


def saved_rows(arch: Arch, shallow: Shallow) -> Iterator[Row]:
    """Saved activations by path under each policy of recomputing; sums within `ALLOWED`."""
    work = sample_of(arch, SEQ_LEN, SOURCE_LEN)
    module = build(shallow.arch, device="meta").train()
    for recompute in RECOMPUTES:
        set_recompute(module, recompute)
        built = shallow.by_path(bytes_kept(module, work))
        if recompute == "full":  # a layer keeps its input, whatever it does with it
            built = {path.removesuffix("/residual"): size for path, size in built.items()}
        quantity = f"saved_{recompute}"
        yield from _rows(quantity, derived_bytes(arch, work, recompute), built, bytes_turns(arch))


def derived_bytes(arch: Arch, work: Workload, recompute: Recompute) -> dict[str, int]:
    """What is derived to wait at the end of forward: a layer made again is not there yet."""
    tree = bytes_saved(arch, work, Precision.FP32, OWN, recompute)
    waiting = [c for c in tree.children if c.name != "layer_going_backward"]
    return leaf_values(replace(tree, children=tuple(waiting)))


def bytes_turns(arch: Arch) -> int:
    """Cosines and sines in fp32 of the tokens' positions, which layers that turn alike share.

    No description has them: they do not grow with d_model, and show only beside narrow layers
    (3 % of all that is kept where d_model is 16).

    >>> from isoflop.arch import zoo
    >>> bytes_turns(zoo.entry("llama-3-8b").arch) == 2 * 4 * SEQ_LEN * 128
    True
    """
    widths = set()
    for layer in arch.kinds.values():
        match layer.attention:
            case LatentAttention(position=Rope() as rope, d_head_rope=width):
                widths.add((rope, width))
            case Attention(position=Rope() as rope, d_head=width):
                widths.add((rope, rope.d_rotary or width))
    return sum(2 * 4 * SEQ_LEN * width for _, width in widths)


def _rows(
    quantity: str, derived: dict[str, int], built: dict[str, int], turns: int
) -> Iterator[Row]:
    for path in [*derived, *(p for p in built if p not in derived)]:
        here, there = derived.get(path, 0), built.get(path, 0)
        reason = "" if here == there else reason_for(path)
        yield Row(f"{quantity}/{path}", here, there, reason, None if reason else 0.0)
    whole = sum(built.values())
    yield Row(quantity, sum(derived.values()), whole, allowed=ALLOWED + turns / whole)


def reason_for(path: str) -> str:
    """Why a path differs; empty where no reason is known."""
    return next((why for pattern, why in REASONS if re.fullmatch(pattern, path)), "")


def bytes_kept(module: nn.Module, work: Workload) -> dict[str, int]:
    """Bytes that wait for backward, by the dotted name of the module that kept them first.

    Storages count whole, as a view keeps all of what it is a view of, and once; weights and
    buffers are there anyway.
    """
    # Held, so that no number of a storage is given twice.
    seen = {_number(x): x.untyped_storage() for x in (*module.parameters(), *module.buffers())}
    kept: dict[str, int] = defaultdict(int)
    at_work = AtWork(module)

    def keep(tensor: Tensor) -> Tensor:
        if _number(tensor) not in seen:
            storage = seen[_number(tensor)] = tensor.untyped_storage()
            kept[at_work.name] += storage.nbytes()
        return tensor

    with (
        _given_to_layers(module, keep),
        at_work,
        FusedAttention(),
        saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss_of_whole_logits(module, inputs_for(module, work))
    return dict(kept)


@contextmanager
def _given_to_layers(module: nn.Module, keep: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let what layers read beside their input be kept, where they are to be made again from it.

    It waits in their arguments, where autograd saves nothing of it.
    """

    def hook(_layer: nn.Module, given: tuple[Any, ...]) -> None:
        fields = (getattr(x, f.name) for x in given if is_dataclass(x) for f in fields_of(x))
        for tensor in fields:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                keep(tensor)

    again = [x for x in module.modules() if isinstance(x, LayerModule) and "forward" in vars(x)]
    handles = [layer.register_forward_pre_hook(hook) for layer in again]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _number(tensor: Tensor) -> int:
    """One for each storage; on the meta device all have the address 0."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - no other name tells them apart


class FusedAttention(TorchFunctionMode):
    """PyTorch's attention by the kernels that a device would take; the meta device takes none.

    A CPU's kernel, and where values have another width than keys or biases a gradient, which it
    cannot do, the memory-efficient one of GPUs. Both keep the same.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        (q, k, v), mask = args, kwargs["attn_mask"]
        causal, scale, aten = kwargs["is_causal"], kwargs["scale"], torch.ops.aten
        if q.shape[-1] != v.shape[-1] or (mask is not None and mask.requires_grad):
            efficient = aten._scaled_dot_product_efficient_attention  # noqa: SLF001 - no public name
            return efficient(q, k, v, mask, True, 0.0, causal, scale=scale)[0]
        flash = aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - nor it
        return flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)[0]

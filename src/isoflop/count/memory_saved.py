"""Activations: which tensors wait for backward, by kernels, recompute policy and sharding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from isoflop.arch.spec import Arch
from isoflop.count.blocks import CAPPED, Part, Saved, describe
from isoflop.count.operators import Core, Loss, Pointwise
from isoflop.count.workload import Precision, Workload
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, leaf, maximum, number, total
from isoflop.quantity.expr import product

#: none: everything is kept. selective: what is cheap to make again is not: attention's
#: scores where the kernels keep them (Korthikanti 2022, 2205.05198, section 5), else the
#: outputs of activation functions. full: a layer keeps its input only.
Recompute: TypeAlias = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = get_args(Recompute)

#: in_place: the fp32 softmax, overwritten by its gradient (Megatron). eager: the logits and
#: a gradient in fp32 beside it (PyTorch's cross_entropy). autocast: log-probabilities and two
#: gradients in fp32. same: logits, their shifted copy, log-probabilities and a gradient, all in
#: the activations' precision. fused: chunks, nothing is kept.
LossKernel: TypeAlias = Literal["in_place", "eager", "autocast", "same", "fused"]

#: What an activation function keeps beside what goes into it, where each of its operations is a
#: kernel of its own: a gate's factor, and steps on the way.
STEPS = frozenset({"gate", "sigmoid", "clamped gate", "clamped up"})
#: Saved tensors that an activation function gives again.
REBUILT = frozenset(
    {("down", "input"), ("activation", "mask"), *(("activation", name) for name in STEPS)}
)
SMALL = frozenset({"statistics", "log-sum-exp"})

#: LoRA's input after dropout: of the first update of a block, and of others there. Where one
#: matrix makes queries, keys and values its updates read one copy.
DROPPED = ("dropped", "dropped again")

#: How often attention's tensors are held where one matrix makes them: the output of the matrix
#: holds each once, the rotated copies queries and keys once more.
FUSED = {"queries": number(2), "keys and values": number(3) / 2}


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a set of kernels keeps from forward to backward.

    Attributes:
        scores: attention keeps the probabilities of all pairs (no flash attention).
        gate_factor: an activation keeps what it makes on the way, a gate's factor above all, as
            separate kernels do.
        bytes_mask: of one element of a dropout mask; None where masks take the
            activations' precision.
        norm_copies: RMSNorm keeps its input in fp32, and that normalised, in place of the input.
        statistics: norms' statistics and attention's log-sum-exp are counted.
        loss: how cross entropy treats the logits.
        fused_qkv: one matrix makes queries, keys and values, and values are a view of its output:
            it stays whole beside the rotated queries and keys.
        frozen_inputs: a frozen matrix keeps its input too (bitsandbytes 0.41, MatMul4Bit).
    """

    name: str
    source: str
    scores: bool = False
    gate_factor: bool = True
    bytes_mask: int | None = 1
    norm_copies: bool = False
    statistics: bool = True
    loss: LossKernel = "in_place"
    fused_qkv: bool = False
    frozen_inputs: bool = False


FLASH = Kernels("flash", "flash attention, each other operation a kernel of its own")
KERNELS = {
    k.name: k
    for k in (
        FLASH,
        Kernels("fused", "flash attention, fused gates, chunked cross entropy",
                gate_factor=False, loss="fused"),
        Kernels("eager", "PyTorch without flash attention; dropout masks in the activations' precision",
                scores=True, bytes_mask=None, loss="eager"),
        Kernels("huggingface", "transformers' Llama: flash attention, RMSNorm in separate fp32 steps",
                norm_copies=True, loss="eager"),
        Kernels("korthikanti", "Korthikanti 2022 (2205.05198), equation 1: s b h (34 + 5 a s / h) per layer",
                scores=True, statistics=False),
    )
}  # fmt: skip


def unsplit(_axis: str) -> Expr:
    """Nothing is sharded: every axis is whole."""
    return number(1)


def always(_path: str, _part: Part, _saved: Saved) -> bool:
    """Every kept tensor has a use: all weights train."""
    return True


@dataclass(frozen=True, slots=True)
class Keeping:
    """Everything that decides how many bytes a part keeps on one rank.

    `ways` gives into how many pieces a tensor with that logical axis is split. `needed`
    says whether a part's tensor has a use at all: with frozen weights some have none.
    """

    activation: Precision
    kernels: Kernels = FLASH
    recompute: Recompute = "none"
    ways: Callable[[str], Expr] = unsplit
    needed: Callable[[str, Part, Saved], bool] = always

    def own(self, part: Part, path: str) -> Expr:
        """Bytes that a leaf part keeps, one copy."""
        some = [s for s in part.kept_by_some if self.kernels.scores or s.kind == "mask"]
        kept = [s for s in (*part.saved, *some) if self._keeps(part, s)]
        return total(
            product([s.size, *self._bytes_each(part, s)]) / self.ways(s.axis)
            for s in kept
            if self.needed(path, part, s)
        )

    def _keeps(self, part: Part, saved: Saved) -> bool:
        place = (part.name, saved.name)
        if isinstance(part.operator, Loss) or saved.name == CAPPED:
            return self.kernels.loss != "fused"
        if saved.name in SMALL:
            return self.kernels.statistics
        if part.name == "activation" and saved.name in STEPS and not self.kernels.gate_factor:
            return False
        if saved.name.startswith(DROPPED[1]) and self.kernels.fused_qkv and saved.axis == "model":
            return False
        if self.recompute == "selective":
            return saved.kind not in SCORES if self.kernels.scores else place not in REBUILT
        return True

    def _bytes_each(self, part: Part, saved: Saved) -> tuple[Expr, ...]:
        fp32, own = Precision.FP32.bytes_each, self.activation.bytes_each
        if isinstance(part.operator, Loss):
            loss = {
                "in_place": fp32,
                "eager": own + 2 * fp32,
                "autocast": 3 * fp32,
                "same": 4 * own,
            }
            return (loss[self.kernels.loss],)
        match part.operator:
            case Pointwise("rms_norm") if saved.name == "input" and self.kernels.norm_copies:
                return (own + fp32,)
            case Core() if self.kernels.fused_qkv and saved.name in FUSED:
                return (FUSED[saved.name] * own,)
        match saved.kind:
            case "fp32":
                return (fp32,)
            case "beside fp32":
                return (number(0) if self.activation is Precision.FP32 else own,)
            case "index":
                return (Symbol("bytes_index", 8, meaning="bytes of a token id"),)
            case "mask" | "mask_scores" if self.kernels.bytes_mask is not None:
                mask = Symbol(
                    "bytes_mask", self.kernels.bytes_mask, meaning="bytes of a mask's element"
                )
                return () if mask.given == 1 else (mask,)
        return (own,)

    def tree(self, part: Part, path: str = "") -> Node:
        """What a part keeps, all its copies, by path; a layer run again keeps its input."""
        path = f"{path}/{part.name}" if path else part.name
        if part.is_layer and self.recompute == "full":
            size = stream_of(part) * self.activation.bytes_each / self.ways("model")
            return leaf(part.name, "bytes", size, times=part.times, basis=Basis.MODELLED)
        if part.parts:
            below = [self.tree(p, path) for p in part.parts if keeps(p)]
            return branch(part.name, "bytes", below, times=part.times)
        size = self.own(part, path)
        return leaf(part.name, "bytes", size, times=part.times, basis=Basis.MODELLED)


SCORES = frozenset({"scores", "mask_scores"})


def stream_of(layer: Part) -> Expr:
    """Numbers in a layer's input: what it adds to, once per block."""
    add = next(part.operator for part in layer.parts if part.name == "residual")
    assert isinstance(add, Pointwise)
    return add.writes


def keeps(part: Part) -> bool:
    """Whether the part, or one below it, has something that may wait for backward."""
    return bool(part.saved or part.kept_by_some) or any(map(keeps, part.parts))


def bytes_saved(
    arch: Arch,
    workload: Workload,
    activation: Precision,
    kernels: Kernels = FLASH,
    recompute: Recompute = "none",
) -> Node:
    """Tensors kept from forward to backward on one device, by path.

    With `full` recomputation each layer keeps its input; one layer's tensors, made again
    while it goes backward, come on top as `layer_going_backward`, as far as they exceed
    those of the loss, which are gone by then.

    >>> from isoflop.arch import gpt
    >>> gpt3 = gpt("gpt3", d_model=12288, n_layers=96, n_heads=96, vocab_size=50257,
    ...            max_seq_len=2048, dropout=0.1)
    >>> kept = bytes_saved(gpt3, Workload.train(1, 2048), Precision.FP16, KERNELS["korthikanti"])
    >>> kept.find("layer").size.value / (2048 * 12288)  # 34 + 5 a s / h
    114.0
    """
    return activations(describe(arch, workload), Keeping(activation, kernels, recompute))


def activations(root: Part, keeping: Keeping) -> Node:
    """What the parts of a whole model keep."""
    children = [keeping.tree(part) for part in root.parts if keeps(part)]
    if keeping.recompute == "full":
        children.append(going_backward(root.parts, loss_of(children), keeping))
    return branch("bytes_activations", "bytes", children)


def loss_of(children: list[Node]) -> Expr:
    """What cross entropy keeps, where this device has it."""
    return next((child.total for child in children if child.name == "loss"), number(0))


def layers_in(parts: Iterable[Part], path: str = "") -> Iterator[tuple[str, Part]]:
    """Every kind of layer in or below parts, with the path of what holds it."""
    for part in parts:
        if part.is_layer:
            yield path, part
        else:
            yield from layers_in(part.parts, f"{path}/{part.name}" if path else part.name)


def going_backward(parts: Iterable[Part], loss: Expr, keeping: Keeping) -> Node:
    """The largest layer, whole, as it is made again: what it takes beyond the loss's bytes.

    The loss's tensors are gone when the last layer goes backward, so the two share room.
    """
    whole = replace(keeping, recompute="none")
    layers = [whole.tree(layer, path) for path, layer in layers_in(parts)]
    largest = max(layers, key=lambda node: node.size.value)
    size = maximum(largest.size - loss, 0) if loss != number(0) else largest.size
    return leaf("layer_going_backward", "bytes", size, basis=Basis.MODELLED)

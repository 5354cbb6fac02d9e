"""Fine-tuning: which parameters train, and what a step of it holds.

Four ways, each a small value: everything (`Full`), low-rank updates (`Lora`; QLoRA is LoRA
over a base stored in nf4 with double quantization), bottleneck adapters (`Adapters`), and
some parts as they are (`Only`). What a method adds is grafted onto the description, so the
same folds count it. Gradients and optimizer state exist for trained weights alone; a frozen
matrix does not need its input, only what trains on that input does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from isoflop.arch.spec import Arch, Dense
from isoflop.count.blocks import (
    Ground,
    Part,
    Saved,
    beside,
    dense_parts,
    describe,
    linear,
    names_of,
)
from isoflop.count.memory_saved import (
    DROPPED,
    FLASH,
    Keeping,
    Kernels,
    Recompute,
    activations,
    always,
)
from isoflop.count.memory_state import Held, TrainingState
from isoflop.count.memory_weights import Stored, bytes_weights, format_of
from isoflop.count.operators import Matmul
from isoflop.count.workload import Precision, Workload
from isoflop.errors import InputError, Problem, UnknownName
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, leaf, total

#: Weights do not depend on the work; any workload gives the same ones.
_ANY = Workload(1, 1, 1)


@dataclass(frozen=True, slots=True)
class Full:
    """Every weight trains."""


@dataclass(frozen=True, slots=True)
class Only:
    """The weights at these paths train, all others are frozen. A path's end is enough."""

    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lora:
    """Two thin matrices beside each target: in x rank and rank x out (Hu 2021, 2106.09685).

    A target is a path or its end: `q`, `attention/q`, `layer/attention/q`. The scale alpha
    changes no count. `whole` parts train as they are, as copies beside the frozen ones.
    With `dropout` the first thin matrix reads a copy of the input that some numbers are dropped
    from: copy and mask are kept, the input itself is not.
    """

    rank: int
    targets: tuple[str, ...] = ("q", "v")
    whole: tuple[str, ...] = ()
    dropout: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise InputError(
                "lora", [Problem("rank", self.rank, "is a whole number of at least 1")]
            )


@dataclass(frozen=True, slots=True)
class Adapters:
    """Two bottlenecks per layer, each down to `width` and up again with biases.

    One follows attention, one the feed-forward (Houlsby 2019, 1902.00751, section 2.1); the
    layer's norms stay frozen here.
    """

    width: int

    def __post_init__(self) -> None:
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise InputError(
                "adapters", [Problem("width", self.width, "is a whole number of at least 1")]
            )


Method: TypeAlias = Full | Only | Lora | Adapters


def params_trained(arch: Arch, method: Method) -> Node:
    """The parameters that train, by path.

    Raises:
        UnknownName: a target is no matrix of the model; the message says what is.

    >>> from isoflop.arch import llama
    >>> l2 = llama("llama-2-7b", d_model=4096, n_layers=32, n_heads=32, d_ff=11008,
    ...            vocab_size=32000, max_seq_len=4096)
    >>> tree = params_trained(l2, Lora(8))
    >>> tree.value, tree.find("layer/attention/q_lora/a").size.text
    (4194304, 'd_model * lora_rank')
    """
    tuned = tune(arch, _ANY, method)
    return branch("params_trained", "params", _fold(tuned, lambda held: held.size, "params"))


def finetune_memory(
    arch: Arch,
    workload: Workload,
    method: Method,
    state: TrainingState,
    *,
    base: Stored | None = None,
    kernels: Kernels = FLASH,
    recompute: Recompute = "none",
) -> Node:
    """Bytes of one fine-tuning step on one device.

    `base` is how the model's own weights are stored; None means as `state` stores weights,
    "nf4-dq" makes LoRA QLoRA.

    Raises:
        UnknownName: a target is no matrix of the model, or `base` no format.
        InputError: weights that train are to be stored in another way than `state` says; a
            tower beside the decoder, of which only `Full` can say what backward needs.
    """
    bad = [] if isinstance(method, Full) else beside(arch, "is none where only some weights train")
    if bad:
        raise InputError("finetune", bad)
    if base is not None and isinstance(method, Full | Only):
        rule = "is left out where the model's own weights train"
        raise InputError("finetune", [Problem("base", base, rule)])
    tuned = tune(arch, workload, method)
    plain = Precision.FP32 if state.weights == 4 else Precision.BF16
    stored = [bytes_weights(arch, base or plain), *_head_again(tuned.root, base)]
    if isinstance(method, Lora | Adapters):
        stored.append(branch("bytes_added", "bytes", _fold(tuned, state.bytes_weights, "bytes")))
    needed = always if kernels.frozen_inputs else tuned.needs
    keeping = Keeping(state.activation, kernels, recompute, needed=needed)
    return branch(
        "memory",
        "bytes",
        [
            *stored,
            branch("bytes_grads", "bytes", _fold(tuned, state.bytes_grads, "bytes")),
            branch("bytes_optimizer", "bytes", _fold(tuned, state.bytes_optimizer, "bytes")),
            activations(tuned.root, keeping),
        ],
    )


def _head_again(root: Part, base: Stored | None) -> list[Node]:
    """A quantised head in 16 bits, twice over, while its product goes backward.

    bitsandbytes makes the matrix anew in the format that it was quantised from and casts that
    (autograd/_functions.py, MatMul4Bit), beside the gradients of the logits. Matrices inside
    the layers are made anew when those are gone, and are smaller.
    """
    if base is None or not format_of(base).head:
        return []
    head = total(w.size for part in root.parts if part.name == "head" for w in part.weights)
    size = 2 * head * Precision.BF16.bytes_each
    return [leaf("head_dequantized", "bytes", size, basis=Basis.MODELLED)]


# --- the tuned model ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tuned:
    """A description with what the method adds, the paths that train, the inputs they need."""

    root: Part
    trained: frozenset[str]
    inputs: frozenset[str]

    def needs(self, path: str, part: Part, saved: Saved) -> bool:
        """Whether backward uses a kept tensor: a frozen matrix's input has no use."""
        frozen = isinstance(part.operator, Matmul) and saved.name == "input"
        return not frozen or path in self.inputs


def tune(arch: Arch, workload: Workload, method: Method) -> Tuned:
    """The description as the method trains it."""
    root = describe(arch, workload)
    match method:
        case Full():
            trained = frozenset(path for path, _ in _leaves(root))
        case Only(targets=targets):
            trained = _matching(root, targets, _has_weights)
        case Lora(targets=targets, whole=whole):
            hit = _matching(root, targets, _is_linear)
            trained = _matching(root, whole, _has_weights) if whole else frozenset()
            root = _with_updates(root, hit, _ground(arch, workload), method)
            trained |= {p for p, _ in _leaves(root) if p.endswith(("_lora/a", "_lora/b"))}
        case Adapters(width=width):
            if bad := beside(arch, "is none: adapters are put into decoders"):
                raise InputError("finetune", bad)
            root = _with_bottlenecks(arch, root, _ground(arch, workload), width)
            trained = frozenset(p for p, _ in _leaves(root) if "/adapter_" in p)
    return Tuned(root, trained, _inputs(arch, root, trained))


def _inputs(arch: Arch, root: Part, trained: frozenset[str]) -> frozenset[str]:
    """Where the inputs of trained matrices are kept: siblings that read one share it."""
    keeper: dict[str, str] = {}
    found = set()
    for path, part in _leaves(root):
        if not isinstance(part.operator, Matmul):
            continue
        axis = part.weights[0].axes[0][0] if part.weights else "head"
        if part.saved and part.saved[0].name in DROPPED:
            continue  # it reads a copy of its own
        if any(saved.name == "input" for saved in part.saved):
            keeper[axis] = path
        tied = path == "head" and arch.head.tied and "embedding/tokens" in trained
        if (path in trained or tied) and axis in keeper:
            found.add(keeper[axis])
    return frozenset(found)


def _ground(arch: Arch, workload: Workload) -> Ground:
    scope = names_of(arch, workload)
    D = scope("d_model", arch.d_model, "width of the residual stream")
    return Ground.of(scope, workload, D)


def _with_updates(
    part: Part, hit: frozenset[str], ground: Ground, lora: Lora, path: str = ""
) -> Part:
    """Each matrix at a path of `hit` followed by its low-rank update."""
    parts: list[Part] = []
    for below in part.parts:
        here = f"{path}/{below.name}" if path else below.name
        parts.append(_with_updates(below, hit, ground, lora, here))
        if here in hit:
            first = not any(p.name.endswith("_lora") for p in parts)
            parts.append(_update(below, ground, lora, first=first))
    return replace(part, parts=tuple(parts))


def _update(target: Part, ground: Ground, lora: Lora, *, first: bool) -> Part:
    assert isinstance(target.operator, Matmul)
    rows, (into, out) = target.operator.rows, target.weights[0].axes
    r = ("rank", Symbol("lora_rank", lora.rank, meaning="rank of the updates"))
    down = linear(ground, "a", into, r, bias=False, rows=rows, keep_input=False)
    if lora.dropout:
        size, name = rows * into[1], DROPPED[0 if first else 1]
        copy = Saved(name, size, axis=into[0])
        down = replace(down, saved=(copy, Saved(f"{name} mask", size, "mask", into[0])))
    return Part(
        f"{target.name}_lora", parts=(down, linear(ground, "b", r, out, bias=False, rows=rows))
    )


def _with_bottlenecks(arch: Arch, root: Part, ground: Ground, width: int) -> Part:
    """Each layer's attention and feed-forward followed by a bottleneck."""
    size = Symbol("adapter_width", width, meaning="width of the bottlenecks")
    inner = dense_parts(ground, Dense(width, bias=True), size, ground.tokens)

    def grown(layer: Part) -> Part:
        parts: list[Part] = []
        for part in layer.parts:
            parts.append(part)
            if part.name in ("attention", "feed_forward"):
                parts.append(Part(f"adapter_{part.name}", parts=inner))
        return replace(layer, parts=tuple(parts))

    return replace(root, parts=tuple(grown(p) if p.name in arch.kinds else p for p in root.parts))


def _has_weights(part: Part) -> bool:
    return bool(part.weights)


def _is_linear(part: Part) -> bool:
    return isinstance(part.operator, Matmul) and bool(part.weights)


def _leaves(part: Part, path: str = "") -> Iterator[tuple[str, Part]]:
    """Every leaf below a part with its path, in the order in which they run."""
    for below in part.parts:
        here = f"{path}/{below.name}" if path else below.name
        if below.parts:
            yield from _leaves(below, here)
        else:
            yield here, below


def _matching(root: Part, targets: tuple[str, ...], fits: Callable[[Part], bool]) -> frozenset[str]:
    """The paths that targets name: a whole path, its beginning or its end."""
    paths = [path for path, part in _leaves(root) if fits(part)]
    if not targets:
        raise InputError("finetune", [Problem("targets", "", "names at least one part")])
    found: set[str] = set()
    for target in targets:
        hits = {p for p in paths if f"/{p}".endswith(f"/{target}") or p.startswith(f"{target}/")}
        if not hits:
            ends = dict.fromkeys(p.rsplit("/", maxsplit=1)[-1] for p in paths)
            raise UnknownName("target", target, [*ends, *paths], f"it has {', '.join(ends)}")
        found |= hits
    return frozenset(found)


def _fold(tuned: Tuned, each: Callable[[Held], Expr], unit: str) -> list[Node]:
    """What trains, measured by `each`, by path."""

    def fold(part: Part, path: str) -> Node | None:
        if not part.parts:
            held = [_held(w.axes, path) for w in part.weights] if path in tuned.trained else []
            return leaf(part.name, unit, total(map(each, held)), times=part.times) if held else None
        below = [n for p in part.parts if (n := fold(p, f"{path}/{p.name}")) is not None]
        return branch(part.name, unit, below, times=part.times) if below else None

    return [node for part in tuned.root.parts if (node := fold(part, part.name)) is not None]


def _held(axes: tuple[tuple[str, Expr], ...], path: str) -> Held:
    return Held(tuple(size for _, size in axes), path.split("/", maxsplit=1)[0])

"""The memory of a server, and where the model and its requests find room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.arch import Arch, LatentAttention
from isoflop.count import Precision, Workload, bytes_kv_cache, memory_inference
from isoflop.count.blocks import describe
from isoflop.count.memory import BYTES_RUNTIME
from isoflop.count.memory_rank import stage_parts, weights_held
from isoflop.count.memory_split import Shards, split_of
from isoflop.count.memory_weights import FORMATS, format_of
from isoflop.errors import Infeasible, InputError
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.node import MOST_CHIPS
from isoflop.plan.ask import whole
from isoflop.plan.layout import tensor_rules
from isoflop.plan.roofline import Stored
from isoflop.quantity import Basis, Expr, Node, Symbol, branch, ceil_div, leaf, number, total
from isoflop.quantity.expr import Operation, Value
from isoflop.quantity.units import format_bytes


def renamed(expr: Expr, names: Mapping[str, str]) -> Expr:
    """`expr` with its symbols under other names, so that two workloads can meet in one.

    >>> seq_len = Symbol("seq_len", 512)
    >>> (1 + renamed(2 * seq_len, {"seq_len": "input_tokens"})).text
    '1 + 2 * input_tokens'
    """
    if isinstance(expr, Symbol):
        return replace(expr, name=names.get(expr.name, expr.name))
    if isinstance(expr, Operation):
        return Operation(expr.kind, tuple(renamed(part, names) for part in expr.parts()))
    return expr


def apart(expr: Expr, other: Expr, suffix: str) -> Expr:
    """`expr` with each symbol renamed whose name means another value in `other`.

    >>> long, short = Symbol("seq_len", 512), Symbol("seq_len", 1)
    >>> (long + apart(short, long, "decode")).digits
    '512 + 1'
    """
    taken = {name: symbol.given for name, symbol in other.symbols().items()}
    clashes = [
        n for n, symbol in expr.symbols().items() if taken.get(n, symbol.given) != symbol.given
    ]
    return renamed(expr, {name: f"{name}_{suffix}" for name in clashes})


@dataclass(frozen=True)
class Request:
    """One model, stored in one way, asked for requests of one shape."""

    arch: Arch
    chip: Chip
    stored: Stored
    input_tokens: int
    output_tokens: int
    page: int | None = None

    @property
    def context(self) -> int:
        """Tokens that a finished request has in the cache."""
        return self.input_tokens + self.output_tokens

    @property
    def mean_context(self) -> int:
        """Tokens seen by the middle one of the output tokens."""
        return self.input_tokens + (self.output_tokens + 1) // 2

    @cached_property
    def _whole(self) -> Node:
        """The model reading one prompt: weights, activations; the cache is counted apart."""
        prompt = Workload.train(1, self.input_tokens)
        return memory_inference(self.arch, prompt, self.stored.weights, self.stored.kv_cache)

    def _per_batch(self, batch: int) -> tuple[Node, Node]:
        work = Workload.decode(batch, self.context)
        logits = work.B * Symbol("vocab_size", self.arch.vocab_size) * Precision.FP32.bytes_each
        return (
            bytes_kv_cache(self.arch, work, self.stored.kv_cache, page=self.page),
            leaf("bytes_logits", "bytes", logits, source="fp32, last position only"),
        )

    @cached_property
    def _activations(self) -> Node:
        """Of one prompt at a time; its letters kept apart from those of the batch."""
        node = self._whole.find("bytes_activations")
        names = {"batch": "n_prompts", "seq_len": "input_tokens"}
        return replace(node, size=renamed(node.size, names))

    def memory(self, batch: int, n_accelerators: int) -> Node:
        """One copy of the model at work on `batch` full requests."""
        cache, logits = self._per_batch(batch)
        parts = [self._whole.find("bytes_weights"), cache, self._activations, logits]
        copies = Symbol("n_accelerators_copy", n_accelerators)
        return branch("memory", "bytes", [*parts, _overhead(copies)])

    def per_accelerator(self, batch: int, tp: int, pp: int) -> Node:
        """The fullest accelerator; activations and logits are counted whole on each."""
        trees = [self._stage(batch, tp, pp, stage) for stage in range(pp)]
        return max(trees, key=lambda tree: tree.value)

    def _stage(self, batch: int, tp: int, pp: int, stage: int) -> Node:
        root = describe(self.arch, Workload(1, 1, 1))
        parts = list(stage_parts(self.arch, root, pp, stage))
        shards = Shards(tp=tp, pp=pp)
        cache, logits = self._per_batch(batch)
        caches = [
            leaf(part.name, "bytes", cache.find(part.name).size / self._ways_kv(part.name, shards),
                 times=copies)
            for part, copies in parts
            if part.name in self.arch.kinds
        ]  # fmt: skip
        return branch(
            "bytes_per_accelerator",
            "bytes",
            [
                weights_held(self.arch, parts, shards, self.stored.weights),
                branch("bytes_kv_cache", "bytes", caches),
                self._activations,
                logits,
                _overhead(),
            ],
        )

    def _ways_kv(self, kind: str, shards: Shards) -> Expr:
        """Ways in which the cache of a kind of layer splits: a latent has no heads to split by."""
        if isinstance(self.arch.kinds[kind].attention, LatentAttention):
            return number(1)
        return split_of(self.arch, kind, shards).kv

    def copies_kv(self, tp: int) -> dict[str, Expr]:
        """Accelerators that hold, and read, the same part of the cache, by kind of layer."""
        ways = Symbol("tp", tp, meaning="tensor parallel accelerators")
        shards = Shards(tp=tp)
        split = {kind: self._ways_kv(kind, shards) for kind in self.arch.kinds}
        return {kind: ways / kv for kind, kv in split.items() if kv.value != tp}

    def accelerators_min(self, batch: int) -> Node:
        """By capacity alone, however the model would have to be cut."""
        needed = self.memory(batch, 1)
        parts = [c.total for c in needed.children if c.name != "bytes_overhead"]
        room = self.chip.bytes_memory - BYTES_RUNTIME
        count = ceil_div(total(parts), room)
        return leaf("accelerators_min", "accelerators", count, basis=Basis.MODELLED)

    def accelerators_min_tensor(self, batch: int) -> int | None:
        """The smallest tensor parallelism in one node that splits evenly and fits."""
        return next((tp for tp in self.even(self.chip.per_node) if self.fits(batch, tp, 1)), None)

    def even(self, most: int) -> Iterator[int]:
        """Tensor parallel sizes up to `most` that split the model evenly."""
        heads = min(layer.attention.n_heads for layer in self.arch.kinds.values())
        return (tp for tp in range(1, min(most, heads) + 1) if not tensor_rules(tp, self.arch))

    def fits(self, batch: int, tp: int, pp: int) -> bool:
        return self.per_accelerator(batch, tp, pp).value <= self.chip.bytes_memory.value

    def holds(self, batch: int, tp: int, pp: int) -> bool:
        """Whether so many sequences fit; the first stage that they do not fit on decides."""
        stages = (self._stage(1, tp, pp, stage).total for stage in range(pp))
        return all(_largest(stage, self.chip.bytes_memory.value) >= batch for stage in stages)

    def batch_max(self, tp: int, pp: int) -> int:
        """The largest batch that fits: what is held grows by the same for each sequence."""
        stages = [self._stage(1, tp, pp, stage).total for stage in range(pp)]
        return min(_largest(stage, self.chip.bytes_memory.value) for stage in stages)


def _largest(held: Expr, room: Value) -> int:
    empty, one = held.evaluate({"batch": 0}), held.evaluate({"batch": 1})
    return max(0, int((room - empty) // (one - empty)))


def _overhead(copies: Expr | int = 1) -> Node:
    return leaf("bytes_overhead", "bytes", BYTES_RUNTIME, times=copies, source=BYTES_RUNTIME.source)


@dataclass(frozen=True, slots=True)
class Place:
    """How one copy of the model is split, and the largest batch that it holds so."""

    tp: int
    pp: int
    batch_max: int

    def __str__(self) -> str:
        return f"tp={self.tp} pp={self.pp}"


def place(request: Request, cluster: Cluster, tp: int | None, batch: int) -> Place:
    """Where a copy goes: by tensor parallelism within a node, then a pipeline, then across nodes.

    Raises:
        InputError: the `tp` asked for is illegal.
        Infeasible: `batch` sequences do not fit; what would is said.
    """
    if tp is not None:
        broken = whole("tp", tp, cluster.count) or tensor_rules(tp, request.arch)
        if broken:
            raise InputError("plan serve", broken)
    found = _found(request, cluster, tp, batch)
    if found is None:
        raise Infeasible(_too_large(request, cluster, tp, batch))
    return found


def _found(request: Request, cluster: Cluster, tp: int | None, batch: int) -> Place | None:
    fewest = request.accelerators_min(batch).value
    for ways, stages in _splits(request, cluster, tp):
        # Capacity first, then stage by stage: to weigh all of a deep pipeline takes a while.
        if ways * stages >= fewest and request.holds(batch, ways, stages):
            return Place(ways, stages, request.batch_max(ways, stages))
    return None


def _splits(request: Request, cluster: Cluster, tp: int | None) -> Iterator[tuple[int, int]]:
    """Tensor and pipeline sizes worth trying, the best first.

    Tensor parallelism pays within a node; across nodes it comes last, in whole nodes.
    """
    node = cluster.size_node
    inside = sorted(request.even(node), key=lambda t: (t * (cluster.count // t), t), reverse=True)
    across = [t for t in request.even(cluster.count) if t > node and t % node == 0]
    for ways in [*inside, *across] if tp is None else [tp]:
        deepest = min(cluster.count // ways, request.arch.n_layers)
        yield from ((ways, p) for p in range(1, deepest + 1))


def _too_large(request: Request, cluster: Cluster, tp: int | None, batch: int) -> str:
    """Why nothing fits, by how much the nearest misses, and what would fit."""
    nearest = {
        (t, p): request.per_accelerator(batch, t, p) for t, p in _splits(request, cluster, tp)
    }
    (ways, stages), tree = min(nearest.items(), key=lambda item: item[1].value)
    largest = max(tree.children, key=lambda child: child.value)
    share = float(largest.value / tree.value)
    return (
        f"{request.arch.name} with batch={batch} on {cluster}: tp={ways} pp={stages} needs "
        f"{format_bytes(tree.value)} > {format_bytes(request.chip.bytes_memory.value)} per "
        f"accelerator, largest part {largest.name} {share:.0%}; "
        f"by capacity it takes {request.accelerators_min(batch).value} accelerators"
        f"{_what_fits(request, cluster, tp, batch)}"
    )


#: Weights in fewer bits that a refusal proposes.
SMALLER = ("fp8", "int8", "int4")


def _what_fits(request: Request, cluster: Cluster, tp: int | None, batch: int) -> str:
    """A smaller batch, fewer bits, or the next cluster of twice as many that holds the model."""
    out = []
    fewer = [_found(request, cluster, tp, 1)] if batch > 1 else []
    out += [f"batch {found.batch_max} here" for found in fewer if found]
    bits = format_of(request.stored.weights).bits
    known = [n for n in SMALLER if n != "fp8" or n in cluster.chip.peaks]
    for name in (n for n in known if FORMATS[n].bits < bits):
        smaller = replace(request, stored=replace(request.stored, weights=FORMATS[name]))
        if _found(smaller, cluster, tp, batch):
            out.append(f"{name} here")
            break
    counts = (cluster.count << doublings for doublings in range(1, 8))
    for larger in (replace(cluster, count=n) for n in counts if n <= MOST_CHIPS):
        if found := _found(request, larger, tp, batch):
            out.append(f"{larger} with {found}")
            break
    return f"; what would fit: {', or '.join(out)}" if out else ""

"""How a model is laid out over a cluster, and which layouts are legal.

`broken_rules` is the one definition of legal: every other part of isoflop asks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

from isoflop.arch import Arch, Attention, Dense, Experts
from isoflop.count.blocks import beside
from isoflop.count.memory_split import (
    CONTEXTS_BY,
    OFFLOADS,
    ContextBy,
    Offload,
    shard_rules,
)
from isoflop.count.stages import pipeline_rules
from isoflop.errors import Problem
from isoflop.hardware import Cluster
from isoflop.plan.schedule.kinds import (
    PUT_OFF,
    SCHEDULES,
    Interleaved,
    Schedule,
    ScheduleName,
    schedule_rules,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How one training step is split over accelerators.

    tp: tensor parallel; with `sequence_parallel`, what lies between the sharded matrices is
    split over the sequence (Korthikanti 2022, 2205.05198, section 4.2.2). pp: pipeline
    stages, each of `virtual` chunks of layers (Narayanan 2021, 2104.04473, section 2.2).
    cp: context parallel, each rank a part of every sequence. dp: data-parallel copies.
    ep: ranks that the experts are dealt over, out of dp x cp. zero: 1 splits the optimizer's
    state over dp x cp, 2 gradients too, 3 weights too (Rajbhandari 2020, 1910.02054).
    micro_batch: sequences that one copy works on at once. shard: ranks of dp x cp that ZeRO
    splits one copy over, the rest being replicas (MiCS, Zhang 2022, 2205.00119, section 3.2;
    PyTorch's HYBRID_SHARD); None: all of them. offload: what waits in the host's memory.
    cp_by: how context-parallel ranks meet each other's tokens. schedule: the order in which
    stages work (plan/schedule); `1f1b` with several chunks is interleaved.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: Literal[0, 1, 2, 3] = 0
    micro_batch: int = 1
    cp: int = 1
    ep: int = 1
    virtual: int = 1
    sequence_parallel: bool = True
    shard: int | None = None
    offload: Offload = "none"
    cp_by: ContextBy = "ring"
    schedule: ScheduleName = "1f1b"

    @property
    def pipeline(self) -> Schedule:
        """The schedule as a value.

        >>> Layout(pp=4, virtual=2).pipeline, Layout(pp=4, schedule="zb-h1").pipeline
        (Interleaved(virtual=2), ZeroBubble(ahead=1))
        """
        if self.schedule == "1f1b" and self.virtual > 1:
            return Interleaved(self.virtual)
        return SCHEDULES[self.schedule]

    @property
    def n_accelerators(self) -> int:
        return self.tp * self.pp * self.dp * self.cp

    def n_micro_batches(self, global_batch: int) -> int:
        """Micro-batches that each pipeline runs per step."""
        return global_batch // (self.dp * self.micro_batch)

    def __str__(self) -> str:
        """The sizes, leaving out what is as it is by default.

        >>> print(Layout(tp=8, pp=2, dp=4, cp=2))
        tp=8 pp=2 dp=4 zero=0 cp=2
        >>> print(Layout(pp=4, schedule="zb-h1"))
        tp=1 pp=4 dp=1 zero=0 schedule=zb-h1
        """
        text = f"tp={self.tp} pp={self.pp} dp={self.dp} zero={self.zero}"
        rest = ("cp", "ep", "virtual", "micro_batch")
        text += "".join(
            f" {name}={getattr(self, name)}" for name in rest if getattr(self, name) > 1
        )
        text += "" if self.shard is None else f" shard={self.shard}"
        text += "" if self.cp_by == "ring" else f" cp_by={self.cp_by}"
        text += "" if self.offload == "none" else f" offload={self.offload}"
        text += "" if self.schedule == "1f1b" else f" schedule={self.schedule}"
        return text if self.sequence_parallel else f"{text} without sequence parallelism"

    def to_json(self) -> dict[str, int | bool | str | None]:
        return asdict(self)


def broken_rules(
    layout: Layout, arch: Arch, cluster: Cluster, global_batch: int, seq_len: int | None = None
) -> list[Problem]:
    """The rules that a layout breaks; legal means none.

    `seq_len` None leaves out what a layout asks of the length of sequences.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> tiny = gpt("tiny", d_model=96, n_layers=6, n_heads=6, vocab_size=64, max_seq_len=8)
    >>> for problem in broken_rules(Layout(tp=4, pp=7), tiny, parse_cluster("28xh100-sxm"), 8):
    ...     print(problem)
    tp=4: must divide n_heads=6 of layer
    pp=7: must be at most n_layers=6
    """
    sizes = ("tp", "pp", "dp", "micro_batch", "cp", "ep", "virtual")
    low = [Problem(f, getattr(layout, f), "is at least 1") for f in sizes if getattr(layout, f) < 1]
    if low:
        return low
    return [
        *tensor_rules(layout.tp, arch),
        *pipeline_rules(arch.n_layers, layout.pp, layout.virtual),
        *_rules_of_schedule(layout, arch, global_batch),
        *_expert_rules(layout, arch),
        *_shard_rules(layout),
        *_offload_rules(layout, cluster),
        *_context_rules(layout, arch),
        *_tower_rules(layout, arch),
        *_rules_of_place(layout, cluster),
        *_rules_of_work(layout, global_batch),
        *([] if seq_len is None else _rules_of_length(layout, seq_len)),
    ]


def tensor_rules(tp: int, arch: Arch) -> list[Problem]:
    """What tensor parallelism asks of the model: every sharded axis splits evenly.

    Key-value heads fewer than `tp` are copied, so one must divide the other.
    """
    broken = []
    for name, layer in arch.kinds.items():
        for axis, size in _sharded_axes(layer.attention, layer.feed_forward):
            if size % tp:
                broken.append(Problem("tp", tp, f"divides {axis}={size} of {name}"))
        if isinstance(layer.attention, Attention):
            kv = layer.attention.n_kv_heads
            if kv < layer.attention.n_heads and kv % tp and tp % kv:
                rule = f"divides n_kv_heads={kv} of {name}, or is divided by it"
                broken.append(Problem("tp", tp, rule))
    return broken


def _sharded_axes(attention: Any, feed_forward: Dense | Experts) -> Iterator[tuple[str, int]]:
    yield "n_heads", attention.n_heads
    match feed_forward:
        case Dense(d_ff=width):
            yield "d_ff", width
        case Experts(expert=expert, shared=shared):
            yield "d_ff of an expert", expert.d_ff
            if shared is not None:
                yield "d_ff of the shared experts", shared.d_ff


def _expert_rules(layout: Layout, arch: Arch) -> list[Problem]:
    """Experts are dealt out evenly, over ranks that hold copies of everything else."""
    if layout.ep == 1:
        return []
    counts = _expert_counts(arch)
    broken = [
        Problem("ep", layout.ep, f"divides n_experts={count} of {name}")
        for name, count in counts.items()
        if count % layout.ep
    ]
    if not counts:
        broken.append(Problem("ep", layout.ep, "is 1 for a model without experts"))
    among = layout.dp * layout.cp
    if among % layout.ep:
        broken.append(Problem("ep", layout.ep, f"divides dp * cp = {among}"))
    return broken


def _shard_rules(layout: Layout) -> list[Problem]:
    if layout.shard is None:
        return []
    broken = shard_rules(layout.shard, layout.dp * layout.cp, layout.ep)
    if layout.zero == 0:
        broken.append(Problem("shard", layout.shard, "is given with ZeRO 1, 2 or 3"))
    return broken


def _offload_rules(layout: Layout, cluster: Cluster) -> list[Problem]:
    if layout.offload not in OFFLOADS:
        return [Problem("offload", layout.offload, f"is one of {', '.join(OFFLOADS)}")]
    if layout.offload != "none" and cluster.chip.host is None:
        rule = f"is none where the host of {cluster.chip.name} is not stated"
        return [Problem("offload", layout.offload, rule)]
    return []


def _context_rules(layout: Layout, arch: Arch) -> list[Problem]:
    """Heads are dealt out evenly; key-value heads fewer than ranks are copied, as under tp."""
    if layout.cp_by not in CONTEXTS_BY:
        return [Problem("cp_by", layout.cp_by, f"is one of {', '.join(CONTEXTS_BY)}")]
    if layout.cp_by != "all_to_all":
        return []
    ways, broken = layout.tp * layout.cp, []
    for name, layer in arch.kinds.items():
        heads = layer.attention.n_heads
        kv = getattr(layer.attention, "n_kv_heads", heads)
        if heads % ways:
            broken.append(Problem("tp * cp", ways, f"divides n_heads={heads} of {name}"))
        if kv < heads and kv % ways and ways % kv:
            rule = f"divides n_kv_heads={kv} of {name}, or is divided by it"
            broken.append(Problem("tp * cp", ways, rule))
    return broken


def _expert_counts(arch: Arch) -> dict[str, int]:
    """Experts of each kind of layer that has any."""
    blocks = {name: layer.feed_forward for name, layer in arch.kinds.items()}
    return {name: f.n_experts for name, f in blocks.items() if isinstance(f, Experts)}


def _tower_rules(layout: Layout, arch: Arch) -> list[Problem]:
    """A model with a tower beside its decoder is copied, not cut."""
    cut = {name: getattr(layout, name) for name in ("tp", "pp", "cp", "ep")}
    towers = [p.field for p in beside(arch, "is none")]
    rule = f"is 1 for a model with {' and '.join(towers)}"
    hint = "data parallelism and ZeRO split it"
    return [Problem(n, size, rule, hint) for n, size in cut.items() if towers and size > 1]


def offloads_under(offload: Offload, schedule: ScheduleName) -> bool:
    """Whether a schedule leaves it open to keep this on the host."""
    return "activations" not in offload or schedule not in PUT_OFF


def _rules_of_schedule(layout: Layout, arch: Arch, global_batch: int) -> list[Problem]:
    """What the schedule asks: of a layout, of the model, of the micro-batches of a step."""
    name, n_micro = layout.schedule, layout.n_micro_batches(global_batch)
    if name not in SCHEDULES:
        return [Problem("schedule", name, f"is one of {', '.join(SCHEDULES)}")]
    if name == "1f1b":
        return []
    rules = [
        ("schedule", name, "is 1f1b where pp is 1: nothing is scheduled", layout.pp > 1),
        ("virtual", layout.virtual, f"is 1 under {name}: 1f1b alone interleaves", layout.virtual == 1),
        ("offload", layout.offload, f"leaves activations where they are under {name}: weights' gradients, "
         "put off, read them", offloads_under(layout.offload, name)),
    ]  # fmt: skip
    broken = [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]
    return broken or schedule_rules(name, arch.n_layers, layout.pp, n_micro)


def _rules_of_place(layout: Layout, cluster: Cluster) -> list[Problem]:
    node = cluster.size_node
    rules = [
        ("tp", layout.tp, f"divides the {node} accelerators of a node", node % layout.tp == 0),
        ("layout", layout, f"uses at most {cluster.count} accelerators",
         layout.n_accelerators <= cluster.count),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _rules_of_work(layout: Layout, global_batch: int) -> list[Problem]:
    """Whole micro-batches; interleaved, as many as fill the pipeline evenly.

    Source of the last: Narayanan 2021 (2104.04473), section 2.2.
    """
    per_step = layout.dp * layout.micro_batch
    n_micro, left = divmod(global_batch, per_step)
    rules = [
        ("dp * micro_batch", per_step, f"divides global_batch={global_batch}", left == 0),
        ("zero", layout.zero, "is 0, 1, 2 or 3", layout.zero in (0, 1, 2, 3)),
        ("virtual", layout.virtual, f"is 1 unless pp={layout.pp} divides the {n_micro} micro-batches of a step",
         layout.virtual == 1 or n_micro % layout.pp == 0),
    ]  # fmt: skip
    return [Problem(field, value, rule) for field, value, rule, holds in rules if not holds]


def _rules_of_length(layout: Layout, seq_len: int) -> list[Problem]:
    """Sequences are cut evenly.

    Each context-parallel rank has a chunk from the front of a sequence and its mirror image
    from the back, so that all have equal work under a causal mask (Llama 3, 2407.21783,
    section 3.3.2), unless each meets all tokens with some heads; tensor-parallel ranks split
    what each of them has.
    """
    chunks = 2 * layout.cp if layout.cp > 1 and layout.cp_by != "all_to_all" else layout.cp
    ways = layout.tp if layout.sequence_parallel else 1
    broken = []
    if seq_len % chunks:
        twice = chunks > layout.cp
        rule = f"times 2 divides seq_len={seq_len}, for equal work under a causal mask"
        broken.append(Problem("cp", layout.cp, rule if twice else f"divides seq_len={seq_len}"))
    if seq_len % (layout.cp * ways):
        rule = f"times cp={layout.cp} divides seq_len={seq_len} under sequence parallelism"
        broken.append(Problem("tp", layout.tp, rule, "or switch sequence parallelism off"))
    return broken


#: A rank keeps at least this many tokens of a sequence where layouts are offered: Llama 3
#: trains 8,192 without context parallelism and 131,072 with 16 ranks (2407.21783, table 4).
TOKENS_PER_CONTEXT_RANK = 8192


def legal_layouts(
    arch: Arch,
    cluster: Cluster,
    global_batch: int,
    micro_batch: int = 1,
    seq_len: int | None = None,
    *,
    tokens_per_context_rank: int = TOKENS_PER_CONTEXT_RANK,
) -> tuple[Layout, ...]:
    """Legal layouts to choose from, each with as many data-parallel copies as fit.

    Every tp of a node; pp that divide the layers, or are powers of two; cp where sequences
    leave each rank so many tokens; experts whole, dealt out within a node, or as widely as they can be; every
    ZeRO stage. What is not offered (fewer copies, interleaving) may be legal too.
    """
    heads = min(layer.attention.n_heads for layer in arch.kinds.values())
    return tuple(
        layout
        for tp, pp, cp in product(
            divisors(math.gcd(heads, cluster.size_node)),
            _pipelines(arch.n_layers),
            _contexts(seq_len or 1, tokens_per_context_rank),
        )
        if tp * pp * cp <= cluster.count
        for layout in _with_copies(
            Layout(tp, pp, micro_batch=micro_batch, cp=cp), arch, cluster, global_batch
        )
        if not broken_rules(layout, arch, cluster, global_batch, seq_len)
    )


def _pipelines(n_layers: int) -> list[int]:
    """The divisors, and powers of two below.

    >>> _pipelines(61), _pipelines(12)
    ([1, 2, 4, 8, 16, 32, 61], [1, 2, 3, 4, 6, 8, 12])
    """
    powers = {2**k for k in range(n_layers.bit_length()) if 2**k <= n_layers}
    return sorted(powers | set(divisors(n_layers)))


def _contexts(seq_len: int, least: int) -> list[int]:
    """Powers of two that leave each rank enough tokens.

    >>> _contexts(4096, 8192), _contexts(131072, 8192)
    ([1], [1, 2, 4, 8, 16])
    """
    most = max(1, seq_len // least)
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _with_copies(base: Layout, arch: Arch, cluster: Cluster, global_batch: int) -> Iterator[Layout]:
    room = cluster.count // base.n_accelerators
    dp = max(d for d in divisors(max(1, global_batch // base.micro_batch)) if d <= room)
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3) if dp * base.cp > 1 else (0,)
    for ep, zero in product(_dealings(arch, dp * base.cp, cluster.size_node), stages):
        yield replace(base, dp=dp, ep=ep, zero=zero)


def _dealings(arch: Arch, copies: int, node: int) -> list[int]:
    """Ways to deal experts over the ranks that hold copies: not, within a node, widest."""
    counts = _expert_counts(arch).values()
    even = divisors(math.gcd(copies, *counts)) if counts else [1]
    return sorted({1, max(d for d in even if d <= node), even[-1]})


def divisors(whole: int) -> list[int]:
    """All divisors, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [d for d in range(1, int(whole**0.5) + 1) if whole % d == 0]
    return small + [whole // d for d in reversed(small) if d * d != whole]

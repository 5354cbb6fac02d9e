"""The messages of a training step: which collective, over whom, how many bytes, how often.

Sizes come from the description of the blocks. The rank is one of the last pipeline stage,
with an equal share of the layers and the head. Left out, as they are small: statistics of a
split vocabulary's loss, gradients of norms under sequence parallelism, a tied table's sum
over the two ends of a pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from isoflop.arch import Attention, Experts, Layer, Wiring
from isoflop.count.blocks import Part
from isoflop.count.memory_rank import cores_of
from isoflop.count.memory_split import SPLIT
from isoflop.hardware.fabric import Fabric
from isoflop.plan.network.collective import Collective, called, relayed, seconds, share_sent
from isoflop.plan.network.exchange import DEFAULT, Exchange
from isoflop.plan.network.group import Dimension, Ways, groups
from isoflop.plan.step.job import Groups, Job
from isoflop.plan.step.setting import Setting
from isoflop.quantity import (
    Expr,
    Symbol,
    ceil_div,
    maximum,
    minimum,
    number,
    total,
    where,
)
from isoflop.quantity.expr import product


@dataclass(frozen=True, slots=True)
class Message:
    """One collective, `times` in a step on every rank.

    `path` starts with the parallelism that needs it. `size` is the buffer in bytes;
    `crossing`, of an all-to-all, those that leave the domain where that is said apart.
    """

    path: str
    kind: Collective
    dimension: Dimension
    size: Expr
    times: Expr
    crossing: Expr | None = None

    def bytes_sent(self, groups: Groups) -> Expr:
        """By one rank, one time."""
        return share_sent(self.kind, groups[self.dimension]) * self.size

    def seconds(self, groups: Groups, fabric: Fabric) -> Expr:
        """One time, by the algorithm that a library chooses."""
        group = groups[self.dimension]
        if self.crossing is None:
            return seconds(self.kind, group, fabric, self.size)
        return called(group, fabric, relayed(group, fabric, self.size, self.crossing))


def settled(setting: Setting, fabric: Fabric) -> Groups:
    """The groups of a setting, in numbers under names."""
    layout = setting.layout
    found = groups(Ways.of(layout), fabric, layout.n_accelerators)
    return {name: group.named(name) for name, group in found.items()}


def messages(setting: Setting, exchange: Exchange = DEFAULT) -> tuple[Message, ...]:
    """Every message of a step, to groups of one too.

    The sizes of the layout, `batch` (of a micro-batch), `n_micro_batches`, `virtual_pp` and
    the groups stand in them by name. A search compiles the groups over tp, cp, dp, pp and ep,
    and the messages of one setting over all these names, once for all layouts of a ZeRO
    stage; that setting splits in every way and spans domains.
    """
    job = Job.of(setting, exchange)
    return (*within(job), *once(job), *between(job))


def within(job: Job) -> Iterator[Message]:
    """The messages of each micro-batch among the ranks of a stage."""
    for part in job.layers:
        yield from _tensor(job, part)
        yield from _context(job, part)
        yield from _experts(job, part)
    yield from _tensor_ends(job)


def once(job: Job) -> Iterator[Message]:
    """Those of gradients and weights among the copies of a model."""
    for part in job.layers:
        times = job.per_stage(part)
        for name, dimension, held in _weights_of(job, part):
            yield from _data(job, part.name + name, dimension, held, times)
    yield from _data_ends(job)


# --- tensor parallelism -----------------------------------------------------------------


def _tensor(job: Job, part: Part) -> Iterator[Message]:
    """Each block's input and output, forward and backward.

    Blocks side by side share their sums: one output, and one input where they read one norm.
    """
    layer, passes = job.kind(part), job.passes(part)
    blocks = _blocks(job, layer)
    if layer.wiring in (Wiring.PARALLEL, Wiring.PARALLEL_TWO_NORMS):
        inputs = 2 if layer.wiring is Wiring.PARALLEL_TWO_NORMS else 1
        blocks = {"blocks": (blocks["feed_forward"][0], inputs)}
    for name, (size, inputs) in blocks.items():
        path = f"tp/{part.name}/{name}"
        yield from _around(job, path, size, job.forwards * passes, passes, inputs)


def _blocks(job: Job, layer: Layer) -> dict[str, tuple[Expr, int]]:
    """Bytes that each block reads and writes, and how many inputs it has.

    Routed tokens come once per expert: they are dealt out before they are gathered.
    """
    blocks = {"attention": (job.stream, 1)}
    if layer.cross is not None:
        blocks["cross"] = (job.stream, 1)
    blocks["feed_forward"] = (job.stream, 1)
    if isinstance(layer.feed_forward, Experts):
        routed = Symbol("n_active", layer.feed_forward.n_active, meaning="experts per token")
        blocks["feed_forward"] = (routed * job.stream, 1)
        if layer.feed_forward.shared is not None:
            blocks["shared"] = (job.stream, 1)
    return blocks


def _around(
    job: Job, path: str, size: Expr, forwards: Expr, backwards: Expr, inputs: int = 1
) -> Iterator[Message]:
    """The conjugate pair f and g around a block (Shoeybi 2019, figure 3).

    With sequence parallelism each all-reduce is a gather and a scatter of the same bytes,
    and backward gathers the block's input once more for the weights' gradients
    (Korthikanti 2022, section 4.2.2, end).
    """
    wholes, pairs = number(inputs) * backwards, inputs * forwards
    if not job.layout.sequence_parallel:
        yield Message(f"{path}/forward", "all_reduce", "tp", size, forwards)
        yield Message(f"{path}/backward", "all_reduce", "tp", size, wholes)
        return
    yield Message(f"{path}/forward_gather", "all_gather", "tp", size, pairs)
    yield Message(f"{path}/forward_scatter", "reduce_scatter", "tp", size, forwards)
    yield Message(f"{path}/backward_gather", "all_gather", "tp", size, backwards)
    yield Message(f"{path}/backward_scatter", "reduce_scatter", "tp", size, wholes)
    yield Message(f"{path}/gather_again", "all_gather", "tp", size, wholes)


def _tensor_ends(job: Job) -> Iterator[Message]:
    """Partial embeddings are added up forward, the head's input gradients backward."""
    first, last = (job.n_micro * share for share in job.ends)
    if not job.layout.sequence_parallel:
        yield Message("tp/embedding", "all_reduce", "tp", job.stream, first)
        yield Message("tp/head", "all_reduce", "tp", job.stream, last)
        return
    yield Message("tp/embedding/scatter", "reduce_scatter", "tp", job.stream, first)
    yield Message("tp/embedding/gather", "all_gather", "tp", job.stream, first)
    yield Message("tp/head/gather", "all_gather", "tp", job.stream, 2 * last)
    yield Message("tp/head/scatter", "reduce_scatter", "tp", job.stream, last)


# --- context parallelism ----------------------------------------------------------------


def _context(job: Job, part: Part) -> Iterator[Message]:
    """Self-attention's keys and values, as it multiplies them: latent ones rebuilt.

    Where heads are dealt out, queries, keys and values are handed to those that have their heads,
    and the outputs back (Jacobs 2023, 2309.14509, section 3.1); a key-value head goes to each of
    several ranks that share it.
    """
    core = cores_of(part)[0]
    forwards, backwards = job.forwards * job.passes(part), job.passes(part)
    tokens = core.batch * core.keys * job.bytes_activation
    heads, kv = core.heads / job.ways.tp, core.kv_heads / _kv_ways(job, part)
    path = f"cp/{part.name}"
    if job.layout.cp_by == "all_to_all":
        kv = maximum(kv, job.ways.cp)
        taken = tokens * (heads * core.d_key + kv * (core.d_key + core.d_value)) / job.ways.cp
        given = tokens * heads * core.d_value / job.ways.cp
        for name, times in (("forward", forwards), ("backward", backwards)):
            yield Message(f"{path}/{name}_heads", "all_to_all", "cp", taken, times)
            yield Message(f"{path}/{name}_outputs", "all_to_all", "cp", given, times)
        return
    values = tokens * kv * (core.d_key + core.d_value)
    yield Message(f"{path}/forward", "all_gather", "cp", values, forwards)
    yield Message(f"{path}/backward", "all_gather", "cp", values, backwards)
    yield Message(f"{path}/backward_sum", "reduce_scatter", "cp", values, backwards)


def _kv_ways(job: Job, part: Part) -> Expr:
    """Ways that tensor parallelism splits the key-value heads, no more than there are."""
    match job.kind(part).attention:
        case Attention(n_kv_heads=heads):
            return minimum(job.ways.tp, Symbol("n_kv_heads", heads, meaning="key-value heads"))
        case _:
            return job.ways.tp


# --- experts ----------------------------------------------------------------------------


def _experts(job: Job, part: Part) -> Iterator[Message]:
    """Tokens to their experts and back, forward and backward (Lepikhin 2020, section 3)."""
    experts = job.kind(part).feed_forward
    if not isinstance(experts, Experts):
        return
    copies = Symbol("n_active", experts.n_active, meaning="experts per token")
    numbers = job.stream_held / job.bytes_activation * job.exchange.imbalance
    crossing = _crossing(job, experts) if job.exchange.once_per_domain else None
    passes = job.passes(part)
    for name, each, times in (
        ("dispatch", job.bytes_dispatch, job.forwards * passes),
        ("combine", job.bytes_activation, job.forwards * passes),
        ("backward", job.bytes_activation, 2 * passes),
    ):
        over = None if crossing is None else numbers * each * crossing
        size = numbers * each * copies
        yield Message(f"ep/{part.name}/{name}", "all_to_all", "ep", size, times, over)


def _crossing(job: Job, experts: Experts) -> Expr:
    """Other domains that a token goes to, on average over even routing.

    A domain is missed with the chance that none of k different experts is one of its own.
    Where routing is limited to M groups of experts, at most M are met (DeepSeek-V3,
    2412.19437, section 2.1.2).
    """
    d = job.groups["ep"].domains
    n = Symbol("n_experts", experts.n_experts, meaning="experts")
    missed = product(
        maximum(n - n / d - i, 0) / (experts.n_experts - i) for i in range(experts.n_active)
    )
    met = (d - 1) * (1 - missed)
    if experts.n_groups == 1:
        return met
    return minimum(met, (d - 1) / d * experts.n_active_groups)


# --- data parallelism -------------------------------------------------------------------


def _data(job: Job, path: str, dimension: Dimension, held: Expr, times: Expr) -> Iterator[Message]:
    """Gradients summed, weights gathered, for `held` weights of a rank's model.

    They are worked with `times` by each micro-batch. DualPipe's two copies add up theirs.
    Replicas of shards are summed once a step, whatever is reduced inside for each micro-batch
    (MiCS, Zhang 2022, 2205.00119, section 3.4; FSDP2's `set_requires_all_reduce`).
    """
    grads, weights = held * job.bytes_grad, held * job.bytes_weight
    zero, path = job.layout.zero, f"dp/{path}"
    once, each = times * job.copies, times * job.n_micro
    part = dimension
    if job.layout.shard is not None:
        part = "shard" if dimension == "dp" else "expert_shard"
    if job.copies > 1:
        among = job.groups[part].size if zero else 1
        yield Message(f"{path}/copies", "send", "pp", grads / among, once)
    if zero == 0:
        yield Message(f"{path}/grads", "all_reduce", dimension, grads, once)
        return
    gathers = {1: once, 2: once, 3: (2 if job.exchange.reshard else 1) * each}[zero]
    if job.layout.shard is not None:
        own = grads / job.ways.sizes()[part][0]
        yield Message(f"{path}/replicas", "all_reduce", "replica", own, once)
    yield Message(f"{path}/grads", "reduce_scatter", part, grads, once if zero == 1 else each)
    yield Message(f"{path}/weights", "all_gather", part, weights, gathers)


def _data_ends(job: Job) -> Iterator[Message]:
    """The parts beside the layers: the last stage has the head, and a copy of a tied table."""
    first, last = job.ends
    together = job.layout.schedule in ("dualpipe", "dualpipev")
    for part in job.root.parts:
        held = _held(part, job.ways.tp, job.ways.tp)
        if part.name in job.setting.arch.kinds or held == number(0):
            continue
        here = last
        if part.name == "embedding" and job.setting.arch.head.tied and not together:
            held = where(job.ways.pp - 1, _held(part.parts[0], job.ways.tp, job.ways.tp), held)
        elif part.name == "embedding":
            here = first
        yield from _data(job, part.name, "dp", held, here)


def _weights_of(job: Job, part: Part) -> Iterator[tuple[str, Dimension, Expr]]:
    """A layer's weights on one rank: those that all copies have, and its experts' own."""
    kv = _kv_ways(job, part)
    yield "", "dp", _held(part, job.ways.tp, kv)
    for block in part.parts:
        for experts in (p for p in block.parts if p.name == "experts"):
            own = total(_held(p, job.ways.tp, kv) for p in experts.parts)
            yield "/experts", "expert_dp", ceil_div(experts.times, job.ways.ep) * own


def _held(part: Part, tp: Expr, kv: Expr) -> Expr:
    """Weights of one copy of a part on one rank, without the experts.

    The same rule as `isoflop.count.memory_rank.Split`, for any number of ways.
    """
    own = [_cut(weight.axes, tp, kv) for weight in part.weights]
    below = [p.times * _held(p, tp, kv) for p in part.parts if p.name != "experts"]
    return total(own + below)


def _cut(axes: tuple[tuple[str, Expr], ...], tp: Expr, kv: Expr) -> Expr:
    split = next((name for name, _ in axes if name in SPLIT), None)
    return product(
        size if name != split
        else ceil_div(size, tp) if name == "vocab"
        else size / (kv if name == "kv_heads" else tp)
        for name, size in axes
    )  # fmt: skip


# --- pipeline parallelism ---------------------------------------------------------------


def between(job: Job) -> Iterator[Message]:
    """Activations to the next stage, their gradients back, at each border of a chunk.

    Without sequence parallelism whole: each tensor-parallel rank sends its own copy.
    """
    chunks = 2 if job.layout.schedule == "dualpipev" else job.virtual
    times = job.n_micro * chunks
    yield Message("pp/forward", "send", "pp", job.stream_held, times)
    yield Message("pp/backward", "send", "pp", job.stream_held, times)

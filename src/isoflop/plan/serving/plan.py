"""What serving a model takes: memory, accelerators, latency, throughput, money.

First order: a fixed batch of equal requests on each copy of the model, no queue; a token waits
for launches and small messages, a prompt for neither; pipeline stages work one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from isoflop.arch import Arch, LatentAttention
from isoflop.count import Precision
from isoflop.count.memory_weights import Format, format_of
from isoflop.hardware import Cluster
from isoflop.plan.assumed import assumption_json
from isoflop.plan.memory.place import barely
from isoflop.plan.serving.asked import Asked
from isoflop.plan.serving.step import Server, placed
from isoflop.quantity import Node, Symbol
from isoflop.quantity.node import plain
from isoflop.quantity.text import numbers
from isoflop.quantity.units import format_seconds


@dataclass(frozen=True, slots=True)
class ServePlan:
    """A server on a cluster: `n_copies` of the model, each on tp x pp accelerators.

    `memory` is one copy's, whole; `bytes_per_accelerator` what the fullest accelerator of
    it holds. `seconds_prefill` is one prompt's, `seconds_first_tokens` that of all prompts of
    a batch that come at once, read one after the other. `tokens_per_second` counts output
    tokens of all copies, prompts included in the time; `tokens_per_second_decode` leaves the
    prompts out. `accelerators_min` is by capacity alone; `accelerators_min_tensor` by a tensor
    parallelism that splits the model evenly, None where none in one node does.
    """

    server: Server
    bytes_per_accelerator: Node
    accelerators_min: Node
    accelerators_min_tensor: int | None

    @property
    def asked(self) -> Asked:
        return self.server.asked

    @property
    def model(self) -> str:
        return self.asked.arch.name

    @property
    def cluster(self) -> Cluster:
        return self.asked.cluster

    @property
    def precision(self) -> Format:
        """How weights are stored."""
        return format_of(self.asked.precision)

    @property
    def precision_compute(self) -> str:
        return self.asked.compute

    @property
    def title(self) -> str:
        """What is served, on what, how many at once."""
        asked, kv = self.asked, self.asked.stored.kv_cache.value
        stored = self.precision.name + (f", cache in {kv}" if asked.kv_precision else "")
        return (
            f"{self.model} on {self.cluster}: {self.n_copies} x (tp={self.tp} pp={self.pp}), "
            f"batch {self.batch:,} of at most {self.batch_max:,}, "
            f"{asked.input_tokens:,} in, {asked.output_tokens:,} out, {stored}"
        )

    def __str__(self) -> str:
        """The title, and the numbers with their ranges."""
        shown = {
            "time to first token": self.seconds_prefill,
            "time per output token": self.seconds_per_token,
            "output tokens per second": self.tokens_per_second,
            "dollars per million output tokens, prompts included": self.dollars_per_million_tokens,
        }
        return f"{self.title}\n\n{numbers(shown)}"

    def __repr__(self) -> str:
        return f"<ServePlan {self.title}>"

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        """What IPython and Jupyter show."""
        printer.text(str(self))

    @property
    def tp(self) -> int:
        return self.server.place.tp

    @property
    def pp(self) -> int:
        return self.server.place.pp

    @property
    def batch(self) -> int:
        return self.server.batch

    @property
    def batch_max(self) -> int:
        """The largest batch that memory holds."""
        return self.server.place.batch_max

    @property
    def n_copies(self) -> int:
        return self.server.n_copies

    @property
    def memory(self) -> Node:
        return self.server.memory

    @property
    def seconds_prefill(self) -> Node:
        return self.server.prefill

    @property
    def seconds_first_tokens(self) -> Node:
        return self.server.first_tokens

    @property
    def seconds_per_token(self) -> Node:
        return self.server.decode

    @property
    def tokens_per_second(self) -> Node:
        return self.server.tokens_per_second

    @property
    def tokens_per_second_decode(self) -> Node:
        return self.server.tokens_per_second_decode()

    @property
    def dollars_per_million_tokens(self) -> Node:
        return self.server.dollars_per_million_tokens

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan, by its name in JSON."""
        names = (
            "bytes_per_accelerator",
            "accelerators_min",
            "seconds_prefill",
            "seconds_first_tokens",
            "seconds_per_token",
            "tokens_per_second",
            "tokens_per_second_decode",
            "dollars_per_million_tokens",
        )
        return {name: getattr(self, name) for name in names}

    @property
    def shares(self) -> dict[str, float]:
        """Parts of one copy's memory; they add up to 1."""
        return {c.name: float(c.value / self.memory.value) for c in self.memory.children}

    @property
    def assumptions(self) -> tuple[Symbol, ...]:
        """Every default in the plan that the user may override, once."""
        nodes = (self.memory, *self.nodes().values())
        return tuple({s.name: s for node in nodes for s in node.assumptions}.values())

    @property
    def missed(self) -> tuple[str, ...]:
        """The limits asked for that the plan misses at its middle values, and by how much."""
        limits = (
            ("time to the first token", self.seconds_prefill, self.asked.ttft),
            ("time per output token", self.seconds_per_token, self.asked.tpot),
        )
        return tuple(
            f"{name} at batch {self.batch}: {format_seconds(node.value)} exceeds the limit of "
            f"{format_seconds(limit)} by {format_seconds(float(node.value) - limit)} "
            f"({float(node.value) / limit:.3g} times it)"
            for name, node, limit in limits
            if limit is not None and float(node.value) > limit
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the times of this layout leave out, and whether it fits by a hair only."""
        out = list(barely(self.bytes_per_accelerator, self.cluster.chip))
        if waited := float(self.seconds_per_token.find("launches").value):
            share = waited / float(self.seconds_per_token.value)
            out.append(
                f"a token waits for launches {share:.0%} of its time: what a layer at least takes "
                "is assumed, and an engine may well take a third or thrice that"
            )
        if self.tp > self.cluster.size_node:
            out.append(
                f"tp={self.tp} spans nodes of {self.cluster.size_node}: what they say to each "
                "other is not counted, and takes long there"
            )
        if self.tp > 1 and any(
            isinstance(layer.attention, LatentAttention) for layer in self.asked.arch.layers
        ):
            out.append(
                "each tensor parallel accelerator holds the whole latent cache; engines that "
                "spread its sequences instead (data-parallel attention) hold more of them"
            )
        if self.pp > 1:
            out.append(
                f"pp={self.pp}: the stages are taken to work one after the other on one batch; "
                "an engine that keeps several in flight makes more tokens"
            )
        return tuple(out)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: numbers by name, memory as a tree, ranges beside them."""
        nodes, asked = self.nodes(), self.asked
        ranges = {name: node.interval for name, node in nodes.items()}
        given = ("model", "batch", "batch_max", "precision_compute", "tp", "pp", "n_copies",
                 "accelerators_min_tensor")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in given},
            "input_tokens": asked.input_tokens,
            "output_tokens": asked.output_tokens,
            "precision": self.precision.name,
            "kv_precision": asked.stored.kv_cache.value,
            "page": asked.page,
            "ttft": asked.ttft,
            "tpot": asked.tpot,
            "missed": list(self.missed),
            "notes": list(self.notes),
            "cluster": self.cluster.to_json(),
            **{name: plain(node.value) for name, node in nodes.items()},
            "memory": self.memory.to_json(),
            "shares": self.shares,
            "intervals": {name: r.to_json() for name, r in ranges.items() if r is not None},
            "assumptions": [assumption_json(s) for s in self.assumptions],
            "breakdown": {name: node.to_json() for name, node in nodes.items()},
        }


def plan_serve(
    arch: Arch,
    cluster: Cluster,
    *,
    input_tokens: int,
    output_tokens: int,
    batch: int | None = None,
    precision: Precision | Format | str = Precision.BF16,
    kv_precision: Precision | str | None = None,
    page: int | None = None,
    tp: int | None = None,
    ttft: float | None = None,
    tpot: float | None = None,
    price: float | None = None,
    efficiency_compute: float | None = None,
    efficiency_bandwidth: float | None = None,
    seconds_layer: float | None = None,
    seconds_all_reduce: float | None = None,
) -> ServePlan:
    """Plan a server.

    `batch` is the sequences that one copy of the model works on at once; None means as
    many as its memory holds and the limits `ttft` (seconds to the first token, with no
    queue) and `tpot` (seconds per output token) allow, or 1 where none is allowed: the
    plan's `missed` says so. `precision` is that of the stored weights, a name out of
    `FORMATS`; `page` rounds each cache up to whole pages of so many tokens. `tp` None means
    the largest tensor parallelism within a node that splits the model evenly and leaves the
    fewest accelerators idle; beyond a node only where nothing else fits. `price` is in
    dollars per accelerator-hour. `seconds_layer` is the least that a layer of one token takes,
    `seconds_all_reduce` what each of its two messages adds.

    Raises:
        InputError: a number out of bounds, an illegal `tp`, a precision the chip lacks, a
            price that nobody states and that was not given.
        Infeasible: the model, or the batch asked for, does not fit; the text says what would.

    >>> from isoflop.arch import llama
    >>> from isoflop.hardware import parse_cluster
    >>> l3 = llama("l3", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    ...            vocab_size=128256, max_seq_len=8192)
    >>> plan = plan_serve(l3, parse_cluster("h100-sxm"), input_tokens=1024, output_tokens=256,
    ...                   batch=1, efficiency_bandwidth=1)
    >>> print(f"{float(plan.seconds_per_token.value) * 1000:.1f} ms")
    4.5 ms
    """
    asked = Asked(arch, cluster, input_tokens, output_tokens, batch, precision, kv_precision, page,
                  tp, ttft, tpot, price, efficiency_compute, efficiency_bandwidth, seconds_layer,
                  seconds_all_reduce)  # fmt: skip
    server = placed(asked)
    where, request = server.place, server.request
    return ServePlan(
        server=server,
        bytes_per_accelerator=request.per_accelerator(server.batch, where.tp, where.pp),
        accelerators_min=request.accelerators_min(batch or 1),
        accelerators_min_tensor=request.accelerators_min_tensor(batch or 1),
    )

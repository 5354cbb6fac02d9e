"""What serving a model takes: memory, accelerators, latency, throughput, money.

First order: a fixed batch of equal requests on each copy of the model, no queue, no
communication; pipeline stages work one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from isoflop.arch import Arch
from isoflop.count import Precision, Workload
from isoflop.count.blocks import beside
from isoflop.errors import InputError, Problem
from isoflop.hardware import Chip, Cluster
from isoflop.hardware.chip import Precision as Format
from isoflop.plan.ask import at_most, one_of, whole
from isoflop.plan.assumed import (
    EFFICIENCY_BANDWIDTH,
    EFFICIENCY_COMPUTE,
    assumption_json,
    choose,
)
from isoflop.plan.economics import dollars_per_million_tokens, price_of, unstated
from isoflop.plan.roofline import Rates, Stored, seconds_decode, seconds_prefill
from isoflop.plan.room import Request, apart, place
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf
from isoflop.quantity.node import plain


@dataclass(frozen=True, slots=True)
class ServePlan:
    """A server on a cluster: `n_copies` of the model, each on tp x pp accelerators.

    `memory` is one copy's, whole; `bytes_per_accelerator` what the fullest accelerator of
    it holds. `tokens_per_second` counts output tokens of all copies, prompts included in
    the time; `tokens_per_second_decode` leaves the prompts out. `accelerators_min` is by
    capacity alone; `accelerators_min_tensor` by a tensor parallelism that splits the model
    evenly, None where none in one node does.
    """

    model: str
    cluster: Cluster
    input_tokens: int
    output_tokens: int
    batch: int
    batch_max: int
    precision: Precision
    kv_precision: Precision
    precision_compute: Format
    tp: int
    pp: int
    n_copies: int
    memory: Node
    bytes_per_accelerator: Node
    accelerators_min: Node
    accelerators_min_tensor: int | None
    seconds_prefill: Node
    seconds_per_token: Node
    tokens_per_second: Node
    tokens_per_second_decode: Node
    dollars_per_million_tokens: Node

    def nodes(self) -> dict[str, Node]:
        """Every number of the plan, by its name in JSON."""
        names = (
            "bytes_per_accelerator",
            "accelerators_min",
            "seconds_prefill",
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

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data: numbers by name, memory as a tree, ranges beside them."""
        nodes = self.nodes()
        ranges = {name: node.interval for name, node in nodes.items()}
        given = ("model", "input_tokens", "output_tokens", "batch", "batch_max", "precision",
                 "kv_precision", "precision_compute", "tp", "pp", "n_copies",
                 "accelerators_min_tensor")  # fmt: skip
        return {
            **{name: getattr(self, name) for name in given},
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
    precision: Precision | str = Precision.BF16,
    kv_precision: Precision | str | None = None,
    tp: int | None = None,
    price: float | None = None,
    efficiency_compute: float | None = None,
    efficiency_bandwidth: float | None = None,
) -> ServePlan:
    """Plan a server.

    `batch` is the sequences that one copy of the model works on at once; None means as
    many as its memory holds. `precision` is that of the stored weights. `tp` None means
    the largest tensor parallelism within a node that splits the model evenly and leaves
    the fewest accelerators idle. `price` is
    in dollars per accelerator-hour.

    Raises:
        InputError: a number out of bounds, an illegal `tp`, a precision the chip lacks, a
            price that nobody states and that was not given.
        Infeasible: the model, or the batch asked for, does not fit.

    >>> from isoflop.arch import llama
    >>> from isoflop.hardware import parse_cluster
    >>> l3 = llama("l3", d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_ff=14336,
    ...            vocab_size=128256, max_seq_len=8192)
    >>> plan = plan_serve(l3, parse_cluster("h100-sxm"), input_tokens=1024, output_tokens=256,
    ...                   batch=1, efficiency_bandwidth=1)
    >>> print(f"{float(plan.seconds_per_token.value) * 1000:.1f} ms")
    4.5 ms
    """
    bad = [
        *beside(arch, "is none: plans are made for decoders"),
        *_check_lengths(arch, input_tokens, output_tokens),
        *([] if batch is None else whole("batch", batch, 10**9)),
        *one_of("precision", precision, tuple(Precision)),
        *one_of("kv_precision", kv_precision or "bf16", tuple(Precision)),
        *at_most("efficiency_compute", efficiency_compute, 1, "all of the peak"),
        *at_most("efficiency_bandwidth", efficiency_bandwidth, 1, "all of the bandwidth"),
        *unstated(cluster.chip, price=price),
    ]
    if bad:
        raise InputError("plan serve", bad)
    chip = cluster.chip
    stored, compute = _formats(Precision(precision), kv_precision, chip)
    request = Request(arch, chip, stored, input_tokens, output_tokens)
    rates = Rates(
        chip.peak(compute) * choose(EFFICIENCY_COMPUTE, efficiency_compute),
        chip.bytes_per_second_memory * choose(EFFICIENCY_BANDWIDTH, efficiency_bandwidth),
    )
    ways, stages, most = place(request, cluster, tp, batch or 1)
    shape = (most if batch is None else batch, ways, stages, cluster.count // (ways * stages))
    n = _Numbers(request, rates, price_of(chip, price), *shape)
    return ServePlan(
        model=arch.name,
        cluster=cluster,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        batch=n.batch,
        batch_max=most,
        precision=stored.weights,
        kv_precision=stored.kv_cache,
        precision_compute=compute,
        tp=ways,
        pp=stages,
        n_copies=n.n_copies,
        memory=request.memory(n.batch, ways * stages),
        bytes_per_accelerator=request.per_accelerator(n.batch, ways, stages),
        accelerators_min=request.accelerators_min(batch or 1),
        accelerators_min_tensor=request.accelerators_min_tensor(batch or 1),
        seconds_prefill=n.prefill,
        seconds_per_token=n.decode,
        tokens_per_second=n.tokens_per_second(),
        tokens_per_second_decode=n.tokens_per_second_decode(),
        dollars_per_million_tokens=n.dollars_per_million_tokens(),
    )


def _check_lengths(arch: Arch, input_tokens: int, output_tokens: int) -> list[Problem]:
    bad = [
        *whole("input_tokens", input_tokens, arch.max_seq_len),
        *whole("output_tokens", output_tokens, arch.max_seq_len),
    ]
    if not bad and input_tokens + output_tokens > arch.max_seq_len:
        rule = f"with input_tokens is at most max_seq_len={arch.max_seq_len}"
        bad.append(Problem("output_tokens", output_tokens, rule))
    return bad


@dataclass(frozen=True)
class _Numbers:
    """Time and money of a server whose place is found."""

    request: Request
    rates: Rates
    price: Symbol
    batch: int
    tp: int
    pp: int
    n_copies: int

    @cached_property
    def _rates_copy(self) -> Rates:
        ways = Symbol("tp", self.tp, meaning="tensor parallel accelerators")
        return Rates(self.rates.flops_per_second * ways, self.rates.bytes_per_second * ways)

    @cached_property
    def prefill(self) -> Node:
        ask = self.request
        work = Workload.train(1, ask.input_tokens)
        return seconds_prefill(ask.arch, work, self._rates_copy, ask.stored)

    @cached_property
    def decode(self) -> Node:
        ask = self.request
        work = Workload.decode(self.batch, ask.mean_context)
        return seconds_decode(ask.arch, work, self._rates_copy, ask.stored)

    @property
    def _batch(self) -> Symbol:
        return Symbol("batch_decode", self.batch, meaning="sequences that decode at once")

    def _output_rate(self) -> Expr:
        """Output tokens per second when prompts are read one by one between the steps."""
        out = Symbol("output_tokens", self.request.output_tokens)
        step = apart(self.decode.total, self.prefill.total, "decode")
        seconds = self._batch * self.prefill.total + out * step
        return self._batch * Symbol("n_copies", self.n_copies) * out / seconds

    def tokens_per_second(self) -> Node:
        return _rate("tokens_per_second", self._output_rate())

    def tokens_per_second_decode(self) -> Node:
        together = self._batch * Symbol("n_copies", self.n_copies)
        return _rate("tokens_per_second_decode", together / self.decode.total)

    def dollars_per_million_tokens(self) -> Node:
        used = Symbol("n_accelerators_used", self.tp * self.pp * self.n_copies)
        return dollars_per_million_tokens(used, self.price, self._output_rate())


def _rate(name: str, size: Expr) -> Node:
    return leaf(name, "tokens/s", size, basis=Basis.MODELLED)


# --- precisions ---------------------------------------------------------------------------


def _formats(weights: Precision, kv: Precision | str | None, chip: Chip) -> tuple[Stored, Format]:
    """How tensors are stored, and what products are computed in.

    int8 and int4 are storage: products run in 16 bits, of the kind that the chip has.
    fp8 products run in fp8 where the chip has it. Activations and, unless said
    otherwise, the cache take 16 bits; all of a model in fp32 takes 32.
    """
    working = weights
    if weights not in {Precision.FP32, Precision.FP16, Precision.BF16}:
        working = Precision.BF16 if "bf16" in chip.peaks else Precision.FP16
    formats: dict[Precision, Format] = {
        Precision.FP32: "fp32",
        Precision.FP16: "fp16",
        Precision.BF16: "bf16",
    }
    compute = formats[working]
    if weights is Precision.FP8 and "fp8" in chip.peaks:
        compute = "fp8"
    return Stored(weights, working, Precision(kv) if kv else working), compute

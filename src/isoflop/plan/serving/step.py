"""Time and money of a server whose place is found, at one batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from isoflop.count import Workload
from isoflop.plan.economics import dollars_per_million_tokens, price_of
from isoflop.plan.memory.room import Place, Request, apart, place
from isoflop.plan.roofline import Rates, seconds_decode, seconds_prefill
from isoflop.plan.serving.asked import Asked
from isoflop.quantity import Basis, Expr, Node, Symbol, leaf


@dataclass(frozen=True)
class Server:
    """Copies of a model at `place` in a cluster, each working on `batch` sequences."""

    asked: Asked
    place: Place
    batch: int

    @cached_property
    def request(self) -> Request:
        return self.asked.request

    @property
    def n_copies(self) -> int:
        return self.asked.cluster.count // (self.place.tp * self.place.pp)

    @cached_property
    def memory(self) -> Node:
        """One copy's, whole."""
        return self.request.memory(self.batch, self.place.tp * self.place.pp)

    @cached_property
    def _rates_copy(self) -> Rates:
        one = self.asked.rates
        ways = Symbol("tp", self.place.tp, meaning="tensor parallel accelerators")
        return Rates(one.flops_per_second * ways, one.bytes_per_second * ways)

    @cached_property
    def prefill(self) -> Node:
        """One prompt."""
        ask = self.request
        work = Workload.train(1, ask.input_tokens)
        return seconds_prefill(ask.arch, work, self._rates_copy, ask.stored)

    @cached_property
    def decode(self) -> Node:
        """One token of each sequence, in the middle of the answer."""
        ask = self.request
        work = Workload.decode(self.batch, ask.mean_context)
        copies = ask.copies_kv(self.place.tp)
        waits = self.asked.waits(self.place.tp)
        return seconds_decode(ask.arch, work, self._rates_copy, ask.stored, copies, waits)

    @property
    def _batch(self) -> Symbol:
        return Symbol("batch_decode", self.batch, meaning="sequences that decode at once")

    @cached_property
    def first_tokens(self) -> Node:
        """All prompts of the batch, read one after the other."""
        together = self._batch * self.prefill.total
        return leaf("seconds_first_tokens", "seconds", together, basis=Basis.MODELLED)

    @cached_property
    def _output_rate(self) -> Expr:
        """Output tokens per second when prompts are read one by one between the steps."""
        out = Symbol("output_tokens", self.request.output_tokens)
        step = apart(self.decode.total, self.prefill.total, "decode")
        seconds = self._batch * self.prefill.total + out * step
        return self._batch * Symbol("n_copies", self.n_copies) * out / seconds

    @cached_property
    def tokens_per_second(self) -> Node:
        """Output tokens of all copies, the time of the prompts counted."""
        return _rate("tokens_per_second", self._output_rate)

    def tokens_per_second_decode(self) -> Node:
        together = self._batch * Symbol("n_copies", self.n_copies)
        return _rate("tokens_per_second_decode", together / self.decode.total)

    @cached_property
    def dollars_per_million_tokens(self) -> Node:
        used = Symbol("n_accelerators_used", self.place.tp * self.place.pp * self.n_copies)
        price = price_of(self.asked.cluster.chip, self.asked.price)
        return dollars_per_million_tokens(used, price, self._output_rate)

    def at(self, batch: int) -> Server:
        """The same server at another batch."""
        return replace(self, batch=batch)

    @property
    def batch_within_limits(self) -> int:
        """The largest batch that fits and keeps to the limit on the time per token; 1 if none.

        A larger batch never makes a step shorter, so halving finds it.
        """
        low, high = 1, self.place.batch_max
        if self.asked.tpot is None:
            return high
        while low < high:
            middle = (low + high + 1) // 2
            if float(self.at(middle).decode.value) <= self.asked.tpot:
                low = middle
            else:
                high = middle - 1
        return low


def placed(asked: Asked) -> Server:
    """The server that answers a question, at the batch asked for or the largest.

    Raises:
        InputError: a number out of bounds, an illegal `tp`, a precision the chip lacks.
        Infeasible: the model, or the batch asked for, does not fit.
    """
    asked.check()
    where = place(asked.request, asked.cluster, asked.tp, asked.batch or 1)
    server = Server(asked, where, 1)
    return server.at(asked.batch or server.batch_within_limits)


def _rate(name: str, size: Expr) -> Node:
    return leaf(name, "tokens/s", size, basis=Basis.MODELLED)

"""Where the ranks of each parallelism sit: how many share a fast link, how many domains they span.

Ranks are numbered as Megatron does (Narayanan 2021, 2104.04473, section 3; Megatron-Core's
order tp-cp-ep-dp-pp): tensor parallel neighbours first, then context, data, pipeline. Experts
are dealt over the ranks of context and data parallelism in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from isoflop.hardware.fabric import Fabric
from isoflop.plan.layout import Layout
from isoflop.quantity import Expr, Number, Symbol, ceil_div, minimum, number, total, where

#: tp, cp, ep, pp: the ranks of one tensor, context, expert and pipeline group. dp: those that
#: hold the same dense weights, dp x cp of them. expert_dp: those that hold the same experts.
#: shard, replica: dp cut in two where weights are sharded within a part of it only (HSDP);
#: expert_shard: the part of shard that holds the same experts.
Dimension: TypeAlias = Literal[
    "tp", "cp", "dp", "ep", "pp", "expert_dp", "shard", "expert_shard", "replica"
]
DIMENSIONS: tuple[Dimension, ...] = get_args(Dimension)


@dataclass(frozen=True, slots=True)
class Ways:
    """In how many ways a step is split; `shard` of dp x cp ranks split the weights (HSDP)."""

    tp: Expr
    cp: Expr
    dp: Expr
    pp: Expr
    ep: Expr
    shard: Expr

    @classmethod
    def of(cls, layout: Layout) -> Ways:
        """A layout's sizes by name, so that a search may put others in their place.

        >>> Ways.of(Layout(tp=8, dp=4, cp=2)).copies.digits
        '4 * 2'
        """
        tp, cp, dp, pp, ep = (
            Symbol(name, getattr(layout, name), meaning=meaning)
            for name, meaning in (
                ("tp", "tensor parallel accelerators"),
                ("cp", "context-parallel ranks"),
                ("dp", "data-parallel copies"),
                ("pp", "pipeline stages"),
                ("ep", "ranks that the experts are spread over"),
            )
        )
        within: Expr = dp * cp
        if layout.shard is not None:
            meaning = "ranks that one copy is sharded over"
            within = Symbol("shard", layout.shard, meaning=meaning)
        return cls(tp, cp, dp, pp, ep, within)

    @property
    def copies(self) -> Expr:
        """Ranks that hold the same dense weights."""
        return self.dp * self.cp

    @property
    def n_ranks(self) -> Expr:
        return self.tp * self.cp * self.dp * self.pp

    def sizes(self) -> dict[Dimension, tuple[Expr, Expr]]:
        """Of each dimension, how many ranks, and how far apart two neighbours are."""
        tp, copies = self.tp, self.copies
        return {
            "tp": (tp, number(1)),
            "cp": (self.cp, tp),
            "dp": (copies, tp),
            "ep": (self.ep, tp),
            "pp": (self.pp, tp * copies),
            "expert_dp": (copies / self.ep, tp * self.ep),
            "shard": (self.shard, tp),
            "expert_shard": (self.shard / self.ep, tp * self.ep),
            "replica": (copies / self.shard, tp * self.shard),
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that talk to each other.

    Attributes:
        size: how many.
        per_domain: of them share a domain, at most.
        domains: that they lie in.
        depth: of a binary tree over the domains, log2 rounded up.
    """

    size: Expr
    per_domain: Expr
    domains: Expr
    depth: Expr

    @property
    def alone(self) -> bool:
        """Whether each rank is in a domain of its own, whatever the layout."""
        return self.per_domain == Number(1)

    @property
    def together(self) -> bool:
        """Whether all ranks share one domain, whatever the layout."""
        return self.domains == Number(1)

    def named(self, name: str) -> Group:
        """The same numbers under names, for formulas that people read and searches fill in.

        >>> Group(Symbol("tp", 8), number(4), number(2), number(1)).named("tp").size.text
        'n_tp'
        """
        meanings = {
            "size": (f"n_{name}", "ranks of the group"),
            "per_domain": (f"{name}_per_domain", "of them in one domain"),
            "domains": (f"{name}_domains", "domains that they lie in"),
            "depth": (f"{name}_depth", "doublings to that many domains"),
        }
        fields = {
            field: value
            if isinstance(value := getattr(self, field), Number)
            else Symbol(called, value.value, meaning=f"{name}: {meaning}")
            for field, (called, meaning) in meanings.items()
        }
        return Group(**fields)


def groups(ways: Ways, fabric: Fabric, count: int) -> dict[Dimension, Group]:
    """The groups of every dimension, for layouts of at most `count` accelerators.

    A job fills as many domains as it needs evenly: 256 ranks on racks of 72 take 64 of
    each of four.
    """
    return {name: _group(*place, ways, fabric, count) for name, place in ways.sizes().items()}


def group_of(layout: Layout, fabric: Fabric, name: Dimension) -> Group:
    """The group of one dimension of a layout, in numbers.

    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.hardware.fabric import fabric_of
    >>> group = group_of(Layout(tp=2, dp=16), fabric_of(parse_cluster("4xdgx-h100")), "dp")
    >>> group.size.value, group.per_domain.value, group.domains.value, group.depth.value
    (16, 4, 4, 2)
    """
    return groups(Ways.of(layout), fabric, layout.n_accelerators)[name].named(name)


def _group(size: Expr, stride: Expr, ways: Ways, fabric: Fabric, count: int) -> Group:
    if count <= fabric.domain:
        return Group(size, size, number(1), number(0))
    domains = size if fabric.domain == 1 else _domains(size, stride, ways.n_ranks, fabric.domain)
    per_domain = number(1) if fabric.domain == 1 else ceil_div(size, domains)
    return Group(size, per_domain, domains, _log2(domains, -(-count // fabric.domain)))


def _domains(size: Expr, stride: Expr, n_ranks: Expr, domain: int) -> Expr:
    """Domains that `size` ranks, `stride` apart, lie in; the group that lies worst decides.

    Groups are blocks of size x stride ranks. Where blocks and domains do not fit into each
    other, some block straddles one border more.
    """
    there_are = ceil_div(n_ranks, domain)
    filled = ceil_div(n_ranks, there_are)
    block = size * stride
    straddles = where(_remainder(filled, block) * _remainder(block, filled), 1, 0)
    return minimum(size, there_are, ceil_div(block, filled) + straddles)


def _remainder(a: Expr, b: Expr) -> Expr:
    """What a whole division of a by b leaves."""
    return a - b * (ceil_div(a + 1, b) - 1)


def _log2(size: Expr, most: int) -> Expr:
    """log2 rounded up, of a whole number from 1 to `most`."""
    return total(where(size - 2**i, 1, 0) for i in range((most - 1).bit_length()))

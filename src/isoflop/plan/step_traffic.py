"""Seconds of a step's collectives and sends, before any overlap."""

from __future__ import annotations

from dataclasses import dataclass

from isoflop.plan.constants import Constants
from isoflop.plan.step_sizes import Sizes, Structure
from isoflop.quantity import Expr, maximum, minimum, number, where


@dataclass(frozen=True, slots=True)
class Traffic:
    """What a group of ranks takes to exchange bytes, given where its ranks stand.

    Ranks are dealt tensor first, then context, then data, then pipeline, so neighbours in
    the first groups share a machine.
    """

    structure: Structure
    sizes: Sizes
    constants: Constants

    def gather(self, moved: Expr, ranks: Expr, stride: Expr) -> Expr:
        """Seconds until every rank holds all of `moved` bytes, or the sum's own piece of it.

        A ring passes (n - 1) / n of the bytes over each of its edges; a machine's edges to
        the next are shared by as many rings as the group has ranks in it.
        """
        inside = self._inside(ranks, stride)
        share = (ranks - 1) / ranks
        link, network = self._rates()
        slowest = maximum(
            where(inside - 1, 1 / link, 0), where(ranks - inside, 1 / (inside * network), 0)
        )
        return share * moved * slowest + (ranks - 1) * self.constants.seconds_hop

    def exchange(self, moved: Expr, copies: Expr, ranks: Expr, stride: Expr, *, once: bool) -> Expr:
        """Seconds until each rank has sent its tokens to the ranks of their experts.

        `moved` bytes go out in `copies` copies per token, dealt evenly over the ranks; with
        `once`, a token crosses to each other machine at most once and is copied there.
        """
        inside = self._inside(ranks, stride)
        link, network = self._rates()
        near = (inside - 1) / ranks * moved / link
        out = (ranks - inside) / ranks
        if once:
            out = minimum(out, (ranks / inside - 1) / copies)
        return maximum(near, out * moved / network) + (ranks - 1) * self.constants.seconds_hop

    def send(self, moved: Expr, stride: Expr) -> Expr:
        """Seconds to hand `moved` bytes to the rank `stride` further on."""
        link, network = self._rates()
        return moved / where(self.structure.per_node - stride, link, network)

    def _inside(self, ranks: Expr, stride: Expr) -> Expr:
        """Ranks of the group that share a machine."""
        return minimum(ranks, maximum(1, self.structure.per_node / stride))

    def _rates(self) -> tuple[Expr, Expr]:
        chip = self.structure.chip
        link = chip.bytes_per_second_link
        network = chip.bytes_per_second_network
        assert link is not None
        fast = link * self.constants.share_link
        return fast, (network or link) * self.constants.share_network

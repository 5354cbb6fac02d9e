"""Schedules in closed form: seconds of a step, idle seconds as published, what is in flight.

Where all stages take equally long and sends are short, the seconds are the simulation's,
exactly. Where stages differ, `Terms` takes the slowest rank and the sum of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from isoflop.plan.schedule.kinds import (
    DualPipe,
    DualPipeV,
    GPipe,
    Interleaved,
    OneFOneB,
    Schedule,
    ZeroBubble,
)
from isoflop.quantity import Expr, Symbol, ceil_div, maximum, minimum, number


@dataclass(frozen=True, slots=True)
class Terms:
    """What the formulas are made of, each a free symbol unless given.

    Seconds are those of one micro-batch through the layers that one rank holds (DualPipe
    holds every layer twice, and one micro-batch passes half of what a rank holds).
    `hidden` is what the forward of one chunk and the backward of the other save together.
    """

    n_micro: Expr = field(
        default=Symbol("n_micro_batches", meaning="micro-batches of one pipeline per step")
    )
    pp: Expr = field(default=Symbol("pp", meaning="pipeline ranks"))
    forward: Expr = field(default=Symbol("seconds_forward", meaning="forward on the slowest rank"))
    backward: Expr = field(
        default=Symbol("seconds_backward", meaning="whole backward on the slowest rank")
    )
    weight: Expr = field(
        default=Symbol("seconds_weight", meaning="its part for the weights' gradients")
    )
    others_forward: Expr = field(
        default=Symbol("seconds_forward_others", meaning="forward on all other ranks")
    )
    others_backward: Expr = field(
        default=Symbol("seconds_backward_others", meaning="whole backward on the others")
    )
    others_weight: Expr = field(
        default=Symbol("seconds_weight_others", meaning="its part for weights' gradients")
    )
    send: Expr = field(default=Symbol("seconds_send", meaning="from one rank to the next"))
    hidden: Expr = field(
        default=Symbol("seconds_hidden", meaning="saved by a forward and a backward together")
    )

    def equal_ranks(self) -> Terms:
        """The same, where all ranks are as slow as the slowest."""
        return replace(
            self,
            others_forward=(self.pp - 1) * self.forward,
            others_backward=(self.pp - 1) * self.backward,
            others_weight=(self.pp - 1) * self.weight,
        )


def seconds_closed(schedule: Schedule, terms: Terms) -> Expr:
    """Seconds of a step whose optimizer waits for all ranks, as `Simulation.seconds`.

    Equals the simulation where ranks are equal, and sends
    - GPipe, 1F1B: of any length. 1F1B waits for two in nearly every micro-batch, since no
      rank runs further ahead than it must: sends that overlap are not free.
    - interleaved: no longer than a chunk's forward or backward; if longer, more.
    - ZB-H2: no longer than F, B or W. ZB-H1: no longer than half of each; where there are
      just pp micro-batches, at most 2 (pp - 1) sends less.
    - DualPipe, DualPipeV: of no length; they are meant to hide behind the other direction.
      Sends that are not nothing only add.

    With unequal ranks it is what the slowest needs, and the others once to fill and drain.
    Backward the same multiple of forward on all ranks, and no sends: 1F1B's step lies between
    n_micro_batches times the slowest rank and this; GPipe's is this.

    >>> terms = Terms().equal_ranks()
    >>> seconds_closed(OneFOneB(), replace(terms, send=number(0))).evaluate(
    ...     {"n_micro_batches": 8, "pp": 4, "seconds_forward": 1, "seconds_backward": 2})
    33
    """
    work = terms.n_micro * (terms.forward + terms.backward) + idle_closed(schedule, terms)
    if isinstance(schedule, DualPipe | DualPipeV):
        return work - n_together(schedule, terms) * terms.hidden
    return work


def idle_closed(schedule: Schedule, terms: Terms) -> Expr:
    """Seconds that the slowest rank waits, without what pairs of work hide."""
    match schedule:
        case ZeroBubble(ahead=ahead):
            return _zero_bubble(ahead, terms)
        case DualPipe() | DualPipeV():
            return _dual(schedule, terms)
        case _:
            return bubble_published(schedule, terms) + _hops(schedule, terms) * terms.send


def _hops(schedule: Schedule, t: Terms) -> Expr:
    """Sends on the longest way through a step."""
    match schedule:
        case OneFOneB():
            return 2 * (t.n_micro + t.pp - 2 - ceil_div(t.n_micro - 1, t.pp))
        case Interleaved(virtual=virtual):
            return 2 * (t.pp * virtual - 1)
        case _:
            return 2 * (t.pp - 1)


def _zero_bubble(ahead: int, t: Terms) -> Expr:
    """Idle seconds: the longest of the ways through a step, less the work of one rank.

    One way is the last rank's late start, one the wait for the first backward, one the
    published bubble; the last alone holds where F, B and W take equally long, for ZB-H1.
    """
    inputs, hop = t.others_backward - t.others_weight, (t.pp - 1) * t.send
    if ahead == 1:
        published = bubble_published(ZeroBubble(1), t)
        return maximum(t.others_forward + 3 * hop, inputs + 2 * hop, published + 4 * hop)
    published = bubble_published(ZeroBubble(2), t)
    early = inputs - t.others_forward
    return maximum(t.others_forward + hop, early + 2 * hop, published + 2 * hop)


def _dual(schedule: DualPipe | DualPipeV, t: Terms) -> Expr:
    """Idle seconds of the ranks at the turn; no ranks pair more of their work than they do.

    It is the published bubble where forward, inputs' and weights' gradient are equal.
    """
    forward, backward, weight = _up_to_turn(schedule, t)
    inputs = backward - weight
    chunk = t.forward if isinstance(schedule, DualPipe) else t.forward / 2
    return maximum(0, inputs - weight) + forward + maximum(forward, inputs - chunk)


def n_together(schedule: DualPipe | DualPipeV, t: Terms) -> Expr:
    """Pairs of a forward and a backward that run together on the ranks at the turn."""
    if isinstance(schedule, DualPipe):
        return t.n_micro - t.pp / 2 - 2
    return 2 * t.n_micro - t.pp - 2


def _up_to_turn(schedule: DualPipe | DualPipeV, t: Terms) -> tuple[Expr, Expr, Expr]:
    """Forward, backward and weights' seconds through one chunk of all ranks of an arm but one.

    An arm is half of DualPipe's ranks, of one whole stage each, or all of DualPipeV's, of
    chunks that are half of what a rank holds.
    """
    if isinstance(schedule, DualPipeV):
        return t.others_forward / 2, t.others_backward / 2, t.others_weight / 2
    return (
        (t.others_forward - t.forward) / 2,
        (t.others_backward - t.backward) / 2,
        (t.others_weight - t.weight) / 2,
    )


def bubble_published(schedule: Schedule, terms: Terms) -> Expr:
    """Idle seconds of a rank per step as the schedule's source states them.

    GPipe, 1F1B: Narayanan 2021, 2104.04473, 2.2.1; interleaved 2.2.2. Exact with equal ranks.
    Zero bubble: Qi 2023, 2401.10241, section 2.3, in our letters where B is the whole backward:
    ZB-H1 (p - 1)(F + B - 2W), ZB-H2 (p - 1)(F + B - 3W). ZB-H1's holds while W is at most
    F and at most B - W; where W is longer, more is idle. ZB-H2's is a rank's own time
    (`Simulation.seconds_longest_rank`) while it is neither negative nor below
    (p - 1)(B - W - F), and a step that waits for all ranks takes at least (p - 1) F more
    than the work. DualPipe: DeepSeek-V3, 2412.19437, table 2, (p / 2 - 1)(F&B + B - 3W);
    it is what a rank at the turn idles where F = B - W = W.
    """
    t = terms
    match schedule:
        case GPipe() | OneFOneB():
            return t.others_forward + t.others_backward
        case Interleaved(virtual=virtual):
            return (t.others_forward + t.others_backward) / virtual
        case ZeroBubble(ahead=ahead):
            return t.others_forward + t.others_backward - (ahead + 1) * t.others_weight
        case DualPipe() | DualPipeV():
            forward, backward, weight = _up_to_turn(schedule, t)
            arm = t.pp / 2 if isinstance(schedule, DualPipe) else t.pp
            return forward + 2 * backward - 3 * weight - (arm - 1) * t.hidden


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a rank holds at its peak, in micro-batches of the layers that it holds.

    `activations` are whole, as forward leaves them; of `for_weights` the inputs' gradient is
    done, and only what the weights' gradient needs is left.
    """

    activations: Expr
    for_weights: Expr


def in_flight_closed(schedule: Schedule, terms: Terms, rank: Expr | int) -> InFlight:
    """What rank `rank` holds at its peak.

    GPipe all. 1F1B what runs ahead (Narayanan 2021, 2104.04473, 2.2.1); interleaved as in
    Korthikanti 2022, 2205.05198, 4.2.3. Zero bubble: Qi 2023, 2401.10241, section 2.3. DualPipe
    pp + 1 of the single stages (DeepSeek-V3, 2412.19437, table 2), all ranks alike, and
    DualPipeV one half more than pp.

    >>> in_flight_closed(OneFOneB(), Terms(), 0).activations.text
    'min(n_micro_batches, pp)'
    """
    m, p, behind = terms.n_micro, terms.pp, terms.pp - rank
    match schedule:
        case GPipe():
            return InFlight(m, number(0))
        case OneFOneB():
            return InFlight(minimum(m, behind), number(0))
        case Interleaved(virtual=v):
            return InFlight(minimum(m * v, 2 * behind + (v - 1) * p - 1) / v, number(0))
        case ZeroBubble(ahead=ahead):
            return InFlight(ahead * (behind - 1) + 1, ahead * number(rank))
        case DualPipe():
            return InFlight(p + 1, number(0))
        case DualPipeV():
            return InFlight(p + number(1) / 2, number(0))

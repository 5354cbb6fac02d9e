"""Pipeline schedules: orders that can run, an exact simulation, and formulas that agree with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflop.count.memory_split import Shards
from isoflop.errors import InputError
from isoflop.plan.schedule import (
    DualPipe,
    DualPipeV,
    Durations,
    GPipe,
    Interleaved,
    OneFOneB,
    Schedule,
    Simulation,
    Terms,
    Together,
    Work,
    ZeroBubble,
    broken_rules,
    bubble_published,
    held,
    in_flight_closed,
    n_chunks,
    n_stages,
    orders,
    render,
    seconds_closed,
    simulate,
    works,
)
from isoflop.quantity import number
from isoflop.quantity.compile import compile_expressions
from isoflop.quantity.expr import Value

ONE_OF_EACH: list[Schedule] = [
    GPipe(), OneFOneB(), Interleaved(3), ZeroBubble(1), ZeroBubble(2), DualPipe(), DualPipeV(),
]  # fmt: skip
SECONDS = st.integers(1, 20)


def asked(*kinds: type[Schedule]) -> st.SearchStrategy[tuple[Schedule, int, int]]:
    """Schedules with ranks and micro-batches that they have an order for."""
    some = [s for s in [*ONE_OF_EACH, Interleaved(2)] if not kinds or isinstance(s, kinds)]
    return st.sampled_from(some).flatmap(
        lambda schedule: st.sampled_from(
            [(schedule, pp, m) for pp in range(1, 7) for m in range(1, 25)
             if not broken_rules(schedule, pp, m)]
        )
    )  # fmt: skip


def run(schedule: Schedule, pp: int, n_micro: int, *seconds: Value, **more: Value) -> Simulation:
    durations = Durations.equal(n_stages(schedule, pp), *seconds, **more)
    return simulate(orders(schedule, pp, n_micro), durations)


def terms(
    schedule: Schedule, pp: int, n_micro: int, f: int, b: int, w: int = 0, *, send: int = 0,
    hidden: int = 0,
) -> Terms:  # fmt: skip
    """Terms from seconds of one stage; a rank has as many stages as chunks, DualPipe's twice."""
    chunks = 1 if isinstance(schedule, DualPipe) else n_chunks(schedule)
    numbers = (n_micro, pp, chunks * f, chunks * b, chunks * w)
    m, p, forward, backward, weight = map(number, numbers)
    given = Terms(m, p, forward, backward, weight, send=number(send), hidden=number(hidden))
    return given.equal_ranks()


# --- orders ----------------------------------------------------------------------------------


@given(asked())
def test_every_stage_of_every_micro_batch_runs_forward_and_backward_once(
    case: tuple[Schedule, int, int],
) -> None:
    schedule, pp, n_micro = case
    done = Counter(work for order in orders(*case) for slot in order for work in works(slot))
    assert set(done.values()) == {1}
    everything = {(s, i) for s in range(n_stages(schedule, pp)) for i in range(n_micro)}
    by_kind = {
        kind: [(w.stage, w.micro_batch) for w in done if w.kind == kind]
        for kind in ("F", "B", "W", "BW")
    }
    assert sorted(by_kind["F"]) == sorted(everything)
    assert sorted(by_kind["B"] + by_kind["BW"]) == sorted(everything)
    assert sorted(by_kind["W"]) == sorted(by_kind["B"])


@given(asked(), st.tuples(SECONDS, SECONDS, SECONDS))
def test_no_work_starts_before_what_it_needs_is_done(
    case: tuple[Schedule, int, int], seconds: tuple[int, int, int]
) -> None:
    f, inputs, w = seconds
    step = run(*case, f, inputs + w, w, send=2)
    when = {
        (work.kind[0], work.stage, work.micro_batch): (span.start, span.end, rank)
        for rank, row in enumerate(step.spans)
        for span in row
        for work in works(span.slot)
    }
    last = n_stages(case[0], case[1]) - 1
    for (kind, stage, i), (start, _, rank) in when.items():
        before = {
            "F": [("F", stage - 1, i)] if stage else [],
            "B": [("F", stage, i)] + ([("B", stage + 1, i)] if stage < last else []),
            "W": [("B", stage, i)],
        }[kind]
        for end, by in (when[need][1:] for need in before):
            assert start >= end + (2 if by != rank else 0)


@given(asked(), st.tuples(SECONDS, SECONDS, SECONDS))
def test_a_rank_does_one_thing_at_a_time_and_is_busy_or_idle(
    case: tuple[Schedule, int, int], seconds: tuple[int, int, int]
) -> None:
    f, inputs, w = seconds
    step = run(*case, f, inputs + w, w)
    for rank, row in enumerate(step.spans):
        assert all(a.end <= b.start for a, b in pairwise(row))
        assert step.busy(rank) + step.idle(rank) == step.seconds
        assert step.busy(rank) == case[2] * (f + inputs + w) * (
            1 if isinstance(case[0], DualPipe) else n_chunks(case[0])
        )
        assert step.busy(rank) <= step.seconds_longest_rank <= step.seconds


def test_an_order_that_cannot_run_says_what_each_rank_waits_for() -> None:
    late = (Work("BW", 0, 0), Work("F", 0, 0))
    with pytest.raises(InputError) as failed:
        simulate([late, orders(OneFOneB(), 2, 1)[1]], Durations.equal(2, 1, 2))
    assert str(failed.value).splitlines() == [
        "orders: rank 0=BW of stage 0, micro-batch 0: must run after F of stage 0, "
        "micro-batch 0 (no rank reaches that: move it ahead, or add it)",
        "orders: rank 1=F of stage 1, micro-batch 0: must run after F of stage 0, "
        "micro-batch 0 (no rank reaches that: move it ahead, or add it)",
    ]


@pytest.mark.parametrize(
    ("schedule", "pp", "n_micro", "fields"),
    [
        (OneFOneB(), 0, 0, ["pp", "n_micro"]),
        (Interleaved(1), 1, 3, ["pp", "virtual"]),
        (Interleaved(2), 4, 6, ["n_micro"]),
        (ZeroBubble(2), 4, 6, ["n_micro"]),
        (DualPipe(), 3, 5, ["pp", "n_micro", "n_micro"]),
        (DualPipeV(), 4, 7, ["n_micro"]),
    ],
)
def test_a_schedule_without_an_order_names_every_rule_that_is_broken(
    schedule: Schedule, pp: int, n_micro: int, fields: list[str]
) -> None:
    with pytest.raises(InputError) as failed:
        orders(schedule, pp, n_micro)
    assert [problem.field for problem in failed.value.problems] == fields


@pytest.mark.parametrize(
    ("rows", "field"),
    [
        (((1, 1), (2,), (0, 0)), "seconds_backward"),
        (((1,), (-2,), (0,)), "seconds_backward"),
        (((1,), (2,), (3,)), "seconds_weight"),
        (((), (), ()), "seconds_forward"),
    ],
)
def test_durations_that_cannot_be_are_refused(
    rows: tuple[tuple[int, ...], ...], field: str
) -> None:
    with pytest.raises(InputError) as failed:
        Durations(*rows)
    assert field in [problem.field for problem in failed.value.problems]


def test_no_more_can_be_hidden_than_there_is() -> None:
    with pytest.raises(InputError, match="seconds_hidden"):
        Durations.equal(4, 1, 3, 1, hidden=-1)
    all_hidden = run(DualPipeV(), 2, 8, 1, 3, 1, hidden=1).seconds
    assert run(DualPipeV(), 2, 8, 1, 3, 1, hidden=2).seconds == all_hidden


# --- formulas against the simulation -----------------------------------------------------------


@given(asked(GPipe, OneFOneB), SECONDS, SECONDS, st.integers(0, 40))
def test_gpipe_and_1f1b_take_what_their_formulas_say_with_sends_of_any_length(
    case: tuple[Schedule, int, int], f: int, b: int, send: int
) -> None:
    expected = seconds_closed(case[0], terms(*case, f, b, send=send)).value
    assert run(*case, f, b, send=send).seconds == expected


@given(asked(Interleaved), SECONDS, SECONDS, st.integers(0, 20))
def test_interleaved_takes_what_its_formula_says_while_sends_are_short(
    case: tuple[Schedule, int, int], f: int, b: int, send: int
) -> None:
    took = run(*case, f, b, send=send).seconds
    expected = seconds_closed(case[0], terms(*case, f, b, send=send)).value
    assert took == expected if send <= min(f, b) else took >= expected


@given(asked(ZeroBubble), SECONDS, SECONDS, SECONDS)
def test_zero_bubble_takes_what_its_formula_says(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int
) -> None:
    expected = seconds_closed(case[0], terms(*case, f, inputs + w, w)).value
    assert run(*case, f, inputs + w, w).seconds == expected


@given(asked(ZeroBubble), SECONDS, SECONDS, SECONDS)
def test_zero_bubble_is_faster_than_1f1b_where_there_is_anything_to_put_off(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int
) -> None:
    _, pp, n_micro = case
    took = run(*case, f, inputs + w, w).seconds
    plain = run(OneFOneB(), pp, n_micro, f, inputs + w).seconds
    assert took < plain if pp > 1 else took == plain
    assert run(*case, f, inputs, 0).seconds <= run(OneFOneB(), pp, n_micro, f, inputs).seconds


@settings(max_examples=200)
@given(asked(ZeroBubble), SECONDS, SECONDS, SECONDS, st.integers(0, 60))
def test_zero_bubble_takes_what_its_formula_says_while_sends_are_short(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int, send: int
) -> None:
    schedule, pp, n_micro = case
    send = min(send, min(f, inputs, w) // (2 if schedule == ZeroBubble(1) else 1))
    took = run(*case, f, inputs + w, w, send=send).seconds
    expected = seconds_closed(schedule, terms(*case, f, inputs + w, w, send=send)).value
    if schedule == ZeroBubble(1) and n_micro == pp:
        assert expected - 2 * (pp - 1) * send <= took <= expected
    else:
        assert took == expected


@settings(max_examples=300)
@given(asked(DualPipe, DualPipeV), SECONDS, SECONDS, SECONDS, st.integers(0, 20))
def test_dualpipe_takes_what_its_formula_says_whatever_a_pair_hides(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int, hidden: int
) -> None:
    hidden = min(hidden, f, inputs + w)
    expected = seconds_closed(case[0], terms(*case, f, inputs + w, w, hidden=hidden)).value
    assert run(*case, f, inputs + w, w, hidden=hidden).seconds == expected
    assert run(*case, f, inputs + w, w, hidden=hidden, send=1).seconds >= expected


# --- the bubbles of the papers -----------------------------------------------------------------


@given(asked(GPipe, OneFOneB, Interleaved), SECONDS, SECONDS)
def test_published_bubbles_without_split_backward_hold_always(
    case: tuple[Schedule, int, int], f: int, b: int
) -> None:
    step = run(*case, f, b)
    assert step.idle(0) == bubble_published(case[0], terms(*case, f, b)).value


@given(asked(ZeroBubble), SECONDS, SECONDS, SECONDS)
def test_published_zero_bubbles_hold_where_weights_gradients_are_short_enough(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int
) -> None:
    schedule, pp, _ = case
    step = run(*case, f, inputs + w, w)
    published = bubble_published(schedule, terms(*case, f, inputs + w, w)).value
    if schedule == ZeroBubble(1):
        assert (step.idle(0) == published) == (pp == 1 or w <= min(f, inputs))
    else:
        least = (pp - 1) * max(0, inputs - f)
        assert step.seconds_longest_rank - step.busy(0) == max(published, least)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_zb_h2_has_no_bubble_of_its_own_where_all_three_take_equally_long(pp: int) -> None:
    step = run(ZeroBubble(2), pp, 2 * pp, 1, 2, 1)
    assert step.seconds_longest_rank == step.busy(0)
    assert step.seconds - step.busy(0) == pp - 1  # the last rank starts, and ends, that late


@given(asked(DualPipe, DualPipeV), SECONDS, st.integers(0, 20))
def test_dualpipes_published_bubble_is_what_ranks_at_the_turn_idle(
    case: tuple[Schedule, int, int], f: int, hidden: int
) -> None:
    schedule, pp, _ = case
    turn = pp // 2 - 1 if isinstance(schedule, DualPipe) else pp - 1
    hidden = min(hidden, f)
    step = run(*case, f, 2 * f, f, hidden=hidden)
    published = bubble_published(schedule, terms(*case, f, 2 * f, f, hidden=hidden)).value
    assert step.idle(turn) == published


def test_dualpipes_published_bubble_is_too_small_where_forwards_are_long() -> None:
    step = run(DualPipe(), 8, 20, 3, 4, 2)
    assert (
        step.idle(3) == 18 > bubble_published(DualPipe(), terms(DualPipe(), 8, 20, 3, 4, 2)).value
    )


# --- unequal stages ------------------------------------------------------------------------------


@st.composite
def unequal(draw: st.DrawFn) -> tuple[int, int, list[int], int]:
    pp = draw(st.integers(1, 6))
    forward = draw(st.lists(SECONDS, min_size=pp, max_size=pp))
    return pp, draw(st.integers(1, 16)), forward, draw(st.integers(1, 3))


def of_slowest(n_micro: int, forward: list[int], ratio: int) -> Terms:
    slow, rest = max(forward), sum(forward) - max(forward)
    zero = number(0)
    return Terms(
        number(n_micro), number(len(forward)), number(slow), number(ratio * slow), zero,
        number(rest), number(ratio * rest), zero, zero, zero,
    )  # fmt: skip


@settings(max_examples=300)
@given(unequal())
def test_unequal_ranks_take_at_most_the_formula_of_slowest_and_others(
    case: tuple[int, int, list[int], int],
) -> None:
    pp, n_micro, forward, ratio = case
    given = of_slowest(n_micro, forward, ratio)
    durations = Durations(forward, [ratio * f for f in forward], [0] * pp)
    gpipe = simulate(orders(GPipe(), pp, n_micro), durations)
    assert gpipe.seconds == seconds_closed(GPipe(), given).value
    took = simulate(orders(OneFOneB(), pp, n_micro), durations).seconds
    # The first micro-batch must come to a rank, and the last go back from it to the first.
    least = max((1 + ratio) * (sum(forward[:rank]) + n_micro * forward[rank]) for rank in range(pp))
    assert least <= took <= seconds_closed(OneFOneB(), given).value


@given(unequal())
def test_1f1b_takes_exactly_the_formula_where_the_last_rank_is_slowest(
    case: tuple[int, int, list[int], int],
) -> None:
    pp, n_micro, forward, ratio = case
    forward = sorted(forward)  # as where the head makes the last stage long
    durations = Durations(forward, [ratio * f for f in forward], [0] * pp)
    took = simulate(orders(OneFOneB(), pp, n_micro), durations).seconds
    assert took == seconds_closed(OneFOneB(), of_slowest(n_micro, forward, ratio)).value


@given(asked(), st.data())
def test_no_step_of_unequal_stages_is_slower_than_one_of_the_slowest(
    case: tuple[Schedule, int, int], data: st.DataObject
) -> None:
    schedule, pp, _ = case
    n = n_stages(schedule, pp)
    rows = [data.draw(st.lists(SECONDS, min_size=n, max_size=n)) for _ in range(3)]
    backward = [inputs + w for inputs, w in zip(rows[1], rows[2], strict=True)]
    step = simulate(orders(*case), Durations(rows[0], backward, rows[2]))
    f, inputs, w = (max(row) for row in rows)
    assert max(step.busy(rank) for rank in range(pp)) <= step.seconds
    assert step.seconds <= run(*case, f, inputs + w, w).seconds


# --- more properties -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ONE_OF_EACH)
def test_more_micro_batches_never_raise_the_bubble(schedule: Schedule) -> None:
    shares = [run(schedule, 4, m, 2, 5, 2).bubble for m in range(1, 33)
              if not broken_rules(schedule, 4, m)]  # fmt: skip
    assert len(shares) > 5
    assert shares == sorted(shares, reverse=True)


@given(asked(GPipe, OneFOneB, ZeroBubble, DualPipeV), SECONDS, SECONDS, SECONDS)
def test_one_rank_alone_never_waits(
    case: tuple[Schedule, int, int], f: int, inputs: int, w: int
) -> None:
    schedule, _, n_micro = case
    n_micro += 1  # what DualPipeV needs of one rank
    step = run(schedule, 1, n_micro, f, inputs + w, w, send=7)
    assert step.bubble == 0
    given = terms(schedule, 1, n_micro, f, inputs + w, w, send=7)
    assert seconds_closed(schedule, given).value == step.seconds


@given(asked(), SECONDS, st.integers(0, 9))
def test_sends_that_hold_their_rank_never_help(
    case: tuple[Schedule, int, int], f: int, send: int
) -> None:
    durations = Durations.equal(n_stages(case[0], case[1]), f, 2 * f, f, send=send)
    step = simulate(orders(*case), durations)
    holding = simulate(orders(*case), replace(durations, sends_hold=True))
    assert step.seconds <= holding.seconds
    # Every stage but the last sends forward, every one but the first backward; what the turn
    # of a V hands on stays where it is.
    hops = n_stages(case[0], case[1]) - 1 - isinstance(case[0], DualPipeV)
    busy = [sum(s.busy(rank) for rank in range(case[1])) for s in (step, holding)]
    assert busy[1] - busy[0] == 2 * hops * case[2] * send


def test_times_stay_exact_where_they_are_given_so() -> None:
    third = Fraction(1, 3)
    step = run(OneFOneB(), 3, 5, third, 2 * third)
    assert step.seconds == 7
    assert step.bubble == Fraction(2, 7)


def test_the_formulas_compile_to_what_they_evaluate_to() -> None:
    values = {
        "n_micro_batches": 64, "pp": 8, "seconds_forward": 1.5, "seconds_backward": 3.5,
        "seconds_weight": 1.25, "seconds_send": 0.125, "seconds_hidden": 0.25,
    }  # fmt: skip
    formulas = [seconds_closed(schedule, Terms().equal_ranks()) for schedule in ONE_OF_EACH]
    compiled = compile_expressions(formulas, list(values))(*values.values())
    assert list(compiled) == pytest.approx([f.evaluate(values) for f in formulas], rel=1e-12)


# --- what is held ----------------------------------------------------------------------------------


@given(asked(), st.data())
def test_a_rank_holds_at_its_peak_what_the_formula_says(
    case: tuple[Schedule, int, int], data: st.DataObject
) -> None:
    schedule, pp, n_micro = case
    rank = data.draw(st.integers(0, pp - 1))
    n = n_stages(schedule, pp)
    per_chunk = Fraction(1, 1 if isinstance(schedule, DualPipe) else n_chunks(schedule))
    peak = in_flight_closed(schedule, terms(schedule, pp, n_micro, 1, 1), rank)
    order = orders(*case)[rank]
    for kept in (Fraction(0), Fraction(1, 2), Fraction(1)):  # of activations, for W alone
        levels = held(order, [per_chunk] * n, [per_chunk * kept] * n)
        assert max(levels) == peak.activations.value + kept * peak.for_weights.value


@given(asked(OneFOneB, Interleaved), st.data())
def test_what_1f1b_holds_is_what_the_memory_of_a_rank_counts(
    case: tuple[Schedule, int, int], data: st.DataObject
) -> None:
    schedule, pp, n_micro = case
    stage = data.draw(st.integers(0, pp - 1))
    virtual = n_chunks(schedule)
    counted = Shards(pp=pp, virtual=virtual).in_flight(stage, n_micro).value
    ones, nothing = [1] * pp * virtual, [0] * pp * virtual
    assert max(held(orders(*case)[stage], ones, nothing)) == counted * virtual


@given(asked())
def test_nothing_is_held_when_the_step_is_over(case: tuple[Schedule, int, int]) -> None:
    n = n_stages(case[0], case[1])
    for order in orders(*case):
        *_, last = held(order, [3] * n, [1] * n)
        assert last == (1 if order[-1].kind == "W" else 3)


# --- the picture -----------------------------------------------------------------------------------


def test_the_picture_shows_who_does_what_when() -> None:
    step = run(DualPipe(), 2, 4, 1, 2, 1)
    first, second, legend = render(step, 6 * step.seconds).splitlines()
    assert first.startswith("rank  0 |F0----f2----F1----b2==========f3B0")
    assert second.startswith("rank  1 |F2----f0----F3----b0==========f1B2")
    assert any(isinstance(span.slot, Together) for span in step.spans[0])
    assert "idle blank" in legend


@given(asked(), SECONDS, SECONDS)
def test_every_row_of_the_picture_is_equally_wide(
    case: tuple[Schedule, int, int], f: int, b: int
) -> None:
    *rows, _ = render(run(*case, f, f + b, b), 90).splitlines()
    assert {row.rindex("|") for row in rows} == {len("rank  0 |") + 90}


def test_a_picture_of_too_many_ranks_is_refused() -> None:
    with pytest.raises(InputError, match="ranks=17"):
        render(run(OneFOneB(), 17, 1, 1, 2))

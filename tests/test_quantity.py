"""Expressions evaluate exactly, print what they compute, and compile to the same numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import InputError, UnknownName
from isoflop.quantity import (
    Basis,
    Expr,
    Interval,
    Symbol,
    alias,
    branch,
    ceil_div,
    expm1,
    leaf,
    maximum,
    minimum,
    number,
    sqrt,
    where,
)
from isoflop.quantity.compile import compile_expressions
from isoflop.quantity.expr import FUNCTIONS
from isoflop.quantity.units import (
    format_bytes,
    format_seconds,
    parse_bytes,
    parse_count,
    parse_seconds,
    parse_whole,
)

NAMES = {"a": 7, "b": 3, "c": 12}
ATOMS = st.one_of(
    st.sampled_from([Symbol(n, v) for n, v in NAMES.items()]), st.integers(-20, 20).map(number)
)


def combine(below: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    positive = st.integers(1, 9).map(number)
    return st.one_of(
        st.tuples(below, below).map(lambda p: p[0] + p[1]),
        st.tuples(below, below).map(lambda p: p[0] - p[1]),
        st.tuples(below, below).map(lambda p: p[0] * p[1]),
        st.tuples(below, positive).map(lambda p: p[0] / p[1]),
        st.tuples(below, positive).map(lambda p: ceil_div(p[0], p[1])),
        st.tuples(below, below).map(lambda p: maximum(*p)),
        st.tuples(below, below).map(lambda p: minimum(*p)),
        st.tuples(below, below, below).map(lambda p: where(*p)),
    )


EXPRESSIONS = st.recursive(ATOMS, combine, max_leaves=12)


def read_back(text: str) -> Fraction:
    """Python's own reading of a printed formula, in exact arithmetic."""
    exact = {name: Fraction(value) for name, value in NAMES.items()}
    return Fraction(eval(text, {**FUNCTIONS, **exact}))


@given(EXPRESSIONS)
def test_a_printed_formula_computes_the_value(expr: Expr) -> None:
    if "/" not in expr.text:  # Python divides integers to floats; names are fractions below
        assert read_back(expr.digits) == expr.value
    assert float(read_back(expr.text)) == pytest.approx(float(expr.value), rel=1e-12, abs=1e-12)


@given(EXPRESSIONS, st.integers(1, 50))
def test_a_compiled_expression_equals_the_exact_one(expr: Expr, a: int) -> None:
    compiled = compile_expressions([expr], ["a"])(a)[0]
    assert float(compiled) == pytest.approx(float(expr.evaluate({"a": a})), rel=1e-12, abs=1e-9)


@given(EXPRESSIONS, st.integers(1, 50))
def test_roots_and_exponentials_print_and_compile_like_the_rest(expr: Expr, a: int) -> None:
    size = sqrt(expr * expr + 1) + expm1(-1 / (1 + expr * expr))
    expected = math.sqrt(float(expr.value) ** 2 + 1) + math.exp(-1 / (1 + float(expr.value) ** 2))
    assert float(size.value) == pytest.approx(expected - 1, rel=1e-9)
    names = {name: float(value) for name, value in NAMES.items()}
    assert eval(size.text, dict(FUNCTIONS), names) == pytest.approx(float(size.value), rel=1e-9)
    compiled = compile_expressions([size], ["a"])(float(a))[0]
    assert compiled == pytest.approx(float(size.evaluate({"a": a})), rel=1e-9)


def test_the_probability_below_a_limit_counts_the_draws_of_the_interval() -> None:
    rate = Symbol("rate", 2.0, Basis.ASSUMED, Interval(1.0, 4.0))
    span = rate.interval()
    assert span is not None
    assert rate.probability_below(span.low) == pytest.approx(0.05, abs=0.005)
    assert rate.probability_below(span.high) == pytest.approx(0.95, abs=0.005)
    assert number(3).probability_below(3) == 1
    assert number(3).probability_below(2.9) == 0


def test_equal_parts_are_computed_once_and_constant_ones_not_at_all() -> None:
    calls = []

    def counted(*args: int) -> int:
        calls.append(args)
        return max(args)

    a, b = Symbol("a"), Symbol("b", 4)
    tree = [maximum(a, 3) * 2 + maximum(a, 3), maximum(a, 3), maximum(b, 9) * a]
    run = compile_expressions(tree, ["a"], {**FUNCTIONS, "max": counted})
    assert calls == []
    assert run(5) == (15, 5, 45)
    assert calls == [(5, 3)]


def test_a_very_deep_expression_compiles() -> None:
    deep: Expr = Symbol("a")
    for _ in range(80):
        deep = minimum(deep + 1, 10**6)
    assert compile_expressions([deep], ["a"])(1) == (81,)


def test_a_free_symbol_has_no_value() -> None:
    with pytest.raises(KeyError, match="tokens"):
        _ = Symbol("tokens").value


def test_shared_uncertainty_cancels_and_independent_uncertainty_widens() -> None:
    x = Symbol("x", 10.0, Basis.ASSUMED, Interval(5, 20))
    y = Symbol("y", 10.0, Basis.ASSUMED, Interval(5, 20))
    assert (x / x).interval() == Interval(1, 1)
    single, double = x.interval(), (x * y).interval()
    assert single is not None
    assert double is not None
    assert double.high / double.low > single.high / single.low


def test_a_sampled_interval_meets_the_symbols_own_ends() -> None:
    interval = Symbol("mfu", 0.4, Basis.ASSUMED, Interval(0.3, 0.5)).interval()
    assert interval is not None
    assert interval.low == pytest.approx(0.3, rel=0.03)
    assert interval.high == pytest.approx(0.5, rel=0.03)


def test_a_tree_adds_up_and_names_what_is_there() -> None:
    n = Symbol("n_layers", 3)
    tree = branch(
        "root",
        "params",
        [branch("layer", "params", [leaf("up", "params", 4)], times=n), leaf("x", "params", 1)],
    )
    assert tree.value == 3 * 4 + 1
    assert tree.copies("layer/up") == 3
    assert tree.find("layer").value == 12
    with pytest.raises(UnknownName, match="did you mean up"):
        tree.find("layer/upp")


def test_weak_kinds_of_truth_are_carried_upwards() -> None:
    price = Symbol("price", 2.0, Basis.ASSUMED)
    tree = branch("cost", "dollars", [leaf("rent", "dollars", price * 3)])
    assert tree.bases == {Basis.ASSUMED}
    assert [s.name for s in tree.assumptions] == ["price"]


@pytest.mark.parametrize(
    "text", ["", "x", "1e400", "9" * 70, "-3", "0", "1.5", "3 apples", "1" + "0" * 5000]
)
def test_a_bad_count_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError, match="300"):
        parse_count(text, "--tokens")


def test_sizes_are_read_as_people_write_them() -> None:
    assert parse_count("15T") == 15 * 10**12
    assert parse_count("0.5B") == 5 * 10**8
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_seconds("30 min") == 1800
    assert format_bytes(1e9) == "1 GB"
    assert format_seconds(90) == "90 s"


def test_an_alias_is_written_by_its_name_and_is_what_it_stands_for() -> None:
    rate = Symbol("rate", 2.0, Basis.ASSUMED, Interval(1.0, 4.0))
    plain = 12 / rate
    named = alias("hours", plain)
    whole = (3 * named + 1) / rate
    assert whole.text == "(3 * hours + 1) / rate"
    assert whole.value == ((3 * plain + 1) / rate).value
    assert whole.interval() == ((3 * plain + 1) / rate).interval()
    assert set(whole.symbols()) == {"hours", "rate"}
    assert whole.evaluate({"rate": 4.0}) == (3 * 3 + 1) / 4
    names = {name: symbol.value for name, symbol in whole.symbols().items()}
    assert eval(whole.text, {}, names) == whole.value


def test_a_whole_number_that_is_none_is_told_that_nought_is_one():
    with pytest.raises(InputError, match="from 0"):
        parse_whole("-1")

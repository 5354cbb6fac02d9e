"""Sizes as a small expression tree: evaluated exactly, rendered, or compiled.

The tree knows +, -, *, /, ceil-div, max, min, where, sqrt and expm1. Structure branches in
Python; only sizes are expressions. A formula is written once, and everything
else (the value, the text that `explain` prints, the array code of a search) is
read off the same object.

>>> D, N, H = Symbol("d_model", 4096), Symbol("n_heads", 32), Symbol("d_head", 128)
>>> q = D * N * H
>>> q.value, q.text, q.digits
(16777216, 'd_model * n_heads * d_head', '4096 * 32 * 128')
>>> q.evaluate({"n_heads": 8})
4194304
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from typing import TypeAlias

from isoflop.quantity.basis import Basis, Interval
from isoflop.quantity.draws import draws, middle_90

Value: TypeAlias = int | Fraction | float
Bindings: TypeAlias = Mapping[str, Value]


class Expr:
    """A size. Build it from `Symbol` and `number` with + - * / and the functions below."""

    __slots__ = ()

    def evaluate(self, bindings: Bindings | None = None) -> Value:
        """The exact value; `bindings` override the symbols' own values by name."""
        raise NotImplementedError(type(self).__name__)

    def render(self, rank: int, numbers: bool) -> str:
        """Text of this expression inside an operator of precedence `rank`."""
        raise NotImplementedError(type(self).__name__)

    def parts(self) -> tuple[Expr, ...]:
        """The expressions this one is made of."""
        return ()

    @property
    def value(self) -> Value:
        return self.evaluate()

    @property
    def text(self) -> str:
        """The formula in names; Python reads it back with `FUNCTIONS`."""
        return self.render(0, numbers=False)

    @property
    def digits(self) -> str:
        """The formula with the numbers put in."""
        return self.render(0, numbers=True)

    def symbols(self) -> dict[str, Symbol]:
        """Every symbol below, by name, in order of appearance."""
        found: dict[str, Symbol] = {}
        for atom in _atoms(self):
            symbol = atom.symbol if isinstance(atom, Alias) else atom
            if isinstance(symbol, Symbol):
                found.setdefault(symbol.name, symbol)
        return found

    def interval(self) -> Interval | None:
        """The 90 % range that the uncertain symbols below give; None when all are certain.

        An uncertain symbol is drawn from a stream seeded by its own name, so all
        expressions that share it share its draws, and errors stay correlated.

        >>> rate = Symbol("rate", 2.0, Basis.ASSUMED, Interval(1.0, 4.0))
        >>> (rate / rate).interval() == Interval(1.0, 1.0)
        True
        """
        values = self.draws_sorted()
        if not values:
            return None
        return middle_90(values)

    def draws_sorted(self) -> list[float]:
        """The values behind `interval`, ascending; none where every symbol is certain."""
        from isoflop.quantity.compile import compile_expressions  # it reads this module

        uncertain = [s for s in self.symbols().values() if s.spread is not None]
        if not uncertain:
            return []
        run = compile_expressions([self], [s.name for s in uncertain])
        rows = zip(*(s.draws() for s in uncertain), strict=True)
        return sorted(float(run(*row)[0]) for row in rows)

    def probability_below(self, limit: float) -> float:
        """The probability that the value is at most `limit`, to within a few hundredths.

        >>> rate = Symbol("rate", 2.0, Basis.ASSUMED, Interval(1.0, 4.0))
        >>> 0.4 < (3 * rate).probability_below(6.0) < 0.6, rate.probability_below(100)
        (True, 1.0)
        """
        values = self.draws_sorted() or [float(self.value)]
        return sum(v <= limit for v in values) / len(values)

    def __add__(self, other: Expr | Value) -> Expr:
        return total((self, other))

    def __radd__(self, other: Expr | Value) -> Expr:
        return total((other, self))

    def __sub__(self, other: Expr | Value) -> Expr:
        return total((self, product((-1, other))))

    def __rsub__(self, other: Expr | Value) -> Expr:
        return total((other, product((-1, self))))

    def __mul__(self, other: Expr | Value) -> Expr:
        return product((self, other))

    def __rmul__(self, other: Expr | Value) -> Expr:
        return product((other, self))

    def __truediv__(self, other: Expr | Value) -> Expr:
        return _quotient(self, number(other))

    def __rtruediv__(self, other: Expr | Value) -> Expr:
        return _quotient(number(other), self)


@dataclass(frozen=True, slots=True)
class Number(Expr):
    """A literal."""

    literal: Value

    def evaluate(self, bindings: Bindings | None = None) -> Value:
        return self.literal

    def render(self, rank: int, numbers: bool) -> str:
        return _render_literal(self.literal, rank)


@dataclass(frozen=True, slots=True)
class Symbol(Expr):
    """A named size, with what is known about it.

    `given` None means free: evaluating needs a binding. `spread` marks an uncertain
    constant. One name means one thing in one tree.
    """

    name: str
    given: Value | None = None
    basis: Basis = Basis.EXACT
    spread: Interval | None = None
    source: str = field(default="", compare=False)
    meaning: str = field(default="", compare=False)

    def evaluate(self, bindings: Bindings | None = None) -> Value:
        if bindings is not None and self.name in bindings:
            return bindings[self.name]
        if self.given is None:
            raise KeyError(f"the size {self.name!r} has no value here")
        return self.given

    def render(self, rank: int, numbers: bool) -> str:
        if numbers and self.given is not None:
            return _render_literal(self.given, rank)
        return self.name

    def draws(self) -> tuple[float, ...]:
        """`DRAWS` values from the symbol's spread, the same ones in every process."""
        if self.spread is None or self.given is None:
            raise ValueError(f"the size {self.name!r} has no spread to draw from")
        return draws(self.name, float(self.given), self.spread)


@dataclass(frozen=True, slots=True)
class Alias(Expr):
    """An expression that is written by its name; its value and its range are its own.

    >>> rate = Symbol("rate", 2.0, Basis.ASSUMED, Interval(1.0, 4.0))
    >>> hours = alias("hours", 12 / rate)
    >>> (3 * hours).text, (3 * hours).value, (3 * hours).interval() == (36 / rate).interval()
    ('3 * hours', 18.0, True)
    """

    symbol: Symbol
    of: Expr

    def evaluate(self, bindings: Bindings | None = None) -> Value:
        return self.of.evaluate(bindings) if bindings else self.symbol.evaluate()

    def parts(self) -> tuple[Expr, ...]:
        return (self.of,)

    def render(self, rank: int, numbers: bool) -> str:
        return self.symbol.render(rank, numbers)


@dataclass(frozen=True, slots=True)
class Operation(Expr):
    """One operator over expressions; `kind` is a key of `OPERATORS`."""

    kind: str
    args: tuple[Expr, ...]

    def evaluate(self, bindings: Bindings | None = None) -> Value:
        return OPERATORS[self.kind](*(a.evaluate(bindings) for a in self.args))

    def parts(self) -> tuple[Expr, ...]:
        return self.args

    def render(self, rank: int, numbers: bool) -> str:
        if self.kind not in INFIX:
            inside = ", ".join(a.render(0, numbers) for a in self.args)
            return f"{self.kind}({inside})"
        own = INFIX[self.kind]
        first, *rest = self.args
        text = first.render(own, numbers)
        for arg in rest:
            text += _render_next(self.kind, arg, own, numbers)
        return f"({text})" if own < rank else text


def _render_next(kind: str, arg: Expr, own: int, numbers: bool) -> str:
    negative = isinstance(arg, Operation) and arg.kind == "*" and arg.args[0] == Number(-1)
    if kind == "+" and negative:
        return f" - {product(arg.parts()[1:]).render(own + 1, numbers)}"
    return f" {kind} {arg.render(own + 1 if kind in '*/' else own, numbers)}"


def _render_literal(value: Value, rank: int) -> str:
    if isinstance(value, Fraction):
        text = f"{value.numerator} / {value.denominator}"
        return f"({text})" if rank > INFIX["+"] else text
    return f"({value})" if value < 0 and rank else f"{value}"


def _atoms(expr: Expr) -> Iterator[Expr]:
    """Symbols, aliases and numbers; a part that several others share is entered once."""
    stack, seen = [expr], set[int]()
    while stack:
        top = stack.pop()
        if id(top) in seen:
            continue
        seen.add(id(top))
        below = top.parts()
        if not below or isinstance(top, Alias):
            yield top
        stack.extend(reversed(below))


def _divide(a: Value, b: Value) -> Value:
    """Exact where both sides are: 6 / 3 is the integer 2, 1 / 3 a Fraction."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    ratio = Fraction(a) / Fraction(b)
    return ratio.numerator if ratio.denominator == 1 else ratio


def _ceil_div(a: Value, b: Value) -> Value:
    return -(-a // b)


def _add(*terms: Value) -> Value:
    return sum(terms)


def _multiply(*factors: Value) -> Value:
    return reduce(lambda a, b: a * b, factors)


def _where(test: Value, positive: Value, otherwise: Value) -> Value:
    return positive if test > 0 else otherwise


#: What each operator does to exact values.
OPERATORS: dict[str, Callable[..., Value]] = {
    "+": _add,
    "*": _multiply,
    "/": _divide,
    "ceil_div": _ceil_div,
    "max": lambda *a: max(a),
    "min": lambda *a: min(a),
    "where": _where,
    "sqrt": math.sqrt,
    "expm1": math.expm1,
}

#: Infix operators, by how tightly they bind.
INFIX = {"+": 1, "*": 2, "/": 2}

#: Names that a rendered formula may call when Python reads it back.
FUNCTIONS: dict[str, Callable[..., Value]] = {
    name: OPERATORS[name] for name in OPERATORS if name not in INFIX
}


def number(value: Expr | Value) -> Expr:
    """The value as an expression."""
    return value if isinstance(value, Expr) else Number(value)


def alias(name: str, of: Expr, meaning: str = "") -> Alias:
    """An expression under a name, for formulas that are built on it."""
    return Alias(Symbol(name, of.value, Basis.MODELLED, meaning=meaning), of)


def total(terms: Iterable[Expr | Value]) -> Expr:
    """The sum, flattened, zeros left out.

    >>> total([Symbol("a"), 0, Symbol("b")]).text
    'a + b'
    """
    return _flatten("+", terms, unit=0)


def product(factors: Iterable[Expr | Value]) -> Expr:
    """The product, flattened, ones left out, zero if a factor is the literal zero."""
    flat = [number(f) for f in factors]
    if any(_is(f, 0) for f in flat):
        return Number(0)
    return _flatten("*", flat, unit=1)


def _flatten(kind: str, args: Iterable[Expr | Value], unit: int) -> Expr:
    flat: list[Expr] = []  # types are asked for, not equality: a search builds 10^5 of these
    for arg in map(number, args):
        if isinstance(arg, Operation) and arg.kind == kind:
            flat.extend(arg.args)
        elif not _is(arg, unit):
            flat.append(arg)
    if not flat:
        return Number(unit)
    return flat[0] if len(flat) == 1 else Operation(kind, tuple(flat))


def _quotient(a: Expr, b: Expr) -> Expr:
    return a if _is(b, 1) else Operation("/", (a, b))


def _is(expr: Expr, literal: int) -> bool:
    return isinstance(expr, Number) and expr.literal == literal


def ceil_div(a: Expr | Value, b: Expr | Value) -> Expr:
    """a / b rounded up.

    >>> ceil_div(Symbol("tokens", 10), 4).value
    3
    """
    return Operation("ceil_div", (number(a), number(b)))


def maximum(*args: Expr | Value) -> Expr:
    return Operation("max", tuple(map(number, args)))


def minimum(*args: Expr | Value) -> Expr:
    """The smallest.

    >>> minimum(Symbol("context", 8192), Symbol("window", 4096)).digits
    'min(8192, 4096)'
    """
    return Operation("min", tuple(map(number, args)))


def where(test: Expr | Value, positive: Expr | Value, otherwise: Expr | Value) -> Expr:
    """`positive` where `test` > 0, else `otherwise`."""
    return Operation("where", (number(test), number(positive), number(otherwise)))


def sqrt(value: Expr | Value) -> Expr:
    """The square root, in floating point.

    >>> sqrt(Symbol("area", 16)).value
    4.0
    """
    return Operation("sqrt", (number(value),))


def expm1(value: Expr | Value) -> Expr:
    """e to the power of `value`, less 1: exact where `value` is small, as a probability is.

    >>> expm1(Symbol("rate", 1e-20)).value
    1e-20
    """
    return Operation("expm1", (number(value),))

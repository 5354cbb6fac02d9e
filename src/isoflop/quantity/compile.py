"""Expressions as one Python function: of numbers, or of arrays for many layouts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

from isoflop.quantity.expr import FUNCTIONS, INFIX, OPERATORS, Alias, Expr, Operation, Symbol, Value

#: Operators whose constant arguments may be taken together.
COMMUTATIVE = frozenset({"+", "*", "max", "min"})

#: Nested deeper than this, an expression gets a name, for parsers have a limit.
DEEPEST = 40


def compile_expressions(
    expressions: Sequence[Expr],
    over: Sequence[str],
    functions: Mapping[str, Callable[..., Any]] = FUNCTIONS,
) -> Callable[..., tuple[Any, ...]]:
    """One Python function of the sizes named in `over`; other symbols are put in as numbers.

    Equal subexpressions are computed once, constant ones not at all. With exact arguments
    its results equal `evaluate`, except that / is Python's own. With numpy arrays, and
    `functions` that take arrays, it evaluates many layouts at once.

    >>> a, b = Symbol("a", 2), Symbol("b", 5)
    >>> compile_expressions([a * b, a + b], over=["a"])(3)
    (15, 8)
    """
    writer = _Writer(frozenset(over))
    results = [writer.enter(e) for e in expressions]
    body = [*writer.lines(), f"return ({''.join(f'{writer.text[n]}, ' for n in results)})"]
    source = f"def compiled({', '.join(over)}):\n " + "\n ".join(body)
    names = dict(functions)
    exec(source, names)  # noqa: S102 - our own text
    return cast("Callable[..., tuple[Any, ...]]", names["compiled"])


class _Writer:
    """Python source of expressions, each distinct one numbered once, parts before wholes."""

    def __init__(self, free: frozenset[str]) -> None:
        self.free = free
        self.text: list[str] = []
        self.constant: list[Value | None] = []
        self._shape: list[tuple[str, tuple[int, ...]]] = []
        self._uses: list[int] = []
        self._numbers: dict[Any, int] = {}
        self._seen: dict[int, int] = {}

    def enter(self, expr: Expr) -> int:
        """The number of an expression that somebody reads."""
        if id(expr) not in self._seen:
            self._seen[id(expr)] = self._enter(expr)
        found = self._seen[id(expr)]
        self._uses[found] += 1
        return found

    def _enter(self, expr: Expr) -> int:
        if isinstance(expr, Symbol) and expr.name in self.free:
            return self._add((expr.name,), expr.name)
        if isinstance(expr, Alias):
            return self._enter(expr.of)
        if not isinstance(expr, Operation):
            return self._literal(expr.value)
        below = [self.enter(part) for part in expr.args]
        known = [n for n in below if self.constant[n] is not None]
        operate = OPERATORS[expr.kind]
        if len(known) == len(below):
            return self._literal(operate(*(self.constant[n] for n in below)))
        if expr.kind in COMMUTATIVE and len(known) > 1:
            folded = self._literal(operate(*(self.constant[n] for n in known)))
            self._uses[folded] += 1
            below = [folded, *(n for n in below if self.constant[n] is None)]
        return self._add((expr.kind, *below), "", (expr.kind, tuple(below)))

    def _literal(self, value: Value) -> int:
        text = f"{value}" if isinstance(value, Fraction) else f"{value!r}"
        return self._add((type(value), value), f"({text})", constant=value)

    def _add(
        self,
        key: tuple[Any, ...],
        text: str,
        shape: tuple[str, tuple[int, ...]] = ("", ()),
        constant: Value | None = None,
    ) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.text)
            self.text.append(text)
            self.constant.append(constant)
            self._shape.append(shape)
            self._uses.append(0)
        return self._numbers[key]

    def lines(self) -> Iterator[str]:
        """An assignment for each expression with several readers; the others go in place."""
        depth = [0] * len(self.text)
        for n, (kind, below) in enumerate(self._shape):
            if not kind:
                continue
            args = [self.text[b] for b in below]
            body = f" {kind} ".join(args) if kind in INFIX else f"{kind}({', '.join(args)})"
            depth[n] = 1 + max(depth[b] for b in below)
            self.text[n] = f"({body})" if kind in INFIX else body
            if self._uses[n] > 1 or depth[n] > DEEPEST:
                yield f"t{n} = {body}"
                self.text[n], depth[n] = f"t{n}", 0

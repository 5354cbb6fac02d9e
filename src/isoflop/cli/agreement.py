"""What `isoflop check` says of derived and built numbers: of one model, or of the zoo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from textwrap import fill
from typing import TYPE_CHECKING, Any

from isoflop.arch import Arch, zoo
from isoflop.cli.output import emit, say
from isoflop.cli.progress import bar
from isoflop.errors import Infeasible
from isoflop.quantity.units import format_exact
from isoflop.report.text import table

if TYPE_CHECKING:
    from isoflop.check.row import Row
    from isoflop.check.zoo import Agreement

HEADER = ["", "derived", "built", ""]
MORE = "--all shows every number"
REASON = " " * 6


def render_rows(arch: Arch, rows: Sequence[Row], *, every: bool) -> str:
    """The sums, what disagrees, and why what differs may; or every number."""
    wrong = [row for row in rows if not row.agrees]
    head = (
        f"{arch.name}: {len(rows)} numbers derived, and found on the built module, "
        f"{len(wrong)} disagree"
    )
    if every:
        return f"{head}\n{_table(rows)}"
    sums = [row for row in rows if row.is_total and (row.derived or row.built)]
    parts = [f"{head}\n{_table(sums)}"]
    if below := [row for row in wrong if not row.is_total]:
        parts.append(f"what disagrees, by path\n{_table(below)}")
    if known := list(_known(rows)):
        parts.append(f"what differs for a known reason, by path ({MORE})\n{_with_reasons(known)}")
    return "\n\n".join(parts)


def _known(rows: Sequence[Row]) -> Iterator[Row]:
    """Differences with a reason; one that several policies of recomputing share stands once."""
    seen = set()
    for row in rows:
        quantity, _, path = row.path.partition("/")
        key = (quantity.partition("_")[0], path)
        if path and row.agrees and not row.equal and key not in seen:
            seen.add(key)
            yield row


def _table(rows: Sequence[Row]) -> str:
    lines = [
        [f"  {row.path}", format_exact(row.derived), format_exact(row.built), _verdict(row)]
        for row in rows
    ]
    return table(lines, HEADER, "lrrl")


def _with_reasons(rows: Sequence[Row]) -> str:
    """Each reason below its row, so that lines stay within a narrow terminal."""
    numbers = [[f"  {x.path}", format_exact(x.derived), format_exact(x.built)] for x in rows]
    header, *lines = table(numbers, HEADER[:3], "lrr").splitlines()
    reasons = (fill(_verdict(x), 80, initial_indent=REASON, subsequent_indent=REASON) for x in rows)
    return "\n".join([header, *chain.from_iterable(zip(lines, reasons, strict=True))])


def _verdict(row: Row) -> str:
    if row.equal:
        return "equal"
    if not row.agrees:
        return f"off by {format_exact(row.derived - row.built)}{_share(row)}"
    return row.reason or f"within {row.allowed:.0%}{_share(row)}"


def _share(row: Row) -> str:
    return f" ({100 * (row.derived - row.built) / row.built:+.2f} %)" if row.built else ""


def check_zoo(jobs: int | None, *, every: bool, as_json: bool) -> None:
    """Hold every named model against its built module.

    Raises:
        Infeasible: one of them disagrees, or cannot be built.
    """
    from isoflop.check.measure import n_cores
    from isoflop.check.zoo import check_models

    names, found = zoo.names(), []
    with bar(f"checking {len(names)} models", len(names)) as advance:
        for agreement in check_models(names, min(2, n_cores()) if jobs is None else jobs):
            found.append(agreement)
            advance(len(found), agreement.model)
    found.sort(key=lambda agreement: names.index(agreement.model))
    wrong = [agreement for agreement in found if not agreement.agrees]
    if as_json:
        emit("check", zoo_json(found))
    else:
        say(render_zoo(found, every=every))
    if wrong:
        raise Infeasible(f"{len(wrong)} of {len(found)} models disagree or cannot be built")


def zoo_json(found: Sequence[Agreement]) -> dict[str, Any]:
    """Every model's sums, and the paths that disagree."""
    return {
        "models": [agreement.to_json() for agreement in found],
        "disagreements": sum(len(agreement.wrong) for agreement in found),
        "refused": sum(bool(agreement.refused) for agreement in found),
    }


def render_zoo(found: Sequence[Agreement], *, every: bool) -> str:
    """By quantity how many models agree and which is furthest off; then what is wrong."""
    n_rows = sum(len(agreement.rows) for agreement in found)
    n_wrong = sum(len(agreement.wrong) for agreement in found)
    head = f"{len(found)} models: {n_rows:,} numbers derived from specs and found on built modules, {n_wrong} disagree"  # fmt: skip
    parts = [f"{head}\n{table(_by_quantity(found), ['', 'models', ''], 'lrl')}"]
    for agreement in found:
        if agreement.refused:
            parts.append(f"{agreement.model} cannot be built: {agreement.refused}")
        elif agreement.wrong:
            parts.append(f"{agreement.model}\n{_table(agreement.wrong)}")
    if every:
        parts.append(table(([f"  {a.model}", f"{len(a.rows)} numbers", _of_model(a)] for a in found), align="lrl"))  # fmt: skip
    return "\n\n".join(parts)


def _of_model(agreement: Agreement) -> str:
    if agreement.agrees:
        return "agree"
    return "cannot be built" if agreement.refused else f"{len(agreement.wrong)} disagree"


def _by_quantity(found: Sequence[Agreement]) -> Iterator[list[str]]:
    sums: dict[str, list[tuple[str, Row]]] = {}
    for agreement in found:
        for row in agreement.totals:
            sums.setdefault(row.path, []).append((agreement.model, row))
    for quantity, rows in sums.items():
        there = [(model, row) for model, row in rows if row.derived or row.built]
        if there:
            yield [f"  {quantity}", str(len(there)), _furthest(there)]


def _furthest(rows: Sequence[tuple[str, Row]]) -> str:
    model, row = max(rows, key=lambda x: abs(x[1].derived - x[1].built) / max(x[1].built, 1))
    if row.equal:
        return "equal"
    why = f": {row.reason}" if row.reason else ""
    return f"within {abs(row.derived - row.built) / max(row.built, 1):.2%} ({model}){why}"

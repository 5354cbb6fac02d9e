"""What predictions lack is told where errors show it, and nowhere else."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from importlib.resources import files

import pytest
from scipy.stats import sem

from isoflop.check.published.judge import Report
from isoflop.check.published.missing import DIRECTIONS, NOT_KNOWN, lacking
from isoflop.check.published.score import Judged, score
from isoflop.cli.validate import render


def rows(
    family: str, errors: list[float], sort: str = "dense", model: str = "m", on: str = "h100-sxm"
) -> Iterator[Judged]:
    for i, error in enumerate(errors):
        yield Judged(str(i), family, on, model, "seconds", 1.0, 1 + error, sort=sort)


BIASED = [-0.02, -0.03, -0.04, -0.05]


def test_a_family_that_meets_its_aim_without_a_bias_lacks_nothing() -> None:
    found = lacking(list(rows("bloom-tr11", [-0.05, 0.06, 0.02, -0.04])))
    assert found.misses == ()
    assert found.missing == ()


def test_a_bias_is_told_with_its_known_reason_and_the_rows_that_show_it() -> None:
    found = lacking(list(rows("bloom-tr11", BIASED)))
    assert [(m.what, m.n) for m in found.misses] == [("bias", 4)]
    (reason,) = found.missing
    assert "per micro-batch" in reason.what
    assert reason.source
    assert reason.rows == 4
    assert reason.bias == pytest.approx(sum(BIASED) / 4)


def test_a_reason_is_not_told_where_the_errors_go_the_other_way() -> None:
    (reason,) = lacking(list(rows("bloom-tr11", [-e for e in BIASED]))).missing
    assert reason.what == NOT_KNOWN


def test_a_reason_of_time_is_not_told_of_memory() -> None:
    (reason,) = lacking(list(rows("bloom-tr11", BIASED, "memory"))).missing
    assert "per micro-batch" not in reason.what


def test_a_family_that_misses_with_no_known_reason_says_not_known() -> None:
    found = lacking(list(rows("nobody", [0.2, -0.2, 0.3, -0.3])))
    assert [(m.what, m.of, m.beyond) for m in found.misses] == [("mean", "dense", 0.09)]
    assert [r.what for r in found.missing] == [NOT_KNOWN]


def test_experts_have_an_aim_of_their_own() -> None:
    errors = [0.12, -0.12]
    assert lacking(list(rows("nobody", errors, "experts"))).misses == ()
    assert lacking(list(rows("nobody", errors, "dense"))).misses != ()


def test_a_reason_of_some_rows_needs_those_rows_to_show_it() -> None:
    """Blackwell's rates explain nothing where Hopper alone is off."""
    fast = list(rows("megatron-bridge", BIASED, on="h100-sxm fp8"))
    even = list(rows("megatron-bridge", [0.01, -0.01, 0.02, -0.02], on="gb200 fp8"))
    assert [r.what for r in lacking([*fast, *even]).missing] == [NOT_KNOWN]
    shown = list(rows("megatron-bridge", BIASED, on="gb200 fp8"))
    assert "Blackwell" in lacking([*fast, *shown]).missing[0].what


def test_the_error_of_a_bias_is_scipys() -> None:
    errors = [0.1, -0.2, 0.05]
    assert score("x", list(rows("a", errors))).bias_error == pytest.approx(sem(errors))
    assert score("x", list(rows("a", errors[:1]))).bias_error is None


def test_the_text_tells_what_is_missing_only_where_something_is() -> None:
    def text(errors: list[float]) -> str:
        found = tuple(rows("bloom-tr11", errors))
        return render(Report("t", "step", "as shipped", found, {"as shipped": score("s", found)}))

    assert "bias -3.5 %, beyond 1.3 %" in text(BIASED)
    assert "per micro-batch" in text(BIASED)
    assert "missing" not in text([0.01, -0.01])


def test_each_known_reason_is_complete_and_has_a_source() -> None:
    table = tomllib.loads(
        files("isoflop.check.published").joinpath("missing.toml").read_text("utf-8")
    )
    for entry in table["known"]:
        assert {"family", "direction", "what", "source"} <= set(entry)
        assert set(entry) <= {"family", "of", "model", "on", "direction", "what", "source"}
        assert entry["direction"] in DIRECTIONS
        assert entry.get("of", "memory") == "memory"

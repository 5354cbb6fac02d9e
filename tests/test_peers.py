"""benchmarks/peers.py: what other planners are asked, and that a source left out is left out.

The peers themselves are not installed here; benchmarks/peers.md says how to get them.
"""

from __future__ import annotations

import json
import runpy
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from isoflop.check.published import Measured, read_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "peers.py"))


@pytest.fixture(scope="module")
def rows() -> tuple[Measured, ...]:
    return read_rows(str(files("isoflop.check.published").joinpath("measurements.csv")))


def test_every_step_is_asked_in_words_that_fill_its_accelerators(
    script: dict[str, Any], rows: tuple[Measured, ...]
) -> None:
    for row in rows:
        assert row.setting is not None
        asked = json.loads(json.dumps(script["row_of"](row.row_id, row.setting)))
        count = asked["tp"] * asked["pp"] * asked["dp"] * asked["cp"]
        assert count == row.setting.cluster.count


def test_flops_told_are_two_per_weight_and_the_scores(
    script: dict[str, Any], rows: tuple[Measured, ...]
) -> None:
    row = next(r for r in rows if r.row_id == "P001")  # MPT-70b: 80 layers, 8192 wide
    asked = script["row_of"](row.row_id, row.setting)
    by_hand = 2 * (80 * 12 * 8192**2 + 8192 * 50368) + 80 * 2 * 2048 * 8192
    assert asked["flops_forward_per_token"] == pytest.approx(by_hand, rel=0.01)


def test_a_source_has_no_say_in_its_own_efficiency(
    script: dict[str, Any], rows: tuple[Measured, ...]
) -> None:
    family = rows[0].family
    ideal = {r.row_id: r.measured_seconds for r in rows if r.measured_seconds}
    off = {r.row_id: ideal[r.row_id] * (9 if r.family == family else 1) for r in rows}
    other = {r.row_id: ideal[r.row_id] * (1 if r.family == family else 2) for r in rows}
    at = {0.5: off, 0.4: other}
    assert script["fitted_shares"](at, rows)[family] == 0.5
    assert script["fitted_elsewhere"](at, rows)[rows[0].row_id] == off[rows[0].row_id]


def test_a_reason_for_no_answer_is_no_seconds(script: dict[str, Any]) -> None:
    assert script["seconds_of"]({"a": 1.5, "b": "no word for nvfp4"}) == {"a": 1.5}

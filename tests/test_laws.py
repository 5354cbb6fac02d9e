"""The light half of the laws: the form, the published rows, the allocation, the reader."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.errors import InputError, UnknownName
from isoflop.laws import Law, allocation_table, find_law, published_laws, read_runs, standing

LAWS = st.builds(
    Law,
    A=st.floats(10, 1e4),
    B=st.floats(10, 1e4),
    E=st.floats(0.01, 3),
    alpha=st.floats(0.2, 1.0),
    beta=st.floats(0.2, 1.0),
)
SIZES = st.floats(1e3, 1e13)


# Derived from the printed numbers with C = 6 N D, outside this code: N*, D*, D*/N*, loss.
@pytest.mark.parametrize(
    ("name", "flops", "params", "tokens", "ratio", "loss"),
    [
        ("hoffmann-2022", 1e21, 1.824e9, 9.136e10, 50.08, 2.3289),
        ("hoffmann-2022", 5.76e23, 3.219e10, 2.982e12, 92.65, 1.9307),
        ("hoffmann-2022-unrounded", 1e21, 2.217e9, 7.518e10, 33.9, 2.2955),
        ("hoffmann-2022-unrounded", 5.76e23, 4.036e10, 2.379e12, 58.9, 1.9184),
        ("besiroglu-2024", 1e21, 2.778e9, 5.999e10, 21.6, 2.3055),
        ("besiroglu-2024", 5.76e23, 7.225e10, 1.329e12, 18.39, 1.9744),
        ("besiroglu-2024-minimum", 5.76e23, 7.319e10, 1.3116e12, 17.92, 1.97391),
    ],
)
def test_published_laws_give_the_known_optima(name, flops, params, tokens, ratio, loss):
    best = find_law(name).optimum(flops)
    assert best.params == pytest.approx(params, rel=5e-4)
    assert best.tokens == pytest.approx(tokens, rel=5e-4)
    assert best.tokens_per_param == pytest.approx(ratio, rel=2e-3)
    assert best.loss == pytest.approx(loss, abs=6e-5)


@given(law=LAWS, flops=st.floats(1e12, 1e27))
def test_the_closed_form_optimum_beats_every_split_of_a_grid(law, flops):
    best = law.optimum(flops)
    for step in range(-60, 61):
        params = best.params * math.exp(step / 10)
        assert law.loss(params, flops / 6 / params) >= best.loss * (1 - 1e-12)


@given(law=LAWS, flops=st.floats(1e12, 1e27), factor=st.floats(2, 10))
def test_the_optimum_spends_the_whole_budget(law, flops, factor):
    best = law.optimum(flops, factor)
    assert best.params * best.tokens * factor == pytest.approx(flops, rel=1e-9)


@given(law=LAWS, params=SIZES, tokens=SIZES)
def test_more_parameters_and_more_tokens_never_hurt_and_loss_stays_above_its_floor(
    law, params, tokens
):
    here = law.loss(params, tokens)
    assert law.loss(2 * params, tokens) <= here
    assert law.loss(params, 2 * tokens) <= here
    assert here >= law.E


@given(law=LAWS, flops=st.floats(1e15, 1e24))
def test_the_optimum_for_a_loss_and_the_tokens_for_a_size_undo_the_optimum(law, flops):
    best = law.optimum(flops)
    if best.loss - law.E > 1e-3:  # below that the subtraction loses digits
        assert law.optimum_for_loss(best.loss).params == pytest.approx(best.params, rel=1e-6)
    assert law.tokens_for(best.params) == pytest.approx(best.tokens, rel=1e-6)


def test_the_exponent_of_the_optimum_is_the_slope_between_two_budgets():
    law = find_law("hoffmann-2022")
    low, high = allocation_table(law, [1e20, 1e22])
    assert math.log10(high.params / low.params) / 2 == pytest.approx(law.params_exponent)


def test_gpt3_was_undertrained_and_a_small_llama_overtrained():
    law = find_law("besiroglu-2024")
    gpt3, llama = standing(law, 175e9, 300e9), standing(law, 8e9, 15e12)
    assert gpt3.undertrained > 5
    assert llama.undertrained < 0.05
    assert gpt3.loss_given_up > 0
    assert gpt3.flops == pytest.approx(3.15e23)


def test_at_the_optimum_nothing_is_given_up():
    law = find_law("hoffmann-2022")
    best = law.optimum(1e22)
    there = standing(law, best.params, best.tokens)
    assert there.undertrained == pytest.approx(1)
    assert there.loss_given_up == pytest.approx(0, abs=1e-12)


def test_every_published_law_has_a_source_and_writes_itself_as_json():
    for name, law in published_laws().items():
        assert law.name == name
        assert "20" in law.source
        assert json.loads(json.dumps(law.to_json()))["alpha"] == law.alpha


def test_an_unknown_law_is_an_error_with_near_names():
    with pytest.raises(UnknownName, match="did you mean besiroglu-2024"):
        find_law("besirolgu-2024")


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf, True, "3", None, 10**400])
def test_a_law_of_numbers_that_are_not_positive_and_finite_is_refused(bad):
    with pytest.raises(InputError, match=r"A=.*finite number above 0"):
        Law(A=bad, B=1, E=1, alpha=0.3, beta=0.3)


def test_all_problems_of_a_law_are_listed_at_once():
    with pytest.raises(InputError) as caught:
        Law(A=-1, B=0, E=1, alpha=0.3, beta=0.3, params_convention="all")
    assert [p.field for p in caught.value.problems] == ["A", "B", "params_convention"]


@pytest.mark.parametrize("call", ["loss(0, 1)", "optimum(-1)", "optimum_for_loss(1.69)",
                                  "optimum_for_loss(1.0)", "tokens_for(float('nan'))",
                                  "optimum(1e21, 0)",
                                  "loss(10**400, 1)"])  # fmt: skip
def test_questions_that_have_no_answer_are_refused(call):
    with pytest.raises(InputError):
        eval(f"law.{call}", {"law": find_law("hoffmann-2022")})


def test_a_loss_that_no_writable_size_reaches_is_refused():
    slow = Law(A=400, B=400, E=1.0, alpha=0.01, beta=0.01)
    with pytest.raises(InputError, match="far enough above"):
        slow.optimum_for_loss(1.001)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "runs.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_runs_are_read_and_blank_lines_skipped(tmp_path):
    runs = read_runs(write(tmp_path, "params,tokens,loss\n1e6,2e7,3.5\n\n2e6,4e7,3.25\n"))
    assert (runs.params, runs.tokens, runs.loss) == ((1e6, 2e6), (2e7, 4e7), (3.5, 3.25))
    assert len(runs) == 2


def test_tokens_come_from_flops_where_there_is_no_column_of_them(tmp_path):
    runs = read_runs(write(tmp_path, "n,C,loss\n1e6,1.2e14,3.5\n"), params="n", flops="C")
    assert runs.tokens == (pytest.approx(2e7),)
    assert runs.tokens_source == "C / (6 n)"


def test_a_missing_column_is_an_error_with_near_names(tmp_path):
    with pytest.raises(InputError, match=r"column=loss.*did you mean losses"):
        read_runs(write(tmp_path, "params,tokens,losses\n1,2,3\n"))


def test_bad_cells_are_shown_by_row_and_column_and_counted(tmp_path):
    text = "params,tokens,loss\n1,2,3\nx,-2,nan\n1,,inf\n1,2\n"
    with pytest.raises(InputError) as caught:
        read_runs(write(tmp_path, text))
    said = str(caught.value).splitlines()
    assert len(said) == 4
    assert "row 3, column params=x" in said[0]
    assert "3 more like these" in said[3]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'params,tokens,loss\n"1,2,3\n'])
def test_what_is_not_a_csv_file_is_refused(tmp_path, content):
    with pytest.raises(InputError):
        read_runs(write(tmp_path, content))


def test_a_folder_a_missing_file_and_a_huge_file_are_refused(tmp_path, monkeypatch):
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(InputError, match="file that exists"):
            read_runs(path)
    monkeypatch.setattr("isoflop.laws.table.LARGEST_FILE_BYTES", 3)
    with pytest.raises(InputError, match="at most"):
        read_runs(write(tmp_path, "params,tokens,loss\n"))


def test_the_light_half_loads_no_numpy():
    code = "import sys, isoflop.laws; print({'numpy', 'scipy', 'torch'} & set(sys.modules))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "set()"

"""The catalogue says what vendors say, with a source each; clusters are read as people write them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from isoflop.hardware import Chip, Cluster, find, names, parse_cluster

from isoflop.errors import InputError, UnknownName
from isoflop.quantity import Basis

SHARED = Path(os.environ.get("ISOFLOP_SHARED", Path(__file__).parents[2] / "shared" / "data"))

#: row of the published table -> ours
SAME_CHIP = {
    "A100 SXM": "a100-sxm-80gb",
    "A100 PCIe": "a100-pcie-80gb",
    "H100 SXM": "h100-sxm",
    "H100 PCIe": "h100-pcie",
    "H200 SXM": "h200-sxm",
    "B200 SXM": "b200-sxm",
    "AMD MI300X": "mi300x",
    "Google TPU v4": "tpu-v4",
    "Google TPU v5e": "tpu-v5e",
    "Google TPU v5p": "tpu-v5p",
    "a100_pcie": "a100-pcie-80gb",
    "a100_sxm": "a100-sxm-80gb",
    "h100_sxm": "h100-sxm",
    "h200_sxm": "h200-sxm",
    "l4": "l4",
}

every_chip = pytest.mark.parametrize("chip", [find(name) for name in names()], ids=names())


def test_there_are_at_least_ten_chips_of_three_vendors() -> None:
    chips = [find(name) for name in names()]
    assert len(chips) >= 10
    assert {chip.vendor for chip in chips} >= {"NVIDIA", "AMD", "Google"}


# Dense figures of the vendors; each datasheet prints twice these with 2:4 sparsity.
@pytest.mark.parametrize(
    ("name", "precision", "dense"),
    [
        ("v100-sxm-32gb", "fp16", 125e12),
        ("a100-sxm-80gb", "bf16", 312e12),
        ("a100-sxm-80gb", "int8", 624e12),
        ("h100-sxm", "bf16", 989.4e12),
        ("h100-pcie", "bf16", 756e12),
        ("h200-sxm", "bf16", 989.4e12),
        ("b200-sxm", "bf16", 2250e12),
        ("mi300x", "bf16", 1307.4e12),
        ("tpu-v5p", "bf16", 459e12),
        ("l4", "bf16", 121e12),
        ("rtx-4090", "bf16", 165.2e12),
    ],
)
def test_peaks_are_dense(name: str, precision: str, dense: float) -> None:
    assert find(name).peak(precision).value == pytest.approx(dense)  # type: ignore[arg-type]


@every_chip
def test_every_number_names_its_source_and_date(chip: Chip) -> None:
    for number in chip.numbers():
        text, date = number.source.rsplit(", ", 1)
        assert len(text) > 10
        assert any(year in date for year in ("2020", "2023", "2024", "2025", "2026")), number


@every_chip
def test_every_range_holds_its_number_and_every_guess_has_one(chip: Chip) -> None:
    for number in chip.numbers():
        assert number.basis in {Basis.DATASHEET, Basis.ASSUMED}
        if number.spread is not None:
            assert float(number.value) in number.spread
        assert number.basis is Basis.DATASHEET or number.spread is not None
    assert chip.dollars_per_hour.spread is not None, "a price without a range"


@every_chip
def test_lower_precision_is_never_slower_and_at_most_twice_per_halving(chip: Chip) -> None:
    for wide, narrow in (("bf16", "fp8"), ("bf16", "int8"), ("fp8", "fp4")):
        if wide in chip.peaks and narrow in chip.peaks:
            ratio = chip.peaks[narrow].value / chip.peaks[wide].value  # type: ignore[index]
            # The 4090 halves products that accumulate in fp32, but not its int8 ones.
            most = 4 if chip.name == "rtx-4090" else 2
            assert 1 <= float(ratio) <= most * 1.01


def test_memory_is_what_the_driver_reports_not_the_name_on_the_box() -> None:
    h100 = find("h100-sxm").bytes_memory.value
    assert 80e9 < h100 < 80 * 2**30
    assert find("l4").bytes_memory.value < 24.2e9  # error correction holds 1.5 GiB of 24
    assert find("a100-sxm-40gb").bytes_memory.value < find("a100-sxm-80gb").bytes_memory.value


def test_agrees_with_the_published_table() -> None:
    path = SHARED / "published" / "prices_energy.csv"
    if not path.exists():
        pytest.skip("the shared table of published specifications is not here")
    columns: dict[str, Callable[[Chip], float]] = {
        "bf16_dense_tflops": lambda c: float(c.peaks["bf16"].value) / 1e12,
        "mem_bw_TBps": lambda c: float(c.bytes_per_second_memory.value) / 1e12,
        "tdp_W": lambda c: float(c.watts.value),
        "interconnect_uni_GBps": lambda c: float(c.bytes_per_second_link.value) / 1e9,
    }
    compared = 0
    with path.open() as file:
        for row in csv.DictReader(file):
            if not row["kind"].startswith("spec") or row["accelerator"] not in SAME_CHIP:
                continue
            chip = find(SAME_CHIP[row["accelerator"]])
            for column, ours in columns.items():
                try:
                    published = float(row[column])
                except ValueError:
                    continue
                assert ours(chip) == pytest.approx(published, rel=0.02), (chip.name, column)
                compared += 1
    assert compared > 40


def test_the_ridge_of_an_a100_is_153_flops_per_byte() -> None:
    assert float(find("a100-sxm-80gb").ridge("bf16").value) == pytest.approx(153, abs=0.5)


def test_a_precision_that_a_chip_lacks_is_an_error_that_names_those_it_has() -> None:
    with pytest.raises(InputError, match=r"choose one of fp32, fp16"):
        find("v100-sxm-16gb").peak("bf16")


def test_an_unknown_chip_lists_near_names() -> None:
    with pytest.raises(UnknownName, match="did you mean h100-sxm"):
        find("h100-sxn")
    with pytest.raises(UnknownName, match="isoflop hardware"):
        find("abacus")


@given(st.sampled_from(names()), st.integers(1, 1_000_000))
def test_a_cluster_reads_back_what_it_prints(name: str, count: int) -> None:
    cluster = Cluster(find(name), count)
    assert parse_cluster(str(cluster)) == cluster
    assert parse_cluster(f" {count:,}X{name.upper()} ") == cluster
    assert cluster.n_nodes * cluster.size_node >= count > (cluster.n_nodes - 1) * cluster.size_node


def test_a_name_alone_is_one_chip_and_an_x_inside_a_name_is_not_a_count() -> None:
    assert parse_cluster("rtx-4090").count == 1
    assert parse_cluster("2xrtx-4090").count == 2


@pytest.mark.parametrize(
    "text", ["0xh100-sxm", "1000001xh100-sxm", "", "-3xh100-sxm", "8x", "x" * 99]
)
def test_a_cluster_that_cannot_be_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError):
        parse_cluster(text)


def test_a_node_is_bounded_by_the_link() -> None:
    assert Cluster(find("h100-sxm"), 64, per_node=4).size_node == 4
    with pytest.raises(InputError, match="per_node=16"):
        Cluster(find("h100-sxm"), 64, per_node=16)
    assert parse_cluster("64xtpu-v4").size_node == 64


def test_a_chip_without_memory_cannot_be() -> None:
    chip = find("l4")
    with pytest.raises(InputError, match="bytes_memory=0"):
        replace(chip, bytes_memory=replace(chip.bytes_memory, given=0))


@every_chip
def test_the_json_of_a_chip_holds_every_number(chip: Chip) -> None:
    out = json.loads(json.dumps(chip.to_json()))
    assert len(out["numbers"]) == len(list(chip.numbers()))
    assert out["numbers"]["bytes_memory"]["value"] == chip.bytes_memory.value

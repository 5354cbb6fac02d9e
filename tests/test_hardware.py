"""The catalogue says what vendors say, with a source each; clusters are read as people write them."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isoflop.arch import gpt
from isoflop.cli.hardware import hardware
from isoflop.cli.outputs import validate
from isoflop.errors import InputError, UnknownName
from isoflop.hardware import (
    Chip,
    Cluster,
    Node,
    find,
    find_node,
    look_up,
    names,
    node_names,
    parse_cluster,
)
from isoflop.plan import plan_serve, plan_train
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
    "GB300 SXM": "gb300",
    "gb300": "gb300",
    "gb200": "gb200",
    "b300_sxm": "b300-sxm",
    "Google TPU v7x": "tpu-v7",
    "Google TPU v6e": "tpu-v6e",
    "Intel Gaudi3": "gaudi-3",
    "AMD MI250X": "mi250x",
    "AMD MI350X": "mi350x",
    "AWS Trainium2": "trainium-2",
    "H200 NVL": "h200-nvl",
    "H100 NVL": "h100-nvl",
    "L40S": "l40s",
    "l40s": "l40s",
    "a30": "a30",
    "A40": "a40",
    "A30": "a30",
    "MI300A": "mi300a",
    "RTX 5090": "rtx-5090",
    "RTX 4090": "rtx-4090",
    "RTX 3090": "rtx-3090",
    "H800 SXM": "h800-sxm",
    "H20": "h20",
    "T4": "t4",
    "RTX A6000": "rtx-a6000",
    "rtx_pro_6000_server": "rtx-pro-6000",
    "Trainium1": "trainium-1",
}

#: Where the table counts something else: the bridge to one other card, ports that leave the
#: machine; and where Google's own page contradicts it (v5p in fp8 is as fast as in bf16).
DIFFERS = {
    ("rtx-a6000", "interconnect_uni_GBps"),
    ("gaudi-3", "interconnect_uni_GBps"),
    ("tpu-v5p", "fp8_dense_tflops"),
}

every_chip = pytest.mark.parametrize("chip", [find(name) for name in names()], ids=names())
every_node = pytest.mark.parametrize(
    "node", [find_node(name) for name in node_names()], ids=node_names()
)


def test_there_are_at_least_45_chips_of_seven_vendors() -> None:
    chips = [find(name) for name in names()]
    assert len(chips) >= 45
    assert {chip.vendor for chip in chips} == {
        "NVIDIA", "AMD", "Intel", "Google", "AWS", "Apple",
    }  # fmt: skip


# Figures of the vendors, typed here from what was read, not from the catalogue. Dense: each
# datasheet prints twice these with 2:4 sparsity.
#   docs.cloud.google.com/tpu/docs: v3, v6e, tpu7x       AWS Neuron docs: Trainium, Inferentia2
#   verda.com/blog/gb300-nvl72-architecture: B300, GB300  Intel at Hot Chips 2024: Gaudi 2
#   tweaktown.com 95224: H20 (296 is its fp8)             hmc-tech.com: T4, A40
#   vengineer.hatenablog.com, AMD's data sheet: MI300A
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
        ("h20", "bf16", 148e12),
        ("h20", "fp8", 296e12),
        ("h800-sxm", "bf16", 989.4e12),
        ("a800-sxm-80gb", "bf16", 312e12),
        ("b300-sxm", "bf16", 2250e12),
        ("gb300", "bf16", 2500e12),
        ("gb300", "fp4", 15000e12),
        ("gb200", "fp8", 5000e12),
        ("t4", "fp16", 65.1e12),
        ("a40", "bf16", 149.7e12),
        ("rtx-3090", "bf16", 71e12),
        ("rtx-5090", "fp4", 1676e12),
        ("mi300a", "bf16", 980.6e12),
        ("gaudi-2", "bf16", 432e12),
        ("tpu-v3", "bf16", 123e12),
        ("tpu-v6e", "bf16", 918e12),
        ("tpu-v6e", "int8", 1836e12),
        ("tpu-v7", "fp8", 4614e12),
        ("trainium-1", "bf16", 190e12),
        ("trainium-2", "fp8", 1299e12),
        ("trainium-3", "bf16", 671e12),
        ("inferentia-2", "int8", 380e12),
    ],
)
def test_peaks_are_dense(name: str, precision: str, dense: float) -> None:
    assert find(name).peak(precision).value == pytest.approx(dense)  # type: ignore[arg-type]


# 256 compute units at 2.2 and 2.4 GHz, 8,192 fp8 FLOPs per unit and cycle (AMD at ISSCC 2026).
@pytest.mark.parametrize(("name", "hertz"), [("mi350x", 2.2e9), ("mi355x", 2.4e9)])
def test_the_mi350_peaks_are_units_times_clock(name: str, hertz: float) -> None:
    assert float(find(name).peak("fp8").value) == pytest.approx(256 * 8192 * hertz, rel=1e-4)
    assert float(find(name).peak("bf16").value) == pytest.approx(256 * 4096 * hertz, rel=1e-4)


# Bandwidth in GB/s, link one way in GB/s, watts: the same pages.
@pytest.mark.parametrize(
    ("name", "memory", "link", "watts"),
    [
        ("v100-sxm-32gb", 900, 150, 300),
        ("a100-sxm-40gb", 1555, 300, 400),
        ("a800-sxm-80gb", 2039, 200, 400),
        ("h800-sxm", 3350, 200, 700),
        ("h20", 4000, 450, 400),
        ("gb300", 8000, 900, 1400),
        ("mi325x", 6000, 448, 1000),
        ("mi355x", 8000, 535.5, 1400),
        ("gaudi-3", 3700, 525, 900),
        ("tpu-v3", 900, 328, 262),
        ("tpu-v6e", 1638, 400, 300),
        ("rtx-5090", 1792, 64, 575),
    ],
)
def test_bandwidth_link_and_power_are_those_read(
    name: str, memory: float, link: float, watts: float
) -> None:
    chip = find(name)
    assert chip.bytes_per_second_link is not None
    assert chip.watts is not None
    assert float(chip.bytes_per_second_memory.value) == memory * 1e9
    assert float(chip.bytes_per_second_link.value) == link * 1e9
    assert float(chip.watts.value) == watts


@every_chip
def test_every_number_is_above_zero_and_names_its_source_and_date(chip: Chip) -> None:
    for number in chip.numbers():
        assert float(number.value) > 0
        text, date = number.source.rsplit(", ", 1)
        assert len(text) > 10
        assert any(str(year) in date for year in range(2017, 2027)), number


@every_chip
def test_every_range_holds_its_number_and_every_guess_has_one(chip: Chip) -> None:
    for number in chip.numbers():
        assert number.basis in {Basis.DATASHEET, Basis.ASSUMED}
        if number.spread is not None:
            assert float(number.value) in number.spread
        assert number.basis is Basis.DATASHEET or number.spread is not None
    price = chip.dollars_per_hour
    assert price is None or price.spread is not None, "a price without a range"


@every_chip
def test_what_was_remembered_is_assumed(chip: Chip) -> None:
    for number in chip.numbers():
        assert "as remembered" not in number.source or number.basis is Basis.ASSUMED, number


#: GeForce halves products that accumulate in fp32, but not its int8 ones; Trainium 3 is four
#: times faster in fp8; Blackwell Ultra gave its int8 units away and has fp4 at three times fp8.
ODD = {"rtx-3090": 4, "rtx-4090": 4, "rtx-5090": 4, "trainium-3": 4, "b300-sxm": 3.2, "gb300": 3}


@every_chip
def test_lower_precision_is_never_slower_and_at_most_twice_per_halving(chip: Chip) -> None:
    pairs = [("fp32", "tf32"), ("fp32", "fp16"), ("tf32", "fp16"), ("bf16", "fp8"),
             ("bf16", "int8"), ("fp8", "fp4")]  # fmt: skip
    for wide, narrow in pairs:
        if (chip.name, narrow) in {("b300-sxm", "int8"), ("gb300", "int8")}:
            continue
        if wide in chip.peaks and narrow in chip.peaks:
            ratio = chip.peaks[narrow].value / chip.peaks[wide].value  # type: ignore[index]
            assert ratio >= 0.999, (wide, narrow)
            if wide not in {"fp32", "tf32"}:
                assert float(ratio) <= ODD.get(chip.name, 2) * 1.02, (wide, narrow)


@every_chip
def test_memory_is_faster_than_the_link_and_the_link_than_the_network(chip: Chip) -> None:
    link, network = chip.bytes_per_second_link, chip.bytes_per_second_network
    if link is not None:
        assert chip.bytes_per_second_memory.value > link.value
    if link is not None and network is not None and chip.per_node > 1:
        assert link.value >= network.value


def test_fp16_accumulation_is_said_where_it_doubles_the_peak() -> None:
    for name in ("rtx-3090", "rtx-4090", "rtx-5090"):
        assert "fp16 only" in find(name).peak("fp16").meaning


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
        "tdp_W": lambda c: float(c.watts.value) if c.watts else math.nan,
        "interconnect_uni_GBps": lambda c: (
            float(c.bytes_per_second_link.value) / 1e9 if c.bytes_per_second_link else math.nan
        ),
        "fp8_dense_tflops": lambda c: (
            float(c.peaks["fp8"].value) / 1e12 if "fp8" in c.peaks else math.nan
        ),
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
                if (chip.name, column) in DIFFERS or math.isnan(ours(chip)):
                    continue
                assert ours(chip) == pytest.approx(published, rel=0.02), (chip.name, column)
                compared += 1
    assert compared > 100


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


@pytest.mark.parametrize("count", [1, 3, 16])
@every_node
def test_a_cluster_of_nodes_counts_chips_and_reads_back(node: Node, count: int) -> None:
    cluster = parse_cluster(f"{count}x{node.name.upper()}")
    assert cluster.count == count * node.chips
    assert cluster.chip.name == node.chip.name
    assert cluster.chip.bytes_per_second_network == node.bytes_per_second_network
    assert cluster.size_node == min(cluster.count, node.domain)
    assert parse_cluster(str(cluster)) == cluster
    assert cluster.to_json()["text"] == f"{count}x{node.name}"


# Chips in one machine, chips joined by the fast link: NVIDIA's and AWS's product pages,
# Jouppi 2023 (4096 chips, 4 to a host).
@pytest.mark.parametrize(
    ("text", "chip", "count", "joined"),
    [
        ("16xdgx-h100", "h100-sxm", 128, 8),
        ("dgx-2", "v100-sxm-32gb", 16, 16),
        ("2xgb200-nvl72", "gb200", 144, 72),
        ("18xgb200-tray", "gb200", 72, 72),
        ("tpu-v4-pod", "tpu-v4", 4096, 4096),
        ("32xtpu-v4-host", "tpu-v4", 128, 128),
        ("4xp4d", "a100-sxm-40gb", 32, 8),
        ("4xp5", "h100-sxm", 32, 8),
        ("2xtrn1n", "trainium-1", 32, 16),
        ("hgx-b200", "b200-sxm", 8, 8),
    ],
)
def test_named_machines_hold_what_they_are_sold_with(
    text: str, chip: str, count: int, joined: int
) -> None:
    cluster = parse_cluster(text)
    assert (cluster.chip.name, cluster.count, cluster.size_node) == (chip, count, joined)


def test_a_rented_machine_has_its_own_network_not_the_chips() -> None:
    assert parse_cluster("p4d").chip.bytes_per_second_network.value == 400e9 / 8 / 8  # type: ignore[union-attr]
    assert parse_cluster("trn1n").chip.bytes_per_second_network.value == 1600e9 / 8 / 16  # type: ignore[union-attr]


@every_node
def test_every_node_names_its_source_and_differs_from_every_chip(node: Node) -> None:
    assert any(str(year) in node.source.rsplit(", ", 1)[1] for year in range(2017, 2027))
    assert node.name not in names()
    assert look_up(node.name) is find_node(node.name)
    joined = parse_cluster(node.name).chip.bytes_per_second_link
    network = node.bytes_per_second_network
    assert network is None or joined is None or joined.value >= network.value > 0


def test_an_unknown_machine_lists_near_names_of_chips_and_machines() -> None:
    with pytest.raises(UnknownName, match="dgx-h100"):
        parse_cluster("16xdgx-h10")
    with pytest.raises(UnknownName, match=r"accelerator or node.*h100-sxm"):
        parse_cluster("h100-sxn")


def test_a_cluster_of_half_a_node_or_of_another_chip_cannot_be() -> None:
    node = find_node("dgx-h100")
    with pytest.raises(InputError, match=r"count=12.*multiple of the 8 chips"):
        Cluster(node.chip_inside, 12, node=node)
    with pytest.raises(InputError, match="chip=l4"):
        Cluster(find("l4"), 8, node=node)
    with pytest.raises(InputError, match=r"chips=0(.|\n)*domain=-1"):
        replace(node, chips=0, domain=-1)


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
    assert out["not_stated"] == list(chip.not_stated())
    assert not set(out["numbers"]) & set(out["not_stated"])


def test_a_chip_joined_by_no_link_cannot_be() -> None:
    with pytest.raises(InputError, match="per_node=8"):
        replace(find("l4"), bytes_per_second_link=None)


SMALL = gpt("small", d_model=64, n_layers=2, n_heads=4, vocab_size=256, max_seq_len=64)


def test_a_plan_names_the_options_that_supply_what_nobody_states() -> None:
    alone = parse_cluster("trainium-3")

    def train(**given: float) -> None:
        plan_train(SMALL, 10**6, alone, seq_len=64, global_batch=1, **given)

    with pytest.raises(InputError, match=r"watts=not stated.*--watts(.|\n)*--price"):
        train()
    with pytest.raises(InputError) as caught:
        train(price=2.0)
    assert [problem.field for problem in caught.value.problems] == ["watts"]
    train(price=2.0, watts=500)
    with pytest.raises(InputError, match="--price"):
        plan_serve(SMALL, alone, input_tokens=8, output_tokens=8)
    plan_serve(SMALL, alone, input_tokens=8, output_tokens=8, price=1.5)


@pytest.mark.parametrize("name", [None, "m3-ultra", "h100-sxm", "gb200-nvl72", "2s-epyc-9654"])
def test_the_command_prints_its_schema_and_a_table(
    name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    hardware(name, as_json=True)
    validate("hardware", capsys.readouterr().out)
    hardware(name)
    shown = capsys.readouterr().out
    assert ("not stated" in shown) is (name not in {"h100-sxm", "gb200-nvl72"})


def test_the_command_lists_one_vendor(capsys: pytest.CaptureFixture[str]) -> None:
    hardware(vendor="amd", as_json=True)
    listed = json.loads(capsys.readouterr().out)
    assert {chip["vendor"] for chip in listed["hardware"]} == {"AMD"}
    assert "mi300x-platform" in {node["name"] for node in listed["nodes"]}
    with pytest.raises(UnknownName, match="nvidia"):
        hardware(vendor="nvidea")

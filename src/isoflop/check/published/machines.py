"""What a publication calls its machines, number formats and software, in our names."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from isoflop.check.published.table import Cells
from isoflop.errors import UnknownName
from isoflop.hardware import Cluster, Node, find, look_up
from isoflop.plan.step.setting import Compute
from isoflop.quantity import Basis, Symbol

GIGA = 10**9


@dataclass(frozen=True, slots=True)
class Machine:
    """A chip of the catalogue, and what the publication's machine has that is its own."""

    chip: str
    per_node: int | None = None
    gigabytes_per_second_network: float | None = None
    source: str = ""
    assumed: str = ""

    def cluster(self, count: int) -> Cluster:
        chip = find(self.chip)
        if self.gigabytes_per_second_network is not None:
            rate = Symbol("bytes_per_second_network", round(self.gigabytes_per_second_network * GIGA),
                          Basis.DATASHEET, source=self.source)  # fmt: skip
            chip = replace(chip, bytes_per_second_network=rate)
        return Cluster(chip, count, self.per_node)


JEAN_ZAY = "IDRIS, Jean Zay: four 100 Gbit/s Omni-Path links per node"

#: The text of a `gpu_type` cell, as a pattern of its lower case -> the machine.
MACHINES: dict[str, Machine] = {
    r"v100 (16|32)gb \(jean zay.*\)": Machine(r"v100-sxm-\1gb", 4, 12.5, JEAN_ZAY),
    r"a100 80gb sxm \(jean zay.*\)": Machine("a100-sxm-80gb", 8, 6.25, JEAN_ZAY),
    r"a100 (40|80)gb( sxm)?( \(selene\))?": Machine(r"a100-sxm-\1gb"),
    r"h100 80gb \(a3\)": Machine("h100-sxm", 8, 12.5, "Google Cloud, A3 High: 1600 Gbit/s per node"),
    r"h100 (80gb )?sxm( \(.*\))?": Machine("h100-sxm"),
    r"h100": Machine("h100-sxm", assumed="gpu_type: H100 is the SXM one"),
    r"(b[23]00)": Machine(r"\1-sxm"),
    r"(gb[23]00)": Machine(r"\1"),
    r"rtx (3090|4090|5090)": Machine(r"rtx-\1"),
    r"a6000": Machine("rtx-a6000"),
    r"tpu (v\d\w?)( \(.*\))?": Machine(r"tpu-\1"),
    r"v100": Machine("v100-sxm-32gb", assumed="gpu_type: V100 is the SXM one with 32 GB"),
}  # fmt: skip


def read_cluster(cells: Cells, column: str, count: int) -> Cluster | None:
    """The machine that a cell names, `count` of its chips; a name of our catalogue is read too."""
    text = cells.text(column)
    for pattern, machine in MACHINES.items():
        if match := re.fullmatch(pattern, text.casefold()):
            if machine.assumed:
                cells.assume(machine.assumed)
            chip = match.expand(machine.chip)
            return _in_racks(replace(machine, chip=chip), count, cells)
    try:
        found = look_up(text)
    except UnknownName as unknown:
        cells.wrong(column, "is a known accelerator or node", unknown.problems[0].hint)
        return None
    if isinstance(found, Node):
        return Cluster(found.chip_inside, count)
    return Cluster(found, count)


def _in_racks(machine: Machine, count: int, cells: Cells) -> Cluster:
    """Jobs on racks of 72 take 64 of each, so that powers of two divide."""
    if find(machine.chip).per_node == 72 and count > 72 and count % 64 == 0:
        cells.assume("gpu_type: 64 of a rack's 72 chips are used")
        machine = replace(machine, per_node=64)
    return machine.cluster(count)


#: The text of a `precision` cell, as a pattern of its lower case -> what products compute in.
COMPUTES: dict[str, Compute] = {
    r"(amp[_-])?bf16(-true|-mixed)?": "bf16",
    r"fp16.*": "fp16",
    r"fp32": "fp32",
    r"tf32": "tf32",
    r"nvfp4|fp4": "nvfp4",
    r"mxfp8|fp8-mx|fp8 mx/blockwise.*": "mxfp8",
    r"fp8(-cs)?( \(fp8-mx\))?|fp8 current scaling.*": "fp8",
}


def read_compute(cells: Cells) -> Compute | None:
    """What matrix products compute in.

    >>> read_compute(Cells({"precision": "fp8 current scaling/per-tensor (25.09)"}, 1))
    'fp8'
    """
    text = cells.text("precision").casefold()
    for pattern, compute in COMPUTES.items():
        if re.fullmatch(pattern, text):
            return compute
    rule = "is a known number format"
    cells.wrong("precision", rule, "such as fp32, tf32, fp16, bf16, fp8, mxfp8, nvfp4")
    return None


#: The software of sources that used one; NeMo's carry their release.
STACKS = {
    "llm-foundry": "llm-foundry",
    "bloom-tr11": "deepspeed-bloom",
    "bigscience-v100": "deepspeed-2021",
    "megatron-2021": "megatron-2021",
    "korthikanti-2022": "megatron-2022",
    "nemo-launcher-2023": "nemo-23.08",
    "maxtext-tpu": "maxtext",
    "torchtune": "torchtune",
}


#: PCI Express and NUMA settings of Jean Zay's A100 were repaired on that day
#: (tr11-176B-ml/chronicles-prequel.md).
BLOOM_REPAIRED = "2022-02-25"


def stack_of(cells: Cells) -> str:
    """The trainer's software with its release: what the row says, or what its source used.

    >>> stack_of(Cells({"source_family": "megatron-bridge", "date_or_version": "NeMo 26.06.01"}, 1))
    'nemo-26.06.01'
    """
    if cells.text("stack"):
        return cells.text("stack")
    family = cells.text("source_family")
    if family == "bloom-tr11" and cells.text("date_or_version") < BLOOM_REPAIRED:
        return "deepspeed-bloom-2022-02"
    if family == "llm-foundry" and cells.text("precision") == "bf16":
        return "llm-foundry-2023-05"
    if family in ("megatron-bridge", "nemo-docs"):
        return _nemo(cells)
    return STACKS.get(family, "unknown")


def _nemo(cells: Cells) -> str:
    """NeMo by its release, and by what of it a recipe uses."""
    release = re.search(r"\d\d\.\d\w(\.\d\d)?", cells.text("date_or_version"))
    if release is None:
        return "unknown"
    name = f"nemo-{release[0]}"
    if "tokendrop" in cells.text("model").casefold():
        return f"{name}-tokendrop"
    hopper = release[0] >= "26.06" and cells.text("gpu_type").casefold().startswith("h100")
    return f"{name}-hopper" if hopper else name

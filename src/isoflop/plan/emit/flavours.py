"""The models that torchtitan 0.3 has configurations of, by the spec that each of them is.

A command line chooses one of them (torchtitan/models/*/config_registry.py) and cannot change its
shape. Models that it defines without a configuration of their own are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from isoflop.arch.spec import Arch
from isoflop.arch.zoo import entry

#: What multiplies where a configuration turns its linear maps to 8 bits; None: it does not.
EIGHT_BITS = "fp8"


@dataclass(frozen=True, slots=True)
class Flavour:
    """A configuration of torchtitan, and the model of the zoo that has its shape.

    `differs` says what no size shows, `longest` the tokens that its rotary table holds.
    `attention` is the kernel: varlen takes no context parallelism.
    """

    module: str
    config: str
    model: str
    longest: int
    differs: str = ""
    precision: str | None = None
    attention: str = "flex"


_SCALED = "rotary positions are scaled as Llama 3.1's"
_EPS = "norms have an epsilon of 1e-05, not 1e-06"
_LITE = f"{_EPS}, and YaRN's mscale is 0.7, not 0.707"

FLAVOURS = (
    Flavour("llama3", "llama3_8b", "llama-3.1-8b", 131072),
    Flavour("llama3", "llama3_8b", "llama-3-8b", 131072, _SCALED),
    Flavour("llama3", "llama3_70b", "llama-3.1-70b", 131072),
    Flavour("llama3", "llama3_70b", "llama-3-70b", 131072, _SCALED),
    Flavour("llama3", "llama3_405b", "llama-3.1-405b", 131072, precision=EIGHT_BITS),
    Flavour("qwen3", "qwen3_0_6b", "qwen3-0.6b", 40960),
    Flavour("qwen3", "qwen3_1_7b", "qwen3-1.7b", 40960),
    Flavour("qwen3", "qwen3_14b", "qwen3-14b", 40960),
    Flavour("qwen3", "qwen3_32b", "qwen3-32b", 40960),
    Flavour("qwen3", "qwen3_30b_a3b", "qwen3-30b-a3b", 40960),
    Flavour("deepseek_v3", "deepseek_v3_16b", "deepseek-v2-lite", 16384, _LITE),
    Flavour("deepseek_v3", "deepseek_v3_671b", "deepseek-v3", 16384, _EPS),
    Flavour(
        "deepseek_v3", "deepseek_v3_671b_float8", "deepseek-v3", 16384, _EPS, precision=EIGHT_BITS
    ),
    Flavour("gpt_oss", "gpt_oss_20b", "gpt-oss-20b", 131072, attention="varlen"),
    Flavour("gpt_oss", "gpt_oss_120b", "gpt-oss-120b", 131072, attention="varlen"),
)


def flavours_of(arch: Arch) -> Iterator[Flavour]:
    """Those with the spec's shape, whatever it is called and however long its context is.

    >>> [f.config for f in flavours_of(entry("deepseek-v3").arch)]
    ['deepseek_v3_671b', 'deepseek_v3_671b_float8']
    """
    for flavour in FLAVOURS:
        known = entry(flavour.model).arch
        if replace(known, name=arch.name, max_seq_len=arch.max_seq_len) == arch:
            yield flavour

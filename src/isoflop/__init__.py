"""isoflop: write down a language model once, and know what it costs before you run it.

The public names are loaded when they are first used, so that `import isoflop` costs
nothing and counting never loads PyTorch.

>>> import isoflop
>>> gpt3 = isoflop.load("gpt3-175b").arch
>>> isoflop.params(gpt3).value
174604259328
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

#: public name -> the module it lives in
_PUBLIC = {
    "Arch": "isoflop.arch",
    "InputError": "isoflop.errors",
    "Law": "isoflop.laws",
    "Precision": "isoflop.count",
    "Workload": "isoflop.count",
    "attention": "isoflop.attention",
    "build": "isoflop.model",
    "calculate_llm_memory": "isoflop.count",
    "explain_dispatch": "isoflop.attention",
    "find_law": "isoflop.laws",
    "flash_attention": "isoflop.attention",
    "flops_forward": "isoflop.count",
    "load": "isoflop.arch",
    "memory_inference": "isoflop.count",
    "memory_training": "isoflop.count",
    "multi_head_attention": "isoflop.attention",
    "params": "isoflop.count",
    "parse_cluster": "isoflop.hardware",
    "plan_serve": "isoflop.plan",
    "plan_train": "isoflop.plan",
}

__all__ = [  # noqa: PLE0604 - the names stand in _PUBLIC, a test keeps them
    *_PUBLIC,
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'isoflop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])

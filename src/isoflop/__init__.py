"""isoflop: write down a language model once, and know what it costs before you run it.

    load(NAME)                                  a model of the zoo, a config.json, a TOML spec: `.arch`
    params, flops_forward                       what it is made of and does, as trees
    memory_inference, memory_training           what one accelerator holds
    calculate_llm_memory                        the same from a number of parameters alone
    parse_cluster("64xh100-sxm")                machines
    plan_train, plan_serve                      time, money, memory, layout: `print` shows them
    find_law                                    published scaling laws
    build, load_model, save_model               the module, in PyTorch; Hugging Face folders
    attention, flash_attention, multi_head_attention, explain_dispatch

The names are loaded when they are first used, so that `import isoflop` costs nothing and
counting never loads PyTorch. docs/python.md has more.

>>> import isoflop
>>> gpt3 = isoflop.load("gpt3-175b").arch
>>> print(isoflop.params(gpt3).find("layer/feed_forward"))
feed_forward  1,208,020,992
  up            604,028,928  50.0 %
  down          603,992,064  50.0 %
>>> plan = isoflop.plan_train(gpt3, 300 * 10**9, isoflop.parse_cluster("1024xa100-sxm-80gb"),
...                           seq_len=2048, global_batch=1536)
>>> print(plan)
gpt3-175b on 300 B tokens, 1024xa100-sxm-80gb, stack unknown
...
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
    "load_model": "isoflop.model.weights",
    "memory_inference": "isoflop.count",
    "memory_training": "isoflop.count",
    "multi_head_attention": "isoflop.attention",
    "params": "isoflop.count",
    "parse_cluster": "isoflop.hardware",
    "plan_serve": "isoflop.plan",
    "plan_train": "isoflop.plan",
    "save_model": "isoflop.model.weights",
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

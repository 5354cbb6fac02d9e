"""Layers compiled by torch.compile: one kernel for what stands between products.

Layers of a kind share their code, so a kind is compiled once: 10 to 50 seconds on a CPU the first
time (benchmarks/train_step_cpu.md), a few where PyTorch's cache has it. Only training steps run
compiled: an evaluation has other shapes and would compile again.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from isoflop.errors import Problem
from isoflop.model import Decoder
from isoflop.train.recipe import Recipe

#: What PyTorch looks for where CXX names none (torch._inductor.config.cpp.cxx); elsewhere g++.
COMPILERS = {"darwin": "clang++", "win32": "cl"}


def compile_layers(model: Decoder) -> None:
    """Let every layer be compiled when it first runs; names of weights stay as they are."""
    for layer in model.layers:
        layer.compile(dynamic=False)


def as_written(recipe: Recipe) -> AbstractContextManager[object]:
    """Inside, layers run uncompiled, whatever the recipe says."""
    if not recipe.compile:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def compile_problems(device: str) -> list[Problem]:
    """What keeps layers from being compiled here."""
    if torch.device(device).type != "cpu":
        return []
    compiler = os.environ.get("CXX", COMPILERS.get(sys.platform, "g++"))
    if shutil.which(compiler) is not None:
        return []
    hint = f"install {compiler} or name another in CXX; without compile training is only slower"
    return [Problem("compile", True, "finds a C++ compiler on this machine", hint)]

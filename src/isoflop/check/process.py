"""Fresh processes that start fast: children of a server that has imported PyTorch.

The server has imported everything a training step needs but never run an operation, so
no thread pool is forked, and each child's memory and crashes are its own. The first
optimizer of a process imports torch._dynamo, seconds and tens of megabytes that every
child would pay again; it counts as imported, like PyTorch itself.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

PRELOAD = ["isoflop.check.measure", "isoflop.train.loop", "torch._dynamo"]


def fork_server() -> ForkServerContext:
    """The context whose processes are measured in; its server starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context

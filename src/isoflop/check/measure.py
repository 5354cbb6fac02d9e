"""Train for a few steps in a process of its own: seconds per step and the memory peak.

A fresh process, because resident memory only tells of a step when nothing ran before it.
The step is the trainer's: a batch of bytes, forward, backward, clipping, fused AdamW.
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isoflop.arch.spec import Arch
from isoflop.check.kernels import point_of
from isoflop.check.process import fork_server
from isoflop.check.trace import trace
from isoflop.check.work import image_tokens
from isoflop.errors import Fault
from isoflop.model import Decoder, EncoderDecoder, Images, VisionDecoder, build
from isoflop.train.allocator import keep_freed_memory
from isoflop.train.data import Batches
from isoflop.train.optim import Optimizer, adamw
from isoflop.train.recipe import Recipe

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")

#: Steps under the profiler.
TRACED = 3

#: Free memory is probed with more blocks than it holds, each of the size that activations
#: have in the models for which a few free megabytes matter.
BYTES_BLOCK, BYTES_FILLED = 2**17, 2**26

#: Kernels timed between the steps, at sizes that every calibration has: one limited by
#: arithmetic, one by memory. Their seconds tell the machine's pace while it ran.
REFERENCE = {"linear": (256, 512, 512), "add": (2**19,)}

#: Steps run this long between two timings of the reference kernels.
SECONDS_BLOCK = 0.1

#: Fewer steps make no median.
FEWEST_STEPS = 3

#: Steps before the clock: the first makes the optimizer's state, the allocator settles.
WARM_UP = 6


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run of a few steps took.

    Attributes:
        seconds_steps: each step's wall time, warm-up left out.
        seconds_cpu: processor time of the same steps, all threads.
        bytes_peak: the largest resident memory less `bytes_baseline`.
        bytes_baseline: resident memory with PyTorch imported and nothing built.
        peak_source: how the peak was read.
        reference: median seconds of the kernels of `REFERENCE`, timed between the steps.
        rows: seconds of each operator by phase and path, where they were asked for.
    """

    seconds_steps: tuple[float, ...]
    seconds_cpu: float
    bytes_peak: int
    bytes_baseline: int
    peak_source: str
    reference: Mapping[str, float]
    rows: Mapping[str, float]

    @property
    def seconds_step(self) -> float:
        """The median step."""
        return statistics.median(self.seconds_steps)

    @property
    def quartiles(self) -> tuple[float, float]:
        ordered = sorted(self.seconds_steps)
        return ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4]


@dataclass(frozen=True, slots=True)
class Task:
    """What the child is told."""

    arch: Arch
    batch: int
    seq_len: int
    threads: int
    steps: int
    seconds_most: float
    traced: bool = False


def measure_steps(*tasks: Task) -> tuple[Measured, ...]:
    """Run tasks one after the other in one fresh process; the peak is that of all so far.

    Raises:
        Fault: the process ended without a result.
    """
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(tasks, sender), daemon=True)
    child.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = "it ended without a result (out of memory?)"
    child.join()
    if not isinstance(found, tuple):
        raise Fault(f"the measuring process failed: {found}")
    return found


def _child(tasks: Sequence[Task], sender: Connection) -> None:
    try:
        keep_freed_memory()
        peak_source, baseline = reset_peak(), bytes_resident()
        sender.send(tuple(run_steps(task, baseline, peak_source) for task in tasks))
    except Exception as error:  # noqa: BLE001 - the parent raises it as a Fault
        sender.send(f"{type(error).__name__}: {error}")
    finally:
        sender.close()


def measure_room(task: Task) -> int:
    """Bytes of tensors that a fresh process takes, after the task's steps, before it grows."""
    context = fork_server()
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child_of_room, args=(task, sender), daemon=True)
    child.start()
    sender.close()
    room: int = receiver.recv()
    child.join()
    return room


def _child_of_room(task: Task, sender: Connection) -> None:
    keep_freed_memory()
    warm_up(task)
    before = bytes_peak()
    blocks = [torch.ones(BYTES_BLOCK // 4) for _ in range(BYTES_FILLED // BYTES_BLOCK)]
    sender.send(len(blocks) * BYTES_BLOCK - (bytes_peak() - before))
    sender.close()


def run_steps(task: Task, baseline: int, peak_source: str) -> Measured:
    """Build, warm up, and time steps in this process."""
    step = warm_up(task)
    peak = bytes_peak()
    steps, reference = _alternate(step, task)
    rows = trace(step.model, step, TRACED) if task.traced else {}
    return Measured(*steps, peak - baseline, baseline, peak_source, reference, rows)


def warm_up(task: Task) -> Step:
    """Build the model and take its first steps; the peak of memory is behind them."""
    torch.set_num_threads(task.threads)
    step = Step(task)
    for number in range(WARM_UP):
        step(number)
    return step


def _alternate(step: Step, task: Task) -> tuple[tuple[tuple[float, ...], float], dict[str, float]]:
    """Seconds of each step and processor seconds per step; medians of the reference kernels.

    Blocks of steps alternate with a timing of each reference kernel, so that what a shared
    machine does to the one it does to the other.
    """
    points = [point_of(kernel, sizes) for kernel, sizes in REFERENCE.items()]
    seconds: list[float] = []
    reference: dict[str, list[float]] = defaultdict(list)
    began, cpu = time.perf_counter(), 0.0
    while len(seconds) < task.steps and (
        len(seconds) < FEWEST_STEPS or time.perf_counter() - began < task.seconds_most
    ):
        for point in points:
            for phase, value in point.bench.sample(point.copies).items():
                reference[point.kernel.name + phase].append(value)
        block, cpu_before = time.perf_counter(), time.process_time()
        while time.perf_counter() - block < SECONDS_BLOCK:
            start = time.perf_counter()
            step(WARM_UP + len(seconds))
            seconds.append(time.perf_counter() - start)
        cpu += time.process_time() - cpu_before
    medians = {name: statistics.median(values) for name, values in reference.items()}
    return (tuple(seconds), cpu / len(seconds)), medians


class Step:
    """The trainer's step on random bytes: what a batch says does not change what it costs.

    An encoder reads as many tokens as the decoder; each sequence begins with an image where
    there is a tower for it.
    """

    def __init__(self, task: Task) -> None:
        self.model = build(task.arch)
        recipe = Recipe(
            seq_len=task.seq_len, batch_size=task.batch, steps=10**9, learning_rate=1e-4
        )
        self.optimizer = Optimizer(adamw(self.model, recipe), recipe)
        generator = torch.Generator().manual_seed(0)
        n_bytes = (task.seq_len + 1) * task.batch * 4
        highest = min(task.arch.vocab_size, 256)
        text = torch.randint(highest, (n_bytes,), generator=generator).to(torch.uint8)
        self.batches = Batches(text, task.seq_len, task.batch, seed=0)
        self.before, self.after = _beside(self.model, task)

    def __call__(self, number: int) -> float:
        tokens_BT, targets_BT = self.batches(number)
        given: tuple[Any, ...] = *self.before, tokens_BT, targets_BT, *self.after
        loss: Tensor = self.model.loss(*given)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.optimizer.step(self.model.parameters(), number)
        return float(loss.detach())


def _beside(
    model: Decoder | EncoderDecoder, task: Task
) -> tuple[tuple[Tensor, ...], tuple[Images, ...]]:
    """What a model's loss reads before and after text and targets: a source, images."""
    if isinstance(model, EncoderDecoder):
        return (torch.zeros(task.batch, task.seq_len, dtype=torch.int64),), ()
    if isinstance(model, VisionDecoder):
        spec = model.vision.spec
        pixels = torch.rand(task.batch, spec.channels, spec.image, spec.image)
        is_image_T = torch.arange(task.seq_len) < image_tokens(model.arch)
        return (), (Images(pixels, is_image_T.expand(task.batch, -1)),)
    return (), ()


def reset_peak() -> str:
    """Forget the peak so far where the kernel lets us; says what the peak will be."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return "the whole process's peak: the kernel does not let it be reset"
    return "VmHWM, reset before the model was built"


def bytes_peak() -> int:
    """The largest resident memory of this process."""
    if _STATUS.exists():
        return _status("VmHWM")
    kilobyte = 1 if sys.platform == "darwin" else 1024  # getrusage's unit differs
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte


def bytes_resident() -> int:
    """The resident memory of this process now; its peak where the kernel does not say."""
    return _status("VmRSS") if _STATUS.exists() else bytes_peak()


def _status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def n_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

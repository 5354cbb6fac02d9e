"""The training loop: a run directory goes in, and comes out further on.

`train` starts a run or goes on with it; which, the directory says. Stopped by a signal, by
`stop_after`, or by kill -9, and started again, it gives the weights, moments and logged
losses of a run that was never stopped, bit for bit on the CPU. It holds because everything
random is a function of (seed, step), and because a run is refused where anything else that
decides bits has changed. On a GPU some kernels add in no fixed order, so bits may differ.
"""

from __future__ import annotations

import math
import platform
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from isoflop import __version__
from isoflop.arch import Arch
from isoflop.errors import InputError, Problem
from isoflop.model import build_decoder
from isoflop.model.experts import Dropless, record_routing, set_dispatch
from isoflop.model.support import decoder_problems
from isoflop.runs.run import Manifest, Run, Status, now, read_status
from isoflop.train import checkpoint
from isoflop.train.allocator import keep_freed_memory
from isoflop.train.balance import Balancer, balance_problems
from isoflop.train.compiled import as_written, compile_layers, compile_problems
from isoflop.train.data import (
    VOCAB_SIZE,
    Batches,
    ByteCorpus,
    derive_seed,
    validation_batches,
)
from isoflop.train.interrupt import Interrupt
from isoflop.train.optim import Optimizer, adamw, learning_rate, mup_problems, widening
from isoflop.train.recipe import Balance, Recipe

OnStep: TypeAlias = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A run as its directory tells it.

    Attributes:
        state: `finished`, `stopped`, or what else the status says; `reason` says why.
        loss, val_loss: the last ones, in nats per byte; None before the first.
        tokens: tokens trained on, over all steps and resumes.
        seconds_steps: seconds of each logged step, evaluations and saving left out.
        skipped: steps whose gradients were not finite.
        bytes_peak_rss: the largest resident memory of the process that wrote last.
        bytes_peak_device: the largest GPU memory allocated, None on a CPU.
    """

    run_dir: Path
    state: str
    reason: str
    step: int
    tokens: int
    loss: float | None
    val_loss: float | None
    seconds_steps: tuple[float, ...]
    skipped: int
    bytes_peak_rss: int | None
    bytes_peak_device: int | None

    @property
    def seconds_step(self) -> float | None:
        """The median step."""
        return statistics.median(self.seconds_steps) if self.seconds_steps else None


def train(
    recipe: Recipe,
    arch: Arch,
    corpus: ByteCorpus,
    run_dir: Path | str,
    *,
    flops_per_token: float | None = None,
    on_step: OnStep | None = None,
    stop_after: int | None = None,
    device: str = "cpu",
) -> TrainResult:
    """Train until the recipe's last step, `stop_after` steps in all, or a signal.

    A finished run is left as it is. `flops_per_token` (training, forward and backward) is
    only used to log FLOP/s; `on_step` is called with each step's row.

    Raises:
        InputError: the parts do not fit each other, or the directory holds another run.
        Diverged: ten steps in a row without finite gradients.
        WriteFailed: the disk is full; what was saved is intact.
    """
    _check(recipe, arch, corpus, device)
    with (
        _settings(recipe, device),
        Run.create(run_dir, describe(recipe, arch, corpus, device)) as run,
        Interrupt() as interrupt,
    ):
        if read_status(run.path).state == "finished":
            return read_result(run_dir)
        trainer = Trainer(run, recipe, arch, corpus, device=device, flops_per_token=flops_per_token)
        notes = trainer.resume()
        run.write_status(Status("running", details={"step": trainer.step, "notes": notes}))
        last = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
        while trainer.step < last and interrupt.signal is None:
            row = trainer.advance()
            if on_step is not None:
                on_step(row)
        trainer.save()
        finished = trainer.step == recipe.steps
        stopped = interrupt.signal.name if interrupt.signal else f"stop_after={stop_after}"
        details = {"step": trainer.step, "notes": notes, **_peaks(device)}
        run.write_status(
            Status("finished", "", details) if finished else Status("stopped", stopped, details)
        )
    return read_result(run_dir)


class Trainer:
    """One run in progress: model, optimizer, and how many steps are done."""

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        arch: Arch,
        corpus: ByteCorpus,
        *,
        device: str,
        flops_per_token: float | None,
    ) -> None:
        self.run, self.recipe, self.device = run, recipe, device
        self.flops_per_token = flops_per_token
        self.balancer = Balancer(recipe.balance or Balance())
        self.model = build_decoder(
            arch,
            device=device,
            seed=recipe.seed,
            init="gpt2" if recipe.mup_base_width is None else "mup",
            dispatch=self.balancer.dispatch,
        )
        if recipe.compile:
            compile_layers(self.model)
        self.optimizer = Optimizer(adamw(self.model, recipe, widening(recipe, arch)), recipe)
        self.batches = _training(recipe, corpus)
        self.validation = _validation(recipe, corpus)
        self.step = 0
        self._saved: int | None = None

    def resume(self) -> list[str]:
        """Go to the newest whole checkpoint; returns what was wrong with newer ones.

        Raises:
            InputError: checkpoints are there, but none is whole, or it is another run's.
        """
        checkpoint.clean(self.run.path)
        found = checkpoint.latest(self.run.path)
        notes = list(found.damaged.values())
        if found.checkpoint is None:
            if notes:
                hint = "restore one, or start again in a new directory"
                problems = [Problem("checkpoint", note, "is whole", hint) for note in notes]
                raise InputError(str(self.run.path), problems)
            return notes
        if found.checkpoint.run != self.run.manifest.fingerprint:
            problem = Problem("checkpoint", found.checkpoint.path.name, "belongs to this run")
            raise InputError(str(self.run.path), [problem])
        checkpoint.load(found.checkpoint, self.model, self.optimizer.adamw)
        checkpoint.set_aside(found.damaged)
        self.step = self._saved = found.checkpoint.step
        self.optimizer.skipped_in_a_row = found.checkpoint.counters["skipped_in_a_row"]
        return notes

    def advance(self) -> dict[str, Any]:
        """One step, with the evaluation, log line and checkpoint that follow it."""
        recipe = self.recipe
        row = self._train_step()
        last = self.step == recipe.steps
        if last or _due(self.step, recipe.eval_every):
            row["val_loss"] = _plain(self.evaluate())
        if last or "val_loss" in row or "skipped" in row or _due(self.step, recipe.log_every):
            self.run.log(row)
        if not last and _due(self.step, recipe.checkpoint_every):
            self.save()
        return row

    def evaluate(self) -> float:
        """Mean cross entropy on the validation bytes, nats per byte; experts serve all tokens."""
        self.model.eval()
        set_dispatch(self.model, Dropless())
        total, n_sequences = 0.0, 0
        with torch.no_grad(), self._precision(), as_written(self.recipe):
            for tokens_BT, targets_BT in self.validation:
                loss = self._loss(tokens_BT, targets_BT)
                total += float(loss) * len(tokens_BT)
                n_sequences += len(tokens_BT)
        self.model.train()
        set_dispatch(self.model, self.balancer.dispatch)
        return total / n_sequences

    def save(self) -> None:
        """Write a checkpoint of the present step unless it has been written."""
        if self._saved == self.step:
            return
        self.run.sync()
        checkpoint.save(
            self.run.path,
            step=self.step,
            run=self.run.manifest.fingerprint,
            model=self.model,
            optimizer=self.optimizer.adamw,
            counters={"skipped_in_a_row": self.optimizer.skipped_in_a_row},
        )
        self._saved = self.step

    def _train_step(self) -> dict[str, Any]:
        step, recipe = self.step, self.recipe
        began = time.perf_counter()
        torch.manual_seed(derive_seed(recipe.seed, "step", step))  # dropout, routing noise
        with self._precision(), record_routing(self.model) as routings:
            loss = self._loss(*self.batches(step))
        losses = self.balancer.losses(routings)
        (loss + self.balancer.added(losses)).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        norm = self.optimizer.step(self.model.parameters(), step)
        if math.isfinite(norm):
            self.balancer.correct(self.model, routings)
        told = self.balancer.row(routings, losses)
        value = loss.item()  # waits for the device, so the clock below is honest
        seconds = time.perf_counter() - began
        self.step += 1
        row: dict[str, Any] = {
            "step": self.step,
            "loss": _plain(value),
            "lr": learning_rate(step, recipe),
            "grad_norm": _plain(norm),
            "tokens": self.step * recipe.tokens_per_step,
            "seconds": seconds,
            **{name: _plain(number) for name, number in told.items()},
        }
        if self.flops_per_token is not None:
            row["flops_per_second"] = self.flops_per_token * recipe.tokens_per_step / seconds
        return row if math.isfinite(norm) else row | {"skipped": True}

    def _loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model.loss(tokens_BT.to(self.device), targets_BT.to(self.device))

    def _precision(self) -> torch.autocast:
        kind = torch.device(self.device).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.recipe.precision == "bf16")


def read_result(run_dir: Path | str) -> TrainResult:
    """What a run's directory says of it, whether it is done or not."""
    record = Run.read(run_dir)
    rows, details = record.metrics, record.status.details
    losses = [row["loss"] for row in rows if row.get("loss") is not None]
    val_losses = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    return TrainResult(
        run_dir=record.path,
        state=record.status.state,
        reason=record.status.reason,
        step=rows[-1]["step"] if rows else 0,
        tokens=rows[-1]["tokens"] if rows else 0,
        loss=losses[-1] if losses else None,
        val_loss=val_losses[-1] if val_losses else None,
        seconds_steps=tuple(row["seconds"] for row in rows),
        skipped=sum("skipped" in row for row in rows),
        bytes_peak_rss=details.get("bytes_peak_rss"),
        bytes_peak_device=details.get("bytes_peak_device"),
    )


def describe(recipe: Recipe, arch: Arch, corpus: ByteCorpus, device: str) -> Manifest:
    """What a run is, as its manifest keeps it."""
    cuda = torch.device(device).type == "cuda"
    chip = torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability()
    identity = {
        "recipe": recipe.to_json(),
        "arch": summarize(arch),
        "data": corpus.summary(),
        "torch": torch.__version__,
        "device": f"{torch.device(device).type} {chip}",
    }
    about = {
        "isoflop": __version__,
        "python": sys.version.split()[0],
        "machine": f"{platform.system()} {platform.machine()}",
        "host": socket.gethostname(),
        "started": now(),
    }
    return Manifest(identity, about)


def summarize(arch: Arch) -> dict[str, Any]:
    """An arch in full, equal layers once, and the order of the layers."""
    rest = {name: value for name, value in asdict(arch).items() if name != "layers"}
    kinds = {name: asdict(layer) for name, layer in arch.kinds.items()}
    return rest | {
        "n_layers": arch.n_layers,
        "kinds": kinds,
        "layers": [x.name for x in arch.layers],
    }


def _check(recipe: Recipe, arch: Arch, corpus: ByteCorpus, device: str) -> None:
    """Everything that can be known to be wrong before the first step, all at once."""
    problems = [*decoder_problems(arch), *(compile_problems(device) if recipe.compile else [])]
    problems += [*balance_problems(recipe.balance, arch), *mup_problems(recipe, arch)]
    if arch.vocab_size < VOCAB_SIZE:
        problems.append(
            Problem("vocab_size", arch.vocab_size, f"is at least {VOCAB_SIZE}, the bytes")
        )
    if recipe.seq_len > arch.max_seq_len:
        rule = f"is at most the arch's max_seq_len={arch.max_seq_len}"
        problems.append(Problem("seq_len", recipe.seq_len, rule))
    for part in (_training, _validation):
        try:
            part(recipe, corpus)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError("recipe", problems)


def _training(recipe: Recipe, corpus: ByteCorpus) -> Batches:
    return Batches(corpus.train, recipe.seq_len, recipe.batch_size, recipe.seed)


def _validation(recipe: Recipe, corpus: ByteCorpus) -> list[tuple[Tensor, Tensor]]:
    return validation_batches(
        corpus,
        eval_bytes=recipe.eval_bytes,
        seq_len=recipe.seq_len,
        batch_size=recipe.batch_size,
    )


@contextmanager
def _settings(recipe: Recipe, device: str) -> Iterator[None]:
    """The recipe's thread count, and a generator of its own; both given back afterwards."""
    keep_freed_memory()  # for the life of the process: the next run wants it too
    threads = torch.get_num_threads()
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    torch.set_num_threads(recipe.threads)
    try:
        with torch.random.fork_rng(devices=cuda):
            yield
    finally:
        torch.set_num_threads(threads)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _peaks(device: str) -> dict[str, int | None]:
    kilobyte = 1 if sys.platform == "darwin" else 1024  # getrusage's unit differs
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobyte
    cuda = torch.device(device).type == "cuda"
    return {
        "bytes_peak_rss": rss,
        "bytes_peak_device": torch.cuda.max_memory_allocated(device) if cuda else None,
    }

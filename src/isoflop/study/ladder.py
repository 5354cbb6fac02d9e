"""A ladder: small runs over a grid of sizes and tokens, and one larger run held out.

The grid varies parameters and tokens apart from each other, which a law needs to tell
their exponents apart; the target is larger than every rung in both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from isoflop.arch import Arch, llama
from isoflop.count import Workload, flops_training, params
from isoflop.errors import Infeasible
from isoflop.quantity import Node
from isoflop.train.recipe import Recipe

#: Seconds or bytes of one training step of an arch at a workload.
Price: TypeAlias = Callable[[Arch, Workload], Node]

BATCH, SEQ_LEN = 8, 64
#: d_model, layers, heads of the rungs, about 2x in parameters from one to the next, and of
#: the target, another 2x. Heads of 16: vectors of 16 numbers are what processors like.
SHAPES = ((32, 2, 2), (48, 2, 3), (64, 2, 4))
TARGET_SHAPE = (96, 2, 6)
#: Tokens of the rungs, and of the target, as multiples of the shortest run's.
TOKENS, TARGET_TOKENS = (1, 2, 4), 6
#: Shorter runs than this are all warm-up and say nothing of a law.
STEPS_LEAST = 32
#: Learning rate times d_model.
LEARNING_RATE_WIDTH = 0.3
#: Validation bytes per evaluation: the same ones for every run, so their noise is shared.
BYTES_EVAL = 131_072


@dataclass(frozen=True, slots=True)
class Rung:
    """One run of a ladder, and what it is predicted to take."""

    name: str
    arch: Arch
    recipe: Recipe
    seconds: Node
    bytes_peak: Node

    @property
    def workload(self) -> Workload:
        return Workload.train(self.recipe.batch_size, self.recipe.seq_len)

    @property
    def params(self) -> int:
        return int(params(self.arch).value)

    @property
    def tokens(self) -> int:
        return self.recipe.steps * self.recipe.tokens_per_step

    @property
    def flops(self) -> int:
        """Training FLOPs of the whole run, counted, not 6 N D."""
        return int(flops_training(self.arch, self.workload).value) * self.recipe.steps

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "params": self.params,
            "tokens": self.tokens,
            "flops": self.flops,
            "steps": self.recipe.steps,
        }


@dataclass(frozen=True, slots=True)
class Ladder:
    """The rungs, smallest first, and the run that is held out."""

    rungs: tuple[Rung, ...]
    target: Rung

    @property
    def seconds(self) -> float:
        """Predicted seconds of all training steps."""
        return sum(float(r.seconds.value) for r in (*self.rungs, self.target))


def plan_ladder(seconds: float, threads: int, price_time: Price, price_memory: Price) -> Ladder:
    """The longest ladder whose predicted training time fits into `seconds`.

    Raises:
        Infeasible: not even the shortest useful ladder fits.
    """
    work = Workload.train(BATCH, SEQ_LEN)
    costs = {s: float(price_time(shape(*s), work).value) for s in (*SHAPES, TARGET_SHAPE)}
    unit = sum(costs[s] for s in SHAPES) * sum(TOKENS) + costs[TARGET_SHAPE] * TARGET_TOKENS
    steps = int(seconds / unit)
    if steps < STEPS_LEAST:
        raise Infeasible(
            f"a ladder needs {unit * STEPS_LEAST:.0f} s of training on this machine, "
            f"{seconds:.0f} s are left; give it more time"
        )

    def rung(size: tuple[int, int, int], times: int) -> Rung:
        arch = shape(*size)
        recipe = make_recipe(arch, steps * times, threads)
        step = price_time(arch, work)
        return Rung(
            f"{arch.name}-t{times}",
            arch,
            recipe,
            repeat(step, recipe.steps),
            price_memory(arch, work),
        )

    return Ladder(
        tuple(rung(size, times) for times in TOKENS for size in SHAPES),
        rung(TARGET_SHAPE, TARGET_TOKENS),
    )


def shorten(rung: Rung, steps: int) -> Rung:
    """The same run with fewer steps; its predictions follow."""
    step = rung.seconds.total / rung.recipe.steps
    recipe = make_recipe(rung.arch, steps, rung.recipe.threads)
    seconds = Node("seconds_run", "seconds", step * steps, (), source=rung.seconds.source)
    return replace(rung, recipe=recipe, seconds=seconds)


def repeat(step: Node, steps: int) -> Node:
    """The seconds of a run from those of its step."""
    return Node(
        "seconds_run", "seconds", step.total * steps, (), basis=step.basis, source="steps x step"
    )


def shape(d_model: int, n_layers: int, n_heads: int) -> Arch:
    """A Llama in small: bytes as tokens, feed-forward 8/3 wide, tied head."""
    return llama(
        f"d{d_model}",
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=-(-8 * d_model // 3 // 8) * 8,
        vocab_size=256,
        max_seq_len=SEQ_LEN,
        tied=True,
    )


def make_recipe(arch: Arch, steps: int, threads: int) -> Recipe:
    """The same recipe for every size, but for the learning rate.

    It falls with width as muP has it for hidden weights (Yang 2022, 2203.03466, table 3);
    the constant was the best of few tried over four widths (docs/log.md), not per run.
    """
    return Recipe(
        seq_len=SEQ_LEN,
        batch_size=BATCH,
        steps=steps,
        learning_rate=LEARNING_RATE_WIDTH / arch.d_model,
        warmup_steps=steps // 20,
        threads=threads,
        eval_bytes=BYTES_EVAL,
    )

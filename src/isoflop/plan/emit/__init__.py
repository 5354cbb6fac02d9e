"""A plan in the words of the trainers that run it.

Each writer says what the plan fixes: the model's shape, sizes of the groups, batches, precision,
what is run again. Data and the schedule of the learning rate are not part of a plan. What a
trainer cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from isoflop.errors import InputError, Problem, UnknownName
from isoflop.plan.emit.megatron import megatron, torchrun
from isoflop.plan.emit.recipe import recipe
from isoflop.plan.emit.torchtitan import torchtitan
from isoflop.plan.training.plan import TrainPlan

__all__ = ["KINDS", "emitted"]

#: The trainers that a plan can be written for.
KINDS: Mapping[str, Callable[[TrainPlan, float | None], str]] = {
    "recipe": recipe,
    "torchrun": torchrun,
    "megatron": megatron,
    "torchtitan": torchtitan,
}


def emitted(kind: str, plan: TrainPlan, learning_rate: float | None = None) -> str:
    """The plan as text for one trainer: a name of `KINDS`.

    Without a `learning_rate` the text has a comment on what published laws would give.

    Raises:
        UnknownName: no such trainer.
        InputError: what the trainer has no words for; everything is listed.

    >>> from isoflop.arch import gpt
    >>> from isoflop.hardware import parse_cluster
    >>> from isoflop.plan import Layout, plan_train
    >>> small = gpt("gpt2", d_model=768, n_layers=12, n_heads=12, vocab_size=50257, max_seq_len=1024)
    >>> plan = plan_train(small, 10**9, parse_cluster("8xa100-sxm-80gb"), seq_len=1024,
    ...                   global_batch=64, layout=Layout(dp=8, micro_batch=4, zero=1))
    >>> "--hidden-size 768" in emitted("megatron", plan)
    True
    """
    if kind not in KINDS:
        raise UnknownName("trainer", kind, KINDS, hint=f"choose one of {', '.join(KINDS)}")
    if learning_rate is not None and not 0 < learning_rate < float("inf"):
        rule = "is a finite number above 0"
        raise InputError("plan train", [Problem("learning_rate", learning_rate, rule)])
    return KINDS[kind](plan, learning_rate)

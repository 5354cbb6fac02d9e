"""What a training run is told: one frozen value, read from TOML or built in Python."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from isoflop.arch.foreign import parse_toml, read_file
from isoflop.arch.rules import Rules, repr_of
from isoflop.errors import InputError, Problem, nearest

Precision: TypeAlias = Literal["fp32", "bf16"]

#: The name of the default corpus, `ByteCorpus.python_library`.
PYTHON_LIBRARY = "python-library"

#: No machine has more cores; far more threads end the process without a word.
THREADS_MOST = 1024

#: A step's move of DeepSeek-V3's score corrections (2412.19437, section 4.2).
BIAS_UPDATE_RATE = 0.001


@dataclass(frozen=True, slots=True)
class Balance:
    """How the experts of a model are kept evenly loaded while it trains.

    Attributes:
        aux_loss_weight: times the load-balancing loss of each layer; 0.01 in Fedus 2021
            (2101.03961, section 2.2), 0.0001 per sequence in DeepSeek-V3 (2412.19437, section 4.2).
        aux_loss_per: what it is even over, a `batch` (Fedus) or each `sequence` (DeepSeek-V3).
        z_loss_weight: times the router z-loss of each layer; 0.001 in Zoph 2022 (2202.08906,
            section 3.2).
        bias_update_rate: what a step adds to or takes from the corrections of scores, in models
            that have them; `BIAS_UPDATE_RATE` there when not given.
        capacity_factor: an expert's room in training, in even shares; choices beyond it are
            dropped. Without one, and in evaluations, all are served.

    Raises:
        InputError: any rule broken; all broken rules are listed.
    """

    aux_loss_weight: float = 0.0
    aux_loss_per: Literal["batch", "sequence"] = "batch"
    z_loss_weight: float = 0.0
    bias_update_rate: float | None = None
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        rules = Rules(self, where="balance")
        rules.real("aux_loss_weight", least=0).real("z_loss_weight", least=0)
        rules.one_of("aux_loss_per", ("batch", "sequence"))
        if self.bias_update_rate is not None:
            rules.real("bias_update_rate", least=0)
        if self.capacity_factor is not None:
            rules.real("capacity_factor", above=0)
        rules.close()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: with the arch, the data and the machine's kind it decides every bit.

    Attributes:
        model: a zoo name, a path, or a spec as a table; whoever reads the recipe resolves it.
        data: `python-library`, or the path of a text file or folder.
        batch_size: sequences per step, over all workers.
        warmup_steps: steps before the full learning rate.
        min_lr_ratio: the last step's learning rate as a share of the full one.
        grad_clip: the largest global norm a gradient is applied with.
        threads: CPU threads; another number gives other bits, so it belongs to the recipe.
        precision: `bf16` computes in bfloat16 by autocast and keeps weights in fp32.
        mup_base_width: train in muP, `learning_rate` being that of a model of this d_model (Yang
            2022, 2203.03466, table 8); weights are drawn and rates set by `model.initial` and
            `optim.adamw`.
        balance: for models of experts, how they are kept evenly loaded; `Balance()` when not given.
        compile: let torch.compile make kernels of the layers; needs a C++ compiler on a CPU.
        eval_every: steps between evaluations; 0 means only after the last step.
        eval_bytes: validation bytes per evaluation, rounded down to whole sequences.
        checkpoint_every: steps between checkpoints; 0 means only at the end.

    Raises:
        InputError: any rule broken; all broken rules are listed.
    """

    seq_len: int
    batch_size: int
    steps: int
    learning_rate: float
    model: str | Mapping[str, Any] = ""
    data: str = PYTHON_LIBRARY
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    mup_base_width: int | None = None
    balance: Balance | None = None
    seed: int = 0
    threads: int = 1
    precision: Precision = "fp32"
    compile: bool = False
    eval_every: int = 0
    eval_bytes: int = 65_536
    checkpoint_every: int = 0
    log_every: int = 1

    def __post_init__(self) -> None:
        rules = Rules(self, where="recipe")
        for name in ("seq_len", "batch_size", "steps", "threads", "eval_bytes", "log_every"):
            rules.size(name)
        for name in ("warmup_steps", "seed", "eval_every", "checkpoint_every"):
            rules.size(name, least=0)
        rules.real("learning_rate", above=0).real("min_lr_ratio", least=0)
        rules.real("weight_decay", least=0).real("grad_clip", above=0)
        rules.one_of("precision", Precision)
        rules.must("compile", "is true or false", isinstance(self.compile, bool))
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        rules.must("betas", "is two numbers from 0 up to, not including, 1",
                   pair and all(_is_share(beta) for beta in self.betas))  # fmt: skip
        rules.must("data", "is a path or python-library", isinstance(self.data, str) and self.data != "",
                   value=repr_of(self.data))  # fmt: skip
        rules.must("model", "is a name, a path, or a table",
                   isinstance(self.model, (str, Mapping)))  # fmt: skip
        rules.must("balance", "is a table",
                   self.balance is None or isinstance(self.balance, Balance))  # fmt: skip
        if self.mup_base_width is not None:
            rules.size("mup_base_width")
        if not rules.broken:
            rules.must("threads", f"is at most {THREADS_MOST}", self.threads <= THREADS_MOST)
            rules.must("min_lr_ratio", "is at most 1", self.min_lr_ratio <= 1)
            rules.must("warmup_steps", f"is less than steps={self.steps}",
                       self.warmup_steps < self.steps)  # fmt: skip
            rules.must("eval_bytes", f"is at least seq_len={self.seq_len}",
                       self.eval_bytes >= self.seq_len)  # fmt: skip
        rules.close()

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_recipe(path: Path | str) -> Recipe:
    """A recipe from a TOML file: the fields of `Recipe` at the top level.

    Raises:
        InputError: unreadable, not TOML, or wrong fields; all of them are listed.
    """
    return parse_recipe(parse_toml(read_file(Path(path)), str(path)), where=str(path))


def parse_recipe(table: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from parsed values.

    >>> parse_recipe({"seq_len": 8, "batch_size": 2, "steps": 4, "learning_rat": 0.1})
    Traceback (most recent call last):
    isoflop.errors.InputError: recipe: learning_rat=0.1: must be a field of a recipe
    (did you mean learning_rate?)
    recipe: learning_rate is missing: must be given
    """
    given, problems = _known(Recipe, table, "a recipe")
    missing = [f.name for f in fields(Recipe) if _required(f) and f.name not in table]
    problems += [Problem(name, "missing", "is given") for name in missing]
    if isinstance(given.get("betas"), list):
        given["betas"] = tuple(given["betas"])
    if isinstance(given.get("balance"), Mapping):
        given["balance"], wrong = _parse_balance(given["balance"])
        problems += wrong
    if missing:
        raise InputError(where, problems)
    try:
        recipe = Recipe(**given)
    except InputError as error:
        raise InputError(where, [*problems, *error.problems]) from None
    if problems:
        raise InputError(where, problems)
    return recipe


def _parse_balance(table: Mapping[str, Any]) -> tuple[Balance | None, list[Problem]]:
    """The balance of a recipe, and what is wrong with it."""
    given, problems = _known(Balance, table, "balance")
    balance = None
    try:
        balance = Balance(**given)
    except InputError as error:
        problems += error.problems
    return balance, [replace(problem, field=f"balance.{problem.field}") for problem in problems]


def _known(
    kind: type[Recipe | Balance], table: Mapping[str, Any], name: str
) -> tuple[dict[str, Any], list[Problem]]:
    """What of a table are fields of `kind`, and a problem for each of the others."""
    known = {field.name for field in fields(kind)}
    problems = [
        Problem(key, value, f"is a field of {name}", _did_you_mean(key, known))
        for key, value in table.items()
        if key not in known
    ]
    return {key: value for key, value in table.items() if key in known}, problems


def _did_you_mean(key: str, known: Collection[str]) -> str:
    near = nearest(key, known)
    return f"did you mean {' or '.join(near)}?" if near else ""


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _is_share(value: object) -> bool:
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return real and math.isfinite(value) and 0 <= value < 1  # type: ignore[arg-type,operator]  # `real` has checked it

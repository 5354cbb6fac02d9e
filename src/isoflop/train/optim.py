"""The optimizer's side of a step: AdamW, the learning rate, and gradients that are fit to use.

AdamW is fused on every device: on a CPU that took 7.3 ms where the loop took 32.1 and
foreach 42.3 (10 M parameters, one thread, torch 2.13).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from isoflop.errors import Infeasible
from isoflop.model.parts import LayerNormModule, RmsNormModule
from isoflop.model.relative_bias import RelativeBiasModule
from isoflop.train.recipe import Recipe

#: So many steps in a row without a finite gradient end a run.
MOST_SKIPPED_IN_A_ROW = 10


class Diverged(Infeasible):
    """The gradients stopped being numbers."""


def adamw(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW with weight decay on matrices alone, those of embeddings, head and experts included.

    Norms and biases are left alone whatever their shape: experts have a bias each, and a norm
    of each head has a vector each.
    """
    decaying = {id(weight) for weight in _matrices(model)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if id(p) in decaying],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def _matrices(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if not isinstance(module, (LayerNormModule, RmsNormModule, RelativeBiasModule)):
            named = module.named_parameters(recurse=False)
            yield from (weight for name, weight in named if name != "bias" and weight.ndim >= 2)


def learning_rate(step: int, recipe: Recipe) -> float:
    """The rate of step 0 .. steps - 1: a linear rise, then half a cosine to the floor.

    Step `warmup_steps` has the full rate, the last step min_lr_ratio of it.

    >>> recipe = Recipe(seq_len=8, batch_size=1, steps=11, learning_rate=1.0, warmup_steps=2,
    ...                 min_lr_ratio=0.1)
    >>> [round(learning_rate(step, recipe), 3) for step in (0, 1, 2, 6, 10)]
    [0.333, 0.667, 1.0, 0.55, 0.1]
    """
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / (recipe.warmup_steps + 1)
    falling = max(recipe.steps - 1 - recipe.warmup_steps, 1)
    done = min((step - recipe.warmup_steps) / falling, 1.0)
    floor = recipe.min_lr_ratio * recipe.learning_rate
    return floor + (recipe.learning_rate - floor) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(slots=True)
class Optimizer:
    """AdamW that refuses gradients that are not finite.

    `skipped_in_a_row` is the only state beside AdamW's own.
    """

    adamw: AdamW
    recipe: Recipe
    skipped_in_a_row: int = 0

    def step(self, parameters: Iterable[Tensor], step: int) -> float:
        """Clip and apply the gradients of `step`; returns their norm before clipping.

        A norm that is not finite leaves weights and moments untouched.

        Raises:
            Diverged: the tenth such step in a row.
        """
        held = [p for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in held if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self._skip(step)
        else:
            self.skipped_in_a_row = 0
            if norm > self.recipe.grad_clip:
                nn.utils.clip_grads_with_norm_(held, self.recipe.grad_clip, norm)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate(step, self.recipe)
            self.adamw.step()
        self.adamw.zero_grad()
        return float(norm)

    def _skip(self, step: int) -> None:
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            first = step + 1 - self.skipped_in_a_row
            raise Diverged(
                f"the gradients of {self.skipped_in_a_row} steps in a row, {first} to {step}, are "
                "not finite; the last checkpoint before is kept: lower learning_rate, lengthen "
                "warmup_steps, or train in fp32"
            )

"""Training: the same bits after any interruption, or a clear refusal.

recipe.py says what to do; data.py gives the bytes and draws batches without state;
optim.py steps; checkpoint.py saves what a damaged disk cannot silently change; loop.py
puts them together; markov.py is the baseline to beat. Only recipe.py loads without torch.
"""

from isoflop.train.recipe import Balance, Recipe, parse_recipe, read_recipe

__all__ = ["Balance", "Recipe", "parse_recipe", "read_recipe"]

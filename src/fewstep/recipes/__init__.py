"""Named experiments: each with every setting as a field, by default exactly as in the paper."""

from fewstep.recipes.base import Recipe
from fewstep.recipes.table import RECIPES

__all__ = ["RECIPES", "Recipe"]

"""The recipes by name."""

from __future__ import annotations

from fewstep.recipes.base import Recipe
from fewstep.recipes.characters import GlyphsRecipe, OmniglotRecipe
from fewstep.recipes.pictures import ImageFolderRecipe, MiniImageNetRecipe
from fewstep.recipes.sinusoid import SinusoidRecipe

RECIPES: dict[str, Recipe] = {
    "sinusoid": SinusoidRecipe(),
    "glyphs-5way-1shot": GlyphsRecipe(),
    "omniglot-5way-1shot": OmniglotRecipe(),
    "omniglot-5way-5shot": OmniglotRecipe(shots=5),
    "omniglot-20way-1shot": OmniglotRecipe(ways=20, meta_batch=16, inner_lr=0.1, inner_steps=5),
    "omniglot-20way-5shot": OmniglotRecipe(ways=20, shots=5, meta_batch=16, inner_lr=0.1, inner_steps=5),
    "omniglot-5way-1shot-mlp": OmniglotRecipe(network="mlp"),
    "omniglot-5way-5shot-mlp": OmniglotRecipe(network="mlp", shots=5),
    "miniimagenet-5way-1shot": MiniImageNetRecipe(),
    "miniimagenet-5way-5shot": MiniImageNetRecipe(shots=5, meta_batch=2, clip=10 / 3),
    "image-folder": ImageFolderRecipe(),
}

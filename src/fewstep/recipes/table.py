"""The recipes by name."""

from __future__ import annotations

from dataclasses import replace

from fewstep.recipes.base import Recipe
from fewstep.recipes.characters import GlyphsRecipe, OmniglotRecipe
from fewstep.recipes.datasets import COLLECTIONS, DatasetRecipe, MiniImageNetRecipe
from fewstep.recipes.pictures import ImageFolderRecipe
from fewstep.recipes.sinusoid import SinusoidRecipe
from fewstep.recipes.worlds import BanditRecipe, MetaWorldRecipe, NavigationRecipe, RunnerRecipe, TabularRecipe


def _omniglot_fast() -> OmniglotRecipe:
    """What learns soonest, in all four cells: UNICORN-MAML's start, whose first step moves the head alone."""
    return OmniglotRecipe(ways=20, algorithm="unicorn_maml", adapt="head.*", iterations=100_000, meta_batch=4,
                          schedule="cosine", test_steps=1)  # fmt: skip


def _of_authors(kind: type[DatasetRecipe], shots: int) -> DatasetRecipe:
    return kind(shots=shots, meta_batch={1: 4, 5: 2}[shots], clip=10 * shots / 15)


# As MAML++'s own configurations, whose inner rates and clips are of the mean cross-entropy, ours of N times it. Theirs
# end the cosine at 1e-5, and their norms have a scale too.
def _omniglot_pp(ways: int, shots: int) -> OmniglotRecipe:
    return OmniglotRecipe(ways=ways, shots=shots, queries=1, algorithm="maml_pp", algorithm_options="anneal=5000",
                          schedule="cosine", iterations=50_000, meta_batch=8, inner_lr=0.1 / ways, inner_steps=5,
                          test_steps=5, pool=True)  # fmt: skip


def _mini_imagenet_pp(shots: int) -> MiniImageNetRecipe:
    return MiniImageNetRecipe(shots=shots, test_queries=15, filters=48, algorithm="maml_pp",
                              algorithm_options="anneal=7500", iterations=50_000, meta_batch=2, inner_lr=0.01 / 5,
                              test_steps=5, clip=10.0 * 5)  # fmt: skip


def _mini_imagenet_unicorn(shots: int) -> MiniImageNetRecipe:
    """A residual net trained on all classes, then first-order UNICORN-MAML, as its authors' commands but for Adam."""
    steps = {1: 5, 5: 20}[shots]
    return MiniImageNetRecipe(shots=shots, test_queries=15, network="resnet12", filters=64, warm_up=60_000,
                              augment=True, algorithm="unicorn_maml", derivative="none", iterations=10_000,
                              meta_lr=1e-4, meta_batch=1, inner_lr=0.1 / 5, inner_steps=steps, test_steps=steps,
                              clip=None)  # fmt: skip


def _mini_imagenet_best(shots: int) -> MiniImageNetRecipe:
    """What pays together, on the paper's four layers: wider, augmented, trained on all classes first, many steps."""
    return MiniImageNetRecipe(shots=shots, test_queries=15, filters=128, warm_up=60_000, augment=True,
                              algorithm="unicorn_maml", iterations=20_000, schedule="cosine", meta_lr=1e-4,
                              meta_batch=2, inner_lr=0.05 / 5, inner_steps=15, test_steps=15, clip=None)  # fmt: skip


def _mini_imagenet_fast(shots: int) -> MiniImageNetRecipe:
    """What learns soonest, on the paper's net: first all classes, then UNICORN-MAML's start on small batches.

    From one example it goes by cosines, as the warm-up does, which larger steps of meta-training would undo.
    """
    recipe = MiniImageNetRecipe(shots=shots, queries=5, test_queries=15, warm_up=13_000, algorithm="unicorn_maml",
                                iterations=800, schedule="cosine", meta_batch=2, test_steps=5,
                                clip=2.0, check_every=200, validation_episodes=100)  # fmt: skip
    return replace(recipe, rms_norm=True, warm_up=14_000, meta_lr=1e-4, iterations=600) if shots == 1 else recipe


RECIPES: dict[str, Recipe] = {
    "sinusoid": SinusoidRecipe(),
    "glyphs-5way-1shot": GlyphsRecipe(),
    "omniglot-5way-1shot": OmniglotRecipe(),
    "omniglot-fast": _omniglot_fast(),
    "omniglot-5way-5shot": OmniglotRecipe(shots=5),
    "omniglot-20way-1shot": OmniglotRecipe(ways=20, meta_batch=16, inner_lr=0.1, inner_steps=5),
    "omniglot-20way-5shot": OmniglotRecipe(ways=20, shots=5, meta_batch=16, inner_lr=0.1, inner_steps=5),
    "omniglot-5way-1shot-mlp": OmniglotRecipe(network="mlp"),
    "omniglot-5way-5shot-mlp": OmniglotRecipe(network="mlp", shots=5),
    "omniglot-5way-1shot-context": OmniglotRecipe(network="context"),
    "omniglot-5way-5shot-context": OmniglotRecipe(network="context", shots=5),
    **{f"{name}-5way-{shots}shot": _of_authors(kind, shots) for name, kind in COLLECTIONS.items() for shots in (1, 5)},
    **{
        f"miniimagenet-5way-{shots}shot-first-order": replace(_of_authors(MiniImageNetRecipe, shots), derivative="none")
        for shots in (1, 5)
    },
    **{f"omniglot-{ways}way-{shots}shot-maml-pp": _omniglot_pp(ways, shots) for ways in (5, 20) for shots in (1, 5)},
    **{f"miniimagenet-5way-{shots}shot-maml-pp": _mini_imagenet_pp(shots) for shots in (1, 5)},
    **{f"miniimagenet-5way-{shots}shot-unicorn": _mini_imagenet_unicorn(shots) for shots in (1, 5)},
    **{f"miniimagenet-5way-{shots}shot-fast": _mini_imagenet_fast(shots) for shots in (1, 5)},
    **{f"miniimagenet-5way-{shots}shot-best": _mini_imagenet_best(shots) for shots in (1, 5)},
    "image-folder": ImageFolderRecipe(),
    "navigation": NavigationRecipe(),
    "bandits": BanditRecipe(),
    "tabular-mdp": TabularRecipe(),
    "half-cheetah-velocity": RunnerRecipe(),
    "half-cheetah-direction": RunnerRecipe(task="direction", delta=0.02),
    # What learns soonest: the curvature of LVC, a larger region, advantages of less variance.
    "half-cheetah-velocity-fast": RunnerRecipe(surrogate="lvc", delta=0.2, decay=0.95),
    "half-cheetah-direction-fast": RunnerRecipe(task="direction", surrogate="lvc", delta=0.2, decay=0.95),
    "ant-velocity": RunnerRecipe(body="ant"),
    # ProMP's step outside, on twice the trajectories.
    "ant-velocity-fast": RunnerRecipe(
        body="ant",
        outer="ppo",
        ratio_clip=0.3,
        decay=0.95,
        meta_batch=20,
        trajectories=40,
        later_rate=0.01,
        compile="step",
        chunk=1,
        check_every=20,
        validation_episodes=20,
    ),
    "ant-direction": RunnerRecipe(body="ant", task="direction", trajectories=40, test_trajectories=40, later_rate=0.01),
    # The more has to be learned, the more the advantages' variance counts.
    "ant-direction-fast": RunnerRecipe(
        body="ant", task="direction", surrogate="lvc", delta=0.25, decay=0.7, meta_batch=20, later_rate=0.01
    ),
    "walker-direction": RunnerRecipe(body="walker", task="direction", flavour="gymnasium"),
    "walker-mass": RunnerRecipe(body="walker", task="mass", flavour="gymnasium"),
    "walker-friction": RunnerRecipe(body="walker", task="friction", flavour="gymnasium"),
    "meta-world": MetaWorldRecipe(),
    "humanoid-direction": RunnerRecipe(body="humanoid", task="direction", flavour="gymnasium"),
}

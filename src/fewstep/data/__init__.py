"""Data sets, one a file, and the episodes that are drawn from them."""

from fewstep.data.episodes import ClassEpisodes, Episodes
from fewstep.data.glyphs import load_glyphs
from fewstep.data.omniglot import load_omniglot
from fewstep.data.sinusoid import SinusoidEpisodes

__all__ = ["DATASETS", "ClassEpisodes", "Episodes", "SinusoidEpisodes", "load_glyphs", "load_omniglot"]

DATASETS = {"glyphs": load_glyphs, "omniglot": load_omniglot, "sinusoid": SinusoidEpisodes}

"""Data sets, one a file, and the episodes that are drawn from them."""

from fewstep.data.cifar_fs import load_cifar_fs
from fewstep.data.episodes import ClassEpisodes, Episodes
from fewstep.data.fc100 import load_fc100
from fewstep.data.glyphs import load_glyphs
from fewstep.data.image_folder import load_image_folder
from fewstep.data.mini_imagenet import load_mini_imagenet
from fewstep.data.omniglot import load_omniglot
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.data.table import ImageTable
from fewstep.data.tiered_imagenet import load_tiered_imagenet

__all__ = [
    "DATASETS", "ClassEpisodes", "Episodes", "ImageTable", "SinusoidEpisodes", "load_cifar_fs", "load_fc100",
    "load_glyphs", "load_image_folder", "load_mini_imagenet", "load_omniglot", "load_tiered_imagenet",
]  # fmt: skip

DATASETS = {
    "cifar-fs": load_cifar_fs,
    "fc100": load_fc100,
    "glyphs": load_glyphs,
    "image-folder": load_image_folder,
    "mini-imagenet": load_mini_imagenet,
    "omniglot": load_omniglot,
    "sinusoid": SinusoidEpisodes,
    "tiered-imagenet": load_tiered_imagenet,
}

"""A run adapted to a user's own classes: made from a folder of examples, kept in a folder, asked about files."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fewstep.commands import recipe_from, recipe_of
from fewstep.data.decode import Form, decoded_now
from fewstep.data.files import Picture
from fewstep.data.layouts import class_folders
from fewstep.errors import InputError
from fewstep.heads import Head, other_ways, start_head, steps_from
from fewstep.normalisation import Settled, Statistics
from fewstep.patterns import linear_head
from fewstep.recipes.classification import ClassificationRecipe
from fewstep.run import Run
from fewstep.starts import Prototypes

ABOUT, WEIGHTS = "adapted.json", "adapted.safetensors"


@dataclass(frozen=True)
class Classifier:
    """A net for some classes, x float [batch, channels, size, size] in 0..1 -> logits [batch, classes].

    classes : their names, in the order of the logits;  form : what pictures become;  about : how it came about
    """

    model: nn.Module
    classes: tuple[str, ...]
    form: Form
    about: dict[str, Any]

    def logits(self, images: Tensor) -> Tensor:
        """Of pictures uint8 [batch, channels, size, size], 64 at a time where none depends on another."""
        by_batch = self.about["normalisation"] == "batch"
        if by_batch and len(images) < 2:
            raise InputError("normalised by all that is asked about together, one picture alone has no answer")
        together = len(images) if by_batch else 64
        self.model.eval()
        with torch.no_grad():
            return torch.cat([self.model(part.float() / 255) for part in torch.split(images, max(together, 1))])

    def probabilities(self, pictures: list[Picture], skip: bool = False) -> tuple[list[Picture], Tensor]:
        """The pictures that can be read, and the probability [pictures, classes] of each class for each of them."""
        images, left_out = decoded_now(pictures, self.form, skip)
        if len(left_out) == len(pictures):
            raise InputError(f"none of the {len(pictures)} files can be read as a picture")
        return [each for place, each in enumerate(pictures) if place not in left_out], self.logits(images).softmax(1)

    def save(self, folder: Path) -> None:
        """Write adapted.json and adapted.safetensors; a run of training in that folder is not touched."""
        run = Run(folder)
        if "config" not in self.about:
            raise InputError(
                "only a net of a recipe can be made again from a file; save a model of your own by torch.save"
            )
        if run.exists:
            raise InputError(f"{folder} holds a run of training; give another --out for the adapted classifier")
        run.delete(ABOUT)  # what is cut short between the two files must not pass for whole
        run.save_weights(WEIGHTS, _tensors(self.model))
        content = {"classes": self.classes, "form": dataclasses.asdict(self.form), **self.about}
        run.write_json(ABOUT, content)

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """What `save` wrote."""
        run = Run(folder)
        if not (folder / ABOUT).exists():
            if run.exists:
                todo = f"fewstep adapt {folder} --support DIR --out ADAPTED, and then name ADAPTED"
                raise InputError(f"{folder} is a run of training, not a classifier; make one by: {todo}")
            raise InputError(
                f"{folder / ABOUT} is not there; write it by: fewstep adapt RUN --support DIR --out {folder}"
            )
        content = run.read_json(ABOUT)
        weights = run.load_weights(WEIGHTS)
        with run.reading(ABOUT):
            classes, form = tuple(content.pop("classes")), Form(**content.pop("form"))
            _, recipe = recipe_from(content["config"], str(folder / ABOUT))
            model = recipe.learner().model
            _set_rows(model, len(classes))
        with run.reading(WEIGHTS), torch.no_grad():
            statistics = Statistics()
            calls = sum(name.startswith("statistics.mean_") for name in weights)
            moments = [[weights.pop(f"statistics.{kind}_{call}") for kind in ("mean", "var")] for call in range(calls)]
            statistics.set([(mean, variance) for mean, variance in moments])
            model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
            model = Settled(model, "batch" if content["normalisation"] == "batch" else "running", statistics)
        return cls(model.cpu(), classes, form, content)


def adapt_run(
    path: Path, support: Path, *, steps: int | None = None, head: Head = "auto",
    normalisation: Literal["support", "batch"] = "support", weights: str = "best", skip: bool = False,
) -> Classifier:  # fmt: skip
    """Adapt a run of classification to the classes in a folder, each a folder of examples.

    steps, head : inner steps, and where the head starts, see `fewstep.heads`
    normalisation : by the default no answer depends on what else is asked; "batch" is the paper's, by all files asked
    """
    config, recipe = recipe_of(run := Run(path))
    if not isinstance(recipe, ClassificationRecipe):
        raise InputError(f"{path} is no run of picture classification, but of {config}; there is no --support for it")
    if steps is not None and steps < 0:
        raise InputError(f"--steps must be at least 0, but {steps} came")
    learner = recipe.learner()
    run.restore(file := run.weights_file(weights), learner)
    learner.normalisation = normalisation
    folders = class_folders(support)
    if len(folders) < 2:
        raise InputError(
            f"{support} should hold a folder of examples for each of 2 or more classes, not {len(folders)}"
        )
    images, left_out = decoded_now([each for pictures in folders.values() for each in pictures], recipe.form, skip)
    owners = [number for number, pictures in enumerate(folders.values()) for _ in pictures]
    y = torch.tensor([owner for place, owner in enumerate(owners) if place not in left_out])
    if empty := [name for number, name in enumerate(folders) if number not in y]:
        raise InputError(f"the class {support / empty[0]} has no readable picture; add some or delete it")
    head = start_head(learner, head, recipe.ways, len(folders))
    if steps is None:
        steps = steps_from(head, recipe.test_steps)
    if steps == 0 and not isinstance(learner.start, Prototypes):
        raise InputError(
            f"without inner steps only prototypes learn from examples, but --head {head} came; take --head prototypes, "
            "or --steps 1 at least"
        )
    device = next(learner.parameters()).device
    with other_ways(recipe.algorithm, recipe.ways, len(folders), steps):
        model = learner.adapt((images.to(device).float() / 255, y.to(device)), steps)
    about = {
        "run": str(path.absolute()),
        "config": run.read_json("config.json"),
        "iterations": run.step_of(file),
        "support": dict(zip(folders, torch.bincount(y).tolist(), strict=True)),
        "steps": steps,
        "head": head,
        "normalisation": normalisation,
    }
    return Classifier(model.cpu(), tuple(folders), recipe.form, about)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, the statistics too, which are not part of a `state_dict`."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _set_rows(model: nn.Module, classes: int) -> None:
    """Give the head as many outputs, of any value."""
    _, head = linear_head(model)
    if head.out_features != classes:
        head.out_features = classes
        head.weight = nn.Parameter(head.weight.new_zeros(classes, head.in_features))
        head.bias = None if head.bias is None else nn.Parameter(head.bias.new_zeros(classes))

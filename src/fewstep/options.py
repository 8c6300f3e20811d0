"""The options of each command beside `train`, whose options are the recipe's fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fewstep.judge import asked_for


@dataclass(frozen=True)
class _JudgingOptions:
    weights: Literal["best", "model"] = "best"
    """The weights that were best in validation, or the last ones."""
    episodes: int | None = None
    """Test tasks; None takes as many as the recipe says."""
    ways: int | None = None
    """Classes of a test task. Another number than in training needs a head that takes it, see `fewstep adapt --head`:
    prototypes, without inner steps unless --steps says how many, or the method's own; there are no baselines then."""
    shots: int | None = None
    """Support examples of each class at test."""
    queries: int | None = None
    """Query examples of each class at test, in the first protocol."""
    steps: int | None = None
    """Inner steps at test."""
    procs: int = 1
    """Processes on this machine that share the test tasks, with a GPU each."""

    @property
    def asked(self) -> dict[str, int]:
        """What of the test tasks, and of the steps, is not to be as the recipe says."""
        return asked_for(self.ways, self.shots, self.queries, self.steps)


@dataclass(frozen=True)
class EvaluateOptions(_JudgingOptions):
    """Judge a run on the test tasks of its recipe, beside the baselines, and write evaluation.json; with --ways,
    --shots, --queries or --steps a file that is named by them."""

    run: tyro.conf.Positional[Path] = field(kw_only=True)
    """Folder of the run."""
    baselines: bool = True
    """Also train (once) and judge the baselines."""
    first_only: bool = False
    """Of the recipe's test protocols only the first: the paper's own."""
    all_protocols: bool = False
    """Instead, one table of every protocol that people use: the authors' own, 15 queries per class, 600, 2,000 and
    10,000 episodes (or the most that --episodes says), by statistics of the batch and of the support set, an ensemble
    of the best checkpoints (the last ones with --weights model); without baselines. It goes to protocols.json."""
    normalisation: Literal["batch", "support", "running", "per_step"] | None = None
    """By which statistics batch norm goes: those of the batch at hand, transductive as in the paper; of the support
    set; or of training tasks, overall or for each inner step. By default the batch's, and for your own pictures the
    support set's too."""


@dataclass(frozen=True)
class CompareOptions(_JudgingOptions):
    """Judge two runs on the same test tasks: their difference, its interval, and the chance of such a one by luck."""

    first: tyro.conf.Positional[Path] = field(kw_only=True)
    """Folder of a run."""
    second: tyro.conf.Positional[Path] = field(kw_only=True)
    """Folder of another, on the same data."""


@dataclass(frozen=True)
class AdaptOptions:
    """Adapt a run to your own classes, a folder of examples each, and keep the classifier in a folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    support: Path
    """Folder with a folder of examples for each class; any number of classes and of examples."""
    out: Path = Path("adapted")
    """Folder for the classifier."""
    steps: int | None = None
    """Inner steps; None takes as many as the recipe takes at test, and none from prototypes."""
    head: Literal["auto", "trained", "prototypes", "zero"] = "auto"
    """Where the last layer starts: trained needs as many classes as in training; auto takes it, else prototypes."""
    normalisation: Literal["support", "batch"] = "support"
    """By which statistics batch norm goes; with batch, the paper's way, answers depend on what else is asked."""
    weights: Literal["best", "model"] = "best"
    """The weights that were best in validation, or the last ones."""
    skip_unreadable: bool = False
    """Leave damaged pictures out; else they are an error."""


@dataclass(frozen=True)
class PredictOptions:
    """Classify picture files by an adapted classifier."""

    adapted: tyro.conf.Positional[Path]
    """Folder that `fewstep adapt` made."""
    files: tyro.conf.Positional[tuple[Path, ...]]
    """Pictures, and folders of them."""
    format: Literal["table", "json", "csv"] = "table"
    """How to print classes and probabilities."""
    skip_unreadable: bool = False
    """Leave damaged pictures out; else they are an error."""


@dataclass(frozen=True)
class ExportOptions:
    """Write an adapted classifier for other programs."""

    adapted: tyro.conf.Positional[Path]
    """Folder that `fewstep adapt` made."""
    out: Path = Path("classifier.onnx")
    """The file; its name ends in .onnx, or in .pt2 for torch.export."""


@dataclass(frozen=True)
class ReportOptions:
    """Draw the plots of a run and write report.md."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""


@dataclass(frozen=True)
class WatchOptions:
    """Draw what a trained policy does in one test task before and after adaptation: a video of a body, or paths."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    task: int = 0
    """Number of the test task."""
    steps: tuple[int, ...] = (0, 1)
    """Inner steps after which to look."""
    out: Path | None = None
    """A .gif or .mp4 file (or .png of 2D navigation); None writes watch.gif, or watch.png, into the run."""
    weights: Literal["best", "model"] = "best"
    """The weights that were best in validation, or the last ones."""

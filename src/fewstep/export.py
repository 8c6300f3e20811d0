"""An adapted classifier for other programs: a file of `torch.export`, or of ONNX."""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.classifier import Classifier
from fewstep.errors import InputError


class _Ready(nn.Module):
    """Pixels in, probabilities out: nothing of the preparation but the size is left to the other program."""

    def __init__(self, model: nn.Module, invert: bool) -> None:
        super().__init__()
        self.model, self.invert = model, invert

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(1 - images if self.invert else images)
        return logits.softmax(-1)


def export(classifier: Classifier, path: Path) -> Path:
    """Write images float32 [batch, channels, size, size] in 0..1 -> probabilities [batch, classes], for any batch.

    path : ends in .pt2 for `torch.export`, or in .onnx, which needs `pip install "fewstep[onnx]"`
    Raises `InputError` where the answers depend on the batch, as with normalisation="batch", and where `torch.export`
    cannot take a network of one's own.
    """
    if path.suffix not in (".pt2", ".onnx"):
        raise InputError(f"the file's name must end in .pt2 (torch.export) or .onnx, but {path} came")
    if classifier.about["normalisation"] == "batch":
        raise InputError(
            "this classifier normalises by all pictures that it is asked about together; adapt anew with "
            "--normalisation support"
        )
    if path.suffix == ".onnx" and importlib.util.find_spec("onnxscript") is None:
        raise InputError('ONNX needs more packages: pip install "fewstep[onnx]"')
    form = classifier.form
    example = torch.zeros(2, form.channels, form.size, form.size)
    model = _Ready(classifier.model, form.invert).eval()
    batch = {0: torch.export.Dim("batch")}
    try:
        with torch.no_grad():
            program = torch.export.export(model, (example,), dynamic_shapes=(batch,))
    except Exception as error:  # of many kinds: nets of one's own can do anything
        raise InputError(f"torch.export cannot take this network for any number of pictures: {error}") from error
    part = path.with_name(f"part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pt2":
            torch.export.save(program, whole := io.BytesIO())  # onto a full disk it would end the process
            part.write_bytes(whole.getvalue())
        else:
            with _quiet():
                written: Any = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["images"],
                                                 output_names=["probabilities"])  # fmt: skip
            written.save(part)
        return part.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another --out") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, PyTorch's exporter does not tell of packages that are not needed, nor of its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""The folder of one run: its configuration, metrics, weights and state, each written whole or not at all."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fewstep.distributed import is_first
from fewstep.errors import FewstepError, InputError


def checkpoint_name(step: int) -> str:
    """The file of the weights of an iteration that are among the best or the last.

    >>> checkpoint_name(500)
    'checkpoints/500.safetensors'
    """
    return f"checkpoints/{step}.safetensors"


class Run:
    """A run's folder. Where several processes work together, the first alone writes.

    config.json         the recipe and its fields
    classes.json        of a user's own pictures: the classes of each split
    engine.json         the plan by which tasks are computed (`fewstep.planner`), where there is one
    metrics.jsonl       one line per logged event of training
    model.safetensors   the last weights;  best.safetensors: those with the best validation result
    checkpoints/        the best few and the last few, by iteration
    trainer.pt          everything that goes on from the last checkpoint
    evaluation.json     the result on test tasks
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        return (self.path / "config.json").exists()

    def write(self, name: str, data: bytes) -> Path:
        """Write a file so that it is there whole or not at all, whenever the process is killed or the disk full."""
        target = self.path / name
        if not is_first():
            return target
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        except OSError as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise InputError(
                f"cannot write {target}: {error.strerror}; what was saved before is intact. Free space or choose "
                "another --out, and run the same command again"
            ) from error
        return target

    def write_json(self, name: str, content: Any) -> Path:
        return self.write(name, (json.dumps(content, indent=2) + "\n").encode())

    def read_json(self, name: str) -> Any:
        """The content of a JSON file of the run; `InputError` where it is missing or damaged."""
        with self.reading(name) as path:
            return json.loads(path.read_text())

    def save_weights(self, name: str, state: Mapping[str, Tensor], step: int = 0) -> None:
        """Keep tensors, and the iteration that they are of."""
        if not is_first():
            return
        plain = torch.contiguous_format  # the files have no other
        tensors = {key: value.detach().cpu().clone(memory_format=plain) for key, value in state.items()}
        self.write(name, safetensors.torch.save(tensors, metadata={"step": str(step)}))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        if is_first():
            (self.path / name).unlink(missing_ok=True)

    def load_weights(self, name: str) -> dict[str, Tensor]:
        with self.reading(name) as path:
            return dict(safetensors.torch.load(path.read_bytes()))

    def restore(self, name: str, module: nn.Module) -> None:
        """Load the weights `name` into `module`; `InputError` where they are of another one."""
        weights = self.load_weights(name)
        with self.reading(name):
            module.load_state_dict(weights)

    def weights_file(self, which: str) -> str:
        """The name of the file of the "best" weights, or of the last ones, "model"."""
        name = f"{which}.safetensors"
        if which == "best" and not (self.path / name).exists() and (self.path / "model.safetensors").exists():
            raise InputError(f"{self.path} has not been validated yet; train on, or use --weights model")
        return name

    def step_of(self, name: str) -> int:
        """The iteration that the weights `name` are of."""
        with self.reading(name) as path, safetensors.safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])

    def save_state(self, state: dict[str, Any]) -> None:
        if not is_first():
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write("trainer.pt", buffer.getvalue())

    def load_state(self) -> dict[str, Any] | None:
        """What `save_state` saved last, or None."""
        if not (self.path / "trainer.pt").exists():
            return None
        with self.reading("trainer.pt") as path:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state

    def log(self, event: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        if not is_first():
            return
        try:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path / 'metrics.jsonl'}: {error.strerror}") from error

    def metrics(self) -> list[dict[str, Any]]:
        """The logged events; a line cut short by a kill is left out."""
        path = self.path / "metrics.jsonl"
        events = []
        for line in path.read_text().splitlines() if path.exists() else []:
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                if isinstance(event, dict) and isinstance(event.get("step"), int):
                    events.append(event)
        return events

    def forget_metrics_after(self, step: int) -> None:
        """Drop the events of steps that will be done again."""
        kept = [event for event in self.metrics() if event["step"] <= step]
        self.write("metrics.jsonl", "".join(json.dumps(event) + "\n" for event in kept).encode())

    @contextmanager
    def reading(self, name: str) -> Iterator[Path]:
        """The path of a file of the run; `InputError` where it is missing, or where what is done with it fails."""
        path = self.path / name
        if not path.exists():
            raise InputError(f"{path} is not there; is {self.path} the folder of a run (fewstep train ... --out RUN)?")
        try:
            yield path
        except FewstepError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"{path}: {error}") from error
        except PermissionError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); mend that") from error
        except Exception as error:  # a damaged file can make its reader fail in any way
            raise InputError(
                f"{path} is damaged ({type(error).__name__}); delete it, or the run's folder, and train again"
            ) from error

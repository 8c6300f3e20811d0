"""The command line: train, evaluate, report, list."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from fewstep.commands import evaluate_run, list_names, report_run, train_run
from fewstep.errors import FewstepError, InputError
from fewstep.recipes import RECIPES


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a mistake of the user's is one line and exit code 2, Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = lambda message, *_: print(f"fewstep: {message}", file=sys.stderr)
    try:
        run = _parse(arguments)
        run()
    except FewstepError as error:
        print(f"fewstep: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("fewstep: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)

"""The optimizer step alone, on the parameter shapes of real models. Run from the repository root: `nox -s bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from . import commandline
from .measuring import measure
from .optimizers import CONTENDERS
from .shapes import MODELS, TINY
from .tables import STEP_NOTE, console, terminal_table
from .timing import Copy, Length, clock_for


def main(arguments: Sequence[str] | None = None) -> int:
    models = {**MODELS, TINY.name: TINY}
    parser = commandline.parser("step_time", __doc__, tuple(CONTENDERS), rounds=31)
    parser.add_argument("--models", nargs="+", choices=list(models), default=list(MODELS), metavar="NAME")
    options = parser.parse_args(arguments)
    device, screen = torch.device(options.device), console()
    results, names = commandline.begin("step_time", options, screen)
    clock, copy, length = clock_for(device), Copy(device), Length(options.rounds, options.seconds)
    for model in (models[name] for name in options.models):
        dtype = commandline.DTYPES[options.dtype]
        results.rows += measure(model.title, model.shapes(), names, clock, copy, length, dtype)
        screen.print(terminal_table(results, model.title))
    screen.print(STEP_NOTE)
    commandline.end(results, options, screen)
    return 0


if __name__ == "__main__":
    sys.exit(main())

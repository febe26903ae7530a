"""Whole training steps: forward, backward, optimizer, zero_grad. Run from the repository root: `nox -s bench`.

On a GPU ResNet-50 and ViT-B/16 at 224 pixels and batches 16, 64 and 256; on a CPU the same models at 32 pixels and a batch
of 8, so that a step takes about as long as the optimizer's share of it can still be seen.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from . import commandline, models
from .optimizers import CONTENDERS, LOOP, YARDSTICK
from .results import Row
from .tables import TRAINING_COLUMNS, TRAINING_NOTE, console, terminal_table
from .timing import Clock, Length, clock_for, interleave

CHOICE = (YARDSTICK, "fastlars-fused", "fastlars-foreach", LOOP)
BUILD: dict[str, tuple[str, Callable[[int], nn.Module]]] = {
    "resnet50": ("ResNet-50", lambda _: models.resnet50()),
    "vit_b": ("ViT-B/16", lambda image: models.ViT(image=image)),
    "tiny": ("tiny net (for tests)", lambda _: models.tiny()),
}
SIZES = {"cpu": (32, [8]), "cuda": (224, [16, 64, 256])}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = commandline.parser("training_step", __doc__.split("\n\n")[0], CHOICE, rounds=31)
    parser.add_argument("--models", nargs="+", choices=list(BUILD), default=["resnet50", "vit_b"], metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="(default: 16 64 256; on a CPU 8)")
    parser.add_argument("--image", type=int, metavar="PIXELS", help="(default: 224; on a CPU 32)")
    options = parser.parse_args(arguments)
    device, screen = torch.device(options.device), console()
    results, names = commandline.begin("training_step", options, screen)
    image = options.image or SIZES[options.device][0]
    clock, length = clock_for(device), Length(options.rounds, options.seconds)
    for model in options.models:
        for batch in options.batches or SIZES[options.device][1]:
            title, build = BUILD[model]
            case = f"{title}, batch {batch}, {image} pixels"
            torch.manual_seed(0)
            dtype = commandline.DTYPES[options.dtype]
            results.rows += measure(case, build(image).to(device), batch, image, names, clock, length, dtype)
            screen.print(terminal_table(results, case, TRAINING_COLUMNS))
    screen.print(TRAINING_NOTE)
    commandline.end(results, options, screen)
    return 0


def measure(
    case: str,
    model: nn.Module,
    batch: int,
    image: int,
    names: Sequence[str],
    clock: Clock,
    length: Length,
    dtype: torch.dtype,
) -> list[Row]:
    """All contenders train one model in turn; other dtypes than float32 mean autocast."""
    device = clock.device
    images = torch.randn(batch, 3, image, image, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    params = list(model.parameters())
    elements = sum(p.numel() for p in params)

    def loss() -> Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            return nn.functional.cross_entropy(model(images).float(), labels)

    loss().backward()  # what torch loads for any model and any optimizer is nobody's first step
    torch.optim.SGD(params, lr=0.0).step()
    rows, steps = [], {}
    for name in names:
        optimizer = CONTENDERS[name].make(params)
        loss().backward()
        first = _seconds(optimizer.step, device)
        optimizer.zero_grad()
        rows.append(Row(case, name, len(params), elements, [], first_step_ms=first * 1e3))

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        steps[name] = step
    times = interleave(steps, clock, length)
    for row in rows:
        row.ms = times[row.contender]
    return rows


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    """Of the optimizer alone: what came before is done when the clock starts."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())

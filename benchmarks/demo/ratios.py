"""The documentation's picture of trust ratios: LARS on the demo's digits, all images in one batch.

Run from the repository root: `python -m benchmarks.demo.ratios docs/trust-ratios.png`; a few seconds. The ratios themselves go into
a CSV file beside the picture.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # writes files without a display

import torch
from torch.nn import functional

import fastlars

from .data import scikit_learn_digits
from .report import drawn_from, read_csv
from .training import METHODS, Protocol, Run, build_model, build_optimizer

RUN = Run(METHODS[-1], batch=1152, lr=181.0, seed=0)  # the demo's choice for this batch, see docs/demo/table.md


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo.ratios", description=__doc__)
    parser.add_argument("file", type=Path, help="where the picture goes")
    file: Path = parser.parse_args().file

    training = scikit_learn_digits().train
    torch.manual_seed(RUN.seed)
    model = build_model(*training.images.shape[2:])
    protocol = Protocol()
    optimizer = build_optimizer(model, RUN, protocol)
    assert isinstance(optimizer, fastlars.LARS)
    scheduler = fastlars.schedules.warmup_polynomial(optimizer, protocol.warmup_epochs, protocol.epochs)
    history = {}
    for step in range(protocol.epochs):  # the whole training split is one batch
        optimizer.zero_grad()
        functional.cross_entropy(model(training.images), training.labels).backward()
        history[step] = optimizer.trust_ratios()
        optimizer.step()
        scheduler.step()

    axes = fastlars.plots.trust_ratios(history, names=[name for name, _ in model.named_parameters()])
    axes.set_title("Digits, one batch an epoch", fontsize=11, pad=24)
    rows = [(step, name, f"{ratio:.4g}") for step, ratios in history.items() for name, ratio in ratios.items()]
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as beside:
        writer = csv.writer(beside, lineterminator="\n")
        writer.writerows([("step", "tensor", "ratio"), *rows])
    metadata = {"Source": drawn_from(read_csv(file.with_suffix(".csv")))} if file.suffix == ".png" else None
    axes.figure.savefig(file, dpi=110, metadata=metadata)


if __name__ == "__main__":
    main()

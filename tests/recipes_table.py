"""The tables of docs/recipes.md, from what the recipes build. `python tests/recipes_table.py` writes them."""

from pathlib import Path
from typing import Any

import torch

from dialects_table import rows
from fastlars import recipes
from fastlars.dialects import dialect_of
from fastlars.options import NAMES, Options

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
BEGIN = "<!-- written by tests/recipes_table.py from src/fastlars/recipes.py; edit that -->"
END = "<!-- end -->"
# one published run of each recipe: batch, epochs, steps per epoch
RUNS: dict[str, dict[str, Any]] = {
    "mlperf": {"batch_size": 32768, "steps_per_epoch": 40},
    "simclr": {"batch_size": 4096, "epochs": 100, "steps_per_epoch": 312},
    "byol": {"batch_size": 4096, "epochs": 1000, "steps_per_epoch": 312},
    "barlow_twins": {"batch_size": 2048, "epochs": 1000, "steps_per_epoch": 625},
    "vicreg": {"batch_size": 2048, "epochs": 1000, "steps_per_epoch": 625},
    "moco_v3": {"batch_size": 4096, "epochs": 100, "steps_per_epoch": 312},
    "mae_probe": {"batch_size": 16384, "epochs": 90, "steps_per_epoch": 78},
}


def build(name: str, model: torch.nn.Module | None = None, **values: Any) -> recipes.Run:
    """The published run of a recipe, with these values overridden."""
    if model is None:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
    run: recipes.Run = getattr(recipes, name)(model, **{**RUNS[name], **values})
    return run


def row(name: str) -> list[str]:
    optimizer, scheduler = build(name)
    adapted, rest = optimizer.param_groups
    warmup, total, end, decay = scheduler.lr_lambdas[0].args
    run = RUNS[name]
    epochs = run.get("epochs", round(total / run["steps_per_epoch"]))
    bias_lr = f"{rest['initial_lr']:g}" if rest["initial_lr"] != adapted["initial_lr"] else "the same"
    shape = f"power {decay.args[0]:g}" if hasattr(decay, "args") else "cosine"
    return [
        f"`{name}`",
        str(run["batch_size"]),
        str(epochs),
        f"{adapted['initial_lr']:g}",
        bias_lr,
        f"{adapted['momentum']:g}",
        f"{adapted['weight_decay']:g}",
        f"{warmup / run['steps_per_epoch']:g}",
        f"{shape} to {end * adapted['initial_lr']:g}",
        str(dialect_of(Options(*[adapted[key] for key in NAMES]))),
    ]


def tables() -> str:
    header = [
        "recipe",
        "batch",
        "epochs",
        "lr",
        "bias lr",
        "momentum",
        "weight decay",
        "warm-up epochs",
        "decay",
        "dialect",
    ]
    of_mlperf = [
        [str(batch), f"{r.lr:g}", str(r.warmup_epochs), f"{r.momentum:g}", f"{r.weight_decay:g}", str(r.decay_steps)]
        for batch, r in recipes.MLPERF.items()
    ]
    by_batch = rows(["batch", "lr", "warm-up epochs", "momentum", "weight decay", "decay steps"], of_mlperf)
    by_epochs = rows(
        ["recipe", "epochs", "lr at batch 256", "weight decay"],
        [
            [f"`{name}`", str(epochs), f"{lr:g}", f"{decay:g}"]
            for name, runs in (("byol", recipes.BYOL), ("moco_v3", recipes.MOCO_V3), ("vicreg", recipes.VICREG))
            for epochs, (lr, decay) in runs.items()
        ],
    )
    return (
        f"{rows(header, map(row, RUNS))}\n\n## By batch: `mlperf`\n\n{by_batch}\n\n"
        f"## By epochs: `byol`, `moco_v3`, `vicreg`\n\n{by_epochs}"
    )


def page() -> str:
    """The page with these tables in it."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Everything together: a recipe, bias_lr, a compiled step, a tensor lr under its schedule, autocast with a GradScaler,
accumulation, and a checkpoint from which a second process reaches the same bits.

Run as a program, this file is that second process.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastlars

STEPS, SAVED_AT, ACCUMULATED = 8, 5, 2


def run(backend: str, checkpoint: Path, resume: bool) -> dict[str, Tensor]:
    """The training. It saves at `SAVED_AT`, or resumes from there. Returns weights, momentum and lr at the end."""
    torch.manual_seed(0)
    inputs = torch.randn(STEPS, ACCUMULATED, 32, 8)
    labels = (inputs @ torch.randn(8, 4)).argmax(-1)
    torch.manual_seed(7 if resume else 1)  # anything that is not loaded shows
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer, scheduler = fastlars.recipes.simclr(
        model, batch_size=4096, epochs=4, steps_per_epoch=2, warmup_epochs=1,
        lr=torch.tensor(4.0), bias_lr=torch.tensor(0.1), foreach=True,
    )  # fmt: skip
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    assert not [f for f in fastlars.check(model, optimizer) if f.name != "no warm-up"]
    if resume:
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
            part.load_state_dict(saved[name])
    step = torch.compile(optimizer.step, backend=backend)
    optimizer.step = step  # type: ignore[method-assign]  # what GradScaler calls; the scheduler has wrapped the other
    held = [group["lr"] for group in optimizer.param_groups]

    for i in range(SAVED_AT if resume else 0, STEPS):
        optimizer.zero_grad()
        for x, y in zip(inputs[i], labels[i], strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y) / ACCUMULATED
            scaler.scale(loss).backward()
        if i == 2 and not resume:
            model[0].weight.grad[0, 0] = torch.inf  # an overflow, so this step is skipped
        scaler.step(optimizer)
        scaler.update()
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="Detected call of `lr_scheduler.step"
            )  # it cannot see the compiled one
            scheduler.step()
        if i + 1 == SAVED_AT and not resume:
            parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
            torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)

    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, held, strict=True))  # written in place
    buffers = {f"{n} momentum": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    return {
        **model.state_dict(),
        **buffers,
        **{f"lr {i}": lr for i, lr in enumerate(held)},
        "scale": torch.tensor(scaler.get_scale()),
    }


# torch's own warnings, from inside its compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_everything_together_resumes_to_the_same_bits_in_another_process(backend: str, tmp_path: Path) -> None:
    ended = run(backend, tmp_path / "checkpoint.pt", resume=False)
    assert all(value.isfinite().all() for value in ended.values())
    assert ended["scale"] == 2.0**9  # halved once
    subprocess.run(
        [sys.executable, __file__, backend, tmp_path],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    resumed = torch.load(tmp_path / "ended.pt", weights_only=True)
    assert resumed.keys() == ended.keys()
    assert not [name for name, value in ended.items() if not torch.equal(value, resumed[name])]


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.save(run(sys.argv[1], folder / "checkpoint.pt", resume=True), folder / "ended.pt")

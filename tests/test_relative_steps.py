"""relative_steps(): how far each tensor moved, with any backend. Outside the context nothing is kept or done."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from cases import BASE, make_grads, make_params
from fastlars import LARS
from harness import implementations, set_grads

LAYOUTS = ["matrix", "vector", "conv", "zeros"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@implementations
def test_they_are_how_far_each_tensor_moved(implementation: Any, dtype: torch.dtype) -> None:
    params = make_params(dtype, layouts=LAYOUTS)
    groups = [{"params": params[::2]}, {"params": params[1::2], "adapt": False}]
    optimizer = LARS(groups, **{**BASE, "momentum": 0.9, "nesterov": True, **implementation})
    attributes = set(vars(optimizer))
    for step in range(2):
        set_grads(params, make_grads("dense", params, step))
        before = [p.detach().clone() for p in params]
        with optimizer.relative_steps() as steps:
            assert steps == {}
            optimizer.step()
        assert list(steps) == ["0.0", "0.1", "1.0", "1.1"]
        for name, i in zip(steps, (0, 2, 1, 3), strict=True):
            norm = float(before[i].to(torch.complex128).norm())
            moved = float((params[i].detach() - before[i]).to(torch.complex128).norm())
            assert steps[name] == pytest.approx(moved / norm if norm else math.inf, rel=1e-6), name
    assert vars(optimizer).keys() - attributes <= {"_looked_for_adapted"}


def test_a_skipped_step_moves_nothing_and_one_that_raises_has_none() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    optimizer = LARS([("w", weight)], lr=1.0, adapt=True, skip_nonfinite=True)
    weight.grad = torch.full((3, 3), torch.nan)
    with optimizer.relative_steps() as steps:
        optimizer.step()
    assert steps == {"w": 0.0}
    weight.grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"), optimizer.relative_steps() as steps:
        optimizer.step()
    assert steps == {}

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


def value_of(optimizer: LARS, param: nn.Parameter) -> torch.Tensor:
    kept = optimizer.state.get(param, {}).get("compensation", torch.zeros(()))
    return param.detach().to(torch.complex128) + kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@implementations
def test_they_are_how_far_each_tensor_moved(implementation: Any, dtype: torch.dtype) -> None:
    params = make_params(dtype, layouts=LAYOUTS)
    groups = [{"params": params[::2]}, {"params": params[1::2], "adapt": False}]
    optimizer = LARS(groups, **{**BASE, "momentum": 0.9, "nesterov": True, **implementation})
    attributes = set(vars(optimizer))
    for step in range(2):
        set_grads(params, make_grads("dense", params, step))
        before = [value_of(optimizer, p) for p in params]
        with optimizer.relative_steps() as steps:
            assert steps == {}
            optimizer.step()
        assert list(steps) == ["0.0", "0.1", "1.0", "1.1"]
        for name, i in zip(steps, (0, 2, 1, 3), strict=True):
            norm, moved = (float(t.norm()) for t in (before[i], value_of(optimizer, params[i]) - before[i]))
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


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_small_steps_of_half_precision_weights_count_in_full(dtype: torch.dtype, kept: bool) -> None:
    weight = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizer = LARS([("w", weight)], lr=0.1, adapt=True)
    for _ in range(2):
        weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        with optimizer.relative_steps() as steps:
            optimizer.step()
        assert steps["w"] == pytest.approx(1e-4, rel=0.01)
    assert ("compensation" in optimizer.state[weight]) == kept

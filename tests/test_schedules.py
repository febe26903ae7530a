"""The schedules have the values of their formulas, write a tensor lr in place, and survive saving at any step."""

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from cases import make_grads, make_params, pairwise
from fastlars import LARS
from fastlars.schedules import linear_scaling, sqrt_scaling, warmup_cosine, warmup_polynomial
from harness import loop_over

# schedule, and lr's share at this part of the decay
SCHEDULES: dict[str, tuple[Callable[..., LambdaLR], Callable[[float], float]]] = {
    "polynomial": (warmup_polynomial, lambda share: (1 - share) ** 2),
    "linear": (lambda *args: warmup_polynomial(*args, power=1), lambda share: 1 - share),
    "root": (lambda *args: warmup_polynomial(*args, power=0.5), lambda share: math.sqrt(1 - share)),
    "cosine": (warmup_cosine, lambda share: math.cos(share * math.pi / 2) ** 2),
    # MLPerf's end at 1e-4 for a peak of 8, and Barlow Twins' end, both as in the authors' programs
    "mlperf": (
        functools.partial(warmup_polynomial, end_factor=1e-4 / 8),
        lambda p: ((8 - 1e-4) * (1 - p) ** 2 + 1e-4) / 8,
    ),
    "barlow": (
        functools.partial(warmup_cosine, end_factor=0.001),
        lambda p: (q := 0.5 * (1 + math.cos(math.pi * p))) + 0.001 * (1 - q),
    ),
    "constant": (functools.partial(warmup_cosine, end_factor=1.0), lambda share: 1.0),
}
schedules = pytest.mark.parametrize("schedule", SCHEDULES)
LENGTHS = [(0, 1), (0, 5), (1, 2), (2, 6), (5, 6), (3, 10)]


def make(lr: float | Tensor = 8.0) -> LARS:
    params = make_params(torch.float64, layouts=["matrix", "vector"])
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": 0.5}]
    return LARS(groups, lr=lr, momentum=0.9, weight_decay=0.1)


def expected(schedule: str, warmup: int, total: int, step: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule][1](min((step - warmup) / (total - warmup), 1.0))


def go_on(optimizer: LARS, scheduler: LambdaLR, steps: range) -> list[list[float]]:
    seen = []
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        for param, grad in zip(params, make_grads("dense", params, step), strict=True):
            param.grad = grad
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


@schedules
def test_values(schedule: str) -> None:
    for warmup, total in LENGTHS:
        optimizer = make()
        seen = go_on(optimizer, SCHEDULES[schedule][0](optimizer, warmup, total), range(total + 3))
        for step, lrs in enumerate(seen):
            factor = expected(schedule, warmup, total, step)
            where = f"{warmup} of {total}, step {step}"
            assert lrs == pytest.approx([8.0 * factor, 0.5 * factor], rel=1e-12, abs=1e-14), where
        assert max(seen) == [8.0, 0.5]
        if schedule in ("polynomial", "linear", "root", "cosine"):
            assert seen[total:] == [[0.0, 0.0]] * 3  # past the end it is exactly 0 and nothing moves
        assert all(p.isfinite().all() for group in optimizer.param_groups for p in group["params"])


@schedules
@loop_over("dtype", [torch.float32, torch.float64])
def test_a_tensor_lr_is_written_in_place(schedule: str, dtype: torch.dtype) -> None:
    lr = torch.tensor(8.0, dtype=dtype)
    optimizer = make(lr)
    held = optimizer.param_groups[0]["lr"]
    seen = go_on(optimizer, SCHEDULES[schedule][0](optimizer, 2, 6), range(8))
    assert optimizer.param_groups[0]["lr"] is held
    for step, (value, _) in enumerate(seen):
        assert value == pytest.approx(8.0 * expected(schedule, 2, 6, step), rel=1e-6, abs=1e-6)


def by_state_dict(optimizer: LARS, scheduler: LambdaLR, build: Callable[..., LambdaLR]) -> tuple[LARS, LambdaLR]:
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    groups = [{"params": copy.deepcopy(group["params"])} for group in optimizer.param_groups]
    restored = LARS(groups, lr=3.0)
    restored_scheduler = build(restored, 2, 6)
    restored.load_state_dict(saved["optimizer"])
    restored_scheduler.load_state_dict(saved["scheduler"])
    restored.step()  # torch warns if a scheduler steps before its optimizer; there is no gradient yet
    return restored, restored_scheduler


WAYS: dict[str, Callable[..., Any]] = {
    "state_dict": by_state_dict,
    "pickle": lambda optimizer, scheduler, _: pickle.loads(pickle.dumps((optimizer, scheduler))),
    "deepcopy": lambda optimizer, scheduler, _: copy.deepcopy((optimizer, scheduler)),
}


@loop_over("schedule saved_at way", pairwise(SCHEDULES, [1, 2, 3, 6, 7], WAYS))
def test_a_saved_run_resumes(schedule: str, saved_at: int, way: str) -> None:
    build = SCHEDULES[schedule][0]
    optimizer = make(torch.tensor(8.0, dtype=torch.float64))
    scheduler = build(optimizer, 2, 6)
    go_on(optimizer, scheduler, range(saved_at))
    restored, restored_scheduler = WAYS[way](optimizer, scheduler, build)
    steps = range(saved_at, 9)
    assert go_on(restored, restored_scheduler, steps) == go_on(optimizer, scheduler, steps)
    assert restored_scheduler.get_last_lr() == scheduler.get_last_lr()
    for group, restored_group in zip(optimizer.param_groups, restored.param_groups, strict=True):
        for param, other in zip(group["params"], restored_group["params"], strict=True):
            assert param is not other
            assert torch.equal(param, other)


@loop_over("build", [warmup_polynomial, warmup_cosine])
@loop_over("warmup total", [(-1, 5), (5, 5), (6, 5), (0, 0)])
def test_lengths_are_checked_before_anything_changes(build: Callable[..., LambdaLR], warmup: Any, total: Any) -> None:
    optimizer = make()
    before = copy.deepcopy(optimizer.state_dict())
    message = rf"0 <= warmup_steps < total_steps must hold, got warmup_steps={warmup} and total_steps={total}"
    with pytest.raises(ValueError, match=message):
        build(optimizer, warmup, total)
    assert optimizer.state_dict() == before


@pytest.mark.parametrize("build", [warmup_polynomial, warmup_cosine])
@pytest.mark.parametrize(
    ("warmup", "total"), [(0.1, 50), (2.5, 50), (5.0, 50), (float("nan"), 5), (5, 50.0), (True, 5)]
)
def test_steps_are_whole_numbers(build: Callable[..., LambdaLR], warmup: Any, total: Any) -> None:
    """With 0.1 for a tenth of the run the first step had ten times the peak lr, and with 2.5 the third was above it."""
    optimizer = make()
    before = copy.deepcopy(optimizer.state_dict())
    name, value = ("warmup_steps", warmup) if type(warmup) is not int else ("total_steps", total)
    message = f"{name} must be a whole number of optimizer steps, an int, got {value}; .* total_steps // 10"
    with pytest.raises(TypeError, match=message):
        build(optimizer, warmup, total)
    assert optimizer.state_dict() == before
    build(optimizer, np.int64(5), np.int64(50))  # as results of NumPy arithmetic


@schedules
def test_no_step_is_above_the_peak(schedule: str) -> None:
    """At any time, also between steps and past the end."""
    scheduler = SCHEDULES[schedule][0](make(), 3, 10)
    assert all(0 <= scheduler.lr_lambdas[0](step / 8) <= 1 for step in range(8 * 14))


@loop_over("power", [0, -1.0, float("nan")])
def test_power_is_checked(power: float) -> None:
    with pytest.raises(ValueError, match=f"power must be > 0, got {power}"):
        warmup_polynomial(make(), 1, 5, power)


@pytest.mark.parametrize("build", [warmup_polynomial, warmup_cosine])
@loop_over("end_factor", [-0.1, 1.5, 8.0, float("nan")])
def test_end_factor_is_a_share(build: Callable[..., LambdaLR], end_factor: float) -> None:
    with pytest.raises(ValueError, match=f"end_factor must be 0 to 1, a share of lr, got {end_factor}"):
        build(make(), 1, 5, end_factor=end_factor)


@schedules
def test_warmup_is_the_published_one_a_step_earlier(schedule: str) -> None:
    """SimCLR, BYOL, Barlow Twins and MLPerf begin at lr * 0 / n, a step that does nothing. Here that step is left out."""
    warmup, total = 5, 12
    seen = go_on(optimizer := make(), SCHEDULES[schedule][0](optimizer, warmup, total), range(total))
    for step in range(warmup):
        assert seen[step] == pytest.approx([8.0 * (step + 1) / warmup, 0.5 * (step + 1) / warmup])
    assert seen[warmup - 1] == seen[warmup] == [8.0, 0.5]  # the published warm-up ends here, and the decay begins


@schedules
def test_groups_keep_their_proportion(schedule: str) -> None:
    seen = go_on(optimizer := make(), SCHEDULES[schedule][0](optimizer, 3, 10), range(10))
    assert [other / lr for lr, other in seen] == pytest.approx([0.5 / 8.0] * 10)


@loop_over(
    "scaled published",
    [
        (linear_scaling(0.3, 4096), 4.8),  # SimCLR, 0.3 * 4096 / 256
        (linear_scaling(0.2, 4096), 3.2),  # BYOL
        (linear_scaling(0.0048, 2048), 0.0384),  # Barlow Twins, biases
        (linear_scaling(0.1, 8192), 3.2),  # Goyal et al., SGD
        (linear_scaling(10.0, 2048, base_batch_size=4096), 5.0),
        (sqrt_scaling(0.075, 4096, base_batch_size=1), 4.8),  # SimCLR, 0.075 * sqrt(4096)
        (sqrt_scaling(0.1, 1024), 0.2),
        (sqrt_scaling(0.1, 64), 0.05),
    ],
)
def test_scaling_with_the_batch(scaled: float, published: float) -> None:
    assert scaled == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize("scale", [linear_scaling, sqrt_scaling])
def test_batches_are_positive(scale: Callable[..., float]) -> None:
    for batch in (0, -256, float("nan")):
        with pytest.raises(ValueError, match=f"^batch_size must be > 0, got {batch}"):
            scale(0.1, batch)
        with pytest.raises(ValueError, match=f"base_batch_size must be > 0, got {batch}"):
            scale(0.1, 256, base_batch_size=batch)


def test_any_optimizer_works() -> None:
    sgd = torch.optim.SGD(make_params(torch.float32), lr=4.0)
    scheduler = warmup_polynomial(sgd, warmup_steps=4, total_steps=10)
    assert (sgd.param_groups[0]["lr"], scheduler.base_lrs) == (1.0, [4.0])


def test_a_second_schedule_takes_the_initial_lr_as_torch_does() -> None:
    optimizer = LARS([torch.nn.Parameter(torch.ones(2))], lr=8.0, weight_decay=0.1)
    warmup_cosine(optimizer, warmup_steps=2, total_steps=4)
    optimizer.param_groups[0]["lr"] = 2.0
    warmup_cosine(optimizer, warmup_steps=0, total_steps=4)
    assert optimizer.param_groups[0]["lr"] == 8.0
    del optimizer.param_groups[0]["initial_lr"]
    optimizer.param_groups[0]["lr"] = 2.0
    warmup_cosine(optimizer, warmup_steps=0, total_steps=4)
    assert optimizer.param_groups[0]["lr"] == 2.0

"""One case from beginning to end: make the tensors, let every contender warm up on them, count, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Parameter

from .counting import bytes_moved, host_microseconds, launches_and_host_reads, peak_extra_bytes
from .optimizers import CONTENDERS, Contender, groups_of
from .rounds import COPY, READ, Clock, Copy, Row, Step, interleave
from .shapes import Shape


def parameters(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    """Parameters of these shapes with gradients, the same every time."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
        param = Parameter(values[0].mul_(0.02))
        param.grad = values[1].mul_(1e-3)
        params.append(param)
    return params


def measure(
    case: str,
    params: Sequence[Parameter],
    adapted: str,
    names: Sequence[str],
    clock: Clock,
    copy: Copy,
    **length: Any,
) -> list[Row]:
    """A row for each contender, one for the copy and one for the read.

    All contenders step the same parameters and gradients, except that a peer gets gradients of its own.

    Args:
        case: as results and tables call it.
        params: with gradients.
        adapted: one of ADAPTED.
        names: of CONTENDERS.
        clock: of the device of `params`.
        copy: on that device.
        **length: `rounds` and `seconds` of `interleave`.
    """
    rows: list[Row] = []
    steps: dict[str, Step] = {}
    for name in names:
        row, steps[name] = _warm_up(CONTENDERS[name], params, adapted, case, clock.device)
        rows.append(row)
    times = interleave(steps, clock, **length, copy=copy)
    rows = [replace(row, ms=times[row.contender]) for row in rows]
    elements = sum(p.numel() for p in params)
    bandwidths = {COPY: Copy.bytes_moved, READ: Copy.bytes_read}
    return [*rows, *(Row(case, name, len(params), elements, times[name], moved) for name, moved in bandwidths.items())]


def _warm_up(
    contender: Contender, params: Sequence[Parameter], adapted: str, case: str, device: torch.device
) -> tuple[Row, Step]:
    """The first steps, on which everything but time is counted."""
    if contender.package:  # a peer may write to its gradients
        params = [_with_own_grad(param) for param in params]
    versions = [param.grad._version for param in params]
    step = contender.stepper(groups_of(params, adapted))
    begun = time.perf_counter()
    step()
    synchronize(device)
    first_step_ms = (time.perf_counter() - begun) * 1e3
    writes_grad = versions != [param.grad._version for param in params]
    elements = sum(p.numel() for p in params)
    # neither a Triton kernel nor compiled code is made of operations that can be counted
    moved = None if contender.compiled else bytes_moved(step)
    if device.type == "cuda" and contender.fused_bytes is not None:
        moved = contender.fused_bytes * elements * params[0].itemsize // 4
    launches, host_reads = launches_and_host_reads(step, device)
    row = Row(
        *(case, contender.name, len(params), elements, [], moved, peak_extra_bytes(step, device)),
        *(launches, host_reads, host_microseconds(step, device), writes_grad, first_step_ms),
    )
    return row, step


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_own_grad(param: Parameter) -> Parameter:
    """A parameter in the same memory, with a copy of the gradient."""
    own = Parameter(param.detach())
    own.grad = None if param.grad is None else param.grad.clone()
    return own

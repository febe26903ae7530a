"""One case from beginning to end: make the tensors, let every contender warm up on them, count, time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from .counting import bytes_moved, host_microseconds, launches_and_host_reads, peak_extra_bytes
from .optimizers import CONTENDERS, Contender
from .results import COPY, READ, Row
from .shapes import Shape
from .timing import Clock, Copy, Length, interleave


def measure(
    case: str,
    shapes: Sequence[Shape],
    names: Sequence[str],
    clock: Clock,
    copy: Copy,
    length: Length,
    dtype: torch.dtype,
) -> list[Row]:
    """A row for each contender, one for the copy and one for the read.

    All contenders step the same parameters and gradients; who writes to the gradients gets gradients of its own.
    """
    device = clock.device
    params = _parameters(shapes, device, dtype)
    rows: list[Row] = []
    optimizers: dict[str, Optimizer] = {}
    for name in names:
        row, optimizers[name] = _warm_up(CONTENDERS[name], params, case, device)
        rows.append(row)
    times = interleave({name: optimizer.step for name, optimizer in optimizers.items()}, clock, length, copy)
    rows = [replace(row, ms=times[row.contender]) for row in rows]
    elements = sum(p.numel() for p in params)
    bandwidths = {COPY: Copy.bytes_moved, READ: Copy.bytes_read}
    return [*rows, *(Row(case, name, len(params), elements, times[name], moved) for name, moved in bandwidths.items())]


def _parameters(shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        values = [torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(2)]
        param = Parameter(values[0].mul_(0.02))
        param.grad = values[1].mul_(1e-3)
        params.append(param)
    return params


def _warm_up(contender: Contender, params: list[Parameter], case: str, device: torch.device) -> tuple[Row, Optimizer]:
    """The first steps, which are also those that count."""
    writes_grad = bool(contender.package) and _writes_grad(contender, device)
    if writes_grad:
        params = [_with_own_grad(param, param.grad) for param in params]
    optimizer = contender.make(params)
    first_step_ms = _wait_for(optimizer, device)

    moved = bytes_moved(optimizer.step)
    elements = sum(p.numel() for p in params)
    if device.type == "cuda" and contender.fused_bytes is not None:
        moved = contender.fused_bytes * elements * params[0].itemsize // 4
    launches, host_reads = launches_and_host_reads(optimizer.step, device)
    row = Row(
        case=case,
        contender=contender.name,
        tensors=len(params),
        elements=elements,
        ms=[],
        bytes_moved=moved,
        peak_extra_bytes=peak_extra_bytes(optimizer.step, device),
        launches=launches,
        host_reads=host_reads,
        host_us=host_microseconds(optimizer.step, device),
        writes_grad=writes_grad,
        first_step_ms=first_step_ms,
    )
    return row, optimizer


def _wait_for(optimizer: Optimizer, device: torch.device) -> float:
    """Milliseconds of a step with all that it makes or compiles, until the device has done it."""
    start = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _writes_grad(contender: Contender, device: torch.device) -> bool:
    param, grad = torch.ones(4, 4, device=device), torch.ones(4, 4, device=device)
    optimizer = contender.make([_with_own_grad(param, grad)])
    own = optimizer.param_groups[0]["params"][0].grad
    before = own._version
    optimizer.step()
    return bool(own._version != before)


def _with_own_grad(param: Tensor, grad: Tensor | None) -> Parameter:
    """A parameter in the same memory, with a copy of the gradient."""
    own = Parameter(param.detach())
    own.grad = None if grad is None else grad.clone()
    return own

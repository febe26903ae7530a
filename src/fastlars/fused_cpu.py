"""The fused step on CPU: norms, then torch's own fused SGD kernel, tensor by tensor while the tensor is in cache.

``_fused_sgd_`` computes v = m v + (1 - dampening) (g + weight_decay w) and w -= lr v in one pass. With weight_decay = c / b,
dampening = 1 - b and lr = q that is LARS. Bytes a float32 parameter: 20, and 8 for the norms where the cache does not serve
them. The kernel ignores strides, writes nonsense for half types in some versions and bumps no version counter: `serves`
says where it is right, the counters are bumped here.
"""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Tuple, cast  # noqa: UP035  as in functional.py

import torch
from torch import Tensor

from .coefficients import Number, coefficients, is_adapted
from .compat import bump_versions
from .norms import ROW, flat_norm
from .options import Options

# Tensors up to this size are stacked with others of their shape: a call each would cost more than the work.
SMALL = 4096
# Elements stacked at a time, in two workspaces of 1 MiB made once a step: page faults cost most of a stack.
STACK = 1 << 18
# Row norms that one dot product may add in float32: relative error up to 5e-7.
ROWS = 4096
# 1 - b is passed in double precision, and b is taken back from it: with a smaller b, rounding would show in float32.
SMALLEST_B = 1e-8

_PLAIN = (Tensor, torch.nn.Parameter)


def serves(param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> bool:
    """Whether the kernel, which walks over memory, computes these tensors right."""
    third = param if buffer is None else buffer
    # written out, since it is asked of every tensor in every step
    if (
        not (param.dtype is grad.dtype is third.dtype is torch.float32)
        or not (param.is_cpu and grad.is_cpu and third.is_cpu)
        or not (type(param) in _PLAIN and type(grad) in _PLAIN and type(third) in _PLAIN)
        or (param.is_neg() or grad.is_neg() or third.is_neg())
    ):
        return False
    if param.is_contiguous() and grad.is_contiguous() and third.is_contiguous():
        return True
    strides = effective_strides(param)
    return strides == effective_strides(grad) == effective_strides(third) and is_dense(strides)


def effective_strides(tensor: Tensor) -> List[Tuple[int, int]]:
    """(stride, size) of the dimensions that matter: one of size 1 may have any stride."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def is_dense(strides: List[Tuple[int, int]]) -> bool:
    """Whether a tensor of these strides fills its stretch of memory, each element once."""
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def step(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    options: Options,
    grad_scale: Optional[Tensor],
) -> None:
    """Step tensors that are served, all at their first step or all past it."""
    first_step = options.momentum != 0 and momentum_buffers[0] is None
    if first_step:
        momentum_buffers[:] = [torch.zeros_like(param) for param in params]
    stacks: Dict[torch.Size, List[int]] = {}
    alone: List[int] = []
    for i, param in enumerate(params):
        if param.numel() > SMALL or not param.is_contiguous():
            alone.append(i)
        elif param.numel() > 0:
            stacks.setdefault(param.shape, []).append(i)

    fused = _Fused(options, first_step, grad_scale)
    for shape, places in stacks.items():
        fused.stacked(shape, *_take(places, params, grads, momentum_buffers))
    for i in alone:
        fused.alone(params[i], grads[i], [buffer for buffer in momentum_buffers[i : i + 1] if buffer is not None])
    bump_versions(params + [buffer for buffer in momentum_buffers if buffer is not None])


def _take(
    places: List[int], params: List[Tensor], grads: List[Tensor], momentum_buffers: List[Optional[Tensor]]
) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
    buffers = [momentum_buffers[i] for i in places] if momentum_buffers else []
    return [params[i] for i in places], [grads[i] for i in places], [b for b in buffers if b is not None]


class _Fused:
    """The step of tensors that share options and that `serves` let in."""

    def __init__(self, options: Options, first_step: bool, grad_scale: Optional[Tensor]) -> None:
        self.options = options
        self.first_step = first_step
        self.lr = float(options.lr)
        self.scale = (-1.0 if options.maximize else 1.0) / (1.0 if grad_scale is None else float(grad_scale))
        self.step_size = 1.0 if options.lr_in_momentum else self.lr
        self.workspaces: List[Tensor] = []

    def stacked(self, shape: torch.Size, params: List[Tensor], grads: List[Tensor], buffers: List[Tensor]) -> None:
        """Tensors of one shape: norms and directions of all at once, as rows of a workspace; one call of the kernel."""
        rows = max(1, min(STACK // shape.numel(), len(params)))
        weights, directions = (workspace.view(rows, *shape) for workspace in self._workspaces(rows * shape.numel()))
        views = directions.unbind()
        for start in range(0, len(params), rows):
            chunk = slice(start, start + rows)
            n = len(params[chunk])
            w = torch.stack(params[chunk], out=weights[:n]).view(n, -1)
            g = torch.stack(grads[chunk], out=directions[:n]).view(n, -1)
            norms: Optional[Tuple[Tensor, Tensor]] = None
            if is_adapted(self.options):
                norms = (torch.linalg.vector_norm(w, dim=1), self._row_direction_norms(w, g))
            b, c = self._coefficients(norms)
            self._make_directions(g, b, w, c)
            self._sgd(params[chunk], list(views[:n]), buffers[chunk])

    def alone(self, param: Tensor, grad: Tensor, buffer: List[Tensor]) -> None:
        """A tensor by itself: norms, then one call of the kernel, which reads again what is still in cache."""
        norms = (_norm(_flat(param)), self._direction_norm(param, grad)) if is_adapted(self.options) else None
        b, c = (float(number) for number in self._coefficients(norms))
        if self.options.momentum == 0 and b != 0 and math.isfinite(c / b):
            self._sgd([param], [grad], [], weight_decay=c / b, factor=b)
        elif not self.options.nesterov and SMALLEST_B <= abs(b) < math.inf:
            self._sgd([param], [grad], buffer, weight_decay=c / b, dampening=1 - b)
        else:
            self._block_by_block(param, grad, buffer, b, c)

    def _block_by_block(self, param: Tensor, grad: Tensor, buffer: List[Tensor], b: float, c: float) -> None:
        """What one call cannot do, through a workspace that holds the direction of a block."""
        (workspace, _) = self._workspaces(min(param.numel(), STACK))
        blocks = [torch.split(_flat(tensor), STACK) for tensor in (param, grad, *buffer)]
        for w, g, *v in zip(*blocks):
            direction = torch.mul(g, b, out=workspace[: g.numel()])
            if self.options.weight_decay != 0:
                direction.add_(w, alpha=c)
            self._sgd([w], [direction], v)

    def _make_directions(self, grads: Tensor, b: Number, params: Tensor, c: Number) -> None:
        """``b * grads + c * params``, in place of grads, with a number a row or one for all."""
        if isinstance(b, Tensor):
            grads.mul_(b.unsqueeze(1))
        else:
            grads.mul_(b)
        if self.options.weight_decay == 0:
            return
        if isinstance(c, Tensor):
            grads.addcmul_(params, c.unsqueeze(1))
        else:
            grads.add_(params, alpha=c)

    def _sgd(
        self,
        params: List[Tensor],
        grads: List[Tensor],
        buffers: List[Tensor],
        weight_decay: float = 0.0,
        dampening: float = 0.0,
        factor: float = 1.0,
    ) -> None:
        torch._fused_sgd_(
            params,
            grads,
            buffers,
            weight_decay=weight_decay,
            momentum=self.options.momentum,
            lr=self.step_size * factor,
            dampening=dampening,
            nesterov=self.options.nesterov,
            maximize=False,
            is_first_step=False,
        )

    def _workspaces(self, numel: int) -> List[Tensor]:
        if not self.workspaces or self.workspaces[0].numel() < numel:
            self.workspaces = [torch.empty(numel, dtype=torch.float32, device="cpu") for _ in range(2)]
        return [workspace[:numel] for workspace in self.workspaces]

    def _coefficients(self, norms: Optional[Tuple[Number, Number]]) -> Tuple[Number, Number]:
        return coefficients(norms, self.lr, self.scale, self.first_step, self.options)

    def _row_direction_norms(self, w: Tensor, g: Tensor) -> Tensor:
        if self.options.trust_denominator == "joint":
            g = (g * self.scale).add_(w, alpha=self.options.weight_decay)
            return cast(Tensor, torch.linalg.vector_norm(g, dim=1))
        return cast(Tensor, torch.linalg.vector_norm(g, dim=1) * abs(self.scale))

    def _direction_norm(self, param: Tensor, grad: Tensor) -> float:
        if self.options.trust_denominator == "separate":
            return abs(self.scale) * _norm(_flat(grad))
        blocks = zip(torch.split(_flat(param), STACK), torch.split(_flat(grad), STACK))
        decay = self.options.weight_decay
        return math.hypot(*(_norm((g * self.scale).add_(w, alpha=decay)) for w, g in blocks))


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _norm(flat: Tensor) -> float:
    """As `norms.flat_norm`, in fewer calls: a host number is wanted."""
    length = flat.numel() // ROW * ROW
    tail = flat[length:]
    rows = torch.linalg.vector_norm(flat[:length].view(-1, ROW) if len(tail) else flat.view(-1, ROW), dim=1)
    if len(rows) > ROWS:
        return float(flat_norm(flat))
    square = float(torch.dot(rows, rows))
    return math.sqrt(square + float(torch.dot(tail, tail)) if len(tail) else square)

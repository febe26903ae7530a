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

from .coefficients import coefficients, gradient_scale, is_adapted, scalar_lr
from .compat import bump_versions, outside_graphs
from .norms import ROW
from .options import Options

SMALL = ROW  # tensors up to this size are stacked with others of their shape: a call each would cost more than the work
STACK = (
    1 << 18
)  # elements stacked at a time: two workspaces of 1 MiB, made once a step (page faults cost most of a stack)
CACHE = 1 << 20  # elements whose norms are taken before their update: parameters and gradients, 8 MiB, stay in cache
BLOCK = 1 << 18  # elements summed by one dot product, relative error 1e-7; the sums are added in double precision

# 1 - b is passed in double precision, and b is taken back from it: with a smaller b, rounding would show in float32
SMALLEST_B = 1e-8

_PLAIN = (Tensor, torch.nn.Parameter)


def serves(param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> bool:
    """Whether the kernel, which walks over memory, computes these tensors right."""
    if not (_is_plain(param) and _is_plain(grad) and (buffer is None or _is_plain(buffer))):
        return False
    if param.is_contiguous() and grad.is_contiguous() and (buffer is None or buffer.is_contiguous()):
        return True
    strides = _strides(param)
    return strides == _strides(grad) and (buffer is None or strides == _strides(buffer)) and _is_dense(strides)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu and type(tensor) in _PLAIN and not tensor.is_neg()


def _strides(tensor: Tensor) -> List[Tuple[int, int]]:
    # (stride, size); a dimension of size 1 may have any stride
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def _is_dense(strides: List[Tuple[int, int]]) -> bool:
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return False
        expected *= size
    return True


@outside_graphs  # as torch's own fused step
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
    start = 0
    while start < len(alone):
        end, size = start + 1, params[alone[start]].numel()
        while end < len(alone) and size + params[alone[end]].numel() <= CACHE:
            size += params[alone[end]].numel()
            end += 1
        fused.one_by_one(*_take(alone[start:end], params, grads, momentum_buffers))
        start = end
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
        self.like = torch.empty((), dtype=torch.float32, device="cpu")
        self.scale = gradient_scale(grad_scale, options.maximize, self.like)
        self.factor = 1.0 if self.scale is None else float(self.scale)
        self.step_size = 1.0 if options.lr_in_momentum else float(scalar_lr(options.lr, self.like))
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
            norms: Optional[Tensor] = None
            if is_adapted(self.options):
                norms = torch.stack([torch.linalg.vector_norm(w, dim=1), self._row_direction_norms(w, g)])
            b, c = (numbers.expand(n).unsqueeze(1) for numbers in self._coefficients(norms))
            g.mul_(b)
            if self.options.weight_decay != 0:
                g.addcmul_(w, c)
            self._sgd(params[chunk], list(views[:n]), buffers[chunk])

    def one_by_one(self, params: List[Tensor], grads: List[Tensor], buffers: List[Tensor]) -> None:
        """Norms of all, then the kernel for each."""
        n = len(params)
        norms: Optional[Tensor] = None
        if is_adapted(self.options):
            rows = [[_norm(p) for p in params], [self._direction_norm(p, g) for p, g in zip(params, grads)]]
            norms = torch.tensor(rows, dtype=torch.float64, device="cpu")
        b, c = (numbers.expand(n).tolist() for numbers in self._coefficients(norms))
        for i, param in enumerate(params):
            buffer = buffers[i : i + 1]
            if self.options.momentum == 0 and b[i] != 0 and math.isfinite(c[i] / b[i]):
                self._sgd([param], [grads[i]], [], weight_decay=c[i] / b[i], factor=b[i])
            elif not self.options.nesterov and SMALLEST_B <= abs(b[i]) < math.inf:
                self._sgd([param], [grads[i]], buffer, weight_decay=c[i] / b[i], dampening=1 - b[i])
            else:
                self._block_by_block(param, grads[i], buffer, b[i], c[i])

    def _block_by_block(self, param: Tensor, grad: Tensor, buffer: List[Tensor], b: float, c: float) -> None:
        """What one call cannot do, through a workspace that holds the direction of a block."""
        (workspace, _) = self._workspaces(min(param.numel(), STACK))
        blocks = [torch.split(_flat(tensor), STACK) for tensor in (param, grad, *buffer)]
        for w, g, *v in zip(*blocks):
            direction = torch.mul(g, b, out=workspace[: g.numel()])
            if self.options.weight_decay != 0:
                direction.add_(w, alpha=c)
            self._sgd([w], [direction], v)

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

    def _coefficients(self, norms: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        return coefficients(norms, self.like, self.scale, self.first_step, self.options)

    def _row_direction_norms(self, w: Tensor, g: Tensor) -> Tensor:
        if self.options.trust_denominator == "joint":
            g = (g * self.factor).add_(w, alpha=self.options.weight_decay)
            return cast(Tensor, torch.linalg.vector_norm(g, dim=1))
        return cast(Tensor, torch.linalg.vector_norm(g, dim=1) * abs(self.factor))

    def _direction_norm(self, param: Tensor, grad: Tensor) -> float:
        if self.options.trust_denominator == "separate":
            return abs(self.factor) * _norm(grad)
        blocks = zip(torch.split(_flat(param), BLOCK), torch.split(_flat(grad), BLOCK))
        decay = self.options.weight_decay
        return math.sqrt(math.fsum(_sum_of_squares((g * self.factor).add_(w, alpha=decay)) for w, g in blocks))


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _norm(tensor: Tensor) -> float:
    return math.sqrt(_sum_of_squares(_flat(tensor)))


def _sum_of_squares(flat: Tensor) -> float:
    if flat.numel() <= BLOCK:
        return float(torch.dot(flat, flat))
    return math.fsum(float(torch.dot(block, block)) for block in torch.split(flat, BLOCK))

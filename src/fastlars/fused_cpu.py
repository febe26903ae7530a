"""The fused step on CPU: norms, then torch's own fused SGD kernel, tensor by tensor while the tensor is in cache.

``_fused_sgd_`` computes v = m v + (1 - dampening) (g + weight_decay w) and w -= lr v in one pass. With weight_decay = c / b,
dampening = 1 - b and lr = q that is LARS. Bytes a float32 parameter: 20, and 8 for the norms where the cache does not serve
them. The kernel ignores strides, writes nonsense for half types in some versions and bumps no version counter: `serves`
says where it is right, the counters are bumped here.
"""

from __future__ import annotations

import math
from typing import Dict, List, Optional, Tuple  # noqa: UP035

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .coefficients import coefficients, gradient_scale, is_adapted, scalar_lr
from .compat import outside_graphs
from .norms import ROW
from .options import Options
from .updates import single_tensor_lars

SMALL = ROW  # tensors up to this size are computed stacked with others of their shape: a call each would cost more
STACK = 1 << 18  # elements stacked at a time: three temporaries of 1 MiB
CACHE = 1 << 20  # elements whose norms are taken before their update: parameters and gradients, 8 MiB, stay in cache
BLOCK = 1 << 18  # elements summed by one dot product, relative error 1e-7; the sums are added in double precision
PASSES = 1 << 16  # elements that several passes go over while they are in cache

# 1 - b is passed in double precision, and b is taken back from it: with a smaller b, rounding would show in float32
SMALLEST_B = 1e-8


def serves(param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> bool:
    """Whether the kernel, which walks over memory, computes these tensors right."""
    tensors = [param, grad] if buffer is None else [param, grad, buffer]
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.is_neg():
            return False
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = [_strides(tensor) for tensor in tensors]
    return all(other == strides[0] for other in strides) and _is_dense(strides[0])


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


@outside_graphs
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
    large: List[int] = []
    for i, param in enumerate(params):
        if param.numel() > SMALL or not param.is_contiguous():
            large.append(i)
        elif param.numel() > 0:
            stacks.setdefault(param.shape, []).append(i)

    fused = _Fused(options, first_step, grad_scale)
    for shape, places in stacks.items():
        count = max(1, STACK // shape.numel())
        for start in range(0, len(places), count):
            fused.stacked(*_take(places[start : start + count], params, grads, momentum_buffers))
    start = 0
    while start < len(large):
        end, size = start + 1, params[large[start]].numel()
        while end < len(large) and size + params[large[end]].numel() <= CACHE:
            size += params[large[end]].numel()
            end += 1
        fused.one_by_one(*_take(large[start:end], params, grads, momentum_buffers))
        start = end


def bump_versions(params: List[Tensor], momentum_buffers: List[Optional[Tensor]]) -> None:
    """Tell autograd that these were written, which the kernel does not."""
    for tensor in (*params, *momentum_buffers):
        if tensor is not None:
            increment_version(tensor)


def _take(
    places: List[int], params: List[Tensor], grads: List[Tensor], momentum_buffers: List[Optional[Tensor]]
) -> Tuple[List[Tensor], List[Tensor], List[Tensor]]:
    buffers = [momentum_buffers[i] for i in places] if momentum_buffers else []
    return [params[i] for i in places], [grads[i] for i in places], [b for b in buffers if b is not None]


class _Fused:
    """The step of tensors that share options, after `serves` let them in."""

    def __init__(self, options: Options, first_step: bool, grad_scale: Optional[Tensor]) -> None:
        self.options = options
        self.first_step = first_step
        self.like = torch.empty((), dtype=torch.float32, device="cpu")
        self.scale = gradient_scale(grad_scale, options.maximize, self.like)
        self.factor = 1.0 if self.scale is None else float(self.scale)
        self.step_size = 1.0 if options.lr_in_momentum else float(scalar_lr(options.lr, self.like))

    def coefficients(self, norms: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        return coefficients(norms, self.like, self.scale, self.first_step, self.options)

    def stacked(self, params: List[Tensor], grads: List[Tensor], buffers: List[Tensor]) -> None:
        """Tensors of one shape as rows of one tensor, through the single-tensor update with a column of coefficients."""
        options, n = self.options, len(params)
        w, g = torch.stack(params).reshape(n, -1), torch.stack(grads).reshape(n, -1)
        norms: Optional[Tensor] = None
        if is_adapted(options):
            if options.trust_denominator == "joint":
                direction_norms = torch.linalg.vector_norm((g * self.factor).add_(w, alpha=options.weight_decay), dim=1)
            else:
                direction_norms = torch.linalg.vector_norm(g, dim=1) * abs(self.factor)
            norms = torch.stack([torch.linalg.vector_norm(w, dim=1), direction_norms])
        b, c = (column.expand(n).unsqueeze(1) for column in self.coefficients(norms))
        v = [torch.stack(buffers).reshape(n, -1)] if buffers else []
        single_tensor_lars([w], [g], v, [b], [c], self.step_size, options)
        new = [row.view(params[0].shape) for tensor in (w, *v) for row in tensor.unbind()]
        torch._foreach_copy_(params + buffers, new)

    def one_by_one(self, params: List[Tensor], grads: List[Tensor], buffers: List[Tensor]) -> None:
        """Norms of all, then the kernel for each."""
        n = len(params)
        norms: Optional[Tensor] = None
        if is_adapted(self.options):
            rows = [[self._norm(p) for p in params], [self._direction_norm(p, g) for p, g in zip(params, grads)]]
            norms = torch.tensor(rows, dtype=torch.float64, device="cpu")
        b, c = (numbers.expand(n).tolist() for numbers in self.coefficients(norms))
        for i, param in enumerate(params):
            self._update(param, grads[i], buffers[i] if buffers else None, b[i], c[i])

    def _norm(self, tensor: Tensor) -> float:
        return math.sqrt(_sum_of_squares(_flat(tensor)))

    def _direction_norm(self, param: Tensor, grad: Tensor) -> float:
        if self.options.trust_denominator == "separate":
            return abs(self.factor) * self._norm(grad)
        blocks = zip(torch.split(_flat(param), BLOCK), torch.split(_flat(grad), BLOCK))
        decay = self.options.weight_decay
        return math.sqrt(math.fsum(_sum_of_squares((g * self.factor).add_(w, alpha=decay)) for w, g in blocks))

    def _update(self, param: Tensor, grad: Tensor, buffer: Optional[Tensor], b: float, c: float) -> None:
        options = self.options
        if options.nesterov or not SMALLEST_B <= abs(b) < math.inf:
            # what one call of the kernel cannot do: several passes, block by block
            blocks = [
                list(torch.split(_flat(tensor), PASSES))
                for tensor in (param, grad) + (() if buffer is None else (buffer,))
            ]
            n = len(blocks[0])
            bs, cs = [torch.full((), x, dtype=torch.float32, device="cpu") for x in (b, c)]
            single_tensor_lars(
                blocks[0],
                blocks[1],
                blocks[2] if buffer is not None else [],
                [bs] * n,
                [cs] * n,
                self.step_size,
                options,
            )
            return
        torch._fused_sgd_(
            [param],
            [grad],
            [] if buffer is None else [buffer],
            weight_decay=c / b,
            momentum=options.momentum,
            lr=self.step_size * (b if buffer is None else 1.0),
            dampening=0.0 if buffer is None else 1 - b,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )
        bump_versions([param], [buffer])


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _sum_of_squares(flat: Tensor) -> float:
    if flat.numel() <= BLOCK:
        return float(torch.dot(flat, flat))
    return math.fsum(float(torch.dot(block, block)) for block in torch.split(flat, BLOCK))

"""The fused step on CPU. It computes a tensor's norms, then calls torch's fused SGD kernel while the tensor is in cache.

``_fused_sgd_`` computes v = m v + (1 - dampening) (g + weight_decay w) and w -= lr v in one pass. If weight_decay is c / b,
dampening is 1 - b and lr is q, this is the LARS update (see `eager.py`). With momentum, an update reads and writes 20 bytes
per float32 element. If the tensor does not fit into the cache, the norms read 8 more bytes. The kernel ignores strides, writes
wrong values for half types in some torch versions, and bumps no version counters. So `serves` admits only tensors that the
kernel updates correctly, and `update` bumps the counters.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.linalg import vector_norm

from fastlars.buckets import Bucket, Norms
from fastlars.compat import bump_versions, operations_are_seen
from fastlars.formula import Number, coefficients, is_adapted, sign
from fastlars.norms import ROW, norms
from fastlars.options import Options

from .eager import make_state, measure
from .layouts import can_be_walked, on_cpu

# Tensors of up to this many elements are stacked by shape, because one call per tensor would cost more than the arithmetic.
SMALL = 12 * 1024
# Norms of up to this many elements are computed in one float32 call instead of row by row. The relative error is up to 3e-6.
AT_ONCE = 4096
# Up to this many elements are stacked at a time, in two workspaces of up to 1 MiB each. They are kept between steps, because
# stacking into new memory would mostly wait for page faults.
STACK = 1 << 18
# One dot product adds the squares of up to this many row norms in float32. The relative error is up to 5e-7.
ROWS = 4096
# The kernel gets 1 - b in double precision and recovers b from it, exactly for a float32 b of at least this size.
SMALLEST_B = 2.0**-29

_WORK: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # not torch's defaults, which users may change
_dtype, _is_cpu = attrgetter("dtype"), attrgetter("is_cpu")


class FusedCPU:
    """Updates dense float32 tensors on CPU whose gradients and buffers have the same memory layout."""

    name = "fused"
    takes_scale = False
    traceable = False
    mixes_first_steps = False

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """True on CPU with ``fused=True``, and for adapted CPU groups that leave fused, foreach and differentiable unset."""
        if options.fused is None and options.foreach is None and not options.differentiable:
            return bool(is_adapted(options)) and all(on_cpu(params))
        return bool(options.fused) and any(on_cpu(params))

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether the kernel, which ignores strides, updates these tensors correctly."""
        tensors = [*params, *grads, *momentum_buffers]
        return (
            all(map(_is_cpu, tensors))
            and {torch.float32}.issuperset(map(_dtype, tensors))
            and can_be_walked(params, grads, momentum_buffers)
        )

    def plan(self, params: list[Tensor]) -> Plan:
        """Decide which tensors are stacked and which are updated alone."""
        return Plan(params)

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        """Compute all norms if ``now`` is True, else only those for ``skip_nonfinite``.

        `update` computes the others, while each tensor is in cache.
        """
        make_state(bucket)  # before any update, because memory may run out
        if now:
            return measure(bucket, foreach=False)
        return Norms(grad=norms(bucket.grads, foreach=False) if bucket.options.skip_nonfinite else None)

    @torch.no_grad()
    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Update the stacked tensors, then the others one by one."""
        if gate is not None and gate.any():  # the gate is on the CPU, where reading it does not synchronise
            return
        plan: Plan = bucket.plan
        fused = _Fused(bucket, plan.grads)
        both = [norm for norm in norms[:2] if norm is not None]
        known = torch.stack(both, dim=1) if both else None
        for stacks in plan.stacks:
            places = [i for stack in stacks for i in stack.places]
            fused.stacked(stacks, places, None if known is None else (known[places, 0], known[places, 1]))
        pairs = [None] * len(bucket.params) if known is None else known.tolist()
        for i in plan.alone:
            fused.alone(i, pairs[i])
        bump_versions(fused.params + fused.buffers)


class _Stack(NamedTuple):
    """Small tensors of one shape, and views of the workspace into which they and their gradients are stacked."""

    places: list[int]
    weights: Tensor
    grads: Tensor
    weight_rows: Tensor
    grad_rows: Tensor
    directions: list[Tensor]  # views of `grads`, one per tensor


class Plan:
    """The indices of the tensors that are stacked by shape, the indices of those that are updated alone, and the workspace.

    Views of the workspace are cached, because making a view takes as long as copying a small tensor.
    """

    def __init__(self, params: list[Tensor]) -> None:
        """Build the plan without keeping any tensor."""
        places: dict[torch.Size, list[int]] = {}
        self.alone: list[int] = []
        for i, param in enumerate(params):
            numel = param.numel()
            is_small = 0 < numel <= SMALL and (numel <= AT_ONCE or _row(numel) > 0) and param.is_contiguous()
            (places.setdefault(param.shape, []) if is_small else self.alone).append(i)
        stacked = sum(shape.numel() * len(of_shape) for shape, of_shape in places.items())
        largest = max((params[i].numel() for i in self.alone), default=0)  # `_block_by_block` also uses `grads`
        # The workspace is no larger than needed, because every group has its own. It is one allocation, because the functional
        # form allocates it in every call, and glibc would return two blocks of 1 MiB to the system each time.
        sizes = [min(STACK, stacked), min(STACK, max(stacked, largest))]
        with torch.inference_mode(False):  # later steps write here, even if only the first one runs in inference mode
            self.weights, self.grads = torch.split(torch.empty(sum(sizes), **_WORK), sizes)
        self.stacks: list[list[_Stack]] = []  # in batches of at most STACK elements
        start = STACK
        for shape, of_shape in places.items():
            rest = of_shape
            while rest:
                if start + shape.numel() > STACK:
                    self.stacks.append([])
                    start = 0
                here = rest[: (STACK - start) // shape.numel()]
                self.stacks[-1].append(self._stack(here, shape, start))
                rest, start = rest[len(here) :], start + len(here) * shape.numel()

    def _stack(self, places: list[int], shape: torch.Size, start: int) -> _Stack:
        n, end = len(places), start + len(places) * shape.numel()
        weight_rows, grad_rows = self.weights[start:end].view(n, -1), self.grads[start:end].view(n, -1)
        grads = grad_rows.view(n, *shape)
        return _Stack(places, weight_rows.view(n, *shape), grads, weight_rows, grad_rows, list(grads.unbind()))


class _Fused:
    """Updates the tensors of one bucket, stacked or alone."""

    def __init__(self, bucket: Bucket, workspace: Tensor) -> None:
        self.params, self.grads = bucket.params, bucket.grads
        self.buffers = cast(list[Tensor], bucket.momentum_buffers)  # `measure` made the missing ones
        self.options, self.first_step = bucket.options, bucket.is_first_step
        self.adapted = is_adapted(bucket.options)
        self.lr = float(bucket.options.lr)
        self.step_size = 1.0 if bucket.options.lr_in_momentum else self.lr
        self.workspace = workspace
        self.has_addresses = not operations_are_seen()

    def stacked(self, stacks: list[_Stack], places: list[int], norms: tuple[Tensor, Tensor] | None) -> None:
        """Update small tensors with one kernel call. The workspace holds copies of weights and gradients."""
        for stack in stacks:
            torch.stack([self.params[i] for i in stack.places], out=stack.weights)
            torch.stack([self.grads[i] for i in stack.places], out=stack.grads)
        weights, directions = [stack.weight_rows for stack in stacks], [stack.grad_rows for stack in stacks]
        updates = [direction for stack in stacks for direction in stack.directions]
        if norms is None and self.adapted:
            norms = (_row_norms(weights), _row_norms(list(map(self._direction, weights, directions))))
        counts = [len(w) for w in weights]
        b, c = (
            torch.split(torch.as_tensor(number, **_WORK).reshape(-1, 1).expand(len(updates), 1), counts)
            for number in self._coefficients(norms)
        )
        for i, direction in enumerate(directions):
            direction.mul_(b[i])
            if self.options.weight_decay != 0:
                direction.addcmul_(weights[i], c[i])
        buffers = [self.buffers[i] for i in places] if self.buffers else []
        self._sgd([self.params[i] for i in places], updates, buffers)

    def alone(self, i: int, norms: tuple[float, float] | None) -> None:
        """Compute the norms of one tensor, then call the kernel while the tensor is still in cache."""
        param, grad, buffer = self.params[i], self.grads[i], self.buffers[i : i + 1]
        if self.has_addresses and any(_is_shifted(grad, written) for written in (param, *buffer)):
            grad = grad.clone()
        if norms is None and self.adapted:
            norms = (_norm(param), self._direction_norm(param, grad))
        b, c = cast(tuple[float, float], self._coefficients(norms))
        if self.options.momentum == 0 and b != 0 and math.isfinite(c / b):
            self._sgd([param], [grad], [], weight_decay=c / b, factor=b)
        elif not self.options.nesterov and SMALLEST_B <= abs(b) < math.inf:
            # round b to float32, because otherwise the scale of the loss, on which b depends, would change the result's bits
            b = ctypes.c_float(b).value
            self._sgd([param], [grad], buffer, weight_decay=c / b, dampening=1 - b)
        else:
            self._block_by_block(param, grad, buffer, b, c)

    def _block_by_block(self, param: Tensor, grad: Tensor, buffer: list[Tensor], b: float, c: float) -> None:
        """Update a tensor that one kernel call cannot update. The direction of each block is put into the workspace."""
        blocks = [torch.split(_flat(tensor), STACK) for tensor in (param, grad, *buffer)]
        for w, g, *v in zip(*blocks):
            direction = torch.mul(g, b, out=self.workspace[: g.numel()])
            if self.options.weight_decay != 0:
                direction.add_(w, alpha=c)
            self._sgd([w], [direction], v)

    def _sgd(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor],
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

    def _coefficients(self, norms: tuple[Number, Number] | None) -> tuple[Number, Number]:
        return coefficients(norms, self.lr, self.first_step, self.options)

    def _direction_norm(self, param: Tensor, grad: Tensor) -> float:
        if self.options.trust_denominator == "separate":
            return _norm(grad)
        blocks = zip(torch.split(_flat(param), STACK), torch.split(_flat(grad), STACK))
        return math.hypot(*(_norm(self._direction(w, g)) for w, g in blocks))

    def _direction(self, param: Tensor, grad: Tensor) -> Tensor:
        """The tensor whose norm is in the trust ratio's denominator."""
        if self.options.trust_denominator == "separate":
            return grad
        return (grad * sign(self.options)).add_(param, alpha=self.options.weight_decay)


def _is_shifted(grad: Tensor, written: Tensor) -> bool:
    """Whether the kernel would overwrite gradient elements before it reads them. Equal addresses are safe."""
    return 0 < abs(grad.data_ptr() - written.data_ptr()) < grad.nbytes


def _flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in memory order."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def _norm(tensor: Tensor) -> float:
    """The norm of a dense tensor as a Python number, like `norms` but in fewer calls and in float32 throughout."""
    matrix = _matrix(tensor.numel())
    if matrix is None:
        return norms([_flat(tensor)], foreach=False).item()
    row_norms = vector_norm(tensor.as_strided(*matrix), dim=1)
    return math.sqrt(torch.dot(row_norms, row_norms).item())


@cache
def _matrix(numel: int) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Size and strides of a matrix of this many elements in long rows. None if it is impossible or needs too many rows."""
    row = _row(numel)
    return None if row == 0 or numel > row * ROWS else ((numel // row, row), (row, 1))


def _row_norms(matrices: list[Tensor]) -> Tensor:
    """The norms of the rows of all these matrices."""
    norms: list[Tensor] = []
    for matrix in matrices:
        count, numel = matrix.shape
        short = matrix if numel <= AT_ONCE else vector_norm(matrix.view(count, -1, _row(numel)), dim=2)
        norms.append(vector_norm(short, dim=1))
    return torch.cat(norms)


@cache
def _row(numel: int) -> int:
    """Largest divisor of ``numel`` up to ROW, or 0 if it is not above ROW / 16."""
    return next((row for row in range(ROW, ROW // 16, -1) if numel % row == 0), 0)


FUSED_CPU = FusedCPU()

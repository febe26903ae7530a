"""Groups that are not adapted: torch's own SGD, in the implementation that the group asks for."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fastlars.buckets import Backend, Bucket, Norms
from fastlars.compat import bump_versions
from fastlars.formula import is_adapted, on_device
from fastlars.norms import chunks
from fastlars.options import Options

from .eager import copies, make_buffers, measure, write_back


def is_torch_sgd(options: Options) -> bool:
    """Whether torch's SGD computes this step. What it lacks, or would read lr on the host for, is our own update."""
    lr = options.lr
    reads_lr = isinstance(lr, Tensor) and (lr.requires_grad or lr.device.type != "cpu")
    return not (is_adapted(options) or options.lr_in_momentum or reads_lr)


class TorchSGD:
    """torch's SGD on the tensors that ``ours``, the backend of the same kind, wants and serves."""

    takes_scale = False

    def __init__(self, ours: Backend, *, foreach: bool = False, fused: bool = False) -> None:
        """In torch's implementation of the same kind as ``ours``."""
        self._ours, self._foreach, self._fused = ours, foreach, fused
        self.name = "fused" if fused else ours.name
        self.traceable = ours.traceable

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        """Groups that are not adapted, unless torch's kernel on CUDA would have to skip, or write gradients that it unscales."""
        refuses_gates = self._fused and self._ours.takes_scale
        return is_torch_sgd(options) and not (gated and refuses_gates) and self._ours.wants(params, options, gated)

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """As ours; the fused kernel takes gradients of the parameter's dtype only."""
        alike = not self._fused or all(param.dtype == grad.dtype for param, grad in zip(params, grads))
        return alike and self._ours.serves(params, grads, momentum_buffers)

    def plan(self, params: list[Tensor]) -> None:
        """Nothing."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:  # noqa: ARG002
        """Gradient norms, for ``skip_nonfinite``."""
        return measure(bucket, self._foreach)

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:  # noqa: ARG002
        """In place; gated steps on copies, which are written back or not."""
        params, grads, buffers = bucket.params, bucket.grads, bucket.momentum_buffers
        if gate is None or self._fused:
            # on the CPU, where reading the gate waits for nothing
            if gate is None or not gate.any():
                self._sgd(params, grads, buffers, bucket.options)
            return
        made = make_buffers(bucket)
        skip = on_device(gate, params[0]) != 0
        for places in chunks(params):
            old = [params[i] for i in places]
            old_buffers = [made[i] for i in places] if made else []
            new = copies(old, old[0].dtype, self._foreach)
            new_buffers = copies(old_buffers, old[0].dtype, self._foreach)
            self._sgd(new, [grads[i] for i in places], [*new_buffers], bucket.options)
            write_back(old + old_buffers, new + new_buffers, skip, self._foreach)
            new, new_buffers = [], []  # freed before the next chunk is made

    def _sgd(self, params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], options: Options) -> None:
        # torch's foreach Nesterov writes gradients that it has not copied
        writes_grad = self._foreach and options.nesterov and options.weight_decay == 0 and not options.maximize
        lr = options.lr
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # it stays on the CPU, where sgd reads it
        dampening = options.dampening
        if options.differentiable and options.momentum != 0 and buffers[0] is None:
            # torch's first buffer is no part of the graph
            buffers[:] = [torch.zeros_like(param) for param in params]
            dampening = 0.0
        sgd(
            params,
            list(torch._foreach_mul(grads, 1.0)) if writes_grad else grads,
            buffers if options.momentum != 0 else [None] * len(params),
            foreach=self._foreach,
            fused=self._fused,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            lr=cast(float, lr),  # it takes tensors too; older versions do not say so
            dampening=dampening,
            nesterov=options.nesterov,
            maximize=options.maximize,
        )
        if self._fused:
            bump_versions(params + [buffer for buffer in buffers if buffer is not None])

"""torch's own SGD for groups that are not adapted, in the implementation that the group's options select."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from fastlars.buckets import Backend, Bucket, Norms
from fastlars.compat import bump_versions
from fastlars.dtypes import is_half
from fastlars.formula import is_adapted
from fastlars.options import Options

from .eager import make_state, measure
from .layouts import on_cpu


def is_torch_sgd(params: list[Tensor], options: Options) -> bool:
    """Whether torch's SGD can replace our update. It must support the options and must not read lr from a GPU."""
    if options.kahan_sum and any([is_half(param.dtype) for param in params]):  # noqa: C419  old compilers cannot trace generators
        return False
    lr = options.lr
    reads_lr = isinstance(lr, Tensor) and (lr.requires_grad or lr.device.type != "cpu")
    return not (is_adapted(options) or options.lr_in_momentum or reads_lr)


class TorchSGD:
    """torch's SGD, for groups and tensors that ``ours``, our backend of the same kind, would also take."""

    takes_scale = False

    def __init__(self, ours: Backend, *, foreach: bool = False, fused: bool = False) -> None:
        """Use torch's implementation of the same kind as ``ours``."""
        self._ours, self._foreach, self._fused = ours, foreach, fused
        self.name = "fused" if fused else ours.name
        self.traceable = ours.traceable
        # torch updates tensors with and without a buffer in one call, except in fused kernels; the bits depend on it
        self.mixes_first_steps = not fused

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        """True for groups that are not adapted and that ``ours`` wants.

        Steps that may be skipped are accepted only on CPU, where reading the gate does not synchronise.
        """
        reads_gate = not gated or (not torch.compiler.is_compiling() and all(on_cpu(params)))
        return is_torch_sgd(params, options) and reads_gate and self._ours.wants(params, options, gated)

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether ``ours`` serves these tensors and each gradient has its parameter's dtype.

        torch creates buffers in the gradient's dtype, and its kernel misreads a buffer of any other dtype.
        """
        alike = all([param.dtype == grad.dtype for param, grad in zip(params, grads)])  # noqa: C419  a list traces
        return alike and self._ours.serves(params, grads, momentum_buffers)

    def plan(self, params: list[Tensor]) -> None:
        """Return None, because this backend needs no plan."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:  # noqa: ARG002
        """Compute the gradient norms that ``skip_nonfinite`` needs."""
        return measure(bucket, self._foreach)

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:  # noqa: ARG002
        """Call torch's `sgd` once for the whole bucket. If the gate is nonzero, do nothing."""
        if gate is not None and gate.any():
            return
        grads, buffers, options = bucket.grads, bucket.momentum_buffers, bucket.options
        # pass copies, because torch's foreach SGD with Nesterov momentum overwrites gradients that it has not copied itself
        if self._foreach and options.nesterov and options.weight_decay == 0 and not options.maximize:
            grads = list(torch._foreach_mul(grads, 1.0))
        dampening = options.dampening
        if options.differentiable and bucket.is_first_step:
            # start from zeros without dampening, because torch would create the first buffer outside autograd's graph
            make_state(bucket)
            dampening = 0.0
        lr = options.lr
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # lr is on the CPU, where sgd may read it
        sgd(
            bucket.params,
            grads,
            buffers if options.momentum != 0 else [None] * len(bucket.params),
            foreach=self._foreach,
            fused=self._fused,
            weight_decay=options.weight_decay,
            momentum=options.momentum,
            lr=cast(float, lr),  # sgd also takes tensors, but older versions do not say so in their types
            dampening=dampening,
            nesterov=options.nesterov,
            maximize=options.maximize,
        )
        if self._fused:
            bump_versions(bucket.params + [buffer for buffer in buffers if buffer is not None])

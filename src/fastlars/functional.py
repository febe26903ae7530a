"""The functional form: `lars()` steps tensors that share their options."""

from typing import List, Optional, Union  # noqa: UP035  every TorchScript version reads these spellings

import torch
from torch import Tensor

from . import sharding
from .backends import leaves_graph
from .buckets import Group
from .checks import check_no_leaves
from .compat import is_scripting, outside_graphs
from .formula import is_compensated
from .options import Options, check_can_be_skipped
from .script import scripted_step
from .step import step


def lars(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    lr: Union[float, Tensor],
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    trust_coefficient: float = 0.001,
    eps: float = 1e-8,
    adapt: Optional[bool] = None,
    trust_clip: bool = False,
    trust_denominator: str = "separate",
    lr_in_momentum: bool = False,
    skip_nonfinite: bool = False,
    maximize: bool = False,
    foreach: Optional[bool] = None,
    differentiable: bool = False,
    fused: Optional[bool] = None,
    kahan_sum: Optional[bool] = None,
    grad_scale: Optional[Tensor] = None,
    found_inf: Optional[Tensor] = None,
    compensations: Optional[List[Optional[Tensor]]] = None,
) -> None:
    """One LARS step, in place, for tensors that share their options.

    It takes the options of :class:`fastlars.LARS` in the same order and with the same defaults, but does not check their
    values. Gradients are not written. Unless ``differentiable``, autograd does not record the step, so parameters may be
    leaves.

    Args:
        params: tensors to update, of any shape, floating or complex.
        grads: their gradients, of the same shapes.
        momentum_buffers: their momentum buffers, updated in place. At a tensor's first step the entry is None, and the
            new buffer replaces it. Without momentum the list is not read and may be empty.
        lr: learning rate, a float or a 1-element tensor, which is not read on the host.
        grad_scale: 1-element tensor that gradients are divided by first, such as the scale of ``torch.amp.GradScaler``.
            Only the CUDA kernels need no copy of the gradients for it.
        found_inf: 1-element tensor. If it is not 0, nothing changes. The device decides.
        compensations: rounding errors of each half-precision parameter, in its dtype, updated in place. None entries are
            filled in. Without this list there are no Kahan sums. Entries for parameters of other dtypes are not read.

    Raises:
        ValueError: for ``dampening`` with ``found_inf`` or ``skip_nonfinite`` (see :class:`fastlars.LARS`), and for
            ``kahan_sum=True`` without ``compensations``.
        RuntimeError: if a CUDA graph captures the step of tensors that lack a momentum buffer.

    Example:
        >>> w, v = torch.tensor([3.0, 4.0]), torch.zeros(2)
        >>> lars([w], [torch.tensor([0.0, 2.0])], [v], lr=1.0, momentum=0.9, trust_coefficient=0.1, adapt=True)
        >>> w  # |w| = 5 and |g| = 2, so the ratio is 0.1 * 5 / 2 = 0.25
        tensor([3.0000, 3.5000])
    """
    if not params:
        return
    options = Options(
        lr,
        momentum,
        dampening,
        weight_decay,
        nesterov,
        trust_coefficient,
        eps,
        adapt,
        trust_clip,
        trust_denominator,
        lr_in_momentum,
        skip_nonfinite,
        maximize,
        foreach,
        differentiable,
        fused,
        kahan_sum,
    )
    if skip_nonfinite or found_inf is not None:
        check_can_be_skipped(momentum, dampening, "a step that the device may skip")
    if is_scripting():
        if compensations is not None:
            raise RuntimeError("compensations cannot be scripted; leave them out, and kahan_sum=None")
        scripted_step(params, grads, momentum_buffers, options, grad_scale, found_inf)
    else:
        _step(Group(params, grads, momentum_buffers, [], options), compensations, grad_scale, found_inf)


def _step(
    group: Group,
    compensations: Optional[List[Optional[Tensor]]],
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
) -> None:
    """The step outside TorchScript."""
    params, options = group.params, group.options
    # entries of parameters without compensation are not read
    keeps = [is_compensated(param.dtype, options) for param in params]
    if compensations is None and options.kahan_sum and any(keeps):
        raise ValueError("kahan_sum=True needs compensations: a list like params, of None before the first step")
    read: List[Optional[Tensor]] = []
    if compensations is not None and any(keeps):
        read = [compensations[i] if keep else None for i, keep in enumerate(keeps)]
        group = group._replace(compensations=read)
    recorded = options.differentiable and torch.is_grad_enabled()
    if recorded:
        check_no_leaves(params)
    leaves = torch.compiler.is_compiling() and (sharding.any_sharded(params) or leaves_graph(params, options))
    with torch.set_grad_enabled(recorded):
        (_step_group_outside_graphs if leaves else _step_group)(group, grad_scale, found_inf)
    if compensations is not None and read:
        for i, keep in enumerate(keeps):
            if keep:
                compensations[i] = read[i]


def _step_group(group: Group, grad_scale: Optional[Tensor], found_inf: Optional[Tensor]) -> None:
    step([group], grad_scale, found_inf, sharding.sharded([(group.params, group.options)]))


# A fused step runs entirely outside the graph, like torch's own. torch.compile traces none of it.
_step_group_outside_graphs = outside_graphs(_step_group)

"""The functional form of LARS, the function `lars`."""

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
    """Perform one LARS step in place, for tensors that share their options.

    It takes the options of :class:`fastlars.LARS` in the same order and with the same defaults, but does not check their
    values. The step does not write gradients. Unless ``differentiable`` is True, autograd does not record the step, so
    parameters may be leaves.

    Args:
        params: tensors to update, of any shape, floating or complex.
        grads: the gradients of the parameters, of the same shapes.
        momentum_buffers: the momentum buffers of the parameters, updated in place. An entry is None before the tensor's
            first step, which replaces it with a new buffer. Without momentum the list is not read and may be empty.
        lr: learning rate, a float or a 1-element tensor. A tensor on an accelerator is not read on the host.
        grad_scale: 1-element tensor by which gradients are divided first, such as the scale of ``torch.amp.GradScaler``.
            All implementations except the CUDA kernels copy the gradients to do so.
        found_inf: 1-element tensor. If it is not 0, the step changes nothing. On an accelerator it is not read on the host.
        compensations: the rounding errors of half-precision parameters, in their dtypes, updated in place. The step
            replaces None with a new tensor. Without this list there are no Kahan sums. Entries for parameters of other
            dtypes are not read.

    Raises:
        ValueError: for ``momentum`` with ``dampening`` if the step may be skipped (``found_inf`` or ``skip_nonfinite``), and
            for ``kahan_sum=True`` without ``compensations``.
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
    """Run the step outside TorchScript."""
    params, options = group.params, group.options
    # read only the entries of parameters that are compensated
    keeps = [is_compensated(param.dtype, options) for param in params]
    if compensations is None and options.kahan_sum and any(keeps):
        raise ValueError(
            "kahan_sum=True needs compensations, a list with one entry per parameter, None before the first step"
        )
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


# Fused and sharded steps run entirely outside the graph, like torch's own fused steps. torch.compile traces none of them.
_step_group_outside_graphs = outside_graphs(_step_group)

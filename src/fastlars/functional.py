"""The functional LARS: measure, coefficients, update; in one implementation per tensor and one per list.

Every option enters through the coefficients b and c of `coefficients.py`; the implementations at the end of this file know
only v = m v + b g + c w and w -= q v. The class measures all groups before it updates any, where a decision spans groups.
"""

from typing import List, Optional, Tuple, Union, cast  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from . import fused_cpu, fused_cuda, sharding
from .coefficients import Number, coefficients, is_adapted, on_device, scalar_lr, sign
from .compat import bump_versions, is_scripting, outside_graphs
from .compiled import joint_norms, norms, unbind
from .dispatch import Part, implementation, split
from .norms import buckets, is_conjugate, is_half, norm_dtype, real
from .options import Options, check_can_be_skipped
from .updates import _multi_tensor_lars, _scripted_multi_tensor_lars, _single_tensor_lars

# What one call, or one param group, steps: params, grads, momentum_buffers (None at a first step), options, and the
# first_steps of `Part`.
Group = Tuple[List[Tensor], List[Tensor], List[Optional[Tensor]], Options, Optional[List[Tensor]]]


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
    grad_scale: Optional[Tensor] = None,
    found_inf: Optional[Tensor] = None,
) -> None:
    """One LARS step, in place, for tensors that share their options.

    The options are those of :class:`fastlars.LARS`, in its order and with its defaults; their values are not checked
    here. Gradients are not written.

    Args:
        params: tensors to update, of any shape, floating or complex.
        grads: their gradients, of the same shapes.
        momentum_buffers: their momentum buffers, updated in place; None for a tensor whose first step this is, whose
            place in the list then receives the new buffer. Without momentum it is not read and may be empty.
        lr: learning rate, a float or a 1-element tensor, which is not read on the host.
        grad_scale: 1-element tensor that the gradients are divided by first, as of ``torch.amp.GradScaler``: on a copy of
            them, outside the CUDA kernels.
        found_inf: 1-element tensor; where it is not 0, nothing changes. Decided on the device.

    Raises:
        ValueError: for ``dampening`` with ``found_inf`` or ``skip_nonfinite`` (see :class:`fastlars.LARS`).
        RuntimeError: where a CUDA graph captures the step of tensors that lack a momentum buffer.

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
    )
    if skip_nonfinite or found_inf is not None:
        check_can_be_skipped(momentum, dampening, "a step that the device may skip")
    if is_scripting():
        _scripted_step(params, grads, momentum_buffers, options, grad_scale, found_inf)
    else:
        if not torch.compiler.is_compiling() and fused_cuda.is_capturing():
            check_captured(params, momentum_buffers, momentum, "lars")
        groups: List[Group] = [(params, grads, momentum_buffers, options, None)]
        if sharding.any_sharded(params) or implementation(params, options) == "fused":
            shards = sharding.sharded([(params, options)])
            _step_groups_outside_graphs(groups, grad_scale, found_inf, _TABLES, shards)
        else:
            step_groups(groups, grad_scale, found_inf, _TABLES)


def check_captured(params: List[Tensor], momentum_buffers: List[Optional[Tensor]], momentum: float, where: str) -> None:
    """Raise where the graph being captured would make a buffer: every replay would fill it with zeros."""
    for i, (param, buffer) in enumerate(zip(params, momentum_buffers)):
        if momentum != 0 and buffer is None and param.is_cuda:
            raise RuntimeError(
                f"{where}: capturing a LARS step needs an eager step of the same tensors before it, which makes their momentum "
                f"buffers; tensor {i} of those with a gradient has none. Nothing has changed"
            )


# of all functional steps; an optimizer has its own, which go with it
_TABLES = fused_cuda.Tables()


def step_groups(
    groups: List[Group],
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
    tables: fused_cuda.Tables,
    shards: Optional[sharding.Sharded] = None,
) -> None:
    """Step all groups; new momentum buffers are put into their lists."""
    parts_of = [split(*(group if shards is None else shards.local(group))) for group in groups]
    steps = [(part, group[3]) for group, parts in zip(groups, parts_of) for part in parts]
    run(steps, grad_scale, found_inf, tables, shards)
    for (_, _, momentum_buffers, _, _), parts in zip(groups, parts_of):
        for part in parts:
            for i, buffer in zip(part.indices, part.momentum_buffers):
                if momentum_buffers[i] is None:
                    momentum_buffers[i] = buffer
    if shards is not None:
        shards.finish(groups)


# A fused step leaves the graph as a whole, as torch's own: once, and nothing of it is traced.
_step_groups_outside_graphs = outside_graphs(step_groups)


def run(
    steps: List[Tuple[Part, Options]],
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
    tables: fused_cuda.Tables,
    shards: Optional[sharding.Sharded] = None,
) -> None:
    """Measure all parts, then update them: what one part's gradients are may stop all parts that ask for it."""
    on_triton = [step for step in steps if _is_triton(step[0], step[1], grad_scale, found_inf)]
    others = [step for step in steps if not _is_triton(step[0], step[1], grad_scale, found_inf)]
    firsts = [_is_first_step(part, options) for part, options in on_triton]
    # tables count steps: in a graph that launches nothing, that would be one to guard
    launched = fused_cuda.measure(on_triton, grad_scale, tables) if on_triton else []
    if grad_scale is not None:
        others = [(_unscaled(part, grad_scale), options) for part, options in others]
    measured = [measure(part, options, early=shards is not None) for part, options in others]

    skip = found_inf
    rows = [known for known, (_, options) in zip(measured, others) if options.skip_nonfinite]
    flagged = [handle for handle in launched if handle.options.skip_nonfinite]
    # among kernels on one device a flag there decides
    if rows or len({handle.norms.device for handle in flagged}) > 1 or (flagged and shards is not None):
        skip = any_nonfinite([*rows, *[handle.norms for handle in flagged]], found_inf)
    if shards is not None:
        known_here = [(part, options, known) for (part, options), known in zip(others, measured)]
        known_here += [(handle.part, handle.options, handle.norms) for handle in launched]
        whole, found_inf, skip = shards.exchange(known_here, found_inf, skip)
        measured = whole[: len(others)]
        for handle, known, first_step in zip(launched, whole[len(others) :], firsts):
            b, c = _coefficients(handle.part, known, handle.options, first_step)
            # the kernels take gradients as they are
            handle.coefficients[:, 0] = b if grad_scale is None else b / on_device(grad_scale, handle.coefficients)
            handle.coefficients[:, 1] = c
    for handle in launched:
        fused_cuda.update(handle, skip if handle.options.skip_nonfinite else found_inf)
    for known, (part, options) in zip(measured, others):
        update(part, known, options, skip if options.skip_nonfinite else found_inf)


def _scripted_step(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    options: Options,
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
) -> None:
    """`step_groups` in TorchScript: one group, and no kernels of ours."""
    parts = split(params, grads, momentum_buffers, options)
    if grad_scale is not None:
        parts = [_unscaled(part, grad_scale) for part in parts]
    measured: List[Optional[Tensor]] = []
    for part in parts:
        measured.append(measure(part, options))  # noqa: PERF401  a comprehension would lose the type
    skip = any_nonfinite(measured, found_inf) if options.skip_nonfinite else found_inf
    for part, known in zip(parts, measured):
        update(part, known, options, skip)
        for i, buffer in zip(part.indices, part.momentum_buffers):
            momentum_buffers[i] = buffer


def _is_triton(part: Part, options: Options, grad_scale: Optional[Tensor], found_inf: Optional[Tensor]) -> bool:
    if part.implementation != "triton":
        return False
    # torch's fused SGD knows no gate, writes the gradients that it unscales, and takes those of the parameter's dtype only
    ours = options.skip_nonfinite or found_inf is not None or part.params[0].dtype != part.grads[0].dtype
    return ours or grad_scale is not None or not _is_torch_sgd(options)


def _unscaled(part: Part, grad_scale: Tensor) -> Part:
    """With gradients divided by grad_scale, whose bits are those of ``GradScaler.unscale_``."""
    inverse = on_device(grad_scale, part.params[0]).to(torch.float32).reciprocal()
    # not in float16: numbers too small for it are why there is a scale
    dtype = torch.float32 if part.grads[0].dtype == torch.float16 else part.grads[0].dtype
    # the last: of two 0-dim tensors the product has the wider dtype
    grads = [(grad.to(dtype) * inverse).to(dtype) for grad in part.grads]
    return Part(part.implementation, part.indices, part.params, grads, part.momentum_buffers, part.first_steps)


def measure(part: Part, options: Options, early: bool = False) -> Optional[Tensor]:
    """What has to be known of n tensors before their update, shape (rows, n); None where that is nothing.

    For adapted tensors the param norms, then the direction norms; with ``skip_nonfinite`` gradient norms come last. The
    fused CPU step measures at the update, while the tensor is in cache, unless ``early``.
    """
    adapted = is_adapted(options)
    if not adapted and not options.skip_nonfinite:
        return None
    fused = part.implementation == "fused" and not early
    if fused and not options.skip_nonfinite:
        return None
    foreach = part.implementation == "foreach"
    params = [real(param) for param in part.params]
    if options.differentiable:
        # autograd keeps what a norm was taken of, and the update writes it
        params = [param.clone() for param in params]
    grads = [real(grad) for grad in part.grads]

    rows: List[Tensor] = []
    if adapted and not fused:
        rows.append(norms(params, foreach))
    if adapted and not fused and options.trust_denominator == "joint":
        rows.append(joint_norms(params, grads, sign(options), options.weight_decay, foreach))
    if options.skip_nonfinite or options.trust_denominator == "separate":
        rows.append(norms(grads, foreach))
    return torch.cat(rows).view(len(rows), -1)


def any_nonfinite(measured: List[Optional[Tensor]], found_inf: Optional[Tensor]) -> Tensor:
    """Whether ``found_inf`` is set or a gradient norm (the last row of each) is not finite, as a 0-dim bool tensor."""
    flags: List[Tensor] = []
    for rows in measured:
        if rows is not None:
            flags.append((~rows[-1].isfinite()).any())  # noqa: PERF401  TorchScript knows no `if` in a comprehension
    if found_inf is not None:
        flags.append(found_inf.reshape(()) != 0)
    return torch.stack([on_device(flag, flags[0]) for flag in flags]).any()


def update(part: Part, measured: Optional[Tensor], options: Options, found_inf: Optional[Tensor]) -> None:
    """Update parameters and momentum buffers of a part from what `measure` returned for it."""
    if part.implementation == "fused":
        # on the CPU, as all tensors of the part: reading it waits for nothing
        if found_inf is not None and found_inf.any():
            return
        found_inf = None
    if not is_scripting() and found_inf is None and part.first_steps is None and _is_torch_sgd(options):
        _torch_sgd(part.params, part.grads, part.momentum_buffers, options, part.implementation)
    elif not is_scripting() and part.implementation == "fused":
        # one row are gradient norms: it takes the others itself
        norms_ = measured if measured is not None and len(measured) > 1 else None
        fused_cpu.step(part.params, part.grads, part.momentum_buffers, options, norms_, part.plan)
    else:
        _update_ours(part, measured, options, found_inf)


def _update_ours(part: Part, measured: Optional[Tensor], options: Options, found_inf: Optional[Tensor]) -> None:
    b, c = _coefficient_lists(part, measured, options)
    buffers: List[Tensor] = []
    for i, buffer in enumerate(part.momentum_buffers):
        buffers.append(torch.zeros_like(part.params[i]) if buffer is None else buffer)
        part.momentum_buffers[i] = buffers[i]

    dtype = part.params[0].dtype
    foreach = part.implementation == "foreach"
    # a conjugate view cannot be written through its real view, which is a copy
    if found_inf is None and not is_half(dtype) and not is_conjugate(part.params[0]):
        _step(part.params, part.grads, buffers, b, c, options, foreach)
        return

    # On copies, a bucket at a time: half types are computed in float32 and rounded once, when they are written back; a
    # step that the device may skip is written back or not (a factor of 0 would not do: 0 * NaN is NaN).
    torch_sgd = part.first_steps is None and _is_torch_sgd(options)
    wide = torch.float32 if is_half(dtype) and not torch_sgd else dtype
    skip = None if found_inf is None else on_device(found_inf, part.params[0]) != 0
    for bucket in buckets(part.params) if foreach else [[i] for i in range(len(part.params))]:
        params = [part.params[i] for i in bucket]
        grads = [part.grads[i] for i in bucket]
        momentum_buffers = [buffers[i] for i in bucket] if options.momentum != 0 else []
        new_params = _copies(params, wide, foreach)
        new_buffers = _copies(momentum_buffers, wide, foreach)
        if not is_scripting() and torch_sgd:
            _torch_sgd(new_params, grads, [*new_buffers], options, part.implementation)
        else:
            if foreach and is_half(grads[0].dtype):
                grads = _copies(grads, wide, foreach)  # foreach ops are one launch only among equal dtypes
            _step(new_params, grads, new_buffers, [b[i] for i in bucket], [c[i] for i in bucket], options, foreach)
        _write_back(params + momentum_buffers, new_params + new_buffers, skip, foreach)
        new_params, new_buffers, grads = [], [], []  # freed before the next bucket is made


def _is_torch_sgd(options: Options) -> bool:
    """Whether torch's own SGD computes this step. With what it lacks, or would read lr on the host for, ours does."""
    if is_scripting():
        return False  # it is no script
    lr = options.lr
    reads_lr = isinstance(lr, Tensor) and (lr.requires_grad or lr.device.type != "cpu")
    return not (is_adapted(options) or options.lr_in_momentum or reads_lr)


def _torch_sgd(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    options: Options,
    implementation: str,
) -> None:
    # torch's foreach Nesterov writes to gradients that it has not copied
    writes_grad = (
        implementation == "foreach" and options.nesterov and options.weight_decay == 0 and not options.maximize
    )
    lr = options.lr
    if isinstance(lr, Tensor):
        lr = lr.reshape(())  # it stays on the CPU, where sgd reads it
    dampening = options.dampening
    if options.differentiable and options.momentum != 0 and momentum_buffers[0] is None:
        # torch's first buffer is no part of the graph
        momentum_buffers[:] = [torch.zeros_like(param) for param in params]
        dampening = 0.0
    sgd(
        params,
        list(torch._foreach_mul(grads, 1.0)) if writes_grad else grads,
        momentum_buffers if options.momentum != 0 else [None] * len(params),
        foreach=implementation == "foreach",
        fused=implementation in ("fused", "triton"),
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        lr=cast(float, lr),  # it takes tensors too; older versions do not say so
        dampening=dampening,
        nesterov=options.nesterov,
        maximize=options.maximize,
    )
    if implementation in ("fused", "triton"):
        bump_versions(params + [buffer for buffer in momentum_buffers if buffer is not None])


def _coefficient_lists(part: Part, measured: Optional[Tensor], options: Options) -> Tuple[List[Tensor], List[Tensor]]:
    like = real(part.params[0])
    b, c = _coefficients(part, measured, options, _is_first_step(part, options))
    return _unbind(b, part, like), _unbind(c, part, like)


def _coefficients(part: Part, measured: Optional[Tensor], options: Options, first_step: bool) -> Tuple[Number, Number]:
    like = real(part.params[0])
    norms = (measured[0], measured[1]) if is_adapted(options) and measured is not None else None
    first_steps = part.first_steps  # TorchScript narrows names only
    b, c = coefficients(norms, scalar_lr(options.lr, like), first_step or first_steps is not None, options)
    if first_steps is not None:
        later = ~torch.stack(first_steps)  # k, as coefficients.py has it
        k = torch.ones_like(later, dtype=norm_dtype(like.dtype)).masked_fill(later, 1 - options.dampening)
        b, c = b * k, c * k
    return b, c


def _is_first_step(part: Part, options: Options) -> bool:
    return options.momentum != 0 and part.momentum_buffers[0] is None


def _unbind(numbers: Union[float, Tensor], part: Part, like: Tensor) -> List[Tensor]:
    """One 0-dim tensor for each of the part's, on their device and in the dtype of their norms."""
    dtype = norm_dtype(like.dtype)
    if isinstance(numbers, Tensor):
        if numbers.dim() == 1:  # norms had it, and each view is an operation
            return unbind(numbers)
        numbers = numbers.to(dtype)
    else:
        numbers = torch.full((), numbers, dtype=dtype, device=like.device)
    return unbind(numbers.expand(len(part.params)))


def _copies(tensors: List[Tensor], dtype: torch.dtype, foreach: bool) -> List[Tensor]:
    if not is_scripting() and torch.compiler.is_compiling():
        # no memory in a graph: the conversions become part of the loops that read them
        return (
            [t.to(dtype) for t in tensors]
            if tensors[:1] and tensors[0].dtype != dtype
            else [t.clone() for t in tensors]
        )
    # with the strides kept, even if they leave gaps: torch's kernels round bfloat16 differently in another layout
    copies = [
        torch.empty_like(t, dtype=dtype)
        if t.dtype != dtype
        else torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device)
        for t in tensors
    ]
    if not copies:
        return copies  # foreach ops refuse empty lists
    _write_back(copies, tensors, None, foreach)
    return copies


def _write_back(targets: List[Tensor], sources: List[Tensor], skip: Optional[Tensor], foreach: bool) -> None:
    # not in a graph, where it keeps the conversions out of the list kernel: a kernel a tensor
    if not is_scripting() and foreach and skip is None and not torch.compiler.is_compiling():
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources):
        # chosen in the target's dtype: a NaN that went through float32 and back has other bits
        target.copy_(source if skip is None else torch.where(skip, target, source.to(target.dtype)))


def _step(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Tensor],
    b: List[Tensor],
    c: List[Tensor],
    options: Options,
    foreach: bool,
) -> None:
    params = [real(param) for param in params]
    grads = [real(grad) for grad in grads]
    momentum_buffers = [real(buffer) for buffer in momentum_buffers]
    step_size = scalar_lr(options.lr, params[0])
    if options.lr_in_momentum:
        step_size = scalar_lr(1.0, params[0])
    if not is_scripting() and foreach:
        _multi_tensor_lars(params, grads, momentum_buffers, b, c, step_size, options)
    elif foreach:
        _scripted_multi_tensor_lars(params, grads, momentum_buffers, b, c, step_size, options)
    else:
        _single_tensor_lars(params, grads, momentum_buffers, b, c, step_size, options)

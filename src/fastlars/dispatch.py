"""Which implementation runs for which tensors: a list is sorted into parts, each of one implementation, device and dtype."""

from typing import TYPE_CHECKING, Dict, List, NamedTuple, Optional  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor

from . import fused_cpu, fused_cuda
from .coefficients import is_adapted
from .compat import default_foreach, is_scripting, operations_are_seen
from .layouts import find_shared_memory
from .norms import is_conjugate
from .options import Options

# TorchScript reads the types of fields, and knows none that means anything.
if TYPE_CHECKING:
    Plan = fused_cpu.Plan
else:
    Plan = int


_PLAIN = (Tensor, torch.nn.Parameter)


class Part(NamedTuple):
    """Tensors of one device and dtype that are all at their first step or all past it, unless ``first_steps`` says."""

    implementation: str  # "single", "foreach", "fused" (on CPU) or "triton" (fused on CUDA)
    indices: List[int]  # their places in the lists of the caller
    params: List[Tensor]
    grads: List[Tensor]
    momentum_buffers: List[Optional[Tensor]]  # empty without momentum
    # for each tensor a 0-dim bool tensor, in compiled steps with dampening: buffers are made before, and the graph must
    # serve first steps and later ones
    first_steps: Optional[List[Tensor]] = None
    # how the fused CPU step steps them, where that is known
    plan: Optional[Plan] = None


def split(
    params: List[Tensor],
    grads: List[Tensor],
    momentum_buffers: List[Optional[Tensor]],
    options: Options,
    first_steps: Optional[List[Tensor]] = None,
) -> List[Part]:
    """The tensors sorted into parts; torch's own helper does not sort while compiling."""
    preferred = implementation(params, options)
    if not is_scripting():  # noqa: SIM102  TorchScript would compile the second condition
        if len(set(map(id, params))) < len(params):
            preferred = "single"  # one step after the other: in lists each would start from what the tensor was
    if not is_scripting():  # noqa: SIM102  TorchScript would compile the second condition
        if preferred == "fused":
            whole = _as_one_part(params, grads, momentum_buffers, options)
            if whole is not None:
                return [whole]
    parts: Dict[Key, Part] = {}
    together = makes_its_buffers(options)
    for i, param in enumerate(params):
        grad = grads[i]
        buffer = momentum_buffers[i] if options.momentum != 0 else None
        if param.is_complex() and not grad.is_complex():
            grad = grad.to(param.dtype)  # else its last dimension could be taken for real and imaginary part
        if not is_scripting():  # noqa: SIM102  as above
            if grad_is_written(param, grad, buffer):
                grad = grad.clone()
        runs = runs_for(preferred, param, grad, buffer)
        # first steps are parts of their own, but where torch's SGD takes them together
        key = _key(runs, param, grad, buffer if first_steps is not None or not together else param)
        part = parts.get(key)
        if part is None:
            part = Part(runs, [], [], [], [], None if first_steps is None else [])
            parts[key] = part
        part.indices.append(i)
        part.params.append(param)
        part.grads.append(grad)
        if options.momentum != 0:
            part.momentum_buffers.append(buffer)
        of_part = part.first_steps  # TorchScript narrows names only
        if first_steps is not None and of_part is not None:
            of_part.append(first_steps[i])
    return list(parts.values())


def grad_is_written(param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> bool:
    """Whether the update of the parameter or its buffer would write the gradient, before all of that has been read."""
    plain = type(grad) in _PLAIN and type(param) in _PLAIN and (buffer is None or type(buffer) in _PLAIN)
    if not plain or torch.compiler.is_compiling() or grad.is_meta or operations_are_seen():
        return False  # there are no addresses
    memory = grad.untyped_storage().data_ptr()
    targets = [param] if buffer is None else [param, buffer]
    near = [t for t in targets if not t.is_meta and t.untyped_storage().data_ptr() == memory]
    return bool(near) and find_shared_memory([grad, *near], 1) is not None


def _as_one_part(
    params: List[Tensor], grads: List[Tensor], momentum_buffers: List[Optional[Tensor]], options: Options
) -> Optional[Part]:
    """The part, if one fused step serves all of these, as nearly always: sorting takes as long as small tensors."""
    buffers = momentum_buffers if options.momentum != 0 else []
    made = [buffer for buffer in buffers if buffer is not None]
    if len(made) not in (0, len(params)):
        return None
    lists = (grads, made) if made else (grads,)
    indices = list(range(len(params)))
    if params[0].is_cpu:
        plan = fused_cpu.plan(params, *lists)
        return None if plan is None else Part("fused", indices, params, grads, buffers, None, plan)
    return Part("triton", indices, params, grads, buffers) if fused_cuda.serves_all(params, *lists) else None


# What tells parts apart: anything that can be a key. TorchScript has few of these.
if TYPE_CHECKING:
    Key = object
else:
    Key = str


def _key(runs: str, param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> Key:
    if is_scripting():
        return f"{runs} {buffer is None} {is_conjugate(param)} {param.device} {param.dtype} {grad.dtype}"
    # what the fused CPU step serves is of one device and dtype
    elif runs == "fused":  # noqa: RET505  as in `where`
        return runs, buffer is None
    else:
        return runs, buffer is None, is_conjugate(param), param.device, param.dtype, grad.dtype


def runs_for(preferred: str, param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> str:
    """What runs for one tensor of a list for which `implementation` prefers this."""
    if not is_scripting() and preferred == "fused":
        if param.is_cpu and fused_cpu.serves([param], [grad], [param if buffer is None else buffer]):
            return "fused"
        if not param.is_cpu and fused_cuda.serves(param, grad, buffer):
            return "triton"
    _check_sizes(param, grad, buffer)
    if preferred == "fused" and param.is_cpu:
        return "single"
    if not is_scripting() and not torch.compiler.is_compiling():  # noqa: SIM102  as above
        # foreach ops write neither to negative views nor, as the next line says, to conjugate ones
        if param.is_neg() or (buffer is not None and buffer.is_neg()):
            return "single"
    return "single" if preferred == "single" or is_conjugate(param) else "foreach"


def _check_sizes(param: Tensor, grad: Tensor, buffer: Optional[Tensor]) -> None:
    if grad.shape != param.shape:
        raise RuntimeError(f"a parameter of shape {param.shape} has a gradient of shape {grad.shape}; make it anew")
    if buffer is not None and buffer.shape != param.shape:
        raise RuntimeError(
            f"a parameter of shape {param.shape} has a momentum buffer of shape {buffer.shape}; when a parameter is "
            "resized, delete its state (optimizer.state.pop(param)), or make the optimizer anew"
        )


def is_torch_sgd(options: Options) -> bool:
    """Whether torch's own SGD computes this step. With what it lacks, or would read lr on the host for, ours does."""
    if is_scripting():
        return False  # it is no script
    lr = options.lr
    reads_lr = isinstance(lr, Tensor) and (lr.requires_grad or lr.device.type != "cpu")
    return not (is_adapted(options) or options.lr_in_momentum or reads_lr)


def makes_its_buffers(options: Options) -> bool:
    """Whether torch's SGD makes the buffers of first steps itself, among tensors that are past theirs: its bits depend on it."""
    fused = options.fused is not None and options.fused
    return is_torch_sgd(options) and not fused and not options.differentiable


def implementation(params: List[Tensor], options: Options) -> str:
    """What runs for these tensors: "single", "foreach" or "fused" (for those of them that it serves)."""
    fused, foreach = options.fused, options.foreach
    if fused is not None and fused:
        if is_scripting():
            raise RuntimeError("fused=True cannot be scripted; leave fused=None or use foreach=True")
        return "fused"
    if foreach is not None and foreach:
        return "foreach"
    if not is_scripting() and fused is None and foreach is None and not options.differentiable:
        # torch's SGD is fused only where one asks for it, and bits differ: groups that are not adapted follow it
        if is_adapted(options) and all([param.is_cpu for param in params]):  # noqa: C419  a list: half the time
            return "fused"
        if default_foreach(params):
            return "foreach"
    return "single"

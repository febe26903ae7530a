"""The list of backends, and `split`, which sorts a group into buckets and chooses a backend for each bucket."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlars.buckets import Backend, Bucket, Group
from fastlars.checks import check_captured, check_fit, is_capturing
from fastlars.compat import metadata_guard, operations_are_seen
from fastlars.dtypes import is_conjugate
from fastlars.formula import is_compensated, unscaled
from fastlars.options import Options

from .eager import FOREACH, SINGLE
from .fused_cpu import FUSED_CPU
from .layouts import PLAIN, find_shared_memory, storage_of
from .torch_sgd import TorchSGD
from .triton import TRITON

# In order of preference. A tensor goes to the first backend that wants its group and serves the tensor.
BACKENDS: list[Backend] = [
    TorchSGD(FUSED_CPU, fused=True),
    TorchSGD(TRITON, fused=True),
    FUSED_CPU,
    TRITON,
    TorchSGD(FOREACH, foreach=True),
    FOREACH,
    TorchSGD(SINGLE),
    SINGLE,
]


_T = TypeVar("_T")


class _Place(NamedTuple):
    """A bucket without its tensors. It has their indices in the group, their backend, and the backend's plan."""

    backend: Backend
    indices: list[int]
    plan: Any


def wanted(params: list[Tensor], options: Options, gated: bool = False) -> list[Backend]:
    """The backends that want a group, in order of preference."""
    return [backend for backend in BACKENDS if backend.wants(params, options, gated)]


def leaves_graph(params: list[Tensor], options: Options) -> bool:
    """Whether torch.compile cannot trace the preferred backend of a group."""
    for backend in BACKENDS:  # stops early, because a compiled frame keeps everything that it inspects alive
        if backend.wants(params, options, False):
            return not backend.traceable
    return False


def split(group: Group, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> list[Bucket]:
    """Sort a group into buckets. torch's own helper is not used, because it does not sort under torch.compile."""
    options = group.options
    buffers = group.momentum_buffers if options.momentum != 0 else []
    gated = bool(options.skip_nonfinite) or found_inf is not None or grad_scale is not None
    capturing = not torch.compiler.is_compiling() and is_capturing()
    # Do not use the cache under a dispatch mode. A plan made there may hold fake tensors, and tracing would turn the memory of
    # a cached plan into a constant. Do not use it while a CUDA graph is captured. Each replay writes to the plan's memory, even
    # after a later step has replaced the cached plan, so this memory must come from the graph's own pool.
    if group.memory is None or capturing or operations_are_seen():
        places, grads = _sort(group, buffers, gated)
    else:
        assignment = group.memory.assignments.setdefault(group.where, _Assignment())
        places, grads = assignment.places(group, buffers, gated)
    buckets: list[Bucket] = []
    for backend, indices, plan in places:
        params, of_bucket, momentum_buffers = _at(indices, group.params), _at(indices, grads), _at(indices, buffers)
        if grad_scale is not None and not backend.takes_scale:
            of_bucket = [unscaled(grad, grad_scale) for grad in of_bucket]
        buckets.append(
            Bucket(
                backend,
                indices,
                params,
                of_bucket,
                momentum_buffers,
                _at(indices, group.compensations) if is_compensated(params[0].dtype, options) else [],
                options,
                is_first_step=len(momentum_buffers) > 0 and momentum_buffers[0] is None,
                grad_scale=grad_scale if backend.takes_scale else None,
                plan=plan,
                memory=group.memory,
            )
        )
        if capturing:
            check_captured(buckets[-1], group.where)
    return buckets


def _at(indices: list[int], tensors: list[_T]) -> list[_T]:
    """The tensors at these indices. If they are all indices of the list, return the list itself, to store new state in it."""
    return tensors if len(tensors) in (0, len(indices)) else [tensors[i] for i in indices]


class _Assignment:
    """Cached dispatch of a group, valid while one guard finds all tensor metadata unchanged.

    Sorting takes longer than a whole step of small tensors on a CPU, and longer than launching all kernels on a GPU.
    """

    def __init__(self) -> None:
        """Start without a cached result."""
        self._seen = False
        self._guard: Callable[..., bool] | None = None
        self._key: Any = None
        self._places: list[_Place] = []

    def places(self, group: Group, buffers: list[Tensor | None], gated: bool) -> tuple[list[_Place], list[Tensor]]:
        """Return what `_sort` returns, from the cache if it is still valid."""
        made = [buffer for buffer in buffers if buffer is not None]
        kept = [compensation for compensation in group.compensations if compensation is not None]
        tensors = list(chain(group.params, group.grads, made, kept))
        counts = len(group.params), len(buffers), len(made), len(kept)
        key = (_kind(group.options), gated, counts, torch.is_inference_mode_enabled())
        if self._guard is not None and key == self._key and self._guard(*tensors):
            reads_first = not self._places[0].backend.traceable  # fused steps read gradients before overwriting them
            if reads_first or not _share_storage(group.grads, [*group.params, *made, *kept]):
                return self._places, group.grads
        failed, self._guard = self._guard is not None, None
        self._places, grads = _sort(group, buffers, gated)
        # Build the guard the second time a list is seen, but not right after a guard failed, because building one costs two
        # sorts. A guard detects neither missing buffers nor gradients that share memory with other tensors, so no guard
        # is built for such lists.
        if self._seen and not failed and len(made) in (0, len(buffers)) and grads is group.grads:
            self._guard = metadata_guard(tensors)
        self._key, self._seen = key, not failed
        return self._places, grads


def _kind(options: Options) -> list[Any]:
    """The part of the options that `Backend.wants` may depend on, for the cache key.

    It may depend on whether a number is 0, but not on its exact value, and on the device and requires_grad of a tensor lr.
    """
    lr = options.lr
    kinds = [value != 0 if isinstance(value, float) else value for value in options[1:]]
    return [*kinds, (lr.device, lr.requires_grad) if isinstance(lr, Tensor) else None]


def _sort(group: Group, buffers: list[Tensor | None], gated: bool) -> tuple[list[_Place], list[Tensor]]:
    """The `_Place`s of a group, and its gradients. A gradient that the step would overwrite too early is copied."""
    params, grads, backends = group.params, group.grads, wanted(group.params, group.options, gated)
    made = [buffer for buffer in buffers if buffer is not None]
    kept = [compensation for compensation in group.compensations if compensation is not None]
    if not torch.compiler.is_compiling() and len(set(map(id, params))) < len(params):
        # a tensor listed twice needs `Single`, which takes its steps in order; in a foreach list both would use its old value
        backends = [backend for backend in backends if backend.name == SINGLE.name]
    one_step = len(made) in (0, len(buffers))
    # what follows checks and copies gradients, which is needed neither by fused steps nor in a graph
    quick = torch.compiler.is_compiling() or not backends[0].traceable
    if one_step and quick and _is_uniform(params, grads) and _serves(backends[0], params, grads, made + kept):
        return [_Place(backends[0], list(range(len(params))), backends[0].plan(params))], grads
    readable: list[Tensor] = []
    found: dict[Any, tuple[Backend, list[int]]] = {}
    for i, param in enumerate(params):
        grad, buffer = grads[i], buffers[i] if len(buffers) > 0 else None
        compensation = group.compensations[i] if len(group.compensations) > 0 else None
        if not torch.compiler.is_compiling():
            check_fit(param, grad, buffer, compensation, group.where)
        if param.is_complex() and not grad.is_complex():
            grad = grad.to(param.dtype)  # otherwise its last dimension could be mistaken for real and imaginary parts
        if _is_written(grad, param, buffer, compensation):
            grad = grad.clone()
        readable.append(grad)
        backend = preferred(backends, param, grad, buffer, compensation)
        first_step = buffer is None and not backend.mixes_first_steps
        key = (backend.name, first_step, is_conjugate(param), param.device, param.dtype, grad.dtype)
        if key not in found:  # old compilers cannot trace setdefault
            found[key] = backend, []
        found[key][1].append(i)
    places = [_Place(backend, indices, backend.plan(_at(indices, params))) for backend, indices in found.values()]
    same = all([one is other for one, other in zip(readable, grads)])  # noqa: C419  old compilers cannot trace generators
    return places, grads if same else readable


def _is_written(grad: Tensor, *of_step: Tensor | None) -> bool:
    """Whether updating the parameter or its state would overwrite the gradient before all of it has been read."""
    written = [tensor for tensor in of_step if tensor is not None]
    if torch.compiler.is_compiling() or operations_are_seen() or not _share_storage([grad], written):
        return False
    return find_shared_memory([grad, *written], 1) is not None


def _share_storage(grads: list[Tensor], written: list[Tensor]) -> bool:
    """Whether a gradient and a written tensor share a storage, as after ``p.grad = p.detach()``.

    Tensors in one storage need not overlap. `_is_written` checks whether they do.
    """
    if not PLAIN.issuperset(map(type, [*grads, *written])):
        return False  # subclasses may have no addresses
    return not set(map(storage_of, grads)).isdisjoint(map(storage_of, written))


def preferred(backends: list[Backend], param: Tensor, grad: Tensor, *state: Tensor | None) -> Backend:
    """The first of these backends that serves a tensor with this gradient and state."""
    made = [tensor for tensor in state if tensor is not None]
    for backend in backends:
        if _serves(backend, [param], [grad], made):
            return backend
    return SINGLE


def _serves(backend: Backend, params: list[Tensor], grads: list[Tensor], state: list[Tensor]) -> bool:
    """Whether a backend serves tensors with this state. Compensations are checked like momentum buffers."""
    times = max(1, len(state) // len(params))
    return backend.serves(params * times, grads * times, state)


def _is_uniform(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether these tensors form one bucket if one backend serves them all."""
    kinds = [(param.dtype, param.device, grad.dtype) for param, grad in zip(params, grads)]
    alike = all([kind == kinds[0] for kind in kinds])  # noqa: C419  old compilers cannot trace generators
    alike = alike and len(params) > 0 and not params[0].is_complex()
    return alike and (torch.compiler.is_compiling() or all(map(Tensor.is_same_size, params, grads)))

"""Which backend steps which tensors: the list of backends, and `split`, which sorts a group into buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

from torch import Tensor

from fastlars.buckets import Backend, Bucket, Group
from fastlars.compat import metadata_guard
from fastlars.dtypes import is_conjugate
from fastlars.formula import unscaled
from fastlars.options import Options

from .eager import FOREACH, SINGLE
from .fused_cpu import FUSED_CPU
from .torch_sgd import TorchSGD
from .triton import TRITON

# In order of preference: a tensor goes to the first that wants its group and serves it.
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


class _Place(NamedTuple):
    """Which tensors of a group make a bucket."""

    backend: Backend
    indices: list[int]
    plan: Any


def wanted(params: list[Tensor], options: Options, gated: bool = False) -> list[Backend]:
    """The backends for a group, in order of preference."""
    return [backend for backend in BACKENDS if backend.wants(params, options, gated)]


def leaves_graph(params: list[Tensor], options: Options) -> bool:
    """Whether torch.compile cannot trace what is preferred for a group."""
    return not wanted(params, options)[0].traceable


def split(group: Group, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> list[Bucket]:
    """The buckets of a group; torch's own helper does not sort while compiling."""
    params, grads, options = group.params, group.grads, group.options
    buffers = group.momentum_buffers if options.momentum != 0 else []
    gated = bool(options.skip_nonfinite) or found_inf is not None or grad_scale is not None
    backends = wanted(params, options, gated)
    if group.memory is None:
        places = _sort(backends, params, grads, buffers)
    else:
        assignment = group.memory.assignments.get(group.number)
        if assignment is None:
            assignment = group.memory.assignments[group.number] = _Assignment()
        places = assignment.places(backends, params, grads, buffers)
    buckets: list[Bucket] = []
    for backend, indices, plan in places:
        whole = len(indices) == len(params)
        of_bucket = grads if whole else [grads[i] for i in indices]
        rest = grad_scale if backend.takes_scale else None
        if grad_scale is not None and not backend.takes_scale:
            of_bucket = [unscaled(grad, grad_scale) for grad in of_bucket]
        momentum_buffers = buffers if whole or not buffers else [buffers[i] for i in indices]
        buckets.append(
            Bucket(
                backend,
                indices,
                params if whole else [params[i] for i in indices],
                of_bucket,
                momentum_buffers,
                options,
                bool(momentum_buffers) and momentum_buffers[0] is None,
                rest,
                plan,
                group.memory,
            )
        )
    return buckets


class _Assignment:
    """How a group was sorted, for as long as one guard says that the metadata of all its tensors is the same.

    Sorting takes longer than the step of small tensors on a CPU, and than all launches on a GPU.
    """

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._seen = False
        self._guard: Callable[..., bool] | None = None
        self._key: Any = None
        self._places: list[_Place] = []

    def places(
        self, backends: list[Backend], params: list[Tensor], grads: list[Tensor], buffers: Sequence[Tensor | None]
    ) -> list[_Place]:
        """As `_sort`."""
        made = [buffer for buffer in buffers if buffer is not None]
        tensors = list(chain(params, grads, made))
        key = (backends, len(params), len(buffers), len(made))
        if self._guard is not None and key == self._key and self._guard(*tensors):
            return self._places
        failed = self._guard is not None
        self._places = _sort(backends, params, grads, buffers)
        # The guard is built the second time a list is seen, and not right after one failed: building costs two sorts.
        # Which buffers are missing, where only some are, it does not see.
        guardable = self._seen and not failed and len(made) in (0, len(buffers))
        self._guard = metadata_guard(tensors) if guardable else None
        self._key, self._seen = key, not failed
        return self._places


def _sort(
    backends: list[Backend], params: list[Tensor], grads: list[Tensor], buffers: Sequence[Tensor | None]
) -> list[_Place]:
    made = [buffer for buffer in buffers if buffer is not None]
    one_step = len(made) in (0, len(buffers))
    if one_step and _is_uniform(params, grads) and backends[0].serves(params, grads, made):
        return [_Place(backends[0], list(range(len(params))), backends[0].plan(params))]
    indices_of: dict[Any, list[int]] = {}
    backend_of: dict[Any, Backend] = {}
    for i, param in enumerate(params):
        grad, buffer = grads[i], buffers[i] if buffers else None
        _check_fit(param, grad, buffer)
        backend = preferred(backends, param, grad, buffer)
        key = (backend.name, buffer is None, is_conjugate(param), param.device, param.dtype, grad.dtype)
        if key not in indices_of:
            indices_of[key] = []
            backend_of[key] = backend
        indices_of[key].append(i)
    return [
        _Place(backend_of[key], indices, backend_of[key].plan([params[i] for i in indices]))
        for key, indices in indices_of.items()
    ]


def preferred(backends: list[Backend], param: Tensor, grad: Tensor, buffer: Tensor | None) -> Backend:
    """The first of these backends that serves a tensor."""
    for backend in backends:
        if backend.serves([param], [grad], [] if buffer is None else [buffer]):
            return backend
    return SINGLE


def _is_uniform(params: list[Tensor], grads: list[Tensor]) -> bool:
    """Whether these make one bucket, if one backend serves them all."""
    like, grad = params[0], grads[0]
    for i, param in enumerate(params):
        if param.dtype != like.dtype or grads[i].dtype != grad.dtype or param.device != like.device:
            return False
        if grads[i].shape != param.shape or is_conjugate(param) != is_conjugate(like):
            return False
    return True


def _check_fit(param: Tensor, grad: Tensor, buffer: Tensor | None) -> None:
    for what, tensor in (("gradient", grad), ("momentum buffer", buffer)):
        if tensor is not None and tensor.device != param.device:
            raise RuntimeError(f"a parameter on {param.device} has a {what} on {tensor.device}; move it there")
    if grad.shape != param.shape:
        raise RuntimeError(
            f"a parameter of shape {param.shape} has a gradient of shape {grad.shape}; compute the gradient again"
        )
    if buffer is not None and buffer.shape != param.shape:
        raise RuntimeError(
            f"a parameter of shape {param.shape} has a momentum buffer of shape {buffer.shape}; after resizing a "
            "parameter delete its state (optimizer.state.pop(param)), or create a new optimizer"
        )

"""L2 norms of whole tensors: in float32 or better, relative error <= 1e-5 up to 1e8 elements, no host read.

torch's own norm on CPU adds float32 squares one after the other and is off by 1e-2 at 1e8 elements. Norms of rows, then
the norm of those, is right to 1e-7 at the same speed. On accelerators torch reduces in a tree and is right as it is.
"""

from typing import List  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .compat import is_scripting

ROW = 1024  # elements whose squares are added in float32: relative error of their norm up to 8e-7, of 4096 up to 3e-6
COPY = 1 << 20  # elements that are converted at a time: a temporary of 4 MiB
SUM = 1 << 18  # elements of two tensors that are added at a time: 1 MiB, which stays in cache

# What a list of temporaries may hold in a foreach step, in elements: 64 MiB of float32.
BUCKET = 1 << 24


def is_half(dtype: torch.dtype) -> bool:
    """Whether arithmetic in this dtype is done in float32."""
    return dtype == torch.float16 or dtype == torch.bfloat16


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and coefficients of tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one of the same norm, shape (..., 2); others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def is_conjugate(tensor: Tensor) -> bool:
    """Whether this is a view of a tensor's conjugate, which holds other bits than it shows."""
    return (
        tensor.is_complex() and tensor.is_conj()
    )  # in this order: torch.compile knows the first, and stops at the second


def buckets(tensors: List[Tensor], limit: int = BUCKET) -> List[List[int]]:
    """Indices of consecutive tensors, at most ``limit`` elements together (a larger tensor stands alone)."""
    result: List[List[int]] = []
    size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.numel()
        if len(result) == 0 or size > limit:
            result.append([i])
            size = tensor.numel()
        else:
            result[-1].append(i)
    return result


def norms(tensors: List[Tensor], foreach: bool) -> Tensor:
    """L2 norms of real tensors of one device and dtype, shape (n,)."""
    if tensors[0].device.type == "cpu":
        if not is_scripting():  # noqa: SIM102  TorchScript would compile the second condition
            if _in_cpu_graph(tensors[0]):
                return cat([_cpu_norms_in_graph(tensors[i : i + NODE]) for i in range(0, len(tensors), NODE)])
        return _cpu_norms(tensors)
    dtype = norm_dtype(tensors[0].dtype)
    if foreach:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    return torch.stack([vector_norm(tensor, dtype=dtype) for tensor in tensors])


def cat(vectors: List[Tensor]) -> Tensor:
    """Vectors end to end."""
    if not is_scripting():  # noqa: SIM102  as above
        if _in_cpu_graph(vectors[0]):
            one_node: Tensor = _cat_in_graph(vectors)
            return one_node
    return torch.cat(vectors)


def unbind(vector: Tensor) -> List[Tensor]:
    """The numbers of a vector as 0-dim tensors."""
    if not is_scripting():  # noqa: SIM102  as above
        if _in_cpu_graph(vector):
            one_node: List[Tensor] = _unbind_in_graph(vector)
            return one_node
    return list(vector.unbind())


def _cpu_norms(tensors: List[Tensor]) -> Tensor:
    return torch.stack([_cpu_norm(tensor) for tensor in tensors])


# What Inductor, torch.compile's backend, would make of these on CPU takes it longer than all the rest of a step: a dozen
# operations for each norm, a loop for each part of a vector, and the formula anew in the loop over each tensor, for
# each of whose numbers it looks for partners to fuse with among all that read the same vector. So each is one node.
# Norms of at most NODE tensors: those that are written later all wait for the node, and would be such partners too.
NODE = 16


def _in_cpu_graph(tensor: Tensor) -> bool:
    return tensor.is_cpu and torch.compiler.is_compiling() and not torch.is_grad_enabled()


def _cat(vectors: List[Tensor]) -> Tensor:
    return torch.cat(vectors)


def _copies_of_numbers(vector: Tensor) -> List[Tensor]:
    return [number.clone() for number in vector.unbind()]  # an operator may not return views of what it takes


_cpu_norms_in_graph = torch.library.custom_op("fastlars::cpu_norms", _cpu_norms, mutates_args=())
_cat_in_graph = torch.library.custom_op("fastlars::cat", _cat, mutates_args=())
_unbind_in_graph = torch.library.custom_op("fastlars::unbind", _copies_of_numbers, mutates_args=())
_cat_in_graph.register_fake(_cat)
_unbind_in_graph.register_fake(_copies_of_numbers)


@_cpu_norms_in_graph.register_fake
def _(tensors: List[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=norm_dtype(tensors[0].dtype))


def joint_norms(params: List[Tensor], grads: List[Tensor], sign: float, weight_decay: float, foreach: bool) -> Tensor:
    """|sign * g + weight_decay * w| of each tensor, shape (n,), through temporaries of 1 MiB on CPU, else of one bucket.

    Computed directly: from |g|, |w| and their dot product it cancels where g is near -weight_decay * w.
    """
    if params[0].device.type == "cpu":
        if not is_scripting():  # noqa: SIM102  as in `norms`
            if _in_cpu_graph(params[0]):
                slices = [slice(i, i + NODE) for i in range(0, len(params), NODE)]
                return cat([_cpu_joint_norms_in_graph(params[s], grads[s], sign, weight_decay) for s in slices])
        return _cpu_joint_norms(params, grads, sign, weight_decay)
    return _joint_norms_by_buckets(params, grads, sign, weight_decay, foreach)


def _cpu_joint_norms(
    params: List[Tensor], grads: List[Tensor], sign: float, weight_decay: float, limit: int = SUM
) -> Tensor:
    dtype = norm_dtype(params[0].dtype)
    result: List[Tensor] = []
    for param, grad in zip(params, grads):
        pieces: List[Tensor] = []
        for w, g in zip(_pieces(param, limit), _pieces(grad, limit)):
            pieces.append(_cpu_norm((g.to(dtype) * sign).add_(w, alpha=weight_decay)))
        result.append(pieces[0] if len(pieces) == 1 else _norm_of_norms(torch.stack(pieces), dtype))
    return torch.stack(result)


_cpu_joint_norms_in_graph = torch.library.custom_op("fastlars::cpu_joint_norms", _cpu_joint_norms, mutates_args=())


@_cpu_joint_norms_in_graph.register_fake
def _(params: List[Tensor], *_: object) -> Tensor:
    return params[0].new_empty(len(params), dtype=norm_dtype(params[0].dtype))


def _joint_norms_by_buckets(
    params: List[Tensor], grads: List[Tensor], sign: float, weight_decay: float, foreach: bool
) -> Tensor:
    dtype = norm_dtype(params[0].dtype)
    result: List[Tensor] = []
    for bucket in buckets(params):
        sums = [grads[i].to(dtype) * sign for i in bucket]
        if not is_scripting() and foreach:  # see _scripted_multi_tensor_lars
            torch._foreach_add_(sums, [params[i] for i in bucket], alpha=weight_decay)
        else:
            for j, i in enumerate(bucket):
                sums[j].add_(params[i], alpha=weight_decay)
        result.append(norms(sums, foreach))
        sums = []  # freed before the next bucket is made
    return torch.cat(result)


def _cpu_norm(tensor: Tensor, row: int = ROW) -> Tensor:
    dtype = norm_dtype(tensor.dtype)
    # elements that are not beside each other are added one by one: 3e-5 off after 4096 equal ones, 4e-6 if they are
    if tensor.numel() <= row and tensor.is_contiguous():
        norm: Tensor = vector_norm(tensor, dtype=dtype)
        return norm
    ordered = tensor
    if not tensor.is_contiguous():
        # memory order, so that every dense tensor (channels_last, transposed) is one flat view
        order = sorted([(-stride, i) for i, stride in enumerate(tensor.stride())])
        ordered = tensor.permute([i for _, i in order])
    if ordered.is_contiguous():
        ordered = ordered.view(-1)
        if tensor.dtype == dtype:
            return flat_norm(ordered)
    pieces = [flat_norm(piece.contiguous().view(-1).to(dtype)) for piece in _pieces(ordered)]
    return _norm_of_norms(torch.stack(pieces), dtype)


def _pieces(tensor: Tensor, limit: int = COPY) -> List[Tensor]:
    """Views of at most ``limit`` elements, the same ones of every tensor of a shape."""
    pieces: List[Tensor] = []
    pending = [tensor]
    while len(pending) > 0:
        piece = pending.pop()
        if piece.numel() <= limit:
            pieces.append(piece)
        elif piece.size(0) == 1:
            pending.append(piece.squeeze(0))
        else:
            pending += torch.split(piece, max(1, limit * piece.size(0) // piece.numel()))
    return pieces


def flat_norm(flat: Tensor, row: int = ROW) -> Tensor:
    """The norm of a contiguous CPU vector: of its rows, then of those."""
    length = flat.numel() // row * row
    row_norms = vector_norm(flat[:length].view(-1, row), dim=1)
    if length < flat.numel():
        row_norms = torch.cat([row_norms, vector_norm(flat[length:]).reshape(1)])
    return _norm_of_norms(row_norms, flat.dtype)


def _norm_of_norms(norms: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = vector_norm(norms, dtype=torch.float64).to(dtype)
    return norm

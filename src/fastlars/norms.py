"""L2 norms of whole tensors: in float32 or better, relative error <= 1e-5 up to 1e8 elements, no host read.

torch's own norm on CPU adds float32 squares one after the other and is off by 1e-2 at 1e8 elements. Norms of rows, then
the norm of those, is right to 1e-7 at the same speed. On accelerators torch reduces in a tree and is right as it is.
"""

from __future__ import annotations

from typing import List, Optional, cast  # noqa: UP035  TorchScript reads these spellings only

import torch
from torch import Tensor
from torch.linalg import vector_norm

ROW = 4096  # elements whose squares are added in float32 one after the other
COPY = 1 << 20  # elements that are converted at a time: a temporary of 4 MiB

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


def buckets(tensors: List[Tensor]) -> List[List[int]]:
    """Indices of consecutive tensors, at most BUCKET elements together (a larger tensor stands alone)."""
    result: List[List[int]] = []
    size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.numel()
        if not result or size > BUCKET:
            result.append([])
            size = tensor.numel()
        result[-1].append(i)
    return result


def norms(tensors: List[Tensor], foreach: bool) -> Tensor:
    """L2 norms of real tensors of one device and dtype, shape (n,)."""
    if tensors[0].device.type == "cpu":
        return torch.stack([_cpu_norm(tensor) for tensor in tensors])
    dtype = norm_dtype(tensors[0].dtype)
    if foreach:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    return torch.stack([vector_norm(tensor, dtype=dtype) for tensor in tensors])


def joint_norms(
    params: List[Tensor], grads: List[Tensor], scale: Optional[Tensor], weight_decay: float, foreach: bool
) -> Tensor:
    """|scale * g + weight_decay * w| of each tensor, shape (n,), through temporaries of at most one bucket.

    Computed directly: from |g|, |w| and their dot product it cancels where g is near -weight_decay * w.
    """
    dtype = norm_dtype(params[0].dtype)
    result: List[Tensor] = []
    for bucket in buckets(params):
        if scale is None:
            sums = [grads[i].to(dtype, copy=True) for i in bucket]
        else:
            sums = [grads[i].to(dtype) * scale for i in bucket]
        if foreach:
            torch._foreach_add_(sums, [params[i] for i in bucket], alpha=weight_decay)
        else:
            for j, i in enumerate(bucket):
                sums[j].add_(params[i], alpha=weight_decay)
        result.append(norms(sums, foreach))
    return torch.cat(result)


def _cpu_norm(tensor: Tensor) -> Tensor:
    dtype = norm_dtype(tensor.dtype)
    if tensor.numel() <= ROW:
        return cast(Tensor, vector_norm(tensor, dtype=dtype))
    # memory order, so that every dense tensor (channels_last, transposed) is one flat view
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    ordered = tensor.permute(order)
    if ordered.is_contiguous() and tensor.dtype == dtype:
        return _row_norm(ordered.view(-1))
    rows = max(1, COPY * ordered.size(0) // ordered.numel())
    pieces = [_row_norm(piece.reshape(-1).to(dtype)) for piece in torch.split(ordered, rows)]
    return cast(Tensor, vector_norm(torch.stack(pieces)))


def _row_norm(flat: Tensor) -> Tensor:
    rows = flat.numel() // ROW
    row_norms = vector_norm(flat[: rows * ROW].view(rows, ROW), dim=1)
    tail = vector_norm(flat[rows * ROW :])
    return cast(Tensor, vector_norm(torch.cat([row_norms, tail.reshape(1)])))

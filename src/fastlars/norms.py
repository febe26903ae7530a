"""L2 norms of whole tensors: in float32 or better, relative error <= 1e-5 up to 1e8 elements, no host read.

torch's own norm on CPU adds float32 squares one after the other and is off by 1e-2 at 1e8 elements. Norms of rows, then
the norm of those, is right to 1e-7 at the same speed. On accelerators torch reduces in a tree and is right as it is.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .dtypes import norm_dtype

ROW = 1024  # elements whose squares are added in float32: relative error of their norm up to 8e-7, of 4096 up to 3e-6
COPY = 1 << 20  # elements that are converted at a time: a temporary of 4 MiB
SUM = 1 << 18  # elements of two tensors that are added at a time: 1 MiB, which stays in cache

# Elements that a list of temporaries may hold in a foreach step: 64 MiB of float32.
CHUNK = 1 << 24


def chunks(tensors: list[Tensor], limit: int = CHUNK) -> list[list[int]]:
    """Indices of consecutive tensors, at most ``limit`` elements together (a larger tensor stands alone)."""
    result: list[list[int]] = []
    size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.numel()
        if len(result) == 0 or size > limit:
            result.append([i])
            size = tensor.numel()
        else:
            result[-1].append(i)
    return result


def norms(tensors: list[Tensor], foreach: bool) -> Tensor:
    """L2 norms of real tensors of one device and dtype, shape (n,)."""
    dtype = norm_dtype(tensors[0].dtype)
    if tensors[0].device.type == "cpu":
        return torch.stack([norm(tensor) for tensor in tensors])
    if foreach:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    return torch.stack([vector_norm(tensor, dtype=dtype) for tensor in tensors])


def joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float, foreach: bool) -> Tensor:
    """|sign * g + weight_decay * w| of each tensor, shape (n,), through temporaries of 1 MiB on CPU, else of one chunk.

    Computed directly: from |g|, |w| and their dot product it cancels where g is near -weight_decay * w.
    """
    if params[0].device.type == "cpu":
        return torch.stack([joint_norm(w, g, sign, weight_decay) for w, g in zip(params, grads)])
    dtype = norm_dtype(params[0].dtype)
    result: list[Tensor] = []
    for places in chunks(params):
        sums = [grads[i].to(dtype) * sign for i in places]
        if foreach:
            torch._foreach_add_(sums, [params[i] for i in places], alpha=weight_decay)
        else:
            for j, i in enumerate(places):
                sums[j].add_(params[i], alpha=weight_decay)
        result.append(norms(sums, foreach))
        sums = []  # freed before the next chunk is made
    return torch.cat(result)


def joint_norm(param: Tensor, grad: Tensor, sign: float, weight_decay: float, limit: int = SUM) -> Tensor:
    """|sign * grad + weight_decay * param| of one tensor, through a temporary of at most ``limit`` elements."""
    dtype = norm_dtype(param.dtype)
    pieces: list[Tensor] = []
    for w, g in zip(_pieces(param, limit), _pieces(grad, limit)):
        pieces.append(norm((g.to(dtype) * sign).add_(w, alpha=weight_decay)))
    return pieces[0] if len(pieces) == 1 else _norm_of_norms(torch.stack(pieces), dtype)


def norm(tensor: Tensor, row: int = ROW) -> Tensor:
    """The L2 norm of a real tensor, shape ()."""
    dtype = norm_dtype(tensor.dtype)
    if tensor.device.type != "cpu":
        on_device: Tensor = vector_norm(tensor, dtype=dtype)
        return on_device
    # Elements that are not contiguous are added one by one: 3e-5 off after 4096 equal ones, and 4e-6 otherwise.
    if tensor.numel() <= row and tensor.is_contiguous():
        short: Tensor = vector_norm(tensor, dtype=dtype)
        return short
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


def _pieces(tensor: Tensor, limit: int = COPY) -> list[Tensor]:
    """Views of at most ``limit`` elements, the same ones of every tensor of a shape."""
    pieces: list[Tensor] = []
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

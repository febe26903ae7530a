"""L2 norms of whole tensors in float32 or float64, with a relative error of at most 1e-5 for up to 1e8 elements.

torch's own norm on CPU adds float32 squares in sequence and is off by 1e-2 at 1e8 elements. So a CPU tensor is cut into rows,
and the norm of the row norms is accurate to 1e-6 at the same speed. On accelerators torch adds in a tree, which is also
accurate.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .dtypes import norm_dtype

ROW = 1024  # squares added in float32 at a time; the norm's relative error is up to 8e-7 (it would be 3e-6 with 4096)
ROWS = 4096  # squares of row norms added at a time
COPY = 1 << 20  # elements converted at a time, in a temporary of 4 MiB
SUM = 1 << 18  # elements of two tensors added at a time, in a temporary of 1 MiB, which stays in cache
CHUNK = 1 << 24  # elements in one chunk of tensors, unless one tensor is larger; its temporaries take 64 MiB in float32


def chunks(tensors: list[Tensor], limit: int = CHUNK, count: int = 1 << 30) -> list[list[int]]:
    """Indices of up to ``count`` consecutive tensors with at most ``limit`` elements. A larger tensor gets its own chunk."""
    result: list[list[int]] = []
    size = 0
    for i, tensor in enumerate(tensors):
        size += tensor.numel()
        if len(result) == 0 or size > limit or len(result[-1]) == count:
            result.append([i])
            size = tensor.numel()
        else:
            result[-1].append(i)
    return result


def norms(tensors: list[Tensor], foreach: bool) -> Tensor:
    """L2 norms of n real tensors on one device and of one dtype, as a tensor of shape (n,)."""
    dtype = norm_dtype(tensors[0].dtype)
    if tensors[0].device.type == "cpu":
        return _norms_of([_row_norms(tensor) for tensor in tensors], dtype)
    if tensors[0].device.type == "xla":
        # convert first, because XLA's norm ignores the dtype argument and adds squares in the tensor's dtype
        tensors = [tensor.to(dtype) for tensor in tensors]
    if foreach:
        return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype))
    return torch.stack([vector_norm(tensor, dtype=dtype) for tensor in tensors])


def joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float, foreach: bool) -> Tensor:
    """|sign * g + weight_decay * w| of each tensor, as a tensor of shape (n,).

    The sum is stored in temporaries, of 1 MiB on CPU and of one chunk elsewhere. A formula with |g|, |w| and the dot
    product of g and w would suffer cancellation if sign * g is near -weight_decay * w.
    """
    if params[0].device.type == "cpu":
        row_norms = [_joint_row_norms(w, g, sign * weight_decay) for w, g in zip(params, grads)]
        return _norms_of(row_norms, norm_dtype(params[0].dtype))
    return _joint_norms_by_chunks(params, grads, sign, weight_decay, foreach)


def _joint_norms_by_chunks(
    params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float, foreach: bool
) -> Tensor:
    dtype = norm_dtype(params[0].dtype)
    result: list[Tensor] = []
    for places in chunks(params):
        # compute |s g + decay w| as |g + s decay w|, which is the same because s is 1 or -1
        alpha = sign * weight_decay
        if foreach and params[0].dtype == dtype and grads[0].dtype == dtype:
            sums = list(torch._foreach_add([grads[i] for i in places], [params[i] for i in places], alpha=alpha))
        else:
            # a float32 factor with one element widens the result without converted copies; a 0-dim factor would not
            factor = params[0].new_full([1], alpha, dtype=dtype)
            sums = [torch.addcmul(grads[i], params[i], factor) for i in places]
        result.append(norms(sums, foreach))
        sums = []  # free the memory before the next chunk is computed
    return torch.cat(result)


def _norms_of(row_norms: list[Tensor], dtype: torch.dtype, row: int = ROW, at_once: int = ROWS) -> Tensor:
    """The norm of each tensor from its row norms, with one foreach call."""
    short = [_norms_of_rows(each, row) if each.numel() > at_once else each for each in row_norms]
    return torch.stack(torch._foreach_norm(short, 2.0, dtype=dtype))


def _joint_row_norms(param: Tensor, grad: Tensor, decay: float, limit: int = SUM) -> Tensor:
    # `decay` includes the sign, like alpha in `_joint_norms_by_chunks`
    dtype = norm_dtype(param.dtype)
    pieces: list[Tensor] = []
    for w, g in zip(_pieces(param, limit), _pieces(grad, limit)):
        direction = torch.add(g, w, alpha=decay) if g.dtype == dtype else g.to(dtype).add_(w, alpha=decay)
        pieces.append(_row_norms(direction).reshape(-1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _row_norms(tensor: Tensor, row: int = ROW) -> Tensor:
    """The norms of the rows of a CPU tensor. The norm of these norms is the tensor's. A short tensor is returned unchanged."""
    # Rows must be contiguous, because torch adds squares one by one if elements are not adjacent. For 4096 equal elements,
    # the error is then 3e-5 instead of 4e-6.
    dtype = norm_dtype(tensor.dtype)
    if tensor.is_contiguous():
        if tensor.numel() <= row:
            return tensor
        if tensor.dtype == dtype:
            return _norms_of_rows(tensor, row)
        ordered = tensor.view(-1)
    else:
        # sort dimensions by stride, which makes a dense tensor (channels_last, transposed) contiguous without a copy
        order = sorted([(-stride, i) for i, stride in enumerate(tensor.stride())])
        ordered = tensor.permute([i for _, i in order])
        if ordered.is_contiguous() and tensor.dtype == dtype:
            return _norms_of_rows(ordered, row)
    return torch.cat([_norms_of_rows(piece.contiguous().to(dtype), row) for piece in _pieces(ordered)])


def _norms_of_rows(tensor: Tensor, row: int) -> Tensor:
    """Norms of the rows of a contiguous tensor, and the norm of the elements after the last whole row."""
    if tensor.numel() % row == 0:
        norms: Tensor = vector_norm(tensor.view(-1, row), dim=1)
        return norms
    flat = tensor.view(-1)
    length = flat.numel() // row * row
    return torch.cat([vector_norm(flat[:length].view(-1, row), dim=1), vector_norm(flat[length:]).reshape(1)])


def _pieces(tensor: Tensor, limit: int = COPY) -> list[Tensor]:
    """Views of at most ``limit`` elements. Tensors of the same shape are cut the same way."""
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

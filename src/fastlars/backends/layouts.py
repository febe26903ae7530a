"""How tensors lie in memory: what kernels that walk over memory, whatever the strides, need to know."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may mean anything


def can_be_walked(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether plain tensors, their gradients and their buffers are dense and have their elements in the same order."""
    tensors = [tensor for each in (params, *others) for tensor in each]
    # map, because a loop takes twice as long over a model's tensors
    return (
        PLAIN.issuperset(map(type, tensors))
        and not any(map(Tensor.is_neg, tensors))
        # a kernel would go on beyond the end of the smaller one
        and all(all(map(Tensor.is_same_size, params, other)) for other in others)
        and (all(map(Tensor.is_contiguous, tensors)) or all(map(are_laid_out_alike, params, *others)))
    )


def are_laid_out_alike(tensor: Tensor, *others: Tensor) -> bool:
    """Whether tensors of one shape are dense and have their elements in the same order."""
    strides = _effective_strides(tensor)
    return all(_effective_strides(other) == strides for other in others) and _is_dense(strides)


def _effective_strides(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that matter: one of size 1 may have any stride."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def _is_dense(strides: list[tuple[int, int]]) -> bool:
    """Whether a tensor of these strides fills its stretch of memory, each element once."""
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return False
        expected *= size
    return True

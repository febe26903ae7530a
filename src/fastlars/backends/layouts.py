"""How tensors lie in memory: what kernels that walk over memory, whatever the strides, need to know."""

from torch import Tensor


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

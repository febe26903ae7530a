"""The dtypes in which tensors are computed, and real views of complex tensors.

TorchScript compiles these functions too.
"""

import torch
from torch import Tensor


def is_half(dtype: torch.dtype) -> bool:
    """Whether this is a half type, float16 or bfloat16. Adapted groups compute tensors of half types in float32."""
    return dtype == torch.float16 or dtype == torch.bfloat16


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and coefficients of tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real(tensor: Tensor) -> Tensor:
    """A complex tensor as a real one of shape (..., 2) with the same norm. Other tensors are returned unchanged."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def reals(tensors: list[Tensor]) -> list[Tensor]:
    """Apply `real` to a list of tensors, which are either all complex or all real."""
    return [real(tensor) for tensor in tensors] if len(tensors) > 0 and tensors[0].is_complex() else tensors


def is_conjugate(tensor: Tensor) -> bool:
    """Whether this is a lazy conjugate view, whose memory holds the values before conjugation."""
    # is_complex() comes first, because torch.compile cannot trace is_conj()
    return tensor.is_complex() and tensor.is_conj()

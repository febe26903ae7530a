"""What only torch.compile needs: on CPU, norms and vectors of numbers as operators, each of them one node of the graph.

What Inductor, torch.compile's backend, would make of these takes it longer than all the rest of a step: a dozen operations
for each norm, a loop for each part of a vector, and the formula again in the loop over each tensor, for each of whose
numbers it looks for partners to fuse with among all that read the same vector.
"""

import torch
from torch import Tensor

from . import norms as eager
from .dtypes import norm_dtype

# Norms of at most so many tensors in one node: tensors that are written later all wait for it, and would be partners too.
NODE = 16


def in_cpu_graph(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor now goes into a graph that runs on the CPU."""
    return torch.compiler.is_compiling() and tensor.is_cpu and not torch.is_grad_enabled()


def norms(tensors: list[Tensor]) -> Tensor:
    """As `fastlars.norms.norms`."""
    together: Tensor = _cat([_norms(tensors[i : i + NODE]) for i in range(0, len(tensors), NODE)])
    return together


def joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float) -> Tensor:
    """As `fastlars.norms.joint_norms`."""
    slices = [slice(i, i + NODE) for i in range(0, len(params), NODE)]
    together: Tensor = _cat([_joint_norms(params[s], grads[s], sign, weight_decay) for s in slices])
    return together


def unbind(vector: Tensor) -> list[Tensor]:
    """The numbers of a vector as 0-dim tensors."""
    numbers: list[Tensor] = _unbind(vector)
    return numbers


def _eager_norms(tensors: list[Tensor]) -> Tensor:
    return eager.norms(tensors, foreach=False)


def _eager_joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float) -> Tensor:
    return eager.joint_norms(params, grads, sign, weight_decay, foreach=False)


def _eager_cat(vectors: list[Tensor]) -> Tensor:
    return torch.cat(vectors)


def _eager_unbind(vector: Tensor) -> list[Tensor]:
    return [number.clone() for number in vector.unbind()]  # an operator may not return views of its input


# Schemas are spelled out because older versions cannot read list[Tensor].
_norms = torch.library.custom_op(
    "fastlars::cpu_norms", _eager_norms, mutates_args=(), schema="(Tensor[] tensors) -> Tensor"
)
_joint_norms = torch.library.custom_op(
    "fastlars::cpu_joint_norms",
    _eager_joint_norms,
    mutates_args=(),
    schema="(Tensor[] params, Tensor[] grads, float sign, float weight_decay) -> Tensor",
)
_cat = torch.library.custom_op("fastlars::cat", _eager_cat, mutates_args=(), schema="(Tensor[] vectors) -> Tensor")
_unbind = torch.library.custom_op(
    "fastlars::unbind", _eager_unbind, mutates_args=(), schema="(Tensor vector) -> Tensor[]"
)
_cat.register_fake(_eager_cat)
_unbind.register_fake(_eager_unbind)


@_norms.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), dtype=norm_dtype(tensors[0].dtype))


@_joint_norms.register_fake
def _(params: list[Tensor], *_: object) -> Tensor:
    return params[0].new_empty(len(params), dtype=norm_dtype(params[0].dtype))

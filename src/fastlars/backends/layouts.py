"""Memory layouts of tensors, for kernels that ignore strides."""

from __future__ import annotations

import torch
from torch import Tensor

PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may behave differently


def on_cpu(params: list[Tensor]) -> list[bool]:
    """Whether each tensor is on the CPU."""
    if torch.compiler.is_compiling():
        # is_cpu would become a graph operation, which keeps the tensor alive
        return [param.device.type == "cpu" for param in params]
    return [param.is_cpu for param in params]


def can_be_walked(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether all are plain dense tensors, and each gradient and buffer has its parameter's order of elements in memory."""
    others = tuple(filter(None, others))  # without momentum there are no buffers
    tensors = [tensor for each in (params, *others) for tensor in each]
    # map, because a loop over a model's tensors takes twice as long
    return (
        PLAIN.issuperset(map(type, tensors))
        and not any(map(Tensor.is_neg, tensors))
        and (torch.is_inference_mode_enabled() or not any(map(Tensor.is_inference, tensors)))
        # if sizes differed, a kernel would run past the end of the smaller tensor
        and all(all(map(Tensor.is_same_size, params, other)) for other in others)
        and (all(map(Tensor.is_contiguous, tensors)) or all(map(are_laid_out_alike, params, *others)))
    )


def are_laid_out_alike(tensor: Tensor, *others: Tensor) -> bool:
    """Whether tensors of one shape are dense and have the same order of elements."""
    strides = _effective_strides(tensor)
    return all(_effective_strides(other) == strides for other in others) and _is_dense(strides)


def _effective_strides(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of each dimension with more than one element. The stride of other dimensions has no effect."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size != 1]


def _is_dense(strides: list[tuple[int, int]]) -> bool:
    """Whether a tensor with these strides covers a contiguous range of memory, each element once."""
    expected = 1
    for stride, size in sorted(strides):
        if stride != expected:
            return False
        expected *= size
    return True


def own_every_element(tensor: Tensor) -> bool:
    """Whether no two elements of a strided tensor share memory. In an expanded tensor, some do."""
    if tensor.is_contiguous():
        return True
    reach = 0  # the largest offset so far; a larger stride steps past all elements
    for stride, size in sorted(_effective_strides(tensor)):
        if stride == 0:
            return False
        if stride <= reach:
            return bool(_offsets(tensor).sort().values.diff().all())  # elements are interleaved or share memory
        reach += stride * (size - 1)
    return True


def has_address(tensor: Tensor) -> bool:
    """Whether data_ptr() is an address. On some devices it is a handle (MPS, Vulkan) or an offset in a storage (XLA, meta)."""
    return tensor.is_cpu or tensor.is_cuda


def storage_of(tensor: Tensor) -> int:
    """A number that identifies a tensor's storage among those on the same device."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() if has_address(tensor) else storage._cdata


def find_shared_memory(tensors: list[Tensor], first: int) -> tuple[int, int] | None:
    """Indices of two tensors that share memory, at least one among the first ``first``, or None if there are none."""
    spans: list[tuple[str, int, int, int]] = []
    for i, tensor in enumerate(tensors):
        if type(tensor) in PLAIN and tensor.numel() > 0:
            reach = sum(stride * (size - 1) for stride, size in _effective_strides(tensor))
            start = tensor.data_ptr()
            memory = f"{tensor.device}" if has_address(tensor) else f"{tensor.device} {storage_of(tensor)}"
            spans.append((memory, start, start + (reach + 1) * tensor.element_size(), i))
    spans.sort()
    for n, (memory, _, end, i) in enumerate(spans):
        for other, start, _, j in spans[n + 1 :]:
            if other != memory or start >= end:
                break
            if min(i, j) < first and torch.isin(_addresses(tensors[i]), _addresses(tensors[j])).any():
                return min(i, j), max(i, j)
    return None


def _offsets(tensor: Tensor) -> Tensor:
    reach = sum(stride * (size - 1) for stride, size in _effective_strides(tensor))
    return torch.arange(reach + 1, device="cpu").as_strided(tensor.shape, tensor.stride()).reshape(-1)


def _addresses(tensor: Tensor) -> Tensor:
    """The addresses of all bytes that a tensor's elements occupy."""
    first = tensor.data_ptr() + _offsets(tensor) * tensor.element_size()
    return (first[:, None] + torch.arange(tensor.element_size(), device="cpu")).view(-1)

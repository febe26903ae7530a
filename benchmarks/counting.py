"""Count what a step costs besides time: the bytes that its operations read and write, kernel launches and host reads."""

from __future__ import annotations

import os
import re
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .rounds import Step

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's CUDA builds log every profiler start to stderr

# operations that do not read the tensors that they write
ONLY_WRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_"}
ONLY_READS = {("_fused_sgd_", "grads")}  # marked as written, but written only with a grad_scale
# operations that read only the shape of a tensor
NO_READS = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_full", "is_same_size"}
NO_WRITES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}  # these only allocate
LAUNCH = re.compile(r"cu(da)?Launch(Cooperative)?Kernel(Ex|ExC)?")


class _ByteCounter(TorchDispatchMode):
    """Adds up the bytes that every operation (not kernel) must read and write if nothing is in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, name = func._schema, func.overloadpacket.__name__
        aliases = [returned.alias_info for returned in schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result  # a view
        read: dict[tuple[int, int], int] = {}  # an operand that is given twice is read once
        written: dict[tuple[int, int], int] = {}
        for i, argument in enumerate(schema.arguments):
            operands = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
            mutated = argument.alias_info is not None and argument.alias_info.is_write
            mutated = mutated and (name, argument.name) not in ONLY_READS
            if mutated:
                written.update(operands)
            if name not in NO_READS and not (mutated and (name in ONLY_WRITES or argument.is_out)):
                read.update(operands)
        if name not in NO_WRITES and all(alias is None for alias in aliases):
            written.update(_tensors(result))
        self.bytes += sum(read.values()) + sum(written.values())
        return result


def _tensors(tree: Any) -> dict[tuple[int, int], int]:
    """Bytes of each tensor, keyed by its address."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {(tensor.data_ptr(), tensor.numel()): tensor.numel() * tensor.itemsize for tensor in found}


def bytes_moved(step: Step) -> int:
    with _ByteCounter() as counter:
        step()
    return int(counter.bytes)


def launches_and_host_reads(step: Step, device: torch.device) -> tuple[int | None, int | None]:
    """Kernel launches of a step, and copies to the host. Both are None if the device is not a GPU."""
    if device.type != "cuda":
        return None, None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    names = [event.name() for event in profiler.profiler.kineto_results.events()]
    return sum(LAUNCH.fullmatch(name) is not None for name in names), sum(
        name.startswith("Memcpy DtoH") for name in names
    )


def host_microseconds(step: Step, device: torch.device) -> float | None:
    """Microseconds until a step returns on an idle GPU, median of 21. Host reads in the step wait for the device."""
    if device.type != "cuda":
        return None
    samples = []
    for _ in range(21):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        step()
        samples.append((time.perf_counter() - start) * 1e6)
    return statistics.median(samples)

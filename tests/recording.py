"""What a step does below Python: every aten op with its devices, and the memory that the step allocates and holds.

Fake tensors claim to be on CUDA on a machine without a GPU. Reading their value raises, and copies between devices show.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder(TorchDispatchMode):
    """Records inside ``with``. Memory that existed before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []  # ops that bring a value from a device to the host
        self.arrivals: list[
            bool
        ] = []  # copies from a device to the CPU, with whether the host continues before they finish
        self.departures: list[bool] = []  # and copies from the CPU to a device, where a blocking copy also waits
        self.largest = 0  # elements of the largest tensor allocated, in units of float32
        self.peak = 0  # the same for everything alive at one time
        self.names: set[str] = set()
        self._made: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        self.names.add(name)
        given = _tensors((args, kwargs))
        on_host = all(tensor.device.type == "cpu" for tensor in given)
        if name in READS and not on_host:
            self.reads.append(str(func))
        known = {tensor.untyped_storage()._cdata for tensor in given}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            if tensor.device.type == "cpu" and not on_host:
                self.arrivals.append(bool(kwargs.get("non_blocking", False)))
            if tensor.device.type != "cpu" and given and on_host:
                self.departures.append(bool(kwargs.get("non_blocking", False)))
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self._made.append((StorageWeakRef(storage), storage.nbytes() // 4))
                self.largest = max(self.largest, storage.nbytes() // 4)
        self._made = [(storage, size) for storage, size in self._made if not storage.expired()]
        self.peak = max(self.peak, sum(size for _, size in self._made))
        return result


class _WithoutDeviceGuards(TorchFunctionMode):
    """Three of torch's Python bindings first enter a CUDA device, which fails without a GPU (up to 2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], int):
            return args[0].select(0, args[1])
        if func is Tensor.__getitem__ and isinstance(args[1], slice) and args[1].start is None:
            return args[0].narrow(0, 0, args[1].stop)
        if func is Tensor.__invert__:
            return torch.bitwise_not(args[0])
        if func is Tensor.copy_:
            return torch.ops.aten.copy_.default(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    with FakeTensorMode(), _WithoutDeviceGuards():
        yield

"""The fused step on CUDA: which tensors it serves, tables of addresses on the device, and three launches a bucket.

`partial_sums` and `norms` measure, `update` writes; `triton_kernels.py` says what they compute. All three find their tensors
in a table on the device, so their number does not depend on the number of tensors. A table is never rewritten: it belongs to
the addresses and sizes it was made from, and is found again by them. The host reads nothing from the device and, while
addresses stay, allocates nothing there. Triton is imported when fused=True is asked for on CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from fastlars.buckets import Bucket, Norms
from fastlars.compat import bump_versions
from fastlars.formula import is_adapted
from fastlars.options import Options

from .eager import make_buffers
from .layouts import PLAIN, can_be_walked

# Elements a program of `partial_sums` and `update`: 8 a thread, for which these take at most 48 registers on sm_80 and sm_90
# and 56 on sm_100, so that five and four programs fit on a multiprocessor, and spill none. With compensations `update` takes
# up to 64, so four fit.
COLUMNS = 8  # of a table; a multiple of two, so that what follows the rows is aligned to 16 bytes
CHUNK = 2048
BLOCK = 2048  # partial sums that `norms` adds at a time
# Of scale * g + weight_decay * w the compiler would fuse one product with the sum, and which one depends on whether there is
# a scale: with a GradScaler norms would have other bits, though it scales by powers of two.
LAUNCH_SUMS = {"num_warps": 8, "enable_fp_fusion": False}
LAUNCH_FEW = {"num_warps": 16, "enable_fp_fusion": True}  # one program a tensor: a large one has many sums to wait for
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports; before, there is no bfloat16 conversion

KEPT_STEPS = 16  # a table that so many steps did not use is dropped
CAPTURES = 4  # graphs that can capture a step before an eager step is needed again


def check_fused(params: Iterable[Any], where: str) -> None:
    """Raise where ``fused=True`` cannot be honoured for these tensors; what is no tensor is not looked at."""
    devices: dict[torch.device, str | None] = {}
    for i, param in enumerate(params):
        if not isinstance(param, Tensor) or param.is_cpu:
            continue
        if not param.is_cuda:
            reason: str | None = f"is for CPU and CUDA tensors, got one on {param.device} at position {i}"
        elif type(param) not in PLAIN:
            reason = f"on CUDA needs plain tensors, got {type(param).__name__} at position {i}"
        elif param.dtype not in DTYPES:
            reason = f"on CUDA needs float32, bfloat16 or float16 tensors, got {param.dtype} at position {i}"
        else:
            if param.device not in devices:
                devices[param.device] = _refusal(param.device)
            reason = devices[param.device]
        if reason is not None:
            raise RuntimeError(f"{where}: fused=True {reason}; leave fused=None or use foreach=True")


def _refusal(device: torch.device) -> str | None:
    """Why kernels cannot run on a CUDA device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "on CUDA needs Triton, which is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs, and this is torch for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return "on CUDA needs compute capability {}.{}, {} has {}.{}".format(*CAPABILITY, device, *capability)
    try:
        # Triton compiles C for this, against Python's headers
        _kernels().driver.active.get_current_device()
    except Exception as error:  # noqa: BLE001  of compilers, linkers and drivers: no list is complete
        return f"on CUDA needs Triton, which cannot launch kernels here ({type(error).__name__}: {error})"
    return None


@dataclass(eq=False)
class _Table:
    """What the kernels of one part read and write besides its tensors, in device memory."""

    rows: Tensor  # int64, COLUMNS a tensor: see `triton_kernels.py`
    chunk_tensor: Tensor  # int32, the row of every chunk
    sums: Tensor  # (chunks, 3)
    norms: Tensor  # (3, n)
    last_use: int = 0


class Tables:
    """The tables of one optimizer. They hold addresses, and keep no tensor alive; not to be copied or saved with it."""

    def __init__(self) -> None:
        """Without any table."""
        self.now = 0
        self._tables: dict[tuple[Any, ...], _Table] = {}
        # by device and sizes, pinned memory for captures, which must not allocate it
        self._spares: dict[tuple[torch.device, tuple[int, ...]], list[Tensor]] = {}
        self._captured: list[Tensor] = []

    def table(self, bucket: Bucket, now: int) -> _Table:
        """The table of a bucket, for step number ``now``, on the current stream of its device, the current device."""
        self.now = now
        device = bucket.params[0].device
        sizes = tuple(map(Tensor.numel, bucket.params))
        # buffers are made before
        columns: tuple[Any, ...] = (bucket.params, bucket.grads, bucket.momentum_buffers, bucket.compensations)
        addresses = tuple(
            chain.from_iterable(map(Tensor.data_ptr, each) if each else repeat(0, len(sizes)) for each in columns)
        )
        if is_capturing():
            return self._captured_table(device, addresses, sizes)

        # With the stream: memory that is dropped is used again in the order of the stream it was made on.
        key = (device, _stream(device), sizes, addresses)
        table = self._tables.get(key)
        if table is None:
            self._drop_old()
            # torch's pinned memory is not used again before copies out of it have ended
            table = self._tables[key] = _new_table(_host_table(device, addresses, sizes), len(sizes), device)
        if not self._spares.get((device, sizes)):
            length = table.rows.numel() + (table.chunk_tensor.numel() + 1) // 2
            self._spares[device, sizes] = list(_pinned(device, CAPTURES, length).unbind())
        table.last_use = self.now
        return table

    def _drop_old(self) -> None:
        self._tables = {k: table for k, table in self._tables.items() if table.last_use >= self.now - KEPT_STEPS}
        used = {(device, sizes) for device, _, sizes, _ in self._tables}
        self._spares = {k: spares for k, spares in self._spares.items() if k in used}

    def _captured_table(self, device: torch.device, addresses: tuple[int, ...], sizes: tuple[int, ...]) -> _Table:
        # Device memory comes from the graph's own pool, and each replay copies the table there again. What it copies
        # must stay as it is for as long as the graph: it goes with the optimizer, like the graph's momentum buffers.
        if spares := self._spares.get((device, sizes)):
            spare = spares.pop()
            self._captured.append(spare)
            return _new_table(_host_table(device, addresses, sizes, spare), len(sizes), device)
        raise RuntimeError(
            "capturing a fused LARS step needs an eager step of the same tensors and options before it (which compiles "
            f"the kernels and makes the state), and another one after every {CAPTURES} captures; nothing has changed"
        )


def _host_table(
    device: torch.device, addresses: tuple[int, ...], sizes: tuple[int, ...], host: Tensor | None = None
) -> Tensor:
    """Rows and chunk_tensor one after the other, in pinned memory."""
    n = len(sizes)
    chunks = [max(1, -(-size // CHUNK)) for size in sizes]  # an empty tensor has an empty chunk
    ends = list(accumulate(chunks))
    firsts = (end - count for end, count in zip(ends, chunks))
    columns = [addresses[i * n : (i + 1) * n] for i in range(4)]
    rows = list(chain.from_iterable(zip(*columns, sizes, firsts, ends, repeat(0))))
    if host is None:
        host = _pinned(device, COLUMNS * n + (ends[-1] + 1) // 2)
    chunk_tensor = array("i")
    for i, count in enumerate(chunks):
        chunk_tensor.extend(array("i", [i]) * count)
    after_rows = 8 * len(rows)
    assert 8 * host.numel() >= after_rows + 4 * ends[-1]
    # not by torch, whose threads wait for each other for milliseconds on a busy machine
    for start, values in ((host.data_ptr(), array("q", rows)), (host.data_ptr() + after_rows, chunk_tensor)):
        address, length = values.buffer_info()
        ctypes.memmove(start, address, length * values.itemsize)
    return host


def _pinned(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def _new_table(host: Tensor, n: int, device: torch.device) -> _Table:
    chunks = int(host[COLUMNS * n - 2])  # the end of the last tensor
    table = torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)
    return _Table(
        rows=table[: COLUMNS * n],
        chunk_tensor=table[COLUMNS * n :].view(torch.int32)[:chunks],
        sums=torch.empty(chunks, 3, dtype=torch.float32, device=device),
        norms=torch.empty(3, n, dtype=torch.float32, device=device),
    )


class Triton:
    """Float32, bfloat16 and float16 tensors on NVIDIA GPUs, dense and laid out like their gradients and buffers."""

    name = "fused (Triton)"
    takes_scale = True
    traceable = False
    mixes_first_steps = False

    def __init__(self, device: str = "cuda") -> None:
        """With tables for the functional form, whose calls have no optimizer to keep them.

        Args:
            device: the type of the devices whose tensors are served: "cpu" under Triton's interpreter.
        """
        self._device = device
        self._tables = Tables()
        self._lock = threading.Lock()  # all threads share them

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """Where it is asked for."""
        return bool(options.fused) and any([param.device.type == self._device for param in params])  # noqa: C419

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether the kernels, which walk over memory, compute these right.

        Addresses need not be aligned: where they are not, the kernels go element by element.
        """
        others = [grads, momentum_buffers] if momentum_buffers else [grads]
        return (
            all(p.device.type == self._device for p in params)
            and all(p.dtype in DTYPES and g.dtype in DTYPES and g.device == p.device for p, g in zip(params, grads))
            and all(v.dtype == p.dtype and v.device == p.device for p, v in zip(params, momentum_buffers))
            and can_be_walked(params, *others)
        )

    def plan(self, params: list[Tensor]) -> None:
        """Nothing: tables are found by addresses."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:  # noqa: ARG002
        """All norms in two launches."""
        make_buffers(bucket)  # the table holds their addresses
        options, device = bucket.options, bucket.params[0].device
        adapted = bool(is_adapted(options))  # numpy's scalars make numpy's bools, which are no constants to Triton
        joint = adapted and options.trust_denominator == "joint"
        grad_norm = bool(options.skip_nonfinite) or (adapted and not joint)
        which = {"ADAPTED": adapted, "JOINT": joint, "GRAD_NORM": grad_norm}
        with torch.cuda.device_of(bucket.params[0]):  # type: ignore[no-untyped-call]  # torch's
            table = self._table(bucket)
            if not (adapted or grad_norm):
                return Norms(kept=table)
            _kernels().partial_sums[(table.sums.size(0),)](
                table.rows,
                table.chunk_tensor,
                table.sums,
                _scalar(bucket.grad_scale, device),
                bucket.params[0],
                bucket.grads[0],
                float(options.weight_decay),
                CHUNK=CHUNK,
                MAXIMIZE=bool(options.maximize),
                **which,
                **LAUNCH_SUMS,
            )
            _kernels().norms[(len(bucket.params),)](
                table.rows, table.sums, table.norms, BLOCK=BLOCK, **which, **LAUNCH_FEW
            )
        param, direction, grad = table.norms.unbind()
        if not adapted:
            return Norms(grad=grad, kept=table)
        return Norms(param, direction if joint else grad, grad if grad_norm else None, kept=table)

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Parameters and buffers in one launch, which begins with the formula."""
        options, device = bucket.options, bucket.params[0].device
        table: _Table = norms.kept
        lr_ptr, lr = _lr(options.lr, device)
        # those of whole sharded tensors are as an exchange made them
        param_norms, direction_norms = (norm if norm is None else norm.float().contiguous() for norm in norms[:2])
        with torch.cuda.device_of(bucket.params[0]):  # type: ignore[no-untyped-call]  # torch's
            _kernels().update[(table.sums.size(0),)](
                table.rows,
                table.chunk_tensor,
                param_norms,
                direction_norms,
                lr_ptr,
                _scalar(bucket.grad_scale, device),
                _scalar(gate, device),
                bucket.params[0],
                bucket.grads[0],
                lr,
                float(options.momentum),
                float(options.weight_decay),
                float(options.trust_coefficient),
                float(options.eps),
                1.0 if options.momentum == 0 or bucket.is_first_step else 1.0 - float(options.dampening),
                CHUNK=CHUNK,
                ADAPTED=param_norms is not None,
                JOINT=options.trust_denominator == "joint",
                CLIP=bool(options.trust_clip),
                DECAYS=bool(options.weight_decay != 0),
                MOMENTUM=bool(options.momentum != 0),
                NESTEROV=bool(options.nesterov),
                LR_IN_MOMENTUM=bool(options.lr_in_momentum),
                MAXIMIZE=bool(options.maximize),
                KAHAN=bool(bucket.compensations),
                **LAUNCH,
            )
        bump_versions([*bucket.params, *make_buffers(bucket), *bucket.compensations])

    def _table(self, bucket: Bucket) -> _Table:
        """The table of a bucket on the current stream of its device, which is the current device."""
        if bucket.memory is None:
            with self._lock:
                return self._tables.table(bucket, self._tables.now + 1)
        if bucket.memory.tables is None:
            bucket.memory.tables = Tables()
        tables: Tables = bucket.memory.tables
        return tables.table(bucket, bucket.memory.steps)


TRITON = Triton()


def _kernels() -> Any:
    # here, so that `import fastlars` loads no triton
    from . import triton_kernels  # noqa: PLC0415

    return triton_kernels


def _lr(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """The two arguments of a kernel: a tensor that it reads, or a number (float32 there, whatever its value)."""
    if not isinstance(lr, Tensor):
        return None, float(lr)
    if lr.device.type == "cpu" and device.type != "cpu":
        return None, float(lr)  # nothing to wait for
    return _scalar(lr, device), 0.0


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    value = value.detach().to(device=device, non_blocking=True)
    return value.view(torch.uint8) if value.dtype == torch.bool else value


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing() -> bool:
    """Whether a CUDA graph captures what runs on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]  # torch's


def check_captured(params: list[Tensor], state: Sequence[Tensor | None], where: str) -> None:
    """Raise where the graph being captured would make state: every replay would fill it with zeros."""
    for i, (param, made) in enumerate(zip(params, state)):
        if made is None and param.is_cuda:
            raise RuntimeError(
                f"{where}: capturing a LARS step needs an eager step of the same tensors before it, which makes their momentum "
                f"buffers and compensations; tensor {i} of those with a gradient has none. Nothing has changed"
            )

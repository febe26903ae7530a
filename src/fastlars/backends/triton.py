"""The fused step on CUDA. It takes three kernel launches per bucket, however many tensors the bucket holds.

`partial_sums` and `norms` compute the norms, and `update` writes parameters and state (see `triton_kernels.py`). All three
find the tensors' addresses in a table on the device. A table is never rewritten. It is cached under the addresses and sizes
that it was built from, so a step allocates no device memory while addresses stay the same. The host reads nothing from the
device. Triton is imported only if fused=True is requested on CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain, repeat
from typing import Any

import torch
from torch import Tensor

from fastlars.buckets import Bucket, Norms
from fastlars.checks import is_capturing
from fastlars.compat import bump_versions
from fastlars.compiled import LIBRARY, joint_operator
from fastlars.formula import is_adapted
from fastlars.options import Options

from .eager import make_state
from .layouts import PLAIN, can_be_walked

COLUMNS = 8  # columns of a table; their number is even, because the data after the rows must be aligned to 16 bytes
# Elements per program of `partial_sums` and `update`, 8 per thread. A thread then takes at most 48 registers on sm_80 and
# sm_90, and five programs fit on a multiprocessor without spilling. On sm_100 it takes 56 registers, and four programs fit.
# With compensations, a thread of `update` takes up to 64 registers, and four programs fit.
CHUNK = 2048
BLOCK = 2048  # partial sums that `norms` adds at a time
# Fusion is off, because in scale * g + weight_decay * w the compiler would fuse one product with the sum, and which one depends
# on whether there is a scale. A GradScaler would then change the bits of norms, although it scales by powers of two.
LAUNCH_SUMS = {"num_warps": 8, "enable_fp_fusion": False}
LAUNCH_FEW = {"num_warps": 16, "enable_fp_fusion": True}  # one program adds all sums of a tensor, so it gets more warps
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports; older ones cannot convert bfloat16

KEPT_STEPS = 16  # an unused table is dropped after this many steps
CAPTURES = 4  # after this many captures of a step, another eager step is needed


def check_fused(params: Iterable[Any], where: str) -> None:
    """Raise if ``fused=True`` is not possible for these tensors. Anything that is not a tensor is ignored."""
    refusal = cache(_refusal)
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
            reason = refusal(param.device)
        if reason is not None:
            raise RuntimeError(f"{where}: fused=True {reason}; leave fused=None or use foreach=True")


def _refusal(device: torch.device) -> str | None:
    """The reason why kernels cannot run on a CUDA device, or None if they can run."""
    if importlib.util.find_spec("triton") is None:
        return "on CUDA needs Triton, which is not installed (pip install triton)"
    if torch.version.hip is not None:
        return "is for NVIDIA GPUs, and this is torch for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return "on CUDA needs compute capability {}.{}, {} has {}.{}".format(*CAPABILITY, device, *capability)
    try:
        # this call fails where Triton cannot compile C code, which needs a compiler and Python's headers
        _kernels().driver.active.get_current_device()
    except Exception as error:  # noqa: BLE001  errors of compilers, linkers and drivers have no common class
        return f"on CUDA needs Triton, which cannot launch kernels here ({type(error).__name__}: {error})"
    return None


@dataclass(eq=False)
class _Table:
    """The device memory that the kernels of one bucket use besides its tensors."""

    rows: Tensor  # int64, COLUMNS per tensor, see `triton_kernels.py`
    chunk_tensor: Tensor  # int32, the row of each chunk's tensor
    sums: Tensor  # (chunks, 3)
    norms: Tensor  # (3, n)
    last_use: int = 0


class Tables:
    """The tables of one optimizer. They hold addresses and keep no tensor alive, so they must not be copied or saved."""

    def __init__(self) -> None:
        """Start without tables."""
        self.now = 0
        self._tables: dict[tuple[Any, ...], _Table] = {}
        # (device, sizes) -> pinned memory for captures, during which none may be allocated
        self._spares: dict[tuple[torch.device, tuple[int, ...]], list[Tensor]] = {}
        self._captured: list[Tensor] = []

    def table(self, bucket: Bucket, now: int) -> _Table:
        """The table of a bucket for step number ``now``, on the current stream. The bucket's device must be current."""
        self.now = now
        device = bucket.params[0].device
        sizes = tuple(map(Tensor.numel, bucket.params))
        # `make_state` has created all buffers
        columns: tuple[Any, ...] = (bucket.params, bucket.grads, bucket.momentum_buffers, bucket.compensations)
        addresses = tuple(
            chain.from_iterable(map(Tensor.data_ptr, each) if each else repeat(0, len(sizes)) for each in columns)
        )
        if is_capturing():
            return self._captured_table(device, addresses, sizes)

        # The stream is in the key, because freed memory is reused in the order of the stream it was allocated on.
        key = (device, _stream(device), sizes, addresses)
        table = self._tables.get(key)
        if table is None:
            self._drop_old()
            # the pinned memory need not be kept, because torch reuses it only after copies from it have finished
            table = self._tables[key] = _new_table(device, addresses, sizes)
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
        # Device memory comes from the graph's pool, and each replay copies the table into it again. The pinned memory that it
        # is copied from must not change while the graph exists, so the optimizer keeps it.
        spares = self._spares.get((device, sizes))
        if not spares:
            raise RuntimeError(
                "capturing a fused LARS step needs an eager step of the same tensors and options before it, which compiles "
                f"the kernels and creates the state, and another eager step after every {CAPTURES} captures. Nothing has "
                "changed"
            )
        self._captured.append(spares.pop())
        return _new_table(device, addresses, sizes, self._captured[-1])


def _new_table(
    device: torch.device, addresses: tuple[int, ...], sizes: tuple[int, ...], host: Tensor | None = None
) -> _Table:
    """A table on the device, copied from pinned memory. In both, chunk_tensor follows the rows."""
    n = len(sizes)
    chunks = [max(1, -(-size // CHUNK)) for size in sizes]  # an empty tensor has an empty chunk
    ends = list(accumulate(chunks))
    firsts = (end - count for end, count in zip(ends, chunks))
    columns = [addresses[i * n : (i + 1) * n] for i in range(4)]
    rows = list(chain.from_iterable(zip(*columns, sizes, firsts, ends, repeat(0))))
    if host is None:
        host = _pinned(device, len(rows) + (ends[-1] + 1) // 2)
    chunk_tensor = array("i")
    for i, count in enumerate(chunks):
        chunk_tensor.extend(array("i", [i]) * count)
    after_rows = 8 * len(rows)
    assert 8 * host.numel() >= after_rows + 4 * ends[-1]
    # copy without torch, whose threads may wait milliseconds for each other on a busy machine
    for start, values in ((host.data_ptr(), array("q", rows)), (host.data_ptr() + after_rows, chunk_tensor)):
        address, length = values.buffer_info()
        ctypes.memmove(start, address, length * values.itemsize)
    table = torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)
    return _Table(
        rows=table[: len(rows)],
        chunk_tensor=table[len(rows) :].view(torch.int32)[: ends[-1]],
        sums=torch.empty(ends[-1], 3, dtype=torch.float32, device=device),
        norms=torch.empty(3, n, dtype=torch.float32, device=device),
    )


def _pinned(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


class Triton:
    """Updates dense tensors of the dtypes `DTYPES` on NVIDIA GPUs, if gradients and buffers have the same memory layout."""

    name = "fused (Triton)"
    takes_scale = True
    traceable = False
    mixes_first_steps = False

    def __init__(self, device: str = "cuda") -> None:
        """Create the tables of the functional form, whose calls have no optimizer to keep them.

        Args:
            device: the device type to serve, "cpu" under Triton's interpreter.
        """
        self._device = device
        self._tables = Tables()
        self._lock = threading.Lock()  # all threads share these tables

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:  # noqa: ARG002
        """True with ``fused=True``, if any tensor is on a device of the type that this backend serves."""
        return bool(options.fused) and any([param.device.type == self._device for param in params])  # noqa: C419

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether the kernels, which ignore strides, update these tensors correctly.

        Addresses need not be aligned. If they are not, the kernels work element by element.
        """
        return (
            all(p.device.type == self._device for p in params)
            and all(p.dtype in DTYPES and g.dtype in DTYPES and g.device == p.device for p, g in zip(params, grads))
            and all(v.dtype == p.dtype and v.device == p.device for p, v in zip(params, momentum_buffers))
            and can_be_walked(params, grads, momentum_buffers)
        )

    def plan(self, params: list[Tensor]) -> None:
        """Return None. This backend needs no plan, because tables are looked up by address."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:  # noqa: ARG002
        """Compute all norms in two launches."""
        make_state(bucket)  # the table holds the state's addresses
        options, device = bucket.options, bucket.params[0].device
        adapted = bool(is_adapted(options))  # numpy scalars give numpy bools, which Triton rejects as constants
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
        """Evaluate the formula and update parameters and state in one launch."""
        options, device = bucket.options, bucket.params[0].device
        table: _Table = norms.kept
        lr_ptr, lr = _lr(options.lr, device)
        # the kernel reads contiguous float32, but norms that ranks have exchanged may have another dtype or layout
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
        bump_versions(list(chain(bucket.params, *make_state(bucket))))

    def _table(self, bucket: Bucket) -> _Table:
        """The table of a bucket on the current stream. The bucket's device must be current."""
        if bucket.memory is None:
            with self._lock:
                return self._tables.table(bucket, self._tables.now + 1)
        if bucket.memory.tables is None:
            bucket.memory.tables = Tables()
        tables: Tables = bucket.memory.tables
        return tables.table(bucket, bucket.memory.steps)


TRITON = Triton()


def joint_norms(params: list[Tensor], grads: list[Tensor], sign: float, weight_decay: float) -> Tensor:
    """The operator `joint_norms` of `compiled.py` on CUDA. If the kernels serve the tensors, they read each tensor once."""
    if not TRITON.serves(params, grads, []) or not _runs_on(params[0].device):
        return joint_operator(params, grads, sign, weight_decay)
    options = Options(0.0, weight_decay=weight_decay, adapt=True, trust_denominator="joint", maximize=sign < 0)
    bucket = Bucket(TRITON, list(range(len(params))), params, grads, [], [], options)
    return TRITON.measure(bucket, now=True).kept.norms[:2].clone()  # type: ignore[no-any-return]  # cloned: tables are reused


@cache
def _runs_on(device: torch.device) -> bool:
    return device.type == "cpu" or _refusal(device) is None  # CPU: in Triton's interpreter


LIBRARY.impl("joint_norms", joint_norms, "CUDA")


def _kernels() -> Any:
    # imported here, because `import fastlars` must not load triton
    from . import triton_kernels  # noqa: PLC0415

    return triton_kernels


def _lr(lr: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """The two lr arguments of a kernel: a tensor to read, and a number, which the kernel gets as float32. Only one is used."""
    if isinstance(lr, Tensor) and (lr.device.type != "cpu" or device.type == "cpu"):
        return _scalar(lr, device), 0.0
    return None, float(lr)  # reading a CPU tensor does not synchronise


def _scalar(value: Tensor | None, device: torch.device) -> Tensor | None:
    if value is None:
        return None
    value = value.detach().to(device=device, non_blocking=True)
    return value.view(torch.uint8) if value.dtype == torch.bool else value


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0

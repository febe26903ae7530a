"""The fused step on CUDA: which tensors it serves, tables of addresses on the device, and three launches a part.

`partial_sums` and `coefficients` measure, `update` writes; `fused_cuda_kernels.py` says what they compute. All three find
their tensors in a table on the device, so their number does not depend on the number of tensors. A table is never
rewritten: it belongs to the addresses and sizes it was made from, and is found again by them. The host reads nothing from
the device and, while addresses stay, allocates nothing there. Triton is imported where fused=True is asked for on CUDA.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .coefficients import is_adapted
from .compat import bump_versions
from .known_lists import known
from .layouts import are_laid_out_alike
from .options import Options
from .sharding import local

if TYPE_CHECKING:
    from .dispatch import Part

CHUNK = 2048  # elements a program: 8 a thread, at most 48 registers and no spills from sm_80 to sm_100
BLOCK = 2048  # partial sums that `coefficients` adds at a time
# Of scale * g + weight_decay * w the compiler would fuse one product with the sum, and which one depends on whether there is
# a scale: with a GradScaler norms would have other bits, though it scales by powers of two.
LAUNCH_SUMS = {"num_warps": 8, "enable_fp_fusion": False}
LAUNCH_FEW = {"num_warps": 16, "enable_fp_fusion": True}  # one program a tensor: a large one has many sums to wait for
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = frozenset({Tensor, torch.nn.Parameter})  # a subclass may mean anything
CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports; before, there is no bfloat16 conversion

KEPT_STEPS = 16  # a table that so many calls of `measure` did not use is dropped
CAPTURES = 4  # graphs that can capture a step before an eager step is needed again


def check_fused(params: Iterable[Any], where: str) -> None:
    """Raise where ``fused=True`` cannot be honoured for these tensors, or named tensors."""
    tensors = [local(item[1] if isinstance(item, tuple) else item) for item in params]
    for i, param in enumerate(tensors):
        if isinstance(param, Tensor) and not (param.is_cpu or param.is_cuda):
            raise RuntimeError(
                f"{where}: fused=True is for CPU and CUDA tensors, got one on {param.device} at position {i}; "
                "leave fused=None, which follows torch's default for that device"
            )
    on_cuda = [param for param in tensors if isinstance(param, Tensor) and param.is_cuda]
    if on_cuda and (reason := refusal(on_cuda)):
        raise RuntimeError(f"{where}: {reason}")


def refusal(params: Sequence[Tensor]) -> str | None:
    """Why fused=True cannot be honoured for these CUDA tensors, and the way out; None where it can."""
    way_out = "leave fused=None or use foreach=True"
    if importlib.util.find_spec("triton") is None:
        return f"fused=True on CUDA needs Triton, which is not installed; pip install triton, or {way_out}"
    if torch.version.hip is not None:
        return f"fused=True is for NVIDIA GPUs, and this is torch for ROCm; {way_out}"
    for i, param in enumerate(params):
        if type(param) not in _PLAIN:
            return f"fused=True on CUDA needs plain tensors, got {type(param).__name__} at position {i}; {way_out}"
        if param.dtype not in DTYPES:
            return (
                f"fused=True on CUDA needs float32, bfloat16 or float16 tensors, got {param.dtype} at position {i}; "
                + way_out
            )
    for device in {param.device for param in params}:
        capability = torch.cuda.get_device_capability(device)
        if capability < CAPABILITY:
            return (
                "fused=True on CUDA needs compute capability {}.{}, ".format(*CAPABILITY)
                + "{} has {}.{}; ".format(device, *capability)
                + way_out
            )
    if error := _cannot_launch():
        return f"fused=True on CUDA needs Triton, which cannot launch kernels here ({error}); mend that, or {way_out}"
    return None


def _cannot_launch() -> str | None:
    """What keeps Triton from launching kernels: for that it compiles C, against Python's headers."""
    try:
        _kernels().driver.active.get_current_device()
    except Exception as error:  # noqa: BLE001  of compilers, linkers and drivers: no list is complete
        return f"{type(error).__name__}: {error}"
    return None


def serves(param: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    """Whether the kernels, which walk over memory, compute these tensors right; all are on one device.

    Addresses need not be aligned: where they are not, the kernels go element by element.
    """
    buffer = param if buffer is None else buffer
    if type(param) not in _PLAIN or type(grad) not in _PLAIN or type(buffer) not in _PLAIN:
        return False
    if param.dtype not in DTYPES or grad.dtype not in DTYPES or buffer.dtype != param.dtype:
        return False
    if grad.device != param.device or buffer.device != param.device:
        return False
    if param.is_neg() or grad.is_neg() or buffer.is_neg():
        return False
    if not (param.is_same_size(grad) and param.is_same_size(buffer)):
        return False  # they would go on beyond the end of the smaller one
    if param.is_contiguous() and grad.is_contiguous() and buffer.is_contiguous():
        return True
    same_strides = grad.stride() == buffer.stride() == param.stride()
    if same_strides and param.dim() == 4 and param.is_contiguous(memory_format=torch.channels_last):
        return True  # without a loop over dimensions for each of a model's tensors
    return are_laid_out_alike(param, grad, buffer)


def serves_all(params: list[Tensor], *others: list[Tensor]) -> bool:
    """Whether the kernels serve all of these, gradients and buffers, in one part: of one device and dtypes."""
    return bool(known(_are_one_part, params, *others))


def _are_one_part(params: list[Tensor], grads: list[Tensor], buffers: Sequence[Tensor | None] = ()) -> bool:
    alike = len({(param.device, param.dtype, grad.dtype) for param, grad in zip(params, grads)}) == 1
    return alike and all(serves(*each) for each in zip(params, grads, buffers or repeat(None)))


@dataclass(eq=False)
class _Table:
    """What the kernels of one part read and write besides its tensors, in device memory."""

    rows: Tensor  # int64, six a tensor: see `fused_cuda_kernels.py`
    chunk_tensor: Tensor  # int32, the row of every chunk
    sums: Tensor  # (chunks, 3)
    norms: Tensor  # (3, n)
    coefficients: Tensor  # (n, 2): b and c
    last_use: int = 0


class Tables:
    """The tables of one optimizer. They hold addresses, and keep no tensor alive; not to be copied or saved with it."""

    def __init__(self) -> None:
        """Without any table."""
        self._calls = 0
        self._tables: dict[tuple[Any, ...], _Table] = {}
        self._flags: dict[tuple[torch.device, int, int], Tensor] = {}
        # by device and sizes, pinned memory for captures, which must not allocate it
        self._spares: dict[tuple[torch.device, tuple[int, ...]], list[Tensor]] = {}
        self._captured: list[Tensor] = []
        self._lock = threading.Lock()  # the functional form's tables serve all threads

    def begin(self) -> None:
        """A step begins; tables are dropped by their age in steps."""
        self._calls += 1

    def table(self, part: Part) -> _Table:
        """The table of a part on the current stream of its device, which is the current device."""
        with self._lock:
            return self._table(part)

    def _table(self, part: Part) -> _Table:
        device = part.params[0].device
        tensors = chain(part.params, part.grads, part.momentum_buffers)
        addresses = tuple(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]  # `measure` made the buffers
        sizes = tuple(map(Tensor.numel, part.params))
        if _is_capturing(device):
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
        table.last_use = self._calls
        return table

    def _drop_old(self) -> None:
        self._tables = {k: table for k, table in self._tables.items() if table.last_use >= self._calls - KEPT_STEPS}
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

    def flag(self, device: torch.device) -> Tensor:
        """A 1-element int32 tensor that says whether a gradient of this step is not finite; `measure` sets it to 0."""
        if _is_capturing(device):
            return torch.empty(1, dtype=torch.int32, device=device)
        key = (device, _stream(device), threading.get_ident())
        if key not in self._flags:
            self._flags[key] = torch.empty(1, dtype=torch.int32, device=device)
        return self._flags[key]


def _host_table(
    device: torch.device, addresses: tuple[int, ...], sizes: tuple[int, ...], host: Tensor | None = None
) -> Tensor:
    """Rows and chunk_tensor one after the other, in pinned memory."""
    n = len(sizes)
    chunks = [max(1, -(-size // CHUNK)) for size in sizes]  # an empty tensor has an empty chunk
    ends = list(accumulate(chunks))
    buffers = addresses[2 * n :] or repeat(0)
    firsts = (end - count for end, count in zip(ends, chunks))
    rows = list(chain.from_iterable(zip(addresses[:n], addresses[n : 2 * n], buffers, sizes, firsts, ends)))
    if host is None:
        host = _pinned(device, 6 * n + (ends[-1] + 1) // 2)
    chunk_tensor = array("i")
    for i, count in enumerate(chunks):
        chunk_tensor.extend(array("i", [i]) * count)
    assert 8 * host.numel() >= 48 * n + 4 * ends[-1]
    # not by torch, whose threads wait for each other for milliseconds on a busy machine
    for start, values in ((host.data_ptr(), array("q", rows)), (host.data_ptr() + 48 * n, chunk_tensor)):
        address, length = values.buffer_info()
        ctypes.memmove(start, address, length * values.itemsize)
    return host


def _pinned(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def _new_table(host: Tensor, n: int, device: torch.device) -> _Table:
    chunks = int(host[6 * n - 1])
    table = torch.empty(host.shape, dtype=host.dtype, device=device).copy_(host, non_blocking=True)
    return _Table(
        rows=table[: 6 * n],
        chunk_tensor=table[6 * n :].view(torch.int32)[:chunks],
        sums=torch.empty(chunks, 3, dtype=torch.float32, device=device),
        norms=torch.empty(3, n, dtype=torch.float32, device=device),
        coefficients=torch.empty(n, 2, dtype=torch.float32, device=device),
    )


@dataclass(frozen=True, eq=False)
class Measured:
    """A part between `measure` and `update`, within one step: the next one overwrites its tensors."""

    part: Part
    options: Options
    table: _Table
    flag: Tensor | None
    norms: Tensor  # what functional.measure returns: (rows, n), float32; the last row's are the gradients' with skip_nonfinite

    @property
    def coefficients(self) -> Tensor:
        """b and c, shape (n, 2), float32: `update` reads them; who knows better (sharded norms) writes them anew."""
        return self.table.coefficients


def measure(steps: Sequence[tuple[Part, Options]], grad_scale: Tensor | None, tables: Tables) -> list[Measured]:
    """Norms and coefficients of all parts of a step, whose tensors are all served: two launches a part.

    A part without momentum buffers gets zeros. With ``skip_nonfinite``, a gradient that is not finite in any part that
    sets it stops the update of all that set it, on their device.
    """
    tables.begin()
    flags: dict[torch.device, Tensor] = {}
    return [_measure(part, options, grad_scale, tables, flags) for part, options in steps]


def _measure(
    part: Part, options: Options, grad_scale: Tensor | None, tables: Tables, flags: dict[torch.device, Tensor]
) -> Measured:
    kernels = _kernels()
    device = part.params[0].device
    first_step = options.momentum != 0 and part.momentum_buffers[0] is None
    if first_step:
        part.momentum_buffers[:] = [torch.zeros_like(param) for param in part.params]
    adapted = bool(is_adapted(options))  # numpy's scalars make numpy's bools, which are no constants to Triton
    joint = adapted and options.trust_denominator == "joint"
    grad_norm = options.skip_nonfinite or (adapted and not joint)
    rows = adapted + joint + grad_norm
    scale = _scalar(grad_scale, device)
    with torch.cuda.device_of(part.params[0]):  # type: ignore[no-untyped-call]  # torch's
        table = tables.table(part)
        flag, reset = None, 0
        if options.skip_nonfinite:
            reset = int(device not in flags)
            flag = flags[device] = flags[device] if device in flags else tables.flag(device)
        if rows:
            kernels.partial_sums[(table.sums.size(0),)](
                table.rows,
                table.chunk_tensor,
                table.sums,
                scale,
                flag,
                part.params[0],
                part.grads[0],
                float(options.weight_decay),
                reset,
                CHUNK=CHUNK,
                ADAPTED=adapted,
                JOINT=joint,
                GRAD_NORM=grad_norm,
                MAXIMIZE=options.maximize,
                **LAUNCH_SUMS,
            )
        kernels.coefficients[(len(part.params),)](
            table.rows,
            table.sums,
            table.norms,
            table.coefficients,
            *_lr(options.lr, device),
            scale,
            flag,
            float(options.weight_decay),
            float(options.trust_coefficient),
            float(options.eps),
            1.0 if options.momentum == 0 or first_step else 1.0 - float(options.dampening),
            BLOCK=BLOCK,
            ADAPTED=adapted,
            JOINT=joint,
            GRAD_NORM=grad_norm,
            CLIP=options.trust_clip,
            LR_IN_MOMENTUM=options.lr_in_momentum,
            MAXIMIZE=options.maximize,
            **LAUNCH_FEW,
        )
    return Measured(part, options, table, flag, table.norms[:rows])


def update(measured: Measured, found_inf: Tensor | None) -> None:
    """Write parameters and momentum buffers of a part: one launch.

    ``found_inf``: 1-element tensor; where it is not 0, nothing changes.
    """
    part, options, table = measured.part, measured.options, measured.table
    device = part.params[0].device
    with torch.cuda.device_of(part.params[0]):  # type: ignore[no-untyped-call]  # torch's
        _kernels().update[(table.sums.size(0),)](
            table.rows,
            table.chunk_tensor,
            table.coefficients,
            *_lr(options.lr, device),
            _scalar(found_inf, device),
            measured.flag,
            part.params[0],
            part.grads[0],
            float(options.momentum),
            CHUNK=CHUNK,
            DECAYS=bool(options.weight_decay != 0),
            MOMENTUM=bool(options.momentum != 0),
            NESTEROV=options.nesterov,
            LR_IN_MOMENTUM=options.lr_in_momentum,
            **LAUNCH,
        )
    bump_versions([*part.params, *(buffer for buffer in part.momentum_buffers if buffer is not None)])


def _kernels() -> Any:
    # here, so that `import fastlars` loads no triton
    from . import fused_cuda_kernels  # noqa: PLC0415

    return fused_cuda_kernels


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


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and is_capturing()

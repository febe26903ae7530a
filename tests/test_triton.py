"""The Triton backend without a GPU: kernels under the interpreter and through the compiler, tables, and dispatch."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cases import OPTIONS
from fastlars import LARS, backends
from fastlars.backends import layouts, torch_sgd, triton
from fastlars.backends.eager import FOREACH, SINGLE
from fastlars.backends.fused_cpu import FUSED_CPU
from fastlars.backends.torch_sgd import TorchSGD
from fastlars.buckets import Bucket, Group, Memory, Norms
from fastlars.compat import NAMED_PARAMETERS
from fastlars.options import Options
from recording import fake_cuda

HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"


ON_CPU = triton.Triton("cpu")
MOMENTUM = Options(0.5, momentum=0.9)


def bucket_of(
    params: list[Tensor], options: Options = MOMENTUM, grad_scale: Tensor | None = None, kahan: bool = False
) -> Bucket:
    """A tensor past its first step."""
    buffers: list[Tensor | None] = [torch.zeros_like(p) for p in params] if options.momentum != 0 else []
    kept: list[Tensor | None] = [torch.zeros_like(p) for p in params if kahan]
    grads = [torch.ones_like(p) for p in params]
    return Bucket(ON_CPU, list(range(len(params))), params, grads, buffers, kept, options, grad_scale=grad_scale)


# ---------------------------------------------------------------- kernels
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(which: str) -> None:
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and int(numpy.__version__.split(".")[0]) >= 2:
        pytest.skip("the interpreter of Triton 3.0 reads nonsense with NumPy 2, that of 3.6 fails with NumPy 2.4")
    # it also warns with NumPy 1.25 and later
    ignore = "ignore:Conversion of an array:DeprecationWarning"
    tests = str(HERE / "triton_interpreted.py")
    options = ["-q", "-p", "no:cacheprovider", "-W", ignore, "-m", which]
    python("-m", "pytest", *options, tests, TRITON_INTERPRET="1")


class Compiled:
    """The kernels that a step's launches compile, without a GPU to run them."""

    def __init__(self) -> None:
        self.kernels: dict[str, list[Any]] = {}

    def distinct(self, name: str) -> list[Any]:
        return list({id(kernel): kernel for kernel in self.kernels[name]}.values())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Compiled]:
    """compiler(arch): from now on launches only compile, for that architecture."""
    triton = pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415  not on every machine
    from triton.runtime.driver import driver  # noqa: PLC0415

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])

    def compile_for(arch: int) -> Compiled:
        if arch >= 100 and version < (3, 3):
            pytest.skip(f"Triton {triton.__version__} does not know sm_{arch}")

        class Driver:
            def get_current_device(self) -> int:
                return arch  # separate kernel caches

            def get_current_stream(self, _device: int) -> int:
                return 0

            def get_current_target(self) -> Any:
                return GPUTarget("cuda", arch, 32)

        compiled = Compiled()
        run = triton.JITFunction.run

        def compile_only(kernel: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
            result = run(kernel, *args, warmup=True, **kwargs)
            compiled.kernels.setdefault(kernel.fn.__name__, []).append(result)

        monkeypatch.setattr(triton.JITFunction, "run", compile_only)
        driver.set_active(Driver())
        return compiled

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    before = dict(vars(driver))
    yield compile_for
    vars(driver).clear()
    vars(driver).update(before)


def step(
    params: list[Tensor],
    options: Options,
    gate: Tensor | None = None,
    grad_scale: Tensor | None = None,
    kahan: bool = False,
) -> None:
    bucket = bucket_of(params, options, grad_scale, kahan)
    with torch.no_grad():
        ON_CPU.update(bucket, ON_CPU.measure(bucket, False), gate)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, where spilt registers go."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing.stdout)}


# the 16-byte loads and stores of each tensor, in units of what a program takes of it, by partial_sums and by update
COMPILED = {
    "momentum": ((2, 0), (3, 2)),
    "everything": ((2, 0), (3, 2)),
    "base": ((2, 0), (2, 1)),
    "everything_but_joint": ((2, 0), (3, 2)),
    "unadapted": (None, (2, 1)),
    "nesterov": ((2, 0), (3, 2)),  # the largest number of registers
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_to_wide_loads_and_no_spills(
    arch: int, dtype: torch.dtype, compiler: Callable[[int], Compiled], tmp_path: Path
) -> None:
    compiled, scalar = compiler(arch), torch.tensor([1.0])
    # a thread has 8 elements of each tensor; the aligned branch loads them 16 bytes at a time
    wide = 8 * dtype.itemsize // 16
    halves = dtype.itemsize == 2
    for (name, (sums, update)), kahan in itertools.product(COMPILED.items(), (False, True) if halves else (False,)):
        compiled.kernels.clear()
        options, on_device = Options(**OPTIONS[name]), name.startswith("everything")
        if on_device:
            options = options._replace(lr=scalar)
        step([torch.ones(5, dtype=dtype)], options, *((scalar, scalar) if on_device else (None, None)), kahan)
        # compensations are read and written by `update` alone
        counts = {"partial_sums": sums, "norms": sums and (0, 0), "update": (update[0] + kahan, update[1] + kahan)}
        assert compiled.kernels.keys() == {kernel for kernel, count in counts.items() if count}
        for kernel, (compilation,) in compiled.kernels.items():
            where, used, ptx = (name, kahan, kernel), resources(compilation, tmp_path), compilation.asm["ptx"]
            assert used["STACK"] == used["LOCAL"] == 0, (where, used)
            # as triton.py says; `norms`, of which there are few programs, may take as many as with compensations
            assert 0 < used["REG"] <= (64 if kernel == "norms" or kahan else 56), (where, used)
            loaded, stored = counts[kernel]
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == loaded * wide, where
            assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == stored * wide, where


def test_numbers_and_addresses_do_not_recompile(compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    options = Options(**OPTIONS["dampening"])

    def counts() -> list[int]:
        return [len(compiled.distinct(name)) for name in ("partial_sums", "norms", "update")]

    # rows of norms begin at multiples of 16 bytes only if the number of tensors is a multiple of four
    of_three, of_four = [torch.ones(n) for n in (5, 16, 1)], [torch.ones(n) for n in (5, 16, 1, 2)]
    for lr in (0.5, 1, 0.0, 16):
        for changed in ({}, {"momentum": 0.5}, {"weight_decay": 1}, {"eps": 1.0}, {"dampening": 0.5}):
            step(of_three, options._replace(lr=lr, **changed))
            step(of_four, options._replace(lr=lr, **changed))
            step([torch.ones(5000)[1:]], options._replace(lr=lr, **changed))
    assert counts() == [1, 1, 1]
    values = torch.ones(3)
    for lr in (values[0], values[1:2], torch.tensor(0.0)):
        step(of_three, options._replace(lr=lr))
    assert counts() == [1, 1, 2]
    for gate in (values[0], values[1:2]):
        step(of_three, options, gate, gate)
    assert counts() == [2, 1, 3]


@pytest.mark.parametrize("kind", [numpy.float64, numpy.float32])
def test_options_may_be_numpy_scalars(kind: type, compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
    for name in ("momentum", "everything"):
        options = Options(**OPTIONS[name])
        numbers = {key: kind(getattr(options, key)) for key in names}
        # these first, because Triton finds what it compiled for True with np.True_ too
        step([torch.ones(5)], options._replace(**numbers))
        step([torch.ones(5)], options)
    assert [len(compiled.distinct(name)) for name in ("partial_sums", "norms", "update")] == [2, 2, 2]


def test_sums_have_the_same_bits_with_a_scale_and_without(compiler: Callable[[int], Compiled]) -> None:
    """No product is fused with a sum. In scale * g + weight_decay * w the scale would decide which one."""
    compiled = compiler(90)
    options = Options(**OPTIONS["momentum-joint"], skip_nonfinite=True)
    step([torch.ones(5)], options)
    step([torch.ones(5)], options, None, torch.ones(1))
    for kernel in compiled.kernels["partial_sums"]:
        ptx = kernel.asm["ptx"]
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx or "mul.f32x2" in ptx
        assert "fma" not in ptx
    divided = [kernel.asm["ptx"] for kernel in compiled.kernels["partial_sums"][1:]]
    assert all(re.findall(r"\bdiv\.\w+", ptx) == ["div.rn"] for ptx in divided)


def test_three_launches_for_any_number_of_tensors(compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    step([torch.ones(n) for n in range(100)], Options(**OPTIONS["everything"]), torch.zeros(1))
    assert {name: len(kernels) for name, kernels in compiled.kernels.items()} == dict.fromkeys(
        ("partial_sums", "norms", "update"), 1
    )


# ---------------------------------------------------------------- tables
CPU = torch.device("cpu")


def test_a_table_says_where_everything_is() -> None:
    bucket = bucket_of([torch.ones(2 * triton.CHUNK + 1), torch.ones(0), torch.ones(3)])
    table = triton.Tables().table(bucket, 1)
    kept = [torch.zeros_like(p) for p in bucket.params]
    rows = triton.Tables().table(bucket._replace(compensations=kept), 1).rows.view(3, triton.COLUMNS).tolist()
    for i, tensors in enumerate(zip(bucket.params, bucket.grads, bucket.momentum_buffers, kept, strict=True)):
        assert rows[i][:5] == [*(t.data_ptr() for t in tensors if t is not None), tensors[0].numel()]
    assert [row[5:] for row in rows] == [[0, 3, 0], [3, 4, 0], [4, 5, 0]]
    assert table.chunk_tensor.tolist() == [0, 0, 0, 1, 2]
    without = triton.Tables().table(bucket._replace(momentum_buffers=[]), 1)
    assert without.rows.view(3, triton.COLUMNS)[:, 2:4].tolist() == [[0, 0]] * 3


def test_a_table_is_found_again_by_addresses_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = triton.Tables()
    bucket = bucket_of([torch.ones(4), torch.ones(3)])
    first = tables.table(bucket, 1)
    assert tables.table(bucket, 1) is first
    views = bucket._replace(params=[p.view(-1) for p in bucket.params])
    assert tables.table(views, 1) is first, "other objects, the same memory"
    moved = bucket._replace(grads=[g.clone() for g in bucket.grads])
    second = tables.table(moved, 1)
    assert second is not first and second.rows.view(2, triton.COLUMNS)[:, 1].tolist() == [
        g.data_ptr() for g in moved.grads
    ]
    assert tables.table(bucket, 1) is first, "an old table is never rewritten"
    shorter = bucket._replace(params=[p[:2] for p in bucket.params])
    assert tables.table(shorter, 1).rows.view(2, triton.COLUMNS)[:, 4].tolist() == [2, 2], (
        "the same addresses, other sizes"
    )
    monkeypatch.setattr(triton, "_stream", lambda _device: 1)
    assert tables.table(bucket, 1) is not first


def test_old_tables_are_dropped_and_keep_no_tensor_alive() -> None:
    tables = triton.Tables()
    kept = bucket_of([torch.ones(4)])
    gone = bucket_of([torch.ones(5)])
    param = weakref.ref(gone.params[0])
    tables.table(gone, 0)
    del gone
    assert param() is None
    grads: list[Tensor] = []
    for step in range(3 * triton.KEPT_STEPS):
        tables.table(kept, step)
        grads.append(torch.ones(6))  # kept, so that addresses differ
        tables.table(kept._replace(params=grads[:1], grads=grads[-1:], momentum_buffers=[]), step)
    assert len(tables._tables) <= triton.KEPT_STEPS + 2
    assert tables._spares.keys() == {(CPU, (4,)), (CPU, (6,))}, "by sizes, whatever the addresses; those of 5 are gone"
    assert tables.table(kept, 3 * triton.KEPT_STEPS) in tables._tables.values()


def test_tables_belong_to_an_optimizer_and_age_with_its_steps() -> None:
    memory, bucket = Memory(), bucket_of([torch.ones(4)])
    memory.steps = 7
    of_optimizer, of_function = (ON_CPU._table(bucket._replace(memory=each)) for each in (memory, None))
    assert memory.tables is not None and [*memory.tables._tables.values()] == [of_optimizer]
    assert of_optimizer.last_use == 7 and of_function is not of_optimizer
    assert ON_CPU._table(bucket) is of_function
    assert ON_CPU._tables.now == of_function.last_use > 1, "calls, where there are no steps"


def test_capture_leaves_eager_tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = triton.Tables()
    bucket = bucket_of([torch.ones(4), torch.ones(3), torch.ones(3)])  # an odd number of chunks
    monkeypatch.setattr(triton, "is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="needs an eager step"):
        tables.table(bucket, 1)
    monkeypatch.setattr(triton, "is_capturing", lambda: False)
    eager = tables.table(bucket, 1)
    monkeypatch.setattr(triton, "is_capturing", lambda: True)
    moved = [bucket._replace(grads=[g.clone() for g in bucket.grads]) for _ in range(triton.CAPTURES)]
    captured = [tables.table(each, 2) for each in moved]
    for table, each in zip(captured, moved, strict=True):
        assert table.rows.view(3, triton.COLUMNS)[:, 1].tolist() == [g.data_ptr() for g in each.grads]
        assert table.chunk_tensor.tolist() == [0, 1, 2]
        assert table not in tables._tables.values(), "its copy has not run before the graph has"
        assert table.sums.data_ptr() != eager.sums.data_ptr()
    # the source of the copies in every replay stays
    staged = {host.data_ptr() for host in tables._captured}
    assert len(staged) == triton.CAPTURES
    with pytest.raises(RuntimeError, match="needs an eager step"):
        tables.table(bucket, 2)
    monkeypatch.setattr(triton, "is_capturing", lambda: False)
    assert tables.table(bucket, 3) is eager
    monkeypatch.setattr(triton, "is_capturing", lambda: True)
    assert tables.table(moved[0], 4).rows.data_ptr() not in staged, "an eager step makes room for more"
    assert {host.data_ptr() for host in tables._captured} > staged


def test_threads_take_turns_with_the_tables_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the functional form."""
    backend, inside, seen = triton.Triton("cpu"), [], []

    def table(_tables: triton.Tables, _bucket: Bucket, _now: int) -> None:
        inside.append(1)
        time.sleep(0.02)
        seen.append(len(inside))
        inside.pop()

    monkeypatch.setattr(triton.Tables, "table", table)
    threads = [threading.Thread(target=backend._table, args=[bucket_of([torch.ones(4)])]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 4


def test_a_tensor_lr_is_read_on_the_host_only_if_it_is_there_and_the_parameters_are_not() -> None:
    lr, elsewhere = torch.tensor(0.5), torch.device("cuda")
    assert triton._lr(lr, elsewhere) == triton._lr(0.5, elsewhere) == (None, 0.5)
    on_device, _ = triton._lr(lr, lr.device)
    assert on_device is not None and on_device.data_ptr() == lr.data_ptr()


def test_torch_sgd_is_fused_where_the_step_is_and_leaves_versions_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(torch_sgd, "sgd", lambda *_, **options: asked.append(options["fused"]))
    for ours in (ON_CPU, FUSED_CPU, FOREACH, SINGLE):
        fused = ours in (ON_CPU, FUSED_CPU)
        backend = TorchSGD(ours, fused=fused, foreach=ours is FOREACH)
        param, buffer = torch.ones(3), torch.zeros(3)
        for buffers in ([buffer], [None]):
            bucket = Bucket(backend, [0], [param], [torch.ones(3)], buffers, [], Options(0.1, 0.9, adapt=False))
            backend.update(bucket, Norms(), None)
        assert asked == [fused] * 2
        asked.clear()
        assert (param._version, buffer._version) == ((2, 1) if fused else (0, 0))
    # on the CPU the gate is read before
    backend = TorchSGD(FUSED_CPU, fused=True)
    for gate in (0.0, 1.0):
        bucket = Bucket(backend, [0], [torch.ones(3)], [torch.ones(3)], [], [], Options(0.1, adapt=False))
        backend.update(bucket, Norms(), torch.tensor(gate))
        assert asked == [True]


# ---------------------------------------------------------------- dispatch
SERVED: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
    "contiguous": (torch.ones(3, 4), torch.ones(3, 4), None),
    "parameter": (torch.nn.Parameter(torch.ones(3)), torch.ones(3), torch.ones(3)),
    "0-dim": (torch.ones(()), torch.ones(()), torch.ones(())),
    "empty": (torch.ones(3, 0), torch.ones(3, 0), None),
    "transposed": (torch.ones(3, 4).t(), torch.ones(3, 4).t(), torch.ones(3, 4).t()),
    "channels_last": 3 * (torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),),
    "unaligned": (torch.ones(9)[1:], torch.ones(8), None),
    "bfloat16": 3 * (torch.ones(3, dtype=torch.bfloat16),),
    "float32 gradient": (torch.ones(3, dtype=torch.float16), torch.ones(3), torch.ones(3, dtype=torch.float16)),
    "strides of size 1": (torch.ones(3, 1), torch.ones(3).as_strided((3, 1), (1, 7)), None),
    "strides of size 1, not contiguous": (
        torch.ones(4, 3, 1).transpose(0, 1),
        torch.ones(12).as_strided((3, 4, 1), (1, 3, 5)),
        None,
    ),
}
NOT_SERVED: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {
    "strided": (torch.ones(6)[::2], torch.ones(6)[::2], None),
    "expanded": (torch.ones(1).expand(3), torch.ones(1).expand(3), None),
    "gradient of other strides": (torch.ones(3, 4), torch.ones(4, 3).t(), None),
    "buffer of other strides": (torch.ones(3, 4).t(), torch.ones(3, 4).t(), torch.ones(4, 3)),
    # dense, and in another order than the other two
    "parameter of other strides": (
        torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        torch.ones(2, 3, 4, 4),
        torch.ones(2, 3, 4, 4),
    ),
    "float64": (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), None),
    "complex": (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64), None),
    "float64 gradient": (torch.ones(3), torch.ones(3, dtype=torch.float64), None),
    "buffer of another dtype": (torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.float16)),
    "negated gradient": (torch.ones(3), torch._neg_view(torch.ones(3)), None),
    "subclass": (torch.ones(3), torch.ones(3).as_subclass(type("Other", (Tensor,), {})), None),
    "gradient elsewhere": (torch.ones(3), torch.ones(3, device="meta"), None),
    "buffer elsewhere": (torch.ones(3), torch.ones(3), torch.ones(3, device="meta")),
    # would be read past their end
    "smaller gradient": (torch.ones(4), torch.ones(3), None),
    "smaller buffer": (torch.ones(4), torch.ones(4), torch.ones(3)),
}


def serves(param: Tensor, grad: Tensor, buffer: Tensor | None) -> bool:
    return ON_CPU.serves([param], [grad], [] if buffer is None else [buffer])


def test_serves() -> None:
    assert [name for name, tensors in SERVED.items() if not serves(*tensors)] == []


def test_does_not_serve() -> None:
    assert [name for name, tensors in NOT_SERVED.items() if serves(*tensors)] == []
    assert [name for name, tensors in SERVED.items() if triton.TRITON.serves([tensors[0]], [tensors[1]], [])] == []


def test_one_unsupported_tensor_refuses_the_list() -> None:
    for other in NOT_SERVED.values():
        for places in ((0, 1), (1, 0)):
            lists = [[torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)], [torch.ones(3), torch.ones(3)]]
            assert ON_CPU.serves(*lists)
            for each, tensor in zip(lists, other, strict=True):
                each[places[0]] = other[0] if tensor is None else tensor
            assert not ON_CPU.serves(*lists)


def refusal(*params: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        triton.check_fused(iter(params), "here")
    return str(error.value)


class Driver:
    asked, error = 0, None

    def get_current_device(self) -> int:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return 0


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    installed, find = True, importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != "triton" else installed or None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    way_out = "; leave fused=None or use foreach=True"
    on_cpu, ours = torch.ones(3, dtype=torch.float64), "here: fused=True on CUDA needs "
    assert refusal(on_cpu, torch.ones(3, device="meta")) == (
        "here: fused=True is for CPU and CUDA tensors, got one on meta at position 1" + way_out
    )
    with fake_cuda():
        one = torch.ones(3, device="cuda")
        monkeypatch.setattr(triton, "PLAIN", {FakeTensor})
        driver = Driver()
        monkeypatch.setattr(triton, "_kernels", lambda: SimpleNamespace(driver=SimpleNamespace(active=driver)))
        triton.check_fused([on_cpu, one, one, "no tensor"], "here")
        assert driver.asked == 1
        driver.error = RuntimeError("no {compiler}")
        assert (
            refusal(one) == f"{ours}Triton, which cannot launch kernels here (RuntimeError: no {{compiler}}){way_out}"
        )
        driver.error = None
        for dtype in (torch.float64, torch.complex64):
            assert f"float32, bfloat16 or float16 tensors, got {dtype} at position 2" in refusal(
                one, one, one.to(dtype)
            )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
        assert refusal(one) == f"{ours}compute capability 8.0, cuda:0 has 7.5{way_out}"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert "ROCm" in refusal(one)
        installed = False
        assert "pip install triton" in refusal(one)
        monkeypatch.setattr(triton, "PLAIN", {Tensor})
        assert "plain tensors, got FakeTensor at position 1" in refusal(on_cpu, one)


def test_check_fused_finds_why_triton_cannot_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    reason = triton._refusal(torch.device("cuda:0"))
    if torch.cuda.is_available():
        assert reason is None
    else:
        assert "0 active drivers" in (reason or "")


Lists = tuple[list[Tensor], list[Tensor], list[Tensor | None]]


def sorted_by_name(lists: Lists, options: Options, found_inf: Tensor | None = None, memory: Any = None) -> list[Any]:
    return [
        (bucket.backend.name, bucket.indices)
        for bucket in backends.split(Group(*lists, [], options, memory=memory), None, found_inf)
    ]


@pytest.fixture
def plain_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch looks at metadata only, so fake CUDA tensors show it."""
    monkeypatch.setattr(layouts, "PLAIN", {FakeTensor})


@pytest.mark.usefixtures("plain_fakes")
def test_fused_on_cuda_runs_these_kernels_and_foreach_for_the_rest() -> None:
    options = Options(1.0, momentum=0.9, weight_decay=0.1, fused=True)
    with fake_cuda():
        dense, strided = torch.ones(8, device="cuda"), torch.empty_strided((8, 2), (4, 2), device="cuda")
        conjugate = torch.ones(8, dtype=torch.complex64, device="cuda").conj()
        lists: Lists = ([dense, strided, dense.double(), conjugate],) * 2 + ([None] * 4,)
        names = ["fused (Triton)", "foreach", "foreach", "single"]
        assert sorted_by_name(lists, options) == [(name, [i]) for i, name in enumerate(names)]


@pytest.mark.usefixtures("plain_fakes")
def test_these_kernels_never_take_the_cpu_tensors_of_a_group() -> None:
    options = Options(1.0, momentum=0.9, weight_decay=0.1, fused=True)
    with fake_cuda():
        for dtype, of_cpu in ((torch.float32, {"fused"}), (torch.bfloat16, {"foreach", "single"})):
            tensors = [torch.ones(8, device=device, dtype=dtype) for device in ("cpu", "cuda", "cpu")]
            for order in ((0, 1), (1, 2)):
                given = [tensors[i] for i in order]
                found = {
                    given[i].device.type: name for name, (i,) in sorted_by_name((given, given, [None] * 2), options)
                }
                assert found["cuda"] == "fused (Triton)" and found["cpu"] in of_cpu


@pytest.mark.usefixtures("plain_fakes")
@pytest.mark.parametrize(
    ("chosen", "torchs"),
    [
        ({"adapt": False}, True),
        ({"adapt": True}, False),
        ({"adapt": False, "lr_in_momentum": True}, False),
        ({"adapt": False, "skip_nonfinite": True}, False),
    ],
    ids=str,
)
def test_groups_that_are_not_adapted_take_torch_sgd_where_it_can(chosen: dict[str, Any], torchs: bool) -> None:
    options = Options(0.1, **chosen, fused=True)
    with fake_cuda():
        (param, grad, found_inf) = (torch.ones(3, device="cuda") for _ in range(3))
        ours = [(triton.TRITON.name, [0])]
        assert sorted_by_name(([param], [grad], []), options) == ([("fused", [0])] if torchs else ours)
        # it has no gate, and takes no gradient of another dtype
        assert sorted_by_name(([param], [grad], []), options, found_inf) == ours
        assert sorted_by_name(([param], [grad.half()], []), options) == ours


@pytest.mark.usefixtures("plain_fakes")
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_list_on_cuda_is_one_bucket_and_is_sorted_until_it_is_known(
    momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorts: list[int] = []
    sort = backends._sort
    monkeypatch.setattr(backends, "_sort", lambda *args: sorts.append(1) or sort(*args))
    monkeypatch.setattr(backends, "preferred", lambda *_: pytest.fail("sorted one by one"))
    monkeypatch.setattr(backends, "operations_are_seen", lambda: False)  # the fakes stand for real memory
    options, memory = Options(1.0, momentum=momentum, weight_decay=0.1, fused=True), Memory()
    with fake_cuda():
        params, grads, made = ([torch.ones(n, device="cuda") for n in (8, 3)] for _ in range(3))
        buffers: list[Tensor | None] = [None, None]
        for step in range(5):
            (bucket,) = backends.split(Group(params, grads, buffers, [], options, memory=memory))
            assert bucket.backend is triton.TRITON and bucket.indices == [0, 1] and bucket.memory is memory
            expected = [params, grads, buffers if momentum else []]
            for given, taken in zip(expected, [bucket.params, bucket.grads, bucket.momentum_buffers], strict=True):
                assert all(a is b for a, b in zip(given, taken, strict=True)), step
            buffers[:] = made
    assert len(sorts) <= 3


@pytest.mark.usefixtures("plain_fakes")
def test_tensors_of_two_gpus_two_dtypes_or_two_steps_are_two_buckets() -> None:
    options = Options(1.0, momentum=0.9, weight_decay=0.1, fused=True)
    name, bfloat16 = triton.TRITON.name, torch.bfloat16
    with fake_cuda():
        one = torch.ones(8, device="cuda:0")
        elsewhere, half = torch.ones(8, device="cuda:1"), torch.ones(8, device="cuda:0", dtype=bfloat16)
        other = torch.ones(8, device="cuda:0")
        for param, grad, buffer in (
            (elsewhere, elsewhere, elsewhere),
            (half, half, half),
            (other, half, other),
            (other, other, None),
        ):
            lists: Lists = ([one, param], [one, grad], [one, buffer])
            for memory in (None, Memory()):
                for _ in range(3):
                    assert sorted_by_name(lists, options, memory=memory) == [(name, [0]), (name, [1])]


def test_fused_is_refused_at_construction_on_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda():
        param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    monkeypatch.setattr(triton, "PLAIN", {type(param)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for params in ([param], [("named", param)] if NAMED_PARAMETERS else [param]):
        with pytest.raises(RuntimeError, match=r"param group 0: fused=True on CUDA needs Triton.*use foreach=True"):
            LARS(params, lr=1.0, fused=True)
    LARS([param], lr=1.0)

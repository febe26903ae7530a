"""The fused CUDA step without a GPU: its kernels under Triton's interpreter and through its compiler; tables, dispatch."""

import importlib.util
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cases import OPTIONS
from fastlars import LARS, dispatch, functional, fused_cuda
from fastlars.compat import NAMED_PARAMETERS
from fastlars.dispatch import Part
from fastlars.options import Options
from recording import fake_cuda

HERE = Path(__file__).parent


def python(*arguments: str, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, *arguments], cwd=HERE.parent, env={**os.environ, **environment}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"


def part_of(params: list[Tensor], momentum: bool = True) -> Part:
    buffers: list[Tensor | None] = [torch.zeros_like(p) for p in params] if momentum else []
    grads = [torch.ones_like(p) for p in params]
    return Part(
        implementation="fused", indices=list(range(len(params))), params=params, grads=grads, momentum_buffers=buffers
    )


# ---------------------------------------------------------------- kernels
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(which: str) -> None:
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7) and int(numpy.__version__.split(".")[0]) >= 2:
        pytest.skip("the interpreter of Triton 3.0 reads nonsense with NumPy 2, that of 3.6 fails with NumPy 2.4")
    # and it warns with NumPy 1.25 and later
    ignore = "ignore:Conversion of an array:DeprecationWarning"
    tests = str(HERE / "fused_cuda_interpreted.py")
    options = ["-q", "-p", "no:cacheprovider", "-W", ignore, "-m", which]
    python("-m", "pytest", *options, tests, TRITON_INTERPRET="1")


class Compiled:
    """The kernels that the launches of a step compile, without a GPU to run them on."""

    def __init__(self) -> None:
        self.kernels: dict[str, list[Any]] = {}

    def distinct(self, name: str) -> list[Any]:
        return list({id(kernel): kernel for kernel in self.kernels[name]}.values())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Compiled]:
    """compiler(arch): launches from now on only compile, for that architecture."""
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
                return arch  # a cache of kernels for each

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


def step(part: Part, options: Options, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> None:
    (measured,) = fused_cuda.measure([(part, options)], grad_scale, fused_cuda.Tables())
    fused_cuda.update(measured, found_inf)


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, which is where spilt registers go."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    listing = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing.stdout)}


COMPILED = ["momentum", "everything", "base", "everything_but_joint"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", fused_cuda.DTYPES, ids=str)
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_to_wide_loads_and_no_spills(
    arch: int, dtype: torch.dtype, compiler: Callable[[int], Compiled], tmp_path: Path
) -> None:
    compiled = compiler(arch)
    scalar = torch.tensor([1.0])
    for name in COMPILED:
        options = Options(**OPTIONS[name])
        device_side = name.startswith("everything")
        with torch.no_grad():
            part = part_of([torch.ones(5, dtype=dtype)], options.momentum != 0)
            options = options._replace(lr=scalar if device_side else options.lr)
            step(part, options, *((scalar, scalar) if device_side else (None, None)))
    # a thread has 8 elements of each tensor: in the aligned branch that many bytes are loaded 16 at a time
    wide = 8 * dtype.itemsize // 16
    tensors = {"partial_sums": [(2, 0)] * 4, "update": [(3, 2), (3, 2), (2, 1), (3, 2)], "coefficients": [(0, 0)] * 4}
    for name, expected in tensors.items():
        for kernel, (loaded, stored) in zip(compiled.kernels[name], expected, strict=True):
            used = resources(kernel, tmp_path)
            assert used["STACK"] == used["LOCAL"] == 0, (name, used)
            assert 0 < used["REG"] <= 64, (name, used)
            ptx = kernel.asm["ptx"]
            assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == loaded * wide, name
            assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) == stored * wide, name


def test_numbers_do_not_recompile(compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    options = Options(**OPTIONS["dampening"])
    params = [torch.ones(n) for n in (5, 16, 1)]
    with torch.no_grad():
        for lr in (0.5, 1, 0.0, 16):
            for changed in ({}, {"momentum": 0.5}, {"weight_decay": 1}, {"eps": 1.0}, {"dampening": 0.5}):
                step(part_of(params), options._replace(lr=lr, **changed))
                step(part_of([torch.ones(5000)[1:]]), options._replace(lr=lr, **changed))
        assert [len(compiled.distinct(name)) for name in ("partial_sums", "coefficients", "update")] == [1, 1, 1]
        values = torch.ones(3)
        for lr in (values[0], values[1:2], torch.tensor(0.0)):
            step(part_of(params), options._replace(lr=lr))
    assert [len(compiled.distinct(name)) for name in ("partial_sums", "coefficients", "update")] == [1, 2, 2]


@pytest.mark.parametrize("kind", [numpy.float64, numpy.float32])
def test_options_may_be_numpy_scalars(kind: type, compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
    for name in ("momentum", "everything"):
        options = Options(**OPTIONS[name])
        numbers = {key: kind(getattr(options, key)) for key in names}
        with torch.no_grad():
            # these first: Triton finds what it compiled for True by np.True_ too
            step(part_of([torch.ones(5)]), options._replace(**numbers))
            step(part_of([torch.ones(5)]), options)
    assert [len(compiled.distinct(name)) for name in ("partial_sums", "coefficients", "update")] == [2, 2, 2]


def test_sums_have_the_same_bits_with_a_scale_and_without(compiler: Callable[[int], Compiled]) -> None:
    """No product is fused with a sum: of the two in scale * g + weight_decay * w, the scale would decide which."""
    compiled = compiler(90)
    options = Options(**OPTIONS["momentum-joint"], skip_nonfinite=True)
    with torch.no_grad():
        step(part_of([torch.ones(5)]), options)
        step(part_of([torch.ones(5)]), options, None, torch.ones(1))
    for kernel in compiled.kernels["partial_sums"]:
        ptx = kernel.asm["ptx"]
        assert "mul.f32" in ptx or "mul.rn.f32" in ptx or "mul.f32x2" in ptx
        assert "fma" not in ptx
    divided = [kernel.asm["ptx"] for kernel in compiled.kernels["partial_sums"][1:]]
    assert all(re.findall(r"\bdiv\.\w+", ptx) == ["div.rn"] for ptx in divided)


def test_three_launches_for_any_number_of_tensors(compiler: Callable[[int], Compiled]) -> None:
    compiled = compiler(90)
    with torch.no_grad():
        step(part_of([torch.ones(n) for n in range(100)]), Options(**OPTIONS["everything"]), torch.zeros(1))
    assert {name: len(kernels) for name, kernels in compiled.kernels.items()} == dict.fromkeys(
        ("partial_sums", "coefficients", "update"), 1
    )


# ---------------------------------------------------------------- tables
CPU = torch.device("cpu")


def test_a_table_says_where_everything_is() -> None:
    part = part_of([torch.ones(2 * fused_cuda.CHUNK + 1), torch.ones(0), torch.ones(3)])
    table = fused_cuda.Tables().table(part)
    rows = table.rows.view(3, 6).tolist()
    for i, tensors in enumerate(zip(part.params, part.grads, part.momentum_buffers, strict=True)):
        assert rows[i][:4] == [*(t.data_ptr() for t in tensors if t is not None), tensors[0].numel()]
    assert [row[4:] for row in rows] == [[0, 3], [3, 4], [4, 5]]
    assert table.chunk_tensor.tolist() == [0, 0, 0, 1, 2]
    without = fused_cuda.Tables().table(part_of(part.params, momentum=False))
    assert without.rows.view(3, 6)[:, 2].tolist() == [0, 0, 0]


def test_a_table_is_found_again_by_addresses_and_sizes() -> None:
    tables = fused_cuda.Tables()
    part = part_of([torch.ones(4), torch.ones(3)])
    first = tables.table(part)
    assert tables.table(part) is first
    views = part._replace(params=[p.view(-1) for p in part.params])
    assert tables.table(views) is first, "other objects, the same memory"
    moved = part._replace(grads=[g.clone() for g in part.grads])
    second = tables.table(moved)
    assert second is not first and second.rows.view(2, 6)[:, 1].tolist() == [g.data_ptr() for g in moved.grads]
    assert tables.table(part) is first, "an old table is never rewritten"
    shorter = part._replace(params=[p[:2] for p in part.params])
    assert tables.table(shorter).rows.view(2, 6)[:, 3].tolist() == [2, 2], "the same addresses, other sizes"
    other_stream = pytest.MonkeyPatch()
    with other_stream.context() as patch:
        patch.setattr(fused_cuda, "_stream", lambda _device: 1)
        assert tables.table(part) is not first


def test_old_tables_are_dropped_and_keep_no_tensor_alive() -> None:
    tables = fused_cuda.Tables()
    kept = part_of([torch.ones(4)])
    gone = part_of([torch.ones(5)])
    param = weakref.ref(gone.params[0])
    tables.table(gone)
    del gone
    assert param() is None
    grads = []
    for _ in range(3 * fused_cuda.KEPT_STEPS):
        tables.begin()
        tables.table(kept)
        grads.append(torch.ones(6))  # kept, so that addresses differ
        tables.table(Part("fused", [0], [grads[0]], [grads[-1]], []))
    assert len(tables._tables) <= fused_cuda.KEPT_STEPS + 2
    assert tables._spares.keys() == {(CPU, (4,)), (CPU, (6,))}, "by sizes, whatever the addresses; those of 5 are gone"
    assert tables.table(kept) in tables._tables.values()


def test_capture_leaves_eager_tables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = fused_cuda.Tables()
    part = part_of([torch.ones(4), torch.ones(3), torch.ones(3)])  # an odd number of chunks
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _device: True)
    with pytest.raises(RuntimeError, match="needs an eager step"):
        tables.table(part)
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _device: False)
    eager = tables.table(part)
    flag = tables.flag(torch.device("cpu"))
    assert tables.flag(torch.device("cpu")) is flag
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _device: True)
    assert tables.flag(torch.device("cpu")) is not flag
    moved = [part._replace(grads=[g.clone() for g in part.grads]) for _ in range(fused_cuda.CAPTURES)]
    captured = [tables.table(each) for each in moved]
    for table, each in zip(captured, moved, strict=True):
        assert table.rows.view(3, 6)[:, 1].tolist() == [g.data_ptr() for g in each.grads]
        assert table.chunk_tensor.tolist() == [0, 1, 2]
        assert table not in tables._tables.values(), "its copy has not run before the graph has"
        assert table.sums.data_ptr() != eager.sums.data_ptr()
    # what the graphs copy at every replay stays
    staged = {host.data_ptr() for host in tables._captured}
    assert len(staged) == fused_cuda.CAPTURES
    with pytest.raises(RuntimeError, match="needs an eager step"):
        tables.table(part)
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _device: False)
    assert tables.table(part) is eager
    monkeypatch.setattr(fused_cuda, "_is_capturing", lambda _device: True)
    assert tables.table(moved[0]).rows.data_ptr() not in staged, "an eager step makes room for more"
    assert {host.data_ptr() for host in tables._captured} > staged


def test_threads_share_tables_and_no_flag() -> None:
    """Those of the functional form: a thread's step must not reset the flag that another has raised."""
    tables = fused_cuda.Tables()
    flags = [tables.flag(CPU)]
    errors: list[Exception] = []
    together = threading.Barrier(4)

    def steps() -> None:
        try:
            flags.append(tables.flag(CPU))
            for _ in range(300):
                tables.begin()
                tables.table(part_of([torch.ones(4)]))
            together.wait()  # the number of a thread that ended may be given again
        except Exception as error:  # noqa: BLE001  told below
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=steps) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert len({flag.data_ptr() for flag in flags}) == 5


def test_a_tensor_lr_is_read_on_the_host_only_if_it_is_there_and_the_parameters_are_not() -> None:
    lr, elsewhere = torch.tensor(0.5), torch.device("cuda")
    assert fused_cuda._lr(lr, elsewhere) == fused_cuda._lr(0.5, elsewhere) == (None, 0.5)
    on_device, _ = fused_cuda._lr(lr, lr.device)
    assert on_device is not None and on_device.data_ptr() == lr.data_ptr()


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        ({"adapt": False}, False),
        ({"adapt": True}, True),
        ({"adapt": False, "lr_in_momentum": True}, True),
        ({"adapt": False, "skip_nonfinite": True}, True),
    ],
    ids=str,
)
def test_groups_that_are_not_adapted_take_torch_sgd_where_it_can(options: dict[str, Any], ours: bool) -> None:
    known, one = Options(0.1, **options), torch.ones(())
    part = Part("triton", [0], [torch.ones(3)], [torch.ones(3)], [])
    assert functional._is_triton(part, known, None, None) == ours
    # it has no gate, writes the gradients that it unscales, and takes none of another dtype
    assert functional._is_triton(part, known, one, None) and functional._is_triton(part, known, None, one)
    assert functional._is_triton(part._replace(grads=[torch.ones(3).half()]), known, None, None)
    assert not functional._is_triton(part._replace(implementation="foreach"), known, one, one)


def test_torch_sgd_is_fused_where_the_step_is_and_leaves_versions_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(functional, "sgd", lambda *_, **options: asked.append(options["fused"]))
    for implementation, fused in (("triton", True), ("fused", True), ("foreach", False), ("single", False)):
        param, buffer = torch.ones(3), torch.zeros(3)
        for buffers in ([buffer], [None]):
            part = Part(implementation, [0], [param], [torch.ones(3)], buffers)
            functional.update(part, None, Options(0.1, 0.9, adapt=False), None)
        assert asked == [fused] * 2
        asked.clear()
        assert (param._version, buffer._version) == ((2, 1) if fused else (0, 0))
    # on the CPU a flag is looked at before
    for found_inf in (0.0, 1.0):
        part = Part("fused", [0], [torch.ones(3)], [torch.ones(3)], [])
        functional.update(part, None, Options(0.1, adapt=False), torch.tensor(found_inf))
        assert asked == [True]


# ---------------------------------------------------------------- dispatch
def like(param: Tensor) -> Tensor:
    return torch.zeros_like(param)


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
    "float64": (torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64), None),
    "complex": (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64), None),
    "float64 gradient": (torch.ones(3), torch.ones(3, dtype=torch.float64), None),
    "buffer of another dtype": (torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.float16)),
    "negated gradient": (torch.ones(3), torch._neg_view(torch.ones(3)), None),
    "subclass": (torch.ones(3), torch.ones(3).as_subclass(type("Other", (Tensor,), {})), None),
    "gradient elsewhere": (torch.ones(3), torch.ones(3, device="meta"), None),
    "buffer elsewhere": (torch.ones(3), torch.ones(3), torch.ones(3, device="meta")),
    # would be read beyond their end
    "smaller gradient": (torch.ones(4), torch.ones(3), None),
    "smaller buffer": (torch.ones(4), torch.ones(4), torch.ones(3)),
}


def test_serves() -> None:
    assert [name for name, tensors in SERVED.items() if not fused_cuda.serves(*tensors)] == []


def test_does_not_serve() -> None:
    assert [name for name, tensors in NOT_SERVED.items() if fused_cuda.serves(*tensors)] == []


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.ones(3)]
    installed: Any = object()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: installed)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with monkeypatch.context() as patch:
        patch.setattr(fused_cuda, "_cannot_launch", lambda: None)
        assert fused_cuda.refusal(params) is None
        patch.setattr(fused_cuda, "_cannot_launch", lambda: "RuntimeError: no compiler")
        reason = fused_cuda.refusal(params) or ""
        assert "cannot launch kernels here (RuntimeError: no compiler); mend that, or leave fused=None" in reason
    subclass = type("Quantized", (Tensor,), {})
    for refused, reason in (
        ([*params, torch.ones(3).as_subclass(subclass)], "plain tensors, got Quantized at position 1"),
        ([torch.ones(3, dtype=torch.float64)], "got torch.float64 at position 0"),
        ([torch.ones(3, dtype=torch.complex64)], "got torch.complex64 at position 0"),
    ):
        assert reason in (fused_cuda.refusal(refused) or "") and "use foreach=True" in (
            fused_cuda.refusal(refused) or ""
        )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert "needs compute capability 8.0, cpu has 7.5" in (fused_cuda.refusal(params) or "")
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "ROCm" in (fused_cuda.refusal(params) or "")
    installed = None
    assert "pip install triton" in (fused_cuda.refusal(params) or "")


def test_what_keeps_triton_from_launching_is_found() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        assert fused_cuda._cannot_launch() is None
    else:
        assert "0 active drivers" in (fused_cuda._cannot_launch() or "")


def test_a_list_that_is_served_is_one_part_and_known_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    serves = fused_cuda.serves
    monkeypatch.setattr(fused_cuda, "serves", lambda *args: asked.append(serves(*args)) or asked[-1])
    for dtype, grad_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        lists = [[torch.ones(3, n, dtype=d) for n in (2, 5)] for d in (dtype, grad_dtype, dtype)]
        for number in (2, 3):
            for _ in range(4):
                assert fused_cuda.serves_all(*lists[:number])
            assert len(asked) == 4, "twice for each tensor, then not at all"
            asked.clear()
    for place, other in ((0, NOT_SERVED["float64"]), (1, NOT_SERVED["strided"]), (2, NOT_SERVED["float64"])):
        lists = [[torch.ones(3) for _ in range(2)] for _ in range(3)]
        for _ in range(3):
            assert fused_cuda.serves_all(*lists)
        for each, tensor in zip(lists, other, strict=True):
            each[1] = torch.ones(3) if tensor is None else tensor
        for _ in range(3):
            assert not fused_cuda.serves_all(*lists), place


@pytest.mark.parametrize("place", [0, 1])
def test_tensors_of_two_dtypes_are_two_parts(place: int) -> None:
    lists = [[torch.ones(3) for _ in range(2)] for _ in range(2)]
    assert fused_cuda.serves_all(*lists)
    lists[place][1] = lists[place][1].bfloat16()
    assert all(fused_cuda.serves(param, grad, None) for param, grad in zip(*lists, strict=True))
    assert not fused_cuda.serves_all(*lists)


def test_fused_on_cuda_runs_these_kernels_and_foreach_for_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dispatch looks at metadata only, so that fake CUDA tensors show it."""
    monkeypatch.setattr(fused_cuda, "_PLAIN", frozenset({FakeTensor}))
    options = Options(1.0, momentum=0.9, weight_decay=0.1, fused=True)
    with fake_cuda():
        dense, strided = torch.ones(8, device="cuda"), torch.empty_strided((8, 2), (4, 2), device="cuda")
        conjugate = torch.ones(8, dtype=torch.complex64, device="cuda").conj()
        params = [dense, strided, dense.double(), conjugate]
        parts = dispatch.split(params, params, [None] * 4, options)
        assert {i: part.implementation for part in parts for i in part.indices} == {
            0: "triton",
            1: "foreach",
            2: "foreach",
            3: "single",
        }


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_known_list_on_cuda_is_one_part_of_the_same_tensors(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cuda, "_PLAIN", frozenset({FakeTensor}))
    monkeypatch.setattr(dispatch, "runs_for", lambda *_: pytest.fail("sorted one by one"))
    options = Options(1.0, momentum=momentum, weight_decay=0.1, fused=True)
    with fake_cuda():
        params, grads, made = ([torch.ones(n, device="cuda") for n in (8, 3)] for _ in range(3))
        buffers: list[Tensor | None] = [None, None]
        for step in range(4):
            (part,) = dispatch.split(params, grads, buffers, options)
            assert part.implementation == "triton" and part.indices == [0, 1] and part.plan is None
            expected = [params, grads, buffers if momentum else []]
            for given, taken in zip(expected, [part.params, part.grads, part.momentum_buffers], strict=True):
                assert all(a is b for a, b in zip(given, taken, strict=True)), step
            if step == 1:
                buffers[:] = made


def test_tensors_of_two_gpus_or_at_two_steps_are_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cuda, "_PLAIN", frozenset({FakeTensor}))
    options = Options(1.0, momentum=0.9, weight_decay=0.1, fused=True)
    with fake_cuda():
        for devices, made in ((("cuda:0", "cuda:1"), True), (("cuda:0", "cuda:0"), False)):
            params = [torch.ones(8, device=device) for device in devices]
            buffers = [params[0].clone(), params[1].clone() if made else None]
            for _ in range(3):
                parts = dispatch.split(params, [p.clone() for p in params], buffers, options)
                assert [(part.implementation, part.indices) for part in parts] == [("triton", [0]), ("triton", [1])]


def test_fused_is_refused_at_construction_on_cuda_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_cuda.importlib.util, "find_spec", lambda _name: None)
    with fake_cuda():
        param = torch.nn.Parameter(torch.ones(3, device="cuda"))
    for params in ([param], [("named", param)] if NAMED_PARAMETERS else [param]):
        with pytest.raises(RuntimeError, match=r"param group 0: fused=True on CUDA needs Triton.*use foreach=True"):
            LARS(params, lr=1.0, fused=True)
    LARS([param], lr=1.0)

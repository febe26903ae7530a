"""What a CUDA graph needs of a step, checked without a GPU: no host read, so no branch on a value, and lr in one place.

Fake CUDA tensors have no values, so reading one raises. test_cuda.py captures real graphs.
"""

import ast
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.lr_scheduler import LambdaLR

import fastlars
from cases import OPTIONS
from fastlars import LARS, backends, lars
from fastlars.backends import layouts, triton
from fastlars.buckets import Bucket
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, set_grads
from recording import Recorder, fake_cuda

pytestmark = ignore_nothing_adapted

SCHEDULERS: dict[str, Callable[[LARS], Any]] = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (step + 1)),
    "polynomial": lambda optimizer: fastlars.schedules.warmup_polynomial(optimizer, warmup_steps=2, total_steps=6),
    "cosine": lambda optimizer: fastlars.schedules.warmup_cosine(optimizer, warmup_steps=2, total_steps=6),
}

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
    # there torch's schedulers read a tensor lr on the host between the steps; the steps do the same as elsewhere
    SCHEDULERS = {name: lambda optimizer: _Halving(optimizer.param_groups[0]["lr"]) for name in SCHEDULERS}


# the arguments of `update`; triton_kernels.py cannot be imported without triton
(UPDATE,) = (
    [argument.arg for argument in node.args.args]
    for node in ast.parse(Path(triton.__file__).with_name("triton_kernels.py").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name == "update"
)


class _Halving:
    """A schedule that reads nothing on the host."""

    def __init__(self, lr: Tensor) -> None:
        self.lr = lr

    def step(self) -> None:
        self.lr.mul_(0.5)


class _Kernels:
    """Replaces Triton's kernels and records their arguments."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> dict[Any, Any]:
        launches = self.launches

        class Kernel(dict[Any, Any]):
            def __missing__(self, _grid: Any) -> Callable[..., None]:
                return lambda *arguments, **_constants: launches.append((name, arguments))

        return Kernel()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> _Kernels:
    """The fused step for fake tensors, which have no address and whose device cannot be entered."""
    kernels = _Kernels()

    def table(_tables: triton.Tables, bucket: Bucket, _now: int) -> Any:
        n, device = len(bucket.params), bucket.params[0].device
        rows, sums = torch.empty(6 * n, dtype=torch.int64, device=device), torch.empty(n, 3, device=device)
        return triton._Table(rows, rows, sums, torch.empty(3, n, device=device))

    monkeypatch.setattr(triton, "_kernels", lambda: kernels)
    monkeypatch.setattr(triton.Tables, "table", table)
    monkeypatch.setattr(layouts, "PLAIN", {FakeTensor, torch.nn.Parameter})
    monkeypatch.setattr(fastlars.optimizer, "check_fused", lambda _params, _where: None)
    monkeypatch.setattr(torch.cuda, "device_of", lambda _tensor: contextlib.nullcontext())
    return kernels


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("momentum", "lambda"),
        ("nesterov-joint", "polynomial"),
        ("clip-paper", "cosine"),
        ("unadapted", "lambda"),
        ("everything", "polynomial"),
        ("dampening", "cosine"),
    ],
)
def test_scheduled_steps_read_nothing(name: str, implementation: str, scheduler: str, kernels: _Kernels) -> None:
    with fake_cuda():
        params = [torch.nn.Parameter(torch.ones(5, 3, device="cuda")) for _ in range(3)]
        set_grads(params, [torch.ones_like(param) for param in params])
        lr = torch.full((), 0.5, device="cuda")
        optimizer = LARS(params, **{**OPTIONS[name], "lr": lr}, **IMPLEMENTATIONS[implementation])
        schedule = SCHEDULERS[scheduler](optimizer)
        for _ in range(3):  # state is created, and the list becomes known
            optimizer.step()
            schedule.step()
        seen = []
        for _ in range(3):
            launched = len(kernels.launches)
            with Recorder() as recorder:
                optimizer.step()
            assert not recorder.reads and not recorder.arrivals
            seen.append((recorder.names, [kernel for kernel, _ in kernels.launches[launched:]]))
            schedule.step()
        # a graph reads lr at the address it had during capture
        assert optimizer.param_groups[0]["lr"] is lr
    assert seen == [seen[0]] * 3
    if implementation == "fused":
        measured = ["partial_sums", "norms"] if name != "unadapted" else []  # nothing to measure
        assert seen[0][1] == [*measured, "update"]
        for kernel, arguments in kernels.launches:
            given = [argument for argument in arguments if isinstance(argument, Tensor) and argument.dim() == 0]
            assert kernel != "update" or given, "lr is read on the device"
    else:
        assert seen[0][0] and not kernels.launches


@pytest.mark.parametrize("implementation", ["single", "foreach"])
@pytest.mark.parametrize("name", ["momentum", "momentum-unadapted", "dampening"])
def test_a_captured_step_makes_no_state(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would create it, and every replay would reset it to zeros."""
    options = {**OPTIONS[name], **IMPLEMENTATIONS[implementation]}
    capturing = True
    for module in (backends, triton):
        monkeypatch.setattr(module, "is_capturing", lambda: capturing)
    with fake_cuda():
        params = [torch.nn.Parameter(torch.ones(5, 3, device=device)) for device in ("cpu", "cuda", "cuda")]
        optimizer = LARS([{"params": params[:1]}, {"params": params[1:]}], **options)
        set_grads(params, [torch.ones_like(params[0]), None, torch.ones_like(params[2])])
        refused = pytest.raises(
            RuntimeError, match=r"group 1: .*needs an eager step.*tensor 0 of those with a gradient"
        )
        with refused:
            optimizer.step()
        assert not optimizer.state
        capturing = False
        optimizer.step()
        capturing = True
        optimizer.step()
        optimizer.state[params[2]].clear()  # as after loading from an optimizer without momentum
        with refused:
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        params[1].grad = torch.ones_like(params[1])
        with refused:
            optimizer.step()
        assert params[1] not in optimizer.state

        without = {**options, "momentum": 0.0, "dampening": 0.0}
        LARS(params, **without).step()  # no state has to be created
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        with torch.no_grad():
            lars(params, grads, [], **without)
            buffers: list[Tensor | None] = [None, torch.zeros_like(params[1]), torch.zeros_like(params[2])]
            lars(params, grads, buffers, **options)
            with pytest.raises(RuntimeError, match=r"lars: capturing.*tensor 1 of"):
                lars(params, grads, [None, None, None], **options)


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:0"), ("cuda:0", "cuda:1")], ids=str)
def test_one_gate_on_the_device_stops_all_that_ask_for_it(devices: tuple[str, str], kernels: _Kernels) -> None:
    with fake_cuda():
        groups = [{"params": [torch.nn.Parameter(torch.ones(3, device=device))]} for device in devices]
        groups.append({"params": [torch.nn.Parameter(torch.ones(3, device="cuda:0"))], "skip_nonfinite": False})
        for group in groups:
            set_grads(group["params"], [torch.ones(3, device=group["params"][0].device)])
        optimizer = LARS(groups, **OPTIONS["skip_nonfinite"], fused=True)
        with Recorder() as recorder:
            optimizer.step()
        assert not recorder.reads and not recorder.arrivals
        gates = [arguments[UPDATE.index("gate_ptr")] for kernel, arguments in kernels.launches if kernel == "update"]
        assert [gate.device for gate in gates[:2]] == [torch.device(device) for device in devices]
        assert all(gate.dim() == 0 and gate.dtype == torch.uint8 for gate in gates[:2]) and gates[2] is None

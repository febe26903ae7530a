"""A step writes only parameters and momentum buffers: no gradient, no host read, no large temporary."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from cases import BASE, OPTIONS, PAIRWISE, Options, make_grads, make_params, pairwise
from fastlars import LARS, lars, norms
from fastlars.backends import staging
from harness import (
    IMPLEMENTATIONS,
    buffers_of,
    ignore_nothing_adapted,
    implementations,
    loop_over,
    option_sets,
    pairs,
    set_grads,
)
from recording import Recorder, fake_cuda

pytestmark = ignore_nothing_adapted
# the fused steps have their own tests: that on CPU reads and stacks CPU tensors, that on CUDA cannot launch on fake ones
NOT_FUSED = ("single", "foreach")
not_fused = pytest.mark.parametrize("implementation", [IMPLEMENTATIONS[name] for name in NOT_FUSED], ids=NOT_FUSED)
DTYPES = (torch.float32, torch.bfloat16, torch.complex64)
# one path each: in place, torch's SGD, on copies, torch's SGD on copies
ROUTES: dict[str, Options] = {
    "adapted": OPTIONS["momentum"],
    "unadapted": OPTIONS["momentum-unadapted"],
    "skip_nonfinite": {**OPTIONS["momentum"], "skip_nonfinite": True},
    "skip_nonfinite-unadapted": {**OPTIONS["momentum-unadapted"], "skip_nonfinite": True},
}


# ---------------------------------------------------------------- gradients
@implementations
@option_sets
def test_gradients_are_never_written(name: str, implementation: Options) -> None:
    for dtype in DTYPES:
        params = make_params(dtype)
        optimizer = LARS(params, **OPTIONS[name], **implementation)
        for step in range(2):  # torch's foreach Nesterov writes them from the first step on
            grads = make_grads("dense", params, step)
            set_grads(params, grads)
            before = [(grad._version, grad.clone()) for grad in grads]
            optimizer.step()
            for param, grad, (version, values) in zip(params, grads, before, strict=True):
                assert param.grad is grad
                assert grad._version == version and torch.equal(grad, values)


# ---------------------------------------------------------------- versions
@implementations
@loop_over("dtype", DTYPES)
@pytest.mark.parametrize("route", ROUTES)
def test_versions_increase(route: str, dtype: torch.dtype, implementation: Options) -> None:
    params = make_params(dtype)
    optimizer = LARS(params, **ROUTES[route], **implementation)
    for step in range(2):
        set_grads(params, make_grads("dense", params, step))
        written = [t for t in (*params, *buffers_of(optimizer)) if t is not None and t.numel() > 0]
        versions = [tensor._version for tensor in written]
        optimizer.step()
        assert all(tensor._version > old for tensor, old in zip(written, versions, strict=True))


@implementations
@pytest.mark.parametrize("route", ROUTES)
def test_a_stale_backward_raises(route: str, implementation: Options) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    loss = param.square().sum()
    param.grad = torch.ones(3)
    LARS([param], **ROUTES[route], **implementation).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- host reads
def cuda_groups() -> list[dict[str, Any]]:
    groups = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.complex64):
        params = [torch.nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda")) for shape in ((3, 5),)]
        set_grads(params, [torch.empty_like(param) for param in params])
        groups.append({"params": params})
    return groups


LRS = {
    "float": lambda lr: lr,
    "cuda": lambda lr: torch.full((1,), lr, device="cuda"),
    # this read is allowed, because the tensor is on the CPU
    "cpu": torch.tensor,
}


@pytest.mark.parametrize("read", [Tensor.item, Tensor.cpu, lambda x: bool((x > 0).any())], ids=["item", "cpu", "bool"])
def test_a_host_read_would_be_seen(read: Any) -> None:
    with fake_cuda(), Recorder() as recorder:
        value = torch.ones((), device="cuda")
        with contextlib.suppress(DataDependentOutputException):
            read(value)
    assert recorder.reads or recorder.arrivals


@pairs("name lr implementation", PAIRWISE, LRS, NOT_FUSED)
def test_no_host_read(name: str, lr: str, implementation: str) -> None:
    with fake_cuda():
        options = {**OPTIONS[name], "lr": LRS[lr](OPTIONS[name]["lr"])}
        optimizer = LARS(cuda_groups(), **options, **IMPLEMENTATIONS[implementation])
        with Recorder() as recorder:
            for _ in range(2):
                optimizer.step()
    assert not recorder.reads and not recorder.arrivals
    assert all(recorder.departures)
    assert recorder.names


@not_fused
@pytest.mark.parametrize("name", ["momentum", "momentum-joint"])
def test_foreach_is_one_operation_over_the_list(name: str, implementation: Options) -> None:
    """For norms, updates and the copies of half types. Single-tensor uses none of these operations."""
    with fake_cuda():
        params = [torch.nn.Parameter(torch.empty(3, 5, dtype=torch.bfloat16, device="cuda")) for _ in range(3)]
        set_grads(params, [torch.empty_like(param) for param in params])
        optimizer = LARS(params, **OPTIONS[name], **implementation)
        with Recorder() as recorder:
            optimizer.step()
    names = {"_foreach_norm", "_foreach_copy_", "_foreach_addcmul_", "_foreach_add_"}
    assert recorder.names & names == (names if implementation["foreach"] else set())
    names = {"linalg_vector_norm", "addcmul_"}
    assert recorder.names & names == (set() if implementation["foreach"] else names)


OPERATORS = {
    # options, dtype -> dispatched operators at most, of which two or three only prepare a number
    "float32": ({}, torch.float32, 24),
    "tensor lr": ({"lr": torch.tensor(0.1)}, torch.float32, 27),
    "joint": ({"trust_denominator": "joint"}, torch.float32, 24),
    "skip_nonfinite": ({"skip_nonfinite": True}, torch.float32, 35),
    "bfloat16": ({}, torch.bfloat16, 30),
    "bfloat16, joint, skip_nonfinite": ({"trust_denominator": "joint", "skip_nonfinite": True}, torch.bfloat16, 45),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_of_a_foreach_step_do_not_grow_with_the_number_of_tensors(name: str) -> None:
    """As dispatched from Python, on the device type without data; what each does inside, and allocations, are not counted."""
    options, dtype, limit = OPERATORS[name]
    counts = []
    for n in (5, 40):
        params = [torch.nn.Parameter(torch.empty(3, 5, dtype=dtype, device="meta")) for _ in range(n)]
        set_grads(params, [torch.empty_like(param) for param in params])
        optimizer = LARS(params, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, **options}, foreach=True)
        for _ in range(3):
            optimizer.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
        outer = [
            each.name for each in profile.events() if each.cpu_parent is None or "aten" not in each.cpu_parent.name
        ]
        counts.append(len([each for each in outer if each.startswith("aten::") and "::empty" not in each]))
    assert counts[0] == counts[1] <= limit


class Factors(TorchDispatchMode):
    """Records the arguments of every `_foreach_addcmul_`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._foreach_addcmul_:
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


@loop_over(
    "name lr dtype",
    pairwise(["momentum", "nesterov-joint", "base", "everything"], LRS, [torch.float32, torch.float64, torch.bfloat16]),
)
def test_foreach_gives_cuda_what_it_can_step_in_few_launches(name: str, lr: str, dtype: torch.dtype) -> None:
    """From torch 2.11 on (pull request 172731): a first factor of 0-dim tensors with the dtype and device of the others."""
    with fake_cuda():
        params = [torch.nn.Parameter(torch.empty(3, n, dtype=dtype, device="cuda")) for n in (1, 5)]
        set_grads(params, [torch.empty_like(param) for param in params])
        options = {**OPTIONS[name], "lr": LRS[lr](0.5), "skip_nonfinite": False}
        optimizer = LARS(params, **options, foreach=True)
        with Factors() as factors:
            optimizer.step()
    assert factors.calls
    for targets, first, second in factors.calls:
        for target, factor, other in zip(targets, first, second, strict=True):
            assert factor.dim() == 0 and target.shape == other.shape and target.stride() == other.stride()
            assert {(x.dtype, x.device) for x in (factor, other)} == {(targets[0].dtype, targets[0].device)}
            assert target.dtype == targets[0].dtype


@loop_over(
    "name shape implementation",
    pairwise(["momentum", "nesterov-joint", "unadapted", "clip-maximize", "skip_nonfinite"], [(), (1,)], NOT_FUSED),
)
def test_no_host_read_of_scale_and_overflow(name: str, shape: tuple[int, ...], implementation: str) -> None:
    with fake_cuda(), torch.no_grad():
        for group in cuda_groups():
            params = group["params"]
            buffers = [None] * len(params)
            with Recorder() as recorder:
                lars(
                    params,
                    [param.grad for param in params],
                    buffers,
                    grad_scale=torch.full(shape, 8.0, device="cuda"),
                    found_inf=torch.zeros(shape, device="cuda"),
                    **OPTIONS[name],
                    **IMPLEMENTATIONS[implementation],
                )
            assert not recorder.reads and not recorder.arrivals


@not_fused
@loop_over("name", ["momentum", "unadapted", "clip-maximize", "skip_nonfinite"])
def test_copies_to_the_cpu_block(name: str, implementation: Options) -> None:
    """Parameters on the CPU, scalars on the device. A non-blocking copy would be read before it has arrived."""
    with fake_cuda():
        params = [torch.ones(3, 5) for _ in range(2)]
        scalars = {
            "lr": torch.full((), 0.5, device="cuda"),
            "grad_scale": torch.full((), 8.0, device="cuda"),
            "found_inf": torch.zeros((), device="cuda"),
        }
        with torch.no_grad(), Recorder() as recorder:
            lars(params, [torch.ones(3, 5)] * 2, [None] * 2, **{**OPTIONS[name], **scalars}, **implementation)
    assert recorder.arrivals and not any(recorder.arrivals)


@not_fused
def test_a_skip_decision_across_devices_blocks(implementation: Options) -> None:
    with fake_cuda():
        params = [torch.nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "cuda")]
        set_grads(params, [torch.ones_like(param) for param in params])
        optimizer = LARS(params, **BASE, skip_nonfinite=True, **implementation)
        with Recorder() as recorder:
            optimizer.step()
    # the flag of the one comes to the CPU, and the decision goes back
    assert recorder.arrivals == [False] and recorder.departures == [True]


# ---------------------------------------------------------------- temporaries
COUNT, SHAPE, SIZE = 8, (100, 64), 6400  # 6400 is more than a row of the norms


def second_step(options: Options, implementation: Options, dtype: torch.dtype, device: str, lr: str) -> Recorder:
    """Float64 and complex64 count twice in the recorder, which counts float32s."""
    with fake_cuda() if device == "cuda" else contextlib.nullcontext():
        params = [torch.nn.Parameter(torch.ones(SHAPE, dtype=dtype, device=device)) for _ in range(COUNT)]
        set_grads(params, [torch.ones(SHAPE, dtype=dtype, device=device) for _ in range(COUNT)])
        tensor_lr = torch.full((), options["lr"], device=device)
        optimizer = LARS(params, **{**options, "lr": tensor_lr if lr == "tensor" else options["lr"]}, **implementation)
        optimizer.step()  # the step that creates the buffers
        with Recorder() as recorder:
            optimizer.step()
    return recorder


def is_adapted(options: Options) -> bool:
    adapt = options.get("adapt")
    return options.get("weight_decay", 0) != 0 if adapt is None else adapt


def is_in_place(options: Options) -> bool:
    return is_adapted(options) and options.get("trust_denominator") != "joint" and not options.get("skip_nonfinite")


IN_PLACE = ["momentum-clip", "dampening-maximize", "nesterov-paper", "base", "adapt", "paper-maximize"]


@loop_over(
    "name device dtype lr implementation",
    pairwise(IN_PLACE, ["cpu", "cuda"], [torch.float32, torch.complex64], ["float", "tensor"], NOT_FUSED),
)
def test_no_temporary_of_parameter_size(
    name: str, device: str, dtype: torch.dtype, lr: str, implementation: str
) -> None:
    assert is_in_place(OPTIONS[name])
    recorder = second_step(OPTIONS[name], IMPLEMENTATIONS[implementation], dtype, device, lr)
    assert recorder.peak < SIZE / 10


BUCKETED = [
    *("momentum", "joint", "nesterov-joint", "joint-maximize", "adapted"),
    *("skip_nonfinite", "everything"),  # a group that is not adapted may run torch's own SGD
]


@pairs("name dtype device how", BUCKETED, [torch.float32, torch.bfloat16], ["cpu", "cuda"], NOT_FUSED)
def test_temporaries_fit_a_bucket(
    name: str, dtype: torch.dtype, device: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copies that a step of half types or a gated one needs are of one chunk or, single-tensor, of one tensor."""
    in_chunk, implementation = 2, IMPLEMENTATIONS[how]
    monkeypatch.setattr(norms, "chunks", functools.partial(norms.chunks, limit=in_chunk * SIZE))
    monkeypatch.setattr(staging, "LIMIT", in_chunk * SIZE)
    options = {**OPTIONS, **ROUTES}[name]
    recorder = second_step(options, implementation, dtype, device, "float")
    half, skip = dtype == torch.bfloat16, options.get("skip_nonfinite", False)
    joint = options.get("trust_denominator") == "joint"
    written = 1 + (options.get("momentum", 0) != 0) + half  # with its compensation
    if implementation.get("foreach"):
        width = 0.5 if half else 1.0  # of a number, in float32s
        copies = (half or skip) * written + half + half * width * written + skip * width * written + joint * (1 + half)
        limit = copies * in_chunk + 0.1
    else:
        # of a float32 parameter the direction, in a chunk; a gradient while it is scaled, a value while it is chosen
        limit = max(joint * in_chunk, (half or skip) * written) + 1.1
    assert recorder.peak < limit * SIZE


LARGE = 1 << 24
LARGE_TENSORS = {
    "flat": lambda dtype: torch.ones(LARGE, dtype=dtype),
    "one_row": lambda dtype: torch.ones(1, LARGE, dtype=dtype),
    "blocks_with_gaps": lambda dtype: torch.ones(2, 2048, 8192, dtype=dtype)[:, :, :4096],
    "channels_last": lambda dtype: torch.ones(16, 64, 128, 128, dtype=dtype).to(memory_format=torch.channels_last),
    "expanded": lambda dtype: torch.ones((), dtype=dtype).expand(1, 2, LARGE // 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LARGE_TENSORS)
def test_norms_on_cpu_convert_4_mib_at_a_time(layout: str, dtype: torch.dtype) -> None:
    tensor = LARGE_TENSORS[layout](dtype)
    peak = peak_of(lambda: norms.norms([tensor], foreach=False))
    # a copy and its cast (a gather of a half type, then float32): 4 MiB and 2 MiB
    assert 0 < peak <= 7 << 20
    if dtype == torch.float32 and layout in ("flat", "one_row", "channels_last"):
        assert peak < 1 << 20, "what fills its memory is read where it is"
    # for the gradient: a cast and a sum, fewer elements at a time, and the norms of all rows twice
    rows = 2 * 4 * LARGE // norms.ROW
    param = torch.ones_like(tensor)
    assert 0 < peak_of(lambda: norms.joint_norms([param], [tensor], 1.0, 0.1, foreach=False)) <= (3 << 20) + rows


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes that a call holds."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak

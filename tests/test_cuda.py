"""LARS on an NVIDIA GPU, fused=True above all: numbers, bits, launches, memory, host reads, streams, graphs and scaling."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import harness
from cases import COMPLEX, HISTORIES, LAYOUTS, LR_FACTORS, OPTIONS, REAL, Options, make_grads, make_params, nonfinite
from fastlars import LARS
from fastlars.compiled import joint_operator
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, set_grads
from reference import ReferenceLARS

DEVICE = "cuda"
FUSED = (torch.float32, torch.bfloat16, torch.float16)
VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    ignore_nothing_adapted,
]
SOME = ["momentum", "nesterov-joint", "clip-paper", "unadapted", "everything", "dampening-maximize", "base"]


@contextlib.contextmanager
def no_host_reads() -> Iterator[None]:
    """Anything that waits for the device raises: reads, and copies from memory that is not pinned."""
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def mixed_grads(params: Sequence[Tensor], step: int, offset: int) -> list[Tensor | None]:
    names = list(HISTORIES)
    return [HISTORIES[names[(i + offset) % len(names)]](param, step, i) for i, param in enumerate(params)]


def optimizer_of(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> LARS:
    """Tensors that the kernels support: chunks with and without a tail, unaligned, transposed, empty."""
    layouts = [layout for layout in LAYOUTS if layout not in ("strided", "columns")]
    params = make_params(dtype, layouts=layouts, seed=seed, device=DEVICE)
    return LARS(params, **{"fused": True, **OPTIONS[name], **options})


def params_of(optimizer: LARS) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values_of(optimizer: LARS) -> list[Tensor]:
    """Copies of parameters and momentum buffers."""
    buffers = [buffer for buffer in buffers_of(optimizer) if buffer is not None]
    return [tensor.detach().clone() for tensor in [*params_of(optimizer), *buffers]]


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- numbers
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", REAL + COMPLEX, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference(name: str, dtype: torch.dtype, implementation: str) -> None:
    if implementation == "fused" and dtype not in FUSED:
        pytest.skip("refused at construction")
    offset = list(OPTIONS).index(name)
    params = make_params(dtype, device=DEVICE)
    harness.run(
        [{"params": params}],
        OPTIONS[name],
        lambda ps, step: mixed_grads(ps, step, offset),
        IMPLEMENTATIONS[implementation],
    )


def test_norms_of_large_tensors() -> None:
    # every implementation is within 1e-5 of double precision, seen in its coefficient: only adapt, lr 1
    n = 50_000_001
    generator = torch.Generator(DEVICE).manual_seed(0)
    for implementation in IMPLEMENTATIONS.values():
        w = torch.nn.Parameter(torch.randn(n, device=DEVICE, generator=generator) + 1)
        g = torch.rand(n, device=DEVICE, generator=generator)
        before = w.detach().clone()
        w.grad = g
        LARS([w], lr=1.0, adapt=True, trust_coefficient=1.0, eps=0.0, **implementation).step()
        ratio = float(before.double().norm() / g.double().norm())
        torch.testing.assert_close(w.detach(), before - ratio * g, rtol=1e-5, atol=1e-5)


def test_skip_nonfinite_spans_groups() -> None:
    groups = [
        {"params": make_params(torch.float32, layouts=["matrix", "conv"], seed=1, device=DEVICE)},
        {"params": make_params(torch.bfloat16, layouts=["scalar"], seed=2, device=DEVICE), "adapt": False},
        {"params": make_params(torch.float32, layouts=["matrix", "strided"], seed=3, device=DEVICE)},
        {"params": make_params(torch.float32, layouts=["matrix"], seed=4, device=DEVICE), "skip_nonfinite": False},
    ]
    options = {**OPTIONS["momentum"], "skip_nonfinite": True}
    harness.run(groups, options, lambda ps, step: [nonfinite(p, step, i) for i, p in enumerate(ps)], {"fused": True})


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "unadapted", "clip-paper"])
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_amp_scaler(name: str, dtype: torch.dtype) -> None:
    optimizer = optimizer_of(name, dtype=dtype)
    params = params_of(optimizer)
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, growth_interval=100)
    scaler.scale(torch.zeros((), device=DEVICE))
    for step, scale in enumerate((256.0, 256.0, 128.0)):
        grads = [None if g is None else (g * scale).to(dtype) for g in make_grads("dense", params, step)]
        if step == 1:
            grads[0].fill_(torch.inf)
        set_grads(params, grads)
        reference.step(grads, grad_scale=scale, found_inf=step == 1)
        copies = [g.clone() for g in grads if g is not None]
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits([p.grad for p in params if p.grad is not None], copies)
        harness.assert_equals(reference, optimizer, f"{name}, step {step}")
        reference.realign(params, harness.started(reference, buffers_of(optimizer)))


class DefaultProtocol(LARS):
    _step_supports_amp_scaling = False


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in OPTIONS if not OPTIONS[name].get("dampening")])
def test_both_protocols_of_a_scaler_give_the_same_bits(name: str, dtype: torch.dtype, clips: bool) -> None:
    """If both run our kernels and the scale is a power of two. A group that is not adapted is torch's SGD."""
    flagged = optimizer_of(name, dtype=dtype)
    default = DefaultProtocol(params_of(optimizer_of(name, dtype=dtype)), **OPTIONS[name], fused=True)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1) for _ in range(2)]
    for step in range(6):
        for optimizer, scaler in zip((flagged, default), scalers, strict=True):
            scaler.scale(torch.zeros((), device=DEVICE))
            params = params_of(optimizer)
            set_grads(
                params, [None if g is None else g * scaler.get_scale() for g in make_grads("dense", params, step)]
            )
            if step in (0, 3):
                params[0].grad.fill_(torch.nan)  # type: ignore[union-attr]
            if clips:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
        pairs = zip(params_of(flagged), params_of(default), strict=True)
        if OPTIONS[name].get("adapt", OPTIONS[name].get("weight_decay")):
            assert all(torch.equal(*pair) for pair in pairs), step
        else:
            for pair in pairs:
                torch.testing.assert_close(*pair)


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "unadapted", "everything"])
def test_the_flagged_protocol_reads_nothing_on_the_host(name: str) -> None:
    optimizer = optimizer_of(name)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.zeros((), device=DEVICE))
    set_grads(params_of(optimizer), [torch.ones_like(p) for p in params_of(optimizer)])
    with no_host_reads():
        scaler.step(optimizer)  # the first step, which creates state and tables


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_an_overflow_on_the_first_step(dtype: torch.dtype) -> None:
    skipped, fresh = optimizer_of("momentum", dtype=dtype), optimizer_of("momentum", dtype=dtype)
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(torch.zeros((), device=DEVICE))
    set_grads(params_of(skipped), [torch.full_like(p, torch.nan) for p in params_of(skipped)])
    scaler.step(skipped)
    assert_same_bits(params_of(skipped), params_of(fresh))
    assert not any(buffer.any() for buffer in buffers_of(skipped) if buffer is not None)


# ---------------------------------------------------------------- bits
@pytest.mark.parametrize("dtype", FUSED, ids=str)
@pytest.mark.parametrize("name", SOME)
def test_same_bits_every_run(name: str, dtype: torch.dtype) -> None:
    runs = []
    for _ in range(3):
        optimizer = optimizer_of(name, dtype=dtype)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.linspace(-1, 1, 3_000_001, device=DEVICE))]})
        for step in range(3):
            set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), step))
            optimizer.step()
        runs.append(values_of(optimizer))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_a_tensor_lr_gives_the_bits_of_a_float() -> None:
    runs = []
    for lr in (0.3, torch.tensor(0.3), torch.tensor([0.3], device=DEVICE)):
        optimizer = optimizer_of("momentum-clip", lr=lr)
        set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), 0))
        optimizer.step()
        runs.append(values_of(optimizer))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


# ---------------------------------------------------------------- side effects
@pytest.mark.parametrize("name", SOME)
def test_no_host_read_and_no_allocation(name: str) -> None:
    optimizer = optimizer_of(name, lr=torch.tensor(0.1, device=DEVICE))
    params = params_of(optimizer)
    set_grads(params, make_grads("dense", params, 0))
    for _ in range(2):
        optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    with no_host_reads():
        for _ in range(3):
            optimizer.step()
    made = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    # torch's operations compute the gate from all norms, with results of one element
    assert made == 0 or (made < 60 and OPTIONS[name].get("skip_nonfinite"))


@pytest.mark.parametrize("implementation", ["single", "foreach", "fused"])
def test_first_step_reads_nothing_either(implementation: str) -> None:
    params = make_params(torch.float32, layouts=["matrix", "vector_4097"], device=DEVICE)
    optimizer = LARS(params, **OPTIONS["everything"], **IMPLEMENTATIONS[implementation])
    set_grads(params, [torch.ones_like(p) for p in params])
    with no_host_reads():
        optimizer.step()


def test_a_host_read_would_raise() -> None:
    value = torch.ones((), device=DEVICE)
    with pytest.raises(RuntimeError, match="synchronizing"), no_host_reads():
        value.item()


KERNELS = ["partial_sums", "norms", "update"]


def launches(step: Callable[[], Any]) -> list[str]:
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "clip-paper", "everything", "base"])
@pytest.mark.parametrize("count", [1, 161])
def test_three_launches(name: str, count: int) -> None:
    params = [torch.nn.Parameter(torch.randn(1000 * i + 7, device=DEVICE)) for i in range(count)]
    optimizer = LARS(params, **{**OPTIONS[name], "lr": torch.tensor(0.1, device=DEVICE)}, fused=True)
    set_grads(params, [torch.ones_like(p) for p in params])
    launched = launches(optimizer.step)
    assert [kernel for kernel in launched if kernel in KERNELS] == KERNELS
    # with skip_nonfinite torch computes the gate, in operations on a bucket's norms
    assert launched == KERNELS or (len(launched) < 20 and OPTIONS[name].get("skip_nonfinite"))


@pytest.mark.skipif(VERSION < (2, 11), reason="one launch a tensor before torch 2.11")
@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "base"])
def test_foreach_makes_few_launches(name: str) -> None:
    params = [torch.nn.Parameter(torch.randn(1000 * i + 7, device=DEVICE)) for i in range(161)]
    optimizer = LARS(params, **{**OPTIONS[name], "lr": torch.tensor(0.1, device=DEVICE)}, foreach=True)
    set_grads(params, [torch.ones_like(p) for p in params])
    assert len(launches(optimizer.step)) < 100  # an operation over the list takes two or three launches


def test_the_joint_norms_of_graphs_take_two_kernels() -> None:
    """The operator that torch.compile calls."""
    params, grads = ([torch.randn(1000 * i + 7, device=DEVICE) for i in range(161)] for _ in range(2))
    expected = joint_operator(params, grads, -1.0, 0.1)
    torch.testing.assert_close(torch.ops.fastlars.joint_norms(params, grads, -1.0, 0.1), expected)
    launched = launches(lambda: torch.ops.fastlars.joint_norms(params, grads, -1.0, 0.1))
    assert [kernel for kernel in launched if kernel in KERNELS] == KERNELS[:2]


def test_moving_gradients_cost_one_copy() -> None:
    params = [torch.nn.Parameter(torch.randn(1000, device=DEVICE)) for _ in range(20)]
    optimizer = LARS(params, **OPTIONS["momentum"], fused=True)
    held: list[Tensor] = []  # so that addresses are never reused
    reference = ReferenceLARS([{"params": params}], **OPTIONS["momentum"])
    for step in range(40):
        grads = [torch.randn_like(p) for p in params]
        held += grads
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
        if step % 13 == 0:
            torch.cuda.synchronize()
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, buffers_of(optimizer))
    set_grads(params, [torch.randn_like(p) for p in params])

    def moved() -> None:
        set_grads(params, [p.grad.clone() for p in params if p.grad is not None])
        optimizer.step()

    kernels = [name for name in launches(moved) if "Memcpy DtoD" not in name and "elementwise" not in name]
    assert [name.split()[0] for name in kernels] == ["Memcpy", *KERNELS]


# ---------------------------------------------------------------- streams and graphs
def test_runs_on_the_current_stream() -> None:
    expected = optimizer_of("momentum")
    actual = optimizer_of("momentum")
    for optimizer in (expected, actual):
        set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), 0))
    expected.step()
    arriving = [p.grad.clone() for p in params_of(actual) if p.grad is not None]
    for param in params_of(actual):
        param.grad.fill_(torch.nan)  # type: ignore[union-attr]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), no_host_reads():
        torch.cuda._sleep(50_000_000)  # work on another stream would run before the gradients are there
        torch._foreach_copy_([p.grad for p in params_of(actual)], arriving)
        actual.step()
        after = values_of(actual)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(values_of(expected), after)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors() -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        params = make_params(torch.float32, layouts=["matrix", "vector_4097"], device=device)
        optimizer = LARS(params, **OPTIONS["everything"], fused=True)
        set_grads(params, make_grads("dense", params, 0))
        optimizer.step()
        results.append([value.cpu() for value in values_of(optimizer)])
    assert_same_bits(*results)


def warm_up(step: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize("name", SOME)
def test_graph_of_a_step_with_lr_on_the_device(name: str, implementation: str) -> None:
    captured, eager = (
        optimizer_of(name, lr=torch.tensor(0.1, device=DEVICE), **{"fused": None, **IMPLEMENTATIONS[implementation]})
        for _ in range(2)
    )
    both = [params_of(captured), params_of(eager)]
    for params in both:
        set_grads(params, make_grads("dense", params, 0))
    warm_up(captured.step)
    warm_up(eager.step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step, factor in enumerate(LR_FACTORS * 2):
        for optimizer in (captured, eager):
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 * factor)
        for params in both:
            for param, grad in zip(params, make_grads("dense", params, step), strict=True):
                assert param.grad is not None and grad is not None
                param.grad.copy_(grad)
        graph.replay()
        eager.step()
        assert_same_bits(values_of(captured), values_of(eager))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)  # torch's own warnings
@pytest.mark.parametrize("implementation", ["foreach", "fused"])
def test_reduce_overhead_with_a_schedule(implementation: str) -> None:
    results = []
    for mode in (None, "reduce-overhead"):
        torch.compiler.reset()
        lr = torch.tensor(0.1, device=DEVICE)
        optimizer = optimizer_of("momentum", lr=lr, **{"fused": None, **IMPLEMENTATIONS[implementation]})
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        step = optimizer.step if mode is None else torch.compile(optimizer.step, mode=mode)
        set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), 0))
        for i in range(6):
            for param, grad in zip(params_of(optimizer), make_grads("dense", params_of(optimizer), i), strict=True):
                assert param.grad is not None and grad is not None
                param.grad.copy_(grad)
            step()
            scheduler.step()
        assert optimizer.param_groups[0]["lr"] is lr
        results.append(values_of(optimizer))
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_graph_of_forward_backward_and_step() -> None:
    def training() -> tuple[LARS, Callable[[], None]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 130), torch.nn.ReLU(), torch.nn.Linear(130, 3)).to(DEVICE)
        optimizer = LARS(model.parameters(), **OPTIONS["momentum"], fused=True)
        data = torch.linspace(-1, 1, 16 * 64, device=DEVICE).view(16, 64)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model(data).square().mean().backward()
            optimizer.step()

        return optimizer, step

    captured, captured_step = training()
    eager, eager_step = training()
    warm_up(captured_step)
    warm_up(eager_step)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):  # gradients are in the graph's memory from here on
        captured_step()
    for i in range(6):
        if i == 3:  # an eager step in between moves the gradients, but not those of the graph
            captured_step()
        else:
            graph.replay()
        eager_step()
        for a, b in zip(params_of(captured), params_of(eager), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_capture_without_an_eager_step_is_refused(implementation: str) -> None:
    optimizer, expected = (
        optimizer_of("momentum", **{"fused": None, **IMPLEMENTATIONS[implementation]}) for _ in range(2)
    )
    set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), 0))
    before = values_of(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device=DEVICE)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="needs an eager step"):
            optimizer.step()
    torch.cuda.synchronize()
    assert_same_bits(before, [p.detach() for p in params_of(optimizer)])
    assert not optimizer.state
    set_grads(params_of(expected), make_grads("dense", params_of(expected), 0))
    for each in (optimizer, expected):
        each.step()
    assert_same_bits(values_of(optimizer), values_of(expected))


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64], ids=str)
def test_what_cannot_be_fused_is_refused(dtype: torch.dtype) -> None:
    options: Options = {"lr": 0.1, "weight_decay": 1e-4}
    with pytest.raises(RuntimeError, match="fused=True on CUDA needs float32"):
        LARS(make_params(dtype, layouts=["matrix"], device=DEVICE), **options, fused=True)

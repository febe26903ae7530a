"""LARS on devices other than the CPU: what every device must get right, whatever its kernels.

Every device besides the CPU that this machine has runs all of it, under its own mark: `pytest -m vulkan`.
"""

import copy
import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import harness
from cases import (
    BASE,
    COMPLEX,
    HISTORIES,
    OPTIONS,
    PAIRWISE,
    REAL,
    SPECIAL,
    make_grads,
    make_params,
    neighbours,
    nonfinite,
)
from devices import DEVICES, settle
from fastlars import LARS, lars, norms, schedules
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, set_grads
from recording import Recorder
from reference import ReferenceLARS

if not DEVICES:
    pytest.skip("this machine has no device beside the CPU", allow_module_level=True)

pytestmark = [
    ignore_nothing_adapted,
    # torchvulkan leaves some operations on bfloat16 and most on complex numbers to the CPU, and says so once
    pytest.mark.filterwarnings("ignore:torchvulkan:UserWarning"),
    pytest.mark.parametrize(
        "device", [pytest.param(device, id=name, marks=getattr(pytest.mark, name)) for name, device in DEVICES.items()]
    ),
]
# XLA compiles each set's steps, at a third of a second a graph of six tensors. There any two options still meet.
IS_XLA = "xla" in DEVICES
SWEEP = [name for name in OPTIONS if not IS_XLA or name in PAIRWISE or name in SPECIAL]
NOT_FUSED = ("single", "foreach")
not_fused = pytest.mark.parametrize("implementation", NOT_FUSED)
# torch_xla loses what is written through torch.view_as_real of complex128
NOT_HERE = {torch.complex128} if IS_XLA else set()
OTHER_DTYPES = [dtype for dtype in REAL + COMPLEX if dtype not in {torch.float32} | NOT_HERE]
SOME = ["momentum", "nesterov-joint", "clip-paper", "dampening-maximize", "unadapted", "everything"]
LAYOUTS = ["matrix", "conv", "scalar", "empty", "strided", "vector_1025", "zeros"]
# XLA's tensors have no strides: all are dense
ALL_LAYOUTS = [name for name in cases.LAYOUTS if not IS_XLA or name in set(LAYOUTS) - {"strided"}]


def mixed_grads(params: Sequence[Tensor], step: int, offset: int) -> list[Tensor | None]:
    names = list(HISTORIES)
    return [HISTORIES[names[(i + offset) % len(names)]](param, step, i) for i, param in enumerate(params)]


def skip_missing_dtype(device: torch.device, dtype: torch.dtype) -> None:
    if device.type == "mps" and dtype in (torch.float64, torch.complex128):
        pytest.skip("Apple GPUs have no double precision")


# ---------------------------------------------------------------- numbers
@not_fused
@pytest.mark.parametrize("name", SWEEP)
def test_equals_reference(name: str, implementation: str, device: torch.device) -> None:
    """All options, memory layouts and gradient histories, in float32."""
    offset = list(OPTIONS).index(name)
    harness.run(
        [{"params": make_params(torch.float32, layouts=ALL_LAYOUTS, device=device)}],
        OPTIONS[name],
        lambda ps, step: mixed_grads(ps, step, offset),
        IMPLEMENTATIONS[implementation],
    )


@pytest.mark.parametrize("name", SWEEP)
def test_equals_reference_in_other_dtypes(name: str, device: torch.device) -> None:
    """Each set of options in one dtype and one implementation, so that each dtype meets many sets and both."""
    index = SWEEP.index(name)
    dtype = OTHER_DTYPES[index % len(OTHER_DTYPES)]
    implementation = NOT_FUSED[index // len(OTHER_DTYPES) % 2]
    skip_missing_dtype(device, dtype)
    harness.run(
        [{"params": make_params(dtype, layouts=ALL_LAYOUTS, device=device)}],
        OPTIONS[name],
        lambda ps, step: mixed_grads(ps, step, index),
        IMPLEMENTATIONS[implementation],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e3])
@pytest.mark.parametrize("foreach", [False, True])
def test_norms_are_float32_norms(
    foreach: bool, size: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where squares of the dtype itself would overflow or vanish, and where "joint" goes in chunks."""
    monkeypatch.setattr(norms, "chunks", functools.partial(norms.chunks, limit=40))
    tensors = [tensor * size for tensor in make_params(dtype, layouts=LAYOUTS, seed=1, device=device)]
    others = [tensor * size for tensor in make_params(dtype, layouts=LAYOUTS, seed=2, device=device)]
    settle()
    actual = [norms.norms(tensors, foreach), norms.joint_norms(others, tensors, -1.0, 0.25, foreach)]
    wide, wide_others = ([tensor.detach().cpu().double() for tensor in each] for each in (tensors, others))
    directions = [g - 0.25 * w for w, g in zip(wide_others, wide, strict=True)]
    for numbers, of in zip(actual, (wide, directions), strict=True):
        expected = torch.stack([torch.linalg.vector_norm(tensor) for tensor in of])
        torch.testing.assert_close(numbers.cpu().double(), expected, rtol=1e-5, atol=0)


@not_fused
@pytest.mark.parametrize("name", SOME)
def test_memory_beside_a_strided_tensor_is_not_written(name: str, implementation: str, device: torch.device) -> None:
    if device.type == "xla":
        pytest.skip("its tensors show no memory")
    params = make_params(torch.float32, layouts=["strided", "columns", "offset"], device=device)
    optimizer = LARS(params, **OPTIONS[name], **IMPLEMENTATIONS[implementation])
    before = [neighbours(param) for param in params]
    for step in range(2):
        set_grads(params, make_grads("dense", params, step))
        optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(neighbours(param), old)


@not_fused
def test_a_gradient_in_the_memory_of_its_parameter(implementation: str, device: torch.device) -> None:
    """It is read before the parameter is written, or from a copy; in later steps too, when the group is known."""
    params = make_params(torch.float32, layouts=["matrix", "scalar"], device=device)
    options = {**OPTIONS["nesterov"], **IMPLEMENTATIONS[implementation]}
    optimizer, reference = LARS(params, **options), ReferenceLARS([{"params": params}], **OPTIONS["nesterov"])
    for step in range(4):
        grads = make_grads("dense", params, step) if step < 3 else [param.detach() for param in params]
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, buffers_of(optimizer))


def test_groups_of_several_dtypes_and_devices_skip_together(device: torch.device) -> None:
    """A NaN in one tensor stops every group with skip_nonfinite, also on the CPU, and no other group."""
    groups: list[dict[str, Any]] = [
        {"params": make_params(torch.float32, layouts=["matrix", "conv"], seed=1, device=device)},
        {"params": make_params(torch.bfloat16, layouts=["scalar"], seed=2, device=device), "adapt": False},
        {"params": make_params(torch.float32, layouts=["matrix", "strided"], seed=3)},
        {"params": make_params(torch.float32, layouts=["matrix"], seed=4, device=device), "skip_nonfinite": False},
    ]
    options = {**OPTIONS["momentum"], "skip_nonfinite": True}
    harness.run(groups, options, lambda ps, step: [nonfinite(p, step, i) for i, p in enumerate(ps)], {})


def test_one_group_over_two_devices(device: torch.device) -> None:
    params = [p for where in ("cpu", device) for p in make_params(torch.float32, layouts=LAYOUTS, device=where)]
    lr = torch.tensor(0.5, device=device)
    optimizer, reference = (
        LARS(params, **{**OPTIONS["momentum-clip"], "lr": lr}),
        ReferenceLARS([{"params": params}], **OPTIONS["momentum-clip"]),
    )
    for step in range(2):
        grads = make_grads("dense", params, step)
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, buffers_of(optimizer))


@not_fused
def test_functional_with_scale_and_overflow_on_the_device(implementation: str, device: torch.device) -> None:
    """For tensors on the CPU too, to which the device's numbers come."""
    options = OPTIONS["momentum"]
    params = [p for where in ("cpu", device) for p in make_params(torch.float32, layouts=LAYOUTS, device=where)]
    reference = ReferenceLARS([{"params": params}], **options)
    buffers: list[Tensor | None] = [torch.zeros_like(param) for param in params]
    with torch.no_grad():
        for step in range(3):
            grads = [None if g is None else g * 8 for g in make_grads("dense", params, step)]
            lars(
                *([*params], grads, buffers),
                **options,
                **IMPLEMENTATIONS[implementation],
                grad_scale=torch.tensor(8.0, device=device),
                found_inf=torch.tensor(float(step == 1), device=device),
            )
            settle()
            reference.step(grads, grad_scale=8.0, found_inf=step == 1)
    for param, expected in zip(params, reference.params, strict=True):
        torch.testing.assert_close(param.detach().cpu().double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- which implementation
def test_the_default_is_that_of_torch(device: torch.device) -> None:
    expected = {"cuda": "foreach", "mps": "single", "vulkan": "foreach", "xla": "single"}[device.type]
    optimizer = LARS(make_params(torch.float32, layouts=["matrix"], device=device), lr=1.0, adapt=True)
    assert f"adapted, {expected}\n" in repr(optimizer)


def test_fused_is_refused_without_a_fused_step(device: torch.device) -> None:
    if device.type == "cuda":
        pytest.skip("there is one")
    params = make_params(torch.float32, layouts=["matrix"], device=device)
    with pytest.raises(RuntimeError, match=f"fused=True is for CPU and CUDA tensors, got one on {device}"):
        LARS(params, lr=1.0, adapt=True, fused=True)


def test_a_buffer_on_another_device_is_refused(device: torch.device) -> None:
    (param,) = make_params(torch.float32, layouts=["matrix"], device=device)
    optimizer = LARS([param], **OPTIONS["momentum"])
    optimizer.state[param]["momentum_buffer"] = torch.zeros(3, 5)
    set_grads([param], make_grads("dense", [param], 0))
    with pytest.raises(
        RuntimeError,
        match=f"on {param.device} has a momentum buffer on cpu; move it to {param.device}. Nothing has changed",
    ):
        optimizer.step()


# ---------------------------------------------------------------- lr
@pytest.mark.parametrize("name", ["momentum-clip", "clip-paper", "unadapted"])
@not_fused
def test_a_tensor_lr_steps_as_a_float(name: str, implementation: str, device: torch.device) -> None:
    results = []
    for lr in (0.3, torch.tensor(0.3), torch.tensor(0.3, device=device), torch.tensor([0.3], device=device)):
        params = make_params(torch.float32, layouts=LAYOUTS, device=device)
        optimizer = LARS(params, **{**OPTIONS[name], "lr": lr}, **IMPLEMENTATIONS[implementation])
        for step in range(2):
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] is lr
        settle()
        results.append([param.detach().cpu() for param in params])
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


Scheduler = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
SCHEDULERS: dict[str, Scheduler] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5),
    "CosineAnnealingLR": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=6),
    "warmup_cosine": lambda optimizer: schedules.warmup_cosine(optimizer, warmup_steps=2, total_steps=5),
    "warmup_polynomial": lambda optimizer: schedules.warmup_polynomial(optimizer, warmup_steps=2, total_steps=5),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("lr_on", ["host", "device"])
def test_schedulers(scheduler: str, lr_on: str, device: torch.device) -> None:
    params = make_params(torch.float32, layouts=LAYOUTS, device=device)
    options = OPTIONS["momentum-paper"]
    lr: Any = torch.tensor(0.5, device=device) if lr_on == "device" else 0.5
    optimizer, reference = LARS(params, **{**options, "lr": lr}), ReferenceLARS([{"params": params}], **options)
    schedule = SCHEDULERS[scheduler](optimizer)
    (group,), seen = optimizer.param_groups, []
    for step in range(5):
        grads = make_grads("dense", params, step)
        set_grads(params, grads)
        seen.append(float(group["lr"]))
        reference.groups[0].update(lr=seen[-1], momentum=group["momentum"])
        reference.step(grads)
        optimizer.step()
        schedule.step()
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, buffers_of(optimizer))
    assert len(set(seen)) > 1
    assert (group["lr"] is lr) == (lr_on == "device")


# ---------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("name", ["momentum", "dampening", "clip-paper", "momentum-unadapted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_moves_to_the_device_and_back(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Two steps on the CPU, two on the device, two on the CPU, through files that torch.load reads with weights_only."""
    params = make_params(dtype, layouts=LAYOUTS)
    optimizer = LARS(params, **OPTIONS[name])
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    for leg, where in enumerate((torch.device("cpu"), device, torch.device("cpu"))):
        if leg > 0:
            file = io.BytesIO()
            torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True, map_location="cpu" if leg == 2 else None)
            params = [torch.nn.Parameter(p.to(where)) for p in saved["params"]]
            optimizer = LARS(params, lr=9.0, momentum=0.5, trust_coefficient=0.7)
            optimizer.load_state_dict(saved["optimizer"])
            assert all(b.device.type == where.type for b in buffers_of(optimizer) if b is not None)
        for step in (2 * leg, 2 * leg + 1):
            grads = make_grads("late", params, step)
            set_grads(params, grads)
            reference.step(grads)
            optimizer.step()
            harness.assert_equals(reference, optimizer, f"{name}, step {step}")
            reference.realign(
                params, harness.started(reference, buffers_of(optimizer)), buffers_of(optimizer, "compensation")
            )


def test_a_state_that_is_on_the_device_is_loaded(device: torch.device) -> None:
    optimizers = []
    for _ in range(2):
        params = make_params(torch.float32, layouts=LAYOUTS, device=device)
        optimizers.append(LARS(params, **OPTIONS["momentum"]))
    saved, loaded = optimizers
    for step in range(2):
        if step == 1:
            state = copy.deepcopy(saved.state_dict())
            with torch.no_grad():
                for old, new in zip(*(each.param_groups[0]["params"] for each in optimizers), strict=True):
                    new.copy_(old)
            loaded.load_state_dict(state)
        for optimizer in optimizers[: step + 1]:
            params = optimizer.param_groups[0]["params"]
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
    settle()
    for old, new in zip(*(each.param_groups[0]["params"] for each in optimizers), strict=True):
        assert torch.equal(old.cpu(), new.cpu())


# ---------------------------------------------------------------- host reads
@not_fused
@pytest.mark.parametrize("name", [*SOME, "no_kahan"])
def test_no_host_reads_and_lists_only_in_foreach(name: str, implementation: str, device: torch.device) -> None:
    params = make_params(torch.float32, layouts=LAYOUTS, device=device)
    params += make_params(torch.bfloat16, layouts=["matrix"], device=device)
    lr = torch.tensor(0.1, device=device)
    with Recorder() as recorder:
        optimizer = LARS(params, **{**OPTIONS[name], "lr": lr}, **IMPLEMENTATIONS[implementation])
        assert "lr=tensor on" in repr(optimizer)
    assert recorder.reads == [] and recorder.arrivals == []
    for step in range(2):  # the first makes the state
        set_grads(params, make_grads("dense", params, step))
        with Recorder() as recorder:
            optimizer.step()
        assert recorder.reads == [] and recorder.arrivals == [], f"step {step}"
        # foreach calls once for a list, norms included; single, and the norms that are exact on a CPU, once for each tensor
        lists = {name for name in recorder.names if name.startswith("_foreach")}
        assert bool(lists) == (implementation == "foreach") and not (lists and "linalg_vector_norm" in recorder.names)


def test_a_host_read_would_be_seen(device: torch.device) -> None:
    value = torch.ones((), device=device)
    with Recorder() as recorder:
        value.item()
        value.cpu()
    assert recorder.reads and recorder.arrivals


def test_trust_ratios(device: torch.device) -> None:
    where = ("cpu", device)
    ratios = []
    for each in where:
        params = make_params(torch.float32, layouts=LAYOUTS, device=each)
        set_grads(params, make_grads("dense", params, 0))
        ratios.append(LARS(params, **BASE).trust_ratios())
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-5)


# ---------------------------------------------------------------- AMP
@pytest.mark.parametrize("name", ["momentum", "nesterov-joint", "clip-paper", "unadapted"])
def test_gradient_scaler(name: str, device: torch.device) -> None:
    """Scaled gradients step like unscaled ones. An overflow in step 1 changes nothing and halves the scale."""
    if device.type == "xla":
        pytest.skip("torch.amp.GradScaler does not know XLA, which has a scaler of its own")
    params = make_params(torch.float32, layouts=LAYOUTS, device=device)
    optimizer, reference = LARS(params, **OPTIONS[name]), ReferenceLARS([{"params": params}], **OPTIONS[name])
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=100)
    scaler.scale(torch.zeros((), device=device))
    for step, scale in enumerate((256.0, 256.0, 128.0)):
        assert scaler.get_scale() == scale
        grads = [None if g is None else g * scale for g in make_grads("dense", params, step)]
        if step == 1:
            grads[0].fill_(torch.inf)
        reference.step(grads, grad_scale=scale, found_inf=step == 1)
        set_grads(params, grads)
        scaler.step(optimizer)
        scaler.update()
        harness.assert_equals(reference, optimizer, f"{name}, step {step}")
        reference.realign(
            params, harness.started(reference, buffers_of(optimizer)), buffers_of(optimizer, "compensation")
        )

"""torch.amp.GradScaler: which protocol is used, that both give the same bits, and what state an overflow leaves."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.amp import GradScaler

import harness
from cases import BASE, OPTIONS, PAIRWISE, REAL, Options, make_grads, make_params
from fastlars import LARS
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
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted
MAY_SKIP = [name for name, options in PAIRWISE.items() if not (options.get("momentum") and options.get("dampening"))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]  # unscaling float16 gradients is refused by the scaler
FEW = ["momentum", "nesterov-joint", "momentum-unadapted", "clip-maximize", "everything"]


class DefaultProtocol(LARS):
    """Like an optimizer without AMP support: gradients are unscaled in place, and a step that overflows is skipped."""

    _step_supports_amp_scaling = False


def params_of(optimizer: LARS) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def values_of(optimizer: LARS) -> list[Tensor]:
    """Parameters and momentum buffers, with zeros for buffers that do not exist."""
    params = params_of(optimizer)
    buffers = [torch.zeros_like(p) if b is None else b for p, b in zip(params, buffers_of(optimizer), strict=True)]
    return [tensor.detach() for tensor in (*params, *buffers)]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return all(
        torch.equal(a.contiguous().view(integers[a.element_size()]), b.contiguous().view(integers[b.element_size()]))
        for a, b in zip(left, right, strict=True)
    )


def scaled_grads(params: list[Tensor], step: int, scale: float, *, overflow: bool = False) -> list[Tensor | None]:
    grads = [None if grad is None else grad * scale for grad in make_grads("dense", params, step)]
    if overflow:
        grads[0].fill_(torch.inf if step % 2 else torch.nan)
    return grads


# what a user does between backward() and scaler.step(): nothing, or unscale and clip
def nothing(scaler: GradScaler, optimizer: LARS) -> None:
    pass


def clip(scaler: GradScaler, optimizer: LARS) -> None:
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(params_of(optimizer), 1.0)


BEFORE_STEP = [nothing, clip]


# ---------------------------------------------------------------- the bits
@pairs("name dtype before_step", [*MAY_SKIP, "zero_lr"], DTYPES, BEFORE_STEP)
def test_both_protocols_give_the_same_bits(name: str, dtype: torch.dtype, before_step: Callable[..., None]) -> None:
    """Steps 0 and 3 overflow, and the scale is not a power of two once it has grown.

    bfloat16 is an exception, because torch's CPU kernel rounds the reciprocal to bfloat16 in its vector loop.
    """
    growth = 2.0 if dtype == torch.bfloat16 else 1.7
    optimizers = [cls(make_params(dtype), **OPTIONS[name], fused=True) for cls in (LARS, DefaultProtocol)]
    scalers = [GradScaler("cpu", init_scale=2.0**10, growth_factor=growth, growth_interval=1) for _ in optimizers]
    for step in range(6):
        for optimizer, scaler in zip(optimizers, scalers, strict=True):
            scale = scaler.scale(torch.ones(())).item()
            set_grads(params_of(optimizer), scaled_grads(params_of(optimizer), step, scale, overflow=step in (0, 3)))
            before = [value.clone() for value in values_of(optimizer)]
            before_step(scaler, optimizer)
            scaler.step(optimizer)
            scaler.update()
            if step in (0, 3) or OPTIONS[name]["lr"] != 0:
                assert same_bits(values_of(optimizer), before) == (step in (0, 3)), step
        assert same_bits(*map(values_of, optimizers)), step
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scaler.get_scale() == pytest.approx(2.0**8 * growth**4)


def test_a_scale_beyond_the_squares_of_gradients() -> None:
    """With bfloat16 autocast nothing overflows for a long time, and the scale grows until the squares would."""
    for name in FEW:
        optimizers = [cls(make_params(torch.float32), **OPTIONS[name], fused=True) for cls in (LARS, DefaultProtocol)]
        for optimizer in optimizers:
            before = [p.detach().clone() for p in params_of(optimizer)]
            scaler = GradScaler("cpu", init_scale=2.0**100)
            scaler.scale(torch.ones(()))
            set_grads(params_of(optimizer), scaled_grads(params_of(optimizer), 0, 2.0**100))
            scaler.step(optimizer)
            assert not same_bits([p.detach() for p in params_of(optimizer)], before)
        assert same_bits(*map(values_of, optimizers)), name


@implementations
@option_sets
def test_equals_reference(name: str, implementation: Options) -> None:
    """Also with dampening and momentum, which use the default protocol whatever fused is."""
    params = make_params(torch.float32)
    optimizer = LARS(params, **OPTIONS[name], **implementation)
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    scaler = GradScaler("cpu", init_scale=256.0)
    scaler.scale(torch.ones(()))
    for step in range(3):
        grads = scaled_grads(params, step, scaler.get_scale(), overflow=step == 1)
        reference.step(grads, grad_scale=scaler.get_scale(), found_inf=step == 1)
        set_grads(params, grads)
        scaler.step(optimizer)
        scaler.update()
        harness.assert_equals(reference, optimizer, f"{name}, step {step}")
        reference.realign(params, harness.started(reference, buffers_of(optimizer)))


@loop_over("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_flagged_protocol_writes_no_gradient(dtype: torch.dtype) -> None:
    for name in FEW:
        params = make_params(dtype)
        optimizer = LARS(params, **OPTIONS[name], fused=True)
        scaler = GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        grads = scaled_grads(params, 0, 8.0)
        set_grads(params, grads)
        copies = [grad.clone() for grad in grads]
        scaler.step(optimizer)
        assert all(param.grad is grad for param, grad in zip(params, grads, strict=True))
        assert same_bits(grads, copies)
        assert not hasattr(optimizer, "grad_scale") and not hasattr(optimizer, "found_inf")


def test_float16_gradients_are_unscaled_in_float32() -> None:
    """Unscaled they are 5e-9, which float16 cannot represent."""
    for name in ("base", "unadapted", "momentum"):
        results = []
        for dtype in (torch.float16, torch.float32):
            param = torch.nn.Parameter(torch.full((5,), 2.0**-12, dtype=dtype))
            param.grad = torch.full((5,), 1.25, dtype=dtype)
            optimizer = LARS(
                [param], **{**OPTIONS[name], "weight_decay": 0.0, "adapt": "unadapted" not in name}, fused=True
            )
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**28), torch.tensor(0.0)
            optimizer.param_groups[0]["lr"] = 2.0**12
            optimizer.step()
            results.append(param.detach().double())
        torch.testing.assert_close(*results, rtol=2.0**-10, atol=0.0)
        assert (results[0] != 2.0**-12).all()


# ---------------------------------------------------------------- overflows
@loop_over("name dtype", [(name, REAL[i % len(REAL)]) for i, name in enumerate(MAY_SKIP)])
def test_an_overflow_on_the_first_step(name: str, dtype: torch.dtype) -> None:
    """No parameter changes, existing buffers are zero, and the next step is a first step."""
    skipped, fresh = (LARS(make_params(dtype), **OPTIONS[name], fused=True) for _ in range(2))
    before = [p.detach().clone() for p in params_of(skipped)]
    # what a buffer from torch.empty_like would contain
    dirt = [torch.full_like(p, torch.nan) for p in params_of(skipped)]
    del dirt
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    set_grads(params_of(skipped), [torch.full_like(p, torch.nan) for p in params_of(skipped)])
    scaler.step(skipped)
    assert same_bits([p.detach() for p in params_of(skipped)], before)
    assert all(buffer is None or not buffer.any() for buffer in buffers_of(skipped))
    for optimizer in (skipped, fresh):
        set_grads(params_of(optimizer), make_grads("dense", params_of(optimizer), 0))
        optimizer.step()
    assert same_bits(values_of(skipped), values_of(fresh))


def test_skip_nonfinite_and_a_scaler() -> None:
    """Either may skip: skip_nonfinite sees the gradients of its groups, the scaler all of them."""
    for overflow in (0, 1):
        guarded, other = make_params(torch.float32, layouts=["matrix"]), make_params(torch.float32, layouts=["vector"])
        groups = [{"params": guarded, "skip_nonfinite": True}, {"params": other}]
        optimizer = LARS(groups, **BASE, momentum=0.9, fused=True)
        before = [p.detach().clone() for p in (*guarded, *other)]
        set_grads([*guarded, *other], [torch.ones_like(p) for p in (*guarded, *other)])
        (guarded, other)[overflow][0].grad.fill_(torch.inf)
        # only skip_nonfinite finds it, because the scaler checked before the overflow
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        assert same_bits([guarded[0].detach()], before[:1]) == (overflow == 0)
        assert not same_bits([other[0].detach()], before[1:])
        optimizer.found_inf = torch.tensor(1.0)
        before = [p.detach().clone() for p in (*guarded, *other)]
        optimizer.step()
        assert same_bits([p.detach() for p in (*guarded, *other)], before)


def test_a_first_gradient_after_an_overflow() -> None:
    """A layer is unfrozen while steps overflow: its buffer exists, but its first step is still to come."""
    results = []
    for cls in (LARS, DefaultProtocol):
        params = make_params(torch.float32, layouts=["matrix", "conv"])
        optimizer = cls(params, **OPTIONS["momentum"], fused=True)
        scaler = GradScaler("cpu", init_scale=64.0)
        scaler.scale(torch.ones(()))
        for step in range(4):
            grads = scaled_grads(params, step, scaler.get_scale(), overflow=step in (1, 2))
            set_grads(params, grads if step >= 2 else [grads[0], None])
            scaler.step(optimizer)
            scaler.update()
        results.append(values_of(optimizer))
    assert same_bits(*results)


def test_without_any_gradient() -> None:
    optimizer = LARS(make_params(torch.float32), **BASE, fused=True)
    before = [value.clone() for value in values_of(optimizer)]
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert same_bits(values_of(optimizer), before)


# ---------------------------------------------------------------- which protocol
def flag(optimizer: torch.optim.Optimizer) -> bool:
    """What GradScaler reads."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def two_groups(first: Options, second: Options) -> LARS:
    params = make_params(torch.float32, layouts=["matrix", "vector"])
    return LARS([{"params": params[:1], **first}, {"params": params[1:], **second}], **BASE)


FUSED: Options = {"fused": True}


@loop_over(
    "first second flagged",
    [
        (FUSED, FUSED, True),
        (FUSED, {**FUSED, "adapt": False}, True),
        (FUSED, {}, False),  # fused by default was not requested
        (FUSED, {"fused": False}, False),
        (FUSED, {"foreach": True}, False),
        ({}, {}, False),
        (FUSED, {**FUSED, "momentum": 0.9, "dampening": 0.1}, False),
        (FUSED, {**FUSED, "dampening": 0.1}, True),
        (FUSED, {**FUSED, "momentum": 0.9, "nesterov": True}, True),
    ],
)
def test_flagged_where_every_group_says_fused(first: Options, second: Options, flagged: bool) -> None:
    optimizer = two_groups(first, second)
    for other in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert flag(other) == flagged


def test_the_flag_follows_the_groups() -> None:
    optimizer = two_groups(FUSED, FUSED)
    saved = optimizer.state_dict()
    optimizer.add_param_group({"params": make_params(torch.float32, layouts=["scalar"])})
    assert not flag(optimizer)
    optimizer.param_groups[2]["fused"] = True
    assert flag(optimizer)

    unfused = two_groups({}, {})
    unfused.load_state_dict(saved)
    assert flag(unfused)
    unfused.load_state_dict(two_groups({}, FUSED).state_dict())
    assert not flag(unfused)
    # also SGD's state dict, which has its own `fused`
    params = params_of(unfused)
    unfused.load_state_dict(
        torch.optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.1, fused=True).state_dict()
    )
    assert flag(unfused)


def test_the_flag_decides_how_often_step_is_called() -> None:
    for implementation in IMPLEMENTATIONS.values():
        params = make_params(torch.float32, layouts=["matrix"])
        optimizer = LARS(params, **BASE, **implementation)
        calls: list[Any] = []
        optimizer.register_step_pre_hook(
            lambda opt, args, kwargs, calls=calls: calls.append(getattr(opt, "found_inf", None))
        )
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(()))
        set_grads(params, [torch.full_like(p, torch.inf) for p in params])
        scaler.step(optimizer)
        assert [call.item() for call in calls] == ([1.0] if implementation.get("fused") else [])


# ---------------------------------------------------------------- the attributes, whoever sets them
@implementations
@pytest.mark.parametrize("name", MAY_SKIP)
def test_attributes_count_in_every_implementation(name: str, implementation: Options) -> None:
    """A grad_scale that the user sets is one more factor, which a scaler of the default protocol leaves to the step."""
    params, expected = make_params(torch.float32), make_params(torch.float32)
    optimizers = [LARS(ps, **OPTIONS[name], **implementation) for ps in (params, expected)]
    for step in range(3):
        grads = make_grads("dense", params, step)
        set_grads(params, [g * 3 for g in grads])
        inverse = torch.tensor(3.0).reciprocal()
        set_grads(expected, [g * 3 * inverse for g in grads])
        optimizers[0].grad_scale = torch.tensor(3.0)
        optimizers[0].found_inf = torch.tensor([float(step == 1)])
        optimizers[0].step()
        if step != 1:
            optimizers[1].step()
    assert same_bits(*map(values_of, optimizers))


@implementations
def test_dampening_refuses_found_inf_before_anything_changes(implementation: Options) -> None:
    params = make_params(torch.float32)
    groups = [{"params": params[:4]}, {"params": params[4:], "dampening": 0.25}]
    optimizer = LARS(groups, **OPTIONS["momentum"], **implementation)
    before = [value.clone() for value in values_of(optimizer)]
    set_grads(params, make_grads("dense", params, 0))
    optimizer.found_inf = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"param group 1: found_inf with momentum needs dampening == 0"):
        optimizer.step()
    assert same_bits(values_of(optimizer), before) and not optimizer.state
    del optimizer.found_inf
    optimizer.step()
    assert not same_bits(values_of(optimizer), before)


# ---------------------------------------------------------------- host reads
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_no_host_read_on_cuda(name: str, foreach: bool) -> None:
    """The kernels cannot run on fake tensors. These are the paths of tensors that they do not support, in a fused group too."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        for shape in ((), (1,)):
            with fake_cuda():
                params = [torch.nn.Parameter(torch.empty(3, 5, dtype=dtype, device="cuda")) for _ in range(2)]
                set_grads(params, [torch.empty_like(p) for p in params])
                optimizer = LARS(params, **OPTIONS[name], foreach=foreach)
                optimizer.grad_scale = torch.full(shape, 8.0, device="cuda")
                optimizer.found_inf = torch.zeros(shape, device="cuda")
                with Recorder() as recorder:
                    for _ in range(2):
                        optimizer.step()
            assert recorder.names and not recorder.reads and not recorder.arrivals


# ---------------------------------------------------------------- training
@implementations
def test_training_under_autocast_equals_training_without_a_scaler(implementation: Options) -> None:
    """Scales that are powers of two change no bit of a gradient, and the model does not overflow."""
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(9, 33), torch.nn.ReLU(), torch.nn.Linear(33, 3))
        optimizer = LARS(model.parameters(), **OPTIONS["momentum"], **implementation)
        scaler = GradScaler("cpu", init_scale=2.0**12, growth_interval=2, enabled=enabled)
        for _ in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(torch.randn(8, 9)).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == (2.0**14 if enabled else 1.0)
        results.append(values_of(optimizer))
    assert same_bits(*results)

"""Every implementation equals the float64 reference after every step."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    BASE,
    COMPLEX,
    FEATURES,
    HISTORIES,
    LAYOUTS,
    OPTIONS,
    PAIRWISE,
    REAL,
    SPECIAL,
    STEPS,
    Options,
    all_options,
    make_grads,
    make_params,
    neighbours,
    nonfinite,
    pairwise,
)
from fastlars import LARS
from harness import (
    IMPLEMENTATIONS,
    assert_equals,
    buffers_of,
    ignore_nothing_adapted,
    implementations,
    loop_over,
    mixed_grads,
    option_sets,
    run,
    set_grads,
)
from reference import ReferenceLARS

DTYPES = REAL + COMPLEX
SETS = [*PAIRWISE, *SPECIAL]
dtypes = loop_over("dtype", DTYPES)
pytestmark = ignore_nothing_adapted


@implementations
@pytest.mark.parametrize("name", SETS)
def test_equals_reference(name: str, implementation: Options) -> None:
    """Two dtypes at a time, cycling over the option sets."""
    offset = SETS.index(name)
    groups = [{"params": make_params(DTYPES[(offset + i) % len(DTYPES)], seed=i)} for i in (0, 1)]
    run(groups, OPTIONS[name], lambda ps, step: mixed_grads(ps, step, offset), implementation)


@loop_over(
    "name history implementation",
    pairwise(["momentum-clip", "dampening-joint", "nesterov-paper", "unadapted-maximize"], HISTORIES, IMPLEMENTATIONS),
)
def test_equals_reference_in_every_history(name: str, history: str, implementation: str) -> None:
    params = make_params(torch.float32)
    how = IMPLEMENTATIONS[implementation]
    run([{"params": params}], OPTIONS[name], lambda ps, step: make_grads(history, ps, step), how)


@pytest.mark.slow
@implementations
def test_equals_reference_for_every_combination_of_options(implementation: Options) -> None:
    """Dtypes, layouts and histories cycle over the combinations."""
    names = list(LAYOUTS)
    for i, options in enumerate(all_options()):
        layouts = [names[(i + 4 * j) % len(names)] for j in range(4)]
        params = make_params(DTYPES[i % len(DTYPES)], layouts=layouts)
        run([{"params": params}], options, lambda ps, step, i=i: mixed_grads(ps, step, i), implementation, steps=3)


@implementations
@dtypes
def test_writes_only_its_own_elements(dtype: torch.dtype, implementation: Options) -> None:
    params = make_params(dtype)
    before = [neighbours(p) for p in params]
    assert any(outside.numel() for outside in before)
    optimizer = LARS(params, **OPTIONS["momentum-joint"], **implementation)
    for step in range(2):
        set_grads(params, make_grads("same_strides", params, step))
        optimizer.step()
    for param, outside in zip(params, before, strict=True):
        assert torch.equal(neighbours(param), outside)


@implementations
def test_options_are_per_group_and_groups_may_mix_dtypes(implementation: Options) -> None:
    names = ["momentum", "dampening", "nesterov-joint", "unadapted", "clip-paper", "adapt-maximize", "no_decay"]
    groups: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        params = [p for dtype in REAL + COMPLEX for p in make_params(dtype, layouts=["matrix", "conv"], seed=i)]
        groups.append({"params": params, **OPTIONS[name]})
    run(groups, {"lr": 1.0}, lambda ps, step: mixed_grads(ps, step, 0), implementation)


@loop_over(
    "name dtype implementation",
    pairwise(["skip_nonfinite", "everything", "everything_but_adapt", "everything_but_joint"], DTYPES, IMPLEMENTATIONS),
)
def test_skip_nonfinite_leaves_its_groups_alone(name: str, dtype: torch.dtype, implementation: str) -> None:
    layouts = ["matrix", "scalar", "conv", "empty"]
    groups = [
        {"params": make_params(dtype, layouts=layouts, seed=1)},
        {"params": make_params(dtype, layouts=layouts, seed=2), "adapt": False, "lr_in_momentum": False},
        {"params": make_params(dtype, layouts=layouts, seed=3), "skip_nonfinite": False},
    ]

    def grads_of(params: Sequence[Tensor], step: int) -> list[Tensor | None]:
        return [nonfinite(p, step, i) for i, p in enumerate(params)]

    options = {"momentum": 0.9, **OPTIONS[name], "skip_nonfinite": True}
    optimizer = run(groups, options, grads_of, IMPLEMENTATIONS[implementation], 3)
    # the reference has agreed on which groups move; here, those that must not move keep their bits
    params = optimizer.param_groups[0]["params"] + optimizer.param_groups[1]["params"]
    before = [(p.detach().clone(), b.clone()) for p, b in zip(params, buffers_of(optimizer), strict=False)]
    set_grads(params, grads_of(params, 1))
    optimizer.step()
    for param, buffer, (old, old_buffer) in zip(params, buffers_of(optimizer), before, strict=False):
        assert torch.equal(param, old) and torch.equal(buffer, old_buffer)


@implementations
def test_a_gradient_that_is_not_finite_shows_without_skip_nonfinite(implementation: Options) -> None:
    params = make_params(torch.float32, layouts=["matrix", "conv"])
    run(
        [{"params": params}],
        BASE,
        lambda ps, step: [nonfinite(p, step + 1, i) for i, p in enumerate(ps)],
        implementation,
        1,
    )
    assert not params[0].isfinite().all() and params[1].isfinite().all()


@implementations
@loop_over("feature", [name for name in FEATURES if name not in ("adapt", "skip_nonfinite")])
def test_flipping_an_option_changes_the_result(feature: str, implementation: Options) -> None:
    """adapt=True only repeats what weight decay implies; skip_nonfinite needs a gradient that is not finite."""
    needs = {
        "no_decay": {"adapt": True}, "paper": {"momentum": 0.9}, "dampening": {"momentum": 0.9}, "kahan": {"adapt": False},
    }  # fmt: skip
    plain = {**BASE, **needs.get(feature, {})}
    results = []
    for options in (plain, {**plain, **FEATURES[feature]}):
        params = make_params(torch.bfloat16 if "kahan" in feature else torch.float64, layouts=["matrix"])
        optimizer = LARS(params, **options, **implementation)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = options["lr"] / (step + 1)
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
        results.append(params[0].detach())
    assert not torch.allclose(*results, rtol=1e-6)


@implementations
@dtypes
def test_joint_norm_of_zero_keeps_the_decay(dtype: torch.dtype, implementation: Options) -> None:
    """If the gradient is -weight_decay * w, decay and gradient cancel and the tensor does not move."""
    params = [torch.nn.Parameter(torch.full((size,), 3.0, dtype=dtype)) for size in (2, 20_000)]
    optimizer = LARS(params, lr=1.0, weight_decay=0.5, trust_denominator="joint", **implementation)
    set_grads(params, [-0.5 * p.detach() for p in params])
    optimizer.step()
    assert all(torch.equal(p, torch.full_like(p, 3.0)) for p in params)


@implementations
@loop_over("option", ["trust_coefficient", "eps", "adapt"])
def test_numbers_and_adapt_change_the_result(option: str, implementation: Options) -> None:
    results = []
    for value in {"trust_coefficient": (0.1, 0.2), "eps": (0.0, 0.5), "adapt": (True, False)}[option]:
        params = make_params(torch.float64, layouts=["matrix"])
        optimizer = LARS(params, **{**BASE, option: value}, **implementation)
        set_grads(params, make_grads("dense", params, 0))
        optimizer.step()
        results.append(params[0].detach())
    assert not torch.allclose(*results, rtol=1e-6)


@loop_over(
    "name lr_dtype shape implementation",
    pairwise(
        ["momentum-clip", "nesterov-paper", "unadapted-paper", "base", "unadapted"],
        [torch.float32, torch.float64],
        [(), (1,)],
        IMPLEMENTATIONS,
    ),
)
def test_tensor_lr_as_float_lr(name: str, lr_dtype: torch.dtype, shape: tuple[int, ...], implementation: str) -> None:
    results = []
    for tensor in (False, True):
        options = dict(OPTIONS[name])
        if tensor:
            options["lr"] = torch.full(shape, options["lr"], dtype=lr_dtype)
        params = make_params(torch.float64)
        optimizer = LARS(params, **options, **IMPLEMENTATIONS[implementation])
        for step in range(3):
            if tensor:
                optimizer.param_groups[0]["lr"].mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
            set_grads(params, mixed_grads(params, step, 0))
            optimizer.step()
        results.append([p.detach() for p in params])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


@implementations
@loop_over("name", ["momentum", "nesterov-joint", "momentum-unadapted"])
def test_float32_gradients_of_bfloat16_parameters(name: str, implementation: Options) -> None:
    params = make_params(torch.bfloat16)
    if not hasattr(params[0], "grad_dtype"):
        pytest.skip("torch before 2.10 allows no gradient of another dtype than its parameter's")
    for param in params:
        param.grad_dtype = torch.float32

    def grads_of(ps: Sequence[Tensor], step: int) -> list[Tensor | None]:
        return make_grads("dense", [p.detach().float() for p in ps], step)

    optimizer = run([{"params": params}], OPTIONS[name], grads_of, implementation)
    assert all(buffer.dtype == torch.bfloat16 for buffer in buffers_of(optimizer))


@implementations
def test_frozen_and_unfrozen_layers(implementation: Options) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    first = list(model[0].parameters())
    options = OPTIONS["dampening"]
    optimizer = LARS(model.parameters(), **options, **implementation)
    reference = ReferenceLARS([{"params": list(model.parameters())}], **options)
    for step in range(6):
        for param in first:
            param.requires_grad_(step in (2, 3, 5))
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)).square().sum().backward()
        grads = [p.grad for p in model.parameters()]
        assert (grads[0] is None) == (step in (0, 1, 4))
        reference.step(grads)
        optimizer.step()
        assert_equals(reference, optimizer, f"step {step}")


@option_sets
def test_implementations_agree_state_by_state(name: str) -> None:
    results = []
    for implementation in IMPLEMENTATIONS.values():
        params = make_params(torch.float64) + make_params(torch.float32) + make_params(torch.complex128)
        optimizer = LARS(params, **OPTIONS[name], **implementation)
        for step in range(STEPS):
            set_grads(params, mixed_grads(params, step, 0))
            optimizer.step()
        results.append((params, [dict(optimizer.state.get(p, {})) for p in params]))
    params, states = results[0]
    for other_params, other_states in results[1:]:
        for param, other, state, other_state in zip(params, other_params, states, other_states, strict=True):
            wide = {"rtol": 1e-4, "atol": 1e-5} if param.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
            torch.testing.assert_close(other, param, **wide)
            assert state.keys() == other_state.keys()
            for key in state:
                torch.testing.assert_close(other_state[key], state[key], **wide)


def test_layouts_cover_what_is_promised() -> None:
    assert {"scalar", "empty", "strided", "transposed", "channels_last"} <= set(LAYOUTS)

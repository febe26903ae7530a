"""The functional lars(): None buffers, empty lists, a scaler's grad_scale and found_inf, and equality with the class."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BASE, COMPLEX, OPTIONS, REAL, Options, make_grads, make_params, pairwise
from fastlars import LARS, lars
from fastlars import options as fields
from fastlars.backends import split
from fastlars.buckets import Group
from harness import (
    IMPLEMENTATIONS,
    buffers_of,
    ignore_nothing_adapted,
    implementations,
    loop_over,
    option_sets,
    set_grads,
)
from reference import ReferenceLARS, to_array

pytestmark = ignore_nothing_adapted
DTYPES = (*REAL, *COMPLEX)
# torch's SGD and every option that leaves it; no dampening, which found_inf excludes
NAMES = ["base", "momentum", "nesterov-joint", "momentum-unadapted", "unadapted", "unadapted-maximize", "everything"]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    return [param.detach() for param in make_params(dtype)]


def bits(tensors: list[Tensor]) -> list[Tensor]:
    """As bits, so that NaN equals NaN and 0 is not -0."""
    return [torch.view_as_real(t).contiguous() if t.is_complex() else t.contiguous() for t in tensors]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    pairs = zip(bits(left), bits(right), strict=True)
    return all(torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)) for a, b in pairs)


@implementations
@option_sets
def test_equals_the_class(name: str, implementation: Options) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        params, of_class = tensors(dtype), make_params(dtype)
        buffers: list[Tensor | None] = [None] * len(params)
        kept: list[Tensor | None] = [None] * len(params)
        optimizer = LARS(of_class, **OPTIONS[name], **implementation)
        for step in range(3):
            grads = make_grads("dense", params, step)
            set_grads(of_class, grads)
            optimizer.step()
            lars(params, grads, buffers, compensations=kept, **OPTIONS[name], **implementation)
            assert same_bits(params, [p.detach() for p in of_class])
            of_optimizer = buffers_of(optimizer, "compensation")
            assert [c is None for c in kept] == [c is None for c in of_optimizer]
            assert all(torch.equal(a, b) for a, b in zip(kept, of_optimizer, strict=True) if a is not None)
            if OPTIONS[name].get("momentum"):
                pairs = zip(buffers, buffers_of(optimizer), strict=True)
                # torch's SGD creates a first buffer as a copy of the gradient, the class as zeros that it adds to: 0 - 0 = 0
                assert all(torch.equal(left, right) for left, right in pairs)
            else:
                assert buffers == [None] * len(params)


@implementations
def test_replaces_none_and_updates_buffers_in_place(implementation: Options) -> None:
    for name in ("momentum", "dampening", "dampening-unadapted", "nesterov-joint", "skip_nonfinite"):
        options = {"momentum": 0.9, **OPTIONS[name]}
        params = tensors(torch.float32)
        buffers: list[Tensor | None] = [None, *[torch.ones_like(p) for p in params[1:]]]
        given, places = buffers[1:], buffers
        lars(params, make_grads("dense", params, 0), buffers, **options, **implementation)
        assert places is buffers and all(new is old for new, old in zip(buffers[1:], given, strict=True))
        assert buffers[0].shape == params[0].shape and buffers[0].any()
        assert all(old.numel() == 0 or not torch.equal(old, torch.ones_like(old)) for old in given)


@implementations
@pytest.mark.parametrize("adapt", [True, False])
def test_a_first_step_is_known_tensor_by_tensor(adapt: bool, implementation: Options) -> None:
    options = {**OPTIONS["dampening"], "adapt": adapt}
    params = [torch.ones(3), torch.ones(3)]
    buffers: list[Tensor | None] = [None, torch.zeros(3)]
    lars(params, [torch.ones(3)] * 2, buffers, **options, **implementation)
    torch.testing.assert_close(buffers[1], (1 - options["dampening"]) * buffers[0])


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, 2),
        ({"trust_denominator": "joint"}, 2),
        ({"skip_nonfinite": True}, 2),
        ({"trust_denominator": "joint", "skip_nonfinite": True}, 3),
        ({"adapt": False}, 0),
        ({"adapt": False, "skip_nonfinite": True}, 1),
        ({"adapt": False, "skip_nonfinite": True, "trust_denominator": "joint"}, 1),
    ],
    ids=str,
)
def test_only_norms_that_an_update_needs_are_taken(options: Options, rows: int) -> None:
    for name, implementation in IMPLEMENTATIONS.items():
        known = fields.Options(**{**BASE, **options, **implementation})
        (bucket,) = split(Group([torch.ones(3)], [torch.ones(3)], [], [], known))
        assert bucket.backend.name == name
        measured = {id(each) for each in bucket.backend.measure(bucket, False) if each is not None}
        # the fused step itself takes the norms of an adapted tensor, while it is in cache
        expected = int("skip_nonfinite" in options) if name == "fused" else rows
        assert len(measured) == expected


@implementations
def test_empty_lists(implementation: Options) -> None:
    lars([], [], [], lr=0.1, skip_nonfinite=True, **implementation)
    lars([], [], [], lr=0.1, momentum=0.9, found_inf=torch.ones(()), **implementation)
    params = tensors(torch.float32)
    before = [p.clone() for p in params]
    lars(params, make_grads("dense", params, 0), [], **BASE, **implementation)  # no momentum: no buffers are read
    assert not same_bits(params, before)


def poisoned(params: list[Tensor], value: float) -> list[Tensor]:
    grads = make_grads("dense", params, 0)
    for grad in grads:
        grad.fill_(value)
    return grads


@loop_over("name shape implementation", pairwise(NAMES, [(), (1,)], IMPLEMENTATIONS))
def test_nothing_changes_on_overflow(name: str, shape: tuple[int, ...], implementation: str) -> None:
    options = {**OPTIONS[name], **IMPLEMENTATIONS[implementation]}
    for dtype in DTYPES:
        for value in (1.0, torch.inf, torch.nan):
            params = tensors(dtype)
            for param in params:
                if param.dim() == 2 and param.numel():
                    param[0, 0], param[0, 1] = torch.inf, torch.nan
            buffers: list[Tensor | None] = [torch.full_like(p, 0.5) for p in params] if options.get("momentum") else []
            before = [t.clone() for t in (*params, *buffers)]
            scaler = {"grad_scale": torch.full(shape, 8.0), "found_inf": torch.ones(shape)}
            lars(params, poisoned(params, value), buffers, **options, **scaler)
            assert same_bits([*params, *buffers], before)


@implementations
@loop_over("name", [name for name in NAMES if OPTIONS[name].get("momentum")])
def test_an_overflow_on_the_first_step_leaves_no_buffer_or_zeros(name: str, implementation: Options) -> None:
    """The next step must be a first step."""
    results = []
    for overflows in (True, False):
        params = tensors(torch.float32)
        buffers: list[Tensor | None] = [None] * len(params)
        call: dict[str, Any] = {**OPTIONS[name], **implementation}
        if overflows:
            lars(params, poisoned(params, torch.nan), buffers, **call, found_inf=torch.ones(()))
            assert all(buffer is None or not buffer.any() for buffer in buffers)
        lars(params, make_grads("dense", params, 1), buffers, **call, found_inf=torch.zeros(()))
        results.append([*params, *buffers])
    assert same_bits(*results)


@loop_over("name found_inf implementation", pairwise(NAMES, [None, False], IMPLEMENTATIONS))
def test_gradients_are_divided_by_grad_scale(name: str, found_inf: bool | None, implementation: str) -> None:
    params = tensors(torch.float64)
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    buffers: list[Tensor | None] = [None] * len(params)
    for step, scale in enumerate((3.0, 0.7)):
        grads = make_grads("dense", params, step)
        flag = None if found_inf is None else torch.zeros(1)
        scaler = {"grad_scale": torch.full((), scale, dtype=torch.float64), "found_inf": flag}
        reference.step(grads, grad_scale=scale)
        lars(params, grads, buffers, **OPTIONS[name], **IMPLEMENTATIONS[implementation], **scaler)
        for param, expected in zip(params, reference.params, strict=True):
            # grad_scale is read as float32, as GradScaler makes it
            torch.testing.assert_close(
                torch.as_tensor(to_array(param)), torch.as_tensor(expected), rtol=1e-6, atol=1e-7
            )
            assert param.dtype == torch.float64


@implementations
@loop_over("adapt", [True, False])
@loop_over("skip", [{"found_inf": torch.zeros(())}, {"skip_nonfinite": True}])
def test_dampening_refuses_a_step_that_may_be_skipped(skip: Options, adapt: bool, implementation: Options) -> None:
    params = tensors(torch.float32)
    buffers: list[Tensor | None] = [None] * len(params)
    before = [p.clone() for p in params]
    options = {**OPTIONS["dampening"], "adapt": adapt, **implementation, **skip}
    with pytest.raises(ValueError, match="needs dampening == 0, got dampening=0"):
        lars(params, make_grads("dense", params, 0), buffers, **options)
    assert same_bits(params, before) and buffers == [None] * len(params)
    # without momentum, dampening has no effect
    lars(params, make_grads("dense", params, 0), [], **{**options, "momentum": 0.0})
    assert not same_bits(params, before)


@implementations
@loop_over("name", ["base", "momentum-joint", "nesterov-paper", "skip_nonfinite", "momentum-unadapted"])
def test_conjugate_views_are_updated(name: str, implementation: Options) -> None:
    """Their real view is a copy, so an update of it would be lost."""
    values, grads = torch.randn(2, 5, 3, dtype=torch.complex64)
    plain, view = values.clone(), values.conj().clone().conj()
    assert view.is_conj() and torch.equal(plain, view)
    for param in (plain, view):
        lars([param], [grads], [None], **OPTIONS[name], **implementation)
    assert not torch.equal(plain, values)
    torch.testing.assert_close(view.resolve_conj(), plain)

"""The reference itself: numbers worked out by hand from the formula, and torch's SGD if nothing is adapted."""

import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from cases import (
    COMPLEX,
    FEATURES,
    HISTORIES,
    LAYOUTS,
    LR_FACTORS,
    OPTIONS,
    PAIRWISE,
    REAL,
    STEPS,
    all_options,
    is_valid,
    make_grads,
    make_params,
    neighbours,
    nonfinite,
    pairwise,
    tolerance,
)
from harness import loop_over
from reference import DEFAULTS, ReferenceLARS, is_adapted, norm, to_array, trust_ratio

W = [3.0, 4.0]
G = [0.6, 0.8]
ADAPTED = {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.1, "eps": 0.0}


# |w| = 5, |G| = 1, |[0, -0.8]| = 0.8
@pytest.mark.parametrize(
    ("options", "w", "g", "expected"),
    [
        pytest.param({"adapt": False}, W, G, [2.55, 3.4], id="unadapted: d = [0.9, 1.2]"),
        pytest.param({"weight_decay": 0.0}, W, G, [2.7, 3.6], id="adapt None, no decay: d = g"),
        pytest.param({"weight_decay": 0.0, "adapt": True}, W, G, [2.85, 3.8], id="lam = 0.5 / 1"),
        pytest.param({}, W, G, [2.85, 3.8], id="lam = 0.5 / 1.5"),
        pytest.param({"eps": 0.5}, W, G, [2.8875, 3.85], id="lam = 0.5 / 2"),
        pytest.param({"maximize": True}, W, G, [3.05, 4 + 0.2 / 3], id="g = -G, lam = 1 / 3"),
        pytest.param({}, W, [0.0, 0.0], W, id="zero gradient: no decay"),
        pytest.param({}, [0.0, 0.0], G, [-0.3, -0.4], id="zero parameter: d = g"),
        pytest.param(
            {"trust_denominator": "joint", "trust_coefficient": 0.05}, W, [0.0, -0.8], [2.925, 4.1],
            id="joint: lam = 0.25 / |[0.3, -0.4]|",
        ),
        pytest.param(
            {"trust_denominator": "joint", "trust_coefficient": 0.05, "eps": 0.5}, W, [0.0, -0.8], [2.9625, 4.05],
            id="joint, eps: lam = 0.25 / (0.5 + 0.5)",
        ),
        pytest.param(
            {"trust_denominator": "joint", "trust_coefficient": 0.05}, W, [0.0, 0.0], [2.925, 3.9],
            id="joint, zero gradient: lam = 0.25 / 0.5, decay alone",
        ),
        pytest.param({"trust_denominator": "joint"}, [0.0, 0.0], G, [-0.3, -0.4], id="joint, zero parameter"),
        pytest.param(
            {"trust_denominator": "joint", "weight_decay": 0.5}, W, [-1.5, -2.0], W, id="joint, g + weight_decay w = 0"
        ),
        pytest.param({"trust_clip": True}, W, G, [2.7, 3.6], id="clip: lam = (1 / 3) / 0.5"),
        pytest.param({"trust_clip": True, "lr": 0.25}, W, G, [2.775, 3.7], id="clip: lam = min(4 / 3, 1)"),
        pytest.param({"trust_clip": True, "lr": 0.0}, W, G, W, id="clip, lr 0"),
        pytest.param({"trust_clip": True, "lr": 2.0}, [0.0, 0.0], G, [-1.2, -1.6], id="clip leaves a zero norm's lam"),
        pytest.param(
            {"trust_clip": True, "lr": 2.0, "trust_denominator": "joint"}, [0.0, 0.0], G, [-1.2, -1.6],
            id="joint, clip leaves a zero norm's lam",
        ),
        pytest.param({}, [3 + 4j], [0.6 - 0.8j], [2.85 + (4 + 0.2 / 3) * 1j], id="complex: one norm, lam = 1 / 3"),
    ],
)  # fmt: skip
def test_one_step_by_hand(options: dict[str, Any], w: Any, g: Any, expected: Any) -> None:
    reference = ReferenceLARS([{"params": [w], **ADAPTED, **options}])
    reference.step([g])
    np.testing.assert_allclose(reference.params[0], expected, rtol=1e-14)
    assert reference.momentum_buffers == [None]


# w = [1, 1], unadapted, momentum 0.5, lr 0.1 then 0.2, gradients [1, 2] then [2, -4]
@pytest.mark.parametrize(
    ("options", "first", "second", "buffer"),
    [
        ({}, [0.9, 0.8], [0.4, 1.4], [2.5, -3.0]),
        ({"dampening": 0.25}, [0.9, 0.8], [0.5, 1.2], [2.0, -2.0]),
        ({"nesterov": True}, [0.85, 0.7], [0.2, 1.8], [2.5, -3.0]),
        ({"lr_in_momentum": True}, [0.9, 0.8], [0.45, 1.5], [0.45, -0.7]),
        ({"lr_in_momentum": True, "dampening": 0.25}, [0.9, 0.8], [0.55, 1.3], [0.35, -0.5]),
        ({"lr_in_momentum": True, "nesterov": True}, [0.85, 0.7], [0.225, 1.85], [0.45, -0.7]),
        ({"maximize": True}, [1.1, 1.2], [1.6, 0.6], [-2.5, 3.0]),
    ],
)
def test_momentum_by_hand(options: dict[str, Any], first: Any, second: Any, buffer: Any) -> None:
    reference = ReferenceLARS([{"params": [[1.0, 1.0]], "lr": 0.1, "momentum": 0.5, "adapt": False, **options}])
    reference.step([[1.0, 2.0]])
    np.testing.assert_allclose(reference.params[0], first, rtol=1e-14)
    reference.groups[0]["lr"] = 0.2
    reference.step([None])
    np.testing.assert_array_equal(reference.params[0], first)
    reference.step([[2.0, -4.0]])
    np.testing.assert_allclose(reference.params[0], second, rtol=1e-14)
    np.testing.assert_allclose(reference.momentum_buffers[0], buffer, rtol=1e-14)


def test_the_ratio_as_a_number() -> None:
    w, g = to_array(W), to_array(G)
    assert trust_ratio(w, g, **ADAPTED) == pytest.approx(1 / 3, rel=1e-15)
    assert trust_ratio(w, g, **ADAPTED, trust_clip=True) == pytest.approx(2 / 3, rel=1e-15)
    assert trust_ratio(w, 0 * g, **ADAPTED) == 1.0
    assert trust_ratio(w, g, **ADAPTED, adapt=False) == 1.0
    assert norm(to_array([3e-200, 4e-200])) == pytest.approx(5e-200, rel=1e-15)


def test_gradient_scale_and_overflow() -> None:
    reference = ReferenceLARS([{"params": [W], **ADAPTED, "momentum": 0.9, "dampening": 0.5}])
    reference.step([[np.inf, 1.0]], grad_scale=8.0, found_inf=True)
    assert reference.momentum_buffers == [None]
    np.testing.assert_array_equal(reference.params[0], W)
    reference.step([[4.8, 6.4]], grad_scale=torch.tensor([8.0]), found_inf=torch.tensor(0.0))
    np.testing.assert_allclose(reference.params[0], [2.85, 3.8], rtol=1e-14)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_skip_covers_all_groups_that_set_it(bad: float) -> None:
    groups = [{"params": [W], "skip_nonfinite": skip} for skip in (True, True, False)]
    reference = ReferenceLARS(groups, **ADAPTED, momentum=0.9)
    reference.step([[bad, 1.0], G, G])
    np.testing.assert_array_equal(reference.params[:2], [W, W])
    assert reference.momentum_buffers[:2] == [None, None]
    np.testing.assert_allclose(reference.params[2], [2.85, 3.8], rtol=1e-14)
    reference.step([None, G, [bad, 1.0]])
    np.testing.assert_allclose(reference.params[1], [2.85, 3.8], rtol=1e-14)
    assert not np.isfinite(reference.params[2]).all()


def test_unknown_and_missing_options_are_refused() -> None:
    with pytest.raises(TypeError, match="trust_coeficient"):
        ReferenceLARS([{"params": [W], "lr": 0.1, "trust_coeficient": 0.1}])
    with pytest.raises(TypeError, match="missing options"):
        ReferenceLARS([{"params": [W]}])


@loop_over("options", [o for o in all_options() if o["momentum"] and not o.get("lr_in_momentum")][::7])
def test_lr_in_momentum_differs_only_when_lr_changes(options: dict[str, Any]) -> None:
    # trust_clip reads lr, but both use the same lr
    for factors, same in [((1.0, 1.0, 1.0), True), ((1.0, 0.5, 2.0), False)]:
        outside, inside = (
            ReferenceLARS([{"params": [W, [[1.0]]], **options, "lr_in_momentum": inside}]) for inside in (False, True)
        )
        for factor in factors:
            for reference in (outside, inside):
                reference.groups[0]["lr"] = 0.5 * factor
                reference.step([G, [[-2.0]]])
        for a, b in zip(outside.params, inside.params, strict=True):
            assert np.allclose(a, b, rtol=1e-12) == same


SGD_OPTIONS = {
    "-".join(names): {key: value for name in names for key, value in FEATURES[name].items()}
    for names in itertools.product(("momentum", "dampening", "nesterov", "unadapted"), ("no_decay", "maximize"))
}


@loop_over("name history", [(n, h) for i, n in enumerate(SGD_OPTIONS) for h in list(HISTORIES)[i % 2 :: 2]])
def test_sgd_in_double_precision(name: str, history: str) -> None:
    """Over several steps without realigning, with a changing lr."""
    options = SGD_OPTIONS[name]
    params = [*make_params(torch.float64), *make_params(torch.complex128)]
    options = {"lr": 0.5, "weight_decay": 0.05} | {key: value for key, value in options.items() if key != "adapt"}
    sgd = torch.optim.SGD(params, **options, foreach=False)
    reference = ReferenceLARS([{"params": params, **options, "adapt": False}])
    for step in range(STEPS):
        sgd.param_groups[0]["lr"] = reference.groups[0]["lr"] = options["lr"] * LR_FACTORS[step]
        grads = make_grads(history, params, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        sgd.step()
        reference.step(grads)
        for param, expected, size in zip(params, reference.params, reference.param_sizes, strict=True):
            np.testing.assert_allclose(to_array(param), expected, rtol=1e-13, atol=1e-14 * size)
        for param, expected in zip(params, reference.momentum_buffers, strict=True):
            buffer = sgd.state[param].get("momentum_buffer")
            assert (buffer is None) == (expected is None)
            if expected is not None:
                np.testing.assert_allclose(to_array(buffer), expected, rtol=1e-13, atol=1e-11)


@pytest.mark.parametrize("history", HISTORIES)
@loop_over("dtype", [torch.float32, torch.complex64])
def test_the_tolerance_fits_one_step_of_sgd(dtype: torch.dtype, history: str) -> None:
    params = make_params(dtype)
    options = {"lr": 0.5, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05}
    sgd = torch.optim.SGD(params, **options, foreach=False)
    reference = ReferenceLARS([{"params": params, **options, "adapt": False}])
    wrong = ReferenceLARS([{"params": params, **options, "adapt": False, "momentum": 0.899}])
    detected = False
    for step in range(STEPS):
        grads = make_grads(history, params, step)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        sgd.step()
        for candidate in (reference, wrong):
            candidate.step(grads)
        for i, param in enumerate(params):
            bounds = tolerance(dtype, reference.param_sizes[i])
            np.testing.assert_allclose(to_array(param), reference.params[i], **bounds)
            detected |= not np.allclose(to_array(param), wrong.params[i], **bounds)
        buffers = [sgd.state[param].get("momentum_buffer") for param in params]
        for candidate in (reference, wrong):
            candidate.realign(params, buffers)
    assert detected == (history != "never")


@loop_over("dtype", REAL + COMPLEX)
def test_cases_match_their_names(dtype: torch.dtype) -> None:
    params = make_params(dtype)
    by_name = dict(zip(LAYOUTS, params, strict=True))
    for param, again in zip(params, make_params(dtype), strict=True):
        assert param.is_leaf
        assert param.stride() == again.stride()
        torch.testing.assert_close(param, again, rtol=0, atol=0)
    assert by_name["channels_last"].is_contiguous(memory_format=torch.channels_last)
    assert not by_name["transposed"].is_contiguous()
    assert by_name["strided"].stride() == (2,)
    assert by_name["offset"].storage_offset() == 3
    assert neighbours(by_name["strided"]).numel() == 33
    assert neighbours(by_name["conv"]).numel() == 0
    for history in HISTORIES:
        for step in range(STEPS):
            for param, grad in zip(params, make_grads(history, params, step), strict=True):
                if grad is None:
                    continue
                assert (grad.shape, grad.dtype) == (param.shape, dtype)
                assert grad.isfinite().all()
                if param.dim() and param.numel() > 1 and history in ("other_layout", "same_strides"):
                    assert (grad.stride() == param.stride()) == (history == "same_strides")
    assert [int((~nonfinite(by_name["vector"], step, 0).isfinite()).sum()) for step in range(4)] == [0, 1, 1, 0]
    assert nonfinite(by_name["vector"], 1, 1).isfinite().all()
    assert nonfinite(by_name["scalar"], 1, 0).isinf()


def test_option_sets_are_valid_and_distinct() -> None:
    assert all(is_valid(options) for options in OPTIONS.values())
    assert len({str(sorted(options.items())) for options in PAIRWISE.values()}) == len(PAIRWISE)
    assert sum(1 for _ in all_options()) == 864
    assert any(is_adapted(options) for options in OPTIONS.values())


def test_any_two_values_of_two_columns_occur_together() -> None:
    columns = [(1, 2, 3), "ab", (True, False), "xyz"]
    rows = pairwise(*columns)
    for i, j in itertools.combinations(range(len(columns)), 2):
        assert {(row[i], row[j]) for row in rows} == {*itertools.product(columns[i], columns[j])}
    assert 9 <= len(rows) < 36 / 2
    # combinations that never occur together are not expected
    assert {row[:2] for row in pairwise(*columns, valid=lambda x, y, *_: (x, y) != (1, "a"))} == {
        *itertools.product(*columns[:2])
    } - {(1, "a")}


def test_a_loop_takes_every_value_and_names_the_one_that_failed() -> None:
    seen = []

    @loop_over("x y", [(1, 2), (3, 4), (5, 6)])
    def test(x: int, y: int, other: str) -> None:
        seen.append((x, y, other))
        assert x < 5

    with pytest.raises(AssertionError) as raised:
        test(other="fixture")
    assert seen == [(1, 2, "fixture"), (3, 4, "fixture"), (5, 6, "fixture")]
    assert raised.value.__notes__ == ["with {'x': 5, 'y': 6}"]
    assert list(inspect.signature(test).parameters) == ["other"], "what pytest is to give"


def test_any_two_options_occur_together() -> None:
    """Each with both values: all that are valid together with momentum, and all but dampening without."""
    values: dict[str, tuple[Any, ...]] = {
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.25),
        "nesterov": (False, True),
        "weight_decay": (0.0, 0.05),
        "adapt": (None, True, False),
        **dict.fromkeys(("trust_clip", "lr_in_momentum", "skip_nonfinite", "maximize"), (False, True)),
        "trust_denominator": ("separate", "joint"),
    }
    rows = [{**DEFAULTS, **options} for options in PAIRWISE.values()]
    everything = [{**DEFAULTS, **options} for options in all_options()]
    for one, other in itertools.combinations(values, 2):
        for pair in itertools.product(values[one], values[other]):
            asked = dict(zip((one, other), pair, strict=True))
            possible = any(o.items() >= asked.items() for o in everything if o["momentum"] or not o["dampening"])
            explicit = asked in ({"weight_decay": 0.05, "adapt": True}, {"weight_decay": 0.0, "adapt": False})
            assert any(row.items() >= asked.items() for row in rows) == (possible and not explicit), asked

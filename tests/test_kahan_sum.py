"""kahan_sum: half-precision weights train, because the rounding error of a step is added to the next one."""

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import Options, make_grads, make_params
from fastlars import LARS, convert_state_dict, lars
from harness import IMPLEMENTATIONS, buffers_of, implementations, loop_over, pairs, set_grads
from reference import ReferenceLARS, norm, to_array

pytestmark = pytest.mark.filterwarnings("ignore:param group 0. half-precision weights round away:UserWarning")
HALF = (torch.bfloat16, torch.float16)
RELATIVE = (1e-5, 1e-4, 1e-3, 1e-2, 3e-2)  # how far a step moves a tensor, relative to its norm
halves = loop_over("dtype", HALF)


def compensation(optimizer: LARS) -> Tensor:
    (kept,) = buffers_of(optimizer, "compensation")
    assert kept is not None
    return kept


# ---------------------------------------------------------------- it trains
def path(dtype: torch.dtype, relative: float, momentum: float, options: Options) -> float:
    """How far 1,000 steps end from the reference with the same rounding, as a share of the distance covered."""
    generator = torch.Generator().manual_seed(0)
    weights, drift = (torch.randn(64, 8, generator=generator) for _ in range(2))
    param = Parameter((0.02 * weights).to(dtype))
    start = to_array(param)
    of_step = {"lr": 1000 * relative * (1 - momentum), "momentum": momentum, "weight_decay": 1e-4}
    optimizer, reference = LARS([param], **of_step, **options), ReferenceLARS([{"params": [param]}], **of_step)
    for _ in range(1000):
        param.grad = (0.3 * drift + torch.randn(64, 8, generator=generator)).to(dtype)
        reference.step([param.grad])
        reference.store(dtype)
        optimizer.step()
    kept = buffers_of(optimizer, "compensation")[0]
    end = to_array(param) + (0.0 if kept is None else to_array(kept))
    expected = reference.params[0] + reference.compensations[0]
    return norm(end - expected) / norm(expected - start)


SOME = [
    (torch.bfloat16, 1e-5, 0.9, "single"),
    (torch.bfloat16, 3e-2, 0.9, "foreach"),
    (torch.float16, 1e-5, 0.9, "foreach"),
]


@pytest.mark.parametrize(("dtype", "relative", "momentum", "how"), SOME, ids=str)
def test_a_thousand_steps_follow_the_reference(dtype: torch.dtype, relative: float, momentum: float, how: str) -> None:
    assert path(dtype, relative, momentum, IMPLEMENTATIONS[how]) < 0.01


@pytest.mark.slow
@pairs("dtype relative momentum how", HALF, RELATIVE, (0.0, 0.9), ("single", "foreach"))
def test_every_size_of_step_follows_the_reference(
    dtype: torch.dtype, relative: float, momentum: float, how: str
) -> None:
    assert path(dtype, relative, momentum, IMPLEMENTATIONS[how]) < 0.01
    if relative <= 1e-4:
        assert path(dtype, relative, momentum, {**IMPLEMENTATIONS[how], "kahan_sum": False}) > 0.6, (
            "without it they hardly move"
        )


# weight, compensation, and the smallest step that changes their sum: half the distance of neighbouring compensations.
# bfloat16: the worst place, just before the compensation is absorbed. float16: 2 ** -24 is next to 0.
SMALLEST = {torch.bfloat16: (1.0, 2.0**-8 - 2.0**-16, 2.0**-17), torch.float16: (2.0**-6, 0.0, 2.0**-25)}


@halves
@loop_over("factor survives", [(1.1, True), (0.9, False)])
def test_the_smallest_step_that_survives(dtype: torch.dtype, factor: float, survives: bool) -> None:
    """As docs/precision.md says."""
    start, rest, smallest = SMALLEST[dtype]
    weight, kept = torch.full((1,), start, dtype=dtype), [torch.full((1,), rest, dtype=dtype)]
    grad = torch.full((1,), -factor * smallest)
    lars([weight], [grad], [], lr=1.0, adapt=False, kahan_sum=True, compensations=kept)
    assert (weight.double() + kept[0].double() != start + rest) == survives


# ---------------------------------------------------------------- where it is on
@implementations
def test_on_by_default_for_adapted_half_types(implementation: Options) -> None:
    for kahan_sum, kept in (
        (None, {True: HALF, False: ()}),
        (True, {True: HALF, False: HALF}),
        (False, {True: (), False: ()}),
    ):
        for adapt in (True, False):
            params = [
                p for dtype in (*HALF, torch.float32, torch.complex64) for p in make_params(dtype, layouts=["matrix"])
            ]
            optimizer = LARS(params, lr=0.1, adapt=adapt, kahan_sum=kahan_sum, **implementation)
            set_grads(params, make_grads("dense", params, 0))
            optimizer.step()
            found = [p.dtype for p in params if "compensation" in optimizer.state.get(p, {})]
            assert found == list(kept[adapt]), (kahan_sum, adapt)


@implementations
def test_other_types_keep_their_bits(implementation: Options) -> None:
    results = []
    for kahan_sum in (None, True, False):
        params = [*make_params(torch.float32), *make_params(torch.complex64)]
        groups = [{"params": params[::2], "adapt": True}, {"params": params[1::2], "adapt": False}]
        optimizer = LARS(groups, lr=0.1, momentum=0.9, kahan_sum=kahan_sum, **implementation)
        for step in range(2):
            set_grads(params, make_grads("dense", params, step))
            optimizer.step()
        results.append(params)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@loop_over("implementation", IMPLEMENTATIONS)
@halves
def test_a_skipped_step_changes_no_bit(dtype: torch.dtype, implementation: str) -> None:
    params = make_params(dtype, layouts=["matrix", "scalar"])
    optimizer = LARS(params, lr=3e-3, momentum=0.9, adapt=True, skip_nonfinite=True, **IMPLEMENTATIONS[implementation])
    set_grads(params, make_grads("dense", params, 0))
    optimizer.step()
    before = [t.clone() for t in (*params, *buffers_of(optimizer), *buffers_of(optimizer, "compensation"))]
    assert before[-2].any()
    params[0].grad[0, 0] = torch.nan
    optimizer.step()
    after = [*params, *buffers_of(optimizer), *buffers_of(optimizer, "compensation")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# ---------------------------------------------------------------- state
def stepped(steps: int = 3, **options: Any) -> LARS:
    params = make_params(torch.bfloat16, layouts=["matrix"])
    optimizer = LARS(params, **{"lr": 3e-3, "momentum": 0.9, "adapt": True, **options})
    go_on(optimizer, steps)
    return optimizer


def go_on(optimizer: LARS, steps: int) -> None:
    (group,) = optimizer.param_groups
    for step in range(steps):
        set_grads(group["params"], make_grads("dense", group["params"], step))
        optimizer.step()


def loaded(state_dict: dict[str, Any], weight: Tensor, **options: Any) -> LARS:
    optimizer = LARS([Parameter(weight.detach().clone())], **{"lr": 3e-3, "momentum": 0.9, "adapt": True, **options})
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    return optimizer


def weight_of(optimizer: LARS) -> Tensor:
    weight: Tensor = optimizer.param_groups[0]["params"][0]
    return weight


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load"])
def test_a_copy_resumes_with_the_same_bits(way: str) -> None:
    first = stepped()
    second = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        "load": lambda optimizer: loaded(optimizer.state_dict(), weight_of(optimizer)),
    }[way](first)
    assert compensation(second) is not compensation(first) and compensation(second).dtype == torch.bfloat16
    for optimizer in (first, second):
        go_on(optimizer, 2)
    assert torch.equal(compensation(second), compensation(first)) and compensation(first).any()
    assert torch.equal(weight_of(second), weight_of(first))


def test_state_from_before_starts_at_zero_and_keeps_what_the_group_says() -> None:
    old = stepped(kahan_sum=False).state_dict()
    assert old["state"][0].keys() == {"momentum_buffer"}
    del old["param_groups"][0]["kahan_sum"]
    for kahan_sum in (None, True, False):
        optimizer = loaded(old, stepped().param_groups[0]["params"][0], kahan_sum=kahan_sum)
        assert optimizer.param_groups[0]["kahan_sum"] is kahan_sum
        fresh = copy.deepcopy(optimizer)
        fresh.state[weight_of(fresh)]["compensation"] = torch.zeros_like(weight_of(fresh), requires_grad=False)
        for each in (optimizer, fresh):
            go_on(each, 1)
        assert torch.equal(weight_of(optimizer), weight_of(fresh))
        assert ("compensation" in optimizer.state[weight_of(optimizer)]) == (kahan_sum is not False)


def test_off_and_on_again() -> None:
    """Turned off, the next step drops the compensation without folding it into the weights. On again, it starts at zero."""
    optimizer = stepped()
    (group,) = optimizer.param_groups
    group["kahan_sum"], alone = False, copy.deepcopy(optimizer)
    del alone.state[weight_of(alone)]["compensation"]
    for each in (optimizer, alone):
        go_on(each, 1)
    assert (
        torch.equal(weight_of(optimizer), weight_of(alone))
        and "compensation" not in optimizer.state[weight_of(optimizer)]
    )
    group["kahan_sum"] = None
    set_grads(group["params"], [torch.zeros_like(p) for p in group["params"]])
    group["lr"] = 0.0
    optimizer.step()
    assert not compensation(optimizer).any()


def test_a_float32_checkpoint_and_back() -> None:
    """As docs/precision.md shows: the compensation is the low half of a float32 weight."""
    wide = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    param = Parameter(wide.bfloat16())
    optimizer = LARS([param], lr=0.0, adapt=True)
    optimizer.state[param]["compensation"] = (wide - param.detach().float()).bfloat16()
    param.grad = torch.ones_like(param)
    optimizer.step()
    torch.testing.assert_close(param.detach().float() + compensation(optimizer).float(), wide, rtol=2.0**-16, atol=0)
    # float32 parameters do not take it; it had to be added to the weights before
    other = loaded(optimizer.state_dict(), param.float())
    assert "compensation" not in other.state.get(weight_of(other), {})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda c: c[:2], ValueError, "compensation of parameter 0 of param group 0 must be a floating tensor of shape (3, 5)"),
        (lambda c: c.long(), ValueError, "compensation of parameter 0 of param group 0 must be a floating tensor of shape (3, 5)"),
        (lambda c: c.tolist(), TypeError, "compensation of parameter 0 of param group 0 must be a tensor, got list"),
        (lambda c: c[:1, :1].expand(3, 5), ValueError, "compensation of parameter 0 of param group 0 must have its own memory"),
    ],
)  # fmt: skip
def test_wrong_compensations_are_refused(damage: Any, error: type[Exception], message: str) -> None:
    optimizer = stepped()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["compensation"] = damage(saved["state"][0]["compensation"])
    before = compensation(optimizer).clone()
    with pytest.raises(error) as raised:
        optimizer.load_state_dict(saved)
    assert message in str(raised.value)
    assert torch.equal(compensation(optimizer), before)


def test_compensations_share_no_memory() -> None:
    saved = stepped().state_dict()
    saved["state"][0]["compensation"] = saved["state"][0]["momentum_buffer"]
    with pytest.raises(
        ValueError, match=r"momentum_buffer under key 0 .* shares memory with the compensation under key 0"
    ):
        stepped().load_state_dict(saved)


# ---------------------------------------------------------------- the functional form, scripts, refusals
@halves
def test_the_functional_form(dtype: torch.dtype) -> None:
    optimizer = LARS([Parameter(p) for p in make_params(dtype, layouts=["matrix"])], lr=3e-3, adapt=True)
    go_on(optimizer, 3)
    params, kept = [p.detach() for p in make_params(dtype, layouts=["matrix"])], [None]
    for step in range(3):
        lars(params, make_grads("dense", params, step), [], lr=3e-3, adapt=True, compensations=kept)
    assert torch.equal(params[0], weight_of(optimizer)) and torch.equal(kept[0], compensation(optimizer))
    lars(params, make_grads("dense", params, 0), [], lr=3e-3, adapt=True, compensations=kept, kahan_sum=False)
    assert torch.equal(kept[0], compensation(optimizer)), "not read and not written"


def test_refusals() -> None:
    weight, grad = torch.ones(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="kahan_sum=True needs compensations"):
        lars([weight], [grad], [], lr=0.1, kahan_sum=True)
    with pytest.raises(RuntimeError, match=r"has a compensation of torch\.float32; replace it with torch.zeros_like"):
        lars([weight], [grad], [], lr=0.1, adapt=True, compensations=[torch.zeros(3)])
    with pytest.raises(ValueError, match="kahan_sum=True and differentiable=True exclude each other"):
        LARS([weight], lr=0.1, kahan_sum=True, differentiable=True)
    assert torch.equal(weight, torch.ones_like(weight))


# ---------------------------------------------------------------- the warning
@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"kahan_sum": False}, True),
        ({"kahan_sum": False, "lr": torch.tensor(3e-3)}, True),
        ({"kahan_sum": None}, False),
        ({"kahan_sum": True}, False),
        ({"kahan_sum": False, "lr": 16.0}, False),
        ({"kahan_sum": False, "adapt": False}, False),
    ],
)
def test_one_warning_where_steps_round_away(options: Options, warns: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stepped(2, **options)
    told = [
        str(each.message) for each in caught if "half-precision weights round away most of a step" in str(each.message)
    ]
    assert len(told) == warns
    if warns:
        assert (
            told[0].startswith(
                "param group 0: half-precision weights round away most of a step of 3e-06 of their norm."
            )
            and "Leave kahan_sum at None" in told[0]
        )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_converted_run_keeps_it(momentum: float) -> None:
    first = stepped(momentum=momentum)
    second = LARS([Parameter(weight_of(first).detach().clone())], lr=3e-3, momentum=momentum, adapt=True)
    second.load_state_dict(convert_state_dict(first.state_dict(), second))
    assert compensation(second).any() and compensation(second) is not compensation(first)
    for optimizer in (first, second):
        go_on(optimizer, 2)
    assert torch.equal(weight_of(second), weight_of(first))
    assert torch.equal(compensation(second), compensation(first))


# ---------------------------------------------------------------- compiled
@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)  # torch's own, from inside its compiler
@pytest.mark.parametrize("foreach", [True, False])
def test_a_compiled_step_keeps_rounding_errors(foreach: bool) -> None:
    """Inductor removes a conversion that is converted back, and every compensation with it."""
    for dtype in HALF:
        params = [make_params(dtype, layouts=["matrix", "vector", "conv"]) for _ in range(2)]
        eager, compiled = (LARS(each, lr=0.1, momentum=0.9, adapt=True, foreach=foreach) for each in params)
        step = torch.compile(compiled.step)
        for i in range(4):
            for each in params:
                set_grads(each, make_grads("dense", each, i))
            eager.step()
            step()
        kept = [buffers_of(optimizer, "compensation") for optimizer in (eager, compiled)]
        for ours, theirs, (c, d) in zip(*params, zip(*kept, strict=True), strict=True):
            total, expected = theirs.double() + d.double(), ours.double() + c.double()
            limit = torch.finfo(dtype).eps ** 2 * float(expected.detach().abs().max())
            torch.testing.assert_close(total, expected, rtol=0, atol=limit)
            assert d.any()

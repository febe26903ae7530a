"""A run of another optimizer resumes with LARS from its converted state. State that LARS would ignore is refused.

The other optimizers run the formulas of sources.py. Their state dicts are written here as their code writes them.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fastlars import DIALECTS, LARS, convert_state_dict, param_groups, schedules
from harness import loop_over, set_grads
from reference import Array, norm, to_array
from sources import SOURCES, M, Source

DECAY, C = 0.05, 0.1
LRS = (0.5, 2.0, 0.25, 1.5, 0.1, 3.0)
SWITCH = 3  # steps of the other optimizer


def a_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3)).double()


def gradients(step: int) -> list[Array]:
    rng = np.random.default_rng(step)
    return [rng.standard_normal(tuple(p.shape)) for p in a_model().parameters()]


def is_vector(values: Array | Tensor) -> bool:
    return values.ndim <= 1


class Theirs:
    """The other optimizer over the model's parameters in their order, with vectors neither adapted nor decayed."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.params = [to_array(p) for p in a_model().parameters()]
        self.buffers: list[Array | None] = [None] * len(self.params)

    def step(self, step: int, lr: float) -> None:
        for i, g in enumerate(gradients(step)):
            w = self.params[i]
            d = g if is_vector(w) else self.source.direction(w, g, lr, DECAY, C)
            self.params[i], self.buffers[i] = self.source.momentum(w, d, self.buffers[i], lr, False, 0.0)


def go_on(optimizer: LARS, model: torch.nn.Module, step: int, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    params = list(model.parameters())
    set_grads(params, [torch.tensor(g) for g in gradients(step)])
    optimizer.step()


def model_with(values: Iterable[Array]) -> torch.nn.Module:
    model = a_model()
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(torch.tensor(value))
    return model


def assert_same(model: torch.nn.Module, theirs: Theirs, where: str) -> None:
    for p, expected in zip(model.parameters(), theirs.params, strict=True):
        np.testing.assert_allclose(to_array(p), expected, rtol=1e-11, atol=1e-13, err_msg=where)


# ---------------------------------------------------------------- the same dialect resumes exactly
Buffers = list[Tensor]
Group = dict[str, Any]


def one_group(key: str, **group: Any) -> Callable[[Buffers, float], dict[str, Any]]:
    """All parameters in one group, as in MoCo v3, which recognises vectors by their dimensions."""

    def state_dict(buffers: Buffers, lr: float) -> dict[str, Any]:
        return {
            "state": {i: {key: buffer} for i, buffer in enumerate(buffers)},
            "param_groups": [{"lr": lr, "momentum": M, **group, "params": list(range(len(buffers)))}],
        }

    return state_dict


def two_groups(key: str, vectors_first: bool = False, **group: Any) -> Callable[[Buffers, float], dict[str, Any]]:
    """Keys count across groups, so those of the second group are not positions in the model."""

    def state_dict(buffers: Buffers, lr: float) -> dict[str, Any]:
        halves = [[b for b in buffers if is_vector(b) == vectors] for vectors in (vectors_first, not vectors_first)]
        keys = [list(range(len(halves[0]))), list(range(len(halves[0]), len(buffers)))]
        return {
            "state": {i: {key: buffer} for i, buffer in enumerate(halves[0] + halves[1])},
            "param_groups": [{"lr": lr, "momentum": M, **group, "params": of_group} for of_group in keys],
        }

    return state_dict


def by_hand(buffers: Buffers, lr: float) -> dict[str, Any]:
    """As the documentation shows for optax, which subtracts lr * d from its trace and adds the trace to the parameter."""
    return {"state": {i: {"trace": -buffer} for i, buffer in enumerate(buffers)}}


class Run(NamedTuple):
    source: str
    state_dict: Callable[[Buffers, float], dict[str, Any]]
    # the order of the model's parameters in the other optimizer, or None for that of param_groups
    order: Callable[[list[Parameter]], list[Parameter]] | None


def as_it_is(params: list[Parameter]) -> list[Parameter]:
    return params


def vectors_first(params: list[Parameter]) -> list[Parameter]:
    return sorted(params, key=lambda p: not is_vector(p))


TIMM = {"trust_coeff": C, "eps": 1e-8, "trust_clip": False, "always_adapt": False, "weight_decay": DECAY}
FUNCTION = {"weight_decay_filter": is_vector, "lars_adaptation_filter": is_vector, "eta": C, "weight_decay": DECAY}
FLAGS = {"weight_decay_filter": True, "lars_adaptation_filter": True, "eta": C, "weight_decay": DECAY}
RUNS: dict[str, Run] = {
    "moco_v3": Run("moco-v3", one_group("mu", trust_coefficient=C, weight_decay=DECAY), as_it_is),
    "vicreg": Run("moco-v3", one_group("mu", **FUNCTION), as_it_is),
    "barlow_twins": Run("moco-v3", two_groups("mu", **FLAGS), None),
    "biases_first": Run("moco-v3", two_groups("mu", vectors_first=True, **FLAGS), vectors_first),
    "timm": Run("bolts", two_groups("momentum_buffer", vectors_first=True, **TIMM), vectors_first),
    "lightly": Run("bolts", two_groups("momentum_buffer", weight_decay=DECAY, trust_coefficient=C), None),
    "apex": Run("apex", one_group("momentum_buffer", weight_decay=DECAY, nesterov=False, fused=None), as_it_is),
    "pytorch_optimizer": Run("pytorch_optimizer", one_group("momentum_buffer", step=SWITCH), as_it_is),
    "optax": Run("simclr", by_hand, as_it_is),
    "mlperf": Run("mlperf", by_hand, as_it_is),
    "fastlars": Run("paper", one_group("momentum_buffer", lr_in_momentum=True), as_it_is),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_the_run_of_another_optimizer_resumes_exactly(run: Run) -> None:
    source = SOURCES[run.source]
    theirs = Theirs(source)
    for step in range(SWITCH):
        theirs.step(step, LRS[step])
    buffers = [torch.tensor(buffer) for buffer in theirs.buffers]
    saved = run.state_dict(buffers, LRS[SWITCH])

    model = model_with(theirs.params)
    options = {**DIALECTS[source.dialect], "trust_coefficient": C}
    optimizer = LARS(param_groups(model, DECAY), lr=9.0, momentum=M, **options)
    before = optimizer.state_dict()
    params = None if run.order is None else run.order(list(model.parameters()))
    converted = convert_state_dict(saved, optimizer, params=params)
    assert optimizer.state_dict() == before, "the optimizer has not changed"
    optimizer.load_state_dict(converted)

    for group, old in zip(optimizer.state_dict()["param_groups"], before["param_groups"], strict=True):
        assert group == {**old, "lr": LRS[SWITCH] if "param_groups" in saved else 9.0}, (
            "of all options only lr is saved's"
        )
    for step in range(SWITCH, len(LRS)):
        theirs.step(step, LRS[step])
        go_on(optimizer, model, step, LRS[step])
        assert_same(model, theirs, f"step {step}")


def test_no_autograd_graph_is_kept() -> None:
    w = Parameter(torch.ones(2))
    optimizer = LARS([w], lr=torch.tensor(0.5, requires_grad=True), momentum=M, adapt=True, lr_in_momentum=True)
    saved = {"state": {0: {"mu": torch.ones(2, requires_grad=True)}}}
    converted = convert_state_dict(saved, optimizer)
    assert torch.equal(converted["state"][0]["momentum_buffer"], torch.full((2,), 0.5))
    assert not converted["state"][0]["momentum_buffer"].requires_grad


# ---------------------------------------------------------------- from one dialect to another
@pytest.mark.parametrize(("saved_in", "goes_on_in"), [("bolts", "paper"), ("paper", "bolts"), ("simclr", "byol")])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lr_enters_or_leaves_the_buffer(saved_in: str, goes_on_in: str, tensor_lr: bool) -> None:
    """v_in = lr * v_out: after the switch, at a constant lr, both dialects take the same steps."""
    source = SOURCES[{"byol": "moco-v3"}.get(saved_in, saved_in)]
    theirs = Theirs(source)
    for step in range(SWITCH):
        theirs.step(step, LRS[step])
    saved = one_group("momentum_buffer", lr_in_momentum=DIALECTS[saved_in].get("lr_in_momentum", False))(
        [torch.tensor(buffer) for buffer in theirs.buffers], 0.25
    )
    model = model_with(theirs.params)
    lr = torch.tensor(9.0, dtype=torch.float64) if tensor_lr else 9.0
    options = {**DIALECTS[goes_on_in], "trust_coefficient": C, "eps": DIALECTS[saved_in].get("eps", 1e-8)}
    optimizer = LARS(param_groups(model, DECAY), lr=lr, momentum=M, **options)
    optimizer.load_state_dict(convert_state_dict(saved, optimizer, params=model.parameters()))
    assert all(isinstance(group["lr"], Tensor) == tensor_lr for group in optimizer.param_groups)
    for step in range(SWITCH, len(LRS)):
        theirs.step(step, 0.25)
        go_on(optimizer, model, step, optimizer.param_groups[0]["lr"])
        assert_same(model, theirs, f"step {step}")


@pytest.mark.parametrize("goes_on_in", ["bolts", "paper"])
def test_keep_lr_keeps_what_momentum_moves(goes_on_in: str) -> None:
    """From SGD with lr 0.1 to LARS with lr 5 and 0.2. Without a gradient both move by momentum * (last update)."""
    model = a_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=M)
    for step in range(SWITCH):
        before = [to_array(p) for p in model.parameters()]
        set_grads(list(model.parameters()), [torch.tensor(g) for g in gradients(step)])
        sgd.step()
    moved = [to_array(p) - old for p, old in zip(model.parameters(), before, strict=True)]

    groups = param_groups(model, DECAY, bias_lr=0.2)
    optimizer = LARS(groups, lr=5.0, momentum=M, **DIALECTS[goes_on_in])
    saved = convert_state_dict(sgd.state_dict(), optimizer, params=model.parameters(), keep_lr=True)
    optimizer.load_state_dict(saved)
    assert [group["lr"] for group in optimizer.param_groups] == [5.0, 0.2]
    before = [to_array(p) for p in model.parameters()]
    set_grads(list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()])
    optimizer.step()
    for p, old, last in zip(model.parameters(), before, moved, strict=True):
        np.testing.assert_allclose(to_array(p) - old, M * last, rtol=1e-10, atol=1e-14)


def test_a_new_schedule_resumes_where_the_old_one_stopped() -> None:
    """As docs/coming-from.md says: first the schedule, then the state with its lr, then the steps already done."""
    w = Parameter(torch.ones(3))
    optimizer = LARS([w], lr=8.0, momentum=M, adapt=True)
    scheduler = schedules.warmup_polynomial(optimizer, 2, 12)
    optimizer.load_state_dict(convert_state_dict(one_group("mu")([torch.ones(3)], 4.5), optimizer))
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": 5})
    lrs = []
    for _ in range(3):
        w.grad = torch.ones(3)
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs == pytest.approx([4.5, 8 * 0.6**2, 8 * 0.5**2])


# ---------------------------------------------------------------- bitsandbytes
@pytest.mark.parametrize(
    ("key", "group", "limit"),
    [("state1", {}, 0.02), ("state1", {"max_unorm": 0.5}, 0.5), ("momentum_buffer", {"max_unorm": 0.5}, 0.5)],
)
def test_a_capped_sum_of_gradients_stays_capped(key: str, group: dict[str, Any], limit: float) -> None:
    long, short, still = Parameter(torch.ones(4)), Parameter(torch.full((2, 2), 1e3)), Parameter(torch.ones(3))
    optimizer = LARS([long, short, still], lr=9.0, momentum=M, adapt=True)
    buffers = [torch.arange(4.0), torch.ones(2, 2), torch.zeros(3)]
    saved = one_group(key, **group)(buffers, 0.1)
    if key == "state1":
        saved["state"] = {i: {"__bnb_optimizer_quant_state__": state} for i, state in saved["state"].items()}
    optimizer.load_state_dict(convert_state_dict(saved, optimizer))
    converted = [to_array(optimizer.state[p]["momentum_buffer"]) for p in (long, short, still)]
    np.testing.assert_allclose(norm(converted[0]), limit * 2.0, rtol=1e-6)  # |w| = 2
    np.testing.assert_allclose(converted[0] / norm(converted[0]), np.arange(4) / 14**0.5, rtol=1e-6)
    np.testing.assert_array_equal(converted[1], np.ones((2, 2)))  # below the cap
    np.testing.assert_array_equal(converted[2], np.zeros(3))


# ---------------------------------------------------------------- whose state it is
def named_apart(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Two named groups, in another order than the model's."""
    named = list(model.named_parameters())
    return [{"params": named[3:]}, {"params": named[:3]}]


def test_names_assign_state_to_parameters() -> None:
    model = a_model()
    names = [name for name, _ in model.named_parameters()]
    buffers = [torch.full_like(p, i) for i, p in enumerate(model.parameters())]
    optimizer = LARS(named_apart(model), lr=0.1, momentum=M, adapt=True)
    saved = one_group("mu", param_names=names)(buffers, 0.1)
    by_key = {  # as torch.distributed.checkpoint writes it
        "state": {name: {"mu": buffer} for name, buffer in zip(names, buffers, strict=True)},
        "param_groups": [{"lr": 0.1, "params": names}],
    }
    without_groups = {"state": by_key["state"]}
    for state_dict in (saved, by_key, without_groups):
        optimizer.load_state_dict(convert_state_dict(state_dict, optimizer))
        for i, p in enumerate(model.parameters()):
            assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full_like(p, i))


def test_parameters_without_state_stay_without() -> None:
    """A frozen encoder that the other optimizer had and this one lacks, and a parameter without gradients."""
    model = a_model()
    saved = one_group("mu")([torch.ones_like(p) for p in model.parameters()], 0.1)
    for i in (0, 1, 2):
        del saved["state"][i]
    *_, norm_bias, weight, bias = model.parameters()
    optimizer = LARS([norm_bias, weight, bias], lr=0.1, momentum=M, adapt=True)
    saved["state"][3] = {"momentum_buffer": None}  # like SGD in torch 1.x
    optimizer.load_state_dict(convert_state_dict(saved, optimizer, params=model.parameters()))
    assert [p in optimizer.state for p in (norm_bias, weight, bias)] == [False, True, True]


def test_the_result_shares_no_memory_and_changes_nothing() -> None:
    w = Parameter(torch.ones(3))
    optimizer = LARS([w], lr=0.1, momentum=M, adapt=True)
    saved = one_group("mu")([torch.ones(3)], 0.1)
    converted = convert_state_dict(saved, optimizer)
    converted["state"][0]["momentum_buffer"].zero_()
    converted["param_groups"][0]["lr"] = 7.0
    assert torch.equal(saved["state"][0]["mu"], torch.ones(3)) and saved["state"][0].keys() == {"mu"}
    assert saved["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"] == 0.1


def adam(shape: tuple[int, ...]) -> dict[str, Any]:
    return {"step": torch.tensor(3.0), "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}


def state_of(*states: dict[str, Any], **group: Any) -> dict[str, Any]:
    return {
        "state": dict(enumerate(states)),
        "param_groups": [{"lr": 0.1, **group, "params": list(range(len(states)))}],
    }


def by_bitsandbytes(*states: dict[str, Any]) -> dict[str, Any]:
    return state_of(*({"step": 3, "__bnb_optimizer_quant_state__": state} for state in states), betas=(M, 0))


TWO = [torch.ones(2), torch.ones(2, 2)]
GOOD = [{"mu": t} for t in TWO]
LR_0 = {"state": {0: {"trace": TWO[0]}, 1: {"trace": TWO[1]}}, "param_groups": [{"lr": 0.0, "params": [0, 1]}]}
# state dict, how many parameters are passed (None: params is not passed), message
ERRORS: dict[str, tuple[dict[str, Any], list[int] | None, str]] = {
    "adam": (state_of(adam((2,)), adam((2, 2))), None, "must hold one of momentum_buffer, mu, .*, got exp_avg, exp_avg_sq, with"),
    "unknown": (state_of(*({"velocity": t} for t in TWO)), None, "parameter 0 of param group 0 must hold one of .*, got velocity, with"),
    "shape": (state_of(GOOD[1], GOOD[0]), None, r"mu of parameter 0 .* shape \(2,\), got \(2, 2\) and torch.float32"),
    "scalar": (state_of({"mu": 1.0}, GOOD[1]), None, r"mu of parameter 0 of param group 0 must be .*, got float"),
    "8 bits": (by_bitsandbytes(*({"state1": t.byte()} for t in TWO)), None, "torch.uint8; .*8-bit state cannot"),
    "lamb": (by_bitsandbytes(*({"state1": t, "state2": t} for t in TWO)), None, "must hold one of .*, got state1, state2, with"),
    "sizes": (state_of(*GOOD, GOOD[0]), None, r"have \[3\] parameters, those of the optimizer \[2\]; pass params"),
    "too many": (state_of(*GOOD), [0, 1, 2], "params must have the 2 parameters of the state dict, got 3"),
    "another": (state_of(*GOOD), [0, 2], "params must have all 2 parameters of the optimizer, 1 are missing, the first at position 1"),
    "left over": (state_of(*GOOD, GOOD[0]), [0, 1, 2], "optimizer must have every parameter with saved state, 1 are missing, .* at position 2 of"),
    "lr 0": (LR_0, None, "lr must not be 0, because the trace of parameter 0 of param group 0 is divided by it"),
    "two lr": (
        {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}, {"lr": 0.2, "params": [1]}]},
        [0, 1],
        r"param group 0 can have one lr, but its parameters were saved with \[0.1, 0.2\]; split it, or pass keep_lr",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("state_dict", "given", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_converted(state_dict: dict[str, Any], given: list[int] | None, message: str) -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))]
    optimizer = LARS(params[:2], lr=0.1, momentum=M, adapt=True)
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict, optimizer, params=None if given is None else [params[i] for i in given])


# ---------------------------------------------------------------- what loading refuses
FOREIGN: dict[str, dict[str, Any]] = {
    "adam": adam((2, 3)),
    "rmsprop": {"square_avg": torch.ones(2, 3)},
    "adagrad": {"sum": torch.ones(2, 3)},
    "asgd": {"step": torch.tensor(1.0), "eta": torch.tensor(1.0), "mu": torch.tensor(1.0), "ax": torch.ones(2, 3)},
    "rprop": {"step": torch.tensor(1.0), "prev": torch.ones(2, 3), "step_size": torch.ones(2, 3)},
    "barlow_twins": {"mu": torch.ones(2, 3)},
    "bitsandbytes": {
        "step": 3,
        "__bnb_optimizer_quant_state__": {"state1": torch.ones(2, 3), "unorm_vec": torch.zeros(1)},
    },
    "8 bits": {"step": 3, "state1": torch.ones(2, 3, dtype=torch.uint8)},
    "optax": {"trace": torch.ones(2, 3)},
}


@loop_over("momentum", [0.0, M])
@pytest.mark.parametrize("state", FOREIGN.values(), ids=FOREIGN)
def test_loading_refuses_state_of_other_optimizers(state: dict[str, Any], momentum: float) -> None:
    optimizer = LARS([Parameter(torch.ones(2, 3))], lr=0.5, momentum=momentum, adapt=True)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2, 3)
    optimizer.step()
    before = repr(optimizer.state_dict())
    with pytest.raises(
        ValueError, match=r"parameter 0 of param group 0 holds \w+ and no momentum_buffer: .*convert_state"
    ):
        optimizer.load_state_dict(state_of(state))
    assert repr(optimizer.state_dict()) == before
    optimizer.load_state_dict({**state_of(state), "state": {}})  # the fix that the message names


@pytest.mark.parametrize(
    "extra",
    [
        {"ema": torch.ones(2, 3), "step": 3, "note": "hook"},
        {"mu": 0.5, "trace": torch.tensor(3.0), "sum": 7, "exp_avg": None},  # known names, but not tensors like w
        {"momentum_buffer": torch.ones(2, 3), "mu": torch.ones(2, 3), "exp_avg": torch.ones(2, 3)},
        {"__bnb_optimizer_quant_state__": 5},
    ],
)
def test_loading_keeps_entries_of_hooks(extra: dict[str, Any]) -> None:
    w = Parameter(torch.ones(2, 3))
    optimizer = LARS([w], lr=0.5, momentum=M, adapt=True)
    optimizer.load_state_dict(state_of(extra))
    assert optimizer.state[w].keys() == extra.keys()

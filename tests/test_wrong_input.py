"""Wrong input is refused before anything changes, with an error that states the rule, the value and the way out."""

import copy
import re
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torch.optim.swa_utils import SWALR

from cases import Options, make_grads, make_params
from fastlars import LARS
from harness import ignore_nothing_adapted, implementations, loop_over, set_grads

pytestmark = ignore_nothing_adapted

INF, NAN = float("inf"), float("nan")
NON_NEGATIVE = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")


def make(dtype: torch.dtype = torch.float32) -> LARS:
    """Three groups of two tensors with momentum after one step, with state and gradients to disturb."""
    groups = [
        {"params": make_params(dtype, layouts=["matrix", "vector"], seed=seed), "name": f"group {seed}"}
        for seed in range(3)
    ]
    optimizer = LARS(groups, lr=0.5, momentum=0.9, weight_decay=0.05, trust_coefficient=0.1)
    params = [p for group in groups for p in group["params"]]
    set_grads(params, make_grads("dense", params, 0))
    optimizer.step()
    set_grads(params, make_grads("dense", params, 1))
    return optimizer


def values(optimizer: LARS) -> list[Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [t for p in params for t in (p, p.grad, optimizer.state.get(p, {}).get("momentum_buffer"))]
    return [None if t is None else (t.layout, t.detach().to_dense().tolist()) for t in tensors]


def contents(optimizer: LARS) -> Any:
    """Everything that a refused call could change: identities and values."""
    return (
        values(optimizer),
        [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups],
        dict(optimizer.defaults),
        [id(group) for group in optimizer.param_groups],
        [(id(p), {k: id(v) for k, v in state.items()}) for p, state in optimizer.state.items()],
        [p._version for group in optimizer.param_groups for p in group["params"]],
        [len(getattr(optimizer, name)) for name in sorted(vars(optimizer)) if name.endswith("_hooks")],
    )


def refuses(optimizer: LARS, error: type[Exception], message: str, action: Callable[[LARS], object]) -> None:
    """The action raises this message, changes nothing, and the optimizer continues as if it had not been called."""
    untouched = copy.deepcopy(optimizer)
    before = contents(optimizer)
    with pytest.raises(error, match=re.escape(message)):
        action(optimizer)
    assert contents(optimizer) == before
    for each in (optimizer, untouched):
        params = [p for group in each.param_groups for p in group["params"]]
        set_grads(params, make_grads("dense", params, 2))
        each.step()
    assert values(optimizer) == values(untouched)


# ---------------------------------------------------------------- options, wherever they are given
NUMBER = "must be a finite number >= 0, got"
TENSOR = "Tensor lr must be 1-element and of a floating dtype, got shape"
PAIR = "needs momentum > 0 and dampening == 0, got"
BOOLEANS = ("nesterov", "trust_clip", "lr_in_momentum", "skip_nonfinite", "maximize", "differentiable")
OPTIONAL_BOOLEANS = ("adapt", "foreach", "fused", "kahan_sum")
# options, error, message
WRONG: list[tuple[Options, type[Exception], str]] = [
    *[
        ({name: value}, ValueError if isinstance(value, float) else TypeError, f"{name} {NUMBER} {value!r}")
        for name in NON_NEGATIVE for value in (-0.1, NAN, INF, "0.1", None, True)
    ],
    *[({"momentum": value}, ValueError, f"momentum must be < 1, got {value}, because") for value in (1, 1.0, 9.0)],
    ({"dampening": NAN}, ValueError, "dampening must be a finite number, got nan"),
    ({"dampening": -INF}, ValueError, "dampening must be a finite number, got -inf"),
    ({"dampening": 1j}, TypeError, "dampening must be a finite number, got 1j"),
    ({"lr": [0.1]}, TypeError, f"lr {NUMBER} [0.1]"),
    ({"lr": 10**400}, ValueError, f"lr {NUMBER} 1000"),
    # float() takes these, but torch's operators do not
    ({"lr": Decimal("0.1")}, TypeError, f"lr {NUMBER} Decimal('0.1')"),
    ({"momentum": Fraction(9, 10)}, TypeError, f"momentum {NUMBER} Fraction(9, 10)"),
    ({"momentum": np.array(0.9)}, TypeError, f"momentum {NUMBER} array(0.9)"),
    ({"momentum": torch.tensor(0.5)}, TypeError, f"momentum {NUMBER} tensor(0.5000)"),
    ({"lr": torch.tensor([0.1, 0.2])}, ValueError, f"{TENSOR} (2,)"),
    ({"lr": torch.tensor([])}, ValueError, f"{TENSOR} (0,)"),
    ({"lr": torch.tensor(1)}, ValueError, f"{TENSOR} () and torch.int64"),
    ({"lr": torch.tensor(1j)}, ValueError, f"{TENSOR} () and torch.complex64"),
    ({"lr": torch.tensor(-0.5)}, ValueError, f"lr {NUMBER} -0.5"),
    ({"lr": torch.tensor(NAN)}, ValueError, f"lr {NUMBER} nan"),
    ({"trust_denominator": "sum"}, ValueError, "trust_denominator must be 'separate' or 'joint', got 'sum'"),
    ({"trust_denominator": None}, ValueError, "trust_denominator must be 'separate' or 'joint', got None"),
    *[({name: 2}, TypeError, f"{name} must be True or False, got 2") for name in BOOLEANS],
    *[({name: None}, TypeError, f"{name} must be True or False, got None") for name in BOOLEANS],
    ({"nesterov": 0.0}, TypeError, "nesterov must be True or False, got 0.0"),
    *[({name: 2}, TypeError, f"{name} must be None, True or False, got 2") for name in OPTIONAL_BOOLEANS],
    ({"nesterov": True, "momentum": 0.0}, ValueError, f"nesterov=True {PAIR} momentum=0.0 and dampening=0.0"),
    (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.5}, ValueError,
        f"nesterov=True {PAIR} momentum=0.9 and dampening=0.5",
    ),
    (
        {"skip_nonfinite": True, "momentum": 0.9, "dampening": 0.5}, ValueError,
        "skip_nonfinite=True with momentum needs dampening == 0, got dampening=0.5",
    ),
    *[
        ({a: True, b: True}, ValueError, f"{a}=True and {b}=True exclude each other; set only one of them")
        for a, b in (("foreach", "differentiable"), ("fused", "differentiable"), ("kahan_sum", "differentiable"), ("fused", "foreach"))
    ],
]  # fmt: skip


def through(wrong: list[tuple[Options, type[Exception], str]]) -> Any:
    return pytest.mark.parametrize(("options", "error", "message"), wrong, ids=[str(case[0])[:50] for case in wrong])


# one rule of each kind for the other entry points: a number, a tensor, a choice, two options together
KINDS = [
    next(case for case in WRONG if part in case[2])
    for part in (NUMBER, TENSOR, "'separate' or 'joint'", "exclude each other")
]


@through(KINDS)
def test_a_call(options: Options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        LARS(make_params(torch.float32), **{"lr": 0.1, **options})


@through(KINDS)
def test_a_group_of_several(options: Options, error: type[Exception], message: str) -> None:
    params = make_params(torch.float32)
    groups = [{"params": params[:2]}, {"params": params[2:4], **options}, {"params": params[4:]}]
    with pytest.raises(error, match="^param group 1: .*" + re.escape(message)):
        LARS(groups, lr=0.1)


@through(KINDS)
def test_add_param_group(options: Options, error: type[Exception], message: str) -> None:
    given = {"params": make_params(torch.float32, seed=7), **options}
    refuses(make(), error, f"param group 3: {message}", lambda o: o.add_param_group(given))


@through(WRONG)
def test_load_state_dict(options: Options, error: type[Exception], message: str) -> None:
    optimizer = make()
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["param_groups"][1].update(options)
    refuses(optimizer, error, f"param group 1: {message}", lambda o: o.load_state_dict(state_dict))


@loop_over("value", [1, np.float32(0.5), np.float64(0.5), np.int64(1)])
@implementations
def test_numpy_scalars_and_integers_are_numbers(value: Any, implementation: Options) -> None:
    params = make_params(torch.float32)
    names = ("lr", "dampening", "weight_decay", "trust_coefficient", "eps", *(["momentum"] if value < 1 else []))
    optimizer = LARS(params, **dict.fromkeys(names, value), **implementation)
    plain = LARS(make_params(torch.float32), **dict.fromkeys(names, float(value)), **implementation)
    for each in (optimizer, plain):
        for step in range(2):
            set_grads(each.param_groups[0]["params"], make_grads("dense", params, step))
            each.step()
    torch.testing.assert_close(params, plain.param_groups[0]["params"])


# ---------------------------------------------------------------- lr is required
def test_a_missing_lr_raises_torchs_message() -> None:
    params = make_params(torch.float32)
    message = "parameter group didn't specify a value of required optimization parameter lr"
    with pytest.raises(ValueError, match=rf"^{message} \(param group 0\); give lr to LARS or to the group"):
        LARS(params)
    groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:]}]
    with pytest.raises(ValueError, match=rf"^{message} \(param group 1\)"):
        LARS(groups, momentum=0.9)
    optimizer = LARS([{"params": params, "lr": 0.1}])
    refuses(optimizer, ValueError, message, lambda o: o.add_param_group({"params": make_params(torch.float32, seed=1)}))


# ---------------------------------------------------------------- keys that are no options
TAGS = [
    "name", "names", "layer", "layer_id", "lr_scale", "lr_mult", "wd_mult", "weight_decay_mult", "decay", "is_bias",
    "tag", "initial_lr", "min_lr", "max_lr", "max_momentum", "base_momentum", "swa_lr", "group", "model", "module",
    "betas", "amsgrad", "capturable", "decoupled_weight_decay",
]  # fmt: skip


def test_tags_are_kept() -> None:
    for tag in TAGS:
        optimizer = LARS([{"params": make_params(torch.float32, layouts=["vector"]), tag: "mine"}], lr=0.1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups[0][tag] == "mine"
        assert tag in repr(optimizer)


SCHEDULERS: dict[str, Callable[[LARS], Any]] = {
    "OneCycleLR": lambda o: OneCycleLR(o, max_lr=1.0, total_steps=6),
    "CyclicLR": lambda o: CyclicLR(o, 0.1, 1.0, step_size_up=2, cycle_momentum=True),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=2),
}


@pytest.mark.parametrize("schedule", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["float_lr", "tensor_lr"])
def test_schedulers_that_add_keys(schedule: Callable[[LARS], Any], lr: float | Tensor) -> None:
    optimizer = make()
    for group in optimizer.param_groups:
        group["lr"] = copy.copy(lr)
    scheduler = schedule(optimizer)
    seen = []
    for _ in range(3):
        optimizer.step()
        scheduler.step()
        seen.append((float(optimizer.param_groups[0]["lr"]), optimizer.param_groups[0]["momentum"]))
    assert len(set(seen)) > 1
    restored = make()
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert restored.param_groups[2].keys() == optimizer.param_groups[2].keys()
    restored.add_param_group({"params": make_params(torch.float32, seed=9), "initial_lr": 0.5})
    restored.step()


# ---------------------------------------------------------------- parameters
REAL_OR_COMPLEX = "parameters must be floating or complex tensors, got torch.int64 at position 1; leave it out"
INTEGERS = Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
PARAMS: list[tuple[Callable[[LARS], Any], type[Exception], str]] = [
    (lambda _: [torch.ones(3), INTEGERS], TypeError, f"param group 3: {REAL_OR_COMPLEX}"),
    (lambda _: [("a", torch.ones(3)), ("b", INTEGERS)], TypeError, f"param group 3: {REAL_OR_COMPLEX}"),
    (lambda _: [("a", torch.ones(3)), ("b", INTEGERS, 5)], TypeError, f"param group 3: {REAL_OR_COMPLEX}"),
    (lambda _: ["weight"], TypeError, "optimizer can only optimize Tensors"),
    (lambda _: {Parameter(torch.ones(3))}, TypeError, "ordered collections"),
    (lambda _: [Parameter(torch.ones(3)) * 2], ValueError, "can't optimize a non-leaf Tensor"),
    (lambda o: o.param_groups[2]["params"][:1], ValueError, "some parameters appear in more than one parameter group"),
]  # fmt: skip


@loop_over("params error message", PARAMS)
def test_params(params: Callable[[LARS], Any], error: type[Exception], message: str) -> None:
    refuses(make(), error, message, lambda o: o.add_param_group({"params": params(o)}))


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [([Parameter(torch.ones(3))], TypeError, "param_group must be a dict"), ({"lr": 0.1}, KeyError, "params")],
    ids=["list", "no params"],
)
def test_a_group_must_be_a_dict_with_params(group: Any, error: type[Exception], message: str) -> None:
    refuses(make(), error, message, lambda o: o.add_param_group(group))


@implementations
@loop_over(
    "edit",
    [{"lr": "x"}, {"lr": None}, {"momentum": None}, {"eps": -1.0}, {"trust_denominator": "jiont"}, {"nesterov": 2}],
)
def test_wrong_options_written_into_a_group(edit: Options, implementation: Options) -> None:
    """In the first step and in a later one. No group has moved when it raises."""
    params = [Parameter(torch.ones(3, 2)) for _ in range(2)]
    optimizer = LARS([{"params": [p]} for p in params], 0.1, momentum=0.9, weight_decay=0.1, **implementation)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        kept = {key: optimizer.param_groups[1][key] for key in edit}
        optimizer.param_groups[1].update(edit)
        with pytest.raises((TypeError, ValueError), match=f"param group 1: {next(iter(edit))}"):
            optimizer.step()
        assert all(map(torch.equal, params, before))
        optimizer.param_groups[1].update(kept)
        optimizer.step()


def test_a_schedule_may_round_lr_below_0() -> None:
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = LARS([p], 0.1, weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = -1e-19
    optimizer.step()
    assert torch.equal(p, torch.ones(2))


@implementations
def test_zeros_and_empty_groups_are_valid(implementation: Options) -> None:
    params = [Parameter(torch.zeros(3)), Parameter(torch.zeros(0)), Parameter(torch.ones(3))]
    optimizer = LARS([{"params": []}, {"params": params}, {"params": []}], 0.1, 0.9, weight_decay=0.1, **implementation)
    optimizer.step()
    set_grads(params, [torch.zeros_like(p) for p in params])
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step()
    assert repr(optimizer)
    assert [p.tolist() for p in params] == [[0, 0, 0], [], [1, 1, 1]]
    assert optimizer.trust_ratios() == {"1.0": 1.0, "1.1": 1.0, "1.2": 1.0}


# ---------------------------------------------------------------- gradients, closures, hooks
@implementations
def test_sparse_gradients(implementation: Options) -> None:
    optimizer = make()
    for group in optimizer.param_groups:
        group.update(implementation)
    fresh = Parameter(torch.ones(4, 2))
    optimizer.param_groups[0]["params"].append(fresh)  # would get state in this step
    fresh.grad = torch.ones(4, 2)
    param = optimizer.param_groups[1]["params"][0]
    param.grad = param.grad.to_sparse()
    message = f"got one of layout torch.sparse_coo and shape {tuple(param.shape)}; use nn.Embedding(sparse=False)"
    refuses(optimizer, RuntimeError, f"LARS needs dense gradients, {message}", lambda o: o.step())
    assert fresh in optimizer.state  # the step after a refusal is a whole one


@loop_over("momentum", [0.0, 0.9])
@loop_over("shape", [(9, 9), (1,), (2, 6), ()])
@implementations
def test_a_parameter_that_was_resized(implementation: Options, shape: tuple[int, ...], momentum: float) -> None:
    optimizer = make()  # a kernel that ignores shapes would write past the old buffer
    for group in optimizer.param_groups:
        group.update(implementation, momentum=momentum)
    param = optimizer.param_groups[1]["params"][0]
    param.data = torch.ones(shape)
    if momentum:
        param.grad = torch.ones(shape)
    what = "momentum buffer" if momentum else "gradient"
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match=f"has a {what} of shape"):
        optimizer.step()
    assert contents(optimizer) == before
    param.grad = torch.ones(shape)
    optimizer.state.pop(param)  # the fix that the message names
    optimizer.step()
    assert param.isfinite().all()


def test_an_exception_in_a_closure_or_a_hook() -> None:
    def fail(*_: object) -> None:
        raise LookupError("mine")

    optimizer = make()
    refuses(optimizer, LookupError, "mine", lambda o: o.step(fail))

    def step_with_a_failing_hook(o: LARS) -> None:
        handle = o.register_step_pre_hook(fail)
        try:
            o.step()
        finally:
            handle.remove()

    refuses(optimizer, LookupError, "mine", step_with_a_failing_hook)


# ---------------------------------------------------------------- state dicts that do not fit
def buffer(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda saved: saved["state"][3].update(momentum_buffer=value)


PLACE = "parameter 1 of param group 1"
FITTING = "must be a floating tensor of shape (7,), got "
STATE_DICTS: list[tuple[Callable[[dict[str, Any]], object], type[Exception], str]] = [
    (buffer(torch.ones(8)), ValueError, f"momentum_buffer of {PLACE} {FITTING}(8,) and torch.float32"),
    (buffer(torch.ones(7, 1)), ValueError, f"{FITTING}(7, 1) and torch.float32; was the state dict saved for other"),
    (buffer(torch.ones(7, dtype=torch.complex64)), ValueError, f"{FITTING}(7,) and torch.complex64"),
    (buffer([1.0] * 7), TypeError, f"momentum_buffer of {PLACE} must be a tensor, got list"),
    (buffer(1.0), TypeError, "must be a tensor, got float"),
    (lambda s: s["state"].update({3: torch.ones(7)}), TypeError, f"the state of {PLACE} must be a dict, got Tensor"),
    # faults that fuzzing found (test_fuzz_state_dicts.py), loaded in part or without a place in the message
    (buffer(torch.ones(7, dtype=torch.uint8)), ValueError, f"{FITTING}(7,) and torch.uint8"),
    (buffer(torch.ones(1).expand(7)), ValueError, f"momentum_buffer of {PLACE} must have its own memory"),
    (buffer(torch.ones(7).to_sparse()), ValueError, "must have its own memory for every element, got layout torch.sparse"),
    (lambda s: s.update(state={str(k): v for k, v in s["state"].items()}), ValueError, "has a momentum_buffer under '0'"),
    (lambda s: s["state"].update({77: s["state"].pop(3)}), ValueError, "under 77, which is not among the keys of its param"),
    (lambda s: s["param_groups"][1].update(params=[2, 2]), ValueError, f"{PLACE} has the key 2 of an earlier parameter"),
    (lambda s: s["param_groups"][1].update(params=[2, [3]]), TypeError, "param group 1 of the state dict must be a dict"),
    (lambda s: s["param_groups"][1].update(params=None), TypeError, "group 1 of the state dict must be a dict with a list"),
    (lambda s: s["param_groups"].insert(0, 5), TypeError, "param group 0 of the state dict must be a dict with a list"),
    (lambda s: s["param_groups"][1].update(param_names=["a"]), ValueError, "group 1: param_names must be a list of 2 strings"),
    (lambda s: s["param_groups"][1].update(param_names=["a", []]), ValueError, "param_names must be a list of 2 strings"),
    (lambda s: s["param_groups"][1].update(param_names=5), ValueError, "param_names must be a list of 2 strings, got 5"),
    (lambda s: s.update(state=[]), TypeError, "a dict under 'state' and a list under 'param_groups', got list and list"),
    (lambda s: s.update(param_groups={}), TypeError, "a list under 'param_groups', got dict and dict"),
    (lambda s: s.pop("state"), ValueError, "must have the keys 'state' and 'param_groups', got ['param_groups']"),
    (lambda s: s.update(optimizer=s.pop("param_groups")), ValueError, "'param_groups', got ['state', 'optimizer']"),
    (lambda saved: saved["param_groups"].pop(), ValueError, "the state dict has 2 param groups with [2, 2] parameters, this optimizer 3 with [2, 2, 2]"),
    (lambda saved: saved["param_groups"][1]["params"].pop(), ValueError, "with [2, 1, 2] parameters, this optimizer 3 with [2, 2, 2]"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "error", "message"), STATE_DICTS)
def test_state_dicts(edit: Callable[[dict[str, Any]], object], error: type[Exception], message: str) -> None:
    optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved)
    refuses(optimizer, error, message, lambda o: o.load_state_dict(saved))
    # the result of a user's hook is checked too
    optimizer = make()
    good = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_pre_hook(lambda _, __: saved)
    refuses(optimizer, error, message, lambda o: o.load_state_dict(good))


@pytest.mark.parametrize("state_dict", [None, 5, [], "model.pt"], ids=repr)
def test_a_state_dict_must_be_a_dict_with_its_two_keys(state_dict: Any) -> None:
    message = f"must have the keys 'state' and 'param_groups', got {type(state_dict).__name__}"
    refuses(make(), ValueError, message, lambda o: o.load_state_dict(state_dict))


@implementations
@pytest.mark.parametrize("adapt", [True, False])
def test_complex_buffers_of_another_precision_are_cast(adapt: bool, implementation: Options) -> None:
    """Like real ones in torch. torch's foreach SGD, which steps groups that are not adapted, failed halfway."""
    optimizer = make(torch.complex64)
    for group in optimizer.param_groups:
        group.update(adapt=adapt, **implementation)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].to(torch.complex128)
    twin = copy.deepcopy(optimizer)
    optimizer.load_state_dict(saved)
    for each in (optimizer, twin):
        params = [p for group in each.param_groups for p in group["params"]]
        set_grads(params, make_grads("dense", params, 2))
        each.step()
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.complex64}
    assert values(optimizer) == values(twin)
    assert saved["state"][0]["momentum_buffer"].dtype == torch.complex128


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_buffer_shares_no_memory_between_elements() -> None:
    """The stride of a dimension with one element means nothing."""
    optimizer = LARS([Parameter(torch.ones(2, 1))], lr=0.5, momentum=0.9, weight_decay=0.1)
    saved = optimizer.state_dict()
    shared, own = torch.ones(1, 1).expand(2, 1), torch.ones(2).as_strided((2, 1), (1, 0))
    for bad in (shared, torch.ones(2, 1).to_sparse_csr()):  # it has no strides
        with pytest.raises(ValueError, match="must have its own memory for every element"):
            optimizer.load_state_dict({**saved, "state": {0: {"momentum_buffer": bad}}})
    optimizer.load_state_dict({**saved, "state": {0: {"momentum_buffer": own}}})
    assert torch.equal(optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"], own)


def test_state_of_no_parameter_is_kept() -> None:
    optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"] |= {"a hook's count": 5, "a hook's dict": {"seen": 7}}
    optimizer.load_state_dict(saved)
    assert optimizer.state["a hook's count"] == 5 and optimizer.state["a hook's dict"] == {"seen": 7}


def test_real_buffers_of_complex_parameters() -> None:
    saved = make().state_dict()
    message = "must be a complex tensor of shape (3, 5), got (3, 5) and torch.float32"
    refuses(make(torch.complex64), ValueError, message, lambda o: o.load_state_dict(saved))


def test_0_and_1_are_truth_values() -> None:
    """Config files and old checkpoints have them."""
    optimizer = LARS(
        [{"params": torch.ones(2, requires_grad=True), 7: "a key that is no text"}], lr=1.0, momentum=0.9, nesterov=1
    )
    assert optimizer.param_groups[0]["nesterov"] == 1


def test_tags_of_users_are_not_taken_for_misspelt_options() -> None:
    for tag in ("steps", "name", "layer", "lr_scale", "tag", "depth", "index", "role", "mode", "scale", "adapters"):
        LARS([{"params": torch.ones(2, requires_grad=True), tag: 1}], lr=1.0)


def test_fused_is_refused_without_a_fused_step() -> None:
    param = torch.ones(2, device="meta", requires_grad=True)
    with pytest.raises(RuntimeError, match="fused=True is for CPU and CUDA tensors, got one on meta"):
        LARS([param], lr=1.0, fused=True)
    optimizer = LARS([param], lr=1.0)
    state = optimizer.state_dict()
    state["param_groups"][0]["fused"] = True
    with pytest.raises(RuntimeError, match="leave fused=None"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["fused"] is None

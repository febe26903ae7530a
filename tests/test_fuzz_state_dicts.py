"""Broken state dicts: each is refused without any change, or loaded whole.

A case is a number that seeds the optimizer, the damage and all values. `check(number)` repeats it. With
FASTLARS_FUZZ_SECONDS the last test runs new cases until the time is up.
"""

import copy
import os
import pickle
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from cases import make_grads, make_params
from fastlars import LARS
from fastlars.options import NAMES
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, set_grads

pytestmark = ignore_nothing_adapted

QUICK, CASES = 150, 600
STATE = ("momentum_buffer", "compensation")
SECONDS = float(os.environ.get("FASTLARS_FUZZ_SECONDS", "0"))
NAN, INF = float("nan"), float("inf")
StateDict = dict[str, Any]
# what a message must name: the place, in the words of whoever saved it
PLACE = re.compile(
    r"param group|parameter group|state dict|the state of|momentum_buffer|compensation|parameter \d|meta"
)


# ---------------------------------------------------------------- an optimizer, and all that is in it
def make(rng: random.Random, dtype: torch.dtype) -> LARS:
    """Two or three groups, some with names, after one to three steps. Some tensors may have had no gradient yet."""
    options = rng.choice(
        [{"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}, {}]
    )
    named = rng.random() < 0.3
    groups: list[dict[str, Any]] = []
    for seed in range(rng.choice([2, 3])):
        params = make_params(
            dtype, layouts=["matrix", "vector", "transposed", "scalar"][: rng.choice([2, 3, 4])], seed=seed
        )
        groups.append({"params": [(f"{seed}.{i}", p) for i, p in enumerate(params)] if named else params})
    groups[-1] |= {"weight_decay": 0.0, "lr": torch.tensor(0.25)}
    implementation = rng.choice([*IMPLEMENTATIONS.values(), {}])
    optimizer = LARS(groups, lr=0.5, weight_decay=0.05, trust_coefficient=0.1, **options, **implementation)
    for step in range(rng.choice([1, 2, 3])):
        give_grads(optimizer, "missing", step)
        optimizer.step()
    give_grads(optimizer, "dense", 3)
    return optimizer


def params_of(optimizer: LARS) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_grads(optimizer: LARS, history: str, step: int) -> None:
    set_grads(params_of(optimizer), make_grads(history, params_of(optimizer), step))


def frozen(value: Any, identity: bool = False) -> Any:
    """A value that is equal to another only if every bit is; with identity, only if they are the same tensors."""
    if isinstance(value, Tensor):
        shown = (str(value.dtype), str(value.layout), tuple(value.shape), value.device.type, id(value) * identity)
        if value.layout is not torch.strided or value.is_meta:
            return shown
        stored = value.detach().resolve_conj().contiguous().reshape(-1)
        return shown, value._version * identity, stored.view(torch.uint8).numpy().tobytes() if stored.numel() else b""
    if isinstance(value, dict):
        return [(frozen(key, identity), frozen(each, identity)) for key, each in value.items()]
    if isinstance(value, (list, tuple, set)):
        return [type(value), *(frozen(each, identity) for each in value)]
    return type(value), repr(value)  # NaN equals itself


def everything(optimizer: LARS) -> Any:
    return frozen(vars(optimizer), identity=True), [frozen(p.grad, identity=True) for p in params_of(optimizer)]


def bits(optimizer: LARS) -> Any:
    return frozen([(p, [optimizer.state.get(p, {}).get(key) for key in STATE]) for p in params_of(optimizer)])


# ---------------------------------------------------------------- damage
def nonsense(rng: random.Random) -> Any:
    values = [
        None, True, False, -1, 0, 1, 3.7, NAN, INF, -0.5, 10**400, 1j, "", "abc", b"bytes", [], {}, (), [0], (1, 2), {"a": 1},
        [[0], [1]], {0: {0: {}}}, {"momentum_buffer": None}, torch.ones(3), torch.tensor(NAN), torch.tensor([]),
        torch.ones(2, 2, dtype=torch.int64), {"momentum_buffer": torch.ones(3)}, len, 0.1,
    ]  # fmt: skip
    return rng.choice(values)


def containers(tree: Any) -> list[Any]:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return ([tree] if isinstance(tree, (dict, list)) else []) + [c for each in below for c in containers(each)]


def somewhere(rng: random.Random, saved: StateDict, empty: bool = False) -> tuple[Any, Any]:
    """A container, and one of its keys or indices."""
    container = rng.choice([c for c in containers(saved) if c or empty] or [saved])
    places = list(container) if isinstance(container, dict) else list(range(len(container)))
    return container, rng.choice(places) if places else 0


def remove(rng: random.Random, saved: StateDict) -> None:
    container, place = somewhere(rng, saved)
    if container:
        del container[place]


def replace(rng: random.Random, saved: StateDict) -> None:
    container, place = somewhere(rng, saved)
    if container:
        container[place] = nonsense(rng)


def add(rng: random.Random, saved: StateDict) -> None:
    container, place = somewhere(rng, saved, empty=True)
    if isinstance(container, dict):
        container[rng.choice(["extra", "tag", 77, "0", None, ("a", 1), "momentum_buffer", "param_names"])] = nonsense(
            rng
        )
    else:
        container.insert(place, rng.choice([nonsense(rng), copy.deepcopy(container[place]) if container else 0]))


def exchange(rng: random.Random, saved: StateDict) -> None:
    container, first = somewhere(rng, saved)
    if container:
        second = rng.choice(list(container) if isinstance(container, dict) else list(range(len(container))))
        container[first], container[second] = container[second], container[first]


def buffers(saved: StateDict) -> list[dict[str, Any]]:
    """The entries whose buffers are still intact."""
    states = saved["state"].values() if isinstance(saved.get("state"), dict) else ()
    held = [s for s in states if isinstance(s, dict) and isinstance(s.get("momentum_buffer"), Tensor)]
    return [s for s in held if s["momentum_buffer"].layout is torch.strided and not s["momentum_buffer"].is_meta]


def groups_of(saved: StateDict) -> list[dict[str, Any]]:
    groups = saved.get("param_groups")
    return [group for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []


RESHAPES: list[Callable[[Tensor], Any]] = [
    lambda b: b.flatten(), lambda b: b.unsqueeze(0), lambda b: b.t() if b.dim() == 2 else b[None], lambda b: b[:0] if b.dim() else b,
    lambda b: b.reshape(-1)[:1].expand(b.shape) if b.dim() else b, lambda b: b.to_sparse() if b.dim() else b, lambda b: b.to("meta"),
    lambda b: b.tolist(), lambda b: b.numpy() if b.dtype != torch.bfloat16 else 1, lambda b: Parameter(b) if b.is_floating_point() else b,
    lambda b: b.contiguous().clone().t() if b.dim() == 2 and len(set(b.shape)) == 1 else b.repeat_interleave(2, 0)[::2] if b.dim() else b,
]  # fmt: skip
DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


def damage_buffer(rng: random.Random, saved: StateDict) -> None:
    for state in rng.sample(buffers(saved), min(1, len(buffers(saved)))):
        key = "compensation" if "compensation" in state and rng.random() < 0.5 else "momentum_buffer"
        state[key] = rng.choice(RESHAPES)(state[key].detach())


def cast_buffers(rng: random.Random, saved: StateDict) -> None:
    dtype = rng.choice(DTYPES)
    for state in buffers(saved):
        if dtype.is_complex or not state["momentum_buffer"].is_complex():  # otherwise torch warns
            state["momentum_buffer"] = state["momentum_buffer"].to(dtype)


def spoil_numbers(rng: random.Random, saved: StateDict) -> None:
    for state in buffers(saved):
        buffer = state["momentum_buffer"].detach()
        state["momentum_buffer"] = (
            torch.full_like(buffer, rng.choice([NAN, INF, 0.0])) if buffer.is_floating_point() else buffer
        )


def rename(rng: random.Random, saved: StateDict) -> None:
    """Momentum under the names of other optimizers, nested as by bitsandbytes, or nonsense there."""
    for state in buffers(saved):
        if rng.random() < 0.5:
            state[rng.choice(["mu", "exp_avg", "state1", "buf", "momentum"])] = state.pop("momentum_buffer")
        if rng.random() < 0.2:
            state["__bnb_optimizer_quant_state__"] = rng.choice([{}, 5, {"state1": torch.ones(7)}, None])


def keys_as_text(_: random.Random, saved: StateDict) -> None:
    """The keys after a round trip through JSON."""
    if isinstance(saved.get("state"), dict):
        saved["state"] = {str(key): state for key, state in saved["state"].items()}


def shift_keys(rng: random.Random, saved: StateDict) -> None:
    if isinstance(saved.get("state"), dict):
        by = rng.choice([-1, 1, 100])
        saved["state"] = {k + by if isinstance(k, int) else k: state for k, state in saved["state"].items()}


def regroup(rng: random.Random, saved: StateDict) -> None:
    groups = saved.get("param_groups")
    if isinstance(groups, list) and groups:
        how = rng.choice(["drop", "repeat", "merge", "reverse"])
        if how == "drop":
            groups.pop()
        elif how == "repeat":
            groups.append(copy.deepcopy(groups[-1]))
        elif how == "reverse":
            groups.reverse()
        elif all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            groups[:] = [{**groups[0], "params": [key for group in groups for key in group["params"]]}]


def change_options(rng: random.Random, saved: StateDict) -> None:
    for group in groups_of(saved):
        name = rng.choice(NAMES)
        group[name] = rng.choice([nonsense(rng), 0.5, 1, None, True, torch.tensor(0.125), "joint"])


def older(rng: random.Random, saved: StateDict) -> None:
    """Without options that other optimizers or versions lack."""
    for group in groups_of(saved):
        for name in rng.sample(NAMES, rng.randrange(len(NAMES))):
            group.pop(name, None)


DAMAGE: tuple[Callable[[random.Random, StateDict], None], ...] = (
    remove, replace, add, exchange, damage_buffer, cast_buffers, spoil_numbers, rename, keys_as_text, shift_keys, regroup,
    change_options, older,
)  # fmt: skip
WHOLE: list[Callable[[StateDict], Any]] = [
    lambda saved: {"model": {}, "optimizer": saved}, lambda saved: [saved], lambda _: None, lambda _: {}, lambda saved: saved["state"],
    lambda saved: saved["param_groups"],
]  # fmt: skip


# ---------------------------------------------------------------- what a correct load is
def assert_loaded(optimizer: LARS, before: list[dict[str, Any]], saved: StateDict) -> None:
    """Judged by the state dict alone: every buffer is where its key says, none is lost, options are saved or kept, and it steps."""
    seen: dict[Any, Tensor] = {}
    twin_groups, expected = [], []
    for group, old, saved_group in zip(optimizer.param_groups, before, saved["param_groups"], strict=True):
        options = {name: saved_group.get(name, old[name]) for name in NAMES}
        assert frozen({name: group[name] for name in NAMES}) == frozen(options)
        extra = saved_group.keys() - {*NAMES, "params"}
        assert frozen([group[name] for name in extra]) == frozen([saved_group[name] for name in extra])
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            assert seen.setdefault(key, param) is param, f"two parameters, one key: {key}"
            state = saved["state"].get(key, {})
            held = {key: state[key] for key in STATE if state.get(key) is not None}
            assert optimizer.state.get(param, {}).keys() == state.keys()
            expected.append({key: tensor.to(param.dtype) for key, tensor in held.items()})
            loaded = optimizer.state.get(param, {})
            assert frozen({key: loaded.get(key) for key in held}) == frozen(expected[-1])
        twin_groups.append(
            {**copy.deepcopy(options), "params": [Parameter(p.detach().clone()) for p in group["params"]]}
        )
    lost = [
        key
        for key, state in saved["state"].items()
        if key not in seen and isinstance(state, dict) and not set(STATE).isdisjoint(state)
    ]
    assert not lost, f"momentum of no parameter: {lost}"

    twin = LARS(twin_groups, lr=0.0)
    for param, held in zip(params_of(twin), expected, strict=True):
        for key, tensor in held.items():
            # with its strides, which decide which backend steps it
            own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            twin.state[param][key] = own.copy_(tensor.detach())
    for each in (optimizer, twin):
        give_grads(each, "dense", 4)
        if any(group["differentiable"] for group in each.param_groups):
            continue  # leaves cannot take such a step, in torch's optimizers either
        each.step()
    assert bits(optimizer) == bits(twin)
    assert repr(optimizer)
    optimizer.trust_ratios()
    again = copy.deepcopy(optimizer)
    again.load_state_dict(optimizer.state_dict())
    assert bits(again) == bits(optimizer) == bits(pickle.loads(pickle.dumps(optimizer)))


def check(case: int) -> str:
    """Load the state dict of one case. Returns "loaded" or the type of the error."""
    rng = random.Random(case)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64])
    optimizer = make(rng, dtype)
    saved: Any = copy.deepcopy(
        make(random.Random(case), dtype).state_dict() if rng.random() < 0.5 else optimizer.state_dict()
    )
    kinds = rng.choices(DAMAGE, k=rng.choice([1, 1, 2, 3]))
    for kind in kinds:
        kind(rng, saved)
    if rng.random() < 0.03:
        saved = rng.choice(WHOLE)(saved) if saved.keys() >= {"state", "param_groups"} else saved
    what = f"case {case}: {[kind.__name__ for kind in kinds]}, {dtype}"

    untouched, before, given = copy.deepcopy(optimizer), everything(optimizer), frozen(saved, identity=True)
    groups = [dict(group) for group in optimizer.param_groups]
    error = None
    try:
        optimizer.load_state_dict(saved)
    except Exception as raised:  # noqa: BLE001  which are clear is asked below
        error = raised
    if error is None:
        assert frozen(saved, identity=True) == given, f"{what}: the state dict was written"
        try:
            assert_loaded(optimizer, groups, saved)
        except Exception as wrong:
            raise AssertionError(f"{what}: {wrong!r}") from wrong
        return "loaded"
    told = f"{type(error).__name__}: {error}"
    assert isinstance(error, (ValueError, TypeError, RuntimeError)) and PLACE.search(told), f"{what}: not clear, {told}"
    assert everything(optimizer) == before, f"{what}: changed by a load that failed, {told}"
    for each in (optimizer, untouched):
        give_grads(each, "dense", 3)
        each.step()
    assert bits(optimizer) == bits(untouched), what
    return type(error).__name__


@pytest.mark.parametrize("cases", [range(QUICK), pytest.param(range(QUICK, CASES), marks=pytest.mark.slow)], ids=str)
def test_every_case_is_refused_or_loaded_whole(cases: range) -> None:
    outcomes = Counter(check(case) for case in cases)
    # damage that always has one outcome would prove little
    assert outcomes["loaded"] > len(cases) / 5
    assert outcomes["ValueError"] > len(cases) / 5
    assert outcomes["TypeError"] > len(cases) / 20


@pytest.mark.skipif(SECONDS == 0, reason="set FASTLARS_FUZZ_SECONDS: cases by the clock")
def test_cases_by_the_clock() -> None:
    end, case = time.monotonic() + SECONDS, CASES
    while time.monotonic() < end:
        check(case)
        case += 1

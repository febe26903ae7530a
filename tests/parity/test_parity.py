"""LARS and other packages from the same parameters and gradients, with an lr that changes every step, in float64, 20 steps."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import bitsandbytes
import jax
import lightly.utils.lars
import numpy as np
import optax
import pytest
import pytorch_optimizer
import timm.optim
import torch
from torch.nn import Parameter

from fastlars import DIALECTS, LARS, convert_state_dict, param_groups
from fastlars.dialects import ABOUT
from reference import Array, norm, to_array

M, DECAY, C = 0.9, 0.05, 0.1
STEPS = 20
# warm-up, decay, one step at 0; above 1, for the clips
LRS = [0.1 * (step + 1) for step in range(5)] + [3.0 * (1 - step / 15) ** 2 for step in range(14)] + [0.0]
RNG = np.random.default_rng(0)
# adapted: a matrix, a kernel, a tensor of zeros; not adapted: a vector
SHAPES = [(3, 5), (4, 3, 2, 2), (2, 7), (6,)]
PARAMS = [RNG.standard_normal(shape) for shape in SHAPES]
PARAMS[2] = 0 * PARAMS[2]
GRADS = [[RNG.standard_normal(shape) for shape in SHAPES] for _ in range(STEPS)]
# sometimes no gradient for the first tensor, unless the package then decays it
PAUSES = [[g * (i > 0 or step % 7 != 3) for i, g in enumerate(grads)] for step, grads in enumerate(GRADS)]
ADAPTED, VECTORS = slice(0, 3), slice(3, 4)

Grads = Sequence[Sequence[Array]]
Groups = list[dict[str, Any]]


# ---------------------------------------------------------------- running either
class Run:
    """A torch optimizer over copies of the parameters, with vectors in a group of their own."""

    def __init__(
        self, make: Callable[[Groups], torch.optim.Optimizer], params: Sequence[Array], **vectors: Any
    ) -> None:
        self.params = [Parameter(torch.tensor(values)) for values in params]
        groups: Groups = [{"params": self.params[ADAPTED]}, {"params": self.params[VECTORS], **vectors}]
        self.optimizer = make([group for group in groups if group["params"]])

    def step(self, grads: Sequence[Array], lr: float) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = torch.tensor(g)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def values(self) -> list[Array]:
        return [to_array(p) for p in self.params]


class OptaxRun:
    """optax.lars over the same parameters, with vectors masked."""

    def __init__(self, params: Sequence[Array], **options: Any) -> None:
        def make(learning_rate: Any) -> Any:
            mask = [len(shape) > 1 for shape in SHAPES]
            return optax.lars(learning_rate, DECAY, mask, C, 0.0, mask, M, **options)

        self.params = [jax.numpy.asarray(values) for values in params]
        self.transform = optax.inject_hyperparams(make)(learning_rate=0.0)
        self.state = self.transform.init(self.params)

    def step(self, grads: Sequence[Array], lr: float) -> None:
        self.state.hyperparams["learning_rate"] = jax.numpy.asarray(lr)
        updates, self.state = self.transform.update([jax.numpy.asarray(g) for g in grads], self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def values(self) -> list[Array]:
        return [np.asarray(p) for p in self.params]


class Case(NamedTuple):
    dialect: str
    theirs: Callable[[Sequence[Array]], Run | OptaxRun]
    options: dict[str, Any] = {}  # noqa: RUF012  of ours
    grads: Grads = PAUSES


def in_torch(
    cls: Callable[..., torch.optim.Optimizer], *, vectors: dict[str, Any] | None = None, **options: Any
) -> Any:
    return lambda params: Run(
        lambda groups: cls(groups, lr=1.0, **options), params, **(vectors or {"weight_decay": 0.0})
    )


def ours(case: Case, params: Sequence[Array], foreach: bool) -> Run:
    options = {"weight_decay": DECAY, **case.options, **DIALECTS[case.dialect], "trust_coefficient": C}
    vectors = {"adapt": False, "weight_decay": 0.0}
    return Run(lambda groups: LARS(groups, lr=1.0, momentum=M, foreach=foreach, **options), params, **vectors)


TIMM = {"momentum": M, "weight_decay": DECAY, "trust_coeff": C}
PEER = {"momentum": M, "weight_decay": DECAY, "trust_coefficient": C}
NESTEROV = {"nesterov": True}
DAMPENING = {"dampening": 0.25}
Lars, Lightly, POLars = timm.optim.Lars, lightly.utils.lars.LARS, pytorch_optimizer.LARS
CASES: dict[str, Case] = {
    "lightly": Case("bolts", in_torch(Lightly, **PEER)),
    "lightly_nesterov": Case("bolts", in_torch(Lightly, **PEER, **NESTEROV), NESTEROV),
    "lightly_dampening": Case("bolts", in_torch(Lightly, **PEER, **DAMPENING), DAMPENING),
    "timm": Case("bolts", in_torch(Lars, **TIMM, foreach=False), grads=GRADS),
    "timm_foreach": Case("bolts", in_torch(Lars, **TIMM, foreach=True), grads=GRADS),
    "timm_nesterov": Case("bolts", in_torch(Lars, **TIMM, **NESTEROV), NESTEROV, GRADS),
    "timm_dampening": Case("bolts", in_torch(Lars, **TIMM, **DAMPENING), DAMPENING, GRADS),
    "timm_always": Case(
        "torchlars",
        # without decay, a zero gradient makes no difference
        in_torch(Lars, momentum=M, trust_coeff=C, always_adapt=True, vectors={"always_adapt": False}),
        {"weight_decay": 0.0},
    ),
    "timm_larc": Case("timm_larc", in_torch(Lars, **TIMM, trust_clip=True), grads=GRADS),
    "timm_larc_nesterov": Case("timm_larc", in_torch(Lars, **TIMM, **NESTEROV, trust_clip=True), NESTEROV, GRADS),
    "optax": Case("simclr", OptaxRun),
    "optax_nesterov": Case("simclr", lambda params: OptaxRun(params, nesterov=True), NESTEROV),
    "pytorch_optimizer": Case("pytorch_optimizer", in_torch(POLars, **PEER), grads=GRADS),
    "pytorch_optimizer_foreach": Case("pytorch_optimizer", in_torch(POLars, **PEER, foreach=True), grads=GRADS),
    "pytorch_optimizer_nesterov": Case("pytorch_optimizer", in_torch(POLars, **PEER, **NESTEROV), NESTEROV, GRADS),
    "pytorch_optimizer_no_decay": Case(
        "pytorch_optimizer", in_torch(POLars, momentum=M, trust_coefficient=C), {"weight_decay": 0.0}
    ),
}


def first_params(name: str) -> list[Array]:
    """Without the tensor of zeros if the package differs there, which a test below describes."""
    return [values + (name.startswith("timm_larc") and not values.any()) for values in PARAMS]


def assert_close(run: Run, theirs: Run | OptaxRun, where: str) -> None:
    for i, (value, expected) in enumerate(zip(run.values(), theirs.values(), strict=True)):
        np.testing.assert_allclose(value, expected, rtol=1e-10, atol=1e-13, err_msg=f"{where}, tensor {i}")


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("name", CASES)
def test_parity(name: str, foreach: bool) -> None:
    case = CASES[name]
    theirs, run = case.theirs(first_params(name)), ours(case, first_params(name), foreach)
    for step, (grads, lr) in enumerate(zip(case.grads, LRS, strict=True)):
        theirs.step(grads, lr)
        run.step(grads, lr)
        assert_close(run, theirs, f"{name}, step {step}")
    moved = [np.abs(value - old).max() for value, old in zip(run.values(), first_params(name), strict=True)]
    assert min(moved) > 1e-3, "all tensors have moved"


@pytest.mark.parametrize("dialect", [name for name, row in DIALECTS.items() if not row.get("lr_in_momentum")])
def test_what_is_not_adapted_is_torch_sgd(dialect: str) -> None:
    options = {"momentum": M, "weight_decay": DECAY, "nesterov": True}
    theirs = in_torch(torch.optim.SGD, **options)(PARAMS)
    run = Run(
        lambda groups: LARS(groups, lr=1.0, **{**options, **DIALECTS[dialect], "adapt": False}),
        PARAMS,
        weight_decay=0.0,
    )
    for grads, lr in zip(PAUSES, LRS, strict=True):
        theirs.step(grads, lr)
        run.step(grads, lr)
        for value, expected in zip(run.values(), theirs.values(), strict=True):
            np.testing.assert_array_equal(value, expected)


# ---------------------------------------------------------------- defaults: what a user gets who changes the import
@pytest.mark.parametrize("cls", [Lightly, Lars, POLars], ids=["lightly", "timm", "pytorch_optimizer"])
def test_our_defaults_are_theirs_except_for_the_migration_notes(cls: Any) -> None:
    parameter = [Parameter(torch.ones(2, 2))]
    theirs, mine = cls(parameter, lr=1.0).defaults, LARS(parameter, lr=1.0).defaults
    renamed = {"trust_coeff": "trust_coefficient", "always_adapt": "adapt"}
    differing = {key for key, value in theirs.items() if mine[renamed.get(key, key)] != value}
    assert differing == {Lightly: set(), Lars: {"always_adapt"}, POLars: {"momentum"}}[cls]


# ---------------------------------------------------------------- differences, in the packages themselves
LR = 2.0
W, G = PARAMS[0], GRADS[0][0]


def after_one_step(make: Callable[..., torch.optim.Optimizer], w: Array, g: Array, **options: Any) -> Array:
    p = Parameter(torch.tensor(w))
    p.grad = torch.tensor(g)
    make([p], lr=LR, momentum=M, weight_decay=DECAY, **options).step()
    return to_array(p)


def scaled(w: Array, g: Array) -> Array:
    return LR * C * norm(w) / (norm(g) + DECAY * norm(w)) * (g + DECAY * w)


DIFFERENCES: dict[str, tuple[Array, Array]] = {
    "timm zero gradient": (after_one_step(Lars, W, 0 * G), W - LR * DECAY * W),
    "timm_larc zero gradient": (after_one_step(Lars, W, 0 * G, trust_clip=True), W - DECAY * W),
    "timm_larc zero parameter": (after_one_step(Lars, 0 * W, G, trust_clip=True), -G),
    "pytorch_optimizer vectors": (after_one_step(POLars, W[0], G[0], trust_coefficient=C), W[0] - LR * G[0]),
    "pytorch_optimizer zero gradient": (after_one_step(POLars, W, 0 * G, trust_coefficient=C), W - LR * C * W),
    "pytorch_optimizer first step": (
        after_one_step(POLars, W, G, trust_coefficient=C, dampening=0.25),
        W - 0.75 * scaled(W, G),
    ),
}


def test_every_difference_of_an_installed_package_is_tested_here() -> None:
    elsewhere = (
        "torchlars",
        "solo-learn",
        "paper",
        "mlperf",
    )  # not installable here; tests/test_dialects.py has their formulas
    told = {case for about in ABOUT.values() for case in about.differs if case.split()[0] not in elsewhere}
    assert told == set(DIFFERENCES)


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_package_differs_as_the_table_says(case: str) -> None:
    actual, expected = DIFFERENCES[case]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


def test_bitsandbytes_caps_the_update_and_is_no_dialect() -> None:
    """v = m v + g + decay w; w -= lr min(1, max_unorm |w| / |v|) v. There is no ratio of a gradient, and float32 only."""
    p = Parameter(torch.tensor(W, dtype=torch.float32))
    optimizer = bitsandbytes.optim.LARS32bit([p], lr=0.5, momentum=M, weight_decay=DECAY, max_unorm=0.02)
    w, v = W, 0 * W
    for step, grads in enumerate(GRADS):
        p.grad = torch.tensor(grads[0] * 1e-2 ** (step % 2), dtype=torch.float32)
        optimizer.param_groups[0]["lr"] = LRS[step]
        optimizer.step()
        v = M * v + to_array(p.grad) + DECAY * w
        w = w - LRS[step] * min(1.0, 0.02 * norm(w) / norm(v)) * v
        np.testing.assert_allclose(to_array(p), w, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- conversion of what the packages save
CONVERSIONS = ("lightly", "lightly_nesterov", "timm", "timm_larc", "pytorch_optimizer", "optax", "optax_nesterov")


def saved_by(theirs: Run | OptaxRun) -> dict[str, Any]:
    if isinstance(theirs, Run):
        return copy.deepcopy(theirs.optimizer.state_dict())
    leaves = jax.tree.leaves(theirs.state.inner_state[-1].trace)
    return {"state": {i: {"trace": torch.tensor(np.asarray(leaf))} for i, leaf in enumerate(leaves)}}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_run_resumes_after_conversion(name: str) -> None:
    case = CASES[name]
    theirs = case.theirs(first_params(name))
    for grads, lr in zip(case.grads[:10], LRS[:10], strict=True):
        theirs.step(grads, lr)

    run = ours(case, theirs.values(), foreach=False)
    saved = convert_state_dict(saved_by(theirs), run.optimizer, params=run.params)
    run.optimizer.load_state_dict(saved)
    for step in range(10, STEPS):
        theirs.step(case.grads[step], LRS[step])
        run.step(case.grads[step], LRS[step])
        assert_close(run, theirs, f"{name}, step {step}")


def test_lightly_needs_no_conversion() -> None:
    case = CASES["lightly"]
    theirs = case.theirs(PARAMS)
    for grads, lr in zip(PAUSES[:10], LRS[:10], strict=True):
        theirs.step(grads, lr)
    run = Run(lambda groups: LARS(groups, lr=9.0), theirs.values())
    run.optimizer.load_state_dict(saved_by(theirs))
    for step in range(10, STEPS):
        theirs.step(PAUSES[step], LRS[step])
        run.step(PAUSES[step], LRS[step])
        assert_close(run, theirs, f"step {step}")


def test_timm_orders_parameters_in_its_own_way() -> None:
    """create_optimizer_v2 puts tensors without decay first. The order of its groups tells whose state it is."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 3)).double()
    theirs = timm.optim.create_optimizer_v2(model, "lars", lr=0.5, weight_decay=DECAY, momentum=M)
    order = [p for group in theirs.param_groups for p in group["params"]]
    assert [id(p) for p in order] != [id(p) for p in model.parameters()]
    model(torch.ones(2, 4).double()).square().sum().backward()
    theirs.step()

    optimizer = LARS(param_groups(model, DECAY), lr=9.0, momentum=M)
    with pytest.raises(ValueError, match="pass params"):
        convert_state_dict(theirs.state_dict(), LARS(model.parameters(), lr=9.0))
    optimizer.load_state_dict(convert_state_dict(theirs.state_dict(), optimizer, params=order))
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["momentum_buffer"], theirs.state[p]["momentum_buffer"])


@pytest.mark.parametrize("cls", ["LARS", "PytorchLARS"])
def test_bitsandbytes_stays_capped(cls: str) -> None:
    p = Parameter(torch.tensor(W, dtype=torch.float32))
    theirs = getattr(bitsandbytes.optim, cls)([p], lr=0.5, momentum=M, weight_decay=DECAY, max_unorm=0.02)
    for grads in GRADS[:3]:
        before = to_array(p)
        p.grad = torch.tensor(grads[0], dtype=torch.float32)
        theirs.step()
    last = to_array(p) - before
    optimizer = LARS([p], lr=9.0, momentum=M, adapt=True)
    if cls == "LARS":
        with pytest.raises(ValueError, match="convert_state_dict"):
            optimizer.load_state_dict(theirs.state_dict())
    optimizer.load_state_dict(convert_state_dict(theirs.state_dict(), optimizer))
    before = to_array(p)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    # their cap uses the norm before the step, the conversion the norm after it, 1 % apart here
    np.testing.assert_allclose(to_array(p) - before, M * last, rtol=0.02, atol=1e-6)

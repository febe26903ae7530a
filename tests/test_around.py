"""What surrounds a step in training: schedulers, averages, hooks, closures, and gradients zeroed, accumulated or consumed.

Groups that are not adapted are compared with torch's SGD in the same place, bit for bit, and adapted ones with the reference.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import harness
from cases import BASE, OPTIONS, Options, make_grads, make_params
from fastlars import LARS
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, implementations, option_sets, pairs, set_grads
from reference import ReferenceLARS

pytestmark = ignore_nothing_adapted
LAYOUTS = ["matrix", "conv", "vector_1025", "scalar"]
MOMENTUM: Options = {**BASE, "momentum": 0.9}


def sgd_of(options: Options) -> Options:
    """Options of torch's SGD that equal LARS with adapt=False."""
    return {key: value for key, value in options.items() if key not in ("trust_coefficient", "adapt")}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.Linear(9, 2))


def loss_of(model: nn.Module, step: int, size: int = 8) -> Tensor:
    data = torch.randn(size, 6, generator=torch.Generator().manual_seed(step))
    return model(data).square().mean()


# ---------------------------------------------------------------- schedulers
S = lr_scheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda step: 1 / (step + 1)),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: S.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, total_iters=2), S.ExponentialLR(o, 0.8)], [2]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, total_iters=2), S.ExponentialLR(o, 0.8)]),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=0),
    # these two write momentum too
    "CyclicLR": lambda o: S.CyclicLR(o, 0.1, 0.5, step_size_up=2, base_momentum=0.7, max_momentum=0.95),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.5, total_steps=7),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def test_these_are_all_schedulers() -> None:
    assert SCHEDULERS.keys() == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")  # in torch 2.4's SequentialLR itself
@pairs("name how tensor_lr", SCHEDULERS, IMPLEMENTATIONS, [False, True])
def test_schedulers(name: str, how: str, tensor_lr: bool) -> None:
    """Each step equals the reference at the lr and momentum that the same scheduler gives torch's SGD."""
    lr = torch.tensor(BASE["lr"]) if tensor_lr else BASE["lr"]
    for nesterov in (False, True):
        options = {**MOMENTUM, "nesterov": nesterov}
        params = make_params(torch.float32, layouts=LAYOUTS)
        optimizer, sgd = (
            cls(ps, **{**some, "lr": lr.clone() if isinstance(lr, Tensor) else lr}, **how)
            for cls, ps, some, how in (
                (LARS, params, options, IMPLEMENTATIONS[how]),
                (SGD, make_params(torch.float32, layouts=LAYOUTS), sgd_of(options), {}),
            )
        )
        reference = ReferenceLARS([{"params": params}], **options)
        schedulers = [SCHEDULERS[name](o) for o in (optimizer, sgd)]
        history = []
        for step in range(6):
            group = optimizer.param_groups[0]
            assert type(group["lr"]) is type(sgd.param_groups[0]["lr"])
            # if an old scheduler writes a float while lr is a tensor, ours becomes a float32 tensor
            assert float(group["lr"]) == pytest.approx(float(sgd.param_groups[0]["lr"]), rel=1e-7)
            assert group["momentum"] == sgd.param_groups[0]["momentum"]
            history.append((float(group["lr"]), group["momentum"]))
            reference.groups[0].update(lr=float(group["lr"]), momentum=group["momentum"])
            grads = make_grads("dense", params, step)
            set_grads(params, grads)
            optimizer.step()
            sgd.step()
            reference.step(grads)
            harness.assert_equals(reference, optimizer, f"{name}, step {step}")
            reference.realign(params, buffers_of(optimizer))
            for scheduler in schedulers:
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        assert len({lr for lr, _ in history}) > 1
        assert (len({momentum for _, momentum in history}) > 1) == (name in ("CyclicLR", "OneCycleLR"))


@implementations
def test_a_scheduler_that_brings_momentum_later(implementation: Options) -> None:
    """Buffers start when momentum does, and a step without momentum leaves them unchanged."""
    params = make_params(torch.float32, layouts=LAYOUTS)
    optimizer = LARS(params, **BASE, **implementation)
    reference = ReferenceLARS([{"params": params}], **BASE)
    for step, momentum in enumerate((0.0, 0.8, 0.9, 0.0, 0.7)):
        optimizer.param_groups[0]["momentum"] = reference.groups[0]["momentum"] = momentum
        grads = make_grads("dense", params, step)
        set_grads(params, grads)
        optimizer.step()
        reference.step(grads)
        assert bool(optimizer.state) == (step > 0)
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, buffers_of(optimizer))


@implementations
def test_a_scheduler_finds_a_step_to_count(implementation: Options) -> None:
    """Schedulers warn if called before step(), or if no step() follows. They look at the wrapped method."""
    for optimizer in (
        LARS(make_params(torch.float32, layouts=["matrix"]), **BASE, **implementation),
        SGD(make_params(torch.float32, layouts=["matrix"]), lr=0.1),
    ):
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        with pytest.warns(UserWarning, match="before `optimizer.step"):
            scheduler.step()
        scheduler = lr_scheduler.StepLR(optimizer, 1)
        optimizer.step()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            scheduler.step()


# ---------------------------------------------------------------- averages
@implementations
@pytest.mark.parametrize("ema", [False, True])
def test_averages(ema: bool, implementation: Options) -> None:
    """SWA and EMA of the parameters that each implementation wrote, with and without version counters."""
    model = small_model()
    optimizer = LARS(model.parameters(), **MOMENTUM, **implementation)
    scheduler = swa_utils.SWALR(optimizer, swa_lr=0.2, anneal_epochs=2)
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.75) if ema else None)
    values: list[list[Tensor]] = []
    for step in range(5):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
        values.append([p.detach().double().clone() for p in model.parameters()])
    for i, actual in enumerate(averaged.module.parameters()):
        expected = values[0][i]
        for count, value in enumerate(values[1:], start=1):
            weight = 0.25 if ema else 1 / (count + 1)
            expected = expected + weight * (value[i] - expected)
        torch.testing.assert_close(actual.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(actual, values[-1][i].float())
    swa_utils.update_bn([torch.randn(8, 6)], averaged)


# ---------------------------------------------------------------- hooks
def log_of(make: Callable[[list[nn.Parameter]], Optimizer]) -> list[Any]:
    """Every callback around two steps, a save and a load, in order, with the values seen there."""
    (param,) = make_params(torch.float32, layouts=["matrix"])
    optimizer = make([param])
    log: list[Any] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        def hook(seen: Optimizer, *args: Any) -> Any:
            assert seen is optimizer
            kinds = [
                sorted(arg) if isinstance(arg, dict) else len(arg) for arg in args if isinstance(arg, (dict, tuple))
            ]
            if args and isinstance(args[0], dict):
                kinds = ["state dict"]
            log.append((name, kinds, torch.is_grad_enabled(), param.detach().clone().sum().item()))
            return result

        return hook

    def closure() -> Tensor:
        log.append(("closure", torch.is_grad_enabled()))
        optimizer.zero_grad()
        loss = (param * 2).square().sum()
        loss.backward()
        return loss

    def other_closure() -> str:
        log.append("closure of a hook")
        closure()
        return "its loss"

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre")),
        optimizer.register_state_dict_post_hook(note("state_dict post")),
        optimizer.register_load_state_dict_pre_hook(note("load pre")),
        optimizer.register_load_state_dict_post_hook(note("load post")),
        optimizer.register_state_dict_pre_hook(note("state_dict pre, first"), prepend=True),
        optimizer.register_load_state_dict_post_hook(note("load post, first"), prepend=True),
    ]
    try:
        log.append(optimizer.step(closure).item())
        with torch.no_grad():
            log.append(optimizer.step(closure=closure).item())
        replacing = optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, other_closure), {}))
        log.append(optimizer.step())
        replacing.remove()
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    log.append((optimizer.step(), torch.is_grad_enabled(), param.detach().sum().item()))
    return log


@implementations
def test_hooks_and_closures_are_called_as_around_torch_sgd(implementation: Options) -> None:
    options = {"lr": 0.1, "momentum": 0.9}
    mine = log_of(lambda params: LARS(params, **options, adapt=False, **implementation))
    theirs = log_of(lambda params: SGD(params, **options, **implementation))
    assert mine == theirs
    names = [entry[0] for entry in mine if isinstance(entry, tuple)]
    assert names[:5] == ["global pre", "pre", "closure", "post", "global post"]


@implementations
def test_a_hook_may_replace_what_is_saved_and_loaded(implementation: Options) -> None:
    params = make_params(torch.float32, layouts=LAYOUTS)
    optimizer = LARS(params, **MOMENTUM, **implementation)
    set_grads(params, make_grads("dense", params, 0))
    optimizer.step()
    saving = optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "extra": 1})
    saved = optimizer.state_dict()
    saving.remove()
    assert saved["extra"] == 1

    def halved(_optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {"momentum_buffer": s["momentum_buffer"] / 2} for i, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    expected = [b / 2 for b in buffers_of(optimizer) if b is not None]
    optimizer.register_load_state_dict_pre_hook(halved)
    optimizer.load_state_dict(saved)
    for actual, value in zip(buffers_of(optimizer), expected, strict=True):
        assert torch.equal(actual, value)


@implementations
def test_names_in_the_profiler(implementation: Options) -> None:
    """Named like torch's own: Optimizer.step#LARS.step."""
    names = []
    for cls in (LARS, SGD):
        params = make_params(torch.float32, layouts=LAYOUTS)
        optimizer = cls(params, lr=0.1, **implementation)
        set_grads(params, make_grads("dense", params, 0))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        names.append({e.name.replace(cls.__name__, "") for e in profile.events() if e.name.startswith("Optimizer.")})
    assert names[0] == names[1] == {"Optimizer.step#.step", "Optimizer.zero_grad#.zero_grad"}


# ---------------------------------------------------------------- gradients
@implementations
@option_sets
def test_gradients_set_to_zero_take_a_step(name: str, implementation: Options) -> None:
    """d is 0 (or the decay, where the formula keeps it) and v continues. Without a gradient the tensor does not change."""
    params = make_params(torch.float32)
    optimizer = LARS(params, **OPTIONS[name], **implementation)
    reference = ReferenceLARS([{"params": params}], **OPTIONS[name])
    for step in range(4):
        if step % 2:
            optimizer.zero_grad(set_to_none=False)
            assert all(not p.grad.any() for p in params)
        else:
            set_grads(params, make_grads("dense", params, step))
        reference.step([p.grad for p in params])
        optimizer.step()
        harness.assert_equals(reference, optimizer, f"step {step}")
        reference.realign(params, harness.started(reference, buffers_of(optimizer)))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


@implementations
def test_accumulated_gradients_are_those_of_the_large_batch(implementation: Options) -> None:
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))
        optimizer = LARS(model.parameters(), **MOMENTUM, **implementation)
        for step in range(3):
            data = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
            for part in data.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()])
    for whole, accumulated in zip(*results, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)
        assert not torch.equal(whole, torch.zeros_like(whole))


@implementations
@pytest.mark.parametrize("name", ["momentum", "dampening", "nesterov-joint", "momentum-unadapted", "clip-paper"])
def test_one_optimizer_a_parameter_inside_backward(name: str, implementation: Options) -> None:
    """The same bits as one step after backward. A weight that is used twice steps once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared, self.last = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x)))))))

    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = Twice()
        options = {**OPTIONS[name], **implementation}
        if inside:
            optimizers = {p: LARS([p], **options) for p in model.parameters()}

            def consume(param: Tensor, optimizers: dict[Any, LARS] = optimizers) -> None:
                optimizers[param].step()
                optimizers[param].zero_grad()

            for param in model.parameters():
                param.register_post_accumulate_grad_hook(consume)
        else:
            optimizer = LARS(model.parameters(), **options)
        for step in range(3):
            loss_of(model, step).backward()
            if inside:
                assert all(p.grad is None for p in model.parameters())
            else:
                optimizer.step()
                optimizer.zero_grad()
        buffers = [b for o in (optimizers.values() if inside else [optimizer]) for b in buffers_of(o) if b is not None]
        results.append([*model.parameters(), *buffers])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@implementations
def test_training_around_is_that_of_torch_sgd(implementation: Options) -> None:
    """All of it together, bit for bit: schedule, clipping, accumulation, a layer frozen and unfrozen, save and load."""
    results = []
    for adapted in (False, None):
        model = small_model()
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}

        def make(model: nn.Module = model, options: Options = options, adapted: bool | None = adapted) -> Optimizer:
            if adapted is None:
                return SGD(model.parameters(), **options, **implementation)
            return LARS(model.parameters(), **options, adapt=False, **implementation)

        optimizer = make()
        scheduler = lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9)
        model[0].requires_grad_("fused" in implementation)  # torch's fused SGD fails if a layer is unfrozen later
        for step in range(6):
            if step == 3:
                model[0].requires_grad_(True)
                saved, schedule = optimizer.state_dict(), scheduler.state_dict()
                optimizer = make()
                scheduler = lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=9)
                optimizer.load_state_dict(saved)
                scheduler.load_state_dict(schedule)
            for part in range(2):
                loss_of(model, 2 * step + part).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            scheduler.step()
        results.append([*model.parameters(), *(b for b in buffers_of(optimizer) if b is not None)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

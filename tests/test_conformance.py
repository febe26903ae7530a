"""What torch's own suite asks of every optimizer (test/test_optim.py, class TestOptimRenewed), applied to LARS.

It uses torch's own description of an optimizer, an OptimizerInfo, which optimizer_info.py fills in. Behaviour that another
file tests more strictly is not repeated. The table in torch_optimizers.md says which test covers what, and the last tests
of this file check the table.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau

import pages
from cases import BASE, Options, pairwise, tolerance
from fastlars.backends import eager, torch_sgd
from fastlars.options import NAMES
from harness import IMPLEMENTATIONS, buffers_of, ignore_nothing_adapted, implementations, loop_over
from optimizer_info import CANNOT, LARS, info

pytestmark = ignore_nothing_adapted

INFO = info()
INPUTS: dict[str, Options] = {each.desc: each.kwargs for each in INFO.optim_inputs_func(device="cpu")}
ERRORS = {
    each.optimizer_error_input.desc: each for each in INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
}
on_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_cuda)])
inputs = loop_over("given", INPUTS.values())


def everywhere(**given: Any) -> Iterator[Options]:
    """The options with each implementation, on copies, because schedulers write into a tensor lr."""
    for implementation in IMPLEMENTATIONS.values():
        yield {**copy.deepcopy(given), **implementation}


SCHEDULES = [[], *INFO.scheduler_inputs]
# each implementation with each of torch's sets of schedulers, pairwise
SCHEDULED = pairwise(INPUTS, range(len(SCHEDULES)), IMPLEMENTATIONS, [True, False])


def scheduled(desc: str) -> Iterator[tuple[Options, list[Any], bool]]:
    """The options of these inputs, factories of schedulers, and whether tensors are contiguous."""
    for _, schedule, implementation, contiguous in (row for row in SCHEDULED if row[0] == desc):
        yield {**copy.deepcopy(INPUTS[desc]), **IMPLEMENTATIONS[implementation]}, SCHEDULES[schedule], contiguous


def small_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(device=device, dtype=dtype)


def backward(model: nn.Module) -> None:
    param = next(model.parameters())
    model(torch.linspace(0.1, 0.6, 6, dtype=param.dtype, device=param.device).view(3, 2)).sum().backward()


def weights(contiguous: bool = True, device: str = "cpu") -> tuple[Parameter, Parameter, Tensor]:
    torch.manual_seed(0)
    if contiguous:
        return (
            Parameter(torch.randn(10, 5, device=device)),
            Parameter(torch.randn(10, device=device)),
            torch.randn(5, device=device),
        )
    weight, bias = torch.randn(10, 5, 2, device=device)[..., 0], torch.randn(10, 2, device=device)[..., 0]
    return Parameter(weight), Parameter(bias), torch.randn(5, device=device)


def goes_right(optimizer: LARS, weight: Tensor, bias: Tensor, x: Tensor, schedule: list[Any]) -> bool:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure)
        for scheduler in schedule:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, ReduceLROnPlateau) else []))
    last = closure().item()
    return last > first if optimizer.param_groups[0]["maximize"] else last < first


# ---------------------------------------------------------------- the right direction
@devices
@pytest.mark.parametrize("desc", INPUTS)
def test_descends_under_schedulers(desc: str, device: str) -> None:
    for options, schedule, contiguous in scheduled(desc):
        weight, bias, x = weights(contiguous, device)
        optimizer = LARS([weight, bias], **options)
        assert goes_right(optimizer, weight, bias, x, [make(optimizer) for make in schedule])


@pytest.mark.parametrize("desc", INPUTS)
def test_groups_have_their_own_lr_and_decay(desc: str) -> None:
    """With schedulers. At an lr of nearly 0 the other group does not move."""
    for options, schedule, _ in scheduled(desc):
        weight, bias, x = weights()
        idle = Parameter(torch.ones(2))
        groups = [{"params": [weight], **options}, {"params": [bias], **options, "weight_decay": 0.0, "lr": 0.01}]
        optimizer = LARS([*groups, {"params": [idle]}], lr=1e-28)
        idle.grad = torch.ones(2)
        assert goes_right(optimizer, weight, bias, x, [make(optimizer) for make in schedule])
        assert torch.equal(idle, torch.ones(2))


# ---------------------------------------------------------------- implementations
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@devices
@pytest.mark.parametrize(
    ("desc", "dtype"), [(desc, DTYPES[(i + j) % 4]) for i, desc in enumerate(INPUTS) for j in (0, 1)]
)
def test_foreach_and_fused_are_the_loop(desc: str, dtype: torch.dtype, device: str) -> None:
    """Seven steps from equal values, one without gradients, a layer frozen for two, a 0-dim tensor, and state key by key."""
    every = everywhere(**INPUTS[desc])
    first, *others = [i for i in every if device == "cpu" or not i.get("fused") or dtype != torch.float64]
    for options in others:
        models, optimizers, all_params = [], [], []
        for each in (first, options):
            models.append(small_model(dtype, device))
            scalar = Parameter(torch.tensor(0.5, dtype=dtype, device=device))
            scalar.grad = torch.full_like(scalar, 0.25)
            all_params.append([*models[-1].parameters(), scalar])
            optimizers.append(LARS(all_params[-1], **copy.deepcopy(each)))
        for step in range(7):
            for model, optimizer in zip(models, optimizers, strict=True):
                scalar_grad = optimizer.param_groups[0]["params"][-1].grad
                model.zero_grad()
                model[2].requires_grad_(step not in (3, 4))
                if step != 2:
                    backward(model)
                optimizer.step()
                optimizer.param_groups[0]["params"][-1].grad = scalar_grad
            for param, other in zip(*all_params, strict=True):
                torch.testing.assert_close(other, param, **tolerance(dtype))
                state, other_state = (o.state.get(p, {}) for o, p in zip(optimizers, (param, other), strict=True))
                assert state.keys() == other_state.keys()
                with torch.no_grad():
                    other.copy_(param)
                    for key in state:
                        torch.testing.assert_close(other_state[key], state[key], **tolerance(dtype))
                        other_state[key].copy_(state[key])


@inputs
def test_a_complex_tensor_is_its_pairs_of_reals(given: Options) -> None:
    """Next to a real tensor. Viewed as pairs, a complex tensor has the same norm, so every step is the same."""
    for options in everywhere(**given):
        torch.manual_seed(0)
        mine = [Parameter(torch.randn(10, 5, dtype=torch.complex64)), Parameter(torch.randn(7))]
        pairs = [
            Parameter(torch.view_as_real(p.detach()).clone() if p.is_complex() else p.detach().clone()) for p in mine
        ]
        optimizers = [LARS(params, **copy.deepcopy(options)) for params in (mine, pairs)]
        for _ in range(3):
            for p, pair in zip(mine, pairs, strict=True):
                p.grad = torch.randn_like(p)
                pair.grad = torch.view_as_real(p.grad) if p.is_complex() else p.grad
            for optimizer in optimizers:
                optimizer.step()
            for p, pair in zip(mine, pairs, strict=True):
                torch.testing.assert_close(torch.view_as_real(p) if p.is_complex() else p, pair, rtol=1e-6, atol=1e-7)


@implementations
def test_a_complex_tensor_is_not_two_real_ones(implementation: Options) -> None:
    """torch asks this of optimizers without norms. Two real tensors have their own norms, so two ratios instead of one."""
    for adapt in (True, False):
        whole = Parameter(torch.tensor([3 + 1j, 4 - 2j]))
        real, imag = Parameter(whole.detach().real.clone()), Parameter(whole.detach().imag.clone())
        whole.grad, real.grad, imag.grad = (
            torch.tensor([1 + 2j, 1j]),
            torch.tensor([1.0, 0.0]),
            torch.tensor([2.0, 1.0]),
        )
        optimizers = [LARS(params, **BASE, adapt=adapt, **implementation) for params in ([whole], [real, imag])]
        ratios = [o.trust_ratios() for o in optimizers] if adapt else []
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(whole.detach(), torch.complex(real, imag).detach()) == (not adapt)
    squares = 3**2 + 1 + 4**2 + 2**2, 1 + 2**2 + 1
    expected = 0.1 * squares[0] ** 0.5 / (squares[1] ** 0.5 + 0.05 * squares[0] ** 0.5)
    assert ratios == [] or list(ratios[0].values()) == pytest.approx([expected])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@inputs
def test_foreach_is_the_default_on_cuda(given: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    adapted = given.get("adapt", given.get("weight_decay"))
    module, name = (eager, "_multi_tensor_update") if adapted else (torch_sgd, "sgd")
    original = getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **kw: (called.append(kw.get("foreach", True)), original(*args, **kw))
    )
    model = small_model(device="cuda")
    backward(model)
    LARS(model.parameters(), **copy.deepcopy(given)).step()
    assert called
    assert all(called)


# ---------------------------------------------------------------- steps that do nothing
@inputs
def test_nothing_happens_without_gradients(given: Options) -> None:
    for options in everywhere(**given):
        params = [Parameter(torch.ones(2, 3)), torch.ones(4)]
        optimizer = LARS(params, **options)
        assert optimizer.step(lambda: 5.0) == 5.0
        assert all(torch.equal(p, torch.ones_like(p)) for p in params)
        assert not optimizer.state


@inputs
def test_zero_gradients_without_decay_change_nothing(given: Options) -> None:
    for adapt in (True, False, None):
        for options in everywhere(**{**given, "weight_decay": 0.0, "adapt": adapt}):
            param = Parameter(torch.linspace(-1, 1, 5).view(5, 1))
            param.grad = torch.zeros_like(param)
            optimizer = LARS([param], **options)
            for _ in range(2):
                optimizer.step()
            assert torch.equal(param, torch.linspace(-1, 1, 5).view(5, 1))
            assert all(buffer is None or not buffer.any() for buffer in buffers_of(optimizer))


# ---------------------------------------------------------------- state
@loop_over("named desc", pairwise([(False, False), (True, False), (False, True), (True, True)], INPUTS)[::2])
def test_state_dicts_are_deterministic_with_and_without_names(named: tuple[bool, bool], desc: str) -> None:
    """A run resumes from a state dict as if it had not stopped, with or without names. Existing names stay."""
    for options in everywhere(**INPUTS[desc]):
        runs = []
        for with_names in named:
            model = small_model()
            params: Any = list(model.named_parameters() if with_names else model.parameters())
            optimizer = LARS(params, **copy.deepcopy(options))
            if runs:
                model.load_state_dict(copy.deepcopy(runs[0][0].state_dict()))
                optimizer.load_state_dict(copy.deepcopy(runs[0][1].state_dict()))
            for _ in range(0 if runs else 3):
                model.zero_grad()
                backward(model)
                optimizer.step()
            runs.append((model, optimizer))
        for model, optimizer in runs:
            model.zero_grad()
            backward(model)
            optimizer.step()
        states = [optimizer.state_dict() for _, optimizer in runs]
        names = [state["param_groups"][0].pop("param_names", None) for state in states]
        assert names[0] == ([name for name, _ in runs[0][0].named_parameters()] if named[0] else None)
        assert names[1] == ([name for name, _ in runs[0][0].named_parameters()] if any(named) else None)
        assert_equal(states[1], states[0])
        assert_equal(list(runs[1][0].parameters()), list(runs[0][0].parameters()))


def assert_equal(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0) if isinstance(left, Tensor) else None
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        left, right = list(left.values()), list(right.values())
    if isinstance(left, list):
        for one, other in zip(left, right, strict=True):
            assert_equal(one, other)
    elif not isinstance(left, Tensor):
        assert left == right


@inputs
def test_older_state_dicts_without_an_option_load_and_step(given: Options) -> None:
    for options in everywhere(**given):
        model = small_model()
        optimizer = LARS(model.parameters(), **options)
        for name in NAMES:
            saved = copy.deepcopy(optimizer.state_dict())
            del saved["param_groups"][0][name]
            optimizer.load_state_dict(saved)
            assert optimizer.param_groups[0].keys() >= {*NAMES}
            model.zero_grad()
            backward(model)
            optimizer.step()


@inputs
def test_no_state_is_empty(given: Options) -> None:
    for options in everywhere(**given):
        model = small_model()
        backward(model)
        optimizer = LARS(model.parameters(), **options)
        optimizer.step()
        assert all(optimizer.state.values())
        assert len(optimizer.state) == (4 if given.get("momentum") else 0)


@inputs
def test_deepcopy_copies_all_public_attributes(given: Options) -> None:
    for options in everywhere(**given):
        model = small_model()
        backward(model)
        optimizer = LARS(model.parameters(), **options)
        optimizer.step()
        public = [{k for k in vars(o) if not k.startswith("_")} for o in (optimizer, copy.deepcopy(optimizer))]
        assert public[0] == public[1] >= {"state", "param_groups", "defaults"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@inputs
def test_state_from_the_cpu_resumes_on_cuda(given: Options) -> None:
    """Also with a state dict of CPU tensors that has fused=True."""
    for fused in (None, True):
        model, moved = small_model(), small_model(device="cuda")
        optimizer = LARS(model.parameters(), **copy.deepcopy(given))
        backward(model)
        optimizer.step()
        moved.load_state_dict(model.state_dict())
        optimizer_moved = LARS(moved.parameters(), **copy.deepcopy(given))
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["fused"] = fused
        before = copy.deepcopy(saved)
        optimizer_moved.load_state_dict(saved)
        assert_equal(saved, before)
        for _ in range(3):
            for each, o in ((model, optimizer), (moved, optimizer_moved)):
                each.zero_grad()
                backward(each)
                o.step()
            for p, q in zip(model.parameters(), moved.parameters(), strict=True):
                torch.testing.assert_close(q.cpu(), p)


# ---------------------------------------------------------------- what every optimizer refuses
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_common_errors(error: Any) -> None:
    """Every entry of torch's error table for all optimizers, with torch's messages."""
    expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    given = error.optimizer_error_input
    with expected(error.error_type, match=error.error_regex):
        optimizer = LARS(given.params, **given.kwargs)
        assert error.error_on.name == "STEP_ERROR" or expected is pytest.warns, "it was made without an error"
        optimizer.step()


# ---------------------------------------------------------------- the table
# the tests of torch's class in their order, as of torch 2.6, then those that newer versions add
TORCH = """
optim_infos_do_not_specify_global_cliquey_kwargs errors forloop_goes_right_direction forloop_goes_right_direction_multigpu
param_group_with_lrscheduler_goes_right_direction tensor_lr rosenbrock_sparse complex complex_2d foreach_matches_forloop
mixed_device_dtype set_default_dtype_works_with_foreach foreach_large_tensor peak_memory_foreach fused_matches_forloop
fused_error_on_params_on_meta fused_large_tensor fused_does_not_step_if_foundinf cpu_load_state_dict
param_groups_weight_decay param_groups_lr step_is_noop_when_params_have_no_grad step_is_noop_for_zero_grads
optimizer_can_be_printed state_dict_deterministic can_load_older_state_dict can_load_from_to_named_state_dict
save_load_equality_with_weights_only load_nontensor_step state_dict_with_cuda_params state_dict_pre_hook
state_dict_post_hook state_dict_pre_post_hook load_state_dict_pre_hook_and_prepend load_state_dict_post_hook
load_state_dict_pre_post_hook step_post_hook step_pre_hook step_all_hooks deepcopy_copies_all_public_attrs
second_order_optims_return_consistent_types fused_cpu_matches_cuda defaults_changed_to_foreach non_empty_state
grads_are_never_inplaced_into adamw_serialization fused_mixed_precision_state_init
fused_mixed_precision_hook_skips_existing_state fused_mixed_precision_numerics step_iteration
""".split()  # noqa: SIM905  lines of words, not of quotes
# tests that LARS cannot or need not satisfy; their rows give the reason
EXCEPTIONS = {
    "complex_2d", "rosenbrock_sparse", "optim_infos_do_not_specify_global_cliquey_kwargs",
    "second_order_optims_return_consistent_types", "fused_does_not_step_if_foundinf", "cpu_load_state_dict",
    "adamw_serialization", "fused_mixed_precision_state_init", "fused_mixed_precision_hook_skips_existing_state",
    "fused_mixed_precision_numerics", "step_iteration",
}  # fmt: skip
# of these, the tests that hold in part
IN_PART = {"complex_2d", "rosenbrock_sparse", "fused_does_not_step_if_foundinf", "cpu_load_state_dict"}
TABLE = pages.ROOT / "tests" / "torch_optimizers.md"
ROW = re.compile(r"^\| `(\w+)` \|[^|]*\| (.*) \|$", re.MULTILINE)
HELD_BY = re.compile(r"`(test_\w+)::(test_\w+)`")


def rows() -> dict[str, str]:
    found = ROW.findall(TABLE.read_text(encoding="utf-8"))
    assert len(found) == len(dict(found)), "a behaviour stands in the table twice"
    return dict(found)


def test_the_table_has_every_behaviour_and_its_test() -> None:
    assert list(rows()) == TORCH
    for behaviour, held_by in rows().items():
        named = HELD_BY.findall(held_by)
        assert bool(named) == (behaviour not in EXCEPTIONS - IN_PART), behaviour
        assert ("cannot" in held_by or "does not apply" in held_by) == (behaviour in EXCEPTIONS), behaviour


def test_the_table_and_the_page_name_existing_tests_and_the_page_one_for_every_promise() -> None:
    page = (pages.ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for module, test in HELD_BY.findall(TABLE.read_text(encoding="utf-8") + page):
        text = (pages.ROOT / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert f"\ndef {test}(" in text, f"{module}::{test} is not there"
    promises = re.findall(
        r"^\| .* \|$", page.partition("\n## What you can rely on\n")[2].partition("\n## ")[0], re.MULTILINE
    )
    assert len(promises) > 15
    assert not [row for row in promises[2:] if not HELD_BY.search(row)]


def test_inputs_use_every_option() -> None:
    used = {name for options in INPUTS.values() for name in options}
    # test_differentiable.py and test_kahan_sum.py cover the others
    assert used | {"eps", "kahan_sum", *INFO.supported_impls} == {*NAMES}
    assert {name.removeprefix("test_") for name in CANNOT} <= {*TORCH}

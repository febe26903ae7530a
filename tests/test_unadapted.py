"""Groups that are not adapted equal torch's SGD bit for bit, and a LARS that adapts nothing says so once."""

import copy
import itertools
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import BASE, COMPLEX, HISTORIES, LAYOUTS, REAL, STEPS, Options, make_grads, make_params, pairwise
from fastlars import LARS
from harness import IMPLEMENTATIONS, buffers_of, implementations, set_grads
from recording import Recorder

DTYPES = (*REAL, *COMPLEX)
# torch's fused SGD ignores strides, and writes wrong values for half types in some versions, so LARS uses its own step there
FUSED_LAYOUTS = [name for name in LAYOUTS if name not in ("strided", "columns")]


def all_sgd_options() -> list[Options]:
    values: dict[str, tuple[Any, ...]] = {
        "momentum": (0.0, 0.9),
        "dampening": (0.0, 0.25),
        "nesterov": (False, True),
        "weight_decay": (0.0, 0.05),
        "maximize": (False, True),
    }
    sets = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
    return [o for o in sets if not o["nesterov"] or (o["momentum"] and not o["dampening"])]


def make_pair(dtype: torch.dtype, options: Options, implementation: Options, **more: Any) -> tuple[LARS, Any]:
    """Both optimizers over parameters of the same bits, in layouts that torch's implementation can step."""
    layouts = FUSED_LAYOUTS if implementation.get("fused") else tuple(LAYOUTS)
    lars, sgd = (make_params(dtype, layouts=layouts) for _ in range(2))
    both = {"lr": 0.1, **options, **implementation}
    return LARS(lars, **both, adapt=False, **more), torch.optim.SGD(sgd, **both)


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same_bits(lars: torch.optim.Optimizer, sgd: torch.optim.Optimizer, what: str) -> None:
    for left, right in zip(params_of(lars), params_of(sgd), strict=True):
        assert torch.equal(left, right), f"{what}: a parameter of shape {tuple(left.shape)} and {left.dtype}"
    for param, left, right in zip(params_of(lars), buffers_of(lars), buffers_of(sgd), strict=True):
        # LARS creates its buffers at once and fills them with zeros
        assert (left is None or not left.any()) if right is None else torch.equal(left, right), (
            f"{what}: a buffer of shape {tuple(param.shape)} and {param.dtype}"
        )


def run_pair(lars: LARS, sgd: torch.optim.Optimizer, history: str, what: str) -> None:
    for step in range(STEPS):
        for optimizer in (lars, sgd):
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].mul_(0.7)
                else:
                    group["lr"] *= 0.7
            set_grads(params_of(optimizer), make_grads(history, params_of(optimizer), step))
            optimizer.step()
        assert_same_bits(lars, sgd, f"{what}, step {step}")


@implementations
def test_torch_sgd_bit_for_bit(implementation: Options) -> None:
    for options in all_sgd_options():
        for dtype in (torch.float32,) if implementation.get("fused") else DTYPES:
            run_pair(*make_pair(dtype, options, implementation), "dense", f"{options}, {dtype}")


@pytest.mark.parametrize("history", HISTORIES)
def test_torch_sgd_in_every_history(history: str) -> None:
    """All implementations, with option sets cycling over the histories."""
    everything = all_sgd_options()
    for options in everything[list(HISTORIES).index(history) % 2 :: 2]:
        for implementation in IMPLEMENTATIONS.values():
            # torch's fused SGD ignores strides, and leaves a late tensor's buffer uninitialised
            if not implementation.get("fused") or history not in ("other_layout", "late", "missing", "never"):
                run_pair(*make_pair(torch.float32, options, implementation), history, str(options))


@pytest.mark.parametrize("name", ["single", "foreach"])
def test_torch_sgd_with_a_tensor_lr(name: str) -> None:
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.complex64)
    for options, dtype, (lr_dtype, shape) in pairwise(
        all_sgd_options(), dtypes, [(torch.float32, ()), (torch.float64, (1,))]
    ):
        lars, sgd = make_pair(dtype, options, IMPLEMENTATIONS[name])
        for optimizer, its_shape in ((lars, shape), (sgd, ())):  # the only kind that some versions of torch accept
            optimizer.param_groups[0]["lr"] = torch.full(its_shape, 0.1, dtype=lr_dtype)
        run_pair(lars, sgd, "dense", f"{options}, {dtype}, {lr_dtype}")


@pytest.mark.parametrize("name", ["single", "foreach"])
def test_torch_sgd_while_nothing_is_skipped(name: str) -> None:
    """Without dampening, which skip_nonfinite excludes."""
    for i, options in enumerate(o for o in all_sgd_options() if not (o["momentum"] and o["dampening"])):
        for dtype in (DTYPES[i % 6], DTYPES[(i + 1) % 6]):
            pair = make_pair(dtype, options, IMPLEMENTATIONS[name], skip_nonfinite=True)
            run_pair(*pair, "dense", f"{options}, {dtype}")


@implementations
def test_unadapted_groups_beside_adapted_ones(implementation: Options) -> None:
    layouts = FUSED_LAYOUTS
    params = [make_params(torch.float32, layouts=layouts, seed=seed) for seed in (0, 1, 0)]
    lars = LARS(
        [{"params": params[1], "weight_decay": 0.05}, {"params": params[0], "adapt": False}],
        lr=0.1,
        momentum=0.9,
        **implementation,
    )
    sgd = torch.optim.SGD(params[2], lr=0.1, momentum=0.9, **implementation)
    for step in range(STEPS):
        for tensors in params:
            set_grads(tensors, make_grads("dense", tensors, step))
        lars.step()
        sgd.step()
        for left, right in zip(params[0], params[2], strict=True):
            assert torch.equal(left, right)
            assert torch.equal(lars.state[left]["momentum_buffer"], sgd.state[right]["momentum_buffer"])


@implementations
def test_gradients_are_copied_only_where_torch_sgd_writes_them(implementation: Options) -> None:
    for options in all_sgd_options():
        copied_only_where_torch_sgd_writes(options, implementation)


def copied_only_where_torch_sgd_writes(options: Options, implementation: Options) -> None:
    params = [torch.nn.Parameter(torch.ones(1000)) for _ in range(2)]
    lars = LARS(params[:1], lr=0.1, adapt=False, **options, **implementation)
    sgd = torch.optim.SGD(params[1:], lr=0.1, **options, **implementation)
    peaks, written = [], []
    for optimizer, param in zip((lars, sgd), params, strict=True):
        for _ in range(2):
            param.grad = torch.ones(1000)
            with Recorder() as recorder:
                optimizer.step()
        peaks.append(recorder.peak)
        written.append(not torch.equal(param.grad, torch.ones(1000)))
    assert not written[0], options
    assert peaks[0] <= peaks[1] + (1000 if written[1] else 0), options


# ---------------------------------------------------------------- the warning
def one_param() -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param


def warnings_of(optimizer: torch.optim.Optimizer, steps: int = 1) -> Sequence[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.step()
    return caught


def test_warns_once_an_optimizer() -> None:
    for _ in range(2):
        optimizer = LARS([one_param()], lr=0.1)
        (warning,) = warnings_of(optimizer, steps=3)
        assert warning.category is UserWarning
        for way_out in ("weight_decay", "fastlars.param_groups", "adapt=True", "adapt=False"):
            assert way_out in str(warning.message)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.add_param_group({"params": [one_param()]})
        assert not warnings_of(optimizer)


def test_a_copy_is_another_optimizer() -> None:
    optimizer = LARS([one_param()], lr=0.1)
    assert warnings_of(optimizer)
    assert len(warnings_of(copy.deepcopy(optimizer), steps=2)) == 1


@pytest.mark.parametrize("how", ["plain", "closure", "closure_by_keyword", "scheduler", "hooks"])
def test_warning_names_the_line_that_steps(how: str) -> None:
    optimizer = LARS([one_param()], lr=0.1)
    if how == "scheduler":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)  # this wraps the optimizer's step
    if how == "hooks":
        optimizer.register_step_pre_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if how == "closure":
            optimizer.step(lambda: torch.zeros(()))
        elif how == "closure_by_keyword":
            optimizer.step(closure=lambda: torch.zeros(()))
        else:
            optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("options", [{"adapt": False}, {"adapt": True}, {"weight_decay": 0.05}], ids=str)
def test_no_warning_if_adapt_is_set(options: Options) -> None:
    assert not warnings_of(LARS([one_param()], lr=0.1, **options))
    # in one group of several
    groups = [{"params": [one_param()]}, {"params": [one_param()], **options}]
    assert not warnings_of(LARS(groups, lr=0.1))


def test_warns_before_anything_changes() -> None:
    """Users who turn warnings into errors keep their parameters unchanged."""
    param = one_param()
    optimizer = LARS([param], lr=BASE["lr"], momentum=0.9)
    with pytest.raises(UserWarning, match="adapts no parameter"):
        optimizer.step()  # the test run itself turns warnings into errors
    assert torch.equal(param, torch.ones(3)) and not optimizer.state

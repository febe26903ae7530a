"""LARS as torch's own tests describe an optimizer: an OptimizerInfo from torch's module, which has one for each optimizer.

`info` serves test_conformance.py. As a pytest plugin this file replaces torch's optimizers with LARS, so that torch's own
test class runs on it. nox's session `torch_suite` does that with `test/test_optim.py` of a checkout of torch.
"""

import importlib.util
import inspect
import sys
import unittest
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch.optim import SGD

import fastlars
from cases import OPTIONS

NAME = "torch.testing._internal.common_optimizers"
# Tests of torch that LARS cannot satisfy; torch_optimizers.md says what holds instead.
CANNOT = {
    "test_complex_2d": "the norm of a complex tensor is not that of its real part, so there are two ratios, not one",
    "test_fused_error_on_params_on_meta": "fused=True is refused at construction, not at the first step",
    "test_defaults_changed_to_foreach": "_multi_tensor_lars is in the module of `lars`, not of the class",
    "test_fused_does_not_step_if_foundinf": "found_inf with momentum and dampening is refused, before anything changes",
}
# one test on a GPU: torch expects `capturable` as a group key of every class not named SGD or Adagrad
CANNOT_CAPTURABLE = "test_cpu_load_state_dict"


class LARS(fastlars.LARS):
    """LARS with a default lr, because torch's tests create many optimizers without one."""

    def __init__(self, params: Any, lr: Any = 0.05, **options: Any) -> None:
        super().__init__(params, lr, **options)


def make_info(common: ModuleType) -> Any:
    """The OptimizerInfo of LARS; ``common`` is torch's module that holds the class."""
    (sgd,) = (info for info in common.optim_db if info.optim_cls is SGD)

    def inputs(device: Any, dtype: Any = None) -> list[Any]:
        """torch's inputs for SGD, adapted and with steps above rounding, then inputs for options that SGD lacks."""
        made = sgd.optim_inputs_func(device=device, dtype=dtype)
        for each in made:
            each.kwargs = {"adapt": True, "trust_coefficient": 0.1, **each.kwargs}
        small = {"lr": 0.05, "momentum": 0.9}
        own = {
            name: {**OPTIONS[name], **small}
            for name in ("base", "unadapted", "clip", "joint", "paper", "skip_nonfinite")
        }
        own["not adapted for want of decay"] = {}
        return made + [common.OptimizerInput(params=None, kwargs=kwargs, desc=desc) for desc, kwargs in own.items()]

    def errors(device: Any, dtype: Any) -> list[Any]:
        """What every optimizer must refuse in torch's tests, and two refusals of our own; see test_wrong_input.py."""
        param = torch.zeros(2, 3, device=device, dtype=dtype)
        param.grad = torch.zeros_like(param).to_sparse()
        kinds = common.OptimizerErrorEnum
        own = [
            (
                None,
                {"momentum": -0.5},
                "momentum < 0",
                kinds.CONSTRUCTION_ERROR,
                ValueError,
                "momentum must be .* >= 0",
            ),
            ([param], {}, "sparse gradient", kinds.STEP_ERROR, RuntimeError, "LARS needs dense gradients"),
        ]
        return common.get_error_inputs_for_all_optims(device, dtype) + [
            common.ErrorOptimizerInput(
                common.OptimizerInput(params, kwargs, desc), error_on=when, error_type=error, error_regex=regex
            )
            for params, kwargs, desc, when, error, regex in own
        ]

    given = {"not_og_supported_flags": fastlars.options.NAMES}  # since torch 2.5: what state dicts may lack
    known = inspect.signature(common.OptimizerInfo).parameters
    return common.OptimizerInfo(
        LARS,
        optim_inputs_func=inputs,
        optim_error_inputs_func=errors,
        scheduler_inputs=sgd.scheduler_inputs,
        supported_impls=("foreach", "differentiable", "fused"),
        supports_fused_on=("cpu", "cuda"),
        skips=[
            *[common.DecorateInfo(unittest.skip(reason), "TestOptimRenewed", test) for test, reason in CANNOT.items()],
            common.DecorateInfo(
                unittest.skip("every step of LARS can be captured, so it has no option capturable"),
                "TestOptimRenewed",
                CANNOT_CAPTURABLE,
                active_if=lambda kwargs: kwargs.get("impl") == "capturable",
            ),
        ],
        **{name: value for name, value in given.items() if name in known},
    )


class _Decoration:
    """Stands for the decorators of torch's test classes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


def _load() -> ModuleType:
    """torch's module, without the three that it takes decorators from, which are slow and change TorchScript and hypothesis."""
    folder = NAME.rpartition(".")[0]
    stubs = {
        f"{folder}.{name}": ModuleType(name)
        for name in ("common_device_type", "common_methods_invocations", "common_utils")
    }
    for stub in stubs.values():
        stub.__getattr__ = lambda name: _Decoration  # type: ignore[method-assign]
    spec = importlib.util.find_spec(NAME)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module


def info() -> Any:
    """The OptimizerInfo of LARS, for the installed torch."""
    return make_info(_load())


def pytest_configure() -> None:
    """The pytest plugin."""
    common = importlib.import_module(NAME)
    common.optim_db[:] = [make_info(common)]

"""The optimizers that are timed: torch's SGD, every implementation of fastlars, and the other LARS optimizers for PyTorch.

All get the same hyper-parameters and groups. lr is so small that the tensors hardly change, however many steps are timed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import SGD, Optimizer

from fastlars import LARS, param_groups

YARDSTICK = "sgd-fused"
LOOP = "quadra-loop"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


class HostReadLoop(Optimizer):
    """A minimal LARS with the loop that Lightning Bolts, quadra and lightly share.

    It updates tensor by tensor, and Python reads each norm (``if norm != 0``). On a GPU the host therefore waits for the
    device at every tensor. The formula is that of fastlars's defaults.
    """

    def __init__(self, params: list[Any], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure
        for group in self.param_groups:
            for param in group["params"]:
                direction, decay = param.grad, group["weight_decay"]
                param_norm, grad_norm = torch.norm(param), torch.norm(direction)
                if decay != 0 and param_norm != 0 and grad_norm != 0:
                    ratio = 0.001 * param_norm / (grad_norm + decay * param_norm + 1e-8)
                    direction = direction.add(param, alpha=decay).mul_(ratio)
                state = self.state[param]
                if "momentum_buffer" in state:
                    velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(direction)
                else:
                    velocity = state["momentum_buffer"] = direction.clone()
                param.add_(velocity, alpha=-group["lr"])


# What LARS adapts. "weights" is real use, with the groups of param_groups, in which biases and norms are neither adapted nor
# decayed. "all" is one group, in which every LARS adapts every tensor, except pytorch_optimizer's, which leaves vectors out.
ADAPTED = ("weights", "all")


def groups_of(params: Sequence[Parameter], adapted: str) -> list[Any]:
    """The tensors or param groups from which an optimizer is built, for one of ADAPTED."""
    if adapted == "all":
        return list(params)
    return param_groups(((f"tensor{i}", param) for i, param in enumerate(params)), OPTIONS["weight_decay"])


@dataclass(frozen=True)
class Contender:
    """One optimizer as it is timed."""

    name: str  # on the command line and in the results
    title: str  # in tables and figures
    make: Callable[[list[Any]], Optimizer]
    package: str = ""  # the distribution of another package's LARS; empty for fastlars and torch
    fused_bytes: int | None = None  # bytes per float32 parameter of a Triton kernel, where operations cannot be counted
    compiled: bool = False

    def stepper(self, groups: list[Any]) -> Callable[[], object]:
        """The step of a new optimizer."""
        step = self.make(groups).step
        return torch.compile(step) if self.compiled else step

    @property
    def is_missing(self) -> bool:
        return bool(self.package) and importlib.util.find_spec(self.package) is None


def _sgd(name: str, **implementation: bool) -> Contender:
    ((key, value),) = implementation.items()
    return Contender(name, f"torch SGD({key}={value})", partial(SGD, **OPTIONS, **implementation))


def _ours(name: str, fused_bytes: int | None = None, compiled: bool = False, **implementation: bool) -> Contender:
    make = partial(LARS, **OPTIONS, **implementation)
    return Contender(f"fastlars-{name}", f"fastlars {name}", make, fused_bytes=fused_bytes, compiled=compiled)


def _peer(module: str, name: str, package: str) -> Contender:
    def make(groups: list[Any]) -> Optimizer:
        with warnings.catch_warnings():  # their imports may warn
            warnings.simplefilter("ignore")
            optimizer: Optimizer = getattr(importlib.import_module(module), name)(groups, **OPTIONS)
        return optimizer

    return Contender(package, package, make, package)


CONTENDERS = {
    contender.name: contender
    for contender in (
        _sgd(YARDSTICK, fused=True),
        _sgd("sgd-foreach", foreach=True),
        _sgd("sgd-loop", foreach=False),
        _ours("fused", 28, fused=True),
        _ours("foreach", foreach=True),
        _ours("single", foreach=False),
        _ours("compiled", compiled=True),
        Contender(LOOP, "quadra loop", lambda groups: HostReadLoop(groups, **OPTIONS)),
        _peer("lightly.utils.lars", "LARS", "lightly"),
        _peer("timm.optim", "Lars", "timm"),
        _peer("pytorch_optimizer", "LARS", "pytorch_optimizer"),
    )
}
OURS = tuple(name for name in CONTENDERS if name.startswith("fastlars"))
PEERS = tuple(contender.package for contender in CONTENDERS.values() if contender.package)


def title(contender: str) -> str:
    """The name in tables. Stored results may hold names that this version does not know."""
    return CONTENDERS[contender].title if contender in CONTENDERS else contender

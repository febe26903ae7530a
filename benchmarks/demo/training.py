"""The protocol, the network, and one training run."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

import fastlars
from fastlars.schedules import warmup_polynomial

from .data import Dataset, Split


@dataclass(frozen=True)
class Method:
    """An optimizer and what it does with the bias tensors. The table and the figure have one row or line for each."""

    optimizer: str  # "SGD" or "LARS"
    bias_lr: float | None  # peak lr of the bias tensors; None: the lr of the weights
    first_lr: float  # middle of the first grid; where it lies costs trials, it does not change the rule

    @property
    def name(self) -> str:
        return f"{self.optimizer}, {'one lr for all' if self.bias_lr is None else f'bias lr {self.bias_lr:g}'}"


# Both optimizers get both treatments of the biases, so that this knob is not counted as a merit of LARS.
BIAS_LR = 0.1
METHODS = (
    Method("SGD", bias_lr=None, first_lr=0.1),
    Method("SGD", bias_lr=BIAS_LR, first_lr=0.1),
    Method("LARS", bias_lr=None, first_lr=16.0),
    Method("LARS", bias_lr=BIAS_LR, first_lr=32.0),
)


@dataclass(frozen=True)
class Protocol:
    """What is the same for every method."""

    epochs: int = 20
    warmup_epochs: int = 2
    momentum: float = 0.9
    weight_decay: float = 5e-4  # of weights; biases have none
    first_trials: int = 5  # lrs in the first grid, factor 2 apart
    most_trials: int = 15  # a grid that has grown to this many is not moved further, and the table says so
    search_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    test_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Run:
    method: Method
    batch: int
    lr: float
    seed: int
    final: bool = False  # with the lr chosen: measured on the test split, and trust ratios noted


@dataclass(frozen=True)
class Result:
    run: Run
    accuracy: float  # percent of the images of the validation or, in a final run, the test split
    loss: float  # mean cross-entropy on them; inf after a divergence
    seconds: float
    trust_ratios: dict[str, list[float]] = field(default_factory=dict)  # layer -> one number an epoch


def build_model(height: int, width: int) -> nn.Sequential:
    """Two convolutions and two linear layers, no normalisation: 18 000 parameters for 8 x 8 pixels."""
    first_stride = 2 if max(height, width) > 16 else 1
    area = math.prod(math.ceil(math.ceil(side / first_stride) / 2) for side in (height, width))
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(1, 8, 3, stride=first_stride, padding=1),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        hidden=nn.Linear(16 * area, 64),
        relu3=nn.ReLU(),
        output=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def build_optimizer(model: nn.Module, run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """The same two groups for both optimizers: weights, and biases (never decayed, in LARS never adapted)."""
    unadapted = None if run.method.bias_lr is None else {"lr": run.method.bias_lr}
    groups = fastlars.param_groups(model, protocol.weight_decay, unadapted=unadapted)
    if run.method.optimizer == "LARS":
        return fastlars.LARS(groups, lr=run.lr, momentum=protocol.momentum)
    return torch.optim.SGD(groups, lr=run.lr, momentum=protocol.momentum)


def train(run: Run, protocol: Protocol, dataset: Dataset) -> Result:
    """Train one network and measure it: on the validation split, or in a final run on the test split.

    The seed alone sets the initial weights and the order of the images: they are the same for every method and lr.
    A run whose loss is no longer finite ends there and counts with the accuracy of what it has become.
    """
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    training = dataset.train
    model = build_model(*training.images.shape[2:])
    optimizer = build_optimizer(model, run, protocol)
    steps = len(training.labels) // run.batch
    scheduler = warmup_polynomial(optimizer, protocol.warmup_epochs * steps, protocol.epochs * steps, power=2.0)
    trust_ratios: dict[str, list[float]] = {}
    for _ in range(protocol.epochs):
        for step, indices in enumerate(torch.randperm(len(training.labels)).split(run.batch)):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(training.images[indices]), training.labels[indices])
            if not math.isfinite(loss.item()):
                break
            loss.backward()
            if run.final and step == 0 and isinstance(optimizer, fastlars.LARS):
                for name, ratio in optimizer.trust_ratios().items():
                    trust_ratios.setdefault(name.removesuffix(".weight"), []).append(ratio)
            optimizer.step()
            scheduler.step()
    accuracy, heldout_loss = _measure(model, dataset.test if run.final else dataset.validation)
    return Result(run, accuracy, heldout_loss, time.perf_counter() - started, trust_ratios)


@torch.no_grad()
def _measure(model: nn.Module, split: Split) -> tuple[float, float]:
    logits = model(split.images)
    accuracy = 100 * (logits.argmax(1) == split.labels).float().mean().item()
    loss = functional.cross_entropy(logits, split.labels).item()
    return accuracy, loss if math.isfinite(loss) else math.inf

"""The protocol, the network, and one training run."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import fastlars
from fastlars.schedules import warmup_polynomial

from .data import Dataset


@dataclass(frozen=True)
class Method:
    """An optimizer, its options, and what it does with the bias tensors."""

    optimizer: str  # one of OPTIMIZERS
    bias_lr: float | None  # peak lr of the bias tensors, or None for the lr of the weights
    first_lr: float  # middle of the first grid; a bad choice only costs more trials
    options: tuple[tuple[str, Any], ...] = ()  # options of the optimizer besides lr, momentum and weight decay
    clip: float | None = None  # the gradient of all tensors is clipped to this norm
    adapt_all: bool = False  # whether biases and norms are adapted too
    batch_norm: bool = False  # whether a batch norm follows each convolution of the network
    first_lr_power: float = 0.0  # if it is not 0, first_lr is for batch 8192 and grows with this power of the batch

    def middle(self, batch: int) -> float:
        """The middle of the first grid at this batch. It is first_lr times a power of 2."""
        return float(self.first_lr * 2.0 ** round(self.first_lr_power * math.log2(batch / 8192)))


# AdamW's betas[0], 0.9, is its momentum
OPTIMIZERS: dict[str, Any] = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW, "LARS": fastlars.LARS}

# SGD and LARS are both run with and without a separate lr for the biases, so this lr is not counted as a merit of LARS.
BIAS_LR = 0.1
LARS, LARS_ONE_LR = Method("LARS", bias_lr=BIAS_LR, first_lr=32.0), Method("LARS", bias_lr=None, first_lr=16.0)
SGDS = (Method("SGD", bias_lr=None, first_lr=0.1), Method("SGD", bias_lr=BIAS_LR, first_lr=0.1))
METHODS = (LARS, LARS_ONE_LR, *SGDS)


@dataclass(frozen=True)
class Protocol:
    """The settings that are the same for every method."""

    epochs: int = 20
    warmup_epochs: int = 2
    momentum: float = 0.9
    weight_decay: float = 5e-4  # weight decay of weights; biases have none
    first_trials: int = 5  # number of lrs in the first grid, a factor of 2 apart
    neighbours: int = 1  # trials that the best lr must have on either side before it counts as inside
    most_trials: int = 15  # a grid that has grown to this many is not moved further
    search_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    test_seeds: tuple[int, ...] = (0, 1, 2)
    first_stride: int = 1  # stride of the first convolution


@dataclass(frozen=True)
class Run:
    method: Method
    batch: int
    lr: float
    seed: int
    final: bool = False  # whether the run uses the chosen lr and is measured on the test split


@dataclass(frozen=True)
class Result:
    run: Run
    accuracy: float  # percent of the images of the validation or, in a final run, the test split
    loss: float  # mean cross-entropy on them; inf after a divergence
    seconds: float


def build_model(height: int, width: int, first_stride: int = 1, batch_norm: bool = False) -> nn.Sequential:
    """Two convolutions and two linear layers, by default without normalisation. 18,000 parameters for 8 x 8 pixels."""
    area = math.prod(math.ceil(math.ceil(side / first_stride) / 2) for side in (height, width))
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(1, 8, 3, stride=first_stride, padding=1),
        norm1=nn.BatchNorm2d(8) if batch_norm else nn.Identity(),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1),
        norm2=nn.BatchNorm2d(16) if batch_norm else nn.Identity(),
        relu2=nn.ReLU(),
        flatten=nn.Flatten(),
        hidden=nn.Linear(16 * area, 64),
        relu3=nn.ReLU(),
        output=nn.Linear(64, 10),
    )
    return nn.Sequential(layers)


def build_optimizer(model: nn.Module, run: Run, protocol: Protocol) -> torch.optim.Optimizer:
    """Every optimizer gets the same two groups, weights and the rest, which is not decayed, and adapted if `adapt_all`."""
    method = run.method
    bias_lr = "same" if method.bias_lr is None else method.bias_lr
    groups = fastlars.param_groups(model, protocol.weight_decay, bias_lr=bias_lr)
    if method.adapt_all:
        groups = [{**group, "adapt": True} for group in groups]
    options = dict(method.options)
    if method.optimizer != "AdamW":
        options["momentum"] = protocol.momentum
    return OPTIMIZERS[method.optimizer](groups, lr=run.lr, **options)


def train(run: Run, protocol: Protocol, dataset: Dataset) -> Result:
    """Train one network and measure it on the validation split, or in a final run on the test split.

    The seed alone sets the initial weights and the order of the images. Training stops when the loss is not finite.
    """
    started = time.perf_counter()
    torch.manual_seed(run.seed)
    training = dataset.train
    model = build_model(*training.images.shape[2:], protocol.first_stride, run.method.batch_norm)
    optimizer = build_optimizer(model, run, protocol)
    steps = len(training.labels) // run.batch
    scheduler = warmup_polynomial(optimizer, protocol.warmup_epochs * steps, protocol.epochs * steps, power=2.0)
    for _ in range(protocol.epochs):
        for indices in torch.randperm(len(training.labels)).split(run.batch):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(training.images[indices]), training.labels[indices])
            if not math.isfinite(loss.item()):
                break
            loss.backward()
            if run.method.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), run.method.clip)
            optimizer.step()
            scheduler.step()
    split = dataset.test if run.final else dataset.validation
    with torch.no_grad():
        logits = model.eval()(split.images)
    accuracy = 100 * (logits.argmax(1) == split.labels).float().mean().item()
    loss = functional.cross_entropy(logits, split.labels).item()
    return Result(run, accuracy, loss if math.isfinite(loss) else math.inf, time.perf_counter() - started)


def train_all(
    runs: Sequence[Run], protocol: Protocol, dataset: Dataset, finished: Callable[[Result], object]
) -> list[Result]:
    """Train every run, small batches first, and call `finished` with each result. Returns results in the order of `runs`.

    Two processes of one thread each are faster here than one process of many threads.
    """
    from joblib import Parallel, delayed, parallel_config  # noqa: PLC0415  comes with scikit-learn, which rendering does not need

    tasks = [delayed(train)(run, protocol, dataset) for run in sorted(runs, key=lambda run: run.batch)]
    results: dict[Run, Result] = {}
    with parallel_config("loky", n_jobs=2, inner_max_num_threads=1):
        for result in Parallel(return_as="generator_unordered")(tasks):
            results[result.run] = result
            finished(result)
    return [results[run] for run in runs]

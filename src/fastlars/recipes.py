"""Published training settings as functions. Each returns an optimizer and a schedule for your model.

The defaults are the authors' settings. You can override each of them by name. The authors' schedules start at lr 0. Ours
leave out this step, because it changes nothing, and start at lr / warm-up steps.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from .groups import BiasLR, Exclude, param_groups
from .names import foreign_name
from .optimizer import LARS
from .schedules import linear_scaling, sqrt_scaling, warmup_cosine, warmup_polynomial

__all__ = ["barlow_twins", "byol", "mae_probe", "mlperf", "moco_v3", "simclr", "vicreg"]

Model = nn.Module | Iterable[tuple[str, Tensor]]
Run = tuple[LARS, LambdaLR]


class Values(TypedDict, total=False):
    """Values that you can pass to a recipe by name to override the published ones.

    ``lr`` is the peak lr for your batch size and is not scaled any further. ``warmup_epochs`` may be a fraction.
    ``end_factor`` and ``power`` are arguments of the schedule. ``bias_lr``, ``weight_decay``, ``exclude_from_adaptation``
    and ``adapt`` are arguments of :func:`fastlars.param_groups`. The others are options of :class:`fastlars.LARS`.
    """

    lr: float | Tensor
    bias_lr: BiasLR
    warmup_epochs: float
    end_factor: float
    power: float
    weight_decay: float
    exclude_from_adaptation: Exclude | Iterable[Exclude]
    adapt: Callable[[str, Tensor], bool]
    dialect: str
    momentum: float
    dampening: float
    nesterov: bool
    trust_coefficient: float
    eps: float
    trust_clip: bool
    trust_denominator: str
    lr_in_momentum: bool
    skip_nonfinite: bool
    maximize: bool
    foreach: bool | None
    differentiable: bool
    fused: bool | None
    kahan_sum: bool | None


class MLPerf(NamedTuple):
    """The settings of MLPerf's ResNet-50 for one batch size."""

    lr: float
    warmup_epochs: int
    momentum: float
    weight_decay: float
    decay_steps: int


MLPERF = {
    1632: MLPerf(7.4, 2, 0.9, 5e-5, 27476),
    3264: MLPerf(10.5, 2, 0.9, 5e-5, 14523),
    4096: MLPerf(10.0, 5, 0.9, 2e-4, 13137),
    8192: MLPerf(17.0, 5, 0.9, 2e-4, 6095),
    13056: MLPerf(12.8, 9, 0.9, 2.5e-5, 4710),
    32768: MLPerf(21.2, 16, 0.94, 2.5e-5, 2267),
    49152: MLPerf(19.405, 24, 0.951807, 1e-4, 1846),
    65536: MLPerf(24.699, 31, 0.951807, 1e-4, 1133),
}
IMAGES = 1_281_167  # in ImageNet's training set

# epochs of a published run -> the run's lr per 256 images and its weight decay
BYOL = {100: (0.45, 1e-6), 300: (0.3, 1e-6), 1000: (0.2, 1.5e-6)}
MOCO_V3 = {100: (0.6, 1e-6), 300: (0.3, 1e-6), 1000: (0.3, 1.5e-6)}
VICREG = {100: (0.3, 1e-6), 1000: (0.2, 1e-6)}


def mlperf(
    model: Model, *, batch_size: int, steps_per_epoch: int, epochs: int | None = None, **values: Unpack[Values]
) -> Run:
    """Optimizer and schedule of MLPerf's supervised ResNet-50. lr decays polynomially with power 2, to 0.0001.

    lr, warm-up, momentum and weight decay depend on the batch size. For a batch size that was not published, the recipe
    uses the nearest published one (by ratio) and scales lr by the square root of the ratio.

    Args:
        model: a module or named parameters, as for :func:`fastlars.param_groups`.
        batch_size: images per step, over all devices and accumulated batches. Published sizes range from 1632 to 65536.
        steps_per_epoch: optimizer steps per epoch. On ImageNet the authors use ``ceil(1281167 / batch_size)``.
        epochs: length of the whole schedule, including the warm-up. If None (default), the schedule has the published length.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.mlperf(model, batch_size=32768, steps_per_epoch=40)
        >>> optimizer.param_groups[0]["initial_lr"], optimizer.param_groups[0]["momentum"]
        (21.2, 0.94)

    Source: the reference convergence points of MLPerf (Mattson et al., arXiv 1910.01500), mlcommons/logging
    ``rcp_checker/training_4.0.0/rcps_resnet.json``; mlcommons/training ``retired_benchmarks/resnet-tf2``.
    """
    row, published = _nearest(MLPERF, batch_size)
    lr = published.lr if row == batch_size else sqrt_scaling(published.lr, batch_size, base_batch_size=row)
    given: dict[str, Any] = {
        "dialect": "mlperf",
        "lr": lr,
        "momentum": published.momentum,
        "weight_decay": published.weight_decay,
        "warmup_epochs": published.warmup_epochs,
        "power": 2.0,
        **values,
    }
    given.setdefault("end_factor", 1e-4 / max(float(given["lr"]), 1e-4))
    if epochs is None:
        epochs_of_decay = published.decay_steps / math.ceil(IMAGES / row)
        total_steps = round((given["warmup_epochs"] + epochs_of_decay) * steps_per_epoch)
    else:
        total_steps = epochs * steps_per_epoch
    return _build("mlperf", model, total_steps, steps_per_epoch, given)


def simclr(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of SimCLR. The lr is 0.3 x batch / 256, with 10 epochs of warm-up and cosine decay to 0.

    Weight decay is 1e-6. The authors trained 100 epochs at batch 4096. For smaller batches they also scale lr with the square
    root, ``lr=schedules.sqrt_scaling(0.075, batch_size, base_batch_size=1)``. They neither adapt nor decay a supervised head
    that trains alongside the network. To do the same, pass ``exclude_from_adaptation="head_supervised.*"``. SimCLRv2 uses
    ``weight_decay=1e-4``.

    Args:
        model: a module or named parameters, as for :func:`fastlars.param_groups`.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.simclr(model, batch_size=4096, epochs=100, steps_per_epoch=312)
        >>> optimizer.param_groups[0]["initial_lr"]
        4.8

    Source: Chen et al., arXiv 2002.05709, section 2 and appendix B; google-research/simclr ``tf2/run.py`` and README.
    """
    published = {"dialect": "simclr", "lr": linear_scaling(0.3, batch_size), "weight_decay": 1e-6}
    return _build(
        "simclr", model, epochs * steps_per_epoch, steps_per_epoch, {**_SELF_SUPERVISED, **published, **values}
    )


def byol(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of BYOL. The lr is 0.2 x batch / 256, with 10 epochs of warm-up and cosine decay to 0.

    Weight decay is 1.5e-6. The authors trained 1000 epochs at batch 4096. For 300 and 100 epochs they used 0.3 and 0.45 instead
    of 0.2, and weight decay 1e-6. For any other number of epochs, the recipe uses the settings of the nearest published
    number (by ratio).

    Args:
        model: the online network without the target, as a module or named parameters for :func:`fastlars.param_groups`.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.byol(model, batch_size=4096, epochs=1000, steps_per_epoch=312)
        >>> optimizer.param_groups[0]["initial_lr"]
        3.2

    Source: Grill et al., arXiv 2006.07733, "Implementation details"; deepmind-research ``byol/configs/byol.py``.
    """
    return _byol_like("byol", model, BYOL, batch_size, epochs, steps_per_epoch, values)


def barlow_twins(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of Barlow Twins. The lr is 0.2 x batch / 256, and cosine decay ends at lr / 1000.

    Biases and normalisation tensors have lr 0.0048 x batch / 256. The authors trained 1000 epochs at batch 2048, with 10
    epochs of warm-up. Weight decay is 1e-6, as in their code. The paper says 1.5e-6.

    Args:
        model: a module or named parameters, as for :func:`fastlars.param_groups`.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.barlow_twins(
        ...     model, batch_size=2048, epochs=1000, steps_per_epoch=625)
        >>> [group["initial_lr"] for group in optimizer.param_groups]
        [1.6, 0.0384]

    Source: Zbontar et al., arXiv 2103.03230, "Implementation Details"; facebookresearch/barlowtwins ``main.py``.
    """
    published: Values = {"bias_lr": linear_scaling(0.0048, batch_size), "end_factor": 0.001}
    runs = {1000: (0.2, 1e-6)}
    return _byol_like("barlow_twins", model, runs, batch_size, epochs, steps_per_epoch, {**published, **values})


def vicreg(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of VICReg. The lr is 0.2 x batch / 256 for all tensors, and cosine decay ends at lr / 1000.

    Weight decay is 1e-6, and the warm-up takes 10 epochs. The authors trained 1000 epochs at batch 2048. For 100 epochs at
    batch 512 they used 0.3 instead of 0.2. For any other number of epochs, the recipe uses the settings of the nearest
    published number (by ratio).

    Args:
        model: a module or named parameters, as for :func:`fastlars.param_groups`.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.vicreg(model, batch_size=2048, epochs=1000, steps_per_epoch=625)
        >>> optimizer.param_groups[0]["initial_lr"]
        1.6

    Source: Bardes et al., arXiv 2105.04906; facebookresearch/vicreg ``main_vicreg.py`` and README.
    """
    published: Values = {"end_factor": 0.001}
    return _byol_like("vicreg", model, VICREG, batch_size, epochs, steps_per_epoch, {**published, **values})


def moco_v3(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of MoCo v3 with a ResNet-50. The lr is 0.6 x batch / 256, with cosine decay to 0.

    Weight decay is 1e-6, and the warm-up takes 10 epochs. The authors trained 100 epochs at batch 4096. For 300 and 1000
    epochs they used 0.3 instead of 0.6, and for 1000 epochs weight decay 1.5e-6. For any other number of epochs, the recipe
    uses the settings of the nearest published number (by ratio). The authors train ViTs with AdamW.

    Args:
        model: a module or named parameters, as for :func:`fastlars.param_groups`, without the momentum encoder.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> optimizer, scheduler = fastlars.recipes.moco_v3(model, batch_size=4096, epochs=100, steps_per_epoch=312)
        >>> optimizer.param_groups[0]["initial_lr"]
        9.6

    Source: facebookresearch/moco-v3 ``main_moco.py`` and ``CONFIG.md``.
    """
    return _byol_like("moco_v3", model, MOCO_V3, batch_size, epochs, steps_per_epoch, values)


def mae_probe(model: Model, *, batch_size: int, epochs: int, steps_per_epoch: int, **values: Unpack[Values]) -> Run:
    """Optimizer and schedule of MAE's linear probe. The lr is 0.1 x batch / 256, with cosine decay to 0.

    The warm-up takes 10 epochs. The authors trained 90 epochs at batch 16384, or 50 epochs for ViT-L and ViT-H. There is no
    weight decay, but the weight of the linear layer is adapted.

    Args:
        model: the head alone, a ``BatchNorm1d(affine=False, eps=1e-6)`` and a ``Linear``. The rest of the model is frozen.
        batch_size: images per step, over all devices and accumulated batches.
        epochs: length of the whole run.
        steps_per_epoch: optimizer steps per epoch. The authors use ``images // batch_size``.
        values: see :class:`fastlars.recipes.Values`.

    Returns:
        The optimizer and its schedule. Call ``scheduler.step()`` after every ``optimizer.step()``.

    Raises:
        TypeError: for an unknown keyword (the error gives the nearest name).
        ValueError: for a value out of range, and if the warm-up is not shorter than the run.

    Example:
        >>> head = torch.nn.Sequential(torch.nn.BatchNorm1d(768, affine=False), torch.nn.Linear(768, 1000))
        >>> optimizer, scheduler = fastlars.recipes.mae_probe(head, batch_size=16384, epochs=90, steps_per_epoch=78)
        >>> optimizer.param_groups[0]["initial_lr"]
        6.4

    Source: He et al., arXiv 2111.06377, appendix A; facebookresearch/mae ``main_linprobe.py`` and ``FINETUNE.md``.
    """
    return _byol_like("mae_probe", model, {90: (0.1, 0.0)}, batch_size, epochs, steps_per_epoch, values)


_SELF_SUPERVISED: dict[str, Any] = {"momentum": 0.9, "warmup_epochs": 10}
_T = TypeVar("_T")


def _nearest(published: Mapping[int, _T], value: float) -> tuple[int, _T]:
    if not value > 0:
        raise ValueError(f"batch_size and epochs must be > 0, got {value}")
    return min(published.items(), key=lambda run: abs(math.log(run[0] / value)))


def _byol_like(
    name: str,
    model: Model,
    runs: Mapping[int, tuple[float, float]],
    batch_size: int,
    epochs: int,
    steps_per_epoch: int,
    values: Values,
) -> Run:
    """A recipe in BYOL's dialect. Its lr and weight decay depend on the number of epochs."""
    _, (lr, weight_decay) = _nearest(runs, epochs)
    published = {"dialect": "byol", "lr": linear_scaling(lr, batch_size), "weight_decay": weight_decay}
    return _build(name, model, epochs * steps_per_epoch, steps_per_epoch, {**_SELF_SUPERVISED, **published, **values})


def _build(name: str, model: Model, total_steps: int, steps_per_epoch: int, values: dict[str, Any]) -> Run:
    for key in values:
        if key not in Values.__annotations__ or (key == "power" and name != "mlperf"):
            known = [each for each in Values.__annotations__ if each != "power" or name == "mlperf"]
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise TypeError(
                foreign_name(key) or f"{name}: {key!r} is not a value of a recipe; did you mean {nearest!r}?"
            )
    warmup_epochs = values.pop("warmup_epochs")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if not warmup_steps < total_steps:
        raise ValueError(
            f"{name}: the warm-up of {warmup_epochs} epochs, {warmup_steps} steps, must be shorter than the run of "
            f"{total_steps} steps; pass fewer warmup_epochs, such as a tenth of the run's epochs"
        )
    of_groups = {"weight_decay", "bias_lr", "exclude_from_adaptation", "adapt"}
    of_schedule = {"end_factor", "power"}
    groups = param_groups(model, **{key: value for key, value in values.items() if key in of_groups})
    optimizer = LARS(groups, **{key: value for key, value in values.items() if key not in of_groups | of_schedule})
    schedule = warmup_polynomial if name == "mlperf" else warmup_cosine
    shape = {key: value for key, value in values.items() if key in of_schedule}
    return optimizer, schedule(optimizer, warmup_steps, total_steps, **shape)

"""The data types of a step. A `Group` is split into `Bucket`s, and each has its `Norms` and the `Backend` that steps it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from .options import Options


class Memory:
    """Caches that an optimizer keeps between steps, one attribute per file. Copies and pickles of it are empty."""

    def __init__(self) -> None:
        """Start with empty caches."""
        self.steps = 0  # taken so far, to expire old entries
        self.assignments: dict[str, Any] = {}  # backends/__init__.py: one per group
        self.tables: Any = None  # backends/triton.py

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """Drop the content."""
        return Memory, ()


class Group(NamedTuple):
    """The tensors of one param group, or of one call of `lars`."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]  # None before the first step; not read without momentum
    # rounding errors of parameters in half precision; None before the first step, empty if none are kept
    compensations: list[Tensor | None]
    options: Options
    where: str = "lars"  # its name in errors, such as "param group 0"
    memory: Memory | None = None  # None in graphs and in the functional form


class Bucket(NamedTuple):
    """Tensors of one group that one backend steps together.

    They share a device and a dtype. Usually all of them or none are at their first step.
    """

    backend: Backend
    indices: list[int]  # indices into the lists of the group
    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]  # empty without momentum
    compensations: list[Tensor | None]  # empty if they are not kept
    options: Options
    is_first_step: bool = False  # with momentum; the buffers are then None
    grad_scale: Tensor | None = None  # the backend divides gradients by it
    plan: Any = None  # what `Backend.plan` returned for these tensors
    memory: Memory | None = None

    def at(self, places: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, gradients, momentum buffers and compensations at these places. All must exist."""
        lists = cast("list[list[Tensor]]", [self.params, self.grads, self.momentum_buffers, self.compensations])
        params, grads, buffers, compensations = [[each[i] for i in places] if each else [] for each in lists]
        return params, grads, buffers, compensations


class Norms(NamedTuple):
    """Norms of the n tensors of a bucket, each of shape (n,), or None if not needed."""

    param: Tensor | None = None  # |w|
    direction: Tensor | None = None  # |g|, or with trust_denominator="joint" |g + weight_decay * w|
    grad: Tensor | None = None  # |g|, for skip_nonfinite
    kept: Any = None  # anything that `measure` passes on to `update`


class Backend(Protocol):
    """One implementation of the step. A new one is a file in this folder and an entry of `BACKENDS`."""

    name: str  # shown by repr
    takes_scale: bool  # whether it divides gradients by a GradScaler's scale itself
    traceable: bool  # whether torch.compile may trace it; if not, the step leaves the graph
    mixes_first_steps: bool  # whether a bucket may hold tensors with and without a buffer

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        """Whether it wants a group with these options and devices. ``gated`` steps may be skipped or have scaled gradients.

        It may test a number only for being 0, because the answer is cached between steps.
        """

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether it supports the layout and dtype of all these tensors. Buffers may be missing."""

    def plan(self, params: list[Tensor]) -> Any:
        """Precompute what depends only on tensor metadata. The result is kept between steps."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        """Norms of the bucket. A backend may leave |w| and |g| to `update`, unless they are needed ``now``."""

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Write parameters and state. If the 1-element tensor ``gate`` is not 0, write nothing."""

"""The data types of a step. A `Group` is split into `Bucket`s. A `Backend` computes the `Norms` of a bucket and updates it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

from torch import Tensor

from .options import Options


class Memory:
    """Caches that an optimizer keeps between steps. Copies and pickles of a Memory are empty."""

    def __init__(self) -> None:
        """Start with empty caches."""
        self.steps = 0  # number of steps so far, to drop tables that have not been used for many steps
        self.assignments: dict[str, Any] = {}  # one per group, used in backends/__init__.py
        self.tables: Any = None  # used in backends/triton.py

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """Copy and pickle as empty caches."""
        return Memory, ()


class Group(NamedTuple):
    """The tensors of one param group, or of one call of the function `lars`."""

    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]  # None before the first step; not read without momentum
    # rounding errors of parameters in half precision; None before the first step, empty if none are kept
    compensations: list[Tensor | None]
    options: Options
    where: str = "lars"  # the group's name in error messages, such as "param group 0"
    memory: Memory | None = None  # None in graphs and in the functional form


class Bucket(NamedTuple):
    """Tensors of one group that one backend updates together.

    They share a device and a dtype. Unless the backend's ``mixes_first_steps`` is True, either all or none of them are at
    their first step.
    """

    backend: Backend
    indices: list[int]  # indices into the lists of the group
    params: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor | None]  # empty without momentum
    compensations: list[Tensor | None]  # empty if none are kept
    options: Options
    is_first_step: bool = False  # the momentum buffers are still None; always False without momentum
    grad_scale: Tensor | None = None  # the backend divides gradients by it
    plan: Any = None  # what `Backend.plan` returned for these tensors
    memory: Memory | None = None

    def at(self, places: list[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """Parameters, gradients, momentum buffers and compensations at these indices. No entry may be None."""
        lists = cast("list[list[Tensor]]", [self.params, self.grads, self.momentum_buffers, self.compensations])
        params, grads, buffers, compensations = [[each[i] for i in places] if each else [] for each in lists]
        return params, grads, buffers, compensations

    def part(self, places: list[int]) -> Bucket:
        """A bucket of the tensors at these indices, without a plan. No entry may be None."""
        params, grads, *state = self.at(places)
        buffers, compensations = cast("list[list[Tensor | None]]", state)
        indices = [self.indices[i] for i in places]
        return Bucket(self.backend, indices, params, grads, buffers, compensations, self.options, self.is_first_step)


class Norms(NamedTuple):
    """Norms of the n tensors of a bucket, each of shape (n,), or None if not needed."""

    param: Tensor | None = None  # |w|
    direction: Tensor | None = None  # |g|, or with trust_denominator="joint" |g + weight_decay * w|
    grad: Tensor | None = None  # |g|, for skip_nonfinite
    kept: Any = None  # anything that `measure` passes on to `update`


class Backend(Protocol):
    """One implementation of the step. To add one, write a file in backends/ and add its backend to `BACKENDS`."""

    name: str  # shown by repr
    takes_scale: bool  # whether it divides gradients by a GradScaler's scale itself
    traceable: bool  # whether torch.compile may trace it; if not, the step leaves the graph
    mixes_first_steps: bool  # whether a bucket may hold tensors with and without a buffer

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        """Whether this backend takes groups with these options on these devices.

        ``gated`` says that the step may be skipped or that gradients are scaled. The answer is cached between steps, so it
        may depend on whether an option is 0, but not on its exact value.
        """

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        """Whether this backend supports the layout and dtype of all these tensors. Buffers may be missing."""

    def plan(self, params: list[Tensor]) -> Any:
        """Precompute what depends only on tensor metadata. The result is cached between steps."""

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        """Compute the norms of the bucket. A backend may leave |w| and |g| to `update`, unless ``now`` is True."""

    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        """Update parameters and state in place. If the 1-element tensor ``gate`` is not 0, write nothing."""

"""class LARS: options, state, and the order of a step. The numbers are made in `functional.py`."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from . import sharding
from .coefficients import is_adapted, is_nonzero, scalar_lr, trust_ratio
from .compat import NAMED_PARAMETERS, outside_graphs, required, use_grad_for_differentiable
from .description import describe
from .dispatch import Part, implementation, split
from .functional import Group, check_captured, measure, step_groups
from .fused_cuda import Tables, check_fused, is_capturing
from .loading import check_saved_state, groups_and_states
from .options import NAMES, Options, check_can_be_skipped, check_grad, check_options, check_params, nearest_name

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_P = ParamSpec("_P")
_NONE = {type(None)}


def _naming_the_nearest_option(
    init: Callable[Concatenate[LARS, _P], None],
) -> Callable[Concatenate[LARS, _P], None]:
    """A misspelt option in a call is told with its nearest name, which Python itself does from 3.13 on only in part."""

    @functools.wraps(init)
    def checked_init(self: LARS, *args: _P.args, **kwargs: _P.kwargs) -> None:
        for key in kwargs:
            if key not in NAMES and key != "params" and (name := nearest_name(key)):
                raise TypeError(f"{key!r} is not an option of LARS; did you mean {name!r}?")
        init(self, *args, **kwargs)

    return checked_init  # type: ignore[return-value]  # a function, though mypy takes `wraps` for an object


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, for training with very large batches.

    For each parameter tensor w with gradient g, in a group that is adapted::

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        v     = momentum * v + (1 - dampening) * ratio * (g + weight_decay * w)
        w     = w - lr * v

    Where a norm is zero, the tensor takes g neither scaled nor decayed. On a tensor's first step dampening does not
    apply. Groups that are not adapted take torch's SGD step, bit for bit. Norms are L2 norms of whole tensors, in
    float32 or better. Gradients are never written, and nothing is read on the host but CPU tensors.

    It is no drop-in for SGD: a step moves a tensor by about ``lr * trust_coefficient`` of its norm (up to
    ``1 / (1 - momentum)`` times that), so ``lr`` is of the order of 1 to 30. Biases and normalisation tensors are best
    left out of the adaptation: see :func:`fastlars.param_groups`.

    Args:
        params: tensors or named tensors to optimize, or dicts that define param groups; every option below can be set
            per group.
        lr: learning rate, >= 0: a float or a 1-element tensor, which stays on its device. Required, here or in every
            group.
        momentum: momentum factor, >= 0.
        dampening: dampening for momentum; the gradient enters later steps with 1 - dampening.
        weight_decay: L2 penalty, >= 0.
        nesterov: Nesterov momentum; needs momentum > 0 and dampening == 0.
        trust_coefficient: the factor of the trust ratio (the paper's eta), >= 0.
        eps: added to the denominator of the trust ratio, >= 0.
        adapt: whether the group's steps are scaled by the trust ratio. None: exactly where ``weight_decay`` is not 0.
        trust_clip: LARC, the ratio becomes min(ratio / lr, 1).
        trust_denominator: "separate" as above; "joint": the ratio is trust_coefficient * abs(w) /
            (abs(g + weight_decay * w) + eps), and 1 with decay kept where one of these norms is 0 (BYOL, SimCLR, optax).
        lr_in_momentum: as in the paper, lr enters the momentum buffer: v = momentum * v + (1 - dampening) * lr * d and
            w -= v; with nesterov w -= lr * d + momentum * v.
        skip_nonfinite: if the norm of any gradient in the groups that set it is not finite, none of these groups
            changes. Decided on the device; with momentum it needs dampening == 0.
        maximize: maximize the objective instead of minimizing it.
        foreach: whether updates run over lists of tensors, on CUDA from torch 2.11 on in few launches. None: where torch's
            own optimizers do by default, which is on CUDA, Intel GPUs and plug-in devices, but not on MPS and XLA.
        differentiable: whether autograd may run through the step.
        fused: whether norms and update run in fused kernels: torch's own on CPU, Triton's on CUDA. None: on CPU only,
            until GPUs have proven the others. Tensors that a kernel cannot serve (other dtypes, memory that is not
            dense, unequal layouts) take another path within the step.

    Raises:
        ValueError: an option outside its range or contradicting another, a misspelt option in a group (the nearest name
            is given), a group without lr, and a state dict whose groups or buffers do not fit.
        TypeError: an option of the wrong type, a misspelt option in the call, a parameter that is not floating or complex.
        RuntimeError: ``fused=True`` that cannot be honoured; in :meth:`step`, sparse gradients. Nothing has changed then.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        >>> groups = fastlars.param_groups(model, weight_decay=1e-4, unadapted={"lr": 0.1})
        >>> optimizer = fastlars.LARS(groups, lr=4.8, momentum=0.9)
        >>> scheduler = fastlars.schedules.warmup_cosine(optimizer, warmup_steps=10, total_steps=100)
        >>> for step in range(100):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()

        What runs and what is adapted, and by what factor (see also "When something looks wrong" in the documentation):

        >>> optimizer
        LARS (
            Parameter Group 0: 1 tensor, 32 elements, adapted, fused
                lr=0, momentum=0.9, weight_decay=0.0001, adapt=True, initial_lr=4.8
            Parameter Group 1: 3 tensors, 12 elements, not adapted, single (torch's SGD)
                lr=0, momentum=0.9, adapt=False, initial_lr=0.1
        )
        >>> list(optimizer.trust_ratios())
        ['0.weight']

    Source: You, Gitman, Ginsburg, *Large Batch Training of Convolutional Networks*, arXiv 1708.03888, Eq. 6 and
    Algorithm 1. The paper puts lr inside the momentum buffer (``lr_in_momentum=True``); the default, outside, is what
    the widely copied PyTorch code does, whose arguments, state and checkpoints these are.
    """

    _looked_for_adapted = False

    @_naming_the_nearest_option
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = required,  # type: ignore[assignment]  # torch's marker of an option without a default
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        *,
        adapt: bool | None = None,
        trust_clip: bool = False,
        trust_denominator: str = "separate",
        lr_in_momentum: bool = False,
        skip_nonfinite: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        """See the class."""
        defaults = Options(
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            trust_coefficient,
            eps,
            adapt,
            trust_clip,
            trust_denominator,
            lr_in_momentum,
            skip_nonfinite,
            maximize,
            foreach,
            differentiable,
            fused,
        )._asdict()
        self._tables = Tables()
        # parameter -> (whether it is at its first step, as a tensor for graphs; the momentum buffer of which that holds)
        self._first_steps: Any = WeakTensorKeyDictionary()
        self._checked: dict[int, list[Any]] = {}
        check_options({**defaults, "lr": 0.0} if _is_missing(lr) else defaults, "LARS")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; its options default to those given at construction.

        Args:
            param_group: ``params`` (tensors or named tensors) and any options.

        Raises:
            ValueError, TypeError: as at construction; the optimizer has not changed then.

        Example:
            >>> weight, bias = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.zeros(4))
            >>> optimizer = fastlars.LARS([weight], lr=8.0, momentum=0.9, adapt=True)
            >>> optimizer.add_param_group({"params": [bias], "lr": 0.1, "adapt": False})
            >>> [(group["lr"], group["momentum"], group["adapt"]) for group in optimizer.param_groups]
            [(8.0, 0.9, True), (0.1, 0.9, False)]
        """
        where = f"param group {len(self.param_groups)}"
        if isinstance(param_group, dict) and "params" in param_group:
            options = {key: value for key, value in param_group.items() if key != "params"}
            if _is_missing({**self.defaults, **options}["lr"]):
                raise ValueError(
                    "parameter group didn't specify a value of required optimization parameter lr "
                    f"({where}); give lr to LARS or to the group"
                )
            check_options({**self.defaults, **options}, where)
            if {**self.defaults, **options}["skip_nonfinite"]:
                sharding.check_not_divided(where)
            param_group = {**param_group, **_as_list(param_group["params"])}
            check_params(param_group["params"], where)
            sharding.check_not_flattened(param_group["params"], where)
            if {**self.defaults, **options}["fused"]:
                check_fused(param_group["params"], where)
        super().add_param_group(param_group)  # what is no group at all is refused there

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict: of this class, of torch's SGD, or of the LARS of Lightning Bolts, quadra and lightly.

        Args:
            state_dict: what ``state_dict()`` returned. Options that it lacks keep the values they have.

        Raises:
            ValueError, TypeError: for groups, options or buffers that do not fit, and for the state of other optimizers,
                which :func:`fastlars.convert_state_dict` converts; the optimizer has not changed then.
            RuntimeError: for Lightning's wrapper of an optimizer, which would keep to itself what it loads.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(3))
            >>> saved = fastlars.LARS([w], lr=8.0, momentum=0.9, adapt=True).state_dict()
            >>> optimizer = fastlars.LARS([w], lr=1.0)
            >>> optimizer.load_state_dict(saved)
            >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["adapt"]
            (8.0, True)
        """
        if "param_groups" not in self.__dict__:
            # torch would give what it loads to the wrapper, and leave the optimizer as it was
            raise RuntimeError(
                f"{type(self).__name__} wraps an optimizer and has no param groups itself: what it loaded would not reach the "
                "optimizer; load into that one, as in self.optimizers().optimizer.load_state_dict(...) with Lightning"
            )
        if not isinstance(state_dict, dict):
            groups_and_states(state_dict)
        # Before torch casts the buffers, which would drop the imaginary parts of complex ones; and a hook, added last,
        # because hooks of users may replace the state dict.
        handle = self.register_load_state_dict_pre_hook(check_saved_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickling, and the last stage of torch's load_state_dict, before which nothing has changed."""
        loading = "param_groups" in self.__dict__
        if not loading:
            self._tables = Tables()  # of addresses: not pickled
            self._first_steps = WeakTensorKeyDictionary()
            self._checked = {}
        for i, group in enumerate(state["param_groups"]):
            # keys that SGD's, Bolts' and quadra's state dicts lack keep their values
            known = self.param_groups[i] if loading else {**Options(0.0)._asdict(), **state["defaults"]}
            for name in (*NAMES, "param_names"):
                if name in known:
                    group.setdefault(name, known[name])
            check_options({key: value for key, value in group.items() if key != "params"}, f"param group {i}")
            if group["fused"]:
                check_fused(group["params"], f"param group {i}")
        if loading:
            for param, entry in state["state"].items():
                if not isinstance(param, Tensor):
                    continue
                if entry.get("momentum_buffer") is None:
                    # of SGD without momentum: torch.compile would keep the None for a constant
                    entry.pop("momentum_buffer", None)
                elif param.is_complex():  # torch casts the state of floating parameters only
                    entry["momentum_buffer"] = entry["momentum_buffer"].to(param.dtype)
        super().__setstate__(state)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        first_steps: list[Tensor] | None = None,
    ) -> None:
        # torch.compile runs this method eagerly when it traces a step: state is made here, and here only
        if not self._looked_for_adapted:
            self._warn_if_nothing_is_adapted()
            for i, each in enumerate(self.param_groups):
                # FSDP keeps the parameters that it finds, and makes flat pieces of them
                sharding.check_not_flattened(each["params"], f"param group {i}")
        if first_steps is not None and group is self.param_groups[0]:
            # The compiler guards the entries of the state that are there after the first call, so all have to be: others
            # make torch 2.4 fail when state is dropped or loaded in part.
            for each in self.param_groups:
                for p in each["params"] if each["momentum"] != 0 else []:
                    if p.grad is not None:
                        self.state[p]
        with_grad = [p for p in group["params"] if p.grad is not None]
        params += with_grad
        grads += [p.grad for p in with_grad]
        if group["momentum"] == 0:
            return
        found = [self.state[p].get("momentum_buffer") for p in with_grad]
        # once an optimizer has been compiled with dampening
        settles = bool(self._first_steps) and (first_steps is None or group["dampening"] == 0)
        if first_steps is None and not settles and _NONE.isdisjoint(map(type, found)):
            momentum_buffers += found  # as in nearly every step: the loop below takes as long as small tensors
            return
        for p in with_grad:
            buffer = self.state[p].get("momentum_buffer")  # anew: a parameter that comes twice has one
            # With dampening the first step must be known as such: the buffer stays None until the step has made it;
            # in a graph, which is to serve later steps too, a tensor says so.
            if settles and self._is_untouched(p, buffer):
                del self.state[p]["momentum_buffer"]
                buffer = None
            is_new = buffer is None and (group["dampening"] == 0 or first_steps is not None)
            if is_new:
                buffer = self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momentum_buffers.append(buffer)
            if first_steps is not None and group["dampening"] != 0:
                is_first, made = self._first_steps.get(p) or (
                    torch.zeros((), dtype=torch.bool, device=p.device),
                    None,
                )
                if is_new or made is not buffer:
                    is_first.fill_(is_new)
                self._first_steps[p] = is_first, buffer
                first_steps.append(is_first)

    def _is_untouched(self, param: Tensor, buffer: Tensor | None) -> bool:
        """Whether a buffer was made for the first step of a graph that never ran, as where its backend failed."""
        is_first, made = self._first_steps.get(param, (None, None))
        if is_first is None or buffer is None or made is not buffer:
            return False
        self._first_steps[param] = is_first, None  # the graph may still hold it; a buffer is asked after once
        untouched = bool(is_first)
        is_first.fill_(False)
        return untouched

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to `step` to divide by the scale and to skip: it reads this, and sets what that needs.

        Where fused=True is written in every group, as torch has it, and the host need not know of a skipped step.
        """
        return all(
            group["fused"] and (group["momentum"] == 0 or group["dampening"] == 0) for group in self.param_groups
        )

    def _warn_if_nothing_is_adapted(self) -> None:
        self._looked_for_adapted = True
        groups = [_options(group) for group in self.param_groups]
        if any(is_adapted(options) or options.adapt is not None for options in groups):
            return
        warnings.warn(
            "LARS adapts no parameter: weight_decay is 0 in every group, so each takes a plain SGD step. Set "
            "weight_decay, or build the groups with fastlars.param_groups(model, weight_decay), or pass adapt=True "
            "(adapt=False, if SGD is what you want).",
            stacklevel=_caller(),
        )

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: for sparse gradients, and where a CUDA graph captures the step of tensors that lack a momentum
                buffer; nothing has changed then.
            ValueError, TypeError: for options that were written into a group and break their rule; nothing has changed then.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> optimizer = fastlars.LARS([w], lr=1.0, trust_coefficient=0.1, adapt=True)
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = 2 * w[1]
            ...     loss.backward()
            ...     return loss
            >>> optimizer.step(closure).item()  # the loss before the step
            8.0
            >>> w.tolist()  # moved by a tenth of its norm, 5, against the gradient
            [3.0, 3.5]
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params_and_options = self._params_and_options()
        if any(
            sharding.any_sharded(params) or implementation(params, options) == "fused"
            for params, options in params_and_options
        ):
            self._step_groups_outside_graphs(params_and_options)
        else:
            self._step_groups(params_and_options)
        return loss

    def _step_groups(self, params_and_options: list[tuple[list[Tensor], Options]]) -> None:
        # GradScaler's, which is told to set them by _step_supports_amp_scaling
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        capturing = not torch.compiler.is_compiling() and is_capturing()
        for i, group in enumerate(self.param_groups):  # all before the first state is made
            if not torch.compiler.is_compiling():
                self._check_edited(i, group)
                if capturing:
                    moving = [p for p in group["params"] if p.grad is not None]
                    buffers = [self.state.get(p, {}).get("momentum_buffer") for p in moving]
                    check_captured(moving, buffers, group["momentum"], f"param group {i}")
            if found_inf is not None:
                check_can_be_skipped(group["momentum"], group["dampening"], f"param group {i}: found_inf")
            for grad in [p.grad for p in group["params"]]:
                if grad is not None and grad.layout is not torch.strided:
                    check_grad(grad)
        shards = sharding.sharded(params_and_options)

        groups: list[Group] = []
        for group, (_, options) in zip(self.param_groups, params_and_options):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momentum_buffers: list[Tensor | None] = []
            first_steps: list[Tensor] = []  # asked for in graphs only
            if torch.compiler.is_compiling():
                self._init_group(group, params, grads, momentum_buffers, first_steps)
            else:
                self._init_group(group, params, grads, momentum_buffers)
            if params:
                groups.append((params, grads, momentum_buffers, options, first_steps or None))

        step_groups(groups, grad_scale, found_inf, self._tables, shards)
        for params, _, momentum_buffers, options, known_in_graph in groups:
            if known_in_graph is not None:
                for is_first in known_in_graph:
                    is_first.fill_(False)
            elif options.momentum != 0 and options.dampening != 0:
                for param, buffer in zip(params, momentum_buffers, strict=True):
                    self.state[param]["momentum_buffer"] = buffer

    def _check_edited(self, i: int, group: dict[str, Any]) -> None:
        """Check what was written into a group since the last step, before any group moves."""
        values = [group[name] for name in NAMES]
        values[0] = 0.0 if isinstance(group["lr"], (float, Tensor)) else group["lr"]  # schedules may round it below 0
        if i not in self._checked or any(new is not old for new, old in zip(values, self._checked[i])):
            check_options(dict(zip(NAMES, values)), f"param group {i}")
            if group["skip_nonfinite"]:
                sharding.check_not_divided(f"param group {i}")
            self._checked[i] = values

    # As torch's own fused step leaves the graph, but once for all groups, whose gradients may decide together.
    _step_groups_outside_graphs = outside_graphs(_step_groups)

    def _params_and_options(self) -> list[tuple[list[Tensor], Options]]:
        return [(group["params"], _options(group)) for group in self.param_groups]

    @torch.no_grad()
    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of each adapted tensor, from its present value and gradient.

        Computed when asked, nothing is stored; the values are read on the host at once. Ask after ``backward()`` (and
        after unscaling, with a GradScaler) and before ``zero_grad()``. With sharded tensors all ranks ask together.

        Returns:
            Name to ratio, in the optimizer's order; the names of named parameters, else "group.position" as in "0.3",
            which also follows a name that an earlier group has. Tensors without a gradient and groups that are not
            adapted are left out. A tensor that is zero, or has a zero gradient, has 1: it is not scaled.

        Raises:
            RuntimeError: for sparse gradients.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> w.grad = torch.tensor([0.0, 2.0])
            >>> optimizer = fastlars.LARS([w], lr=1.0, trust_coefficient=0.1, adapt=True)
            >>> optimizer.trust_ratios()
            {'0.0': 0.25}

        :func:`fastlars.plots.trust_ratios` draws what several steps have given.
        """
        params_and_options = self._params_and_options()
        shards = sharding.sharded(params_and_options)
        known: list[tuple[Part, Options, Tensor | None]] = []
        names_of: list[list[str]] = []  # of the tensors of each part
        ratios: dict[str, float] = {}
        for i, (group, (_, of_step)) in enumerate(zip(self.param_groups, params_and_options)):
            positions = [j for j, p in enumerate(group["params"]) if p.grad is not None]
            params = [group["params"][j] for j in positions]
            if not params or not is_adapted(of_step):
                continue
            for p in params:
                check_grad(p.grad)
            positions_as_names = [f"{i}.{j}" for j in range(len(group["params"]))]
            names = [
                f"{name} ({position})" if name in ratios else name
                for name, position in zip(group.get("param_names") or positions_as_names, positions_as_names)
            ]
            ratios.update(dict.fromkeys((names[j] for j in positions), 1.0))  # in the order in which they are asked
            # not fused, which measures at the update only
            options = of_step._replace(momentum=0.0, skip_nonfinite=False, fused=False)
            whole: Group = (params, [p.grad for p in params], [], options, None)
            for part in split(*(whole if shards is None else shards.local(whole))):
                known.append((part, options, measure(part, options)))
                names_of.append([names[positions[index]] for index in part.indices])
        measured = [rows for _, _, rows in known]
        if shards is not None:
            measured, _, _ = shards.exchange(known, None, None)
        for names, (_, options, _), rows in zip(names_of, known, measured, strict=True):
            assert rows is not None  # the group is adapted
            nonzero = is_nonzero(rows[0], rows[1])
            ratio = trust_ratio(nonzero, rows[0], rows[1], scalar_lr(options.lr, rows), options)
            assert isinstance(ratio, Tensor)
            # one copy, then element by element: tolist() refuses tensor subclasses
            ratios.update(zip(names, map(float, ratio.cpu()), strict=True))
        return ratios

    def __repr__(self) -> str:
        """What runs, what is adapted, and the options that are not at their defaults, group by group."""
        groups = self.param_groups
        return "\n".join([f"{type(self).__name__} (", describe(groups, [_options(group) for group in groups]), ")"])


def _options(group: dict[str, Any]) -> Options:
    return Options(*[group[name] for name in NAMES])


def _caller() -> int:
    """The stack level of the line that called step(): torch wraps it, and schedulers and hooks wrap it again."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "fastlars"):
        frame, level = frame.f_back, level + 1
    return level


def _is_missing(lr: object) -> bool:
    # not `is required`: pickle and deepcopy make another one
    return isinstance(lr, type(required))


def _as_list(params: Any) -> dict[str, Any]:
    """The params of a group as a list; for torch before 2.6 also their names, as later versions keep them."""
    if isinstance(params, (Tensor, set)):
        return {"params": [params] if isinstance(params, Tensor) else params}  # torch refuses sets, for their order
    params = list(params)
    if not NAMED_PARAMETERS and params and all(isinstance(p, tuple) for p in params):
        return {"params": [p[1] for p in params], "param_names": [p[0] for p in params]}
    return {"params": params}

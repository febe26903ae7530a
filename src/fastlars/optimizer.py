"""The optimizer class LARS. It holds and checks options and state, and calls `step.py` to update the parameters."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import sharding
from .advice import advise
from .backends import leaves_graph, split
from .backends.triton import check_fused
from .buckets import Group, Memory
from .checks import check_grad, check_group, check_lr, check_no_leaves, check_numbers, narrowest_dtype
from .compat import NAMED_PARAMETERS, outside_graphs, required, use_grad_for_differentiable
from .convert import groups_and_states
from .description import describe
from .dialects import options_of
from .dtypes import is_half, real
from .formula import is_adapted, is_compensated, is_nonzero, rounds_away, scalar_lr, trust_ratio
from .loading import check_saved_state
from .names import check_call, check_keys
from .options import NAMES, Options, check_can_be_skipped, check_no_module, check_options, values_of
from .step import step

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_Init = TypeVar("_Init", bound=Callable[..., None])
_NONE = {type(None)}
_NO_STATE: dict[str, Any] = {}
_HALF = {torch.float16, torch.bfloat16}
_dtype = attrgetter("dtype")


def _reading_names(init: _Init) -> _Init:
    """Wrap ``init`` to check option names and to replace ``dialect`` with its options.

    ``init`` itself could not do this, because it cannot tell a passed option, which overrides the dialect's, from a default.
    """

    @functools.wraps(init)
    def checked_init(self: LARS, *args: Any, **kwargs: Any) -> None:
        check_call(key for key in kwargs if key != "params")
        row = options_of(kwargs.pop("dialect", None), "LARS")
        for key in ("params", *NAMES)[: len(args)]:  # positional arguments also override the dialect
            row.pop(key, None)
        init(self, *args, **{**row, **kwargs})

    return checked_init  # type: ignore[return-value]  # mypy types the result of `wraps` as an object


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling, for training with very large batches.

    For each parameter tensor w with gradient g in an adapted group::

        ratio = trust_coefficient * |w| / (|g| + weight_decay * |w| + eps)
        v     = momentum * v + (1 - dampening) * ratio * (g + weight_decay * w)
        w     = w - lr * v

    If either norm is 0, the ratio is 1 and weight decay is not applied. Dampening does not apply to a tensor's first step.
    Groups that are not adapted run torch's own SGD; :doc:`algorithm` lists the exceptions. Norms are L2 norms of whole
    tensors, computed in float32 or float64. The step never writes ``.grad`` and never synchronises with the GPU.

    LARS is not a drop-in replacement for SGD. Without momentum, a step changes a tensor by about ``lr * trust_coefficient``
    of its norm, and momentum multiplies this by up to ``1 / (1 - momentum)``. A typical ``lr`` is therefore between 1 and
    30. Build the groups with :func:`fastlars.param_groups`, which does not adapt biases and normalisation tensors.

    Args:
        params: tensors or (name, tensor) pairs to optimize, or dicts that define param groups. Every option below except
            ``differentiable`` can be set per group.
        lr: learning rate, >= 0. A float, or a 1-element tensor, which stays on its device. It is required here or in
            every group.
        momentum: momentum factor, 0 <= momentum < 1 (default: 0).
        dampening: dampening of momentum, any finite number (default: 0). From a tensor's second step on, the
            term that is added to its momentum buffer is multiplied by 1 - dampening.
        weight_decay: L2 penalty, >= 0 (default: 0).
        nesterov: Nesterov momentum (default: False). It needs momentum > 0 and dampening == 0.
        trust_coefficient: the factor of the trust ratio, eta in the paper, >= 0 (default: 0.001).
        eps: added to the denominator of the trust ratio, >= 0 (default: 1e-8).
        adapt: whether the trust ratio scales the group's steps. If None (default), it does if ``weight_decay`` is not 0.
        trust_clip: use min(ratio / lr, 1) instead of the ratio, as LARC does (default: False).
        trust_denominator: "separate" (default) computes the ratio above. "joint" computes
            ``trust_coefficient * |w| / (|g + weight_decay * w| + eps)``, as BYOL, SimCLR and optax do. With "joint",
            weight decay applies even if a norm is 0.
        lr_in_momentum: multiply by lr before the momentum buffer instead of after it, as in the paper (default: False).
            With ``d = ratio * (g + weight_decay * w)``, the step is ``v = momentum * v + (1 - dampening) * lr * d`` and
            ``w -= v``, or ``w -= lr * d + momentum * v`` with nesterov.
        skip_nonfinite: skip the step of all groups with this option if any of their gradients has a norm that is not
            finite (default: False). The check does not synchronise with the GPU. With momentum it needs dampening == 0.
        maximize: maximize the objective instead of minimizing it (default: False).
        foreach: whether to update lists of tensors with torch's foreach operations, which take few kernel launches on CUDA
            from torch 2.11 on. If None (default), LARS uses them on the devices where torch's optimizers do, which are
            CUDA, Intel GPUs and plug-in devices, but not MPS and XLA.
        differentiable: whether autograd may run through the step (default: False). It must be the same in all groups.
        fused: whether to compute norms and update in fused kernels, torch's own on CPU and Triton kernels on CUDA. If None
            (default), adapted groups use them on CPU, but not on CUDA until the kernels are proven on GPUs. Tensors that a
            kernel does not support (because of their dtype, because they are not dense, or because their gradients or buffers
            have other layouts) fall back to another implementation.
        kahan_sum: whether to keep the rounding errors of bfloat16 and float16 weights and add them in the next step.
            Without Kahan sums, small steps are lost. Kahan sums need a second tensor of each weight's size (state key
            ``compensation``). If None (default), only adapted groups use them. Other dtypes ignore the option. See
            :doc:`precision`.
        dialect: a key of :data:`fastlars.dialects.DIALECTS`, such as "simclr" or "mlperf". It sets the options that
            reproduce the LARS of another paper or package (default: None). Options that you pass override the dialect's.
            Groups and checkpoints hold these options, but not the dialect's name.

    Raises:
        ValueError: if an option is out of range or contradicts another, if a dialect does not exist, if a group has no lr,
            if a group has a key that is another library's option (the error gives fastlars's name for it), or if a state
            dict does not fit.
        TypeError: if an option has the wrong type, if an argument is misspelt or is another library's option, or if a
            parameter is neither floating nor complex.
        RuntimeError: if ``fused=True`` is not possible, and in :meth:`step` for sparse gradients.

    No parameter or state has changed when these are raised.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        >>> groups = fastlars.param_groups(model, weight_decay=1e-4, bias_lr=0.1)
        >>> optimizer = fastlars.LARS(groups, lr=4.8, momentum=0.9)
        >>> scheduler = fastlars.schedules.warmup_cosine(optimizer, warmup_steps=10, total_steps=100)
        >>> for step in range(100):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        ...     scheduler.step()

        Print the optimizer to see which groups are adapted and which implementation each of them uses:

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
    Algorithm 1. The paper multiplies by lr before the momentum buffer (``lr_in_momentum=True``). By default, LARS
    multiplies after it, like the LARS of Lightning Bolts, quadra and lightly. Arguments, state and checkpoints are
    compatible with those packages.
    """

    _looked_for_adapted = False
    _shards_of_last_step: sharding.Sharded | None = None

    @_reading_names
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = required,  # type: ignore[assignment]  # torch's marker for an option without a default
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
        kahan_sum: bool | None = None,
        dialect: str | None = None,
    ) -> None:
        """See the docstring of the class."""
        del dialect  # already replaced by its options in _reading_names
        given = locals()
        defaults = {name: given[name] for name in NAMES}
        self._memory = Memory()
        # group index -> the group's options and narrowest dtype at the last step, and the largest lr that these allow
        self._checked: dict[int, tuple[list[Any], float]] = {}
        check_options({**defaults, "lr": 0.0} if _is_missing(lr) else defaults, "LARS")
        check_no_module(params, "LARS")
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group. Its options default to those given at construction.

        Args:
            param_group: a dict with ``params`` (tensors or (name, tensor) pairs) and any options.

        Raises:
            ValueError, TypeError: for the same reasons as the constructor. The optimizer is then unchanged.

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
            options = {**options_of(options.pop("dialect", None), where), **options}
            check_keys(options, where)
            check_no_module(param_group["params"], where)
            param_group = {**options, **_as_list(param_group["params"])}
            options = {**self.defaults, **options}
            check_group(options, param_group["params"], where)
            self._check_whole(options, where)
            sharding.check_not_flattened(param_group["params"], where)
            if options["fused"]:
                check_fused(map(sharding.local_of, param_group["params"]), where)
        super().add_param_group(param_group)  # raises if it is not a dict with "params"
        self._make_lr_tensors()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class, of torch's SGD, or of the LARS of Lightning Bolts, quadra or lightly.

        Args:
            state_dict: what ``state_dict()`` returned. Options that it lacks keep their current values.

        Raises:
            ValueError, TypeError: if groups, options or buffers do not fit, or if another optimizer saved the state, which
                :func:`fastlars.convert_state_dict` converts. The optimizer is then unchanged.
            RuntimeError: if called on Lightning's optimizer wrapper, because the state would not reach the optimizer.

        Example:
            >>> w = torch.nn.Parameter(torch.ones(3))
            >>> saved = fastlars.LARS([w], lr=8.0, momentum=0.9, adapt=True).state_dict()
            >>> optimizer = fastlars.LARS([w], lr=1.0)
            >>> optimizer.load_state_dict(saved)
            >>> optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["adapt"]
            (8.0, True)
        """
        if "param_groups" not in self.__dict__:
            # torch would load into the wrapper and leave the optimizer unchanged
            raise RuntimeError(
                f"{type(self).__name__} wraps an optimizer and has no param groups itself, so a state dict would not reach "
                "the optimizer; load into that one, as in self.optimizers().optimizer.load_state_dict(...) with Lightning"
            )
        if not isinstance(state_dict, dict):
            groups_and_states(state_dict)
        # Check before torch casts the buffers, because casting drops imaginary parts. The check is a hook that is registered
        # last, so that it sees the state dict that users' hooks may have replaced.
        handle = self.register_load_state_dict_pre_hook(check_saved_state)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Check an unpickled or loaded state, fill in missing options, and adopt it.

        torch's load_state_dict calls this at its end. Until then the optimizer is unchanged.
        """
        loading = "param_groups" in self.__dict__
        if not loading:
            self._memory = Memory()
            self._checked = {}
        for i, group in enumerate(state["param_groups"]):
            # state dicts of SGD, Bolts and quadra lack some options, which then keep their current values
            known = self.param_groups[i] if loading else {**Options(0.0)._asdict(), **state["defaults"]}
            for name in (*NAMES, "param_names"):
                if name in known:
                    group.setdefault(name, known[name])
            where = f"param group {i}"
            saved = {key: value for key, value in group.items() if key != "params"}
            if loading:
                way_out = "; fastlars.convert_state_dict converts the state dict of another optimizer"
                check_keys((key for key in group if key not in known), where, way_out)
            check_options(saved, where)
            if loading:
                # keep the current value, because all groups must have the same one (see _check_whole)
                saved["differentiable"] = group["differentiable"] = known["differentiable"]
            check_group(saved, group["params"], where)
            if group["fused"]:
                check_fused(map(sharding.local_of, group["params"]), where)
        if loading:
            for param, entry in state["state"].items():
                if not isinstance(param, Tensor):
                    continue
                if entry.get("momentum_buffer") is None:
                    # drop the None that SGD saves without momentum, because torch.compile would treat it as a constant
                    entry.pop("momentum_buffer", None)
                elif param.is_complex():  # cast it here, because torch casts only the state of floating parameters
                    entry["momentum_buffer"] = entry["momentum_buffer"].to(param.dtype)
                # Only half types use compensations. Users who load into another dtype must first add them to the weights.
                if entry.get("compensation") is None or not is_half(param.dtype):
                    entry.pop("compensation", None)
        super().__setstate__(state)
        self._make_lr_tensors()

    def _make_lr_tensors(self) -> None:
        """If the optimizer's lr is a tensor, make each group's lr a tensor, because graphs treat a float as a constant."""
        default = self.defaults["lr"]
        if isinstance(default, Tensor):
            for group in self.param_groups:
                if isinstance(group["lr"], (int, float)):
                    group["lr"] = torch.full_like(default, group["lr"])

    _make_lr_tensors_outside_graphs = outside_graphs(_make_lr_tensors)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor | None],
        compensations: list[Tensor | None],
        in_graph: bool = False,
    ) -> None:
        # a graph's state is created here, because torch.compile runs this method eagerly when it traces a step
        if not self._looked_for_adapted:
            self._warn_if_nothing_is_adapted()
            self._warn_if_steps_round_away()
            for i, each in enumerate(self.param_groups):
                # check again, because FSDP may flatten these parameters after the optimizer was constructed
                sharding.check_not_flattened(each["params"], f"param group {i}")
        if in_graph and group is self.param_groups[0]:
            # The compiler guards the state entries that exist after the first call. If entries are added later, torch 2.4
            # fails when state is dropped or loaded in part. So create the entries of all groups now.
            for each in self.param_groups:
                options = Options(*values_of(each))
                for p in each["params"]:
                    if p.grad is not None and (options.momentum != 0 or is_compensated(p.dtype, options)):
                        self.state[p]
        with_grad = [p for p in group["params"] if p.grad is not None]
        params += with_grad
        grads += [p.grad for p in with_grad]
        if group["momentum"] != 0:
            momentum_buffers += self._state_of(with_grad, "momentum_buffer", [True] * len(with_grad), in_graph)
        if not _HALF.isdisjoint(map(_dtype, with_grad)):
            options = Options(*values_of(group))
            needed = [is_compensated(p.dtype, options) for p in with_grad]
            compensations += self._state_of(with_grad, "compensation", needed, in_graph)

    def _state_of(self, params: list[Tensor], key: str, needed: list[bool], in_graph: bool) -> list[Tensor | None]:
        """The state of each parameter under this key, or None if the parameter needs none or the step will create it."""
        found = [self.state.get(p, _NO_STATE).get(key) if need else None for p, need in zip(params, needed)]
        # Usually the step creates missing state. Two cases need it before the step. A graph serves all steps, so its state must
        # exist. If a parameter is listed twice, both of its places in the list must share one state.
        if not _NONE.isdisjoint(map(type, found)) and (in_graph or len(set(map(id, params))) < len(params)):
            for p, need in zip(params, needed):
                if need and self.state[p].get(key) is None:
                    self.state[p][key] = torch.zeros_like(p)
            found = [self.state[p][key] if need else None for p, need in zip(params, needed)]
        return found

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether `step` unscales gradients and skips steps itself. GradScaler then sets ``grad_scale`` and ``found_inf``.

        True if every group sets fused=True, as in torch, and no group has both momentum and dampening, which
        `check_can_be_skipped` forbids.
        """
        return all(
            group["fused"] and (group["momentum"] == 0 or group["dampening"] == 0) for group in self.param_groups
        )

    def _warn_if_nothing_is_adapted(self) -> None:
        self._looked_for_adapted = True
        if any(is_adapted(options) or options.adapt is not None for _, options in self._params_and_options()):
            return
        advise(
            "LARS adapts no parameter, because weight_decay is 0 in every group. Every step is a plain SGD step. Set "
            "weight_decay, build the groups with fastlars.param_groups(model, weight_decay), or pass adapt=True "
            "(adapt=False if you do want SGD)."
        )

    def _warn_if_steps_round_away(self) -> None:
        """Warn, as `check` does, if kahan_sum=False loses most of a group's steps. Skip a group whose lr is on a GPU."""
        for i, group in enumerate(self.param_groups):
            options, lr = Options(*values_of(group)), group.get("initial_lr", group["lr"])
            known = not isinstance(lr, Tensor) or lr.device.type == "cpu"
            dtypes = set(map(_dtype, group["params"]))
            if options.kahan_sum is None or options.kahan_sum or not is_adapted(options) or not known:
                continue
            rate = float(lr.detach() if isinstance(lr, Tensor) else lr)
            step = options.trust_coefficient * (1.0 if options.trust_clip else rate)
            if step > 0 and any(rounds_away(dtype, step, options) for dtype in dtypes):
                advise(
                    f"param group {i}: half-precision weights round away most of a step of {step:.2g} of their norm. Leave "
                    "kahan_sum at None, which keeps the rounding error for the next step, or keep weights in float32 and "
                    "compute under torch.autocast."
                )
                return

    @use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: a function that recomputes the gradients and returns the loss.

        Returns:
            What the closure returned, or None without a closure.

        Raises:
            RuntimeError: for sparse gradients, and if a CUDA graph captures the step before the momentum buffers exist.
            ValueError, TypeError: if an option was set in a group and is out of range or has the wrong type.

        No parameter or state has changed when these are raised.

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
            >>> w.tolist()  # its norm was 5, and the step changed it by a tenth of that
            [3.0, 3.5]
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        if isinstance(self.defaults["lr"], Tensor) and any(
            isinstance(group["lr"], (int, float)) for group in self.param_groups
        ):
            self._make_lr_tensors_outside_graphs()  # a group's lr may have been set to a float since the last step
        if torch.compiler.is_compiling() and any(
            # also leave graphs with dampening, because a first step differs from later ones, and one graph serves all steps
            sharding.any_sharded(params) or leaves_graph(params, options) or (options.momentum and options.dampening)
            for params, options in self._params_and_options()
        ):
            # pass no arguments, because after load_state_dict a compiled frame would pass the old lr tensors
            self._step_groups_outside_graphs()
        else:
            self._step_groups()
        return loss

    def _step_groups(self) -> None:
        params_and_options = self._params_and_options()
        # GradScaler sets these attributes if _step_supports_amp_scaling is True
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for i, group in enumerate(self.param_groups):  # check all groups before the first state is created
            if torch.compiler.is_compiling():
                for grad in [p.grad for p in group["params"]]:
                    if grad is not None and grad.layout is not torch.strided:
                        check_grad(grad)
            else:
                self._check_before_step(i, group)
            if found_inf is not None:
                check_can_be_skipped(group["momentum"], group["dampening"], f"param group {i}: found_inf")
        shards = sharding.sharded(params_and_options)

        groups: list[Group] = []
        in_graph = torch.compiler.is_compiling()
        memory = None if in_graph else self._memory
        if memory is not None:
            memory.steps += 1
        for i, (group, (_, options)) in enumerate(zip(self.param_groups, params_and_options)):
            stepped = Group([], [], [], [], options, f"param group {i}", memory)
            self._init_group(group, *stepped[:4], in_graph)
            if stepped.params:
                groups.append(stepped)

        state = [(group, group.momentum_buffers, "momentum_buffer") for group in groups]
        state += [(group, group.compensations, "compensation") for group in groups]
        unmade = [] if in_graph else [each for each in state if not _NONE.isdisjoint(map(type, each[1]))]
        step(groups, grad_scale, found_inf, shards)
        if shards is not None:
            self._shards_of_last_step = shards
        for stepped, made, key in unmade:
            for param, tensor in zip(stepped.params, made, strict=True):
                if tensor is not None:  # else the step was skipped
                    self.state[param][key] = tensor
                elif key == "compensation":  # drop it, because kahan_sum has been turned off
                    self.state.get(param, {}).pop(key, None)

    def _check_whole(self, options: dict[str, Any], where: str) -> None:
        """Raise for options whose validity depends on the whole optimizer."""
        if bool(options["differentiable"]) != bool(self.defaults["differentiable"]):
            raise ValueError(
                f"{where}: differentiable must be the same in all groups, {self.defaults['differentiable']}, got "
                f"{options['differentiable']}, because autograd is on or off for the whole step; pass it to LARS"
            )
        if options["skip_nonfinite"]:
            sharding.check_not_divided(where)

    def _check_before_step(self, i: int, group: dict[str, Any]) -> None:
        """Check a group's options, which users may edit, before any parameter changes. `split` checks the tensors."""
        where, lr, params = f"param group {i}", group["lr"], group["params"]
        if group["differentiable"] and torch.is_grad_enabled():
            check_no_leaves([p for p in params if p.grad is not None])
        narrowest = narrowest_dtype(set(map(_dtype, params)))
        values = [*values_of(group), narrowest]
        # do not check the sign of lr, because rounding in a schedule may make it slightly negative
        values[0] = 0.0 if isinstance(lr, (float, Tensor)) else lr
        checked = self._checked.get(i)
        if checked is None or any(new is not old for new, old in zip(values, checked[0])):
            options = dict(zip(NAMES, values))
            check_options(options, where)
            self._check_whole(options, where)
            checked = self._checked[i] = values, check_numbers(options, narrowest, where)
        check_lr(lr, checked[1], all(p.is_meta for p in params[:1]), where)

    # Leave the graph once for all groups, because skip_nonfinite skips them together.
    _step_groups_outside_graphs = outside_graphs(_step_groups)

    def _params_and_options(self) -> list[tuple[list[Tensor], Options]]:
        # not `values_of`, with which torch.compile makes a second graph after a state dict is loaded
        return [(group["params"], Options(*[group[name] for name in NAMES])) for group in self.param_groups]

    @torch.no_grad()
    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of each adapted tensor, from its current value and gradient.

        Call it after ``backward()`` (and after unscaling, with a GradScaler) and before ``zero_grad()``. Each call
        synchronises with the device. Processes do not communicate, so a single process may call it. The ratio of a sharded
        tensor is that of the last step, which exchanged the norms. If that step was skipped, the ratio may be 0 or NaN.

        Returns:
            A dict of ratios by name, in the optimizer's order. A tensor without a name is called by its group and its
            position, such as "0.3". If a name repeats, its group and position are appended, as in "weight (0.3)". The dict
            leaves out groups that are not adapted, and tensors without a gradient unless they are sharded. The ratio is 1 if
            the tensor or its gradient is zero.

        Raises:
            RuntimeError: for sparse gradients, and for sharded tensors before the first step.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> w.grad = torch.tensor([0.0, 2.0])
            >>> optimizer = fastlars.LARS([w], lr=1.0, trust_coefficient=0.1, adapt=True)
            >>> optimizer.trust_ratios()
            {'0.0': 0.25}

        :func:`fastlars.plots.trust_ratios` draws the ratios of several steps.
        """
        ratios: dict[str, float] = {}
        for group_index, (names, (params, of_step)) in enumerate(
            zip(self._names(), self._params_and_options(), strict=True)
        ):
            if not is_adapted(of_step):
                continue
            # the exchange covers every sharded tensor that trains, with or without a gradient in this process
            asked = [j for j, p in enumerate(params) if p.requires_grad or p.grad is not None]
            exchanged = {j: norms for j in asked if (norms := self._exchanged_norms(params[j])) is not None}
            present = [j for j, p in enumerate(params) if j not in exchanged and p.grad is not None]
            grads = [grad for j in present if (grad := params[j].grad) is not None]
            for grad in grads:
                check_grad(grad)
            ratios.update(dict.fromkeys((names[j] for j in sorted([*exchanged, *present])), 1.0))  # sets their order
            measured = [([j], *norms.unsqueeze(1)) for j, norms in exchanged.items()]
            here, its_grads = [sharding.local(params[j]) for j in present], [sharding.local(grad) for grad in grads]
            options = of_step._replace(momentum=0.0, skip_nonfinite=False)
            for bucket in split(Group(here, its_grads, [], [], options, f"param group {group_index}")):
                known = bucket.backend.measure(bucket, True)
                assert known.param is not None  # the group is adapted
                assert known.direction is not None
                measured.append(([present[index] for index in bucket.indices], known.param, known.direction))
            for positions, param_norms, direction_norms in measured:
                nonzero = is_nonzero(param_norms, direction_norms)
                lr = scalar_lr(options.lr, param_norms)
                ratio = trust_ratio(nonzero, param_norms, direction_norms, lr, options)
                assert isinstance(ratio, Tensor)
                # copy once, then convert each element, because tolist() refuses tensor subclasses
                ratios.update(zip([names[j] for j in positions], map(float, ratio.cpu()), strict=True))
        return ratios

    def _exchanged_norms(self, param: Tensor) -> Tensor | None:
        """Param norm and direction norm of a sharded tensor in the last step, or None if the tensor is not sharded."""
        if not sharding.is_divided(param):
            return None
        shards = self._shards_of_last_step
        if (norms := None if shards is None else shards.known_norms(param)) is None:
            raise RuntimeError(
                "trust ratios of sharded tensors need a step, which exchanges their norms between processes, and there has "
                "been none; call trust_ratios() after step()"
            )
        return norms

    def _names(self) -> list[list[str]]:
        """The names of all tensors, group by group. A tensor without a name gets its group and position, such as "0.3"."""
        seen: set[str] = set()
        named: list[list[str]] = []
        for i, group in enumerate(self.param_groups):
            positions = [f"{i}.{j}" for j in range(len(group["params"]))]
            names = [
                f"{name} ({position})" if name in seen else name
                for name, position in zip(group.get("param_names") or positions, positions)
            ]
            seen.update(names)
            named.append(names)
        return named

    @contextlib.contextmanager
    def relative_steps(self) -> Iterator[dict[str, float]]:
        """Measure how much the steps inside this context change each tensor, relative to its norm before them.

        The context measures all tensors, adapted or not, and keeps a copy of them until it ends. Of a sharded tensor, each
        process measures its own shard, without communication. With Kahan sums, the change of weight plus compensation
        is measured, because a step updates their sum.

        Returns:
            A context manager that yields a dict and fills it on exit. The dict maps each name, as in :meth:`trust_ratios`,
            to the norm of the change divided by the norm before. If a tensor did not change, its value is 0. If it was zero
            and changed, the value is inf.

        Raises:
            RuntimeError: if a step inside the context raises it. The dict is then empty.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> w.grad = torch.tensor([0.0, 2.0])
            >>> optimizer = fastlars.LARS([w], lr=1.0, trust_coefficient=0.1, adapt=True)
            >>> with optimizer.relative_steps() as steps:
            ...     optimizer.step()
            >>> {name: round(step, 6) for name, step in steps.items()}  # lr * trust_coefficient
            {'0.0': 0.1}
        """
        steps: dict[str, float] = {}
        with torch.no_grad():
            params = [p for group in self.param_groups for p in group["params"]]
            before = [self._value(p).clone() for p in params]
        yield steps
        with torch.no_grad():
            pairs = [
                torch.stack([torch.linalg.vector_norm(real(t).double()) for t in (self._value(p) - old, old)])
                for p, old in zip(params, before, strict=True)
            ]
        for name, pair in zip(itertools.chain.from_iterable(self._names()), pairs, strict=True):
            moved, norm = pair.tolist()
            steps[name] = moved / norm if norm else math.inf if moved else 0.0

    def _value(self, param: Tensor) -> Tensor:
        """This process's shard of a parameter plus its compensation, for half types in float32."""
        value, compensation = sharding.local(param), self.state.get(param, _NO_STATE).get("compensation")
        value = value.float() if is_half(param.dtype) else value  # half types would round the differences
        return value if compensation is None else value + sharding.local(compensation)

    def __repr__(self) -> str:
        """Describe each group by its backend, whether it is adapted, and its options that are not defaults."""
        return "\n".join([f"{type(self).__name__} (", describe(self.param_groups), ")"])


def _is_missing(lr: object) -> bool:
    # not `is required`, because pickle and deepcopy make another instance
    return isinstance(lr, type(required))


def _as_list(params: Any) -> dict[str, Any]:
    """A group's params as a list. Before torch 2.6, also split (name, tensor) pairs, which later versions do themselves."""
    if isinstance(params, set):
        return {"params": params}  # torch raises, because a set has no order
    params = [params] if isinstance(params, Tensor) else list(params)
    if not NAMED_PARAMETERS and params and all(isinstance(p, tuple) for p in params):
        return {"params": [p[1] for p in params], "param_names": [p[0] for p in params]}
    return {"params": params}

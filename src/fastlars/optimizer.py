"""class LARS: options, state, and the order of a step. The numbers are made in `step.py`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from . import sharding
from .advice import advise
from .backends import leaves_graph, split
from .backends.triton import check_captured, check_fused, is_capturing
from .buckets import Group, Memory
from .checks import check_group, check_lr, check_no_leaves, check_numbers, largest_lr, narrowest_dtype
from .compat import NAMED_PARAMETERS, outside_graphs, required, use_grad_for_differentiable
from .convert import groups_and_states
from .description import describe
from .dialects import options_of
from .dtypes import is_half, real
from .formula import is_adapted, is_compensated, is_nonzero, rounds_away, scalar_lr, trust_ratio
from .loading import check_saved_state
from .names import check_call, check_keys
from .options import NAMES, Options, check_can_be_skipped, check_grad, check_no_module, check_options
from .step import step

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

_P = ParamSpec("_P")
_NONE = {type(None)}
_NO_STATE: dict[str, Any] = {}
_HALF = {torch.float16, torch.bfloat16}
_dtype = attrgetter("dtype")


def _reading_names(
    init: Callable[Concatenate[LARS, _P], None],
) -> Callable[Concatenate[LARS, _P], None]:
    """Before ``init``: the names of options are checked, and ``dialect`` becomes the options that it stands for.

    Here, because ``init`` could not tell an option that was given from its default.
    """

    @functools.wraps(init)
    def checked_init(self: LARS, *args: _P.args, **kwargs: _P.kwargs) -> None:
        check_call(key for key in kwargs if key != "params")
        row = options_of(kwargs.pop("dialect", None), "LARS")
        for key in ("params", *NAMES)[: len(args)]:  # what is given by position comes first too
            row.pop(key, None)
        init(self, *args, **{**row, **kwargs})

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
        momentum: momentum factor, 0 <= momentum < 1.
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
        kahan_sum: whether weights in bfloat16 or float16 keep what rounding takes from their steps, in a second tensor of
            their size (state key ``compensation``), and take it into the next step. None: in groups that are adapted.
            Without it small steps are lost. Other dtypes need none. See :doc:`precision`.
        dialect: a row of :data:`fastlars.dialects.DIALECTS`, such as "simclr" or "mlperf": the options that make this the LARS of
            another paper or package. Options that are given beside it come first. Only the options are kept, and saved.

    Raises:
        ValueError: an option outside its range or contradicting another, a dialect that does not exist, a group without
            lr, an option of another library in a group (ours is named), and a state dict whose groups or buffers do not
            fit.
        TypeError: an option of the wrong type, a misspelt option or one of another library in the call, a parameter that
            is not floating or complex.
        RuntimeError: ``fused=True`` that cannot be honoured; in :meth:`step`, sparse gradients. Nothing has changed then.

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
    _shards_of_last_step: sharding.Sharded | None = None

    @_reading_names
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
        kahan_sum: bool | None = None,
        dialect: str | None = None,
    ) -> None:
        """See the class."""
        del dialect  # _reading_names has put its options in its place
        given = locals()
        defaults = {name: given[name] for name in NAMES}
        self._memory = Memory()
        # by the position of a group: its options and narrowest dtype at the last step, and the largest lr that they allow
        self._checked: dict[int, tuple[list[Any], float]] = {}
        check_options({**defaults, "lr": 0.0} if _is_missing(lr) else defaults, "LARS")
        check_no_module(params, "LARS")
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
        super().add_param_group(param_group)  # what is no group at all is refused there
        self._make_lr_tensors()

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
            self._memory = Memory()
            self._checked = {}
        for i, group in enumerate(state["param_groups"]):
            # keys that SGD's, Bolts' and quadra's state dicts lack keep their values
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
                # says how this optimizer steps, see _check_whole
                saved["differentiable"] = group["differentiable"] = known["differentiable"]
            check_group(saved, group["params"], where)
            if group["fused"]:
                check_fused(map(sharding.local_of, group["params"]), where)
        if loading:
            for param, entry in state["state"].items():
                if not isinstance(param, Tensor):
                    continue
                if entry.get("momentum_buffer") is None:
                    # of SGD without momentum: torch.compile would keep the None for a constant
                    entry.pop("momentum_buffer", None)
                elif param.is_complex():  # torch casts the state of floating parameters only
                    entry["momentum_buffer"] = entry["momentum_buffer"].to(param.dtype)
                if entry.get("compensation") is None or not is_half(param.dtype):
                    entry.pop(
                        "compensation", None
                    )  # of another dtype: what it held is to be added to the weights first
        super().__setstate__(state)
        self._make_lr_tensors()

    def _make_lr_tensors(self) -> None:
        """Make each float lr a tensor if the optimizer's lr is one: a graph takes a float for a constant."""
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
        # torch.compile runs this method eagerly when it traces a step: state is made here, and here only
        if not self._looked_for_adapted:
            self._warn_if_nothing_is_adapted()
            self._warn_if_steps_round_away()
            for i, each in enumerate(self.param_groups):
                # FSDP keeps the parameters that it finds, and makes flat pieces of them
                sharding.check_not_flattened(each["params"], f"param group {i}")
        if in_graph and group is self.param_groups[0]:
            # The compiler guards the entries of the state that are there after the first call, so all have to be: others
            # make torch 2.4 fail when state is dropped or loaded in part.
            for each in self.param_groups:
                options = _options(each)
                for p in each["params"]:
                    if p.grad is not None and (options.momentum != 0 or is_compensated(p.dtype, options)):
                        self.state[p]
        with_grad = [p for p in group["params"] if p.grad is not None]
        params += with_grad
        grads += [p.grad for p in with_grad]
        if not _HALF.isdisjoint(map(_dtype, with_grad)):
            compensations += self._compensations(with_grad, _options(group), in_graph)
        if group["momentum"] == 0:
            return
        found = [self.state.get(p, _NO_STATE).get("momentum_buffer") for p in with_grad]
        missing = not _NONE.isdisjoint(map(type, found))
        # A graph is to serve all steps, and a parameter that comes twice has one buffer. Else the step makes buffers.
        if missing and (in_graph or len(set(map(id, with_grad))) < len(with_grad)):
            for p in with_grad:
                if self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            found = [self.state[p]["momentum_buffer"] for p in with_grad]
        momentum_buffers += found

    def _compensations(self, params: list[Tensor], options: Options, in_graph: bool) -> list[Tensor | None]:
        """What the step keeps beside parameters in half precision, zeros at first; outside graphs it is stored after the step."""
        kept: dict[Tensor, Tensor] = {}  # a parameter may come twice
        for p in params:
            if is_compensated(p.dtype, options) and p not in kept:
                known = self.state.get(p, _NO_STATE).get("compensation")
                kept[p] = torch.zeros_like(p) if known is None else known
                if in_graph:
                    self.state[p]["compensation"] = kept[p]
        return [kept.get(p) for p in params]

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
        advise(
            "LARS adapts no parameter: weight_decay is 0 in every group, so each takes a plain SGD step. Set "
            "weight_decay, or build the groups with fastlars.param_groups(model, weight_decay), or pass adapt=True "
            "(adapt=False, if SGD is what you want)."
        )

    def _warn_if_steps_round_away(self) -> None:
        """As `check` asks, of groups that say kahan_sum=False; an lr on an accelerator would have to be waited for."""
        for i, group in enumerate(self.param_groups):
            options, lr = _options(group), group.get("initial_lr", group["lr"])
            known = not isinstance(lr, Tensor) or lr.device.type == "cpu"
            dtypes = set(map(_dtype, group["params"]))
            if options.kahan_sum is None or options.kahan_sum or not is_adapted(options) or not known:
                continue
            rate = float(lr.detach() if isinstance(lr, Tensor) else lr)
            step = options.trust_coefficient * (1.0 if options.trust_clip else rate)
            if step > 0 and any(rounds_away(dtype, step, options) for dtype in dtypes):
                advise(
                    f"param group {i}: steps of {step:.2g} of a weight's norm are mostly lost where weights in half "
                    "precision are rounded. Leave kahan_sum at None, which keeps what rounding takes, or keep weights in "
                    "float32 and compute under torch.autocast."
                )
                return

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

        if isinstance(self.defaults["lr"], Tensor) and any(
            isinstance(group["lr"], (int, float)) for group in self.param_groups
        ):
            self._make_lr_tensors_outside_graphs()  # written into a group since the last step
        if any(
            # with dampening the first step of a tensor differs, and one graph is to serve all steps
            sharding.any_sharded(params) or leaves_graph(params, options) or (options.momentum and options.dampening)
            for params, options in self._params_and_options()
        ):
            # without arguments: after load_state_dict a compiled frame would pass the lr tensors from before
            self._step_groups_outside_graphs()
        else:
            self._step_groups()
        return loss

    def _step_groups(self) -> None:
        params_and_options = self._params_and_options()
        # GradScaler's, which is told to set them by _step_supports_amp_scaling
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        capturing = not torch.compiler.is_compiling() and is_capturing()
        for i, group in enumerate(self.param_groups):  # all before the first state is made
            if torch.compiler.is_compiling():
                for grad in [p.grad for p in group["params"]]:
                    if grad is not None and grad.layout is not torch.strided:
                        check_grad(grad)
            else:
                self._check_before_step(i, group)
            if capturing:
                moving = [p for p in group["params"] if p.grad is not None]
                options = params_and_options[i][1]
                for key, needed in (
                    ("momentum_buffer", [options.momentum != 0] * len(moving)),
                    ("compensation", [is_compensated(p.dtype, options) for p in moving]),
                ):
                    made = [self.state.get(p, _NO_STATE).get(key) if need else p for p, need in zip(moving, needed)]
                    check_captured(moving, made, f"param group {i}")
            if found_inf is not None:
                check_can_be_skipped(group["momentum"], group["dampening"], f"param group {i}: found_inf")
        shards = sharding.sharded(params_and_options)

        groups: list[Group] = []
        in_graph = torch.compiler.is_compiling()
        if not in_graph:
            self._memory.steps += 1
        for i, (group, (_, options)) in enumerate(zip(self.param_groups, params_and_options)):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momentum_buffers: list[Tensor | None] = []
            compensations: list[Tensor | None] = []
            self._init_group(group, params, grads, momentum_buffers, compensations, in_graph)
            if params:
                groups.append(
                    Group(
                        params,
                        grads,
                        momentum_buffers,
                        options,
                        f"param group {i}",
                        None if in_graph else self._memory,
                        compensations,
                    )
                )

        unmade = [not in_graph and not _NONE.isdisjoint(map(type, group.momentum_buffers)) for group in groups]
        step(groups, grad_scale, found_inf, shards)
        if shards is not None:
            self._shards_of_last_step = shards
        for stepped, is_new in zip(groups, unmade, strict=True):
            for param, buffer in zip(stepped.params, stepped.momentum_buffers, strict=True) if is_new else ():
                if buffer is not None:  # else the step was skipped
                    self.state[param]["momentum_buffer"] = buffer
            for param, kept in () if in_graph else zip(stepped.params, stepped.compensations):
                if kept is not None:
                    self.state[param]["compensation"] = kept
                else:  # kahan_sum=False drops it
                    self.state.get(param, {}).pop("compensation", None)

    def _check_whole(self, options: dict[str, Any], where: str) -> None:
        """Raise for options that one group cannot set by itself."""
        if bool(options["differentiable"]) != bool(self.defaults["differentiable"]):
            raise ValueError(
                f"{where}: differentiable must be the same in all groups, {self.defaults['differentiable']}, got "
                f"{options['differentiable']}: a step runs with gradients or without; give it to LARS"
            )
        if options["skip_nonfinite"]:
            sharding.check_not_divided(where)

    def _check_before_step(self, i: int, group: dict[str, Any]) -> None:
        """Check what was written into a group since the last step, before any group moves; `split` checks its tensors."""
        where, lr = f"param group {i}", group["lr"]
        if group["differentiable"] and torch.is_grad_enabled():
            check_no_leaves([p for p in group["params"] if p.grad is not None])
        narrowest = narrowest_dtype(group["params"]) if group["params"] else None
        values = [group[name] for name in NAMES]
        values[0] = 0.0 if isinstance(lr, (float, Tensor)) else lr  # schedules may round it below 0
        values += [narrowest]
        checked = self._checked.get(i)
        if checked is None or any(new is not old for new, old in zip(values, checked[0])):
            options = dict(zip(NAMES, values))
            check_options(options, where)
            self._check_whole(options, where)
            if narrowest is not None:
                check_numbers(options, narrowest, where)
            limit = math.inf if narrowest is None else largest_lr(options, narrowest)
            checked = self._checked[i] = values, limit
        check_lr(lr, next(iter(group["params"]), None), checked[1], where)

    # As torch's own fused step leaves the graph, but once for all groups, whose gradients may decide together.
    _step_groups_outside_graphs = outside_graphs(_step_groups)

    def _params_and_options(self) -> list[tuple[list[Tensor], Options]]:
        return [(group["params"], _options(group)) for group in self.param_groups]

    @torch.no_grad()
    def trust_ratios(self) -> dict[str, float]:
        """The trust ratio of each adapted tensor, from its present value and gradient; of a sharded one, of the last step.

        Computed when asked, at no cost to other steps; the values are read on the host at once. Nothing is exchanged
        between processes, so any of them may ask alone. Ask after ``backward()`` (and after unscaling, with a GradScaler)
        and before ``zero_grad()``. Of sharded tensors the step has exchanged the norms, so their ratios are those of the
        last step, whenever they are asked for: of a step that was skipped too, where they may be 0 or NaN.

        Returns:
            Name to ratio, in the optimizer's order; the names of named parameters, else "group.position" as in "0.3",
            which also follows a name that an earlier tensor has. Plain tensors without a gradient and groups that are not
            adapted are left out. A tensor that is zero, or has a zero gradient, has 1: it is not scaled.

        Raises:
            RuntimeError: for sparse gradients, and for sharded tensors before the first step.

        Example:
            >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
            >>> w.grad = torch.tensor([0.0, 2.0])
            >>> optimizer = fastlars.LARS([w], lr=1.0, trust_coefficient=0.1, adapt=True)
            >>> optimizer.trust_ratios()
            {'0.0': 0.25}

        :func:`fastlars.plots.trust_ratios` draws what several steps have given.
        """
        ratios: dict[str, float] = {}
        for group_index, (names, (params, of_step)) in enumerate(
            zip(self._names(), self._params_and_options(), strict=True)
        ):
            if not is_adapted(of_step):
                continue
            # with an exchange every trained tensor has a row, whatever gradient this process has
            asked = [j for j, p in enumerate(params) if p.requires_grad or p.grad is not None]
            exchanged = {j: norms for j in asked if (norms := self._exchanged_norms(params[j])) is not None}
            present = [j for j, p in enumerate(params) if j not in exchanged and p.grad is not None]
            grads = [grad for j in present if (grad := params[j].grad) is not None]
            for grad in grads:
                check_grad(grad)
            ratios.update(dict.fromkeys((names[j] for j in sorted([*exchanged, *present])), 1.0))  # in this order
            measured = [([j], *norms.unsqueeze(1)) for j, norms in exchanged.items()]
            here, its_grads = [sharding.local(params[j]) for j in present], [sharding.local(grad) for grad in grads]
            options = of_step._replace(momentum=0.0, skip_nonfinite=False)
            for bucket in split(Group(here, its_grads, [], options, f"param group {group_index}")) if present else []:
                known = bucket.backend.measure(bucket, True)
                assert known.param is not None  # the group is adapted
                assert known.direction is not None
                measured.append(([present[index] for index in bucket.indices], known.param, known.direction))
            for positions, param_norms, direction_norms in measured:
                nonzero = is_nonzero(param_norms, direction_norms)
                lr = scalar_lr(options.lr, param_norms)
                ratio = trust_ratio(nonzero, param_norms, direction_norms, lr, options)
                assert isinstance(ratio, Tensor)
                # one copy, then element by element: tolist() refuses tensor subclasses
                ratios.update(zip([names[j] for j in positions], map(float, ratio.cpu()), strict=True))
        return ratios

    def _exchanged_norms(self, param: Tensor) -> Tensor | None:
        """Param norm and direction norm of a sharded tensor, from the last step; None for tensors that are whole here."""
        if not sharding.is_divided(param):
            return None
        shards = self._shards_of_last_step
        if (norms := None if shards is None else shards.known_norms(param)) is None:
            raise RuntimeError(
                "trust ratios of sharded tensors are those of the last step, which exchanges their norms with the other "
                "processes, and there has been none; ask after step()"
            )
        return norms

    def _names(self) -> list[list[str]]:
        """Of all tensors, group by group: those of named parameters, or their positions."""
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
        """How far the steps inside this context move each tensor, relative to its norm before them.

        For tensors that are adapted and for those that are not. It keeps a copy of the parameters meanwhile, and costs
        nothing outside. Of a sharded tensor it looks at this process's part, and exchanges nothing. With Kahan sums a
        step moves the sum of weight and compensation, which is what is measured.

        Returns:
            A context that gives a dict, which is filled when the context ends. It maps each name, as in
            :meth:`trust_ratios`, to the norm of the change divided by the norm before. After a skipped step all values are
            0. A tensor that was zero has inf, or 0 if it did not move.

        Raises:
            RuntimeError: what the steps inside raise; the dict is empty then.

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
        """This process's part of a parameter, and what rounding has taken from it."""
        value, compensation = sharding.local(param), self.state.get(param, _NO_STATE).get("compensation")
        value = value.float() if is_half(param.dtype) else value  # differences of half types would be rounded
        return value if compensation is None else value + sharding.local(compensation)

    def __repr__(self) -> str:
        """What runs, what is adapted, and the options that are not at their defaults, group by group."""
        groups = self.param_groups
        return "\n".join([f"{type(self).__name__} (", describe(groups, [_options(group) for group in groups]), ")"])


def _options(group: dict[str, Any]) -> Options:
    return Options(*[group[name] for name in NAMES])


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

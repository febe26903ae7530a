"""Random operations on a live optimizer: `test_fuzz_steps.py` says what must hold after each.

A case is a number: it seeds the optimizer, the operations and their order.
"""

import copy
import functools
import pickle
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cases import Options, is_valid, tolerance
from fastlars import LARS
from harness import buffers_of
from reference import ReferenceLARS

DTYPES = [torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.complex64]
SHAPES = [(3, 4), (3, 4), (5,), (), (0,), (4, 2, 3), (1, 6), (1030,), (13_000,)]
IMPLEMENTATIONS: list[Options] = [{}, {"foreach": False}, {"foreach": True}, {"fused": True}]
VALID: dict[str, list[Any]] = {
    "lr": [0.0, 0.1, 0.5, 1, torch.tensor(0.3), torch.tensor([0.2]), torch.tensor(0.3, dtype=torch.float64)],
    "momentum": [0.0, 0.5, 0.9, 0.9],
    "dampening": [0.0, 0.0, 0.25],
    "weight_decay": [0.0, 0.05, 1.0],
    "nesterov": [False, False, True],
    "trust_coefficient": [0.1, 0.01],
    "eps": [0.0, 1e-8, 0.5],
    "adapt": [None, True, True, False],
    "trust_clip": [False, True],
    "trust_denominator": ["separate", "joint"],
    "lr_in_momentum": [False, True],
    "skip_nonfinite": [False, False, True],
    "maximize": [False, True],
}
WRONG: list[tuple[str, Any]] = [
    ("lr", torch.tensor([0.1, 0.1])),
    ("lr", torch.tensor([])),
    ("lr", torch.ones((), device="meta")),
    ("lr", "0.1"),
    ("lr", 1e39),
    ("momentum", 2**70),
    ("weight_decay", -1.0),
    ("nesterov", 7),
    ("differentiable", True),
]


def number(lr: Any) -> Any:
    """An lr as a number, rounded like a tensor lr if it is one."""
    is_number = isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.numel() == 1 and not lr.is_meta)
    return float(torch.tensor(float(lr), dtype=torch.float32)) if is_number else lr


class Case:
    """An optimizer and the operations on it."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        groups = [self.group() for _ in range(self.rng.randint(1, 3))]
        self.optimizer = LARS(groups, **self.options(), **self.rng.choice(IMPLEMENTATIONS))
        self.log: list[str] = []

    # ------------------------------------------------------------ what is drawn
    def options(self) -> Options:
        while True:
            options = {name: copy.deepcopy(self.rng.choice(values)) for name, values in VALID.items()}
            if is_valid(options):
                return options

    def values(self, shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return (torch.randn(shape, generator=self.generator, dtype=wide) * scale).to(dtype)

    def group(self) -> dict[str, Any]:
        shapes = self.rng.sample(SHAPES, self.rng.randint(1, 4))
        dtype = self.rng.choice(DTYPES)
        return {
            "params": [Parameter(self.laid_out(self.values(shape, dtype), ["dense", "strided"])) for shape in shapes]
        }

    def laid_out(self, values: Tensor, kinds: list[str]) -> Tensor:
        """The same values in other memory, except for expanded tensors."""
        kind = self.rng.choice(kinds)
        if kind == "strided" and values.dim():
            return values.repeat_interleave(2, dim=-1)[..., ::2]
        if kind == "permuted" and values.dim() > 1:
            return values.transpose(0, 1).contiguous().transpose(0, 1)
        if kind == "expanded" and values.dim():
            return values[..., :1].expand(values.shape) if values.numel() else values
        if kind == "negative" and not values.is_complex():
            return torch.complex(values.double(), -values.double()).conj().imag.to(values.dtype) if values.dtype not in (
                torch.float32, torch.float64) else torch.complex(values, -values).conj().imag  # fmt: skip
        if kind == "conjugate" and values.is_complex():
            return values.conj().resolve_conj().conj()
        return values.clone()

    def param(self) -> Parameter:
        return self.rng.choice(self.params())

    def params(self) -> list[Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # ------------------------------------------------------------ operations
    def edit(self) -> None:
        group = self.rng.choice(self.optimizer.param_groups)
        options = self.options()
        if self.rng.random() < 0.5:
            group.update(options)
        else:
            name = self.rng.choice(list(options))
            if is_valid({**group, name: options[name]}):
                group[name] = options[name]

    def edit_wrongly(self) -> None:
        name, value = self.rng.choice(WRONG)
        self.rng.choice(self.optimizer.param_groups)[name] = copy.deepcopy(value)

    def write_tensor_lr(self) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor) and group["lr"].numel() == 1 and not group["lr"].is_meta:
                group["lr"].fill_(self.rng.choice([0.0, 0.2, 0.7]))

    def resize_tensor_lr(self) -> None:
        group = self.rng.choice(self.optimizer.param_groups)
        group["lr"] = torch.ones(1)
        group["lr"].resize_(2)

    def change_implementation(self) -> None:
        self.rng.choice(self.optimizer.param_groups).update(
            {"foreach": None, "fused": None} | self.rng.choice(IMPLEMENTATIONS)
        )

    def swap_data(self) -> None:
        param = self.param()
        param.grad = None
        param.data = self.laid_out(
            self.values(tuple(param.shape), param.dtype), ["dense", "strided", "permuted", "expanded"]
        )

    def swap_dtype(self) -> None:
        param = self.param()
        param.grad = None
        if not param.is_complex():
            param.data = self.values(
                tuple(param.shape), self.rng.choice([torch.float32, torch.float64, torch.bfloat16])
            )

    def swap_param(self) -> None:
        group = self.rng.choice(self.optimizer.param_groups)
        i = self.rng.randrange(len(group["params"]))
        old = group["params"][i]
        self.optimizer.state.pop(old, None)  # else torch's state_dict() fails
        group["params"][i] = Parameter(self.values(tuple(old.shape), old.dtype))

    def drop_state(self) -> None:
        self.optimizer.state.pop(self.param(), None)

    def put_buffer(self) -> None:
        param = self.param()
        dtype = self.rng.choice(
            [param.dtype, param.dtype, torch.float64 if not param.is_complex() else torch.complex128]
        )
        kinds = ["dense", "strided", "permuted", "negative", "expanded"]
        self.optimizer.state[param]["momentum_buffer"] = self.laid_out(self.values(tuple(param.shape), dtype), kinds)

    def put_wrong_buffer(self) -> None:
        param = self.param()
        wrong = self.rng.choice(
            [torch.zeros(7, 7), torch.zeros(param.shape, device="meta"), torch.zeros(param.shape).to_sparse()]
        )
        self.optimizer.state[param]["momentum_buffer"] = wrong

    def load(self) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        expected = [None if b is None else b.detach().clone() for b in buffers_of(self.optimizer)]
        self.optimizer.load_state_dict(saved)
        for param, old, new in zip(self.params(), expected, buffers_of(self.optimizer), strict=True):
            assert (old is None) == (new is None)
            if old is not None and new is not None:
                torch.testing.assert_close(old.to(param.dtype), new.detach())

    def load_shared_buffers(self) -> None:
        saved = copy.deepcopy(self.optimizer.state_dict())
        states = [state for state in saved["state"].values() if "momentum_buffer" in state]
        for state in states[1:]:
            if state["momentum_buffer"].shape == states[0]["momentum_buffer"].shape:
                state["momentum_buffer"] = states[0]["momentum_buffer"]
        self.optimizer.load_state_dict(saved)

    def copy(self) -> None:
        copied = copy.deepcopy if self.rng.random() < 0.5 else lambda each: pickle.loads(pickle.dumps(each))
        grads = [p.grad for p in self.params()]
        self.optimizer = copied(self.optimizer)
        for p, grad in zip(self.params(), grads, strict=True):
            p.grad = None if grad is None else grad.detach().clone()

    def add_group(self) -> None:
        group = {**self.group(), **self.options()}
        if self.rng.random() < 0.2:
            group["params"] = [Parameter(torch.ones(1).expand(3))]
        self.optimizer.add_param_group(group)

    # ------------------------------------------------------------ gradients
    def give_gradients(self) -> None:
        for param in self.params():
            param.grad = self.gradient(param)

    def gradient(self, param: Parameter) -> Tensor | None:
        how = self.rng.choice(["dense"] * 16 + ["none", "zero", "param", "buffer"] * 2 + ["odd"] * 5 + ["sparse"])
        values = self.values(tuple(param.shape), param.dtype)
        if how == "odd":
            return self.laid_out(values, ["strided", "permuted", "expanded", "negative", "conjugate"])
        if how == "param":
            return param.detach()
        if how == "buffer":
            buffer = self.optimizer.state[param].get("momentum_buffer") if param in self.optimizer.state else None
            fits = buffer is not None and all(
                getattr(buffer, name) == getattr(param, name) for name in ("dtype", "shape", "device")
            )
            return buffer if fits else None
        if how == "sparse":
            return values.to_sparse()
        return None if how == "none" else values * (how != "zero")

    # ------------------------------------------------------------ what must hold
    def everything(self) -> Any:
        """Bits, versions and identities."""
        tensors = [t for p in self.params() for t in (p, p.grad)] + buffers_of(self.optimizer)
        return (
            [None if t is None else bits(t) for t in tensors],
            [
                None if t is None else (id(t), t._version)
                for t in tensors
                if not isinstance(t, Parameter) or t.grad is not None
            ],
            [(id(p), {key: id(value) for key, value in state.items()}) for p, state in self.optimizer.state.items()],
            # a float lr may have become a tensor lr of the same value
            [
                {**group, "params": [id(p) for p in group["params"]], "lr": number(group["lr"])}.items()
                for group in self.optimizer.param_groups
            ],
        )

    def step(self) -> bool:
        """Whether there was a step; it equals the reference, or nothing has changed."""
        before = self.everything()
        try:
            reference = self.reference()
        except (TypeError, ValueError, RuntimeError, NotImplementedError, ArithmeticError):
            reference = None  # tensors that cannot be read must not be stepped
        old = [p.detach().clone() for p in self.params()]
        for _ in range(2):
            if self.is_done(self.optimizer.step):
                assert reference is not None, "stepped where there is no number to step with"
                self.compare(reference, old)
                return True
            assert same(self.everything(), before), "a step was refused and has changed something"
        return False

    def is_done(self, operation: Callable[[], object]) -> bool:
        """Whether an operation was accepted."""
        try:
            operation()
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            self.log.append(f"refused: {error}")
            return False
        return True

    def reference(self) -> ReferenceLARS:
        reference = ReferenceLARS([{**group, "lr": float(group["lr"])} for group in self.optimizer.param_groups])
        momenta = [group["momentum"] for group in self.optimizer.param_groups for _ in group["params"]]
        read = [m != 0 and p.grad is not None for m, p in zip(momenta, self.params(), strict=True)]
        buffers = [b if is_read else None for is_read, b in zip(read, buffers_of(self.optimizer), strict=True)]
        reference.realign(self.params(), buffers)
        reference.step([p.grad for p in self.params()])
        return reference

    def compare(self, reference: ReferenceLARS, old: list[Tensor]) -> None:
        buffers = buffers_of(self.optimizer)
        for i, (param, buffer) in enumerate(zip(self.params(), buffers, strict=True)):
            if param.grad is None:
                assert torch.equal(param, old[i]), f"tensor {i} has no gradient and has moved"
                continue
            pairs = [(param, reference.params[i], reference.param_sizes[i])]
            if reference.momentum_buffers[i] is not None:
                assert buffer is not None, f"tensor {i} has no buffer"
                pairs.append((buffer, reference.momentum_buffers[i], reference.buffer_sizes[i]))
            for actual, expected, size in pairs:
                wide = torch.complex128 if param.is_complex() else torch.float64
                dtypes = [t.dtype for t in (param, buffer) if t is not None]
                coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
                limits = {k: 4 * v for k, v in tolerance(coarsest, size).items()}
                where = f"tensor {i} of shape {tuple(param.shape)} and {param.dtype}"
                torch.testing.assert_close(
                    actual.detach().to(wide),
                    torch.as_tensor(expected),
                    msg=lambda text, w=where: f"{w}: {text}",
                    **limits,
                )


OPERATIONS: list[Callable[[Case], None]] = [
    *[Case.edit] * 4,
    Case.edit_wrongly,
    Case.write_tensor_lr,
    Case.resize_tensor_lr,
    *[Case.change_implementation] * 2,
    *[Case.swap_data] * 2,
    Case.swap_dtype,
    Case.swap_param,
    Case.drop_state,
    *[Case.put_buffer] * 2,
    Case.put_wrong_buffer,
    *[Case.load] * 2,
    Case.load_shared_buffers,
    Case.copy,
    Case.add_group,
]


def bits(tensor: Tensor) -> Any:
    if tensor.is_meta:
        return "meta"
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return dense.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and (left is right or torch.equal(left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if hasattr(left, "mapping"):
        return same(dict(left), dict(right))
    return bool(left == right)


def run(number: int, operations: int = 5) -> int:
    """How many steps one case took; it ends when an operation is refused."""
    case, steps = Case(number), 0
    try:
        for _ in range(operations):
            case.give_gradients()
            if not case.step():
                break
            steps += 1
            operation = case.rng.choice(OPERATIONS)
            case.log.append(operation.__name__)
            before = case.everything()
            if not case.is_done(functools.partial(operation, case)):
                assert same(case.everything(), before), "an operation that was refused changed something"
    except Exception as error:
        raise AssertionError(f"case {number}: {case.log}\n{case.optimizer!r}\n{error}") from error
    return steps

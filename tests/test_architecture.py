"""Layers: a file imports only from layers below it, one step is one page, and a backend is one file and one entry."""

import ast
import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlars
import harness
from cases import OPTIONS, make_grads, make_params
from fastlars import LARS, backends
from fastlars.backends.eager import make_state, measure
from fastlars.buckets import Bucket, Memory, Norms
from fastlars.formula import coefficients, scalar_lr
from fastlars.options import Options
from harness import ignore_nothing_adapted

SOURCE = Path(fastlars.__file__).parent
# from the bottom up; files in one line may not import each other
FLOORS = [
    ["compat", "dtypes"],
    ["options"],
    ["buckets"],
    ["formula", "backends.layouts"],
    ["checks"],
    ["norms"],
    ["compiled", "backends.staging"],
    ["backends.triton_kernels", "backends.eager"],
    ["backends.fused_cpu", "backends.torch_sgd", "backends.triton"],
    ["backends"],
    ["sharding"],
    ["step", "script"],
    ["functional"],
]
CORE = [name for floor in FLOORS for name in floor]


def path_of(module: str) -> Path:
    folder = SOURCE.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") or "__init__"


def imported(module: str) -> set[str]:
    """The files of the package that a file imports, also inside functions and for types only."""
    path = path_of(module) if module != "__init__" else SOURCE / "__init__.py"
    package = ["fastlars", *path.relative_to(SOURCE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
            # anything that is not a file is a name in one
            names = [name if path_of(name.removeprefix("fastlars.")).exists() else base for name in names]
        else:
            continue
        for name in names:
            if name.startswith("fastlars.") and path_of(name.removeprefix("fastlars.")).exists():
                found.add(name.removeprefix("fastlars."))
    return found - {module}


def test_a_file_of_the_core_imports_only_from_layers_below_it() -> None:
    below: set[str] = set()
    for floor in FLOORS:
        for module in floor:
            assert imported(module) <= below, f"{module} imports {sorted(imported(module) - below)}"
        below.update(floor)


def test_no_import_circle() -> None:
    rest = {module_of(path): imported(module_of(path)) for path in SOURCE.rglob("*.py")}
    assert len(rest) > 25
    while rest:
        ready = [module for module, needs in rest.items() if not needs & rest.keys()]
        assert ready, f"these import each other: {sorted(rest)}"
        for module in ready:
            del rest[module]


def test_step_is_one_page_and_scripts_have_a_file_of_their_own() -> None:
    assert len(path_of("step").read_text(encoding="utf-8").splitlines()) <= 100
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if module_of(path) not in ("formula", "functional", "compat"):
            assert "is_scripting" not in text, path
        if module_of(path) not in ("formula", "functional", "script", "options"):
            assert "from typing import" not in text or "List" not in text.split("from typing import")[1].split("\n")[0]


class NumPy:
    """A toy backend: the step of float64 CPU tensors in NumPy."""

    name = "numpy"
    takes_scale = False
    traceable = False
    mixes_first_steps = False
    stepped = 0

    def wants(self, params: list[Tensor], options: Options, gated: bool) -> bool:
        return not options.differentiable

    def serves(self, params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor]) -> bool:
        return all(tensor.dtype == torch.float64 and tensor.is_cpu for tensor in (*params, *grads, *momentum_buffers))

    def plan(self, params: list[Tensor]) -> None:
        pass

    def measure(self, bucket: Bucket, now: bool) -> Norms:
        return measure(bucket, foreach=False)

    @torch.no_grad()
    def update(self, bucket: Bucket, norms: Norms, gate: Tensor | None) -> None:
        options = bucket.options
        if gate is not None and gate.any():
            return
        pair = None if norms.param is None or norms.direction is None else (norms.param, norms.direction)
        lr = scalar_lr(options.lr, bucket.params[0])
        b, c = (
            torch.as_tensor(number, dtype=torch.float64).expand(len(bucket.params)).numpy()
            for number in coefficients(pair, lr, bucket.is_first_step, options)
        )
        q = 1.0 if options.lr_in_momentum else float(lr)
        buffers, _ = make_state(bucket)
        for i, param in enumerate(bucket.params):
            w, d = param.detach().numpy(), b[i] * bucket.grads[i].numpy() + c[i] * param.detach().numpy()
            if options.momentum != 0:
                v = buffers[i].numpy()
                v[...] = options.momentum * v + d
                d = d + options.momentum * v if options.nesterov else v
            w[...] -= q * d
            NumPy.stepped += 1


@ignore_nothing_adapted
def test_a_backend_is_one_file_and_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [NumPy(), *backends.BACKENDS])
    layouts = ["matrix", "vector", "scalar", "zeros", "empty"]
    for name, options in OPTIONS.items():
        NumPy.stepped = 0
        params = [*make_params(torch.float64, layouts=layouts), *make_params(torch.float32, layouts=layouts)]

        def grads(ps: Any, step: int) -> Any:
            return [
                *make_grads("dense", ps[: len(layouts)], step),
                *make_grads("dense", ps[len(layouts) :], step),
            ]

        optimizer = harness.run([{"params": params}], options, grads, {}, steps=2)
        assert NumPy.stepped > 0 or options.get("skip_nonfinite"), name
    assert "numpy 5" in repr(optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_caches_belong_to_one_optimizer(copied: Any) -> None:
    optimizer = LARS(make_params(torch.float32, layouts=["matrix", "conv"]), lr=1.0, weight_decay=0.1)
    for step in range(3):
        params = optimizer.param_groups[0]["params"]
        harness.set_grads(params, make_grads("dense", params, step))
        optimizer.step()
    assert optimizer._memory.assignments and optimizer._memory.steps == 3
    for other in (copied(optimizer), copied(optimizer._memory)):
        memory = other if isinstance(other, Memory) else other._memory
        assert vars(memory) == vars(Memory())

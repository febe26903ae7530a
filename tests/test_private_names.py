"""The undocumented names of torch that fastlars uses, in one list, with what breaks if torch changes them.

This file does not import fastlars, which may fail to import if one of them is gone.
"""

import ast
import functools
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pages


def ones() -> list[torch.Tensor]:
    return [torch.ones(2), torch.ones(3)]


def scalars(value: float) -> list[torch.Tensor]:
    """One 0-dim tensor for each of `ones`."""
    return [torch.tensor(value), torch.tensor(value)]


def are(tensors: Any, value: float) -> bool:
    return all(torch.equal(tensor, torch.full_like(tensor, value)) for tensor in tensors)


def written(call: Callable[[list[torch.Tensor]], Any], value: float) -> bool:
    """Whether a call on ones leaves them at this value."""
    tensors = ones()
    call(tensors)
    return are(tensors, value)


def fused_sgd(params: list[torch.Tensor]) -> None:
    """weight_decay = c / b and dampening = 1 - b: see fused_cpu.py."""
    options = {"weight_decay": 2.0, "momentum": 0.5, "lr": 0.5, "dampening": 0.75}
    torch._fused_sgd_(params, ones(), ones(), **options, nesterov=False, maximize=False, is_first_step=False)


def asks_for_sizes() -> bool:
    guards = torch._C._dynamo.guards.TensorGuards(
        *ones(), dynamic_dims_sizes=[[2], [3]], dynamic_dims_strides=[[1], [1]]
    )
    return guards.check(*ones()) is True and guards.check(*ones()[::-1]) is False


def sees_modes() -> bool:
    with torch.utils._python_dispatch.TorchDispatchMode():
        inside = torch._C._len_torch_dispatch_stack()
    return inside == 1 and torch._C._len_torch_dispatch_stack() == 0


def sees_transforms() -> bool:
    inside: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        inside.append(torch._C._functorch.peek_interpreter_stack() is not None)
        return x.sum()

    torch.func.grad(function)(torch.ones(1))
    return inside == [True] and torch._C._functorch.peek_interpreter_stack() is None


def grad_mode_of_a_step() -> bool:
    from torch.optim.optimizer import _use_grad_for_differentiable  # noqa: PLC0415

    class Optimizer:
        defaults = {"differentiable": False}  # noqa: RUF012

        @_use_grad_for_differentiable
        def step(self) -> bool:
            return torch.is_grad_enabled()

    return Optimizer().step()


def module(name: str) -> Any:
    return importlib.import_module(f"torch.{name}")


def mentions(path: str, text: str) -> bool:
    """Whether a file of the installed torch, or one in a folder, contains this text."""
    found = Path(torch.__file__).parent / path
    files = found.glob("*.py") if found.is_dir() else [found]
    return any(text in file.read_text(encoding="utf-8") for file in files)


# name -> (why fastlars needs it, as in docs/support.md; whether it still works, called as fastlars calls it)
PRIVATE: dict[str, tuple[str, Callable[[], bool]]] = {
    "torch._foreach_norm": (
        "norms on accelerators",
        lambda: are(torch._foreach_norm([torch.ones(4).half()] * 2, 2.0, dtype=torch.float32), 2.0),
    ),
    "torch._foreach_mul": (
        "foreach step, by a number, a tensor and a list of tensors",
        lambda: all(are(torch._foreach_mul(ones(), by), 3.0) for by in (3.0, torch.tensor(3.0), scalars(3.0))),
    ),
    "torch._foreach_mul_": ("foreach step", lambda: written(lambda x: torch._foreach_mul_(x, 0.5), 0.5)),
    "torch._foreach_add": (
        'norms with `trust_denominator="joint"`',
        lambda: are(torch._foreach_add(ones(), ones(), alpha=2.0), 3.0),
    ),
    "torch._foreach_add_": (
        "foreach step",
        lambda: written(lambda x: torch._foreach_add_(x, ones(), alpha=-0.5), 0.5),
    ),
    "torch._foreach_addcmul_": (
        "foreach step",
        lambda: written(lambda x: torch._foreach_addcmul_(x, x, scalars(-0.5)), 0.5),
    ),
    "torch._foreach_copy_": (
        "foreach step of half-precision tensors or with `skip_nonfinite`",
        lambda: written(lambda x: torch._foreach_copy_(x, [t.double() * 2 for t in ones()]), 2.0),
    ),
    "torch._fused_sgd_": ("fused step on CPU", lambda: written(fused_sgd, 0.375)),
    "torch._C._dynamo.guards.TensorGuards": (
        "speed of the cache of buckets, which one guard call validates",
        asks_for_sizes,
    ),
    "torch._C._len_torch_dispatch_stack": (
        "speed: plans and workspaces are cached unless a mode intercepts operations",
        sees_modes,
    ),
    "torch._C._functorch.peek_interpreter_stack": (
        "speed: plans and workspaces are cached unless a transform of torch.func is active",
        sees_transforms,
    ),
    "torch.nn.modules.batchnorm._NormBase": (
        "`param_groups`, to recognise batch and instance norms",
        lambda: all(
            isinstance(norm(2), module("nn.modules.batchnorm")._NormBase)
            for norm in (torch.nn.BatchNorm2d, torch.nn.SyncBatchNorm, torch.nn.InstanceNorm1d)
        ),
    ),
    "torch._disable_dynamo": (
        "fused steps and sharded tensors, which run outside of compiled graphs",
        lambda: torch._disable_dynamo(lambda x: x + 1)(1) == 2,
    ),
    "torch._jit_internal.is_scripting": ("TorchScript", lambda: module("_jit_internal").is_scripting() is False),
    "torch.optim.optimizer._default_to_fused_or_foreach": (
        "foreach by default on the devices for which torch makes it the default",
        lambda: (
            module("optim.optimizer")._default_to_fused_or_foreach(ones(), differentiable=False, use_fused=False)[1]
            is False
        ),
    ),
    "torch.optim.optimizer._use_grad_for_differentiable": ("`differentiable=True`", lambda: not grad_mode_of_a_step()),
    "torch.optim.optimizer.required": (
        "the error for a missing lr",
        lambda: type(module("optim.optimizer").required).__name__ == "_RequiredParameter",
    ),
    "torch.distributed._tensor": (
        "sharded tensors in torch 2.4, where DTensor is private",
        lambda: any(hasattr(module(f"distributed.{name}"), "DTensor") for name in ("tensor", "_tensor")),
    ),
    "torch.distributed._functional_collectives.AsyncCollectiveTensor": (
        "the local shard of a tensor while a collective is running",
        lambda: callable(module("distributed._functional_collectives").AsyncCollectiveTensor.wait),
    ),
    "_fsdp_flattened": (
        "refusing the flat parameters of FSDP1",
        lambda: mentions("distributed/fsdp", '"_fsdp_flattened"'),
    ),
    "_cdata": (
        "finding tensors that share memory on MPS, XLA and out-of-tree devices, where `data_ptr()` is not an address",
        lambda: len({x.untyped_storage()._cdata for each in ones() for x in (each, each[1:], each.detach())}) == 2,
    ),
    "_init_group": (
        "torch.compile, which calls this method when it traces",
        lambda: mentions("_dynamo/variables/optimizer.py", "_init_group"),
    ),
    "_step_supports_amp_scaling": (
        "GradScaler with `fused=True`, which reads it",
        lambda: mentions("amp/grad_scaler.py", '"_step_supports_amp_scaling"'),
    ),
}
# no scan finds these: a name without underscore, what a method returns, and names that fastlars sets and torch reads
UNSEEN = {
    "torch.optim.optimizer.required",
    "torch.distributed._functional_collectives.AsyncCollectiveTensor",
    "_init_group",
    "_step_supports_amp_scaling",
}
PYTHONS_OWN = {"_asdict", "_fields", "_replace", "_getframe"}  # from named tuples and sys

(PACKAGE,) = importlib.util.find_spec("fastlars").submodule_search_locations  # type: ignore[union-attr, misc]
SOURCES = {
    path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in Path(PACKAGE).rglob("*.py")
}


def own_names(trees: list[ast.Module]) -> set[str]:
    """Names defined there, at any depth."""
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return named | {
        target.attr if isinstance(target, ast.Attribute) else target.id
        for target in nodes
        if isinstance(target, ast.Attribute | ast.Name) and isinstance(target.ctx, ast.Store)
    }


def private_names(tree: ast.Module, own: set[str]) -> set[str]:
    """Underscore names from elsewhere: imported ones, attributes, and strings that are nothing but such a name."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level == 0
        for alias in node.names
    }
    found = {*imported.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            path = f"{imported.get(root, root)}.{rest}"
            if re.fullmatch(r"torch\.[\w.]+", path):
                found.add(path)
            elif node.attr not in own | PYTHONS_OWN:
                found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} - own if re.fullmatch(r"(torch\.[\w.]+)|_[a-zA-Z]\w*", node.value) else set()
    private = {name for name in found if re.search(r"(^|\.)_[a-zA-Z]", name)}
    # a module's own name is part of the names of what it holds
    return {name for name in private if not any(other.startswith(f"{name}.") for other in private)}


@functools.cache
def used_in() -> dict[str, list[str]]:
    own = own_names(list(SOURCES.values()))
    files: dict[str, list[str]] = {}
    for file, tree in SOURCES.items():
        for name in private_names(tree, own):
            files.setdefault(name, []).append(file)
    return files


def what_broke(name: str) -> str | None:
    """The message about a name that has changed."""
    needed_for, works = PRIVATE[name]
    try:
        problem = None if works() else "it gives something else"
    except Exception as error:  # noqa: BLE001  whatever it is, it is to be told
        problem = repr(error)
    where = ", ".join(sorted(used_in().get(name, ["optimizer.py"])))
    return problem and f"torch {torch.__version__} changed {name}: {problem}. Needed in {where}, for: {needed_for}"


@pytest.mark.parametrize("name", PRIVATE)
def test_torch_still_has_it(name: str) -> None:
    if broke := what_broke(name):
        pytest.fail(broke, pytrace=False)


def test_all_that_are_used_are_in_the_list_and_no_others() -> None:
    assert used_in().keys() == PRIVATE.keys() - UNSEEN


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torch._foreach_sqrt(x)", "torch._foreach_sqrt"),
        ("torch._C._foo()", "torch._C._foo"),
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._dynamo import disable", "torch._dynamo.disable"),
        ("from torch.optim.sgd import _multi_tensor_sgd as step", "torch.optim.sgd._multi_tensor_sgd"),
        ("from torch import nn\nnn.modules._Base", "torch.nn.modules._Base"),
        ("param._version", "_version"),
        ("getattr(param, '_spec')", "_spec"),
        ("sys.modules['torch.distributed._tensor']", "torch.distributed._tensor"),
        ("torch.zeros(2)._ours", "_ours"),
        ("def _ours(): ...\ntorch._ours()", "torch._ours"),
        ("def _ours(): ...\nself._ours()", None),
        ("from . import _ours", None),
        ("_T = TypeVar('_T')", None),
        ("options._asdict()", None),
        ("torch.nn.functional.mse_loss", None),
        ("'see torch._foreach_sqrt'", None),
    ],
)
def test_the_scan_sees(source: str, name: str | None) -> None:
    tree = ast.parse(source)
    assert private_names(tree, own_names([tree])) == ({name} if name else set())


def test_a_broken_name_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert what_broke("torch._fused_sgd_") is None
    monkeypatch.setattr(torch, "_fused_sgd_", lambda params, grads, buffers: None)
    assert re.search(
        r"_fused_sgd_: TypeError.*Needed in backends/fused_cpu.py, for: fused step",
        what_broke("torch._fused_sgd_") or "",
    )
    monkeypatch.setattr(torch, "_foreach_add", lambda params, others, alpha: params)
    assert "gives something else. Needed in compiled.py, norms.py, for:" in (what_broke("torch._foreach_add") or "")


def test_the_page_has_the_list() -> None:
    page = (pages.ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w[\w.]*)` \| (.*) \|$", page, re.MULTILINE) == [
        (name, needed_for) for name, (needed_for, _) in PRIVATE.items()
    ]

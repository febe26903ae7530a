"""The scripted functional equals the eager one, also saved and loaded, with versions and Pythons that have TorchScript."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import fastlars
import harness
from cases import COMPLEX, OPTIONS, PAIRWISE, REAL, make_params
from fastlars import LARS
from fastlars.options import NAMES, Options
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, loop_over, mixed_grads, option_sets

pytestmark = [
    ignore_nothing_adapted,
    pytest.mark.skipif(sys.version_info >= (3, 14), reason="TorchScript does not support this Python"),
]
SCRIPTED = ["single", "foreach"]
KINDS = ["vector_1025", "matrix", "zeros", "scalar", "empty", "channels_last", "offset"]


def step(  # a list passed from Python is copied, so this returns what is put into it
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor | None],
    options: Options,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[Tensor | None]:
    fastlars.lars(
        params,
        grads,
        momentum_buffers,
        options.lr,
        options.momentum,
        options.dampening,
        options.weight_decay,
        options.nesterov,
        options.trust_coefficient,
        options.eps,
        options.adapt,
        options.trust_clip,
        options.trust_denominator,
        options.lr_in_momentum,
        options.skip_nonfinite,
        options.maximize,
        options.foreach,
        options.differentiable,
        options.fused,
        options.kahan_sum,
        grad_scale,
        found_inf,
    )
    return momentum_buffers


def script(function: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warning, that scripting is deprecated
        return torch.jit.script(function)


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`step`, saved and loaded."""
    path = str(tmp_path_factory.mktemp("script") / "step.pt")
    script(step).save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path)


class ScriptedLARS(LARS):
    """LARS whose step is a script."""

    scripted: Any = None

    def step(self, closure: None = None) -> None:
        """Like the eager one. ``closure`` is not called."""
        for group in self.param_groups:
            lists: tuple[list[Tensor], list[Tensor], list[Tensor | None]] = ([], [], [])
            self._init_group(group, *lists, [])
            with torch.no_grad():
                options = Options(**{name: group[name] for name in NAMES})
                buffers = self.scripted(*lists, options, None, None)
            for param, buffer in zip(lists[0], buffers, strict=False):
                self.state[param]["momentum_buffer"] = buffer


@pytest.mark.parametrize("implementation", SCRIPTED)
@option_sets
def test_equals_reference(name: str, implementation: str, scripted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScriptedLARS, "scripted", scripted)
    monkeypatch.setattr(harness, "LARS", ScriptedLARS)
    offset = list(PAIRWISE).index(name)
    dtypes = (*REAL, *COMPLEX)
    # two dtypes at a time, cycling over the options
    groups = [{"params": make_params(dtypes[i % len(dtypes)], layouts=KINDS, seed=i)} for i in (offset, offset + 1)]
    # scripts do not support it
    options = {**OPTIONS[name], "kahan_sum": False}
    harness.run(
        groups, options, lambda ps, step: mixed_grads(ps, step, offset), IMPLEMENTATIONS[implementation], steps=3
    )


@pytest.mark.parametrize("implementation", SCRIPTED)
@loop_over("name", ["momentum", "nesterov-joint", "unadapted", "clip-paper", "no_decay"])
@loop_over("found", [False, True])
def test_scale_and_gate_equal_eager(name: str, implementation: str, found: bool, scripted: Any) -> None:
    options = Options(**{**OPTIONS[name], "lr": torch.tensor([0.3]), **IMPLEMENTATIONS[implementation]})
    results = []
    for function in (step, scripted):
        params = [p.detach() for p in make_params(torch.float32, layouts=KINDS)]
        buffers: list[Tensor | None] = [torch.ones_like(p) for p in params] if options.momentum else []
        grads = [torch.full_like(p, 64.0) for p in params]
        function(params, grads, buffers, options, torch.tensor(128.0), torch.tensor([float(found)]))
        results.append(params + [b for b in buffers if b is not None])
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    before = make_params(torch.float32, layouts=KINDS)
    changed = any(not torch.equal(new, old) for new, old in zip(results[1], before, strict=False))
    assert changed != found


@pytest.mark.parametrize("implementation", SCRIPTED)
def test_only_skip_nonfinite_skips(implementation: str, scripted: Any) -> None:
    for skip in (False, True):
        options = Options(0.1, weight_decay=0.1, skip_nonfinite=skip, **IMPLEMENTATIONS[implementation])
        params = [torch.ones(3), torch.ones(2)]
        scripted(params, [torch.tensor([1.0, torch.inf, 1.0]), torch.ones(2)], [], options, None, None)
        assert torch.equal(params[1], torch.ones(2)) == torch.equal(params[0], torch.ones(3)) == skip


@pytest.mark.parametrize("implementation", SCRIPTED)
def test_without_decay_no_weight_enters_the_step(implementation: str, scripted: Any) -> None:
    """0 * inf would be NaN."""
    w = torch.tensor([torch.inf, 1.0])
    scripted([w], [torch.ones(2)], [None], Options(0.5, 0.9, **IMPLEMENTATIONS[implementation]), None, None)
    assert torch.equal(w, torch.tensor([torch.inf, 0.5]))


@pytest.mark.parametrize("implementation", SCRIPTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_are_rounded_once(dtype: torch.dtype, implementation: str, scripted: Any) -> None:
    """In eager mode torch's SGD steps groups that are not adapted, and rounds as often as it does."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3000, generator=generator).to(dtype) for _ in range(3)]
    for adapt in (False, True):
        options = Options(0.3, 0.9, weight_decay=0.05, adapt=adapt, **IMPLEMENTATIONS[implementation])
        w, g, v = ([x.float()] for x in given)
        scripted_v = scripted(w, g, v, options, None, None)
        expected = [w[0].to(dtype), scripted_v[0].to(dtype)]
        for function in (scripted, step) if adapt else (scripted,):
            w, g, v = ([x.clone()] for x in given)
            (buffer,) = function(w, g, v, options, None, None)
            assert torch.equal(w[0], expected[0]) and torch.equal(buffer, expected[1])


def test_the_function_itself() -> None:
    w, v = torch.tensor([3.0, 4.0]), torch.zeros(2)
    lars = script(fastlars.lars)
    for foreach in (False, True):
        w.copy_(torch.tensor([3.0, 4.0]))
        lars([w], [torch.tensor([0.0, 2.0])], [v.zero_()], lr=1.0, momentum=0.9, trust_coefficient=0.1, adapt=True,
             foreach=foreach)  # fmt: skip
        torch.testing.assert_close(w, torch.tensor([3.0, 3.5]))
        torch.testing.assert_close(v, torch.tensor([0.0, 0.5]))
    lars([], [], [], lr=1.0, skip_nonfinite=True)
    with pytest.raises(torch.jit.Error, match="fused=True cannot be scripted; leave fused=None or use foreach=True"):
        lars([w], [w], [v], lr=1.0, fused=True)
    with pytest.raises(torch.jit.Error, match="kahan_sum=True cannot be scripted"):
        lars([w], [w], [v], lr=1.0, kahan_sum=True)
    with pytest.raises(torch.jit.Error, match="compensations cannot be scripted"):
        lars([w], [w], [v], lr=1.0, compensations=[None])
    with pytest.raises(torch.jit.Error, match="needs dampening == 0"):
        lars([w], [w], [v], lr=1.0, momentum=0.9, dampening=0.5, skip_nonfinite=True)
    torch.testing.assert_close(w, torch.tensor([3.0, 3.5]))


@pytest.mark.slow
def test_no_warning_without_scripting() -> None:
    program = """
import torch, warnings
warnings.simplefilter("error")
warnings.simplefilter("ignore", ResourceWarning)  # as Python does: of a temporary directory of torch 2.6, at its end
import fastlars
w = torch.nn.Parameter(torch.ones(3))
w.grad = torch.ones(3)
for foreach in (False, True, None):
    fastlars.LARS([w], lr=1.0, momentum=0.9, weight_decay=0.1, foreach=foreach).step()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr

"""A compiled step equals the eager one, with no more graph breaks and compilations than torch's SGD needs."""

import copy
import gc
import itertools
import json
import re
import shutil
import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.optim.lr_scheduler import LambdaLR

import fastlars
import pages
from cases import Options
from fastlars import LARS
from fastlars.backends import eager
from harness import IMPLEMENTATIONS, ignore_nothing_adapted, implementations, pairs
from recording import Recorder

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# renamed in torch 2.6
RECOMPILE_LIMIT = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"

slow, version = pytest.mark.slow, pytest.mark.version
pytestmark = [
    ignore_nothing_adapted,
    # torch's own warnings, from inside its compiler
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of:UserWarning"),
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


# ---------------------------------------------------------------- numbers
class Net(torch.nn.Module):
    """Two dtypes, and a parameter that is not always used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.second = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
        self.late = torch.nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, x: Tensor, with_late: bool) -> Tensor:
        y = self.second(self.norm(self.first(x)).bfloat16()).float()
        return (y * self.late if with_late else y).square().sum()


def groups_of(net: Net, **options: Any) -> list[dict[str, Any]]:
    return [
        {"params": list(net.first.parameters()), **options},
        {"params": [*net.norm.parameters(), net.late], "adapt": False, "lr_in_momentum": True, **options},
        {
            "params": list(net.second.parameters()),
            "trust_denominator": "joint",
            "nesterov": not options.get("dampening"),
            **options,
        },
    ]


def compiled_step(net: Net, optimizer: LARS, how: Callable[..., Any]) -> Callable[[Tensor, bool], None]:
    step = how(optimizer.step)

    def train(x: Tensor, with_late: bool) -> None:
        optimizer.zero_grad()
        net(x, with_late).backward()
        step()

    return train


def function_that_steps(net: Net, optimizer: LARS, how: Callable[..., Any]) -> Callable[[Tensor, bool], None]:
    @how
    def scaled_step(factor: Tensor) -> None:
        for param in net.parameters():
            if param.grad is not None:
                param.grad.mul_(factor.to(param.dtype))
        optimizer.step()

    def train(x: Tensor, with_late: bool) -> None:
        optimizer.zero_grad()
        net(x, with_late).backward()
        scaled_step(torch.tensor(0.5))

    return train


def whole_step(net: Net, optimizer: LARS, how: Callable[..., Any]) -> Callable[[Tensor, bool], None]:
    def train(x: Tensor, with_late: bool) -> None:
        optimizer.zero_grad()
        net(x, with_late).backward()
        optimizer.step()

    return how(train)  # type: ignore[no-any-return]


def trained(
    wrap: Callable[..., Any], how: Callable[..., Any], lr: float | Tensor, options: Options, steps: int
) -> list[Tensor]:
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Net()
    groups = groups_of(net, **options)
    optimizer = LARS(groups, lr=lr, momentum=0.9, weight_decay=0.01, trust_coefficient=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.5 if step % 2 else 1.0)  # no third value, so no third compilation
    train = wrap(net, optimizer, how)
    for i in range(steps):
        net.first.bias.requires_grad_(i != 4)  # its gradient is missing once
        train(torch.randn(4, 7), i >= 2)
        if i == 3:
            state = copy.deepcopy(optimizer.state_dict())
            for saved in state["state"].values():
                saved["momentum_buffer"].mul_(0.5)
            optimizer.load_state_dict(state)
        scheduler.step()
    buffers = [optimizer.state[p]["momentum_buffer"] for p in net.parameters() if p in optimizer.state]
    return [tensor.detach().clone() for tensor in [*net.parameters(), *buffers]]


def assert_compiled_equals_eager(
    wrap: Callable[..., Any], backend: str, lr: Any, options: Options, steps: int = 6
) -> None:
    eager = trained(wrap, lambda function: function, lr(0.05), options, steps)
    compiled = trained(wrap, lambda function: torch.compile(function, backend=backend), lr(0.05), options, steps)
    for actual, expected in zip(compiled, eager, strict=True):
        size = 1e-2 if expected.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(actual, expected, rtol=size, atol=size)


OPTIONS: dict[str, Options] = {"plain": {}, "dampening": {"dampening": 0.25}, "skip": {"skip_nonfinite": True}}


@slow
@version
@pytest.mark.parametrize(
    ("implementation", "name", "wrap"),
    [
        # compiling whole steps takes long, and options behave as in any compiled step
        ("single", "plain", whole_step),
        ("foreach", "plain", function_that_steps),
        ("foreach", "dampening", whole_step),
        ("fused", "plain", function_that_steps),
        *[(each, name, compiled_step) for each in ("single", "foreach") for name in ("dampening", "skip")],
        ("fused", "skip", compiled_step),
        ("default", "plain", compiled_step),
    ],
)
def test_compiled_equals_eager(implementation: str, name: str, wrap: Callable[..., Any]) -> None:
    options = {**IMPLEMENTATIONS.get(implementation, {}), **OPTIONS[name]}
    # a float lr and a tensor lr
    assert_compiled_equals_eager(wrap, "eager", float if name == "plain" else torch.tensor, options)


def with_state_that_comes_and_goes(how: Callable[..., Any], foreach: bool, dampening: float) -> list[Tensor | None]:
    """Steps of two groups with state loaded, dropped and added between them, so some tensors have their first step later."""
    torch.compiler.reset()
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(6)]
    # the compiler guards the state of the first tensor of each group anyway, so other tensors of each group come late
    groups = [{"params": params[:3], "dampening": 0.5 * dampening}, {"params": params[3:5], "adapt": False}]
    optimizer = LARS(groups, lr=0.1, momentum=0.9, dampening=dampening, weight_decay=0.1, foreach=foreach)
    step = how(optimizer.step)
    for i, stepped in enumerate(["03", "03", "0123", "0123", "01234", "01234", "01234", "01234", "012345", "012345"]):
        # missing gradients are guarded, so an earlier first step returns with the same ones missing
        if i == 6:
            state = copy.deepcopy(optimizer.state_dict())
            for j in (1, 3):
                state["state"][j]["momentum_buffer"] = None  # from an SGD without momentum
            del state["state"][4]
            optimizer.load_state_dict(state)
        if i == 7:
            del optimizer.state[params[0]], optimizer.state[params[4]]
        if i == 8:
            optimizer.add_param_group({"params": params[5], "dampening": dampening})
        for j, param in enumerate(params):
            param.grad = torch.randn(3, 4) if str(j) in stepped else None
        step()
    return [*params, *[optimizer.state[param]["momentum_buffer"] for param in params]]


@slow
@pytest.mark.parametrize("dampening", [0.0, 0.25])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_graph_serves_first_steps_and_later_ones(foreach: bool, dampening: float) -> None:
    eager = with_state_that_comes_and_goes(lambda step: step, foreach, dampening)
    with torch._dynamo.config.patch({RECOMPILE_LIMIT: 64}):  # each of these steps is recompiled
        compiled = with_state_that_comes_and_goes(lambda step: torch.compile(step, backend="eager"), foreach, dampening)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("foreach", [False, True])
def test_a_first_step_of_half_types_that_are_not_adapted(foreach: bool) -> None:
    """In eager mode this is torch's SGD, which recognises a first step by its missing buffer."""
    param = torch.nn.Parameter(torch.tensor([2.0, 4.0], dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    options: Options = {"momentum": 0.5, "dampening": 0.5, "adapt": False, "foreach": foreach}
    step = torch.compile(LARS([param], lr=0.5, **options).step, backend="eager")
    for expected in ([1.5, 3.5], [1.0, 3.0]):  # with a buffer of 1, then of 0.5 * 1 + (1 - 0.5) * 1
        step()
        assert param.tolist() == expected


def with_momentum(optimizer: LARS) -> None:
    saved = {"momentum_buffer": torch.tensor([0.1, 0.2])}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: saved}})


@slow
@pairs("foreach again then", [False, True], ["eager", "compiled"], ["nothing", "load", "clear"])
def test_a_first_step_that_does_not_compile_can_be_retried(foreach: bool, again: str, then: str) -> None:
    def fails(_graph: Any, _inputs: Any) -> Any:
        raise ArithmeticError

    results = []
    for backend in ("no", fails):
        torch.compiler.reset()
        param = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        param.grad = torch.tensor([0.0, 2.0])
        options: Options = {"momentum": 0.9, "weight_decay": 0.1, "foreach": foreach}
        optimizer = LARS([param], lr=1.0, **options)
        if backend is fails:
            with pytest.raises(Exception, match="ArithmeticError"):
                torch.compile(optimizer.step, backend=fails)()
            torch.compiler.reset()
        step = torch.compile(optimizer.step, backend="eager") if again == "compiled" else optimizer.step
        if then == "load":
            with_momentum(optimizer)
        elif then == "clear":
            optimizer.state.clear()
        for _ in range(3):
            step()
        results.append([param, optimizer.state[param]["momentum_buffer"]])
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0][0], torch.tensor([3.0, 4.0]))


# the fused step is not in the graph
@pytest.mark.parametrize(
    ("backend", "implementation"),
    [
        ("aot_eager", "single"),
        ("aot_eager", "foreach"),
        *[pytest.param("inductor", each, marks=[slow, version]) for each in ("single", "foreach")],
    ],
)
def test_other_backends(backend: str, implementation: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    # what is recompiled after the second step is compiled the same way
    assert_compiled_equals_eager(compiled_step, backend, torch.tensor, IMPLEMENTATIONS[implementation], steps=2)


@pytest.mark.parametrize(
    ("options", "foreach"),
    [
        ({}, True),
        ({"dampening": 0.25}, False),
        ({"skip_nonfinite": True}, False),
        ({"trust_clip": True, "trust_denominator": "joint"}, True),
    ],
    ids=str,
)
def test_the_functional_is_one_graph(foreach: bool, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two chunks per dtype in graphs for the CPU."""
    monkeypatch.setattr(eager, "CACHED", 15)

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], lr: Tensor) -> None:
        fastlars.lars(
            params,
            grads,
            buffers,
            lr,
            momentum=0.9,
            weight_decay=0.1,
            trust_coefficient=0.1,
            foreach=foreach,
            **options,
        )

    results = []
    for function in (step, torch.compile(step, backend="eager", fullgraph=True)):
        torch.manual_seed(0)
        params, grads, buffers = (
            [torch.randn(size, dtype=dtype) for size in (15, 3, 2) for dtype in (torch.float32, torch.bfloat16)]
            for _ in range(3)
        )
        before = [p.clone() for p in params]
        function(params, grads, buffers, torch.tensor(1.0))
        assert all(not torch.equal(old, new) for old, new in zip(before, params, strict=True))
        results.append(params + buffers)
    for actual, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_fused_functional_is_in_no_graph() -> None:
    computed: set[Any] = set()

    def backend(graph: Any, _inputs: Any) -> Any:
        computed.update(node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method"))
        return graph.forward

    def step(params: list[Tensor], grads: list[Tensor]) -> None:
        fastlars.lars(params, grads, [], 1.0, weight_decay=0.1)

    results = []
    for function in (step, torch.compile(step, backend=backend)):
        params, grads = [torch.ones(5, 3), torch.ones(4)], [torch.ones(5, 3), torch.ones(4)]
        function(params, grads)
        results.append(params)
    assert computed <= {getattr}, "nothing but where the tensors are"
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---------------------------------------------------------------- what it costs
@pytest.mark.slow
@pytest.mark.skipif(TORCH != (2, 13) or not shutil.which("g++"), reason="its internals are those of torch 2.13")
@pytest.mark.parametrize(
    ("case", "dtype", "launches", "moved"),
    [
        ("torch SGD(foreach=True)", "float32", 2, 20),
        ("foreach", "float32", 4, 28),
        ("foreach", "bfloat16", 4, 14),
        ("joint", "float32", 4, 28),
        ("skip_nonfinite", "float32", 4, 28),
        ("mixed groups", "bfloat16", 6, 14),
        ("kahan_sum", "bfloat16", 5, 18),
    ],
)
def test_launches_on_a_gpu(case: str, dtype: str, launches: int, moved: float, tmp_path: Path) -> None:
    """For 40 tensors, counted in generated code, in a separate process that is shown a GPU that does not exist."""
    pytest.importorskip("triton")
    path = tmp_path / "counts.json"
    options = ["--models", "resnet50", "--tensors", "40", "--dtypes", dtype, "--cases", case, "--out", str(path)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.compiled_launches", *options]
    subprocess.run(command, check=True, capture_output=True, cwd=pages.ROOT)
    found = json.loads(path.read_text())["cells"]["ResNet-50, 40 tensors"][case][dtype]
    assert 0 < found["launches"] <= launches
    assert found["on_one_element"] == 0
    assert found["operators"] == (case != "torch SGD(foreach=True)")
    assert 0 < found["bytes"] <= moved


@pytest.mark.parametrize(
    ("denominator", "foreach"),
    [
        ("separate", True),
        ("joint", False),
        *[pytest.param(*each, marks=slow) for each in (("separate", False), ("joint", True))],
    ],
)
def test_norms_and_coefficients_are_a_few_nodes_however_many_tensors(foreach: bool, denominator: str) -> None:
    """Inductor would trace a dozen operations per norm, and repeat the formula in the loop over each tensor."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(40)]
    for param in params:
        param.grad = torch.ones(3)
    optimizer = LARS(params, lr=0.5, momentum=0.9, weight_decay=0.1, trust_denominator=denominator, foreach=foreach)
    nodes = Counter(nodes_of(optimizer.step, fullgraph=False))
    operator = {"separate": "norms", "joint": "joint_norms"}[denominator]
    assert {name: n for name, n in nodes.items() if name.startswith("fastlars.")} == {f"fastlars.{operator}.default": 2}
    assert sum(n for name, n in nodes.items() if "div" in name) == 2  # of two chunks of at most 32 tensors
    assert sum(n for name, n in nodes.items() if "norm" in name) == 2


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("found_inf", [None, torch.zeros(())], ids=["plain", "gated"])
def test_a_graph_for_the_cpu_updates_tensors_while_they_are_in_cache(
    found_inf: Tensor | None, foreach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of a chunk come just before its update, and after the update of the chunk before."""
    monkeypatch.setattr(eager, "CACHED", 6)
    monkeypatch.setattr(eager, "TOGETHER", 3)
    sizes = [5, 2, 4, 1, 1, 9, 0, 1]  # chunks of 1, 2, 2, 1 and 2 tensors

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
        lr = torch.ones(())
        fastlars.lars(params, grads, buffers, lr, momentum=0.9, weight_decay=0.1, foreach=foreach, found_inf=found_inf)

    with torch.no_grad():
        nodes = nodes_of(step, *([torch.ones(size) for size in sizes] for _ in range(3)))
    kinds = [match[0] == "fastlars.norms" for name in nodes if (match := re.search("fastlars.norms|_$|_ of ", name))]
    assert [measured for measured, _ in itertools.groupby(kinds)] == [True, False] * 5
    assert nodes.count("expand") == 5, (
        "each chunk has its own step size, because Inductor compares all readers of a tensor"
    )


@slow
@version
@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("foreach", "lr"), [(False, 0.5), (True, 0.5), (True, torch.tensor(0.5))])
def test_inductor_computes_factors_outside_the_loops_over_elements(
    foreach: bool, lr: float | Tensor, dtype: torch.dtype
) -> None:
    """The formula has the only division. The loops over elements read the factors from memory."""
    tensors = [[torch.ones(64 + i, dtype=dtype) for i in range(6)] for _ in range(3)]

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
        fastlars.lars(params, grads, buffers, lr, momentum=0.9, weight_decay=0.1, foreach=foreach)

    with torch.no_grad():
        _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), *tensors)
    loops = re.findall(r"\bfor ?\(.*?(?=\bfor ?\(|\Z)", code, re.DOTALL)
    assert len(loops) > 6 and sum(" / " in loop for loop in loops) == 1


def nodes_of(step: Callable[..., Any], *args: Any, fullgraph: bool = True) -> list[str]:
    nodes: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op != "placeholder")
        return graph.forward

    torch.compile(step, backend=keep, fullgraph=fullgraph)(*args)
    return nodes


@pytest.mark.parametrize("denominator", ["separate", "joint"])
def test_operators_are_only_in_compiled_steps(denominator: str) -> None:
    def step(params: list[Tensor], grads: list[Tensor], lr: Tensor, differentiable: bool = False) -> None:
        options: Options = {"weight_decay": 0.1, "trust_denominator": denominator, "differentiable": differentiable}
        fastlars.lars(params, grads, [], lr, foreach=False, **options)

    def ours(nodes: Any) -> list[str]:
        return [str(name) for name in nodes if str(name).startswith(("fastlars.", "norms", "joint_norms", "realized"))]

    def given(device: str = "cpu") -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [torch.ones(3, device=device)], [torch.ones(3, device=device)], torch.ones((), device=device)

    with torch.no_grad():
        assert ours(nodes_of(step, *given()))
        assert not ours(nodes_of(step, *given("meta")))
        with Recorder() as recorder:
            step(*given())
        assert "_foreach_norm" in recorder.names and not ours(recorder.names)

    def moved(start: Tensor, grads: list[Tensor], lr: Tensor) -> Tensor:
        new = start * 1.0
        step([new], grads, lr, differentiable=True)
        return new.square().sum()

    # autograd cannot see through a node
    derivatives = []
    for function in (moved, torch.compile(moved, backend="eager", fullgraph=True)):
        start = torch.arange(1.0, 4.0, requires_grad=True)
        derivatives.append(torch.autograd.grad(function(start, *given()[1:]), start)[0])
    torch.testing.assert_close(*derivatives)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_finds_no_fault_in_the_nodes(dtype: torch.dtype) -> None:
    """The declared results of the operators, and that they do not alias the inputs."""
    tensors, others = ([torch.rand(size, dtype=dtype) for size in (1, 5, 2000)] for _ in range(2))
    for node, args in (
        (torch.ops.fastlars.norms, (tensors,)),
        (torch.ops.fastlars.joint_norms, (tensors, others, -1.0, 0.1)),
        (torch.ops.fastlars.realized, (tensors[1],)),
    ):
        torch.library.opcheck(node, args)


class Counted:
    """An optimizer with a compiled step, and the cost of its calls."""

    def __init__(self, kind: type[torch.optim.Optimizer], implementation: Options, lr: Any, **options: Any) -> None:
        torch.compiler.reset()
        counters.clear()
        self.params = [torch.nn.Parameter(torch.ones(4, 3) * i) for i in range(1, 7)]
        for param in self.params:
            param.grad = torch.ones_like(param)
        groups = [{"params": self.params[:3]}, {"params": self.params[3:]}]
        make: Any = kind
        self.optimizer = make(groups, lr=lr, momentum=0.9, weight_decay=0.1, **implementation, **options)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (step + 1))
        self.step = torch.compile(self.optimizer.step, backend="eager")

    def compilations(self, steps: int, scheduled: bool = False) -> int:
        """Frames that these steps compile, with their graphs and the code between."""
        before = counters["frames"]["total"]
        for _ in range(steps):
            self.step()
            if scheduled:
                self.scheduler.step()
        return counters["frames"]["total"] - before

    def breaks(self) -> int:
        return sum(counters["graph_break"].values())


# without dampening and with it
COUNTED = pytest.mark.parametrize(
    ("implementation", "dampening"),
    # with dampening the step leaves the graph, like the fused one
    [("single", 0.0), ("foreach", 0.0), ("foreach", 0.25), ("fused", 0.0)],
)


@slow
@version
@COUNTED
def test_no_more_breaks_and_compilations_than_sgd(implementation: str, dampening: float) -> None:
    breaks, first, later = [], [], []
    for kind in (torch.optim.SGD, LARS):
        counted = Counted(kind, IMPLEMENTATIONS[implementation], 0.5, dampening=dampening)
        first.append(counted.compilations(3))
        breaks.append(counted.breaks())
        # up to torch 2.5 every value of a float lr recompiles, up to a limit of 8; then torch compiles inner functions, of which
        # we have more
        later.append(counted.compilations(6 if TORCH < (2, 6) else 20, scheduled=True))
    assert breaks[1] <= breaks[0] + (dampening != 0)
    assert first[1] > 0
    assert first[1] <= first[0]
    assert later[1] <= later[0]


@slow
@COUNTED
def test_a_tensor_lr_compiles_once(implementation: str, dampening: float) -> None:
    def make() -> Counted:
        return Counted(LARS, IMPLEMENTATIONS[implementation], torch.tensor(0.5), dampening=dampening)

    counted = make()
    assert counted.compilations(3, scheduled=True) > 0
    assert counted.compilations(20, scheduled=True) == 0
    other = make()
    other.params[5].grad = None
    other.compilations(3)
    state = other.optimizer.state_dict()

    counted = make()
    counted.params[1].grad = counted.params[5].grad = None  # frozen
    counted.compilations(3)
    counted.optimizer.load_state_dict(state)
    assert counted.compilations(5) <= 1
    for i in (1, 5):  # unfrozen: with state, and before its first step
        counted.params[i].grad = torch.ones_like(counted.params[i])
        assert counted.compilations(5) <= 1
    assert counted.compilations(5, scheduled=True) == 0


class Scheduled:
    """Two groups, the second with a float lr while the optimizer's is a tensor, and a counted graph per step."""

    def __init__(self, foreach: bool, lr: float | Tensor) -> None:
        self.graphs = 0
        params = [torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))]
        for param in params:
            param.grad = torch.ones_like(param)
        groups: Any = [{"params": params[:1]}, {"params": params[1:], "adapt": False, "lr": 0.1}]
        self.optimizer = LARS(groups, lr=lr, momentum=0.9, weight_decay=0.1, foreach=foreach)
        self.scheduler = LambdaLR(self.optimizer, lambda step: 1 / (step + 1))
        self.step = torch.compile(self.optimizer.step, backend=self._backend)

    def _backend(self, graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def graphs_of(self, change: Callable[[int], None], steps: int = 12) -> int:
        before = self.graphs
        for i in range(steps):
            change(i)
            self.step()
            self.scheduler.step()
        return self.graphs - before


@pytest.mark.parametrize("foreach", [False, True])
def test_one_graph_under_a_schedule(foreach: bool) -> None:
    """Every float lr next to a tensor lr becomes a tensor. As a constant it would make a graph for each value, up to 8."""
    saved = Scheduled(foreach, 0.5).optimizer.state_dict()
    run = Scheduled(foreach, torch.tensor(0.5))
    assert run.graphs_of(lambda i: None) == 1

    run.optimizer.load_state_dict({**saved, "state": run.optimizer.state_dict()["state"]})
    assert run.graphs_of(lambda i: None) <= 1

    run.optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2)), "lr": 0.2})
    groups = run.optimizer.param_groups
    groups[2]["params"][0].grad = torch.ones(2)
    groups[2]["initial_lr"] = 0.2
    run.scheduler = LambdaLR(run.optimizer, lambda step: 1 / (step + 1))
    assert run.graphs_of(lambda i: None) <= 1

    run.scheduler = LambdaLR(run.optimizer, lambda step: 1.0)
    for allowed in (2, 0):  # one that breaks where the lr becomes a tensor, and one that does not
        assert run.graphs_of(lambda i: groups[1].update(lr=1 / (i + 3))) <= allowed
    before = groups[1]["params"][0].clone()
    groups[1]["lr"] = 0.0
    run.step()
    assert torch.equal(groups[1]["params"][0], before), "the value that was written counts"


@pytest.mark.parametrize("gated", [False, True])
def test_a_compiled_step_keeps_float64_and_writes_conjugate_views(gated: bool) -> None:
    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], found_inf: Tensor | None) -> None:
        fastlars.lars(params, grads, buffers, 0.5, momentum=0.9, weight_decay=0.1, foreach=False, found_inf=found_inf)

    starts = [torch.rand(3, 4, dtype=dtype) for dtype in (torch.float64, torch.complex128)]
    stepped = []
    for function in (step, torch.compile(step, backend="aot_eager")):
        params = [starts[0].clone(), starts[1].clone().conj()]
        buffers = [torch.zeros_like(start) for start in starts]
        with torch.no_grad():
            for _ in range(3):
                function(params, starts, buffers, torch.zeros(()) if gated else None)
        stepped.append([param.resolve_conj() for param in params])
    for expected, compiled, start in zip(*stepped, (starts[0], starts[1].conj()), strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-13, atol=0)
        assert not torch.allclose(expected, start)


def test_an_import_does_not_compile_the_step_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo guards the number of modules in sys.modules if a step looks there."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def functional(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], lr: Tensor) -> None:
        fastlars.lars(params, grads, buffers, lr, momentum=0.9, weight_decay=0.1, foreach=True)

    run, lists = Scheduled(True, torch.tensor(0.5)), [[torch.ones(3)] for _ in range(3)]
    compiled = torch.compile(functional, backend=keep)
    for i in range(4):
        monkeypatch.setitem(sys.modules, f"imported_{i}", sys)
        run.step()
        with torch.no_grad():
            compiled(*lists, torch.tensor(0.5))
    assert (run.graphs, len(graphs)) == (1, 1)


@slow
@implementations
def test_the_compiler_keeps_no_parameter_alive(implementation: Options) -> None:
    counted = Counted(LARS, implementation, torch.tensor(0.5))
    counted.compilations(2, scheduled=True)
    alive = [weakref.ref(param) for param in counted.params]
    del counted
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)

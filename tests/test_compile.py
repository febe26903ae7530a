"""A compiled step is the eager one. Inductor is left out here: what may break is the tracing."""

import pytest
import torch

import fastlars
from cases import Options
from fastlars import LARS

# torch's own, from inside its compiler
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {}], ids=str)
def test_compiled_step_equals_eager(options: Options) -> None:
    results = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 3))
        groups = fastlars.param_groups(model, weight_decay=1e-2)
        optimizer = LARS(groups, lr=torch.tensor(1.0), momentum=0.9, trust_coefficient=0.1, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            step()
            scheduler.step()
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("foreach", [False, True])
def test_the_functional_is_one_graph(foreach: bool) -> None:
    params, grads, buffers = ([torch.randn(5, 3), torch.randn(4)] for _ in range(3))

    def step(lr: torch.Tensor) -> None:
        fastlars.lars(
            params, grads, buffers, lr, momentum=0.9, weight_decay=0.1, trust_coefficient=0.1, foreach=foreach
        )

    before = [p.clone() for p in params]
    torch.compiler.reset()
    torch.compile(step, backend="eager", fullgraph=True)(torch.tensor(1.0))
    assert all(not torch.equal(old, new) for old, new in zip(before, params, strict=True))

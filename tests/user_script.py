"""A user's program. mypy --strict and pyright must accept it, and it runs."""

from typing import Any

import torch
from torch import nn

import fastlars
from fastlars import DIALECTS, LARS, lars, param_groups, recipes
from fastlars.schedules import linear_scaling, sqrt_scaling, warmup_cosine, warmup_polynomial

model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4), nn.Embedding(3, 4))

groups: list[dict[str, Any]] = param_groups(
    model,
    weight_decay=1e-4,
    bias_lr=torch.tensor(0.1),
    exclude_from_adaptation=["2.*", nn.LayerNorm],
    unadapted={"momentum": 0.5},
)
by_ndim = param_groups(model.named_parameters(), 1e-4, adapt=lambda name, param: param.ndim > 1)
optimizer = LARS(groups, lr=linear_scaling(0.3, 4096), momentum=0.9, nesterov=True)
others: list[torch.optim.Optimizer] = [
    LARS(model.parameters(), lr=torch.tensor(sqrt_scaling(0.075, 512, base_batch_size=1)), weight_decay=1e-4),
    LARS(model.named_parameters(), 1.0, 0.9, 0.0, 1e-4, adapt=True, trust_clip=True, skip_nonfinite=True),
    LARS(by_ndim, lr=1.0, dialect="simclr", eps=1e-6),
    LARS(by_ndim, lr=1.0, **DIALECTS["paper"]),
    LARS([{"params": list(model.parameters()), "lr": 1.0}], lr=2.0, fused=False, foreach=None),
]
scheduler: torch.optim.lr_scheduler.LRScheduler = warmup_cosine(optimizer, 2, 10, end_factor=0.001)
own, its_schedule = recipes.simclr(model, batch_size=512, epochs=10, steps_per_epoch=20, lr=2.0, warmup_epochs=1)
after: torch.optim.lr_scheduler.LambdaLR = warmup_polynomial(others[0], 2, 10, power=1.0)

history: dict[int, dict[str, float]] = {}
for step in range(3):
    optimizer.zero_grad()
    loss = model[:2](torch.ones(2, 8)).square().sum()
    loss.backward()
    history[step] = optimizer.trust_ratios()
    optimizer.step()
    scheduler.step()


def closure() -> float:
    optimizer.zero_grad()
    loss = model[:2](torch.ones(2, 8)).square().sum()
    loss.backward()
    return float(loss.item())


loss_of_closure: float = optimizer.step(closure)
optimizer.load_state_dict(optimizer.state_dict())
optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "param_names": ["new"], "lr": 0.5})

w, g, v = torch.ones(3), torch.ones(3), torch.zeros(3)
lars([w], [g], [v], lr=0.1, momentum=0.9, adapt=True)
lars([w], [g], [], lr=torch.tensor(0.1))
version: str = fastlars.__version__

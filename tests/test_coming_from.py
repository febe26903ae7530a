"""The settings that docs/coming-from.md gives for open-lars reproduce its steps, and its state can be resumed."""

import torch
from torch import Tensor, nn

from fastlars import LARS, convert_state_dict, param_groups

DECAY, MOMENTUM = 0.05, 0.9


def open_lars(w: Tensor, g: Tensor, v: Tensor, lr: float) -> None:
    """As its authors describe it: the paper's recurrence, with vectors decayed and not adapted."""
    ratio = 0.001 * w.norm() / (g.norm() + DECAY * w.norm() + 1e-8) if w.ndim > 1 else 1.0
    v.mul_(MOMENTUM).add_(lr * ratio * (g + DECAY * w))
    w.sub_(v)


def test_open_lars_is_the_paper_with_decayed_vectors() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    theirs = [p.detach().clone() for p in model.parameters()]
    buffers = [torch.zeros_like(w) for w in theirs]
    groups = param_groups(
        model, DECAY, bias_lr="same", unadapted={"weight_decay": DECAY}, adapt=lambda name, param: param.ndim > 1
    )
    optimizer = LARS(groups, lr=0.5, momentum=MOMENTUM, dialect="paper", eps=1e-8)
    for step in range(6):
        lr = 0.5 + step
        if step == 3:  # from here on with their state
            saved = {
                "state": {i: {"momentum_buffer": v.clone()} for i, v in enumerate(buffers)},
                "param_groups": [{"lr": lr, "lr_in_momentum": True, "params": list(range(len(theirs)))}],
            }
            optimizer = LARS(groups, lr=7.0, momentum=MOMENTUM, dialect="paper", eps=1e-8)
            optimizer.load_state_dict(convert_state_dict(saved, optimizer, params=model.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for w, v, p in zip(theirs, buffers, model.parameters(), strict=True):
            assert p.grad is not None
            open_lars(w, p.grad, v, lr)
        optimizer.step()
        for w, p in zip(theirs, model.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-14)

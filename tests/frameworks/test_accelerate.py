"""Accelerate: its loop leaves the weights that a plain loop leaves, bit for bit."""

from typing import Any

import pytest
import torch

import fastlars


def plain_loop(page: dict[str, Any]) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The page's training in torch alone, groups, schedule and accumulation written out."""
    net = page["make_net"]()
    conv, norm, _, _, linear = net
    adapted = {"params": [conv.weight, linear.weight], "weight_decay": 1e-4}
    rest = {"params": [conv.bias, norm.weight, norm.bias, linear.bias], "lr": 0.1}
    optimizer = fastlars.LARS([adapted, rest], lr=20.0, momentum=0.9)
    small_batches = list(zip(page["images"].split(32), page["labels"].split(32), strict=True))
    ratios = []
    for step in range(40):
        factor = (step + 1) / 4 if step < 4 else (1 - (step - 4) / 36) ** 2
        for group, lr in zip(optimizer.param_groups, (20.0, 0.1), strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        for i in range(4):
            images, labels = small_batches[(4 * step + i) % len(small_batches)]
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(images)
            (torch.nn.functional.cross_entropy(logits.float(), labels) / 4).backward()
        ratios.append(optimizer.trust_ratios())
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
    return net, ratios


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    for (name, p), (_, q) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_it_learns(page: dict[str, Any]) -> None:
    loss = [
        torch.nn.functional.cross_entropy(net(page["images"]), page["labels"]).item()
        for net in (page["make_net"](), page["trained"][0])
    ]
    assert loss[0] > 1.3 and loss[1] < 0.6


def test_accumulation_clipping_bfloat16_and_resume_are_the_plain_loop(page: dict[str, Any]) -> None:
    net, ratios = plain_loop(page)
    assert_same(page["trained"][0], net)
    assert_same(page["resumed"][0], net)
    assert [list(step) for step in page["history"]] == 40 * [["0.weight", "4.weight"]]
    assert [list(step.values()) for step in page["history"]] == [list(step.values()) for step in ratios]


def test_the_clipping_was_felt(page: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: None)
        net, _ = plain_loop(page)
    assert not torch.equal(net[0].bias, page["trained"][0][0].bias)


def test_only_the_wrapped_optimizer_is_ours(page: dict[str, Any]) -> None:
    wrapper = page["trained"][1]
    assert type(wrapper.optimizer) is fastlars.LARS
    assert not hasattr(wrapper, "trust_ratios"), "the page says that one must go through .optimizer"

"""Accelerate: its loop gives the weights of a plain loop, bit for bit."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastlars


def plain_loop(page: dict[str, Any], processes: int = 1) -> tuple[torch.nn.Module, list[dict[str, float]]]:
    """The page's training in plain torch, with groups, schedule and accumulation written out; bfloat16 if in one process."""
    net = page["make_net"]()
    conv, norm, _, _, linear = net
    adapted = {"params": [conv.weight, linear.weight], "weight_decay": 1e-4}
    rest = {"params": [conv.bias, norm.weight, norm.bias, linear.bias], "lr": 0.1}
    optimizer = fastlars.LARS([adapted, rest], lr=20.0, momentum=0.9)
    small_batches = list(zip(page["images"].split(32), page["labels"].split(32), strict=True))
    count = 4 * processes  # per step
    ratios = []
    for step in range(0, 40, processes):
        factor = (step + 1) / 4 if step < 4 else (1 - (step - 4) / 36) ** 2
        for group, lr in zip(optimizer.param_groups, (20.0, 0.1), strict=True):
            group["lr"] = lr * factor
        optimizer.zero_grad()
        for i in range(count):
            images, labels = small_batches[(4 * step + i) % len(small_batches)]
            with torch.autocast("cpu", torch.bfloat16) if processes == 1 else contextlib.nullcontext():
                logits = net(images)
            (torch.nn.functional.cross_entropy(logits.float(), labels) / count).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        of_the_step = optimizer.trust_ratios()  # the ratios of sharded tensors are those of the last step
        optimizer.step()
        ratios.append(optimizer.trust_ratios() if processes == 1 else of_the_step)
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


# Accelerate shards on accelerators only. Here it takes gloo on CPUs for one, and everything else is its own code.
ON_CPU = """
from accelerate.state import AcceleratorState, DistributedType

def on_cpu(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

plain_init, AcceleratorState.__init__ = AcceleratorState.__init__, on_cpu
"""
SAVE = """
trained, history = train_sharded()
named = dict(trained[0].named_parameters())
shards = {name: p.to_local().shape for name, p in named.items()}
weights = {name: p.full_tensor() for name, p in named.items()}
if torch.distributed.get_rank() == 0:
    torch.save({"weights": weights, "shards": shards, "history": history}, "sharded.pt")
torch.distributed.destroy_process_group()
"""


def test_fsdp2_on_two_processes_is_the_plain_loop(page: dict[str, Any], blocks: list[str], tmp_path: Path) -> None:
    definitions = [block for block in blocks if "cpu=True" not in block]
    assert len(definitions) == 3
    (tmp_path / "script.py").write_text("\n".join([ON_CPU, *definitions, SAVE]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "sharded.pt")

    net, ratios = plain_loop(page, processes=2)
    for name, p in net.named_parameters():
        torch.testing.assert_close(saved["weights"][name], p.detach(), rtol=1e-5, atol=1e-6)
        assert saved["shards"][name][0] == (p.shape[0] + 1) // 2, "it was sharded"
    assert len(saved["history"]) == len(ratios) == 20
    for sharded, plain in zip(saved["history"], ratios, strict=True):
        assert list(sharded) == ["0.weight", "4.weight"]
        assert list(sharded.values()) == pytest.approx(list(plain.values()), rel=1e-5)

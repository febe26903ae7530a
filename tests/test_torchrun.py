"""The demo under torchrun, with two gloo processes on this machine, and the snippets of docs/distributed.md."""

import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import Linear, ReLU, Sequential, functional

import fastlars
import pages
import ranks
from benchmarks.demo import distributed
from benchmarks.demo.data import scikit_learn_digits
from benchmarks.demo.training import build_model

MODES = {"data-parallel": []} | ({"sharded": ["--shard"]} if ranks.FULLY_SHARDS_ON_CPU else {})
# nine steps, three per epoch, the last one smaller, and shares of different sizes for the ranks
OPTIONS = ["--batch", "501", "--epochs", "3", "--every", "3", "--lr", "8", "--seed", "7", "--checkpoint"]

# in the first attempt rank 1 is killed after the first checkpoint
KILLED = """
import os, signal
from benchmarks.demo import distributed

def save_and_die(folder, step, training):
    save(folder, step, training)
    if (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]) == ("0", "1"):
        os.kill(os.getpid(), signal.SIGKILL)

save, distributed.save = distributed.save, save_and_die
distributed.main()
"""


@pytest.fixture
def device() -> Any:
    """This process is a job of its own."""
    joined = distributed.start()
    yield joined
    distributed.stop(joined)


def train(folder: Path, device: torch.device) -> None:
    distributed.train(scikit_learn_digits(), distributed.parse([*OPTIONS, str(folder)]), device)


def assert_ended_like_plain_code(folder: Path) -> None:
    """The last checkpoint, alone in the folder, holds the parameters with which one process and a plain loop end."""
    digits, generator = scikit_learn_digits().train, torch.Generator().manual_seed(7)
    torch.manual_seed(7)
    model = build_model(8, 8)
    optimizer = fastlars.LARS(fastlars.param_groups(model, 5e-4, bias_lr=0.1), lr=8.0, momentum=0.9)
    scheduler = fastlars.schedules.warmup_polynomial(optimizer, warmup_steps=6, total_steps=9)
    for _ in range(3):
        for batch in torch.randperm(len(digits.labels), generator=generator).split(501):
            optimizer.zero_grad()
            functional.cross_entropy(model(digits.images[batch]), digits.labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    assert [path.name for path in folder.iterdir()] == ["step-9"]
    dcp_to_torch_save(folder / "step-9", folder / "one file")
    found = torch.load(folder / "one file", weights_only=False)["training"]["model"]
    for name, expected in model.state_dict().items():
        # rounding is 1e-7; the mean of the ranks' means, which is not the batch's mean, would be off by 1e-3
        assert (found[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_job_ends_where_one_process_ends(mode: str, device: torch.device, tmp_path: Path, capsys: Any) -> None:
    program, folder = tmp_path / "killed.py", tmp_path / "checkpoints"
    program.write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(program), *MODES[mode], *OPTIONS, str(folder)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as job:
        try:
            printed, _ = job.communicate(timeout=240)  # seconds; on two quiet cores it takes 20
        finally:
            job.terminate()  # torchrun then ends its processes
    assert job.returncode == 0 and "resuming after step 3 of 9" in printed and f"{mode} on 2 x cpu: " in printed
    train(folder, device)
    assert "resuming after step 9 of 9" in capsys.readouterr().out, "on another number of ranks, and in the other mode"
    assert_ended_like_plain_code(folder)


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # from torch 2.4 itself
@pytest.mark.parametrize(  # while it is written, before it gets its name, and before the previous one is removed
    ("owner", "name", "call", "whole"),
    [(FileSystemWriter, "write_data", 2, 3), (distributed, "steps_saved", 3, 3), (shutil, "rmtree", 3, 6)],
)
def test_a_checkpoint_is_there_as_a_whole_or_not_at_all(
    owner: Any, name: str, call: int, whole: int, device: torch.device, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    original, calls = getattr(owner, name), []

    def die(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt  # which leaves the files that SIGKILL leaves
        return original(*args, **options)

    monkeypatch.setattr(owner, name, die)
    with pytest.raises((KeyboardInterrupt, CheckpointException)):
        train(tmp_path, device)
    monkeypatch.undo()
    train(tmp_path, device)
    assert f"resuming after step {whole} of 9" in capsys.readouterr().out
    assert_ended_like_plain_code(tmp_path)


# not "python", because test_docs.py runs such blocks in one process and without ranks
SNIPPETS = re.findall(r"```py\n(.*?)```", (pages.ROOT / "docs" / "distributed.md").read_text("utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from torch's own ZeroRedundancyOptimizer
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # from torch 2.6, for sharding on a CPU
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
@pytest.mark.usefixtures("device")
def test_the_snippets_of_the_page_make_optimizers_that_step(snippet: str) -> None:
    """Each on a mesh of one process. Other tests cover several."""
    if "fully_shard" in snippet and not ranks.FULLY_SHARDS_ON_CPU:
        pytest.skip("fully_shard works on CPU from torch 2.9 on")
    if "parallelize_module" in snippet and torch.__version__ < (2, 6):
        pytest.skip("torch 2.4's own forward pass fails on a mesh of one process; test_distributed.py has more")
    torch.manual_seed(0)  # one seed with which some inputs of ReLU are positive
    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("replicate", "shard", "tensor"))
    model = Sequential(OrderedDict(layers=Sequential(Linear(6, 8), ReLU(), Linear(8, 4))))
    names: dict[str, Any] = {"torch": torch, "fastlars": fastlars, "model": model, "mesh": mesh}
    exec(snippet, names)  # noqa: S102  our own page
    step = names.get("step_if_finite", names["optimizer"].step)
    before = [p.detach().clone() for p in model.parameters()]
    names.get("parallel", model)(torch.ones(2, 6)).square().sum().backward()
    if "step_if_finite" in names:
        next(model.parameters()).grad[-1] = torch.nan
        step()
        assert all(map(torch.equal, model.parameters(), before))
        next(model.parameters()).grad[-1] = 1.0
    step()
    assert not any(map(torch.equal, model.parameters(), before))
    assert len(SNIPPETS) == 5

"""The demo under torchrun ends where one process ends, and a job whose processes are killed ends where it would have ended.

The jobs are real, with two gloo processes on this machine. Each has a timeout, after which everything that it started is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import torch
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional

import fastlars
import ranks

for module in ("sklearn", "rich"):
    pytest.importorskip(module, reason="the demo has its own dependencies: group demo")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # benchmarks/ is not part of the package and is run from the repository root

import torchrun_job
from benchmarks.demo import distributed
from benchmarks.demo.data import Dataset, scikit_learn_digits
from benchmarks.demo.training import build_model

# Without the second, an attempt may get the addresses of the previous one (pytorch/pytorch#135712).
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TIMEOUT = 240  # seconds; the longest job takes 20 on two quiet cores
MODES = {"data-parallel": [], "sharded": ["--shard"]}
if not ranks.FULLY_SHARDS_ON_CPU:
    del MODES["sharded"]
modes = pytest.mark.parametrize("mode", MODES)

# three steps per epoch, the last one smaller, and shares of different sizes for the two ranks
BATCH, EPOCHS, STEPS, EVERY, LR, SEED = 501, 3, 9, 3, 8.0, 7
OPTIONS = f"--batch {BATCH} --epochs {EPOCHS} --every {EVERY} --lr {LR} --seed {SEED}".split()

# mode, rank, place, step, and the step from which the next attempt resumes; one attempt each
KILLS = [
    ("data-parallel", 1, "in writing a checkpoint", 6, 3),
    ("sharded", 1, "before the optimizer's step", 5, 3),
]


class Job:
    """torchrun and everything that it starts. Leaving the `with` block ends all of it."""

    def __init__(self, *arguments: str) -> None:
        self.mark = f"FASTLARS_TEST_JOB={uuid.uuid4()}"
        name, _, value = self.mark.partition("=")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *arguments],
            cwd=ROOT,
            env={**os.environ, **ENVIRONMENT, name: value, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(2):  # again, for processes that were just starting
            for process in [self.process.pid, *self.children()]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.process.communicate()

    def children(self) -> list[int]:
        """Each leads its own session, and they are recognised by their environment. Linux only."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def output(self, timeout: float = TIMEOUT) -> str:
        out, err = self.process.communicate(timeout=timeout)
        assert self.process.returncode == 0, f"{out}\n{err}"
        # torch 2.8 to 2.10 log connections
        return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """This process's own log."""
    device = distributed.start()
    try:
        yield
    finally:
        distributed.stop(device)


def training() -> distributed.Training:
    model = build_model(8, 8)
    optimizer = fastlars.LARS(fastlars.param_groups(model, 5e-4, bias_lr="same"), lr=1.0, momentum=0.9)
    return distributed.Training(model, optimizer, fastlars.schedules.warmup_polynomial(optimizer, 1, 2))


def tensors(of: distributed.Training) -> dict[str, Tensor]:
    result = dict(of.model.named_parameters())
    result |= {f"{name}, momentum": of.optimizer.state[p]["momentum_buffer"] for name, p in of.model.named_parameters()}
    return {name: tensor.detach().clone() for name, tensor in result.items()}


def ended(folder: Path) -> dict[str, Tensor]:
    """The last checkpoint in a folder, read by one process. Nothing else is left in the folder."""
    assert [path.name for path in folder.iterdir()] == [f"step-{STEPS}"]
    with process_group():
        found = training()
        assert distributed.resume(folder, found) == STEPS
    assert found.scheduler.last_epoch == STEPS
    return tensors(found)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return scikit_learn_digits()


@pytest.fixture(scope="module")
def undisturbed(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, process_groups: Callable[..., ranks.Group]
) -> dict[str, dict[str, Tensor]]:
    """Both modes on two ranks, data-parallel as a user starts it on two nodes, which are one machine here."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test", "--local-addr=localhost"]
    node.append(f"--rdzv-endpoint=localhost:{port}")
    training = ["-m", "benchmarks.demo.distributed", *OPTIONS, "--checkpoint", str(folder / "data-parallel")]
    with Job(*node, *training) as first, Job(*node, *training) as second:
        printed = first.output() + second.output()
    assert re.fullmatch(r"data-parallel on 2 x cpu: test accuracy [0-9.]+ %, [0-9.]+ steps/s\n", printed)
    if "sharded" in MODES:
        torch.save(dataset, folder / "dataset")
        arguments = [*OPTIONS, "--shard", "--checkpoint", str(folder / "sharded")]
        process_groups(2).run(torchrun_job.trains, str(folder), arguments)
    return {mode: ended(folder / mode) for mode in MODES}


def one_process(dataset: Dataset) -> dict[str, Tensor]:
    """The training in plain code, without anything of `benchmarks.demo.distributed`."""
    torch.manual_seed(SEED)
    model = build_model(8, 8)
    optimizer = fastlars.LARS(
        [
            {"params": [model.get_parameter(f"{layer}.{kind}") for layer in ("conv1", "conv2", "hidden", "output")]}
            for kind in ("weight", "bias")
        ],
        lr=LR,
        momentum=0.9,
    )
    optimizer.param_groups[0]["weight_decay"] = 5e-4
    generator = torch.Generator().manual_seed(SEED)
    step = 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(1152, generator=generator).split(BATCH):
            factor = (step + 1) / 6 if step < 6 else (1 - (step - 6) / 3) ** 2
            for group, lr in zip(optimizer.param_groups, (LR, 0.1), strict=True):
                group["lr"] = lr * factor
            optimizer.zero_grad()
            functional.cross_entropy(model(dataset.train.images[batch]), dataset.train.labels[batch]).backward()
            optimizer.step()
            step += 1
    assert step == STEPS
    return tensors(distributed.Training(model, optimizer, None))  # type: ignore[arg-type]


@pytest.mark.slow
@modes
def test_ends_where_one_process_ends(mode: str, undisturbed: dict[str, dict[str, Tensor]], dataset: Dataset) -> None:
    """Within rounding, here 1e-7. The mean of two ranks' means, which is not the batch's mean, would be off by 1e-3."""
    expected = one_process(dataset)
    assert undisturbed[mode].keys() == expected.keys()
    for name, tensor in undisturbed[mode].items():
        assert (tensor - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


@pytest.mark.slow
def test_a_job_whose_processes_are_killed_ends_where_the_undisturbed_one_ends(
    undisturbed: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """Each attempt except the last is killed, at another place and in another mode."""
    kills = [kill for kill in KILLS if kill[0] in MODES]
    torch.save(scikit_learn_digits(), tmp_path / "dataset")
    job = {
        "dataset": str(tmp_path / "dataset"),
        "trainings": {m: [*OPTIONS, "--checkpoint", str(tmp_path / m), *arguments] for m, arguments in MODES.items()},
        "kills": [dict(zip(("mode", "rank", "place", "step"), kill, strict=False)) for kill in kills],
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    where = ["--standalone", "--nproc-per-node=2", f"--max-restarts={len(kills)}"]
    with Job(*where, str(ROOT / "tests" / "torchrun_job.py"), str(tmp_path / "job.json")) as torchrun:
        printed = torchrun.output()
    told = [line for line in printed.splitlines() if "killed" in line or "resuming" in line]
    expected = []
    for attempt, (mode, rank, place, step, next_from) in enumerate(kills):
        expected.append(f"attempt {attempt}: rank {rank} is killed {place}, step {step}")
        if mode == "sharded":  # the previous training has ended
            expected.append(f"resuming after step {STEPS} of {STEPS}")
        expected.append(f"resuming after step {next_from} of {STEPS}")
    assert told == expected
    for mode, tensors in undisturbed.items():
        found = ended(tmp_path / mode)
        for name, tensor in tensors.items():
            assert torch.equal(found[name], tensor), f"{mode}: {name}"


@pytest.mark.slow
@modes
def test_a_job_of_three_ranks_resumes_with_the_same_bits(
    mode: str, process_groups: Callable[..., ranks.Group], dataset: Dataset, tmp_path: Path
) -> None:
    """With two ranks every sum has one order. With more, DDP's buckets decide, which it rebuilds after its first pass."""
    torch.save(dataset, tmp_path / "dataset")
    process_groups(3).run(torchrun_job.stops_and_goes_on, str(tmp_path), [*OPTIONS, *MODES[mode]])
    stopped = ended(tmp_path / "stopped")
    for name, tensor in ended(tmp_path / "whole").items():
        assert torch.equal(stopped[name], tensor), name


@pytest.mark.slow
def test_a_process_leaves_its_job() -> None:
    """Before 2.8, torch's own way hangs in about one of ten runs."""
    process = ranks.context().Process(target=torchrun_job.leaves_often, daemon=True)
    process.start()
    process.join(TIMEOUT)
    process.kill()
    process.join()
    assert process.exitcode == 0


@pytest.mark.slow
def test_a_job_that_hangs_is_ended_with_all_its_processes(tmp_path: Path) -> None:
    """Also processes that ignore SIGTERM, which torchrun leaves behind when it is killed itself."""
    program = tmp_path / "hang.py"
    program.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.stderr.write('here\\n')\n"
        "time.sleep(1000)\n"
    )
    job = Job("--standalone", "--nproc-per-node=2", str(program))
    with job:
        deadline = time.monotonic() + TIMEOUT
        while len(found := job.children()) < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(found) == 3
        with pytest.raises(subprocess.TimeoutExpired):
            job.output(timeout=1)
    assert job.children() == []


class Killed(BaseException):
    """Instead of SIGKILL, with a single process, because only the files on disk matter."""


def dying(original: Callable[..., Any], victim: str) -> Callable[..., Any]:
    def die(of: object, *args: object, **options: object) -> Any:
        if isinstance(of, Path) and of.name != victim:
            return original(of, *args, **options)
        raise Killed

    return die


@pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")  # from torch 2.4 itself
@pytest.mark.parametrize(
    ("owner", "name", "victim", "whole"),
    [
        (FileSystemWriter, "write_data", "", 3),
        (FileSystemWriter, "finish", "", 3),
        (Path, "rename", "unfinished", 3),
        (shutil, "rmtree", "step-3", 6),
    ],
)
def test_a_checkpoint_is_there_as_a_whole_or_not_at_all(
    owner: Any, name: str, victim: str, whole: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with process_group():
        saved = {}
        for step in (3, 6):
            job = training()
            for p in job.model.parameters():
                p.grad = torch.full_like(p, step)
            job.optimizer.step()
            job.scheduler.step()
            saved[step] = tensors(job)
            with monkeypatch.context() as patch:
                if step == 6:
                    patch.setattr(owner, name, dying(getattr(owner, name), victim))
                    with pytest.raises((Killed, CheckpointException)):
                        distributed.save(tmp_path, step, job)
                else:
                    distributed.save(tmp_path, step, job)

        found = training()
        assert distributed.resume(tmp_path, found) == whole
        for key, tensor in tensors(found).items():
            assert torch.equal(tensor, saved[whole][key])
        # remains of the killed run do no harm
        distributed.save(tmp_path, 9, found)
        assert [path.name for path in tmp_path.iterdir()] == ["step-9"]
        assert distributed.resume(tmp_path, training()) == 9


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# not "python", because test_docs.py runs such blocks in one process and without ranks
SNIPPETS = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # from torch's own ZeroRedundancyOptimizer
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")  # from torch 2.6, for sharding on a CPU
@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_the_snippets_of_the_page_make_optimizers_that_step(snippet: str) -> None:
    """Each on a mesh of one process. Other tests cover several."""
    if "fully_shard" in snippet and "sharded" not in MODES:
        pytest.skip("fully_shard works on CPU from torch 2.9 on")
    if "parallelize_module" in snippet and torch.__version__ < (2, 6):
        pytest.skip("torch 2.4's own forward pass fails on a mesh of one process; test_distributed.py has more")
    torch.manual_seed(0)  # one seed with which some inputs of ReLU are positive
    with process_group():
        mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("replicate", "shard", "tensor"))
        names: dict[str, Any] = {"torch": torch, "fastlars": fastlars, "model": Model(), "mesh": mesh}
        exec(snippet, names)  # noqa: S102  our own page
        optimizer, model = names["optimizer"], names.get("parallel", names["model"])
        before = [p.detach().clone() for p in model.parameters()]
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        if "step_if_finite" in names:
            for value, steps in ((torch.nan, False), (1.0, True)):
                before = [p.detach().clone() for p in model.parameters()]
                next(model.parameters()).grad[-1] = value
                names["step_if_finite"]()
                same = [torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
                assert not any(same) if steps else all(same)
    assert len(SNIPPETS) == 5

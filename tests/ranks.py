"""Processes for tests that need several. One start serves many tests, and if one process hangs or fails, all are ended.

A test calls ``group.run(function, *arguments)``. Every rank calls ``function(rank, *arguments)``, a function of a module in
`tests`, between two barriers. The test raises what a rank raises.
"""

import datetime
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# torch 2.4 cannot import fully_shard, 2.6 needs an accelerator, and on CPUs 2.7 and 2.8 add where they should average
FULLY_SHARDS_ON_CPU = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 9)

TIMEOUT = 100  # seconds for one function on all ranks; a collective that waits longer hangs
START = 120  # seconds for the start, also on a busy machine


@dataclass(frozen=True)
class Rank:
    """What a function is given about its process."""

    rank: int
    world: int
    device: str  # "cpu" or "cuda"


class HangError(Exception):
    """Ranks that have not answered in time."""


def context() -> Any:
    """Forks processes from one that has imported torch, which takes seconds, and nothing else."""
    result = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    result.set_forkserver_preload(
        ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "numpy", "pytest"]
    )
    return result


class Group:
    """A process group on this machine, over gloo and loopback, or over NCCL with one GPU per rank."""

    def __init__(self, world: int, device: str) -> None:
        self.world, self.device = world, device
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
        """What the function returned on each rank. Ranks that hang are started again, once.

        Seen once in hundreds of runs: all ranks waited in one all-gather of torch, which gloo never ended. Ranks that expect
        different collectives hang both times.
        """
        what = f"{function.__name__}{arguments}"
        try:
            return self._run(function, arguments, timeout, what)
        except HangError as hang:
            sys.stderr.write(f"{hang}; starting again\n")
        try:
            return self._run(function, arguments, timeout, what)
        except HangError as hang:
            pytest.fail(f"twice: {hang}")

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float, what: str) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        try:
            return self._answers(timeout, what)
        except BaseException:
            self.stop()  # the other ranks would wait indefinitely
            raise

    def stop(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(timeout=0 if process.exitcode is None else None)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        forks = context()
        # a file, because another process could take a port
        meeting = Path(tempfile.mkdtemp(prefix="ranks")) / "store"
        for rank in range(self.world):
            ours, theirs = forks.Pipe()
            arguments = (Rank(rank, self.world, self.device), str(meeting), theirs)
            process = forks.Process(target=_main, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        try:
            self._answers(START, "the start")
        except BaseException:
            self.stop()
            raise

    def _answers(self, timeout: float, what: str) -> list[Any]:
        answers: dict[int, Any] = {}
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=timeout)
        while len(answers) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            left = (deadline - datetime.datetime.now()).total_seconds()
            ready = multiprocessing.connection.wait(waiting, timeout=max(left, 0))
            if not ready:
                silent = [rank for rank in range(self.world) if rank not in answers]
                raise HangError(f"{what}: ranks {silent} have not answered after {timeout} seconds")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                try:
                    succeeded, value = pipe.recv()
                except EOFError:
                    pytest.fail(f"{what}: the process of rank {rank} has ended")
                if not succeeded:
                    pytest.fail(f"{what}, rank {rank}:\n{value}")
                answers[rank] = value
        return [answers[rank] for rank in range(self.world)]


@contextmanager
def group(world: int, device: str = "cpu") -> Iterator[Group]:
    if device == "cuda" and torch.cuda.device_count() < world:
        pytest.skip(f"{world} GPUs needed, {torch.cuda.device_count()} found")
    ranks = Group(world, device)
    try:
        yield ranks
    finally:
        ranks.stop()


def fixture(*worlds: int) -> Any:
    """A module's fixture ``ranks``: the session's groups of these sizes, one by one."""
    # two ranks show what another torch breaks
    marks = {world: [pytest.mark.slow, *([pytest.mark.version] if world == 2 else [])] for world in worlds}
    params = [pytest.param((world, "cpu"), id=f"{world} ranks", marks=marks[world]) for world in worlds]
    params += [pytest.param((world, "cuda"), id=f"{world} GPUs", marks=pytest.mark.cuda) for world in worlds]

    @pytest.fixture(scope="module", params=params)
    def ranks(request: pytest.FixtureRequest, process_groups: Callable[..., Group]) -> Group:
        return process_groups(*request.param)

    return ranks


@contextmanager
def one_rank() -> Iterator[Rank]:
    """This process as the only rank of a group over gloo."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.platform == "linux":
            patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            yield Rank(0, 1, "cpu")
        finally:
            torch.distributed.destroy_process_group()


def _main(rank: Rank, meeting: str, pipe: Any) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"torch\.")  # in torch's use of its own API
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if rank.device == "cuda":
        torch.cuda.set_device(rank.rank)
    torch.distributed.init_process_group(
        "gloo" if rank.device == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{meeting}",
        rank=rank.rank,
        world_size=rank.world,
        timeout=datetime.timedelta(seconds=2 * TIMEOUT),
    )
    pipe.send((True, None))
    with suppress(EOFError, OSError):
        while True:
            function, arguments = pipe.recv()
            # the parent ends this process at about the same time, and stderr then shows where each rank was
            faulthandler.dump_traceback_later(TIMEOUT - 5)
            try:
                answer = True, function(rank, *arguments)
            except (Exception, pytest.fail.Exception):  # noqa: BLE001  it is raised again, by the test
                answer = False, traceback.format_exc()
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)
    torch.distributed.destroy_process_group()

"""A step against ranks: of a copied model (as under DDP) and of a sharded one (as under FSDP2), the exchange apart.

1, 2 and 4 processes with gloo on this machine, one thread each. Run from the repository root, then
`python -m benchmarks.render`, which puts the table into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastlars

from . import machine
from .commandline import FOLDER
from .models import resnet50, tiny
from .results import Results, Row, save
from .tables import console
from .timing import Length, Step, interleave

MODELS = {"ResNet-50": resnet50, "tiny": tiny}
COPIED, SHARDED, EXCHANGE = "copied", "sharded", "exchange"
RANKS = (1, 2, 4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument("--model", choices=list(MODELS), default="ResNet-50", help="(default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS), metavar="N", help="(default: 1 2 4)")
    parser.add_argument("--rounds", type=int, default=31, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=FOLDER / "distributed-cpu.json", metavar="FILE.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = Results("distributed", machine.describe(torch.device("cpu")), {"rounds": options.rounds})
    screen = console()
    screen.print(machine.sentence(results.machine))
    for ranks in options.ranks:
        for row in measure(options.model, ranks, options.rounds):
            results.rows.append(row)
            screen.print(f"{row.case}, {row.contender}: {row.median:.3g} ms")
    save(results, options.out)
    return 0


def case(model: str, ranks: int) -> str:
    return f"{model} on {ranks} rank{'s' if ranks > 1 else ''}"


def measure(model: str, ranks: int, rounds: int) -> list[Row]:
    """A row for each way, its times those of the slowest rank in each round; the exchange's those of the last to come."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        with context.Pool(ranks, maxtasksperchild=1) as pool:
            asked = [pool.apply_async(_rank, (model, rank, ranks, rounds, store)) for rank in range(ranks)]
            answers = [answer.get(timeout=900) for answer in asked]
    model_on_meta = _on_meta(model)
    tensors, elements = len(model_on_meta), sum(p.numel() for p in model_on_meta)
    rows = []
    for name in answers[0][0]:
        of_round = zip(*(samples[name] for samples, _ in answers), strict=True)
        # who comes last waits for nobody
        ms = [min(times) if name == EXCHANGE else max(times) for times in of_round]
        moved = answers[0][1] if name == EXCHANGE else None
        rows.append(Row(case(model, ranks), name, tensors, elements, ms, bytes_moved=moved))
    return rows


def _on_meta(model: str) -> list[torch.Tensor]:
    with torch.device("meta"):
        return list(MODELS[model]().parameters())


class _Clock:
    """The wall clock, from when all ranks are there."""

    device = torch.device("cpu")

    def time(self, step: Step) -> float:
        dist.barrier()
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3


def _rank(model: str, rank: int, ranks: int, rounds: int, store: str) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of each way in each round, on this rank, and the bytes of an exchange."""
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    steps = {COPIED: _optimizer(model, shard=False).step, SHARDED: _optimizer(model, shard=True).step}

    exchanges: list[float] = []
    sizes: set[int] = {0}
    all_reduce = dist.all_reduce

    def timed(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = all_reduce(tensor, *args, **kwargs)
        exchanges.append((time.perf_counter() - start) * 1e3)
        sizes.add(tensor.numel() * tensor.itemsize)
        return result

    dist.all_reduce = timed
    samples = interleave(steps, _Clock(), Length(rounds, math.inf))
    dist.all_reduce = all_reduce
    if ranks > 1:
        samples[EXCHANGE] = exchanges[1:]  # without that of the round that is not counted
        if len(samples[EXCHANGE]) != rounds:
            raise RuntimeError(f"one exchange a step expected, found {len(exchanges)} in {rounds + 1} steps")
    dist.destroy_process_group()
    return samples, max(sizes)


def _optimizer(model: str, shard: bool) -> fastlars.LARS:
    torch.manual_seed(0)
    net = MODELS[model]()
    if shard:
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415  from torch 2.6 on

        mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net, mesh=mesh)
    for param in net.parameters():
        param.grad = param.detach().clone() * 1e-3
    return fastlars.LARS(net.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-4)


if __name__ == "__main__":
    sys.exit(main())

"""The demo's training on several processes, data-parallel or sharded, with checkpoints from which a killed job resumes.

    torchrun --standalone --nproc-per-node=2 -m benchmarks.demo.distributed
    torchrun --standalone --nproc-per-node=2 -m benchmarks.demo.distributed --shard
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m benchmarks.demo.distributed --checkpoint results/run

Copy it, and put in your model, your data and your loss. `start` and `stop` join and leave the process group. `parallelize`
makes the model data-parallel or sharded. `train` uses the same batches and gradients on any number of processes. `save` and
`resume` handle checkpoints, and a checkpoint is either complete or not there. Build LARS after the model has been sharded.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

import fastlars

from .data import Dataset, Split, scikit_learn_digits
from .training import BIAS_LR, Protocol, build_model


def main() -> None:
    options, device = parse(None), start()
    train(scikit_learn_digits(), options, device)
    stop(device)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's network with LARS on several processes.")
    parser.add_argument("--shard", action="store_true", help="shard the model (FSDP2) instead of copying it (DDP)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="save here and resume; all nodes must see it")
    parser.add_argument("--every", type=int, default=5, metavar="N", help="steps between (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, metavar="N", help="of all processes (default: all images at once)")
    parser.add_argument("--lr", type=float, default=128.0, help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    # on CPUs, fully_shard does not run up to torch 2.6, and up to 2.8 it adds gradients instead of averaging them
    needed = (2, 6) if torch.cuda.is_available() else (2, 9)
    if options.shard and torch.__version__ < needed:
        parser.error(f"--shard needs torch 2.6, or 2.9 on a CPU, got {torch.__version__}; leave it out or update torch")
    return options


def start() -> torch.device:
    """Join the processes that torchrun has started. Without torchrun, this is a job of one process."""
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    job = {} if "RANK" in os.environ else alone
    if not torch.cuda.is_available():
        dist.init_process_group("gloo", **job)
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device, **job)
    return device


def stop(device: torch.device) -> None:
    """Leave the process group."""
    # gloo's threads free the tensors of the last exchange, for which they need Python's interpreter lock. The sleep releases
    # it. A thread that still waits for the lock when Python exits aborts the process (pytorch/pytorch#179291).
    time.sleep(0.2)
    # Before torch 2.8, destroying the group can deadlock with such a thread (pytorch/pytorch#154976). This does not happen if
    # a reference keeps the backend, because deleting the backend last releases the lock.
    waits = torch.__version__ < (2, 8)
    backend = dist.distributed_c10d._get_default_group()._get_backend(device) if waits else None
    dist.destroy_process_group()
    del backend


def parallelize(model: nn.Module, shard: bool, device: torch.device) -> nn.Module:
    """Return the module to call instead of the model. The optimizer and the checkpoints get the model itself."""
    if not shard:
        return DistributedDataParallel(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.children():
        if list(layer.parameters()):
            torch.distributed.fsdp.fully_shard(layer, mesh=mesh)
    return torch.distributed.fsdp.fully_shard(model, mesh=mesh)


class Training(NamedTuple):
    """Everything a job resumes from, keyed by parameter names, which depend on neither ranks nor sharding."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parts = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **parts)
        self.scheduler.load_state_dict(state["scheduler"])


def train(dataset: Dataset, options: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels = dataset.train.images.to(device), dataset.train.labels.to(device)
    batches = list(image_order(len(labels), options))

    torch.manual_seed(options.seed)  # the same weights on every rank
    model = build_model(*images.shape[2:]).to(device)
    parallel = parallelize(model, options.shard, device)
    groups = fastlars.param_groups(model, Protocol.weight_decay, bias_lr=BIAS_LR)
    optimizer = fastlars.LARS(groups, lr=options.lr, momentum=Protocol.momentum)
    warmup_steps = len(batches) * Protocol.warmup_epochs // options.epochs
    scheduler = fastlars.schedules.warmup_polynomial(optimizer, warmup_steps, len(batches))
    training = Training(model, optimizer, scheduler)

    done = resume(options.checkpoint, training)
    if done and rank == 0:
        print(f"resuming after step {done} of {len(batches)}", flush=True)
    began = time.perf_counter()
    for step in range(done, len(batches)):
        mine = batches[step][rank::ranks]
        optimizer.zero_grad()
        # Gradients are averaged over the ranks. Each rank sums the loss over its images and multiplies it by ranks / batch.
        # The average is then the gradient of the mean loss of the whole batch, even if ranks have different numbers of images.
        loss = functional.cross_entropy(parallel(images[mine]), labels[mine], reduction="sum")
        (loss * ranks / len(batches[step])).backward()
        optimizer.step()
        scheduler.step()
        if options.checkpoint and ((step + 1) % options.every == 0 or step + 1 == len(batches)):
            save(options.checkpoint, step + 1, training)
    speed = (len(batches) - done) / (time.perf_counter() - began)
    accuracy = measure(parallel, dataset.test, device)
    if rank == 0:
        how = "sharded" if options.shard else "data-parallel"
        print(f"{how} on {ranks} x {device.type}: test accuracy {accuracy:.1f} %, {speed:.1f} steps/s", flush=True)


def image_order(images: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """The images of each step. They depend only on the seed, so all ranks and resumed jobs use the same ones."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        yield from torch.randperm(images, generator=generator).split(options.batch or images)


@torch.no_grad()
def measure(parallel: nn.Module, split: Split, device: torch.device) -> float:
    """Accuracy in percent. Each rank evaluates its share of the images."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    right = (parallel(split.images[share].to(device)).argmax(1) == split.labels[share].to(device)).sum()
    dist.all_reduce(right)
    return 100 * right.item() / len(split.labels)


def save(folder: Path, step: int, training: Training) -> None:
    """Write a checkpoint, each rank its part. It is renamed when it is complete. Then older checkpoints are deleted."""
    unfinished = folder / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a job that was killed
    dist.barrier()
    dcp.save({"training": training}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        older = steps_saved(folder)
        unfinished.rename(folder / f"step-{step}")
        for number in older:
            shutil.rmtree(folder / f"step-{number}")
    dist.barrier()


def resume(folder: Path | None, training: Training) -> int:
    """Load the newest checkpoint, from any number of ranks, sharded or not. Returns its step, or 0 if there is none."""
    if folder is None:
        return 0
    # one rank looks and tells the others, because on a network file system they may not see the newest checkpoint yet
    newest = [max(steps_saved(folder), default=0) if dist.get_rank() == 0 else 0]
    dist.broadcast_object_list(newest)
    if newest[0]:
        dcp.load({"training": training}, checkpoint_id=folder / f"step-{newest[0]}")
    return newest[0]


def steps_saved(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in folder.glob("step-*")]


if __name__ == "__main__":
    main()

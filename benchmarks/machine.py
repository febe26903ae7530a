"""What a result must say of where it was measured. No host name, no user, no path."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .optimizers import PEERS

PACKAGES = ("torch", "fastlars", "numpy", "triton", *PEERS)


def describe(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date; `load` is how busy the machine was when the run began."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.type,
        "device_name": _cpu_name(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "commit": _commit(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"device_name": properties.name, "cuda": torch.version.cuda, "l2_mib": properties.L2_cache_size / 2**20}
    return facts


def sentence(machine: dict[str, Any]) -> str:
    """The same as one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["device"] == "cuda":
        where = f"{machine['device_name']} (CUDA {machine['cuda']}), host {where}"
    load = "" if machine["load"] is None else f"; load average at the start {machine['load']}"
    return (
        f"{where}, {machine['system']}; Python {machine['python']}, {versions}; commit {machine['commit']}, "
        f"{machine['date']}{load}."
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """The checkout's commit, with a + if files that git tracks have changed since."""
    answers = []
    for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        answers.append(done.stdout.decode().strip())
    return answers[0] + ("+" if answers[1] else "")

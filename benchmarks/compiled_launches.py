"""Count the kernels and bytes of the code that Inductor generates for a compiled step on a GPU, without a GPU.

Inductor gets the properties of a GPU that does not exist. Its code is counted and never loaded. This needs g++, triton and
torch 2.13, or a later version with the same internals. Run `nox -s compiled` from the repository root.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.sgd import sgd

import fastlars

from .results import FOLDER
from .shapes import MODELS

STORED = FOLDER / "compiled" / "launches.json"
DTYPES = ("float32", "bfloat16", "float16")

# a function of parameters, gradients, momentum buffers, compensations, and lr
Step = Callable[[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor], None]

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>);
"""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8, "i1": 1}  # by Triton's type
COMMON: dict[str, Any] = {"momentum": 0.9, "weight_decay": 1e-4}


def _lars(**options: Any) -> Step:
    """A LARS step, without compensations unless ``kahan_sum`` is set."""

    def step(p: list[Tensor], g: list[Tensor], v: list[Tensor], kept: list[Tensor], lr: Tensor) -> None:
        compensations = kept if options.get("kahan_sum") else None
        fastlars.lars(p, g, v, lr=lr, compensations=compensations, **{**COMMON, "foreach": True, **options})  # type: ignore[arg-type]

    return step


def _sgd(p: list[Tensor], g: list[Tensor], v: list[Tensor], _kept: list[Tensor], lr: Tensor) -> None:
    options: dict[str, Any] = {**COMMON, "dampening": 0.0, "nesterov": False, "maximize": False}
    sgd(p, g, v, lr=lr, foreach=True, **options)  # type: ignore[arg-type]


def _mixed(p: list[Tensor], g: list[Tensor], v: list[Tensor], _kept: list[Tensor], lr: Tensor) -> None:
    """A LARS step of two groups like those of `param_groups`, so vectors are not adapted."""
    for adapt in (True, False):
        chosen = [[t for t, w in zip(each, p, strict=True) if (w.ndim > 1) == adapt] for each in (p, g, v)]
        _lars(adapt=adapt, weight_decay=1e-4 if adapt else 0.0)(*chosen, [], lr)


CASES: dict[str, Step] = {
    "torch SGD(foreach=True)": _sgd,
    "foreach": _lars(),
    "single": _lars(foreach=False),
    **{
        flag: _lars(**{flag: True})
        for flag in ("nesterov", "trust_clip", "lr_in_momentum", "maximize", "skip_nonfinite")
    },
    "joint": _lars(trust_denominator="joint"),
    "found_inf": lambda *of: _lars(found_inf=torch.zeros_like(of[-1]))(*of),
    "mixed groups": _mixed,
    "kahan_sum": _lars(kahan_sum=True),
}


@functools.cache
def pretend_gpu() -> None:
    """Let Inductor compile for an NVIDIA H200 in this process, which can use no GPU afterwards."""

    def always(value: object) -> Callable[..., Any]:  # a new function each, because Dynamo needs them to differ
        return lambda *_, **__: value

    properties = types.SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 << 30, warp_size=32,
        L2_cache_size=50 << 20, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, uuid="0", gcnArchName="",
    )  # fmt: skip
    answers: dict[str, object] = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "_exchange_device": 0,
        "_maybe_exchange_device": 0, "_lazy_init": None, "synchronize": None, "current_stream": None,
        "set_rng_state": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8), "get_device_name": properties.name,
        "get_device_properties": properties, "get_device_capability": (9, 0), "is_bf16_supported": True,
        "is_current_stream_capturing": False,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, always(value))
    for name in ("current_device", "device_count", "get_device_properties", "synchronize", "is_bf16_supported"):
        setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    # replace what needs a GPU: tracing of attention and matrix product patterns, and Triton's hash, which asks the driver
    joint_graph.lazy_init = post_grad.lazy_init = always(None)
    torch.utils._triton.triton_hash_with_backend = always("none")
    config.compile_threads, config.force_disable_caches = 1, True

    # Views of fake CUDA tensors need a device guard. CUDA builds of torch have one, CPU builds get one that does nothing.
    getattr(torch._C, "_ensureCUDADeviceGuardSet", always(None))()
    if not torch.version.cuda:
        home = Path(torch.__file__).parent
        with tempfile.TemporaryDirectory() as folder:
            source, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
            source.write_text(GUARD, encoding="utf-8")
            flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib", "-lc10", "-o", str(built)]
            subprocess.run([os.environ.get("CXX", "g++"), str(source), *flags], check=True)
            torch.ops.load_library(str(built))
    # Constant folding creates a few real scalars on the device. They are created on the CPU instead.
    for name, make in (("empty.memory_format", torch.empty), ("empty_strided", torch.empty_strided)):
        _LIBRARY.impl(name, lambda *sizes, make=make, dtype=None, **_: make(*sizes, dtype=dtype), "CUDA")


_LIBRARY = torch.library.Library("aten", "IMPL")


def generated(step: Step, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> str:
    """The code that Inductor writes for a step of tensors of these shapes."""
    pretend_gpu()
    torch._dynamo.reset()
    found: list[str] = []

    def instead(graph: Any) -> None:
        found.append(graph.codegen()[0].value)
        raise InterruptedError  # only the code is needed

    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(GraphLowering, "compile_to_module", instead):
        lists = [[torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes] for _ in range(4)]
        try:
            with torch.no_grad():
                torch.compile(step, fullgraph=True)(*lists, torch.empty((), device="cuda"))  # type: ignore[arg-type]
        except Exception:
            if not found:
                raise
    return found[0]


def count(code: str, elements: int, dtype: torch.dtype) -> dict[str, float]:
    """Count what one compiled step launches, and the bytes that it moves per parameter."""
    call = code[code.index("def call") :]
    kernels = re.findall(r"^\s+(triton_\w+)\.run\(", call, re.MULTILINE)
    found = re.finditer(r"^(triton_\w+) = async_compile.*?^''', device_str", code, re.MULTILINE | re.DOTALL)
    bodies = {match[1]: match[0] for match in found}
    operators = re.findall(r"= torch\.ops\.([\w.]+)\(|(?<=extern_kernels\.)(\w+)\(", call)
    # both operators read parameters and gradients once (joint norms in Triton's kernel)
    whole = dict.fromkeys(("fastlars.norms.default", "fastlars.joint_norms.default"), 2 * dtype.itemsize)
    moved = sum(sum(_accesses(bodies[kernel])) for kernel in kernels) / elements
    return {
        "launches": len(kernels),
        "on_one_element": sum("xnumel = 1\n" in bodies[kernel] and "_poi_" in kernel for kernel in kernels),
        "operators": len(operators),
        "bytes": round(moved + sum(whole.get(name, 0) for name, _ in operators), 1),
    }


def _accesses(kernel: str) -> Iterator[int]:
    """Bytes of each load and store of a kernel that walks over a tensor."""
    kinds = dict(re.findall(r"'(\w+_ptr\d+)': '\*(\w+)'", kernel))
    for part in re.split(r"\n    (?:if|elif) pid < |\n    else:", kernel[kernel.index("@triton.jit") :]):
        sizes = [int(size) for size in re.findall(r"\b(?:xnumel|r0_numel) = (\d+)\n", part)]
        for pointer, index in re.findall(r"tl\.(?:load|store)\((\w+) \+ \((.*?)\)(?:,|\))", part):
            if re.search(r"[xr]\d|xindex", index):
                yield math.prod(sizes if "r0_" in index else sizes[:1]) * BYTES[kinds[pointer]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled_launches", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["resnet50", "vit_b"], metavar="NAME")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE")
    parser.add_argument("--tensors", type=int, metavar="N", help="the first N tensors of each model (default: all)")
    parser.add_argument("--out", type=Path, default=STORED, metavar="FILE", help="other cells in it stay")
    options = parser.parse_args(arguments)
    stored = json.loads(options.out.read_text(encoding="utf-8"))["cells"] if options.out.exists() else {}
    for model, dtype, case in itertools.product(options.models, options.dtypes, options.cases):
        if dtype == "float32" and "kahan_sum" in case:
            continue  # only half types have compensations
        shapes = MODELS[model].shapes()[: options.tensors]
        kind, title = getattr(torch, dtype), f"{MODELS[model].title}, {len(shapes)} tensors"
        found = count(generated(CASES[case], shapes, kind), sum(map(math.prod, shapes)), kind)
        print(title, dtype, case, found, sep=", ", flush=True)
        stored.setdefault(title, {}).setdefault(case, {})[dtype] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"torch": torch.__version__, "cells": stored}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Golden numbers: three steps of LARS from fixed inputs, in tests/golden.json. `python tests/golden.py` writes the file.

It holds the float64 values of tests/reference.py and the bits of float32 results of each implementation on CPU, with the
torch version and vector instructions of the machine that wrote them. A change of either needs an entry in CHANGELOG.md.
"""

import json
import struct
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from cases import OPTIONS, Options, make_grads, make_params
from fastlars import LARS
from harness import IMPLEMENTATIONS, buffers_of, set_grads
from reference import ReferenceLARS

PATH = Path(__file__).with_name("golden.json")
LAYOUTS = [
    "scalar",
    "matrix",
    "offset",
]  # 1, 15 and 33 elements: less than a vector register, and more with a remainder
STEPS = 3
NAMES = (
    "defaults", "base", "momentum", "dampening", "nesterov-joint", "nesterov-maximize", "paper", "large_eps",
    "large_decay_joint_maximize", "larc", "byol", "mlperf", "everything",
)  # fmt: skip


def inputs() -> dict[str, Any]:
    """Numbers instead of seeds, because a generator may change."""
    params = make_params(torch.float32, layouts=LAYOUTS)
    return {
        "shapes": [list(p.shape) for p in params],
        "params": [_numbers(params)],
        "grads": [_numbers(g for g in make_grads("dense", params, step) if g is not None) for step in range(STEPS)],
    }


def _numbers(tensors: Iterable[torch.Tensor]) -> list[float]:
    return [number for tensor in tensors for number in tensor.detach().reshape(-1).tolist()]


def _tensors(numbers: list[float], shapes: list[list[int]]) -> list[torch.Tensor]:
    parts = torch.tensor(numbers, dtype=torch.float32).split([torch.Size(shape).numel() for shape in shapes])
    return [part.clone().view(shape) for part, shape in zip(parts, shapes, strict=True)]


def float64(given: dict[str, Any], options: Options) -> tuple[list[float], list[float]]:
    """The reference's parameters, then momentum buffers, after the last step, each with the largest number added up."""
    reference = ReferenceLARS([{"params": _tensors(given["params"][0], given["shapes"])}], **options)
    sizes = [0.0] * 2 * len(given["shapes"])
    for grads in given["grads"]:
        reference.step(_tensors(grads, given["shapes"]))
        sizes = [max(pair) for pair in zip(sizes, reference.param_sizes + reference.buffer_sizes, strict=True)]
    values = [*reference.params, *(v for v in reference.momentum_buffers if v is not None)]
    flat = [float(number) for value in values for number in value.reshape(-1)]
    return flat, [size for size, value in zip(sizes, values, strict=False) for _ in range(value.size)]


def float32(given: dict[str, Any], options: Options, implementation: Options) -> list[float]:
    """The same for LARS, as float32 numbers, which Python's floats hold exactly."""
    params = [Parameter(p) for p in _tensors(given["params"][0], given["shapes"])]
    optimizer = LARS(params, **options, **implementation)
    for grads in given["grads"]:
        set_grads(params, _tensors(grads, given["shapes"]))
        optimizer.step()
    return _numbers([*params, *(buffer for buffer in buffers_of(optimizer) if buffer is not None)])


def to_hex(numbers: list[float]) -> str:
    """The bits of float32 numbers, eight digits each."""
    return struct.pack(f">{len(numbers)}f", *numbers).hex()


def from_hex(text: str) -> list[float]:
    return list(struct.unpack(f">{len(text) // 8}f", bytes.fromhex(text)))


def main() -> None:
    given = inputs()
    cases = {}
    for name in NAMES:
        options = OPTIONS[name]
        bits = {key: to_hex(float32(given, options, how)) for key, how in IMPLEMENTATIONS.items()}
        cases[name] = {"options": options, "float64": float64(given, options)[0], "float32": bits}
    made_with = f"torch {torch.__version__.partition('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in cases.items()]
    text = ",\n".join(lines)
    PATH.write_text(
        f'{{"made_with": {json.dumps(made_with)},\n"inputs": {json.dumps(given)},\n"cases": {{\n{text}\n}}}}\n',
        encoding="utf-8",
    )


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="LARS adapts no parameter")
    main()

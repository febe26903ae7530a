"""Parameter shapes of real models, computed from their papers, without torchvision, timm or transformers.

A test checks that elements and tensors are as many as torchvision and transformers publish for their models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A model's parameters as an optimizer sees them."""

    title: str  # in tables and figures
    shapes: Callable[[], list[Shape]]


def resnet50() -> list[Shape]:
    """He et al., arXiv 1512.03385, with the stride in the 3x3 convolution. Batch norms have weight and bias."""
    shapes = [*_conv_norm(3, 64, 7)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += _conv_norm(channels, width, 1) + _conv_norm(width, width, 3) + _conv_norm(width, 4 * width, 1)
            if block == 0:
                shapes += _conv_norm(channels, 4 * width, 1)
            channels = 4 * width
    return shapes + _linear(channels, 1000)


def vit(width: int, depth: int, patch: int = 16, image: int = 224, classes: int = 1000) -> list[Shape]:
    """Dosovitskiy et al., arXiv 2010.11929. Query, key and value are one matrix, as in torch.nn.MultiheadAttention."""
    tokens = (image // patch) ** 2 + 1
    shapes: list[Shape] = [(1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,)]
    for _ in range(depth):
        shapes += _norm(width) + _linear(width, 3 * width) + _linear(width, width)
        shapes += _norm(width) + _linear(width, 4 * width) + _linear(4 * width, width)
    return shapes + _norm(width) + _linear(width, classes)


def _linear(inputs: int, outputs: int) -> list[Shape]:
    return [(outputs, inputs), (outputs,)]


def _norm(channels: int) -> list[Shape]:
    return [(channels,), (channels,)]


def _conv_norm(inputs: int, outputs: int, kernel: int) -> list[Shape]:
    return [(outputs, inputs, kernel, kernel), *_norm(outputs)]


MODELS = {
    "resnet50": Model("ResNet-50", resnet50),
    "vit_b": Model("ViT-B/16", lambda: vit(768, 12)),
    "vit_l": Model("ViT-L/16", lambda: vit(1024, 24)),
    "small": Model("1000 tensors of 32x32", lambda: [(32, 32)] * 1000),
}

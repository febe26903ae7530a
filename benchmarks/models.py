"""ResNet-50 as a torch.nn module, for whole training steps. A test compares its parameters with `shapes.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, each with batch norm, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        first, second = _conv_norm(inputs, width, 1), _conv_norm(width, width, 3, stride)
        self.body = nn.Sequential(*first, relu, *second, relu, *_conv_norm(width, 4 * width, 1))
        changes = stride != 1 or inputs != 4 * width
        self.shortcut = nn.Sequential(*_conv_norm(inputs, 4 * width, 1, stride)) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    layers: list[nn.Module] = [*_conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)]
    inputs = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, stride if block == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return conv, nn.BatchNorm2d(outputs)


def training(batch: int, image: int, device: torch.device) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Parameters of ResNet-50, and its loss on one random batch."""
    torch.manual_seed(0)
    network = resnet50().to(device)
    images = torch.randn(batch, 3, image, image, device=device)
    labels = torch.randint(1000, (batch,), device=device)
    return list(network.parameters()), lambda: nn.functional.cross_entropy(network(images), labels)


def train_once(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    loss().backward()
    optimizer.step()
    optimizer.zero_grad()

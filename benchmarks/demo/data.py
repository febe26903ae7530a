"""Handwritten digits: the set inside scikit-learn, or MNIST-format (idx) files in a directory."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import avg_pool2d

Numbers = npt.NDArray[np.generic]

# In an idx file, 8 in the third byte means unsigned bytes, and the fourth byte is the number of dimensions.
FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")}
FILES["test"] = ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
IMAGES_MAGIC, LABELS_MAGIC = 0x00000803, 0x00000801


@dataclass(frozen=True)
class Cut:
    """How the train files are divided into a training split, a validation split and batches."""

    train: int  # images at most
    validation: int  # images at most
    share: float  # the training split is at most this share of the train files
    parts: tuple[int, ...]  # the training split holds this many batches; each divides the first
    pool: int  # images are shrunk by this factor, by averaging


class DataError(Exception):
    """A file that cannot be used. The message is one line with the file, the rule, what was found and what to do."""


@dataclass(frozen=True)
class Split:
    images: torch.Tensor  # (n, 1, height, width), float32
    labels: torch.Tensor  # (n,), int64, 0 to 9


@dataclass(frozen=True)
class Dataset:
    name: str
    train: Split
    validation: Split
    test: Split
    batches: tuple[int, ...]  # each divides the training split, so every batch is full


def scikit_learn_digits() -> Dataset:
    """The 1797 images of 8 x 8 pixels that come with scikit-learn, 1152 for training, 323 for validation, 322 for test."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  slow to import, and data may come from elsewhere

    images, labels = (getattr(load_digits(), name) for name in ("images", "target"))
    train, rest = _stratified(labels, np.arange(len(labels)), 1152)
    parts = [(images[chosen], labels[chosen]) for chosen in (train, *_stratified(labels, rest, 323))]
    return _dataset("scikit-learn digits", parts, (32, 144, 576, 1152))


def idx_digits(directory: Path, cut: Cut) -> Dataset:
    """Read MNIST-format files. Training and validation split come from the train files, the test split from t10k files."""
    (images, labels), test = (_read_pair(directory, which) for which in FILES)
    size = min(cut.train, int(len(labels) * cut.share)) // cut.parts[0] * cut.parts[0]
    train, validation = _stratified(labels, np.arange(len(labels)), size)
    if len(validation) - cut.validation >= 10:  # otherwise too few would be left over for a stratified cut
        validation, _ = _stratified(labels, validation, cut.validation)
    parts = [(images[train], labels[train]), (images[validation], labels[validation]), test]
    name = f"{directory.resolve().name} ({size} of {len(labels)} images)"
    return _dataset(name, parts, tuple(size // part for part in cut.parts), cut.pool)


def read_idx(path: Path, magic: int) -> Numbers:
    """Read one idx file of unsigned bytes, gzipped or not. Raises DataError if the file does not fit its header."""
    path = path if path.exists() else path.with_name(f"{path.name}.gz")
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: must be a readable file, found: {error}; check the path or copy it again") from None
    dims = magic & 0xFF
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1)]
    start = f"must start with 0x{magic:08x} (are images and labels swapped?)"
    _require(content[:4] == magic.to_bytes(4, "big"), path, start, f"0x{content[:4].hex()}")
    promised = 4 + 4 * dims + math.prod(shape)
    _require(len(content) == promised, path, f"its header promises {promised} bytes", len(content))
    return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


def _require(holds: bool, path: Path, rule: str, found: object) -> None:
    if not holds:
        raise DataError(f"{path}: {rule}, found {found}; copy the files of one whole data set")


def _read_pair(directory: Path, which: str) -> tuple[Numbers, Numbers]:
    paths = [directory / name for name in FILES[which]]
    images, labels = read_idx(paths[0], IMAGES_MAGIC), read_idx(paths[1], LABELS_MAGIC)
    _require(len(images) == len(labels), paths[1], f"must hold a label for each of {len(images)} images", len(labels))
    return images, labels


def _stratified(labels: Numbers, indices: npt.NDArray[np.intp], size: int) -> list[npt.NDArray[np.intp]]:
    """Draw `size` of `indices` with every digit in proportion. Returns them and the rest."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  as above

    return list(train_test_split(indices, train_size=size, stratify=labels[indices], random_state=0))


def _dataset(name: str, parts: list[tuple[Numbers, Numbers]], batches: tuple[int, ...], pool: int = 1) -> Dataset:
    """Standardise the pixels with the mean and deviation of the training split alone."""
    pixels = [avg_pool2d(torch.from_numpy(images.astype(np.float32)).unsqueeze(1), pool) for images, _ in parts]
    mean, std = pixels[0].numpy().mean(), pixels[0].numpy().std()
    images = [(each - mean) / std for each in pixels]
    labels = [torch.from_numpy(theirs.astype(np.int64)) for _, theirs in parts]
    return Dataset(name, *map(Split, images, labels), batches)

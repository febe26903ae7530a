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

Bytes = npt.NDArray[np.uint8]
Pixels = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

SPLIT_SEED = 0
DIGITS_TRAIN, DIGITS_VALIDATION = 1152, 323  # of 1797; the other 322 are the test split

# The first four bytes: two zeros, the element type (8 is unsigned byte), the number of dimensions.
IMAGES_MAGIC, LABELS_MAGIC = 0x00000803, 0x00000801
FILES = {
    "train images": "train-images-idx3-ubyte",
    "train labels": "train-labels-idx1-ubyte",
    "test images": "t10k-images-idx3-ubyte",
    "test labels": "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Cut:
    """What is made of the train files: the training split, the validation split, and the batches."""

    train: int  # images at most
    validation: int  # images at most
    share: float  # of the train files, at most, is the training split
    parts: tuple[int, ...]  # into how many batches the training split falls, each dividing the first
    pool: int = 1  # the images' sides are divided by this, by averaging


DEMO_CUT = Cut(4096, 4096, 0.8, (32, 8, 2, 1))  # one run of 20 epochs takes about two seconds


class DataError(Exception):
    """A file that cannot be used. The message is one line: file, rule, what was found, what to do."""


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
    batches: tuple[int, ...]  # each divides the training split: no batch is smaller than it says


def scikit_learn_digits() -> Dataset:
    """The 1797 images of 8 x 8 pixels that come with scikit-learn, in three stratified splits."""
    from sklearn.datasets import load_digits  # noqa: PLC0415  slow to import, and data may come from elsewhere

    digits = load_digits()
    images, labels = digits.images.astype(np.float32), digits.target.astype(np.int64)
    train, rest = _stratified(labels, np.arange(len(labels)), DIGITS_TRAIN)
    validation, test = _stratified(labels, rest, DIGITS_VALIDATION)
    return _dataset(
        "scikit-learn digits",
        train=(images[train], labels[train]),
        validation=(images[validation], labels[validation]),
        test=(images[test], labels[test]),
        batches=(32, 144, 576, DIGITS_TRAIN),
    )


def idx_digits(directory: Path, cut: Cut = DEMO_CUT) -> Dataset:
    """MNIST-format files: training and validation split from the train files, test from the t10k files."""
    images, labels = _read_pair(directory, "train")
    test_images, test_labels = _read_pair(directory, "test")
    if images.shape[1:] != test_images.shape[1:]:
        raise DataError(
            f"{directory}: train and test images must have the same size, "
            f"found {_size(images)} and {_size(test_images)}; take both from one data set"
        )
    rarest = int(np.bincount(labels, minlength=10).argmin())
    if (count := int((labels == rarest).sum())) < 10:
        raise DataError(
            f"{directory}: the train files must hold at least 10 images of every digit, "
            f"found {count} of digit {rarest}; give the whole set"
        )
    if images.min() == images.max():
        raise DataError(
            f"{directory}: train images must not all be blank, found only pixels of {images.min()}; copy the file again"
        )
    train_size = min(cut.train, int(len(labels) * cut.share)) // cut.parts[0] * cut.parts[0]
    train, rest = _stratified(labels, np.arange(len(labels)), train_size)
    validation = rest
    if len(rest) - cut.validation >= 10:  # else too few would be left over for a stratified cut
        validation, _ = _stratified(labels, rest, cut.validation)
    return _dataset(
        f"{directory.resolve().name} ({train_size} of {len(labels)} images)",
        train=(_pooled(images[train], cut.pool), labels[train]),
        validation=(_pooled(images[validation], cut.pool), labels[validation]),
        test=(_pooled(test_images, cut.pool), test_labels),
        batches=tuple(train_size // part for part in cut.parts),
    )


def read_idx(path: Path, magic: int) -> Bytes:
    """Read one idx file of unsigned bytes, gzipped or not, and check it against its own header.

    Args:
        path: The file; gzip is told by its content, not by its name.
        magic: The first four bytes that the file must have, big-endian.

    Raises:
        DataError: If the file cannot be read, or its content is not what the header promises.
    """
    content = _read_bytes(path)
    dims = magic & 0xFF
    header = 4 + 4 * dims
    if len(content) < header:
        raise DataError(
            f"{path}: an idx header takes {header} bytes, found {len(content)}; the file is truncated, copy it again"
        )
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise DataError(
            f"{path}: must start with 0x{magic:08x} (unsigned bytes, dimensions: {dims}), found 0x{found:08x}; "
            "check that it is an idx file and that images and labels are not swapped"
        )
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path}: its header promises {' x '.join(map(str, shape))} = {math.prod(shape)} bytes, "
            f"found {len(content) - header}; the file is truncated or damaged, copy it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: must be a readable file, found: {error.strerror}; check the path") from None
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: must be a whole gzip file, found: {error}; it is truncated or damaged, copy it again"
        ) from None


def _read_pair(directory: Path, which: str) -> tuple[Bytes, Labels]:
    images_path, labels_path = (_find(directory, FILES[f"{which} {kind}"]) for kind in ("images", "labels"))
    images, labels = read_idx(images_path, IMAGES_MAGIC), read_idx(labels_path, LABELS_MAGIC)
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: must hold one label an image, found {len(labels)} labels for the {len(images)} images of "
            f"{images_path.name}; take both from one data set"
        )
    if images.size == 0:
        raise DataError(f"{images_path}: must hold images, found {_size(images)} x {len(images)}; give the whole set")
    if labels.max() > 9:
        raise DataError(f"{labels_path}: labels must be 0 to 9, found {labels.max()}; give a set of ten classes")
    return images, labels.astype(np.int64)


def _find(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise DataError(f"{directory}: must be a directory with idx files, found none; check --data")
    for candidate in (name, f"{name}.gz"):
        if (directory / candidate).exists():
            return directory / candidate
    raise DataError(f"{directory / name}: must exist, also as {name}.gz, found neither; add it or check --data")


def _size(images: Bytes) -> str:
    return f"{images.shape[1]} x {images.shape[2]}"


def _stratified(labels: Labels, indices: npt.NDArray[np.intp], size: int) -> list[npt.NDArray[np.intp]]:
    """Draw `size` of `indices` with every digit in proportion; returns them and the rest."""
    from sklearn.model_selection import train_test_split  # noqa: PLC0415  as above

    halves: list[npt.NDArray[np.intp]] = train_test_split(
        indices, train_size=size, stratify=labels[indices], random_state=SPLIT_SEED
    )
    return halves


def _pooled(images: Bytes, size: int) -> Pixels:
    """Means of size x size pixels; a row or column that is left over is dropped."""
    height, width = (side // size for side in images.shape[1:])
    whole = images[:, : height * size, : width * size].astype(np.float32)
    return whole.reshape(len(images), height, size, width, size).mean((2, 4))


def _dataset(
    name: str,
    *,
    train: tuple[Pixels, Labels],
    validation: tuple[Pixels, Labels],
    test: tuple[Pixels, Labels],
    batches: tuple[int, ...],
) -> Dataset:
    """Standardise the pixels with the mean and deviation of the training split alone."""
    mean, std = train[0].mean(), train[0].std()

    def split(part: tuple[Pixels, Labels]) -> Split:
        images, labels = part
        return Split(torch.from_numpy((images - mean) / std).unsqueeze(1), torch.from_numpy(labels))

    return Dataset(name, split(train), split(validation), split(test), batches)

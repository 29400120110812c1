"""Decoded pictures in memory, one of the two kinds of split (the other is streamed.py). Knows no Ray.

Shapes: N rows, H height, W width, C channels, B the global batch.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from raydeep.data import order
from raydeep.data.meter import Meter

if TYPE_CHECKING:
    from raydeep.data.streamed import Streamed

Rows = Sequence[np.ndarray]  # rows of each batch, int64


class Split(Protocol):
    """What a split offers, in memory or not: the contract that both kinds keep."""

    @property
    def labels(self) -> np.ndarray:
        """Int64 N."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""

    def order(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """The order of an epoch: int64 of shape [N], every row exactly once, the same for any worker."""

    def read(self, epochs: Sequence[Rows], meter: Meter | None = None) -> Generator[np.ndarray]:
        """The pictures of each batch of each epoch in turn: uint8 NHWC, writable copies."""


class Pixels(NamedTuple):
    """One decoded split."""

    images: np.ndarray  # uint8 NHWC
    labels: np.ndarray  # int64 N

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def order(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """A permutation of all rows."""
        return order.epoch_order(seed, epoch, len(self.labels))

    def read(self, epochs: Sequence[Rows], meter: Meter | None = None) -> Generator[np.ndarray]:
        """Copies out of memory."""
        meter = meter or Meter()
        flat = self.images.reshape(len(self.images), -1)
        for batches in epochs:
            for rows in batches:
                with meter("read"):
                    images = flat.take(rows, axis=0).reshape(-1, *self.shape)  # a fifth faster than indexing
                yield images


class Dataset(NamedTuple):
    """The splits and how to normalise them."""

    train: Pixels | Streamed
    val: Pixels | Streamed
    test: Pixels | Streamed
    classes: list[str]
    mean: list[float]  # a channel, in [0, 1]
    std: list[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.shape


def in_order(rows: int, batch_size: int) -> list[np.ndarray]:
    """All rows of a split, in order, in batches."""
    return [np.arange(start, min(start + batch_size, rows)) for start in range(0, rows, batch_size)]


def moments(split: Split) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, in [0, 1]: exact, from histograms of the uint8 values."""
    counts = np.zeros((split.shape[2], 256), np.int64)
    for images in split.read([in_order(len(split.labels), 1024)]):
        for channel in range(split.shape[2]):
            counts[channel] += np.bincount(images[..., channel].reshape(-1), minlength=256)
    return moments_of(counts)


def moments_of(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, in [0, 1], of histograms: int64 of shape [C, 256]."""
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = (counts * np.square(values - mean[:, None])).sum(1) / counts.sum(1)
    return mean.tolist(), np.sqrt(np.maximum(variance, 1e-6)).tolist()

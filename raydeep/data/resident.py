"""Decoded pictures in memory, served in the order of `order.py`. Knows no Ray.

Shapes: N rows, H height, W width, C channels, K classes, B the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raydeep.data import decode, order
from raydeep.data.augment import DRAWS, Augmenter, to_input
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.config import Data
    from raydeep.data.shards import Manifest


class Pixels(NamedTuple):
    """One decoded split."""

    images: np.ndarray  # uint8 NHWC
    labels: np.ndarray  # int64 N


class Dataset(NamedTuple):
    """The decoded splits and how to normalise them."""

    train: Pixels
    val: Pixels
    test: Pixels
    classes: list[str]
    mean: list[float]  # a channel, in [0, 1]
    std: list[float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def assemble(manifest: Manifest, cfg: Data, splits: dict[str, Pixels]) -> Dataset:
    """Put decoded splits together, with mean and std of what is trained on."""
    train = splits["train"]
    mean, std = manifest.mean, manifest.std
    channels = train.images.shape[-1]
    if cfg.limit_per_class is not None or len(mean) != channels:
        mean, std = _moments(train.images)
    return Dataset(train, splits["val"], splits["test"], manifest.classes, mean, std)


def _moments(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation a channel, in [0, 1]: exact, from histograms of the uint8 values."""
    counts = np.zeros((images.shape[-1], 256), np.int64)
    for start in range(0, len(images), 1024):
        for channel in range(images.shape[-1]):
            counts[channel] += np.bincount(images[start : start + 1024, ..., channel].reshape(-1), minlength=256)
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    variance = (counts * np.square(values - mean[:, None])).sum(1) / counts.sum(1)
    return mean.tolist(), np.sqrt(np.maximum(variance, 1e-6)).tolist()


def check_memory(manifest: Manifest, cfg: Data) -> None:
    """Refuse, with numbers, what does not fit the memory allowed.

    Raises:
        DataError: decoded pictures take more than data.memory_bytes.
    """
    rows = sum(len(found) for found in chosen_rows(manifest, cfg).values())
    need = rows * int(np.prod(manifest.shape(cfg)))
    if need > cfg.memory_bytes:
        raise DataError(
            f"{rows:,} pictures of {'×'.join(map(str, manifest.shape(cfg)))} bytes take {need:,} bytes decoded, "
            f"more than data.memory_bytes {cfg.memory_bytes:,}; raise it, or lower data.image_size or "
            f"data.limit_per_class"
        )


def chosen_rows(manifest: Manifest, cfg: Data) -> dict[str, np.ndarray | range]:
    """Split → rows that are decoded: all of them, but of train at most data.limit_per_class a class."""
    rows: dict[str, np.ndarray | range] = {split: range(manifest.rows(split)) for split in manifest.splits}
    if cfg.limit_per_class is not None:
        labels = [pq.read_table(f, columns=["label"]).column(0).to_numpy() for f in manifest.files("train")]
        rows["train"] = order.few(np.concatenate(labels), cfg.limit_per_class, cfg.split_seed)
    return rows


def encoded(manifest: Manifest, split: str, rows: np.ndarray | range) -> Iterator[pa.Table]:
    """The rows of a split, sorted, as tables of columns image and label, a table a shard."""
    start = 0
    for file in manifest.files(split):
        table = pq.read_table(file, columns=["image", "label"])
        inside = np.asarray(rows)
        inside = inside[(inside >= start) & (inside < start + len(table))] - start
        yield table.take(inside) if len(inside) < len(table) else table
        start += len(table)


def read_dataset(manifest: Manifest, cfg: Data) -> Dataset:
    """Decode all splits in this process (tests, machines without Ray)."""
    check_memory(manifest, cfg)
    splits = {}
    for split, rows in chosen_rows(manifest, cfg).items():
        tables = [table for table in encoded(manifest, split, rows) if len(table)]
        images = [
            decode.decode_batch(t.column("image").to_pylist(), manifest.pixel_mode(cfg), manifest.side(cfg))
            for t in tables
        ]
        splits[split] = Pixels(np.concatenate(images), np.concatenate([t.column("label").to_numpy() for t in tables]))
    return assemble(manifest, cfg, splits)


class Micro(NamedTuple):
    """One micro-batch on the device."""

    images: torch.Tensor  # float32 NCHW, augmented and normalised
    labels: torch.Tensor  # int64 N


class Batches:
    """The training batches of one worker: its share of each global batch, augmented on the device."""

    def __init__(
        self,
        pixels: Pixels,
        augmenter: Augmenter,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """Serve `pixels` to worker `rank` of `world`.

        Raises:
            DataError: the global batch is larger than the split.
        """
        rows = len(pixels.labels)
        if batch_size > rows:
            raise DataError(
                f"train.batch_size {batch_size} is larger than the train split of {rows:,} rows; "
                f"lower it to at most {rows}"
            )
        self.pixels, self.augmenter, self.batch_size, self.seed = pixels, augmenter, batch_size, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.device = torch.device(device)
        self.steps_per_epoch = order.steps_per_epoch(rows, batch_size)

    def order_hash(self, epoch: int) -> str:
        """Names the sequence of global batches of an epoch."""
        return order.order_hash(order.epoch_order(self.seed, epoch, len(self.pixels.labels)), self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Micro]]:
        """Yields, a step, this worker's micro-batches, from `start_step` on."""
        sequence = order.epoch_order(self.seed, epoch, len(self.pixels.labels))
        for step in range(start_step, self.steps_per_epoch):
            rows = order.share(order.global_batch(sequence, step, self.batch_size), self.rank, self.world)
            numbers = order.draws(self.seed, epoch, step, self.batch_size, DRAWS)
            numbers = order.share(numbers, self.rank, self.world)
            yield [
                self._micro(r, n)
                for r, n in zip(
                    np.array_split(rows, self.accumulate), np.array_split(numbers, self.accumulate), strict=True
                )
            ]

    def _micro(self, rows: np.ndarray, numbers: np.ndarray) -> Micro:
        images = torch.from_numpy(self.pixels.images[rows]).to(self.device, non_blocking=True)
        labels = torch.from_numpy(self.pixels.labels[rows]).to(self.device, non_blocking=True)
        return Micro(self.augmenter(images, torch.from_numpy(numbers).to(self.device)), labels)


def eval_batches(
    pixels: Pixels,
    mean: list[float],
    std: list[float],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Micro]:
    """This worker's part of a split in order, not augmented: every row once over all workers."""
    start, stop = order.eval_range(len(pixels.labels), rank, world)
    for low in range(start, stop, batch_size):
        rows = slice(low, min(low + batch_size, stop))
        images = torch.from_numpy(np.array(pixels.images[rows])).to(device)  # a copy: the object store is read-only
        labels = torch.from_numpy(np.array(pixels.labels[rows])).to(device)
        yield Micro(to_input(images, mean, std), labels)

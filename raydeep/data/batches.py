"""The batches of one worker: its share of each global batch, on its device. Knows no Ray.

Shapes: N rows, H height, W width, C channels, K classes, B the global batch.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch

from raydeep.data import order
from raydeep.data.augment import Augmenter, to_input
from raydeep.data.meter import Meter
from raydeep.data.resident import Split, in_order
from raydeep.errors import DataError

AHEAD_ROWS = 2**19  # rows that are planned together: over the ends of small epochs, reading goes on
FILLERS = 2  # least pictures of a micro-batch, of which some may not count: one alone would stop BatchNorm


class Micro(NamedTuple):
    """One micro-batch on the device."""

    images: torch.Tensor  # float32 NCHW, augmented and normalised
    labels: torch.Tensor  # int64 N
    valid: int  # rows that count, the first ones: a worker that has none still takes part in the step
    other_labels: torch.Tensor | None = None  # int64 N, of the pictures mixed in (mixup, cutmix)
    weight: torch.Tensor | None = None  # float32 N, share of `labels`; 1 - weight is that of `other_labels`
    rows: torch.Tensor | None = None  # int64 N, of the split, on the CPU


class Batches:
    """The training batches of one worker, augmented on the device."""

    def __init__(
        self,
        split: Split,
        augmenter: Augmenter,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        drop_last: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Serve `split` to worker `rank` of `world`.

        Raises:
            DataError: the global batch is larger than the split.
        """
        rows = len(split.labels)
        if batch_size > rows:
            raise DataError(
                f"train.batch_size {batch_size} is larger than the train split of {rows:,} rows; "
                f"lower it to at most {rows}"
            )
        self.split, self.augmenter, self.batch_size, self.seed = split, augmenter, batch_size, seed
        self.rank, self.world, self.accumulate, self.drop_last = rank, world, accumulate, drop_last
        self.device = torch.device(device)
        self.meter = Meter(self.device.type)
        self.multiple = 2 if augmenter.pairs else 1  # a mixed pair is never cut apart
        self.steps_per_epoch = order.steps_per_epoch(rows, batch_size, drop_last)
        self.sequences: dict[int, np.ndarray] = {}  # epoch → order, of the epochs that are being read
        self.images: Generator[np.ndarray] | None = None
        self.position = (0, 0)  # epoch and step of what `images` gives next
        self.reads_until = 0  # epoch that it ends before

    def sequence(self, epoch: int) -> np.ndarray:
        """The order of an epoch."""
        self.sequences = {e: rows for e, rows in self.sequences.items() if e + 1 >= self.position[0]}
        if epoch not in self.sequences:
            self.sequences[epoch] = self.split.order(self.seed, epoch, self.batch_size)
        return self.sequences[epoch]

    def order_hash(self, epoch: int) -> str:
        """Names the sequence of global batches of an epoch."""
        return order.order_hash(self.sequence(epoch), self.batch_size, self.drop_last)

    def step_rows(self, step: int) -> int:
        """Rows of a global batch; fewer than batch_size in a last one that is kept."""
        return min(self.batch_size, len(self.split.labels) - step % self.steps_per_epoch * self.batch_size)

    def epoch(self, epoch: int, start_step: int = 0, epochs: int | None = None) -> Iterator[list[Micro]]:
        """Yields, a step, this worker's micro-batches, from `start_step` on.

        Args:
            epoch: from 0.
            start_step: steps of the epoch that are done already.
            epochs: epochs of the training; lets the reading run ahead over the end of this one.
        """
        mine = self._mine(epoch)
        images = self._reader(epoch, start_step, epochs or epoch + 1)
        for step in range(start_step, self.steps_per_epoch):
            pictures = next(images)
            self.meter.arrived()
            self.position = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield self._micros(pictures, mine[step], epoch, step)

    def rows(self, epoch: int, step: int) -> np.ndarray:
        """This worker's rows of a global batch: int64, of the split."""
        batch = order.global_batch(self.sequence(epoch), step, self.batch_size)
        return order.share(batch, self.rank, self.world, self.multiple)

    def _mine(self, epoch: int) -> list[np.ndarray]:
        """This worker's rows of each global batch; where it has none, the first of the batch, which do not count."""
        out = []
        for step in range(self.steps_per_epoch):
            rows = self.rows(epoch, step)
            batch = order.global_batch(self.sequence(epoch), step, self.batch_size)
            out.append(rows if len(rows) else batch[:FILLERS])
        return out

    def _reader(self, epoch: int, start_step: int, epochs: int) -> Iterator[np.ndarray]:
        """What reads the pictures from here on: what stands here already, or something new."""
        if self.images is None or self.position != (epoch, start_step) or epoch >= self.reads_until:
            self.close()
            self.reads_until = min(epochs, epoch + max(1, AHEAD_ROWS // len(self.split.labels)))
            parts = [self._mine(e) for e in range(epoch, self.reads_until)]
            parts[0] = parts[0][start_step:]
            self.images, self.position = self.split.read(parts, self.meter), (epoch, start_step)
        return self.images

    def close(self) -> None:
        """Stop reading ahead."""
        if self.images is not None:
            self.images.close()
        self.images = None

    def _micros(self, pictures: np.ndarray, rows: np.ndarray, epoch: int, step: int) -> list[Micro]:
        width = self.augmenter.draws
        numbers = order.draws(self.seed, epoch, step, self.step_rows(step), width)
        numbers = self.augmenter.shape_draws(order.share(numbers, self.rank, self.world, self.multiple))
        valid = len(numbers)
        if not valid:
            numbers = np.zeros((len(rows), width))
        micros = []
        for part in order.cut(np.arange(valid), self.accumulate, self.multiple):
            index: np.ndarray | slice = np.resize(part if len(part) else np.arange(len(rows)), max(FILLERS, len(part)))
            if len(part) == len(rows) >= FILLERS:
                index = slice(None)  # the usual case: no copy
            micros.append(self._micro(pictures[index], rows[index], numbers[index], len(part)))
        return micros

    def _micro(self, pictures: np.ndarray, rows: np.ndarray, numbers: np.ndarray, valid: int) -> Micro:
        with self.meter("transfer"):
            images = self._to_device(pictures)
            targets, draws = self._to_device(self.split.labels[rows]), self._to_device(numbers)
        with self.meter("augment"):
            x = self.augmenter(images, draws, torch.from_numpy(numbers))
            x, other, weight = self.augmenter.mix(x, targets, draws)
        return Micro(x, targets, valid, other, weight, torch.from_numpy(rows))

    def _to_device(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor


def eval_batches(
    split: Split,
    mean: list[float],
    std: list[float],
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    device: torch.device | str = "cpu",
) -> Iterator[Micro]:
    """This worker's part of a split in order, not augmented: every row once over all workers.

    Every worker gets as many batches as the others: one that has fewer rows gets some that do not count.
    """
    ranges = [order.eval_range(len(split.labels), r, world) for r in range(world)]
    start, stop = ranges[rank]
    batches = [rows + start for rows in in_order(stop - start, batch_size)]
    rounds = max(-(-(b - a) // batch_size) for a, b in ranges)
    fillers = [np.zeros(1, np.int64)] * (rounds - len(batches))
    reads = [*batches, *fillers]
    for i, (rows, images) in enumerate(zip(reads, split.read([reads]), strict=True)):
        x = to_input(torch.from_numpy(images).to(device), mean, std)
        yield Micro(x, torch.from_numpy(split.labels[rows]).to(device), len(rows) if i < len(batches) else 0)

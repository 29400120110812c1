"""A split that is read and decoded as it is needed, in the order of order.py. Knows no Ray.

A worker's batches are cut into units (order.fetch_plan), an engine fetches the units in order, some ahead, and
batches are gathered from them. Only what lies between the first and the last batch of a unit is held.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from raydeep import mirror
from raydeep.data import fast, order
from raydeep.data.meter import Meter
from raydeep.data.order import Plan

if TYPE_CHECKING:
    from raydeep.data.resident import Rows

UNIT_BYTES = 16 * 2**20  # decoded pictures that are fetched together: a task's overhead is paid once for them
Unit = list[fast.Parts]
# Contract of an engine: (units, format, how many ahead) -> the blocks of the units, in their order.
Engine = Callable[[Sequence[Unit], fast.Format, int], Iterator[fast.Block]]


def threads(units: Sequence[Unit], form: fast.Format, ahead: int) -> Iterator[fast.Block]:
    """The engine of one process: a thread reads and decodes ahead."""
    with ThreadPoolExecutor(1) as pool:
        left = iter(units)
        waiting: list[Future[fast.Block]] = [pool.submit(fast.fetch, unit, form) for unit in islice(left, ahead)]
        try:
            while waiting:
                block = waiting.pop(0).result()
                waiting += [pool.submit(fast.fetch, unit, form) for unit in islice(left, 1)]
                yield block
        finally:
            for future in waiting:
                future.cancel()


class Streamed:
    """One split on disk."""

    def __init__(
        self,
        files: list[str],
        groups: list[tuple[int, int, np.ndarray]],
        labels: np.ndarray,
        form: fast.Format,
        *,
        window_bytes: int,
        engine: Engine = threads,
    ) -> None:
        """Serve the rows of some row groups.

        Args:
            files: the shards, by path or address.
            groups: (index of the shard, row group in it, rows of the group that belong to the split, int64).
            labels: int64 N, of those rows, group by group.
            form: how pictures are stored and what they become.
            window_bytes: decoded pictures that are shuffled together.
            engine: fetches the units.
        """
        self.stamps = [mirror.local(file).stat().st_mtime_ns for file in files]
        self.files, self.groups, self.labels, self.form, self.engine = files, groups, labels, form, engine
        self.sizes = np.array([len(rows) for _, _, rows in groups], np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        picture_bytes = int(np.prod(form.shape))
        self.window_rows = max(1, window_bytes // picture_bytes)
        self.unit_rows = max(1, UNIT_BYTES // picture_bytes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.form.shape

    def order(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """Row groups shuffled, then rows inside windows: see order.stream_order."""
        return order.stream_order(seed, epoch, self.sizes, self.window_rows, batch_size)

    def unit(self, rows: np.ndarray) -> Unit:
        """Where the rows of a unit are stored; neighbours of one group share a part."""
        group = np.searchsorted(self.starts, rows, side="right") - 1
        ends = np.flatnonzero(np.diff(group)) + 1
        parts = []
        for start, end in zip([0, *ends.tolist()], [*ends.tolist(), len(rows)], strict=True):
            number = int(group[start])
            file, index, inside = self.groups[number]
            parts.append(
                fast.Parts(self.files[file], self.stamps[file], index, inside[rows[start:end] - self.starts[number]])
            )
        return parts

    def read(self, epochs: Sequence[Rows], meter: Meter | None = None) -> Generator[np.ndarray]:
        """The pictures of each batch of each epoch in turn: uint8 NHWC.

        Raises:
            DataError: a shard is missing or was changed.
        """
        meter = meter or Meter()
        plans = [order.fetch_plan(batches, self.sizes, self.unit_rows) for batches in epochs]
        units = [self.unit(rows) for plan in plans for rows in plan.units]
        # While a window is served the next one is fetched: otherwise each window would begin with a wait.
        ahead = 2 + max([min(len(plan.units), self._window_units(plan)) for plan in plans], default=0)
        blocks = self.engine(units, self.form, ahead)
        try:
            for batches, plan in zip(epochs, plans, strict=True):
                yield from self._gather(batches, plan, blocks, meter)
        finally:
            close = getattr(blocks, "close", None)
            if close is not None:
                close()

    def _window_units(self, plan: Plan) -> int:
        """Units of one window of this worker."""
        share = sum(map(len, plan.units)) / max(1, len(self.labels))
        return int(-(-share * self.window_rows // self.unit_rows))

    def _gather(self, batches: Rows, plan: Plan, blocks: Iterator[fast.Block], meter: Meter) -> Generator[np.ndarray]:
        ends = np.cumsum([len(rows) for rows in batches])
        last_use = np.zeros(len(plan.units), np.int64)  # batch after which a unit is done with
        np.maximum.at(last_use, plan.unit, np.repeat(np.arange(len(batches)), [len(rows) for rows in batches]))
        held: dict[int, np.ndarray] = {}
        fetched = 0
        for i, end in enumerate(ends):
            unit, offset = plan.unit[end - len(batches[i]) : end], plan.offset[end - len(batches[i]) : end]
            with meter("wait"):
                while fetched <= unit.max(initial=-1):
                    block = next(blocks)
                    meter.add("read", block.read_s)
                    meter.add("decode", block.decode_s)
                    held[fetched] = block.pixels
                    fetched += 1
            images = np.empty((len(unit), *self.form.shape), np.uint8)
            for number in np.unique(unit).tolist():
                here = np.flatnonzero(unit == number)
                images[here] = held[number][offset[here]]
            yield images
            for number in [n for n in held if last_use[n] <= i]:
                del held[number]

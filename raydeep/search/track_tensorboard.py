"""A search as TensorBoard files; see track.py for what the values mean."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydeep.search.track import Front, Progress, Row, Tracker, numbers


class TensorBoard(Tracker):
    """Event files in the run's `tensorboard/`: the search there, accuracy and bytes over epochs in `trials/tNNN/`.

    Written through tensorboardX's EventsWriter, not its SummaryWriter: that writes from a thread, which a full disk
    kills unseen, and then blocks the search as its queue fills up. Each line is on the disk when `row` returns.
    """

    def __init__(self, run: Path, old: Sequence[Row], front: Front) -> None:
        self.folder = run / "tensorboard"
        self.progress = Progress(front)
        trials = {row["trial"] for row in old}
        self.skip = {folder: _events(folder) for folder in (self.folder, *map(self._trial, trials))}
        self.writer = _writer(self.folder)
        for row in old:
            self.row(row)
        self.skip = {}

    def _trial(self, trial: int) -> Path:
        return self.folder / "trials" / f"t{trial:03d}"

    def _due(self, folder: Path) -> bool:
        """Whether the next event of a folder is not there yet."""
        self.skip[folder] = self.skip.get(folder, 0) - 1
        return self.skip[folder] < 0

    def row(self, row: Row) -> None:
        values = self.progress.add(row)
        if values and self._due(self.folder):
            self.writer.write_event(_event(len(self.progress.trials), values))
            self.writer.flush()
        folder = self._trial(row["trial"])
        if row["event"] == "rung" and "val_accuracy" in numbers(row) and self._due(folder):
            writer = _writer(folder)  # a file a rung, so that a thousand paused trials hold no file open
            writer.write_event(_event(row["epochs"], {"accuracy": row["val_accuracy"], "bytes": row["bytes"]}))
            writer.close()

    def front(self, rows: list[Row], folders: list[Path]) -> None:
        """Nothing: the front is among the trials."""

    def close(self, status: str) -> None:
        self.writer.close()


def _writer(folder: Path) -> Any:
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(parents=True, exist_ok=True)
    return EventsWriter(str(folder / "events"), f".{time.time_ns()}")  # without it, a second's files share a name


def _event(step: int, values: Mapping[str, float]) -> Any:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(wall_time=time.time(), step=step, summary=summary)


def _events(folder: Path) -> int:
    """How many events with values a folder's files hold whole (TFRecord: length, its CRC, data, its CRC)."""
    from tensorboardX.proto.event_pb2 import Event

    count = 0
    for path in folder.glob("events.out.tfevents.*"):
        data, at = path.read_bytes(), 0
        while at + 12 <= len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            if at + 16 + size > len(data):
                break  # cut off by a kill
            count += bool(Event.FromString(data[at + 12 : at + 12 + size]).summary.value)
            at += 16 + size
    return count

"""What the workers of a training agree on beside gradients: when to checkpoint, when to stop, and who is stuck.

Each step every worker casts a vote; the sum is looked at one step later, so that nobody waits for it. All workers
therefore act at the same step. Knows no Ray.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from raydeep import mirror
from raydeep.disk import read_json, write_json
from raydeep.errors import RaydeepError, StorageError, TrainError
from raydeep.train.parallel import rank_world

BEAT_S = 1.0  # between two lines of a worker's whereabouts
PUSH_S = 30.0  # the same, where they must be pushed for other nodes to see them


class Wish(NamedTuple):
    """What a worker asks of all."""

    save: bool = False  # a checkpoint, now
    leave: bool = False  # this worker is told to go after it
    failed: bool = False  # this worker can't write checkpoints


class Votes:
    """Sums the wishes of all workers, a step late; with one worker at once."""

    def __init__(self) -> None:
        self.world = rank_world()[1]
        self.group: Any = dist.new_group(backend="gloo") if self.world > 1 else None
        self.pending: tuple[Any, torch.Tensor] | None = None

    def cast(self, wish: Wish) -> Wish:
        """Cast this step's wish; returns what any worker wished at the step before."""
        if self.group is None:
            return wish
        before = self.collect()
        votes = torch.tensor([int(part) for part in wish], dtype=torch.int32)
        self.pending = (dist.all_reduce(votes, group=self.group, async_op=True), votes)
        return before

    def collect(self) -> Wish:
        """What any worker wished when votes were last cast."""
        if self.pending is None:
            return Wish()
        work, votes = self.pending
        work.wait()
        self.pending = None
        return Wish(*(bool(count) for count in votes.tolist()))

    def now(self, wish: Wish) -> Wish:
        """Cast a wish and wait for the others'."""
        before = self.cast(wish)
        after = self.collect() if self.group is not None else Wish()
        return Wish(*(a or b for a, b in zip(before, after, strict=True)))

    def gather(self, value: Any) -> list[Any]:
        """A plain value of every worker, on every worker."""
        if self.group is None:
            return [value]
        out: list[Any] = [None] * self.world
        dist.all_gather_object(out, value, group=self.group)
        return out

    def send(self, value: Any) -> Any:
        """Worker 0's plain value, on every worker."""
        box = [value]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


class Watch:
    """Writes where this worker is to `rank-N.json`; ends the process when no step is done for too long.

    The step itself is in `rank-N.step` at once. A stall leaves `stalled.json`: where each worker waited, with the
    stack of its training thread.
    """

    def __init__(self, folder: Path, timeout_s: float, node: str = "", end: Callable[[int], None] = os._exit) -> None:
        self.folder, self.timeout_s, self.node, self.end = folder, timeout_s, node, end
        self.rank, self.world = rank_world()
        self.thread_id = threading.get_ident()
        self.stage, self.step, self.since = "starting", 0, time.monotonic()
        self.done = threading.Event()
        self.pushed = -PUSH_S
        folder.mkdir(parents=True, exist_ok=True)
        self.before, self.file = self._open(folder / f"rank-{self.rank}.step")
        self._tell()
        self.thread = threading.Thread(target=self._run, daemon=True, name="watch")
        self.thread.start()

    def at(self, stage: str, step: int | None = None) -> None:
        """Note what this worker does now; a step or a batch of evaluation done counts as being alive."""
        self.stage = stage
        if step is not None:
            self.step, self.since = step, time.monotonic()
            os.pwrite(self.file, step.to_bytes(8, "little"), 0)  # in place: outlives kill -9, needs no space

    def close(self) -> None:
        """Stop watching."""
        self.done.set()
        self.thread.join()
        os.close(self.file)

    @staticmethod
    def _open(path: Path) -> tuple[int, int]:
        """The step that an attempt before this one reached (0: none), and the file to write this one's to."""
        reached = 0
        if mirror.address(path) is not None:  # what is on this node: a rank may have moved here or away
            steps = [int.from_bytes(other.read_bytes(), "little") for other in path.parent.glob("rank-*.step")]
            reached = max(steps, default=0)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        return max(reached, int.from_bytes(os.pread(file, 8, 0), "little")), file

    def _run(self) -> None:
        while not self.done.wait(min(BEAT_S, self.timeout_s / 4)):
            if time.monotonic() - self.since > self.timeout_s:
                self._stalled()
                return
            self._tell()

    def _tell(self) -> None:
        with suppress(OSError):  # a full disk is told by what must be written, not by this
            write_json(self.folder / f"rank-{self.rank}.json", self._where())
        if time.monotonic() - self.pushed >= PUSH_S:
            self._push(f"rank-{self.rank}.json")

    def _push(self, name: str) -> None:
        self.pushed = time.monotonic()
        with suppress(OSError, StorageError):
            mirror.push(self.folder / name)

    def _where(self) -> dict[str, Any]:
        return {
            "rank": self.rank, "node": self.node, "pid": os.getpid(), "stage": self.stage, "step": self.step,
            "idle_s": round(time.monotonic() - self.since, 1), "time": time.time(),
        }  # fmt: skip

    def _stalled(self) -> None:
        frame = sys._current_frames().get(self.thread_id)
        stack = traceback.format_stack(frame) if frame is not None else []
        with suppress(OSError):
            write_json(self.folder / f"rank-{self.rank}.json", {**self._where(), "stack": stack})
        self._push(f"rank-{self.rank}.json")
        time.sleep(3 * min(BEAT_S, self.timeout_s / 4))  # for the others to write theirs
        with suppress(OSError, StorageError):
            mirror.pull(self.folder, lambda name: name.startswith("rank-"))
        with suppress(OSError):
            write_json(self.folder / "stalled.json", {"timeout_s": self.timeout_s, "workers": whereabouts(self.folder)})
        self._push("stalled.json")
        self.end(75)


def whereabouts(folder: Path) -> list[dict[str, Any]]:
    """What each worker last wrote of itself, by rank."""
    found = []
    for path in folder.glob("rank-*.json"):
        try:
            found.append(read_json(path))
        except (RaydeepError, OSError):
            continue
    return sorted(found, key=lambda line: line["rank"])


def say_stall(stalled: dict[str, Any]) -> str:
    """One line a worker: where it waits, and for how long; the innermost frames of its stack."""
    lines = [
        f"no training step was done for {stalled['timeout_s']:g} s (scaling.stall_timeout_s), so the run was stopped:"
    ]
    now = max((w["time"] for w in stalled["workers"]), default=0.0)
    for w in stalled["workers"]:
        place = f"rank {w['rank']} ({w['node'] or 'this node'}, process {w['pid']})"
        if "stack" in w:
            inner = " < ".join(entry.strip().split("\n")[0].replace("File ", "") for entry in reversed(w["stack"][-3:]))
            lines.append(f"  {place}, step {w['step']}: {w['stage']}, at {inner}")
        else:
            lines.append(
                f"  {place} does not answer: last heard of {now - w['time']:.0f} s before, at step {w['step']}: "
                f"{w['stage']}"
            )
    return "\n".join(lines)


class Control:
    """The votes and the watch of one worker, and who asks it for checkpoints from outside."""

    def __init__(
        self,
        *,
        watch: Watch | None = None,
        wishes: Callable[[], Wish] | None = None,
        origins: Callable[[list[int]], list[str]] | None = None,
    ) -> None:
        """Join the other workers: every worker must do so at the same moment.

        Args:
            watch: told of each step.
            wishes: asked each step, must be quick.
            origins: names rows of the train split, for errors.
        """
        self.votes, self.watch = Votes(), watch
        self.wishes = wishes or Wish
        self.origins = origins or (lambda rows: [f"row {row} of the train split" for row in rows])

    def at(self, stage: str, step: int | None = None) -> None:
        """See Watch.at."""
        if self.watch is not None:
            self.watch.at(stage, step)

    def explain_not_finite(self, bad: bool | None, rows: list[int], usual: str) -> TrainError:
        """The error of a step whose gradient is not finite: of one worker's batch, or of the training.

        Args:
            bad: this worker's own loss is not finite; None: it sees none (an inner stage of a pipeline).
            rows: of the train split, in this worker's share of the batch.
            usual: the message if the losses of most workers are not finite.
        """
        told = self.votes.gather((bad, self.origins(rows[:8]) if bad else [], len(rows)))
        ill = [rank for rank, (is_bad, _, _) in enumerate(told) if is_bad]
        seeing = sum(is_bad is not None for is_bad, _, _ in told)
        if not ill:
            return TrainError(usual + " (the losses are finite, their gradient is not)")
        rank = ill[0]
        _, names, count = told[rank]
        more = f" and {count - len(names)} more" if count > len(names) else ""
        batch = f"its batch: {', '.join(names)}{more}"
        if seeing > 1 and len(ill) * 2 <= seeing:
            who = ", ".join(map(str, ill))
            return TrainError(f"{usual}. Only rank {who} of {len(told)} has such a loss; {batch}")
        return TrainError(f"{usual}. Rank {rank}, {batch}")

"""Writes checkpoints beside a training: aside, in a thread, and under their name when they are whole."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save as save_tensors
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from raydeep import mirror
from raydeep.disk import sha256_file, write_bytes, write_json
from raydeep.errors import RaydeepError, StorageError
from raydeep.train import checkpoint


class Saver:
    """Writes checkpoints of one training beside it, one at a time; every worker has one and calls it alike."""

    def __init__(self, folder: Path, *, sharded: bool = False, keep: int = 2) -> None:
        """Write to `folder/step-NNNNNNNNN`.

        Args:
            folder: shared by all workers.
            sharded: each worker writes its own part.
            keep: the newest so many stay, and the best.
        """
        self.folder, self.sharded, self.keep = folder, sharded, keep
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        several = sharded and dist.is_initialized() and dist.get_world_size() > 1
        self.group: Any = dist.new_group(backend="gloo") if several else None
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.started = 0  # checkpoints begun

    def save(self, moment: checkpoint.Moment, state: checkpoint.State) -> None:
        """Copy the state now, write it in a thread; first waits for the one before."""
        self.wait()
        if self.error or (self.rank and not self.sharded):
            self.started += 1
            return
        tensors, plain = checkpoint.snapshot(state)
        self.thread = threading.Thread(target=self._write, args=(moment, tensors, plain), name="checkpoint")
        self.thread.start()
        self.started += 1  # not before: who sees it may wait for the thread

    def busy(self) -> bool:
        """Whether one is being written."""
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """Until nothing is being written."""
        if (thread := self.thread) is not None:
            thread.join()
            if self.thread is thread:  # another one may have begun: this is called from two threads
                self.thread = None

    def _write(self, moment: checkpoint.Moment, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        final = self.folder / f"step-{moment.global_step:09d}"
        apart = self.group is not None and mirror.address(self.folder) is not None  # no one sees the others' files
        aside = final if apart else self.folder / f".{final.name}.part"
        error: str | None = None
        parts: dict[str, str] | None = None
        try:
            if apart and self.rank == 0:  # before dcp.save, which no one leaves before all have come
                mirror.drop(final)
            if self.sharded:
                writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
            else:
                aside.mkdir(parents=True, exist_ok=True)
                write_bytes(aside / "tensors.safetensors", save_tensors(tensors))
            if apart:
                parts = self._push_part(final)
            try:
                if self.rank == 0:
                    self._commit(final, aside, moment, plain, parts)
            except Exception as err:
                error = self._explain(err)
            if self.group is not None:  # every worker must know, or the others save alone next time
                box = [error]
                dist.broadcast_object_list(box, src=0, group=self.group)
                error = box[0]
        except Exception as err:
            error = self._explain(err)
        if error:
            shutil.rmtree(aside, ignore_errors=True)
            self.error = error

    def _push_part(self, final: Path) -> dict[str, str]:
        """Push what this worker has written, for no other node sees it; gives the checksums of all workers' files."""
        mine: dict[str, str] = {}
        error = ""
        try:
            for file in final.glob(f"shard-{self.rank + 1:05d}-*.safetensors"):
                mine[file.name] = sha256_file(file)
                mirror.push(file)
                file.unlink()  # read from the bucket, if ever
        except (OSError, RaydeepError) as err:
            error = str(err)
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (mine, error), group=self.group)
        for _, failed in told:
            if failed:
                raise StorageError(failed)
        return {name: digest for sums, _ in told for name, digest in sums.items()}

    def _commit(
        self, final: Path, aside: Path, moment: checkpoint.Moment, plain: dict[str, Any], parts: dict[str, str] | None
    ) -> None:
        files = sorted(aside.glob("*.safetensors")) if parts is None else []
        if self.sharded:
            for file in files:
                with file.open("rb+") as handle:
                    os.fsync(handle.fileno())
        sums = {file.name: sha256_file(file) for file in files} if parts is None else parts
        write_json(
            aside / checkpoint.STATE, {"format": checkpoint.FORMAT, "moment": moment._asdict(), **plain, "sha256": sums}
        )
        if aside != final:
            mirror.drop(final)
            os.rename(aside, final)
        mirror.push_folder(final, last=checkpoint.STATE)
        self._drop_old(final)

    def _drop_old(self, final: Path) -> None:
        done = [path for path in checkpoint.every(self.folder) if path.name <= final.name]
        kept = set(done[-self.keep :])
        scores = {path: score for path in done if (score := checkpoint.score(path)) is not None}
        if scores:
            kept.add(max(scores, key=lambda path: (scores[path], path.name)))
        for path in checkpoint.every(self.folder):
            if path not in kept:  # a later one was passed over as torn, and training goes on from before it
                mirror.drop(path)

    def _explain(self, err: Exception) -> str:
        seen: BaseException | None = err
        failures = getattr(err, "failures", None)  # of dcp: rank → (exception, traceback)
        if failures:
            seen = next(iter(failures.values()))[0]
        full = getattr(seen, "errno", None) == errno.ENOSPC or "No space left" in str(seen)
        what = str(seen) if isinstance(seen, RaydeepError) else f"{type(seen).__name__}: {seen}"
        what = "no space left on the device" if full else what
        try:
            there = checkpoint.latest(self.folder)
        except StorageError:
            return f"a checkpoint can't be written: {what}; then go on with --resume {mirror.name(self.folder.parent)}"
        left = f"the last one, of step {there.moment.global_step}, is whole" if there else "there is none before it"
        return (
            f"{mirror.name(self.folder)}: the checkpoint can't be written: {what}; {left}. "
            f"{'Free space' if full else 'Mend that'}, then go on with --resume {mirror.name(self.folder.parent)}"
        )

"""What runs on each worker of Ray Train: the training loop, between the cluster's notices and the run folder."""

from __future__ import annotations

import fnmatch
import json
import os
import secrets
import signal
import socket
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import append_line, read_json, read_lines, write_bytes, write_json
from raydeep.errors import StorageError, TrainError
from raydeep.machine import usable_cores
from raydeep.train import checkpoint, losses, parallel
from raydeep.train.control import Control, Votes, Watch, Wish
from raydeep.train.metrics import Score, evaluate
from raydeep.train.saver import Saver

SAVE_FIRST_S = 20.0  # most that a shutdown waits for a checkpoint
AGAIN_S = 5.0  # between checkpoints while a node is about to go
PAUSE_S = 5.0  # after a checkpoint that the driver asked for
LOOK_S = 0.2  # between looks for the driver's file
LOOK_FAR_S = 1.0  # the same where it is in a bucket
OF_RUN = ("metrics.jsonl", "attempts.jsonl")  # what worker 0 appends to
RESERVE = 64 * 1024  # bytes kept to write the error of a full disk


class _Notices:
    """What comes to this process from outside its training thread."""

    def __init__(self) -> None:
        self.save, self.leave = threading.Event(), threading.Event()
        self.saver: Saver | None = None  # of the training that is under way
        self.draining_at = self.looked_at = 0.0
        self.ask: Path | None = None  # the driver's file: it is there while a checkpoint is waited for
        self.asked_at: int | None = None  # saver.started, then
        self.asked_far = threading.Event()  # it was seen in the bucket

    def wishes(self) -> Wish:
        """See Control.wishes."""
        save, now = self.save.is_set(), time.monotonic()
        self.save.clear()
        if now - self.draining_at > AGAIN_S and _draining():
            self.draining_at, save = now, True
        if self.saver and self.ask and (self.asked_at is not None or now - self.looked_at > LOOK_S):
            self.looked_at = now
            if self.asked_at is not None:
                if self.saver.started > self.asked_at and not self.saver.busy():
                    with suppress(StorageError):  # the driver waits so much longer
                        mirror.drop(self.ask)
                    self.asked_far.clear()
                    self.asked_at = None
                    time.sleep(PAUSE_S)  # the driver stops the run now: steps done meanwhile would be lost
            elif self.saver.rank == 0 and (self.ask.exists() or self.asked_far.is_set()):
                self.asked_at, save = self.saver.started, True
        return Wish(save, self.leave.is_set())

    def look_far(self, ask: Path, done: threading.Event) -> None:
        """Look for the driver's file in the bucket: in a thread, so that no step waits for the answer."""
        while not done.wait(LOOK_FAR_S):
            with suppress(StorageError):
                if mirror.exists(ask):
                    self.asked_far.set()


NOTICES = _Notices()


def _draining() -> bool:
    """Whether Ray has said that a node of this training is about to go."""
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info is not None


def on_sigterm() -> None:
    """Handle SIGTERM: called on the worker's main thread, where Python lets signals be handled."""
    signal.signal(signal.SIGTERM, lambda *_: NOTICES.leave.set() if NOTICES.saver else os._exit(0))


def save_first() -> None:
    """Before the workers are taken down, to resize them or to stop: a checkpoint, if they still train."""
    saver = NOTICES.saver
    if saver is None:
        return
    before, end = saver.started, time.monotonic() + SAVE_FIRST_S
    failed = saver.folder.parent / "workers"
    NOTICES.save.set()
    beat = 0.02 if mirror.address(failed) is None else LOOK_FAR_S
    look = 0.0
    while NOTICES.saver is saver and saver.started == before and time.monotonic() < end:
        if time.monotonic() >= look:
            if _failed(failed):  # one has raised: the others wait for it in a collective
                return
            look = time.monotonic() + beat
        time.sleep(0.02)
    saver.wait()


def _failed(workers: Path) -> list[str]:
    """Notes of workers that have raised."""
    with suppress(StorageError):
        return [name for name in mirror.names(workers) if fnmatch.fnmatch(name, "failed-*.json")]
    return []


def work(config: dict[str, Any]) -> None:
    """Train on this worker; a TrainError, which all workers raise alike, is left in `workers/error.json`."""
    import ray.train

    folder = mirror.place(config["run"])
    with suppress(StorageError):  # `probe` tells of it
        if mirror.exists(folder / "workers" / "stalled.json"):  # Ray has started the group anew after a stall ended it
            return
    job = Job.model_validate(config["job"])
    context = ray.train.get_context()
    torch.set_num_threads(max(1, usable_cores() // context.get_local_world_size()))
    rank = context.get_world_rank()
    watch = Watch(folder / "workers", job.scaling.stall_timeout_s, socket.gethostname())
    done, ask = threading.Event(), folder / "workers" / "ask"
    if rank == 0 and mirror.address(ask) is not None:
        threading.Thread(target=NOTICES.look_far, args=(ask, done), daemon=True, name="ask").start()
    try:
        _train(job, folder, config, watch, context.get_local_world_size())
    except TrainError as err:
        if rank == 0:
            _note(folder / "workers", "error.json", {"error": str(err)})
    except BaseException as err:
        told = {
            "rank": rank, "time": time.time(), "step": watch.step, "stage": watch.stage,
            "error": f"{type(err).__name__}: {err}", "traceback": traceback.format_exc(),
        }  # fmt: skip
        with suppress(StorageError):  # it may be what is told
            _note(folder / "workers", f"failed-{rank}.json", told)
        raise
    finally:
        NOTICES.saver = None
        done.set()
        watch.close()
    ray.train.report({"done": 1})


def _note(folder: Path, name: str, value: dict[str, Any]) -> None:
    (folder / ".reserve").unlink(missing_ok=True)  # room for this on a full disk
    write_json(folder / name, value)
    mirror.push(folder / name)


def _train(job: Job, folder: Path, config: dict[str, Any], watch: Watch, local: int) -> None:
    from raydeep.data.augment import Augmenter
    from raydeep.data.batches import Batches, eval_batches
    from raydeep.model import artifact
    from raydeep.train.loop import fit

    rank = parallel.rank_world()[0]
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if job.scaling.use_gpu else "cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # shapes never change
        torch.set_float32_matmul_precision("high")
    data, cfg = config["data"].get(), job.train
    strategy = parallel.strategy(job.scaling, device)
    control = Control(watch=watch, wishes=NOTICES.wishes, origins=lambda rows: _origins(folder, job, rows))
    probe(folder / "checkpoints", control.votes, watch.node)
    _check_places(job, control.votes, watch.node, local)
    resume = _resume(folder, control.votes, watch.node, watch.before)
    saver = Saver(folder / "checkpoints", sharded=strategy.sharded, keep=cfg.keep_checkpoints)
    torch.manual_seed(job.seed)
    model = artifact.build(config["spec"]).to(device)
    batches = Batches(
        data.train, Augmenter(job.augment, data.mean, data.std), cfg.batch_size, job.seed, rank=strategy.data_rank,
        world=strategy.data_world, accumulate=cfg.accumulate, drop_last=cfg.drop_last, device=device,
    )  # fmt: skip

    def score(strategy: parallel.Strategy) -> Score:
        part = eval_batches(
            data.val, data.mean, data.std, cfg.eval_batch_size, strategy.data_rank, strategy.data_world, device
        )
        alive = lambda: watch.at("evaluates", watch.step)  # noqa: E731
        return evaluate(strategy, part, len(data.val.labels), device, cfg.eval_flip, alive)

    def on_epoch(metrics: dict[str, Any]) -> None:
        if rank == 0:
            append_line(folder / "metrics.jsonl", {"stage": "train", **metrics})
            mirror.push(folder / "metrics.jsonl")

    loss: Any = losses.of(cfg)
    if config["distill"] is not None:
        loss = config["distill"](loss, model, data, device)
    NOTICES.saver, NOTICES.ask = saver, watch.folder / "ask"
    fit(
        model, loss, batches, cfg, seed=job.seed, strategy=strategy, evaluate=score, on_epoch=on_epoch,
        on_step=getattr(loss, "on_step", None), saver=saver, resume=resume, control=control,
    )  # fmt: skip


def probe(folder: Path, votes: Votes, node: str) -> None:
    """Every worker writes a file in `folder` and looks for the others'.

    Raises:
        TrainError: on every worker, naming the nodes that can't write, or whose files others don't see.
    """
    rank = parallel.rank_world()[0]
    mine = folder / f".probe-{rank}-{secrets.token_hex(4)}"
    error = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mine.write_bytes(os.urandom(4096))
        mirror.push(mine)
    except OSError as err:
        error = f"{node or 'this node'} can't write there: {err.strerror}"
    except StorageError as err:
        error = str(err)
    names = votes.gather((mine.name, node, error))
    unseen = []
    with suppress(StorageError):  # told by its error above
        unseen = [other for name, other, failed in names if not failed and not mirror.exists(folder / name)]
    told = votes.gather((node, unseen))
    votes.gather(None)  # nobody removes a file that another still looks for
    with suppress(OSError, StorageError):
        mirror.drop(mine, *(folder.glob(".probe-*") if rank == 0 else ()))  # those of killed attempts too
    errors = [failed for _, _, failed in names if failed]
    if errors and mirror.address(folder) is not None:
        raise TrainError(errors[0])
    if errors:
        raise TrainError(f"storage {folder}: {errors[0]}; free space, or set storage=FOLDER that every node can write")
    blind = sorted({f"{seer} does not see what {other} writes" for seer, others in told for other in others})
    if blind:
        raise TrainError(
            f"storage {mirror.name(folder)} is not shared by all nodes: {'; '.join(blind[:4])}; set storage=FOLDER to "
            f"one that every node mounts, or storage=s3://BUCKET/FOLDER, or scaling.workers so that one node suffices"
        )


def _check_places(job: Job, votes: Votes, node: str, local: int) -> None:
    most = job.scaling.workers_per_node
    if most is not None:
        full = sorted({f"{name} has {count}" for name, count in votes.gather((node, local)) if count > most})
        if full:
            raise TrainError(
                f"scaling.workers_per_node {most}: {', '.join(full)} workers; add a node, or raise workers_per_node"
            )


def _resume(folder: Path, votes: Votes, node: str, before: int) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from, found by worker 0; it also tidies up and notes the attempt."""
    rank, world = parallel.rank_world()
    nodes = votes.gather(node)
    name: str | None = None
    if mirror.address(folder) is not None:  # each worker knows of the steps of its own node alone
        before = max(votes.gather(before))
        for old in (folder / "workers").glob("failed-*.json"):
            old.unlink(missing_ok=True)
    if rank == 0:
        for lines in OF_RUN:
            mirror.fetch(folder / lines)
        notes: list[str] = []
        found = checkpoint.latest(folder / "checkpoints", notes.append)
        checkpoint.clean(folder / "checkpoints")
        _forget(folder / "metrics.jsonl", found.moment.epoch if found else 0)
        mirror.drop(*(folder / "workers" / name for name in _failed(folder / "workers")))
        (folder / "workers" / ".reserve").write_bytes(bytes(RESERVE))
        step = found.moment.global_step if found else 0
        append_line(folder / "attempts.jsonl", {
            "attempt": len(read_lines(folder / "attempts.jsonl")) + 1, "time": time.time(), "workers": world,
            "nodes": sorted(set(nodes)), "from_step": step, "reached_before": before, "notes": notes,
        })  # fmt: skip
        mirror.push(*(folder / lines for lines in OF_RUN if (folder / lines).exists()))
        name = found.path.name if found else None
    name = votes.send(name)
    if name is None:
        return None
    checkpoint.fetch(folder / "checkpoints" / name)
    return checkpoint.load(folder / "checkpoints" / name)


def _origins(folder: Path, job: Job, rows: list[int]) -> list[str]:
    """Where rows of the train split come from."""
    from raydeep.data import shards, splits

    mirror.fetch(folder / "provenance.json")
    path = mirror.place(read_json(folder / "provenance.json")["dataset"]["path"])
    mirror.pull(path)
    return splits.origins(shards.load_manifest(path), job.data, "train", rows)


def _forget(path: Path, epochs: int) -> None:
    """Drop the lines of epochs that a resumed training does again: they were told before they were saved."""
    lines = read_lines(path)
    kept = [line for line in lines if line.get("stage") != "train" or line["epoch"] <= epochs]
    if len(kept) < len(lines):
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

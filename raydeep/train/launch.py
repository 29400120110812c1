"""Runs the training loop on Ray Train's TorchTrainer; the cluster is there already."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydeep import mirror
from raydeep.config import Job, Scaling
from raydeep.disk import parse_lines, read_json
from raydeep.errors import RaydeepError, StorageError, TrainError
from raydeep.machine import usable_cores
from raydeep.run import Run
from raydeep.train import control

UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback", "PreemptionCallback")
SAVE_FIRST_S = 10.0  # most that a stop waits for a checkpoint: the grace that clusters give is often 30 s

OnLine = Callable[[dict[str, Any]], None]


def train(
    job: Job, run: Run, data: Any, spec: dict[str, Any], on_line: OnLine | None = None, distill: Any = None
) -> None:
    """Train the dense model on `scaling.workers` Ray Train workers, resuming from the run's checkpoints.

    Args:
        job: the job.
        run: its folder; `checkpoints/`, `metrics.jsonl`, `attempts.jsonl` and `workers/` are written there.
        data: raydeep.data.stream.Shared.
        spec: of the network.
        on_line: called in a thread with each new line of metrics.jsonl and attempts.jsonl.
        distill: makes, on each worker, the loss that a teacher has a part in (compress/teachers.py: OnWorker), or None.

    Raises:
        RaydeepError: what a worker raised.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from raydeep.train import backend, worker

    scaling = job.scaling
    workers = run.path / "workers"
    for old in workers.glob("*"):
        if old.suffix != ".step":  # that of the last attempt is told as what is done again
            old.unlink()
    mirror.forget(workers)
    trainer = _trainer(workers)(
        worker.work,
        train_loop_config={
            "job": job.model_dump(mode="json"), "run": run.name, "data": data, "spec": spec, "distill": distill,
        },
        scaling_config=ScalingConfig(
            num_workers=_number(scaling),  # type: ignore[arg-type]
            use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
            placement_strategy={None: "PACK", 1: "STRICT_SPREAD"}.get(scaling.workers_per_node, "SPREAD"),
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,  # type: ignore[call-arg]
        ),
        torch_config=backend.Torch(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"ray-{time.time_ns():x}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
        ),
    )  # fmt: skip
    lines = ["metrics.jsonl", "attempts.jsonl"]
    with follow([run.path / name for name in lines], on_line):
        try:
            with _own_signals():
                trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C
            signal.raise_signal(trainer.stopped_by or signal.SIGINT)
            raise KeyboardInterrupt from None
        except Exception as err:
            with suppress(StorageError):
                mirror.pull(workers)
            raise _cause(err, workers) from err
    mirror.pull(run.path, lambda name: name in lines or name.startswith("workers/"))
    if (workers / "stalled.json").exists():
        raise TrainError(control.say_stall(read_json(workers / "stalled.json")))
    if (workers / "error.json").exists():
        raise TrainError(read_json(workers / "error.json")["error"])


def _number(scaling: Scaling) -> int | tuple[int, int]:
    """Workers to ask for; on a Ray of this machine alone not more than it has cores."""
    if not scaling.elastic:
        return scaling.min_workers
    most = scaling.max_workers
    if not os.environ.get("RAY_ADDRESS"):
        most = max(scaling.min_workers, min(most, int(usable_cores() / scaling.cpus_per_worker)))
    return (scaling.min_workers, most)


def _trainer(workers: Path) -> Any:
    """TorchTrainer, but Ctrl-C and SIGTERM first have workers that have begun write a checkpoint.

    A second one does not wait for it; while workers start, there is nothing to wait for.
    """
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        stopped_by: signal.Signals | None = None

        def _create_default_callbacks(self) -> list[Any]:
            """Without what a training here never uses: each is an actor to start (fit to first step: 20 → 13 s)."""
            callbacks: list[Any] = super()._create_default_callbacks()  # type: ignore[misc]
            if os.environ.get("RAY_ADDRESS"):  # there, placement groups may outlive a killed driver
                return callbacks
            return [c for c in callbacks if type(c).__name__ not in UNUSED_CALLBACKS]

        def _register_sigint_handler(self, controller: Any) -> None:
            super()._register_sigint_handler(controller)  # type: ignore[misc]
            stop: Any = signal.getsignal(signal.SIGINT)

            def save_then_stop(number: int, frame: Any) -> None:
                ask, end = workers / "ask", time.monotonic() + SAVE_FIRST_S
                if self.stopped_by is None:
                    self.stopped_by = signal.Signals(number)
                    if mirror.address(workers) is None and not any(workers.glob("rank-*.json")):
                        raise SystemExit  # nothing to save, and Ray's controller is deaf until its workers have started
                    with suppress(OSError, StorageError):
                        workers.mkdir(parents=True, exist_ok=True)  # of a run in a bucket they may all be elsewhere
                        ask.write_bytes(b"save")
                        mirror.push(ask)
                        while mirror.exists(ask) and time.monotonic() < end:
                            time.sleep(0.05 if mirror.address(ask) is None else 0.5)
                stop(signal.SIGINT, frame)

            signal.signal(signal.SIGINT, save_then_stop)
            signal.signal(signal.SIGTERM, save_then_stop)

    return Trainer


@contextmanager
def _own_signals() -> Iterator[None]:
    """Put back the handlers that Ray Train leaves behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _cause(err: BaseException, workers: Path) -> BaseException:
    """What stopped the trainer: the RaydeepError of a worker, else the first error that a worker noted."""
    failures = getattr(err, "worker_failures", None) or {}
    for failure in [*failures.values(), err]:
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, RaydeepError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    noted = [read_json(path) for path in workers.glob("failed-*.json")]
    if noted:  # the others' broken connections came later
        first = min(noted, key=lambda note: note["time"])
        where = f"rank {first['rank']}, step {first['step']} ({first['stage']})"
        return TrainError(f"{where}: {first['error']}\n{first['traceback'].rstrip()}")
    if failures:
        ranks = ", ".join(map(str, sorted(failures)))
        said = str(next(iter(failures.values()))).strip().splitlines()
        return TrainError(
            f"worker {ranks} died more often than scaling.max_failures allows: "
            f"{said[0] if said else 'no reason given'}; go on from the last checkpoint with --resume"
        )
    return err


@contextmanager
def follow(paths: list[Path], on_line: OnLine | None) -> Iterator[None]:
    """Call `on_line` with each line that is appended to JSONL files while the block runs."""
    if on_line is None:
        yield
        return
    seen = {path: len(parse_lines(mirror.read(path) or b"")) for path in paths}
    stop = threading.Event()
    beat = 0.25 if mirror.address(paths[0]) is None else 1.0

    def look() -> None:
        for path in paths:
            for line in parse_lines(mirror.read(path) or b"")[seen[path] :]:
                seen[path] += 1
                on_line(line)

    def watch() -> None:
        while True:
            last = stop.wait(beat)
            with suppress(StorageError):  # seen a second later, or after the training
                look()
            if last:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

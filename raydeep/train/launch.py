"""Starts Ray, sized for the machine, and runs the training loop on Ray Train's TorchTrainer."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from raydeep.config import Job, Scaling
from raydeep.errors import RaydeepError, ResourceError, TrainError
from raydeep.run import Run, read_json, read_lines, usable_cores
from raydeep.train import control, sizing

# Read when Ray is imported: Ray's own progress lines stay off the terminal, its train controller polls often
# enough that a report costs 0.15 s and not 2 s.
RAY_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no accuracy to report
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
UNUSED_CALLBACKS = ("DatasetsCallback", "PlacementGroupCleanerCallback", "PreemptionCallback")
SAVE_FIRST_S = 10.0  # most that a stop waits for a checkpoint: the grace that clusters give is often 30 s
NOISY = ("ray", "ray.data", "ray.train", "ray.tune", "ray.tune.tuner", "optuna")

OnLine = Callable[[dict[str, Any]], None]


@contextmanager
def cluster(job: Job, log: Path) -> Iterator[sizing.Plan]:
    """A Ray to work on: the cluster that RAY_ADDRESS names, else a private one sized for this machine.

    Args:
        job: for its scaling and search sections.
        log: file that takes what Ray says.

    Raises:
        ResourceError: the job's plan can't be placed.
    """
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    address = os.environ.get("RAY_ADDRESS")
    scaling, search = job.scaling, job.search
    if not address:  # refuse before the seconds that starting takes
        import torch

        gpus = torch.cuda.device_count() if scaling.use_gpu else 0
        plan = sizing.plan(
            usable_cores(), scaling.min_workers, scaling.cpus_per_worker, search.concurrent, gpus=gpus,
            use_gpu=scaling.use_gpu,
        )  # fmt: skip
        most = scaling.workers_per_node
        if most is not None and scaling.min_workers > most:
            raise ResourceError(
                f"scaling.workers_per_node {most}: this machine is one node, scaling.workers {scaling.min_workers} do "
                f"not fit; lower workers, raise workers_per_node, or set RAY_ADDRESS"
            )
    import ray

    restore = _quiet(log)
    _errors_to_log()
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _join(address)
            there = ray.cluster_resources()
            plan = sizing.plan(
                int(there.get("CPU", 0)), scaling.min_workers, scaling.cpus_per_worker, search.concurrent,
                gpus=int(there.get("GPU", 0)), use_gpu=scaling.use_gpu, where="the cluster",
            )  # fmt: skip
        else:
            ray.init(
                address="local", num_cpus=plan.num_cpus, include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR, _temp_dir=os.environ.get("RAY_TMPDIR"),
            )  # fmt: skip
        import ray.data
        import ray.train  # both set up loggers of their own when imported

        _quiet_loggers(log)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # ray.init has put its own in place, which aborts
        yield plan
    finally:
        ray.shutdown()
        restore()


def _join(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as err:  # ConnectionError, AuthenticationError and others: nothing has started yet
        raise ResourceError(
            f"no Ray cluster lets this process in at RAY_ADDRESS {address}: {str(err).splitlines()[0]}; start it, "
            f"unset RAY_ADDRESS to run on this machine, or, if it asks for a token, set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH=FILE"
        ) from None


def _quiet(log: Path) -> Callable[[], None]:
    """Send Python warnings and Ray's loggers to a file; returns what undoes it."""
    import warnings

    saved = warnings.showwarning
    handler = logging.FileHandler(log, delay=True)
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    logger = logging.getLogger("py.warnings")
    logger.addHandler(handler)
    logger.propagate = False
    _HANDLERS[log] = handler

    def restore() -> None:
        logging.captureWarnings(False)
        warnings.showwarning = saved
        _HANDLERS.pop(log, None)
        for name in (*NOISY, "py.warnings"):
            logging.getLogger(name).removeHandler(handler)
        handler.close()

    return restore


def _errors_to_log() -> None:
    """Send what raylets say of died workers to the log: Ray prints it on the terminal and has no setting for it."""
    from ray._private import worker

    def write(data: dict[str, Any], **_: Any) -> None:
        logging.getLogger("ray").warning("%s: %s", data.get("pid"), "\n".join(data["lines"]))

    worker.print_to_stdstream = write  # type: ignore[assignment]


_HANDLERS: dict[Path, logging.Handler] = {}


def _quiet_loggers(log: Path) -> None:
    handler = _HANDLERS[log]
    for name in NOISY:  # ray.init has just set up its own stream handlers: take them out
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.propagate = False


def train(job: Job, run: Run, data: Any, spec: dict[str, Any], on_line: OnLine | None = None) -> None:
    """Train the dense model on `scaling.workers` Ray Train workers, resuming from the run's checkpoints.

    Args:
        job: the job.
        run: its folder; `checkpoints/`, `metrics.jsonl`, `attempts.jsonl` and `workers/` are written there.
        data: raydeep.data.stream.Shared.
        spec: of the network.
        on_line: called in a thread with each new line of metrics.jsonl and attempts.jsonl.

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
    trainer = _trainer(workers)(
        worker.work,
        train_loop_config={"job": job.model_dump(mode="json"), "run": str(run.path), "data": data, "spec": spec},
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
    with follow([run.path / "metrics.jsonl", run.path / "attempts.jsonl"], on_line):
        try:
            with _own_signals():
                trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C
            signal.raise_signal(trainer.stopped_by or signal.SIGINT)
            raise KeyboardInterrupt from None
        except Exception as err:
            raise _cause(err, workers) from err
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
    """TorchTrainer, but Ctrl-C and SIGTERM first have the workers write a checkpoint; a second one does not wait."""
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
                    with suppress(OSError):
                        ask.touch()
                    while ask.exists() and time.monotonic() < end:
                        time.sleep(0.05)
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
    seen = {path: len(read_lines(path)) for path in paths}
    stop = threading.Event()

    def watch() -> None:
        while True:
            last = stop.wait(0.25)
            for path in paths:
                for line in read_lines(path)[seen[path] :]:
                    seen[path] += 1
                    on_line(line)
            if last:
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

"""Starts Ray, sized for the machine, and runs the training loop on Ray Train's TorchTrainer."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydeep.config import Job
from raydeep.errors import RaydeepError, ResourceError, TrainError
from raydeep.run import Run, append_line, read_json, read_lines, usable_cores, write_bytes, write_json
from raydeep.train import sizing

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
            usable_cores(), scaling.workers, scaling.cpus_per_worker, search.concurrent, gpus=gpus,
            use_gpu=scaling.use_gpu,
        )  # fmt: skip
    import ray

    restore = _quiet(log)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _join(address)
            there = ray.cluster_resources()
            plan = sizing.plan(
                int(there.get("CPU", 0)), scaling.workers, scaling.cpus_per_worker, search.concurrent,
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
        run: its folder; `checkpoints/` and `metrics.jsonl` are written there.
        data: raydeep.data.stream.Shared.
        spec: of the network.
        on_line: called in a thread with each new line of metrics.jsonl.

    Raises:
        RaydeepError: what a worker raised.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    scaling = job.scaling
    error = run.path / "checkpoints" / "error.json"
    error.unlink(missing_ok=True)
    resources = {"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job.model_dump(mode="json"), "run": str(run.path), "data": data, "spec": spec},
        scaling_config=ScalingConfig(
            num_workers=scaling.workers, use_gpu=scaling.use_gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(
            name=f"ray-{time.time_ns():x}",
            storage_path=str(run.path / "ray"),
            failure_config=FailureConfig(max_failures=scaling.max_failures),
        ),
    )
    with follow(run.path / "metrics.jsonl", on_line):
        try:
            trainer.fit()
        except SystemExit:  # Ray Train's own answer to Ctrl-C
            raise KeyboardInterrupt from None
        except Exception as err:
            raise _cause(err) from err
    if error.exists():
        raise TrainError(read_json(error)["error"])


def _cause(err: BaseException) -> BaseException:
    """The RaydeepError that a worker raised, if that is what stopped the trainer."""
    failures = getattr(err, "worker_failures", None) or {}
    for failure in [*failures.values(), err]:
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, RaydeepError):
                return seen
            seen = getattr(seen, "cause", None) or seen.__cause__
    return err


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker of the trainer."""
    import ray.train
    import torch

    from raydeep.data.augment import Augmenter
    from raydeep.data.batches import Batches, eval_batches
    from raydeep.model import artifact
    from raydeep.train import checkpoint, losses, parallel
    from raydeep.train.loop import fit
    from raydeep.train.metrics import Score, evaluate

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    job, folder = Job.model_validate(config["job"]), Path(config["run"])
    torch.set_num_threads(max(1, usable_cores() // context.get_local_world_size()))
    device = torch.device(f"cuda:{torch.cuda.current_device()}" if job.scaling.use_gpu else "cpu")
    data, cfg = config["data"].get(), job.train
    try:
        torch.manual_seed(job.seed)
        model = artifact.build(config["spec"]).to(device)
        batches = Batches(
            data.train, Augmenter(job.augment, data.mean, data.std), cfg.batch_size, job.seed,
            rank=rank, world=world, accumulate=cfg.accumulate, drop_last=cfg.drop_last, device=device,
        )  # fmt: skip

        def score(model: torch.nn.Module) -> Score:
            part = eval_batches(data.val, data.mean, data.std, cfg.eval_batch_size, rank, world, device)
            return evaluate(parallel.inner(model), part, len(data.val.labels), device, cfg.eval_flip)

        def on_epoch(metrics: dict[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if rank == 0:
                append_line(folder / "metrics.jsonl", {"stage": "train", **metrics})

        def save(moment: checkpoint.Moment, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
            if rank == 0:
                checkpoint.save(folder / "checkpoints", moment, model, optimizer)

        resume = checkpoint.latest(folder / "checkpoints")
        if rank == 0:
            checkpoint.clean(folder / "checkpoints")
            _forget(folder / "metrics.jsonl", resume.epoch if resume else 0)
        fit(
            model, losses.cross_entropy(cfg.label_smoothing), batches, cfg, seed=job.seed, evaluate=score,
            on_epoch=on_epoch, save=save, resume=resume,
        )  # fmt: skip
    except TrainError as err:  # raised by all workers alike: a result, not a failure to retry
        if rank == 0:
            write_json(folder / "checkpoints" / "error.json", {"error": str(err)})
    ray.train.report({"done": 1})


def _forget(path: Path, epochs: int) -> None:
    """Drop the lines of epochs that a resumed training does again: they were told before they were saved."""
    lines = read_lines(path)
    kept = [line for line in lines if line.get("stage") != "train" or line["epoch"] <= epochs]
    if len(kept) < len(lines):
        write_bytes(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


@contextmanager
def follow(path: Path, on_line: OnLine | None) -> Iterator[None]:
    """Call `on_line` with each line that is appended to a JSONL file while the block runs."""
    if on_line is None:
        yield
        return
    seen = len(read_lines(path))
    stop = threading.Event()

    def watch() -> None:
        nonlocal seen
        while True:
            last = stop.wait(0.25)
            for line in read_lines(path)[seen:]:
                seen += 1
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

"""A Ray to work on: joined, or started for this machine and stopped; quiet on the terminal."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydeep.config import Job
from raydeep.errors import ResourceError
from raydeep.machine import usable_cores
from raydeep.train import sizing

# Read when Ray is imported: Ray's own progress lines stay off the terminal, its train controller polls often
# enough that a report costs 0.15 s and not 2 s.
RAY_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent unless somebody sets it
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial has no accuracy to report
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # read when a process starts: glibc keeps a batch's activations instead of giving them back and faulting them in
    # again, which costs training on a CPU a tenth to a third
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
}
KNOCK_S = 10.0  # for a GCS to take a connection
NOISY = ("ray", "ray.data", "ray.train", "ray.tune", "ray.tune.tuner", "optuna")


@contextmanager
def cluster(job: Job, log: Path) -> Iterator[sizing.Plan]:
    """A Ray to work on: the cluster that RAY_ADDRESS names, else a private one sized for this machine.

    Args:
        job: for its scaling and search sections.
        log: file that takes what Ray says.

    Raises:
        ResourceError: the job's plan can't be placed, Ray does not start, or this process is connected to one.
    """
    for key, value in RAY_ENV.items():
        os.environ.setdefault(key, value)
    if job.scaling.elastic:  # after a lost node, the old size is not waited for so long
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    address = os.environ.get("RAY_ADDRESS")
    scaling, search = job.scaling, job.search
    if not address:  # refuse before the seconds that starting takes
        import torch

        gpus = torch.cuda.device_count() if scaling.use_gpu else 0
        plan = sizing.plan(
            usable_cores(), scaling.min_workers, scaling.cpus_per_worker, search, gpus=gpus,
            use_gpu=scaling.use_gpu,
        )  # fmt: skip
        most = scaling.workers_per_node
        if most is not None and scaling.min_workers > most:
            raise ResourceError(
                f"scaling.workers_per_node {most}: this machine is one node, scaling.workers {scaling.min_workers} do "
                f"not fit; lower workers, raise workers_per_node, or set RAY_ADDRESS"
            )
    import ray

    if ray.is_initialized():
        raise ResourceError(
            "this process is connected to a Ray already, which this would end: call ray.shutdown() before, or run the "
            "command in a process of its own; RAY_ADDRESS names a cluster to join"
        )
    restore = _quiet(log)
    errors_to_log()
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            join(address)
            there = ray.cluster_resources()
            plan = sizing.plan(
                int(there.get("CPU", 0)), scaling.min_workers, scaling.cpus_per_worker, search,
                gpus=int(there.get("GPU", 0)), use_gpu=scaling.use_gpu, where="the cluster",
            )  # fmt: skip
        else:
            try:
                ray.init(
                    address="local", num_cpus=plan.num_cpus, include_dashboard=False, log_to_driver=False,
                    logging_level=logging.ERROR, _temp_dir=os.environ.get("RAY_TMPDIR"),
                )  # fmt: skip
            except Exception as err:  # Ray raises this very class where a node does not come up in time
                raise ResourceError(
                    f"Ray does not start on this machine: {(str(err).splitlines() or [type(err).__name__])[0]} Is it "
                    f"overloaded, or {os.environ.get('RAY_TMPDIR') or '/tmp'} full?"
                ) from err
        import ray.data
        import ray.train  # both set up loggers of their own when imported

        _quiet_loggers(log)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_term)  # ray.init has put its own in place, which aborts
        yield plan
    finally:
        ray.shutdown()
        restore()


def join(address: str) -> None:
    """Connect to the cluster whose GCS is at an address.

    Raises:
        ResourceError: it is not there, or lets nobody in who has this process's token or versions.
    """
    import ray

    host, _, port = address.rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for ten minutes
            socket.create_connection((host.strip("[]"), int(port)), KNOCK_S).close()
        ray.init(
            address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": _workers_env()}
        )  # fmt: skip
    except Exception as err:  # ConnectionError, AuthenticationError and others: nothing has started yet
        said = str(err).splitlines() or [type(err).__name__]
        reason = " ".join(" ".join(said).split()) if said[0].startswith("Version mismatch") else said[0]
        raise ResourceError(
            f"no Ray cluster lets this process in at RAY_ADDRESS {address}: {reason}; start it, "
            f"unset RAY_ADDRESS to run on this machine, or, if it asks for a token, set RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH=FILE"
        ) from None


def _workers_env() -> dict[str, str]:
    """RAY_ENV for the processes of another's cluster, which do not inherit it; what the job was submitted with stays.

    Ray refuses a variable that both name, even with one value.
    """
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("runtime_env", {})
    train = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
    wanted = {**RAY_ENV, **({train: os.environ[train]} if train in os.environ else {})}
    return {key: value for key, value in wanted.items() if key not in submitted.get("env_vars", {})}


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


def errors_to_log() -> None:
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

"""The search on Ray Tune: trials on reused actors, or on several workers each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune

from raydeep import mirror
from raydeep.config import Job
from raydeep.disk import read_json, write_json
from raydeep.errors import StorageError
from raydeep.machine import usable_cores
from raydeep.search.engine import Engine
from raydeep.search.scheduler import LIVES, START_S, ParetoHalving, Proposer
from raydeep.search.trial import Bench, limit_memory, trial_folder
from raydeep.search.work import Work, label

if TYPE_CHECKING:
    from raydeep.compress.common import Common
    from raydeep.data.stream import Shared

LOOK_S = 5.0  # between looks at how large a cluster is
DRIVER_CPUS = 0.1  # of a trial that is itself the driver of workers


class TrialActor(tune.Trainable):
    """One piece of work after another in one process: torch is imported once."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        """Keep the piece of work, and what all trials share."""
        self.work = config
        if shared:
            self.shared, self.started = shared, False
            self.job = Job.model_validate(shared["job"])

    @cached_property
    def bench(self) -> Bench:
        """Where this process works; where trials have workers of their own, on rungs without training only."""
        return _bench(self.shared, self.job, self.shared["threads"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next piece of work."""
        self.work = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Work a rung through."""
        work = Work(**{name: self.work[name] for name in Work._fields})
        alone = self.job.search.workers_per_trial == 1 or work.epochs == 0
        found = self.bench.do(work) if alone else _on_workers(work, self.job, self.shared)
        self._let_start()
        return found

    def _let_start(self) -> None:
        """Wait for processes that are starting.

        Tune gives the process of a trial that ends to one that waits for a new process, and cancels that: with trials
        shorter than a start, a second process would never come to be.
        """
        end, which = time.monotonic() + START_S, 1 if self.started else 0
        self.started = True
        file = mirror.place(self.shared["starting"])
        beat = 0.05 if mirror.address(file) is None else 0.5
        with suppress(StorageError):  # then nobody is waited for
            while (told := mirror.read(file)) and json.loads(told)[which] and time.monotonic() < end:
                time.sleep(beat)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a rung leaves what the next one goes on from in the trial's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see save_checkpoint."""


def _bench(shared: dict[str, Any], job: Job, threads: int) -> Bench:
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if job.scaling.use_gpu else "cpu"
    data = shared["data"].get()
    limit_memory(job.search.trial_memory_bytes)
    return Bench(
        job, mirror.place(shared["run"]), data, shared["common"].receive(data, device), shared["dense"], device
    )


# a trial on several workers


def _on_workers(work: Work, job: Job, shared: dict[str, Any]) -> dict[str, Any]:
    """The same on `workers_per_trial` workers of a TorchTrainer; what starting them costs is told apart."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    begun = time.perf_counter()
    run = mirror.place(shared["run"])
    answer = trial_folder(run, work.trial) / f"answer-{work.rung}.json"
    mirror.drop(answer)
    scaling = job.scaling
    name = f"{label(work.trial)}-{work.rung}-{time.time_ns():x}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"work": work._asdict(), "shared": shared, "answer": mirror.name(answer)},
        scaling_config=ScalingConfig(
            num_workers=job.search.workers_per_trial, use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(name=name, storage_path=str(run / "ray")),
    )  # fmt: skip
    try:
        trainer.fit()
        mirror.fetch(answer)
        found: dict[str, Any] = read_json(answer)
    except Exception as err:  # as Bench.do: the search goes on
        found = {"status": "failed", "error": f"{type(err).__name__}: {err}", "seconds": 0.0, "cpu_seconds": 0.0}
    took = time.perf_counter() - begun
    return {**found, "seconds": took, "overhead_seconds": took - found["seconds"]}


def _work(config: dict[str, Any]) -> None:
    """On each worker: the same steps, gradients averaged; worker 0 keeps what comes of them."""
    import ray.train
    import torch.distributed as dist

    shared = config["shared"]
    job = Job.model_validate(shared["job"])
    context = ray.train.get_context()
    bench = _bench(shared, job, max(1, usable_cores() // context.get_local_world_size()))
    bench.keeps = context.get_world_rank() == 0
    work = Work(**config["work"])
    if bench.keeps:
        bench.folder(work)
    dist.barrier()
    found = bench.do(work)
    seconds: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(seconds, found["cpu_seconds"])
    if bench.keeps:
        answer = mirror.place(config["answer"])
        write_json(answer, {**found, "cpu_seconds": sum(seconds)})
        mirror.push(answer)
    dist.barrier()


# all of them


def room_for(job: Job, most: int) -> Callable[[], int]:
    """Trials that may run at once: `most` on a Ray of this machine, on a cluster as many as it has room for now."""
    if not os.environ.get("RAY_ADDRESS"):
        return lambda: most
    seen = {"at": -LOOK_S, "room": most}

    def room() -> int:
        if time.monotonic() - seen["at"] > LOOK_S:
            there = ray.cluster_resources()
            found = job.search.room(
                there.get("CPU", 0.0), there.get("GPU", 0.0), job.scaling.cpus_per_worker, job.scaling.use_gpu
            )
            seen.update(at=time.monotonic(), room=max(1, found))
        return int(seen["room"])

    return room


def callbacks(job: Job, run_id: str) -> list[Any]:
    """Ray's own callback for Weights & Biases, where search.track asks for it: a run a trial, grouped."""
    if "wandb" not in job.search.track:
        return []
    from ray.air.integrations.wandb import WandbLoggerCallback

    return [WandbLoggerCallback(project=job.name, group=run_id, log_config=True)]


def run_trials(
    engine: Engine,
    run: Path,
    data: Shared,
    common: Common,
    concurrent: int,
    loggers: list[Any] | None = None,
    actor: type[TrialActor] = TrialActor,
) -> None:
    """Run a search to its end, from where its ledger is; the engine is finished then, unless it was interrupted.

    Args:
        engine: of the search.
        run: run folder; `trials/` is written there.
        data: the dataset, shared.
        common: what trials share, without the data (`sent`).
        concurrent: trials at once on a Ray of this machine.
        loggers: callbacks of Ray Tune.
        actor: what works on trials.
    """
    if engine.peek() is None:
        engine.finish()
        return
    job = engine.job
    cfg, alone = job.search, job.search.workers_per_trial == 1
    starting = run / "ray" / "starting.json"
    room = room_for(job, concurrent)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, room()))  # all may start at once; `room` bounds them
    scheduler = ParetoHalving(engine, room, starting)
    trainable = tune.with_parameters(
        actor, job=job.model_dump(mode="json"), run=mirror.name(run), data=data, common=common,
        dense=dict(engine.dense), starting=mirror.name(starting),
        threads=max(1, usable_cores() // concurrent) if alone else 1,
    )  # fmt: skip
    gpu = {"gpu": cfg.gpus_per_trial} if job.scaling.use_gpu and alone else {}
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": cfg.cpus_per_trial if alone else DRIVER_CPUS, **gpu}),
        tune_config=tune.TuneConfig(
            search_alg=Proposer(scheduler), scheduler=scheduler, num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns():x}", storage_path=str(run / "ray"), verbose=0, callbacks=loggers,
            failure_config=tune.FailureConfig(max_failures=LIVES - 1),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # it wants a folder that all nodes share
        ),
    )  # fmt: skip
    tuner.fit()
    if engine.finished:
        engine.finish()

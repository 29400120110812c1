"""The search on Ray Tune: trials on reused actors, a scheduler and a searcher that ask one engine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raydeep.config import Job
from raydeep.run import read_json, usable_cores, write_json
from raydeep.search.engine import Engine, Work
from raydeep.search.ledger import Ledger
from raydeep.search.trial import Bench, limit_memory, trial_folder

if TYPE_CHECKING:
    from raydeep.compress.common import Common
    from raydeep.data.stream import Shared

LOOK_S = 5.0  # between looks at how large a cluster is
DRIVER_CPUS = 0.1  # of a trial that is itself the driver of workers
START_S = 30.0  # most that a process may take to start while others wait for it
GRACE_S = (0.25, 1.0)  # a trial that waits longer gets a new process: for new processes to know, and for others
LIVES = 3  # processes that a trial may lose, less one


class ParetoHalving(TrialScheduler):
    """Multi-objective asynchronous successive halving (rungs.py): a trial that came through a rung waits there.

    It waits without a process and without Tune's checkpoint: what it goes on from lies in its own folder. Ray's own
    schedulers judge by one metric.
    """

    def __init__(self, engine: Engine, room: Callable[[], int], file: Path) -> None:
        """Begin.

        Args:
            engine: decides and writes down.
            room: trials that may run at once, as of now.
            file: where trials read how many of them are starting.
        """
        super().__init__()
        self.engine, self.room = engine, room
        self.works: dict[str, Work] = {}  # Tune's name of a trial → its last piece of work
        self.errors: dict[str, str] = {}  # Tune's name of a trial → what its process died of
        self.waiting: dict[int, Trial] = {}  # number → Tune's trial
        self.pending: dict[Trial, float] = {}  # Tune's trials without a process → since when
        self.file, self.told = file, [0, 0]

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune's metric and mode are of one objective: the engine has its own."""
        return True

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Tune has a new trial, or starts one again whose process died."""
        self.pending[trial] = time.monotonic()

    def _tell_starting(self) -> None:
        """Say how many trials wait for a process of their own: see TrialActor._let_start."""
        now = time.monotonic()
        self.pending = {t: at for t, at in self.pending.items() if t.status == Trial.PENDING}
        ages = [now - at for at in self.pending.values() if now - at < START_S]
        told = [sum(age > grace for age in ages) for grace in GRACE_S]
        if told != self.told:
            write_json(self.file, told)
            self.told = told

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """A trial came through a rung, or failed."""
        work = self.works[trial.trial_id]
        if self.engine.take(work, result, retries=trial.run_metadata.num_failures):
            return TrialScheduler.STOP
        self.waiting[work.trial] = trial
        tune_controller.pause_trial(trial, should_checkpoint=False)
        return TrialScheduler.NOOP

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A process has died; whether for good, the searcher is told."""
        self.errors[trial.trial_id] = str(trial.get_error() or "no reason is known")

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has ended."""

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial was taken out while it waited."""

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """A waiting trial whose turn it is; at the end of the search all that wait are taken out."""
        self._tell_starting()
        work = self.engine.peek()
        if work is None:
            if not self.engine.running:
                for _, trial in sorted(self.waiting.items()):
                    tune_controller.stop_trial(trial)
                self.waiting.clear()
            return None
        if work.trial not in self.waiting or self.engine.running >= self.room():
            return None
        trial = self.waiting.pop(work.trial)
        self.engine.begin(work)
        self.works[trial.trial_id] = work
        trial.set_config(work._asdict())
        self.pending[trial] = time.monotonic()
        return trial

    def debug_string(self) -> str:
        """For Tune's status lines."""
        return f"ParetoHalving: {self.engine.running} run, {len(self.waiting)} wait"

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its own state of a search, but the ledger is what this one resumes from."""
        return {}


class Proposer(Searcher):
    """Asks the engine for new trials, and for those that waited when an earlier session of the search was cut off."""

    def __init__(self, scheduler: ParetoHalving) -> None:
        super().__init__(metric="val_accuracy", mode="max")  # Tune asks for one; the engine has its own objectives
        self.scheduler, self.engine = scheduler, scheduler.engine

    def suggest(self, trial_id: str) -> Any:
        """The next trial, None: not now, or FINISHED."""
        work = self.engine.peek()
        if work is None:
            return None if self.engine.running or self.scheduler.waiting else Searcher.FINISHED
        if work.trial in self.scheduler.waiting or self.engine.running >= self.scheduler.room():
            return None
        self.engine.begin(work)
        self.scheduler.works[trial_id] = work
        return work._asdict()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Of trials that ended by themselves the engine knows already; here it hears of the others."""
        work = self.scheduler.works.get(trial_id)
        if error and work is not None and work.trial not in self.engine.ledger.rows:
            told = self.scheduler.errors.get(trial_id, "no reason is known").strip()
            died = f"{told}\nthe trial's process died {LIVES} times, this is what was last heard of it"
            self.engine.lose(work, died, retries=LIVES - 1)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a search resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see save."""


class TrialActor(tune.Trainable):
    """One piece of work after another in one process: torch is imported once."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        """Keep the piece of work, and what all trials share."""
        self.work = config
        if shared:
            self.shared, self.started = shared, False
            self.job = Job.model_validate(shared["job"])
            if self.job.search.workers_per_trial == 1 or self.job.search.ladder(1)[0] == 0:
                self.bench = _bench(shared, self.job, shared["threads"])

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
        file = Path(self.shared["starting"])
        while file.exists() and read_json(file)[which] and time.monotonic() < end:
            time.sleep(0.05)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a rung leaves what the next one goes on from in the trial's folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see save_checkpoint."""


def _bench(shared: Mapping[str, Any], job: Job, threads: int) -> Bench:
    import torch

    torch.set_num_threads(threads)
    device = "cuda" if job.scaling.use_gpu else "cpu"
    data = shared["data"].get()
    limit_memory(job.search.trial_memory_bytes)
    return Bench(job, Path(shared["run"]), data, shared["common"].receive(data), shared["dense"], device)


# a trial on several workers


def _on_workers(work: Work, job: Job, shared: dict[str, Any]) -> dict[str, Any]:
    """The same on `workers_per_trial` workers of a TorchTrainer; what starting them costs is told apart."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    begun = time.perf_counter()
    folder = trial_folder(Path(shared["run"]), work.trial)
    answer = folder / f"answer-{work.rung}.json"
    answer.unlink(missing_ok=True)
    scaling = job.scaling
    name = f"t{work.trial:03d}-{work.rung}-{time.time_ns():x}"
    trainer = TorchTrainer(
        _work,
        train_loop_config={"work": work._asdict(), "shared": shared, "answer": str(answer)},
        scaling_config=ScalingConfig(
            num_workers=job.search.workers_per_trial, use_gpu=scaling.use_gpu,
            resources_per_worker={"CPU": scaling.cpus_per_worker, **({"GPU": 1} if scaling.use_gpu else {})},
        ),
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        run_config=RunConfig(name=name, storage_path=str(Path(shared["run"]) / "ray")),
    )  # fmt: skip
    try:
        trainer.fit()
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
        write_json(Path(config["answer"]), {**found, "cpu_seconds": sum(seconds)})
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
    job: Job,
    run: Path,
    data: Shared,
    common: Common,
    dense: dict[str, Any],
    ledger: Ledger,
    concurrent: int,
    on_row: Callable[[dict[str, Any]], None] | None = None,
    loggers: list[Any] | None = None,
    actor: type[TrialActor] = TrialActor,
) -> Engine:
    """Run the search to its end, from where the ledger is.

    Args:
        job: the job.
        run: run folder; `trials/` is written there.
        data: the dataset, shared.
        common: what trials share.
        dense: measures of the dense model: the reference of the hypervolume.
        ledger: takes every result as it comes.
        concurrent: trials at once on a Ray of this machine.
        on_row: called with each new line of the ledger.
        loggers: callbacks of Ray Tune.
        actor: what works on trials.

    Returns:
        The engine, finished, unless the search was interrupted.
    """
    engine = Engine(job, ledger, dense, on_row)
    if engine.peek() is None:
        engine.finish()
        return engine
    cfg, alone = job.search, job.search.workers_per_trial == 1
    starting = run / "ray" / "starting.json"
    room = room_for(job, concurrent)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, room()))  # all may start at once; `room` bounds them
    scheduler = ParetoHalving(engine, room, starting)
    trainable = tune.with_parameters(
        actor, job=job.model_dump(mode="json"), run=str(run), data=data, common=common, dense=dense,
        starting=str(starting), threads=max(1, usable_cores() // concurrent) if alone else 1,
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
        ),
    )  # fmt: skip
    tuner.fit()
    if engine.finished:
        engine.finish()
    return engine

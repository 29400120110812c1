"""Trials on reused Ray Tune actors; Optuna proposes for two objectives; the ledger remembers."""

from __future__ import annotations

import hashlib
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from ray import tune
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

from raydeep.config import Job
from raydeep.run import usable_cores, write_bytes, write_json
from raydeep.search import space
from raydeep.search.ledger import Ledger

if TYPE_CHECKING:
    from raydeep.compress.plan import Dense
    from raydeep.data.stream import Shared

OBJECTIVES = ("val_accuracy", "bytes")  # up, down


def trial_seed(seed: int, trial: int) -> int:
    """Seed of a trial's recovery, from the job's seed and the trial's number."""
    return int(np.random.SeedSequence([seed, trial]).generate_state(1)[0] & 0x7FFFFFFF)


def trial_folder(run: Path, trial: int) -> Path:
    """Where a trial leaves its packed file and predictions."""
    return run / "trials" / f"t{trial:03d}"


class Proposer(Searcher):
    """Optuna's TPE over the job's space, never the same configuration twice; writes the ledger.

    Told only final results of whole trials. Replays the ledger, so that a resumed search goes on as one.
    """

    def __init__(self, job: Job, ledger: Ledger, on_trial: Callable[[dict[str, Any]], None] | None) -> None:
        super().__init__(metric=OBJECTIVES[0], mode="max")
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        cfg = job.search
        self.space, self.ledger, self.on_trial, self.seed = cfg.space, ledger, on_trial, job.seed
        sampler = optuna.samplers.TPESampler(seed=job.seed, n_startup_trials=cfg.startup_trials)
        self.study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        self.distributions: dict[str, optuna.distributions.BaseDistribution] = {
            k: optuna.distributions.CategoricalDistribution([space.plain(choice) for choice in v])
            for k, v in cfg.space.items()
        }
        self.all = space.everything(cfg.space)
        self.total = min(cfg.trials, len(self.all))
        self.results: dict[str, dict[str, Any] | None] = {}  # None while it runs
        self.asked: dict[str, tuple[int, Any, dict[str, Any]]] = {}
        self.numbers = iter(n for n in range(self.total) if n not in ledger.rows)
        self.fill = random.Random(job.seed)
        for row in sorted(ledger.rows.values(), key=lambda row: row["trial"]):
            self.results[space.key(row["config"])] = row
            self.study.add_trial(self._finished(row))

    def _finished(self, row: dict[str, Any]) -> optuna.trial.FrozenTrial:
        done = row["status"] == "done"
        return optuna.trial.create_trial(
            params=self._params(row["config"]), distributions=self.distributions,
            state=optuna.trial.TrialState.COMPLETE if done else optuna.trial.TrialState.FAIL,
            values=[row[name] for name in OBJECTIVES] if done else None,
        )  # fmt: skip

    def _params(self, config: dict[str, Any]) -> dict[str, Any]:
        """A point of Optuna's space that gives this configuration (see space.canonical)."""
        return {k: space.plain(config[k] if config[k] in choices else choices[0]) for k, choices in self.space.items()}

    def suggest(self, trial_id: str) -> Any:
        """The next configuration, as Ray Tune asks for it."""
        number = next(self.numbers, None)
        if number is None:
            return Searcher.FINISHED
        asked, config = self._new()
        self.results[space.key(config)] = None
        self.asked[trial_id] = (number, asked, config)
        return {"trial": number, "values": config, "seed": trial_seed(self.seed, number)}

    def _new(self) -> tuple[Any, dict[str, Any]]:
        for _ in range(20):
            asked = self.study.ask(self.distributions)
            config = space.canonical(
                {k: next(c for c in self.space[k] if space.plain(c) == v) for k, v in asked.params.items()}
            )
            if space.key(config) not in self.results:
                return asked, config
            row = self.results[space.key(config)]
            if row is not None and row["status"] == "done":
                self.study.tell(asked, [row[name] for name in OBJECTIVES])  # known: costs nothing, teaches
            else:
                self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        config = self.fill.choice([c for c in self.all if space.key(c) not in self.results])
        return None, config

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Ray Tune says that a trial ended."""
        if trial_id not in self.asked:
            return
        number, asked, config = self.asked.pop(trial_id)
        if error or not result or "status" not in result:
            result = {"status": "failed", "error": "the trial's process died"}
        row: dict[str, Any] = {"trial": number, "config": config, "seed": trial_seed(self.seed, number)}
        row |= {name: result[name] for name in ROW if name in result}
        if asked is None:
            self.study.add_trial(self._finished(row))
        elif row["status"] == "done":
            self.study.tell(asked, [row[name] for name in OBJECTIVES])
        else:
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)
        self.results[space.key(config)] = row
        self.ledger.add(row)
        if self.on_trial is not None:
            self.on_trial(row)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its own state of a search, but the ledger is what this one resumes from."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is what a search resumes from."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see save."""


ROW = (
    "status", "val_accuracy", "test_accuracy", "bytes", "compression_ratio", "sparsity", "parameters", "nonzeros",
    "seconds", "cpu_seconds", "artifact_sha256", "error",
)  # fmt: skip


class _TooManyFailed(Stopper):
    def __init__(self, ledger: Ledger, most: int) -> None:
        self.ledger, self.most = ledger, most

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return len(self.ledger.failed()) > self.most


class CompressionTrial(tune.Trainable):
    """One configuration after another in one process: torch is imported once."""

    def setup(self, config: dict[str, Any], **shared: Any) -> None:
        """Keep the configuration, and what all trials share."""
        self.proposal = config
        if shared:
            import torch

            torch.set_num_threads(max(1, usable_cores() // shared["concurrent"]))
            self.job = Job.model_validate(shared["job"])
            self.dense: Dense = shared["dense"]
            self.dense_bytes: int = shared["dense_bytes"]
            self.data = shared["data"].get()
            self.run_path = Path(shared["run"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next configuration."""
        self.proposal = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Compress, pack, score. An error is a result: the actor lives on."""
        start, cpu = time.perf_counter(), time.process_time()
        try:
            found = {"status": "done", "error": None, **self._compress()}
        except Exception:  # whatever one trial does, the search goes on; the traceback is in the ledger
            found = {"status": "failed", "error": traceback.format_exc(limit=8)}
        return {
            **found, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu, "done": True,
        }  # fmt: skip

    def _compress(self) -> dict[str, Any]:
        from raydeep.compress import cost
        from raydeep.compress.plan import compress

        job = self.job.with_values(self.proposal["values"])
        result = compress(job, self.dense, self.data, self.proposal["seed"], "cuda" if job.scaling.use_gpu else "cpu")
        folder = trial_folder(self.run_path, self.proposal["trial"])
        save_predictions(folder, result.val_predictions, result.test_predictions)
        if result.sensitivity:
            write_json(folder / "sensitivity.json", result.sensitivity)
        write_bytes(folder / "model.rdz", result.packed)
        return {
            "val_accuracy": result.val_accuracy,
            "test_accuracy": result.test_accuracy,
            "bytes": len(result.packed),
            "compression_ratio": self.dense_bytes / len(result.packed),
            "sparsity": 1 - result.weights.nonzeros / cost.weights(self.dense.tensors).parameters,  # zero or gone
            "parameters": result.cost.parameters,
            "nonzeros": result.cost.nonzeros,
            "artifact_sha256": hashlib.sha256(result.packed).hexdigest(),
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that is cut off starts again."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see save_checkpoint."""


def save_predictions(folder: Path, val: np.ndarray, test: np.ndarray) -> None:
    """Write `predictions.safetensors`."""
    from safetensors.numpy import save

    write_bytes(folder / "predictions.safetensors", save({"val": val, "test": test}))


def load_predictions(folder: Path) -> dict[str, np.ndarray]:
    """Read `predictions.safetensors`: `val` and `test`, int64 of shape [rows]."""
    from safetensors.numpy import load

    return load((folder / "predictions.safetensors").read_bytes())


def run_trials(
    job: Job,
    run: Path,
    data: Shared,
    dense: Dense,
    dense_bytes: int,
    ledger: Ledger,
    concurrent: int,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Run the trials that the ledger does not hold yet.

    Args:
        job: the job.
        run: run folder; `trials/` is written there.
        data: the dataset, shared.
        dense: the network that every trial starts from.
        dense_bytes: of its float32 file.
        ledger: takes every trial as it ends.
        concurrent: actors at once.
        on_trial: called with each new row of the ledger.
    """
    proposer = Proposer(job, ledger, on_trial)
    left = proposer.total - len(ledger.rows)
    if left <= 0:
        return
    trainable = tune.with_parameters(
        CompressionTrial, job=job.model_dump(mode="json"), run=str(run), data=data, dense=dense,
        dense_bytes=dense_bytes, concurrent=concurrent,
    )  # fmt: skip
    gpu = {"gpu": 1} if job.scaling.use_gpu else {}
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"cpu": 1, **gpu}),
        tune_config=tune.TuneConfig(
            search_alg=proposer, num_samples=left, max_concurrent_trials=min(concurrent, left), reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns():x}", storage_path=str(run / "ray"), verbose=0,
            stop=_TooManyFailed(ledger, job.search.max_failed), failure_config=tune.FailureConfig(max_failures=1),
        ),
    )  # fmt: skip
    tuner.fit()

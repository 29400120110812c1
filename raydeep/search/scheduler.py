"""What Ray Tune asks of a search: a scheduler and a searcher, the two doors of one engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from raydeep import mirror
from raydeep.disk import write_json
from raydeep.errors import StorageError
from raydeep.search.engine import Engine
from raydeep.search.work import Work

START_S = 30.0  # most that a process may take to start while others wait for it
GRACE_S = (0.25, 1.0)  # a trial that waits longer gets a new process: for new processes to know, and for others
LIVES = 3  # processes that a trial may have, one after the other


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
        """Say how many trials wait for a process of their own: see tune.TrialActor._let_start."""
        now = time.monotonic()
        self.pending = {t: at for t, at in self.pending.items() if t.status == Trial.PENDING}
        ages = [now - at for at in self.pending.values() if now - at < START_S]
        told = [sum(age > grace for age in ages) for grace in GRACE_S]
        if told != self.told:
            write_json(self.file, told)
            with suppress(StorageError):  # then some processes are not waited for
                mirror.push(self.file)
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

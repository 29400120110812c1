"""What a search does next, and what it writes down: pure, knows no Ray.

`peek` gives the next piece of work, `begin` takes it, `take` brings its result. Everything is a function of the job
and the ledger: a search that is opened again goes on as one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raydeep.config import Job
from raydeep.search import population, space
from raydeep.search.ledger import Ledger
from raydeep.search.objectives import Objectives
from raydeep.search.rungs import Rungs
from raydeep.search.sampler import Result, Sampler
from raydeep.search.space import Config
from raydeep.search.work import Work, label, trial_seed

THROUGH = "through all rungs"
RISE = 1e-9  # hypervolume that counts as more
SUMS = ("seconds", "cpu_seconds", "overhead_seconds")


@dataclass
class Trial:
    """A trial so far."""

    number: int
    config: Config
    seed: int
    rows: list[dict[str, Any]] = field(default_factory=list)  # a rung each
    best: dict[str, Any] | None = None  # of them: the one whose model will be the trial's
    running: bool = False
    ended: bool = False


class Engine:
    """The search of one job."""

    def __init__(
        self,
        job: Job,
        ledger: Ledger,
        dense: Mapping[str, Any],
        on_row: Callable[[Engine, dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin, or go on where the ledger ends.

        Args:
            job: the job.
            ledger: of this search.
            dense: measures of the dense model, by the names of a trial's.
            on_row: called with this and each new line of the ledger.
            clock: seconds.
        """
        self.job, self.cfg, self.ledger, self.dense, self.on_row = job, job.search, ledger, dense, on_row
        cfg = self.cfg
        self.objectives = Objectives.of(cfg)
        judged = dict(list(cfg.objectives.items())[:1]) if cfg.scheduler == "asha" else dict(cfg.objectives)
        self.judged = Objectives({str(k): v for k, v in judged.items()}, cfg.limits())
        self.ladder = cfg.ladder(job.train.epochs if cfg.trains else job.recover.epochs)
        self.rungs = Rungs(len(self.ladder), cfg.reduction, cfg.promote)
        fresh = int(np.random.SeedSequence([job.seed, len(ledger.lines)]).generate_state(1)[0])
        self.sampler = Sampler(cfg, len(cfg.objectives), fresh if ledger.lines else job.seed)
        most = min(cfg.trials, cfg.population) if cfg.scheduler == "pbt" else cfg.trials
        self.total = min(most, self.sampler.size or most)
        self.trials: dict[int, Trial] = {}
        self.number = 0  # of the next trial, or less
        self.offer: Config | None = None  # drawn, not yet begun
        self.stopped: str | None = None  # why nothing more begins
        self.volume, self.best_volume, self.since_rise = 0.0, 0.0, 0
        self.front: dict[int, Mapping[str, Any]] = {}  # trial → its best row, where no other beats it
        self.running = 0  # pieces of work that are begun and not back
        for row in ledger.lines:
            self._note(row)
            self._look_at_targets()
        self.front = {t.number: t.best for t in self.trials.values() if t.best is not None}
        self.clock, self.began = clock, clock() - (ledger.lines[-1]["at"] if ledger.lines else 0.0)
        for trial in list(self.trials.values()):
            if not trial.ended and len(trial.rows) == len(self.ladder):  # cut off between its last rung and its end
                self._write(self._ended(trial, "done", THROUGH))

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return not self.running and self.peek() is None

    def peek(self) -> Work | None:
        """The next piece of work; None: there is none, at least until something that runs is back."""
        cfg = self.cfg
        if self.stopped is None and cfg.minutes is not None and self.clock() - self.began >= 60 * cfg.minutes:
            self.stopped = f"search.minutes {cfg.minutes:g} are over"
        if self.stopped is not None:
            return None
        found = self._next_member() if cfg.scheduler == "pbt" else self._next_promoted()
        if found is not None or len(self.trials) >= self.total:
            return found
        if self.offer is None:
            self.offer = self.sampler.ask()
        if self.offer is None:
            self.total = len(self.trials)
            return None
        while self.number in self.trials:
            self.number += 1
        return self._work(Trial(self.number, self.offer, trial_seed(self.job.seed, self.number)), 0)

    def begin(self, work: Work) -> None:
        """A piece of work from `peek` is under way."""
        if work.trial not in self.trials:
            assert self.offer == work.values, "work that was not offered"
            self.trials[work.trial] = Trial(work.trial, work.values, work.seed)
            self.offer = None
        trial = self.trials[work.trial]
        trial.running, trial.config = True, work.values
        self.running += 1
        self.rungs.go(work.trial, work.rung)

    def take(self, work: Work, result: Mapping[str, Any], retries: int = 0) -> bool:
        """Write the result of a piece of work down; whether the trial has ended."""
        trial = self.trials[work.trial]
        trial.running = False
        self.running -= 1
        failed = result.get("status") == "failed"
        error = result.get("error") or "it does not say why" if failed else self.objectives.problem(result)
        if error is not None:
            self._write(self._ended(trial, "failed", f"failed at rung {work.rung}", str(error), result))
            return True
        row: dict[str, Any] = {
            "rung": work.rung, "epochs": work.epochs, "config": work.values, "seed": trial.seed,
            **{name: result[name] for name in ROW if result.get(name) is not None},
        }  # fmt: skip
        if violation := self.objectives.violation(row):
            row["violation"] = violation
        if retries:
            row["retries"] = retries
        row["hypervolume"] = self._volume_with(trial, row)
        line = {"trial": trial.number, "event": "rung", **row}
        self._note(line)
        last = work.rung + 1 == len(self.ladder)
        self._write(line, *([self._ended(trial, "done", THROUGH)] if last else []))
        return last

    def lose(self, work: Work, error: str, retries: int = 0) -> None:
        """A piece of work will not come back."""
        trial = self.trials[work.trial]
        trial.running = False
        self.running -= 1
        end = self._ended(trial, "failed", f"failed at rung {work.rung}", error)
        self._write({**end, "retries": retries} if retries else end)

    def finish(self) -> None:
        """The search is over: whoever still waits ends with the result that it has."""
        for _, trial in sorted(self.trials.items()):
            if not trial.ended and trial.rows:
                rung = trial.rows[-1]["rung"]
                why = self.stopped or f"not promoted from rung {rung}, {self.ladder[rung]} epochs"
                self._write(self._ended(trial, "done", why))

    # what comes next

    def _next_promoted(self) -> Work | None:
        for number, rung in self.rungs.candidates():
            trial = self.trials[number]
            if not trial.running and not trial.ended:
                return self._work(trial, rung)
        return None

    def _next_member(self) -> Work | None:
        """The member of a population that is least far, once half of them all are as far: nobody waits for the last."""
        members = [t for t in self.trials.values() if not t.ended and len(t.rows) < len(self.ladder)]
        waiting = sorted((len(t.rows), t.number) for t in members if not t.running)
        if len(self.trials) < self.total or not waiting or waiting[0][0] == 0:
            return None
        least, number = waiting[0]
        if 2 * sum(len(t.rows) >= least for t in members) < len(members):
            return None
        trial = self.trials[number]
        peers = [t for _, t in sorted(self.trials.items()) if len(t.rows) >= least]
        rows = [t.rows[least - 1] for t in peers]
        chance = random.Random(f"{self.job.seed} {trial.number} {least}")
        copied = population.exploit(
            [self.judged.point(r) for r in rows], [self.judged.violation(r) for r in rows], peers.index(trial), chance
        )
        if copied is None:
            return self._work(trial, least)
        values = population.explore(self.cfg.space, rows[copied]["config"], chance)
        return self._work(trial, least)._replace(values=values, donor=label(peers[copied].number))

    def _work(self, trial: Trial, rung: int) -> Work:
        epochs = self.ladder[rung]
        if self.cfg.scheduler == "none":
            epochs = trial.config.get("train.epochs" if self.cfg.trains else "recover.epochs", epochs)
        work = Work(trial.number, trial.config, trial.seed, rung, epochs, self.ladder[rung - 1] if rung else 0)
        if self.cfg.trains:
            return work
        last = trial.rows[-1] if trial.rows else None
        work = work._replace(start=last["start"] if last else "dense", score=last["val_accuracy"] if last else None)
        if work.before == 0 and self.cfg.warm_starts and self.cfg.scheduler != "none":
            work = work._replace(neighbour=self._neighbour(work))
        return work

    def _neighbour(self, work: Work) -> str | None:
        """The trained trial that is most alike, unless the work begins from it anyway."""

        def kind(config: Config) -> Any:
            return config.get("prune.kind", self.job.prune.kind)

        if kind(work.values) == "channels":
            return None
        found = [
            t for t in self.trials.values()
            if t.number != work.trial and t.rows and t.rows[-1]["epochs"] and kind(t.config) != "channels"
        ]  # fmt: skip
        nearest = min(
            found, key=lambda t: (space.distance(self.cfg.space, work.values, t.config), t.number), default=None
        )
        return None if nearest is None or label(nearest.number) == work.start else label(nearest.number)

    # what is written down

    def _ended(
        self, trial: Trial, status: str, why: str, error: str | None = None, lost: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A trial's end, with the measures of its best rung; `lost`: what a rung without a result took."""
        row: dict[str, Any] = {"trial": trial.number, "event": "end", "status": status, "stopped": why, "error": error}
        row |= {"config": trial.config, "seed": trial.seed, "rungs": len(trial.rows)}
        row |= {k: v for k, v in (trial.best or {}).items() if k not in (*row, "at", "hypervolume", *SUMS)}
        if trial.best is not None:
            row["config"] = trial.best["config"]
        took = [*trial.rows, *([lost] if lost else [])]
        row |= {name: sum(r[name] for r in took if name in r) for name in SUMS if any(name in r for r in took)}
        return {**row, "hypervolume": self.volume}

    def _write(self, *rows: dict[str, Any]) -> None:
        """Append lines that belong together, in one go."""
        for row in rows:
            row["at"] = round(self.clock() - self.began, 3)
            if row["event"] == "end":
                self._note(row)
        self.ledger.add(*rows)
        self._look_at_targets()
        for row in rows:
            if self.on_row is not None:
                self.on_row(self, row)

    def _note(self, row: dict[str, Any]) -> None:
        """Take a line of the ledger in, new or read."""
        number = row["trial"]
        if number not in self.trials:
            self.trials[number] = Trial(number, row["config"], row["seed"])
        trial = self.trials[number]
        self.sampler.took(row["config"])
        if row["event"] == "end":
            trial.ended, trial.running = True, False
            self.rungs.drop(number)
            return
        trial.rows.append(row)
        trial.config = row["config"]
        if self.objectives.better(row, trial.best):
            trial.best = row
        point, violation = self.objectives.point(row), self.objectives.violation(row)
        self.rungs.add(number, row["rung"], self.judged.point(row), violation)
        self.rungs.go(number, row["rung"])
        self.sampler.tell(row["rung"], Result(row["config"], point, violation))
        self.volume = row["hypervolume"]
        self.since_rise += row["rung"] == 0
        if self.volume > self.best_volume + RISE:
            self.best_volume, self.since_rise = self.volume, 0

    def _volume_with(self, trial: Trial, row: Mapping[str, Any]) -> float:
        """Hypervolume of every trial's best result, with this one; keeps the front, so that most trials cost little."""
        mine = row if self.objectives.better(row, trial.best) else trial.best
        if trial.number in self.front and mine is not trial.best:  # what it stood before may show again
            self.front = {t.number: t.best for t in self.trials.values() if t.best is not None}
        rows = {**self.front, trial.number: mine or row}
        found = list(rows)
        self.front = {found[i]: rows[found[i]] for i in self.objectives.front(list(rows.values()))}
        return float(f"{self.objectives.hypervolume(self.front.values(), self.dense):.6g}")

    def _look_at_targets(self) -> None:
        cfg, failed = self.cfg, self.ledger.failed()
        if self.stopped is not None:
            return
        if len(failed) > cfg.max_failed:
            self.stopped = f"more than search.max_failed {cfg.max_failed} trials failed"
        elif cfg.target.stall and self.since_rise >= cfg.target.stall:
            self.stopped = f"search.target.stall: {cfg.target.stall} trials did not raise the hypervolume"
        elif cfg.target.constraints and any(
            row["stopped"] == THROUGH and "violation" not in row for row in self.ledger.done()
        ):
            self.stopped = "search.target.constraints: a trained model meets all constraints"


ROW = (
    "start", "val_accuracy", "worst_class_accuracy", "bytes", "macs", "latency_ms", "compression_ratio", "sparsity",
    "parameters", "nonzeros", "artifact_sha256", "seconds", "cpu_seconds", "overhead_seconds",
)  # fmt: skip

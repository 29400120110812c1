"""Who proposes the next configuration: Optuna's samplers, chance or the whole grid; never the same one twice.

A sampler learns from results of one rung only, the highest with `startup_trials` of them (as BOHB does, arXiv
1807.01774): scores after one epoch and after nine are not of one kind, and a score at which a trial was stopped is
never taken for its last.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from typing import Any

import optuna

from raydeep.search import space
from raydeep.search.space import Config
from raydeep.tuning import Range, Search, choices

GENERATION = optuna.samplers.NSGAIISampler._get_generation_key()  # of a trial: it has no public setter
TRIES = 20  # draws of Optuna for a configuration that is new
BLIND = 500  # and after them by chance


class Result:
    """What a sampler is told of a trial at a rung."""

    def __init__(self, config: Config, point: tuple[float, ...], violation: float) -> None:
        self.config, self.point, self.violation = config, point, violation


class Sampler:
    """Proposes configurations of a space, each at most once."""

    def __init__(self, cfg: Search, objectives: int, seed: int) -> None:
        """Begin.

        Args:
            cfg: the search section.
            objectives: coordinates of the points that are told.
            seed: of all draws; a search that goes on takes another one, or it would draw again what it has.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.cfg, self.space, self.objectives = cfg, cfg.space, objectives
        self.chance = random.Random(seed)
        self.all = space.everything(cfg.space)
        self.taken: set[str] = set()
        self.results: dict[int, list[Result]] = defaultdict(list)
        self.rung = -1  # that the study is made of
        self.told = 0
        self.sampler = self._sampler(seed)

    def _sampler(self, seed: int) -> optuna.samplers.BaseSampler:
        cfg = self.cfg
        if cfg.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=cfg.startup_trials)
        if cfg.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=cfg.population)
        return optuna.samplers.RandomSampler(seed=seed)

    @property
    def size(self) -> int | None:
        """Configurations in all; None: no end of them."""
        return None if self.all is None else len(self.all)

    def took(self, config: Config) -> None:
        """A configuration is tried already."""
        self.taken.add(space.key(config))

    def tell(self, rung: int, result: Result) -> None:
        """A trial has come through a rung."""
        self.results[rung].append(result)

    def ask(self) -> Config | None:
        """A configuration that was not proposed before; None: there is none."""
        if self.all is not None and len(self.taken) >= len(self.all):
            return None
        config = self._next_of_grid() if self.cfg.sampler == "grid" else self._drawn()
        if config is not None:
            self.took(config)
        return config

    def _next_of_grid(self) -> Config | None:
        return next((c for c in space.each(self.space) if space.key(c) not in self.taken), None)

    def _drawn(self) -> Config | None:
        self._learn()
        config, new = self._proposed(self.study, TRIES)
        if new:
            return config
        if self.all is not None:  # the sampler insists on what is tried already: the most alike of what is not
            left = [c for c in self.all if space.key(c) not in self.taken]
            self.chance.shuffle(left)
            return min(left, key=lambda c: space.distance(self.space, config, c))
        blind = optuna.samplers.RandomSampler(seed=self.chance.randrange(2**31))
        config, new = self._proposed(optuna.create_study(sampler=blind), BLIND)
        return config if new else None

    def _proposed(self, study: optuna.Study, tries: int) -> tuple[Config, bool]:
        """What a study proposes, and whether it is not tried yet."""
        config: Config = {}
        for _ in range(tries):
            trial = study.ask()
            config = self._suggest(trial)
            study.tell(trial, state=optuna.trial.TrialState.FAIL)  # its result is told by rung, see _learn
            if space.key(config) not in self.taken:
                return config, True
        return config, False

    def _learn(self) -> None:
        """Have the study hold the results of the highest rung that has enough of them, and no others."""
        enough = [k for k, found in self.results.items() if len(found) >= self.cfg.startup_trials]
        rung = max(enough, default=min(self.results, default=0))
        if rung != self.rung:
            directions = [optuna.study.StudyDirection.MINIMIZE] * self.objectives
            self.study = optuna.create_study(directions=directions, sampler=self.sampler)
            self.rung, self.told = rung, 0
        for result in self.results[rung][self.told :]:
            generation = {GENERATION: self.told // self.cfg.population} if self.cfg.sampler == "nsga2" else None
            self.study.add_trial(optuna.trial.create_trial(
                params=self._params(result.config), distributions=self._distributions(result.config),
                values=list(result.point), constraints={"all": result.violation} if self.cfg.constraints else None,
                system_attrs=generation,
            ))  # fmt: skip
            self.told += 1

    def _distributions(self, config: Config) -> dict[str, optuna.distributions.BaseDistribution]:
        return {name: _distribution(d) for name, d in self.space.items() if name in config}

    def _suggest(self, trial: optuna.trial.Trial) -> Config:
        config: Config = {}
        for name, dimension in self.space.items():
            if not space.counts(dimension, config):
                continue
            kind = _distribution(dimension)
            if isinstance(kind, optuna.distributions.CategoricalDistribution):
                drawn = trial.suggest_categorical(name, kind.choices)
                value = next(c for c in choices(dimension) if space.plain(c) == drawn and _alike(c, drawn))
            elif isinstance(kind, optuna.distributions.IntDistribution):
                value = trial.suggest_int(name, kind.low, kind.high, step=kind.step, log=kind.log)
            else:
                assert isinstance(kind, optuna.distributions.FloatDistribution)
                value = trial.suggest_float(name, kind.low, kind.high, step=kind.step, log=kind.log)
                value = min(max(float(f"{value:.6g}"), kind.low), kind.high)
            config = space.canonical({**config, name: value})
        return config

    def _params(self, config: Config) -> dict[str, Any]:
        """A point of Optuna's space that gives this configuration (see space.canonical)."""
        out = {}
        for name, dimension in self.space.items():
            if name in config:
                kind, value = _distribution(dimension), config[name]
                if isinstance(kind, optuna.distributions.CategoricalDistribution):
                    listed = choices(dimension)
                    known = any(value == c and _alike(value, c) for c in listed)
                    out[name] = space.plain(value if known else listed[0])
                else:
                    assert isinstance(dimension, Range)
                    out[name] = min(max(value, dimension.low), dimension.high)  # 0 of N:M may lie outside
        return out


def _alike(a: Any, b: Any) -> bool:
    """Not true and 1, which Python takes for equal."""
    return isinstance(a, bool) == isinstance(b, bool)


def _distribution(dimension: Any) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension, Range) and dimension.whole and not dimension.points:
        step = 1 if dimension.log else int(dimension.step or 1)
        high = dimension.low + (dimension.high - dimension.low) // step * step
        return optuna.distributions.IntDistribution(int(dimension.low), int(high), log=dimension.log, step=step)
    if isinstance(dimension, Range) and dimension.grid() is None:
        high = dimension.high
        if dimension.step:
            high = dimension.low + math.floor((high - dimension.low) / dimension.step + 1e-9) * dimension.step
        return optuna.distributions.FloatDistribution(dimension.low, high, log=dimension.log, step=dimension.step)
    return optuna.distributions.CategoricalDistribution([space.plain(c) for c in choices(dimension)])

"""The search section of a job: the space, what is sought in it, and what it may cost."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from raydeep.fields import Count, MaybeCount, MaybePositive, Positive, Section, none_word


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {value!r}")
    return value


Choice = Annotated[Any, BeforeValidator(none_word)]
Number = Annotated[int | float, BeforeValidator(_number)]
When = dict[str, list[Choice]]
ObjectiveName = Literal["accuracy", "worst_class", "bytes", "latency", "macs"]
OBJECTIVES: dict[str, Literal["min", "max"]] = {
    "accuracy": "max", "worst_class": "max", "bytes": "min", "latency": "min", "macs": "min",
}  # fmt: skip
MOST_POINTS = 1000  # of one key of a grid


class Choices(Section):
    """Some values, perhaps only where other keys have certain ones."""

    choices: Annotated[list[Choice], Field(min_length=1, description="The values")]
    when: When = Field(default_factory=dict, description="Key of the space → values with which this key counts")


class Range(Section):
    """Numbers from low to high, both included; whole ones if both ends are."""

    low: Number = Field(description="Least value")
    high: Number = Field(description="Largest value")
    log: bool = Field(False, description="Even in the logarithm")
    step: Positive | None = Field(None, description="Only low, low + step, …")
    points: Annotated[int, Field(ge=2, le=MOST_POINTS)] | None = Field(None, description="Only so many, evenly spaced")
    when: When = Field(default_factory=dict, description="As of choices")

    @property
    def whole(self) -> bool:
        """Whether it is a range of integers."""
        ends = isinstance(self.low, int) and isinstance(self.high, int)
        return ends and (self.step is None or float(self.step).is_integer())

    def grid(self) -> list[Any] | None:
        """Its numbers, where they are few; None where they are not."""
        if self.points:
            shares = [i / (self.points - 1) for i in range(self.points)]
            low, high = self.low, self.high
            found = [low * (high / low) ** s if self.log else low + s * (high - low) for s in shares]
            found[-1] = high
            return list(dict.fromkeys(round(v) if self.whole else float(f"{v:.6g}") for v in found))
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None or (self.high - self.low) / step >= MOST_POINTS:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [round(self.low + i * step) if self.whole else float(f"{self.low + i * step:.6g}") for i in range(count)]

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if not (math.isfinite(self.low) and math.isfinite(self.high)) or self.low >= self.high:
            raise ValueError(f"an empty range, from {self.low} to {self.high}: low must be less than high")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs low above 0, found {self.low}")
        if self.step is not None and (self.log or self.points):
            raise ValueError("step goes with neither log nor points")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is wider than the range from {self.low} to {self.high}")
        return self


Dimension = list[Choice] | Choices | Range


def _dimension(value: Any) -> Any:
    if isinstance(value, (Choices, Range)):
        return value
    if isinstance(value, list):
        if not value:
            raise ValueError("it has no choices")
        return [none_word(v) for v in value]
    kinds: dict[str, type[Section]] = {"choices": Choices, "low": Range, "high": Range}
    kind = next((kinds[key] for key in kinds if isinstance(value, dict) and key in value), None)
    if kind is None:
        raise ValueError("expected a list of choices, {choices: [...]} or {low: …, high: …}, each perhaps with when")
    try:
        return kind.model_validate(value)
    except ValidationError as err:
        told = err.errors()[0]
        where = ".".join(map(str, told["loc"]))
        if told["type"] == "extra_forbidden":
            raise ValueError(f"{where} is no key of it; expected {', '.join(kind.model_fields)}") from None
        message = str(told["ctx"]["error"]) if told["type"] == "value_error" else told["msg"]
        raise ValueError(f"{where + ': ' if where else ''}{message}") from None


class Constraint(NamedTuple):
    """What a model must reach."""

    objective: str
    at_least: bool
    bound: float


def _constraint(value: Any) -> str:
    number = r"[-+]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
    found = re.fullmatch(rf"\s*([\w.]+)\s*(>=|<=)\s*({number})\s*", value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("expected OBJECTIVE >= NUMBER or OBJECTIVE <= NUMBER, such as accuracy >= 0.97")
    if found[1] not in OBJECTIVES:
        raise ValueError(f"{found[1]} is no objective; expected one of {', '.join(OBJECTIVES)}")
    return f"{found[1]} {found[2]} {found[3].replace('_', '')}"


def _objectives(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        value = {name: OBJECTIVES.get(name, "min") for name in value}
    if not isinstance(value, dict) or not 1 <= len(value) <= 4:
        raise ValueError("expected 1 to 4 of them, as a list or as NAME: min or max")
    for name in value:
        if name not in OBJECTIVES:
            raise ValueError(f"{name} is no objective; expected {', '.join(OBJECTIVES)}")
    return value


def _rungs(value: Any) -> Any:
    if value == "auto":
        return value
    if not isinstance(value, (list, tuple)) or not value or not all(type(v) is int for v in value):
        raise ValueError("expected auto, or epochs in rising order such as [0, 1, 3, 9]")
    if value[0] < 0 or any(b <= a for a, b in pairwise(value)):
        raise ValueError("expected epochs in rising order, such as [0, 1, 3, 9]")
    return tuple(value)


class Target(Section):
    """When a search has found enough."""

    constraints: bool = Field(False, description="Stop when a model that is through meets all constraints")
    stall: MaybeCount = Field(None, description="Stop when so many trials have not raised the hypervolume")


DEFAULT_SPACE: dict[str, Any] = {
    "prune.sparsity": [0.0, 0.5, 0.7, 0.8, 0.9, 0.95],
    "quantize.weight_bits": [2, 3, 4, 8],
    "quantize.activation_bits": [None, 4, 8],
    "distill.enabled": [False, True],
}
TRAINING = ("model", "train", "augment")  # sections whose keys make a trial train a network of its own


class Search(Section):
    """Ray Tune over any dotted job keys, for the front of several objectives."""

    trials: Count = Field(32, description="Configurations that are tried")
    space: dict[str, Annotated[Dimension, BeforeValidator(_dimension)]] = Field(
        default_factory=lambda: dict(DEFAULT_SPACE),
        description="Dotted job key: list of choices, {choices, when}, or {low, high, log, step, points, when}. With "
        "keys of model, train or augment each trial trains a network of its own",
    )
    objectives: Annotated[dict[ObjectiveName, Literal["min", "max"]], BeforeValidator(_objectives)] = Field(
        {"accuracy": "max", "bytes": "min"},
        description="accuracy (validation), worst_class (its accuracy), bytes (packed file), latency (ms of the ONNX "
        "file, one thread, the first of export.batch_sizes), macs",
    )
    constraints: tuple[Annotated[str, BeforeValidator(_constraint)], ...] = Field(
        (), description="What models must reach, such as accuracy >= 0.97 or bytes <= 50_000; they come first"
    )
    sampler: Literal["tpe", "nsga2", "random", "grid"] = Field(
        "tpe", description="Who proposes: Optuna's TPE or NSGA-II, chance, or all configurations in order"
    )
    startup_trials: Count = Field(10, description="Random trials before tpe models the objectives")
    population: Annotated[int, Field(ge=2)] = Field(16, description="nsga2: of a generation; pbt: members")
    scheduler: Literal["halving", "asha", "pbt", "none"] = Field(
        "halving",
        description="halving: rungs of more and more epochs, the best by front and crowding go on (arXiv 2106.12639); "
        "asha: the same by the first objective alone (1810.05934); pbt: population-based training (1711.09846), with "
        "keys of train and augment; none: every trial runs to its end",
    )
    rungs: Annotated[Literal["auto"] | tuple[int, ...], BeforeValidator(_rungs)] = Field(
        "auto",
        description="Epochs after which a trial is judged, such as [0, 1, 3, 9]; 0: compressed in one shot, not "
        "trained. auto: 0, 1, then × reduction up to recover.epochs (of trials that train: 1 … train.epochs)",
    )
    reduction: Annotated[int, Field(ge=2, le=16)] = Field(3, description="One of so many goes on from a rung")
    promote: Literal["crowding", "epsilon_net"] = Field(
        "crowding", description="Who goes first within a front: the least crowded, or the farthest from those before"
    )
    warm_starts: bool = Field(
        True, description="A trial may start from the weights of the nearest trained one, if that scores better"
    )
    minutes: MaybePositive = Field(None, description="No new rung begins after so long, all sessions together")
    target: Target = Target()
    concurrent: MaybeCount = Field(None, description="Trials at once; none: as many as there is room for")
    cpus_per_trial: Positive = Field(1.0, description="CPUs of a trial")
    gpus_per_trial: Annotated[float, Field(gt=0, le=64)] = Field(
        1.0, description="With scaling.use_gpu: GPUs of a trial; 0.25: four share one"
    )
    workers_per_trial: Count = Field(
        1, description="More than 1: a trial trains on so many workers (a TorchTrainer a rung: some 15 s to start)"
    )
    trial_memory_bytes: MaybeCount = Field(
        None, description="A trial that needs more memory than this, beyond its data, fails (Linux); none: no limit"
    )
    max_failed: Annotated[int, Field(ge=0)] = Field(3, description="Stop the search after more failed trials")
    track: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (), description="Where trials are logged too: tensorboard, mlflow (an SQLite store beside the runs), wandb"
    )

    @property
    def trains(self) -> bool:
        """Whether each trial trains a network of its own."""
        return any(key.split(".")[0] in TRAINING for key in self.space)

    def values(self, key: str) -> list[Any]:
        """Values of a key, to check: all choices, or the ends of a range; none where it is not in the space."""
        found = self.space.get(key, [])
        return [found.low, found.high] if isinstance(found, Range) else choices(found)

    def limits(self) -> list[Constraint]:
        """The constraints, read."""
        parts = [text.split() for text in self.constraints]
        return [Constraint(name, sign == ">=", float(bound)) for name, sign, bound in parts]

    def room(self, cpus: float, gpus: float, cpus_per_worker: float, use_gpu: bool) -> int:
        """Trials that so many CPUs and GPUs have room for."""
        several = self.workers_per_trial > 1
        each = self.workers_per_trial * cpus_per_worker if several else self.cpus_per_trial
        found = math.floor(cpus / each + 1e-9)
        if use_gpu:
            found = min(found, math.floor(gpus / (self.workers_per_trial if several else self.gpus_per_trial) + 1e-9))
        return found if self.concurrent is None else min(found, self.concurrent)

    def ladder(self, epochs: int) -> list[int]:
        """Epochs of each rung, where training in full takes `epochs`."""
        if self.scheduler == "none":
            return [epochs]
        if self.rungs != "auto":
            return list(self.rungs)
        if self.scheduler == "pbt":
            return sorted({max(1, round(epochs * k / 8)) for k in range(1, 9)})
        found, e = [] if self.trains else [0], 1
        while e < epochs / 1.5:
            found.append(e)
            e *= self.reduction
        return found if found and found[-1] == epochs else [*found, epochs]

    @model_validator(mode="after")
    def _fits(self) -> Search:
        for key, dimension in self.space.items():
            when = dimension.when if isinstance(dimension, (Choices, Range)) else {}
            for other, values in when.items():
                known = self.space.get(other)
                if known is None or list(self.space).index(other) >= list(self.space).index(key):
                    raise ValueError(f"space.{key}: when names {other}, which is no key of the space before it")
                if not isinstance(known, Range) and not any(v in choices(known) for v in values):
                    raise ValueError(f"space.{key}: when {other} is {values}, which none of its choices is")
            if self.sampler == "grid" and isinstance(dimension, Range) and dimension.grid() is None:
                raise ValueError(f"sampler grid: space.{key} is a range without end; give it points or step")
        if self.scheduler == "pbt" and not self.trains:
            raise ValueError("scheduler pbt needs keys of train or augment in the space")
        if self.scheduler == "pbt":
            for key in self.space:
                if not key.startswith(PBT_KEYS):
                    raise ValueError(f"scheduler pbt can't change {key} on the way; it can: {_words(PBT_KEYS)}")
        elif self.scheduler != "none":
            for key in ("recover.epochs", "quantize.epochs", "train.epochs"):
                if key in self.space:
                    raise ValueError(f"space.{key}: rungs set the epochs; use scheduler none, or another key")
        if self.target.constraints and not self.constraints:
            raise ValueError("target.constraints needs constraints")
        if self.trains and self.rungs != "auto" and self.rungs[0] == 0:
            raise ValueError("rungs: a network that trains from scratch needs an epoch: begin with 1 or more")
        return self


PBT_KEYS = ("train.lr", "train.momentum", "train.weight_decay", "train.label_smoothing", "train.clip_norm", "augment.")


def _words(keys: tuple[str, ...]) -> str:
    return ", ".join(key + "*" if key.endswith(".") else key for key in keys)


def choices(dimension: Any) -> list[Any]:
    """The values of a dimension that are listed, or a grid's."""
    if isinstance(dimension, Range):
        return dimension.grid() or []
    return dimension.choices if isinstance(dimension, Choices) else dimension

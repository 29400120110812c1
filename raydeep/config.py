"""The job: its sections put together, loaded from one YAML file, checked as a whole."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from raydeep.errors import JobError, RaydeepError
from raydeep.fields import Average
from raydeep.recipe import Distill, Export, Prune, Quantize, Recover
from raydeep.remote import check, is_address, no_secret
from raydeep.safeyaml import MAX_JOB_BYTES, load_yaml
from raydeep.sections import Augment, Data, Model, Scaling, Section, Train
from raydeep.tuning import DEFAULT_SPACE, Range, Search

__all__ = [
    "DEFAULT_SPACE", "Augment", "Average", "Data", "Distill", "Export", "Job", "Model", "Prune", "Quantize", "Recover",
    "Scaling", "Search", "Section", "Train", "differing", "load_job", "parse_job", "parse_sets", "valid_keys",
]  # fmt: skip


class Job(Section):
    """One job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = Field(
        "job", description="First part of the run folder's name: letters, digits, `_`, `.` and `-`, at most 64"
    )
    seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="Of weights, order, augmentation and search; the splits have data.split_seed"
    )
    storage: str = Field(
        "runs", description="Folder of the run folders; on a cluster, one that all nodes share, or s3://BUCKET/FOLDER"
    )
    data: Data = Data()
    augment: Augment = Augment()
    model: Model = Model()
    train: Train = Train()
    prune: Prune = Prune()
    quantize: Quantize = Quantize()
    distill: Distill = Distill()
    recover: Recover = Recover()
    search: Search = Search()
    export: Export = Export()
    scaling: Scaling = Scaling()

    @model_validator(mode="after")
    def _together(self) -> Job:
        # not as the fields' own checks: their errors repeat what they found, secrets too
        for key, text, rule in (("storage", self.storage, check), ("data.path", self.data.path, no_secret)):
            if text and is_address(text):
                try:
                    rule(text, key)
                except RaydeepError as err:
                    raise ValueError(str(err)) from None
        if self.quantize.activation_bits is not None and self.quantize.weight_bits is None:
            raise ValueError("quantize.activation_bits needs quantize.weight_bits (integer kernels need both)")
        if self.data.needs_path and not self.data.path:
            raise ValueError(f"data.source {self.data.source} needs data.path (--set data.path=FOLDER)")
        self._check_batch()
        self._check_distill()
        rounds = self.prune.rounds if self.prune.active and self.prune.schedule == "iterative" else 0
        if 0 < self.recover.epochs < rounds:
            raise ValueError(
                f"prune.schedule iterative: recover.epochs {self.recover.epochs} can't be shared out to prune.rounds "
                f"{rounds}: raise the one or lower the other"
            )
        self._check_space()
        return self

    def _check_space(self) -> None:
        search = self.search
        integers = self.quantize.weight_bits is not None or any(search.values("quantize.weight_bits"))
        if any(search.values("quantize.activation_bits")) and not integers:
            raise ValueError(
                "search.space.quantize.activation_bits needs weight bits beside it: set quantize.weight_bits, or add "
                "it to the space"
            )
        for key, dimension in search.space.items():
            section, _, leaf = key.partition(".")
            if section not in SEARCHABLE:
                raise ValueError(
                    f"search.space.{key} can't be searched; the sections that can: {', '.join(SEARCHABLE)}"
                )
            if not leaf:
                raise ValueError(f"search.space.{key} is a section, expected a key of it, such as {_example(section)}")
            between = []
            if isinstance(dimension, Range) and not dimension.whole:  # keys of whole numbers refuse what is between
                between = dimension.grid() or [dimension.low + 0.382 * (dimension.high - dimension.low)]
            for value in [*search.values(key), *between]:
                try:
                    self.with_values({key: value}, check_pairs=False)
                except JobError as err:
                    raise ValueError(f"search.space.{key}: {err}") from None
        own = None if search.trains else self.recover.batch_size
        batch, key = (own, "recover.batch_size") if own else (self.train.batch_size, "train.batch_size")
        if batch < search.workers_per_trial * self.train.accumulate:
            raise ValueError(
                f"{key} {batch} is less than search.workers_per_trial {search.workers_per_trial} × "
                f"train.accumulate {self.train.accumulate}: raise it"
            )
        rounds = [self.prune.rounds, *search.values("prune.rounds")]
        iterative = "iterative" in (self.prune.schedule, *search.values("prune.schedule"))
        trained = [e for e in search.ladder(self.recover.epochs) if e]
        if iterative and search.space and not search.trains and trained and trained[0] < max(rounds):
            raise ValueError(
                f"prune.schedule iterative: {max(rounds)} rounds do not fit the {trained[0]} epochs of the first rung "
                f"that trains; set search.rungs to begin with 0 and {max(rounds)} or more, or search.scheduler none"
            )

    def _check_batch(self) -> None:
        scaling, train = self.scaling, self.train
        least = scaling.max_workers // scaling.pipeline_stages * train.accumulate
        if train.batch_size < least:
            raise ValueError(
                f"train.batch_size {train.batch_size} is less than scaling.workers {scaling.max_workers} × "
                f"train.accumulate {train.accumulate}: raise it to {least} or more"
            )
        if scaling.strategy == "pipeline":
            if train.batch_size % least or not train.drop_last:
                raise ValueError(
                    f"scaling.strategy pipeline needs micro-batches of one size: train.drop_last true, and "
                    f"train.batch_size (now {train.batch_size}) a multiple of replicas × train.accumulate = {least}"
                )
            if train.accumulate < scaling.pipeline_stages:
                raise ValueError(
                    f"train.accumulate {train.accumulate} micro-batches can't fill a pipeline of "
                    f"{scaling.pipeline_stages} stages; raise it to {scaling.pipeline_stages} or more (4 × is usual)"
                )
            rows, pairs = train.batch_size // least, self.augment.mixup > 0 or self.augment.cutmix > 0
            if rows < 2 or (pairs and rows % 2):
                even = ", an even number with mixup or cutmix" if pairs else ""
                raise ValueError(
                    f"scaling.strategy pipeline: train.batch_size {train.batch_size} makes micro-batches of {rows} "
                    f"rows; they must have 2 or more{even}: raise it, or lower train.accumulate"
                )
        if scaling.strategy == "fsdp" and train.channels_last is True:
            raise ValueError("train.channels_last true needs scaling.strategy ddp: fsdp wants contiguous parameters")
        if train.optimizer == "muon" and scaling.strategy != "ddp":
            raise ValueError(
                f"train.optimizer muon needs the whole network on a worker: use scaling.strategy ddp, or adamw with "
                f"{scaling.strategy}"
            )

    def _check_distill(self) -> None:
        cfg = self.distill
        if not cfg.trains_dense or not (cfg.hints or cfg.teacher == "ema"):
            return
        what = "distill.hints" if cfg.hints else "distill.teacher ema"
        if self.scaling.strategy != "ddp":
            raise ValueError(f"{what} needs scaling.strategy ddp in training, found {self.scaling.strategy}")
        if self.train.compile:
            raise ValueError(f"{what} needs train.compile false: it looks into the network while it runs")

    def with_values(self, values: dict[str, Any], check_pairs: bool = True) -> Job:
        """A copy with dotted keys set, validated; the search space is left out of the copy.

        Args:
            values: dotted key → value, for instance `{"prune.sparsity": 0.9}`.
            check_pairs: False validates the sections alone, not how they go together.
        """
        tree = self.model_dump()
        tree["search"] = {**tree["search"], "space": {}, "scheduler": "none"}
        for key, value in values.items():
            _set_dotted(tree, key, value)
        if check_pairs:
            return parse_job(tree, "search.space")
        section = next(iter(values)).split(".")[0]
        try:
            type(getattr(self, section)).model_validate(tree[section])
        except ValidationError as err:
            raise JobError(_explain(err, "", prefix=section)) from None
        return self


SEARCHABLE = ("prune", "quantize", "distill", "recover", "train", "augment", "model")


def _example(section: str) -> str:
    return next(key for key in valid_keys() if key.startswith(f"{section}."))


def differing(before: Job, after: Job) -> list[str]:
    """The keys in which two jobs differ, with both values; where a run is stored does not count."""
    one, other = before.model_dump(mode="json"), after.model_dump(mode="json")
    found = []
    for key in valid_keys():
        section, _, leaf = key.partition(".")
        a, b = (tree[section][leaf] if leaf else tree[section] for tree in (one, other))
        if a != b and key != "storage" and not (not leaf and isinstance(a, dict)):
            found.append(f"{key} was {a}, now {b}")
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; an empty file holds an empty one.

    Raises:
        JobError: naming the file and what is wrong with it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JOB_BYTES + 1)
        tree = load_yaml(raw.decode("utf-8"))
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise JobError(f"{path}: can't be read as text: {err}") from None
    except JobError as err:
        raise JobError(f"{path}: {err}") from None
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise JobError(f"{path}: expected KEY: VALUE lines, found {type(tree).__name__}")
    return tree


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Load and check a job file.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        JobError: naming file, key, what was found, what was expected and the nearest valid key.
    """
    return parse_sets(read_yaml(path), overrides, str(path))


def parse_sets(tree: dict[str, Any], overrides: list[str] | tuple[str, ...], where: str = "--set") -> Job:
    """Check a tree of plain values after `section.key=value` overrides, values read as YAML."""
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or not key.strip():
            raise JobError(f"--set {override}: expected section.key=value")
        try:
            _set_dotted(tree, key.strip(), load_yaml(value))
        except JobError as err:
            raise JobError(f"--set {override}: {err}") from None
    return parse_job(tree, where)


def parse_job(tree: dict[str, Any], where: str) -> Job:
    """Check a tree of plain values; `where` names its origin in errors."""
    try:
        return Job.model_validate(tree)
    except ValidationError as err:
        raise JobError(_explain(err, f"{where}: ")) from None


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    parts = key.split(".")
    if key.startswith("search.space."):  # its keys are dotted themselves
        parts = ["search", "space", key.removeprefix("search.space.")]
    for part in parts[:-1]:
        child = tree.get(part)
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            raise JobError(f"{part} is not a section")
        tree = child
    tree[parts[-1]] = value


def valid_keys() -> list[str]:
    """Every dotted key of a job."""
    keys: list[str] = []
    for name, field in Job.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            keys += [name, *(f"{name}.{key}" for key in kind.model_fields)]
        else:
            keys.append(name)
    return keys


def _nearest(key: str) -> str:
    keys = valid_keys()
    parent, _, leaf = key.rpartition(".")
    same_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    if same_leaf:
        return same_leaf[0]
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(leaf, siblings, 1, 0.5)
    if near:
        return f"{parent}.{near[0]}".lstrip(".")
    return (difflib.get_close_matches(key, keys, 1, 0.0) or ["name"])[0]


def _explain(err: ValidationError, where: str, prefix: str = "") -> str:
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in (prefix, *item["loc"]) if part != "" and not str(part).endswith("]"))
        if item["type"] == "extra_forbidden":
            section = key.rpartition(".")[0]
            valid = [k for k in valid_keys() if k.rpartition(".")[0] == section]
            names = ", ".join(k.rpartition(".")[2] for k in valid)
            lines.append(f"{key} is not a key of a job; did you mean {_nearest(key)}? Valid here: {names}")
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"]) if "ctx" in item else item["msg"]
            found = f"found {item['input']!r}, " if key and not isinstance(item["input"], dict) else ""
            lines.append(f"{key + ': ' if key else ''}{found}{message}")
        else:
            message = item["msg"][0].lower() + item["msg"][1:]
            lines.append(f"{key}: found {item['input']!r}, {message.replace('input should be', 'expected')}")
    return where + ("\n  ".join(["", *lines]).lstrip("\n") if len(lines) > 1 else lines[0])

"""The job: one frozen, typed section a stage, loaded from one YAML file.

Defaults live here and nowhere else. A stage receives its own section only.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from raydeep.errors import JobError
from raydeep.safeyaml import MAX_JOB_BYTES, load_yaml


def _none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "null", "~", "") else value


def _bits(value: Any) -> Any:
    value = _none_word(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8):
        return value
    raise ValueError("expected a whole number of bits from 2 to 8, or none for float")


def _pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        if not 0 < value[0] <= value[1] < float("inf"):
            raise ValueError("expected [low, high] with 0 < low <= high, both finite")
        return tuple(float(v) for v in value)
    raise ValueError("expected two numbers: [low, high]")


Bits = Annotated[int | None, BeforeValidator(_bits)]
Range2 = Annotated[tuple[float, float], BeforeValidator(_pair)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
MaybeCount = Annotated[Count | None, BeforeValidator(_none_word)]
MaybePositive = Annotated[Positive | None, BeforeValidator(_none_word)]
MaybeSide = Annotated[Annotated[int, Field(ge=4, le=4096)] | None, BeforeValidator(_none_word)]
MaybeText = Annotated[str | None, BeforeValidator(_none_word)]


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Data(Section):
    """Where the pictures come from and how they are split."""

    source: Literal["digits", "folder", "parquet", "synthetic"] = Field(
        "digits", description="digits (embedded), folder (class sub-folders), parquet, synthetic"
    )
    path: MaybeText = Field(None, description="Folder of the source; not needed for digits and synthetic")
    image_column: str = Field("image", description="parquet: column with the bytes of one picture file")
    label_column: str = Field("label", description="parquet: column with the label, an integer or a string")
    image_size: MaybeSide = Field(
        None,
        description="Side in pixels; the shorter side is scaled to it and the centre cropped. "
        "none: the pictures' own size, which must then be one and the same",
    )
    mode: Literal["auto", "grey", "rgb"] = Field("auto", description="auto: grey if every picture is grey")
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of train for validation, stratified, if the source has no val split"
    )
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share of all rows for test, stratified, if the source has no test split"
    )
    split_seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        0, description="Seed of those splits; apart from `seed`, so that runs share a test set"
    )
    limit_per_class: MaybeCount = Field(None, description="Train on at most N pictures a class (few data)")
    max_bad_fraction: Probability = Field(0.01, description="Fail if more pictures than this can't be read")
    shard_bytes: Annotated[int, Field(ge=1024)] = Field(64 * 2**20, description="Target size of a shard, bytes")
    memory_bytes: Annotated[int, Field(ge=2**20)] = Field(
        4 * 2**30, description="Most memory the decoded pictures may take, bytes"
    )
    rows: Count = Field(2000, description="synthetic: number of pictures")
    classes: Annotated[int, Field(ge=2)] = Field(4, description="synthetic: number of classes")

    @model_validator(mode="after")
    def _some_train(self) -> Data:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; their sum must be below 1")
        return self


class Augment(Section):
    """Kornia transforms on the device, parameters drawn per sample from (seed, epoch, step)."""

    horizontal_flip: Probability = Field(0.0, description="Probability")
    vertical_flip: Probability = Field(0.0, description="Probability")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="Degrees, drawn from ±rotation")
    scale: Range2 = Field((1.0, 1.0), description="Zoom factor [low, high]")
    crop: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="Random crop after padding each side by this share of the picture (0.125 = 4 of 32)"
    )
    resized_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Least area share of a random resized crop (aspect 3/4 to 4/3); 1 = off"
    )
    brightness: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Factor drawn from 1 ± this")
    contrast: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Factor drawn from 1 ± this")
    saturation: Annotated[float, Field(ge=0, le=1)] = Field(0.0, description="Factor drawn from 1 ± this")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(0.0, description="Shift in turns, drawn from ± this; slow")
    padding: Literal["zeros", "border", "reflection"] = Field("zeros", description="What lies outside a picture")


class Model(Section):
    """The network."""

    name: str = Field(
        "seed",
        description="seed, lenet_300_100, lenet5, resnet8, resnet20, resnet56, any torchvision classifier "
        "(mobilenet_v3_small, …), or your own as package.module:factory",
    )
    args: dict[str, Any] = Field(default_factory=dict, description="Extra keyword arguments of the factory")


class Train(Section):
    """Training from scratch. `batch_size` is global: the same for any number of workers."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    batch_size: Count = Field(128, description="Global batch: all workers and accumulation steps together")
    accumulate: Count = Field(1, description="Micro-batches whose gradients are summed before a step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd is Nesterov momentum")
    lr: Positive = Field(0.1, description="Peak learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 5e-4
    warmup_epochs: NotNegative = Field(1.0, description="Linear warm-up, in epochs; then cosine to zero")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: MaybePositive = Field(None, description="Clip the gradient's norm to this; none: off")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs that have it, float32 elsewhere"
    )
    eval_batch_size: Count = 512


class Prune(Section):
    """Which weights become zero."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="Share of zeros in prunable weights")
    schedule: Literal["one_shot", "cubic"] = Field(
        "cubic", description="one_shot, or cubic over the first half of recovery (arXiv 1710.01878)"
    )


class Quantize(Section):
    """Bit widths; steps are learned during recovery (LSQ, arXiv 1902.08153)."""

    weight_bits: Bits = Field(None, description="2 to 8, or none for float")
    activation_bits: Bits = Field(None, description="2 to 8, or none for float; needs weight_bits")
    edge_bits: Bits = Field(8, description="Least bits of the first and last layer; none: like the others")
    calibration_rows: Count = Field(512, description="Train rows that set the first steps")


class Distill(Section):
    """Learn from the dense model's logits during recovery (arXiv 1503.02531)."""

    enabled: bool = False
    weight: Probability = Field(0.7, description="Share of the distillation loss")
    temperature: Positive = 4.0


class Recover(Section):
    """Training after compression: the same loop, gentler."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = 4
    lr: Positive = Field(0.01, description="Peak learning rate of recovery")
    batch_size: MaybeCount = Field(None, description="none: that of train")


DEFAULT_SPACE: dict[str, list[Any]] = {
    "prune.sparsity": [0.0, 0.5, 0.7, 0.8, 0.9, 0.95],
    "quantize.weight_bits": [2, 3, 4, 8],
    "quantize.activation_bits": [None, 4, 8],
    "distill.enabled": [False, True],
}


class Search(Section):
    """Ray Tune over any dotted job keys; accuracy (validation) up, bytes of the packed file down."""

    trials: Count = 32
    space: dict[str, list[Annotated[Any, BeforeValidator(_none_word)]]] = Field(
        default_factory=lambda: dict(DEFAULT_SPACE),
        description="Dotted job key: list of choices",
    )
    concurrent: MaybeCount = Field(None, description="Trials at once; none: one a core")
    startup_trials: Count = Field(10, description="Random trials before Optuna's TPE models the objectives")
    max_failed: Annotated[int, Field(ge=0)] = Field(3, description="Stop the search after more failed trials")


class Export(Section):
    """What is written for each model of the front."""

    max_models: Count = Field(8, description="At most so many models of the front, spread over bytes")
    latency_rounds: Annotated[int, Field(ge=3)] = Field(15, description="Interleaved rounds of the latency test")
    batch_size: Count = Field(1, description="Batch of the latency test")


class Scaling(Section):
    """How many workers, and what each gets. Names as in Ray's ScalingConfig."""

    workers: Annotated[int, Field(ge=1, le=4096)] = 1
    cpus_per_worker: Positive = Field(1.0, description="Logical CPUs a worker reserves")
    use_gpu: bool = False
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="Worker failures to recover from")


class Job(Section):
    """One job file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")] = "job"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    storage: str = Field("runs", description="Folder of the run folders; on a cluster, one that all nodes share")
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
        if self.quantize.activation_bits is not None and self.quantize.weight_bits is None:
            raise ValueError("quantize.activation_bits needs quantize.weight_bits (integer kernels need both)")
        if self.data.source in ("folder", "parquet") and not self.data.path:
            raise ValueError(f"data.source {self.data.source} needs data.path (--set data.path=FOLDER)")
        if self.train.batch_size % (self.scaling.workers * self.train.accumulate):
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not a multiple of scaling.workers "
                f"{self.scaling.workers} × train.accumulate {self.train.accumulate}"
            )
        space = self.search.space
        integers = self.quantize.weight_bits is not None or any(space.get("quantize.weight_bits", []))
        if any(space.get("quantize.activation_bits", [])) and not integers:
            raise ValueError(
                "search.space.quantize.activation_bits needs weight bits beside it: set quantize.weight_bits, or add "
                "it to the space"
            )
        for key, choices in space.items():
            if not choices:
                raise ValueError(f"search.space.{key} has no choices")
            if key.split(".")[0] not in SEARCHABLE:
                raise ValueError(
                    f"search.space.{key} can't be searched; the sections that can: {', '.join(SEARCHABLE)}"
                )
            for choice in choices:
                try:
                    self.with_values({key: choice}, check_pairs=False)
                except JobError as err:
                    raise ValueError(f"search.space.{key}: {err}") from None
        return self

    def with_values(self, values: dict[str, Any], check_pairs: bool = True) -> Job:
        """A copy with dotted keys set, validated; the search space is left out of the copy.

        Args:
            values: dotted key → value, for instance `{"prune.sparsity": 0.9}`.
            check_pairs: False validates the sections alone, not how they go together.
        """
        tree = self.model_dump()
        tree["search"] = {**tree["search"], "space": {}}
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


SEARCHABLE = ("prune", "quantize", "distill", "recover")


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Job:
    """Load and check a job file.

    Args:
        path: the YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        JobError: naming file, key, what was found, what was expected and the nearest valid key.
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
        raise JobError(f"{path}: expected sections (data:, train:, …), found {type(tree).__name__}")
    return parse_sets(tree, overrides, str(path))


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

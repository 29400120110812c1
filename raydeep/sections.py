"""The sections of a job: one frozen class a stage, with every default. `config.py` puts them together.

Defaults live here and nowhere else. A stage receives its own section only.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from raydeep.fields import (
    TORCHVISION,
    Count,
    LossName,
    MaybeCount,
    MaybePositive,
    MaybeSide,
    MaybeText,
    NotNegative,
    Positive,
    Probability,
    Range2,
    Section,
    Share,
    SourceName,
    none_word,
    worker_count,
)


class Data(Section):
    """Where the pictures come from and how they are split."""

    source: SourceName = Field(
        "digits",
        description="digits (embedded), synthetic, folder (class sub-folders), images (a folder and a table of "
        "labels), parquet, webdataset (tar files), torchvision:NAME (a dataset of torchvision.datasets), or your own "
        "as package.module:factory",
    )
    path: MaybeText = Field(
        None,
        description="Folder of the source, or its address (s3://…, gs://…); not needed for digits and synthetic; "
        "handed to a source of your own",
    )
    labels: MaybeText = Field(
        None, description="images: the table (CSV, JSON Lines or Parquet) below path; none: the only one there"
    )
    image_column: str = Field(
        "image", description="parquet: column with the bytes of one picture file; images: column with its path"
    )
    label_column: str = Field("label", description="Column (webdataset: JSON key) with the label, integer or string")
    split_column: str = Field("split", description="images: column that says train, val or test; it may be absent")
    download: bool = Field(False, description="torchvision: fetch the dataset into path if it is not there")
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
    max_pixels: Count = Field(64 * 2**20, description="Pictures of more pixels are put in quarantine, not decoded")
    shard_bytes: Annotated[int, Field(ge=1024)] = Field(128 * 2**20, description="Target size of a shard, bytes")
    resize: MaybeSide = Field(
        None, description="Shards hold pictures of this side (scaled and cropped as by image_size); none: as they are"
    )
    store: Literal["encoded", "decoded"] = Field(
        "encoded",
        description="Shards hold picture files, or decoded pixels (larger, nothing to decode; small pictures)",
    )
    cache: Literal["auto", "resident", "stream"] = Field(
        "auto",
        description="resident: decoded in memory, one copy a node; stream: read and decoded every epoch; auto: "
        "resident if that takes no more than memory_bytes",
    )
    memory_bytes: Annotated[int, Field(ge=2**20)] = Field(
        4 * 2**30, description="Most memory that resident pictures may take, bytes"
    )
    window_bytes: Annotated[int, Field(ge=2**20)] = Field(
        256 * 2**20, description="stream: decoded pictures that are shuffled together, bytes over all workers"
    )
    rows: Annotated[int, Field(ge=1, le=10_000_000)] = Field(2000, description="synthetic: number of pictures")
    classes: Annotated[int, Field(ge=2)] = Field(4, description="synthetic: number of classes")

    @property
    def is_own(self) -> bool:
        """Whether the source is the user's own code."""
        return ":" in self.source and not self.source.startswith(TORCHVISION)

    @property
    def needs_path(self) -> bool:
        """Whether there is nothing to read without `path`."""
        return self.source not in ("digits", "synthetic") and not self.is_own

    @model_validator(mode="after")
    def _some_train(self) -> Data:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on; their sum must be below 1")
        return self


class Augment(Section):
    """Kornia transforms on the device, parameters drawn a sample from (seed, epoch, step).

    Order: geometry (one resample), colour, blur, erasing, then mixup or cutmix.
    """

    horizontal_flip: Probability = Field(0.0, description="Probability")
    vertical_flip: Probability = Field(0.0, description="Probability")
    rotation: Annotated[float, Field(ge=0, le=180)] = Field(0.0, description="Degrees, drawn from ±rotation")
    scale: Range2 = Field((1.0, 1.0), description="Zoom factor [low, high]")
    shear: Annotated[float, Field(ge=0, le=60)] = Field(0.0, description="Degrees, drawn from ±shear for x and for y")
    translate: Share = Field(0.0, description="Shift, drawn from ± this share of the side; not whole pixels")
    perspective: Share = Field(0.0, description="Corners move inwards by up to half this share of the side")
    crop: Share = Field(
        0.0, description="Random crop after padding each side by this share of the picture (0.125 = 4 of 32)"
    )
    resized_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Least area share of a random resized crop (aspect 3/4 to 4/3); 1 = off"
    )
    brightness: Share = Field(0.0, description="Factor drawn from 1 ± this")
    contrast: Share = Field(0.0, description="Factor drawn from 1 ± this, about the mean grey of the picture")
    saturation: Share = Field(0.0, description="Factor drawn from 1 ± this")
    hue: Annotated[float, Field(ge=0, le=0.5)] = Field(
        0.0, description="Turn of the chroma plane (YUV), drawn from ± this, in turns"
    )
    grayscale: Probability = Field(0.0, description="Probability of losing all colour")
    blur: Probability = Field(0.0, description="Probability of a Gaussian blur, sigma 0.1 to 2 pixels")
    erasing: Probability = Field(0.0, description="Probability of erasing a box of 2 to 33% of the area")
    policy: Annotated[Literal["trivialaugment", "randaugment", "autoaugment"] | None, BeforeValidator(none_word)] = (
        Field(
            None,
            description="trivialaugment (arXiv 2103.10158), randaugment (1909.13719) or autoaugment (1805.09501, its "
            "CIFAR-10 policy), drawn a sample",
        )
    )
    policy_ops: Annotated[int, Field(ge=1, le=4)] = Field(2, description="randaugment: operations a picture")
    policy_magnitude: Annotated[int, Field(ge=0, le=30)] = Field(9, description="randaugment: strength, 0 to 30")
    mixup: NotNegative = Field(0.0, description="Alpha of mixup (arXiv 1710.09412); 0 = off")
    cutmix: NotNegative = Field(0.0, description="Alpha of cutmix (arXiv 1905.04899); 0 = off; with mixup: half each")
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

    epochs: Annotated[int, Field(ge=1, le=100_000)] = Field(10, description="Passes over the train split")
    batch_size: Count = Field(128, description="Global batch: all workers and accumulation steps together")
    accumulate: Count = Field(1, description="Micro-batches whose gradients are summed before a step")
    optimizer: Literal["sgd", "adamw", "muon"] = Field(
        "sgd",
        description="sgd is Nesterov momentum; muon orthogonalises the update of inner kernels and matrices, the rest "
        "(first and last layer, biases, norms) takes adamw at lr × muon_rest",
    )
    muon_rest: Positive = Field(0.1, description="muon: learning rate of what adamw trains, as a share of lr")
    lr: Positive = Field(0.1, description="Peak learning rate")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="Of sgd and muon")
    weight_decay: NotNegative = Field(5e-4, description="Of matrices and kernels, not of biases and norms")
    schedule: Literal["cosine", "one_cycle", "step"] = Field(
        "cosine",
        description="Learning rate after warm-up: cosine to zero (arXiv 1608.03983), one_cycle (1708.07120; the "
        "warm-up is its rise), or step (× step_factor at each of step_at)",
    )
    step_at: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(max_length=16)] = Field(
        (0.5, 0.75), description="schedule step: shares of the training after which the rate falls"
    )
    step_factor: Annotated[float, Field(gt=0, le=1)] = Field(0.1, description="schedule step: the factor")
    warmup_epochs: NotNegative = Field(1.0, description="Linear warm-up, in epochs")
    ema: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay a step of the moving average of weights that is evaluated and kept; 0 = off"
    )
    loss: LossName = Field(
        "cross_entropy",
        description="cross_entropy, or your own as package.module:name: (logits, labels) to one loss a picture",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="cross_entropy: share of each label that is spread over all classes (arXiv 1512.00567)"
    )
    clip_norm: MaybePositive = Field(None, description="Clip the gradient's norm to this; none: off")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast on GPUs that have it, float32 elsewhere"
    )
    compile: bool = Field(False, description="torch.compile the network: about a minute to start, faster steps")
    channels_last: Literal["auto"] | bool = Field("auto", description="NHWC memory layout; auto: on with ddp")
    drop_last: bool = Field(True, description="Leave out an epoch's last batch if it is not full")
    checkpoint_steps: MaybeCount = Field(
        None, description="Checkpoint every so many steps, beside the end of each epoch"
    )
    checkpoint_seconds: MaybePositive = Field(
        300.0, description="Checkpoint after so many seconds without one; none: only by steps and epochs"
    )
    keep_checkpoints: Count = Field(2, description="Newest checkpoints that are kept, beside the best")
    eval_batch_size: Count = Field(512, description="Pictures at once when a network is evaluated")
    eval_flip: bool = Field(
        False, description="Validation during training averages the logits of a picture and its mirror image"
    )

    @model_validator(mode="after")
    def _one_loss(self) -> Train:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(f"label_smoothing belongs to loss cross_entropy, found loss {self.loss}: set it to 0")
        return self


class Scaling(Section):
    """How many workers, what each gets, and how the training is spread over them. Names as in Ray's ScalingConfig."""

    workers: Annotated[int | tuple[int, int], BeforeValidator(worker_count)] = Field(
        1, description="Training workers; [min, max]: as many as the cluster has room for, changing as it does"
    )
    workers_per_node: MaybeCount = Field(None, description="Most workers on one node; none: packed")
    cpus_per_worker: Positive = Field(1.0, description="Logical CPUs a worker reserves")
    use_gpu: bool = Field(False, description="One GPU a worker")
    strategy: Literal["ddp", "fsdp", "pipeline"] = Field(
        "ddp",
        description="ddp: each worker holds the whole model; fsdp: parameters, gradients and optimizer state are "
        "sharded; pipeline: each worker holds a stage, train.accumulate micro-batches flow through",
    )
    sync_batchnorm: bool = Field(False, description="ddp: BatchNorm over the global batch, not a worker's share")
    gradient_compression: Annotated[Literal["bf16"] | None, BeforeValidator(none_word)] = Field(
        None, description="ddp: send gradients as bfloat16"
    )
    stages: MaybeCount = Field(None, description="pipeline: stages; workers / stages replicas; none: one a worker")
    pipeline_schedule: Literal["1f1b", "gpipe"] = Field(
        "1f1b", description="pipeline: 1f1b (arXiv 1806.03377; keeps few activations) or gpipe (1811.06965)"
    )
    cut_points: Annotated[tuple[str, ...], Field(max_length=4095)] = Field(
        (), description="pipeline: modules with which each further stage begins; none named: balanced by cost"
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(2, description="Worker failures to recover from")
    stall_timeout_s: Positive = Field(900.0, description="Fail if no step is done for so long, saying who waits where")
    resize_interval_s: Positive = Field(30.0, description="workers [min, max]: seconds between looks for room to grow")

    @property
    def min_workers(self) -> int:
        """Fewest workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change."""
        return self.min_workers < self.max_workers

    @model_validator(mode="after")
    def _fits_strategy(self) -> Scaling:
        if self.strategy != "ddp":
            for key in ("sync_batchnorm", "gradient_compression"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs strategy ddp, found {self.strategy}")
        if self.strategy != "pipeline":
            for key in ("stages", "cut_points"):
                if getattr(self, key):
                    raise ValueError(f"{key} needs strategy pipeline, found {self.strategy}")
            return self
        if self.elastic:
            raise ValueError("strategy pipeline needs a fixed number of workers; [min, max] works with ddp and fsdp")
        stages = self.pipeline_stages
        if self.max_workers % stages:
            raise ValueError(f"workers {self.max_workers} is no multiple of stages {stages}")
        if self.cut_points and len(self.cut_points) != stages - 1:
            raise ValueError(f"{stages} stages need {stages - 1} cut_points, found {len(self.cut_points)}")
        return self

    @property
    def pipeline_stages(self) -> int:
        """Stages of the pipeline; 1 for other strategies."""
        return (self.stages or self.max_workers) if self.strategy == "pipeline" else 1

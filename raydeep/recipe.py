"""The sections of a job that say how a network is made smaller and what is exported of it.

Defaults live here and nowhere else. A stage receives its own section only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raydeep.fields import (
    Bits,
    Count,
    MaybeCount,
    NotNegative,
    Positive,
    Probability,
    PruneKind,
    ScoreName,
    Section,
    WeightBits,
)


class Prune(Section):
    """Which weights become zero, or which channels go."""

    kind: PruneKind = Field(
        "weights",
        description="weights (single ones become zero), N:M such as 2:4 (of M neighbours along the input N stay), "
        "or channels (whole ones go: a narrower, faster network)",
    )
    sparsity: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="weights: share of zeros; channels: share of `target` that goes; N:M: given by the pattern"
    )
    score: ScoreName = Field(
        "magnitude",
        description="What stays: largest magnitude, lamp (arXiv 2010.07611), taylor (first order, 1906.10771); "
        "channels: by group, bn_scale (1708.06519) too; or your own for weights, as package.module:name",
    )
    rates: Literal["global", "uniform", "erk"] = Field(
        "global",
        description="weights: one threshold for all, the same share in each, or Erdős–Rényi kernel (1911.11134)",
    )
    schedule: Literal["one_shot", "cubic", "iterative"] = Field(
        "cubic",
        description="one_shot; cubic: weights, over the first half of recovery (arXiv 1710.01878); iterative: rounds "
        "of pruning, each recovered (1506.02626)",
    )
    rounds: Annotated[int, Field(ge=2, le=100)] = Field(
        3, description="schedule iterative: rounds; they share the epochs of recovery"
    )
    rewind: Literal["learning_rate", "weights"] = Field(
        "learning_rate",
        description="schedule iterative: each round starts with the learning rate anew (arXiv 2003.02389), or with the "
        "dense model's weights too (1803.03635)",
    )
    target: Literal["macs", "parameters"] = Field(
        "macs", description="channels: what `sparsity` is a share of: multiply-accumulates or parameters"
    )

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of N:M."""
        n, sep, m = self.kind.partition(":")
        return (int(n), int(m)) if sep else None

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.sparsity > 0 or self.pattern is not None

    @model_validator(mode="after")
    def _fits_kind(self) -> Prune:
        if self.score == "bn_scale" and self.kind != "channels":
            raise ValueError("score bn_scale ranks channels: use kind channels, or score magnitude, lamp or taylor")
        if self.score == "lamp" and self.kind != "weights":
            raise ValueError(f"score lamp ranks single weights: use kind weights, or score magnitude with {self.kind}")
        if ":" in self.score and self.kind == "channels":
            raise ValueError(f"score {self.score} ranks single weights: use kind weights or N:M")
        if self.rewind == "weights" and self.kind == "channels":
            raise ValueError("rewind weights needs the network as wide as it was: use rewind learning_rate")
        if self.rates != "global" and self.kind != "weights":
            raise ValueError(f"rates {self.rates} needs kind weights, found {self.kind}")
        return self


class Quantize(Section):
    """Bit widths; steps are learned during recovery (LSQ, arXiv 1902.08153), or calibrated where there is none."""

    weight_bits: WeightBits = Field(
        None, description="2 to 8, none for float, or {average: 4}: each layer its own, by measured sensitivity"
    )
    activation_bits: Bits = Field(None, description="2 to 8, or none for float; needs weight_bits")
    edge_bits: Bits = Field(
        8, description="Least bits of the first and last layer; none: like the others. {average: …} does not heed it"
    )
    calibration_rows: Count = Field(512, description="Train rows that set the first steps and measure sensitivity")
    scheme: Literal["symmetric", "affine"] = Field(
        "symmetric",
        description="Grid of activations that can be negative: symmetric about 0, or affine (its own zero point)",
    )
    power_of_two: bool = Field(False, description="Steps are powers of two: scaling is a shift; BatchNorm stays apart")
    epochs: Annotated[int, Field(ge=0, le=100_000)] | None = Field(
        None,
        description="Quantization-aware training after recovery, at recover.lr × lr_factor; none: within recovery; "
        "0: after it, without training (post-training quantization)",
    )
    lr_factor: Positive = Field(0.5, description="Peak learning rate of `epochs`, as a share of recover.lr")
    bias_correction: bool = Field(
        True, description="Without training: shift biases by the mean error of outputs (arXiv 1906.04721)"
    )
    rounding: Literal["nearest", "adaptive"] = Field(
        "nearest", description="Without training: adaptive learns which weights round up (AdaRound, arXiv 2004.10568)"
    )

    @property
    def trains(self) -> bool:
        """Whether quantizers are trained, given that there is recovery."""
        return self.epochs is None or self.epochs > 0


class Distill(Section):
    """Learn from a teacher (arXiv 1503.02531): the dense model, during recovery, unless another is named."""

    enabled: bool = Field(False, description="Whether a teacher is listened to")
    teacher: str = Field(
        "dense",
        description="dense (what compression starts from), ema (the student's own moving average, arXiv 1703.01780), a "
        "run or model folder, or torchvision:NAME@WEIGHTS; all but dense work in raydeep train too",
    )
    weight: Probability = Field(0.7, description="Share of the distillation loss on logits")
    temperature: Positive = Field(4.0, description="Of the softened logits")
    hints: NotNegative = Field(0.0, description="Weight of the feature loss, through learned projections (1412.6550)")
    hint_layers: Annotated[tuple[Annotated[str, Field(coerce_numbers_to_str=True)], ...], Field(max_length=64)] = Field(
        (), description="Student modules whose outputs are hinted, or STUDENT=TEACHER; none: one a resolution"
    )
    relational: NotNegative = Field(
        0.0, description="Weight of the relational loss, distances and angles of logits within a batch (1904.05068)"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] = Field(0.99, description="teacher ema: decay a step")

    @property
    def trains_dense(self) -> bool:
        """Whether raydeep train distils: the dense model can't be its own teacher."""
        return self.enabled and self.teacher != "dense"


class Recover(Section):
    """Training after compression: the same loop, gentler."""

    epochs: Annotated[int, Field(ge=0, le=100_000)] = Field(
        4, description="Passes over the train split after compression; 0: none, in one shot"
    )
    lr: Positive = Field(0.01, description="Peak learning rate of recovery")
    batch_size: MaybeCount = Field(None, description="none: that of train")


class Export(Section):
    """What is written for each model of the front, and how it is measured."""

    max_models: Count = Field(
        8,
        description="At most so many models, spread over the front; beside them the smallest that is close to the "
        "dense one, and the best under each constraint",
    )
    target: Literal["avx2", "vnni", "arm", "gpu"] = Field(
        "avx2",
        description="Processor that the integer graph is for. avx2: right on any (8-bit pairs as unsigned, or 7-bit "
        "weights); vnni and arm: signed 8-bit weights; gpu: symmetric activations",
    )
    runtimes: Annotated[tuple[Literal["onnxruntime", "openvino"], ...], Field(min_length=1, max_length=2)] = Field(
        ("onnxruntime",), description="Runtimes that predictions and latency are checked in; openvino is an extra"
    )
    latency_rounds: Annotated[int, Field(ge=3)] = Field(15, description="Interleaved rounds of the latency test")
    batch_sizes: Annotated[tuple[Count, ...], Field(min_length=1, max_length=4)] = Field(
        (1, 64), description="Batches of the latency test; the first is the one that tables quote"
    )
    torch_compile: bool = Field(False, description="Time the dense model under torch.compile too (a minute to start)")
    license: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.+-]{0,63}$")] = Field(
        "unknown",
        description="Of the models, for their cards: an identifier as the Hugging Face Hub has them (apache-2.0, "
        "cc-by-4.0, …), or other",
    )

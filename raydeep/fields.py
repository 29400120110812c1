"""Types of the values in a job, and the base of its sections."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from raydeep import own


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, false and YAML's yes, no, on, off for a number: pydantic takes them for 1 and 0."""
        field = cls.model_fields[str(info.field_name)]
        checked = any(isinstance(one, BeforeValidator) for one in field.metadata)  # says itself what it expects
        if isinstance(value, bool) and not checked and not _takes(field.annotation, bool):
            raise ValueError("expected no true or false (nor yes, no, on or off)")
        return value


def _takes(annotation: Any, kind: type) -> bool:
    """Whether a type, or a part of it, is this one or any."""
    return annotation in (kind, Any) or any(_takes(part, kind) for part in get_args(annotation))


class Average(Section):
    """Bits of each layer by its measured sensitivity, so many on average."""

    average: Annotated[float, Field(ge=2, le=8)]


def none_word(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "null", "~", "") else value


def _bits(value: Any) -> Any:
    value = none_word(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 2 <= value <= 8):
        return value
    raise ValueError("expected a whole number of bits from 2 to 8, or none for float")


def _weight_bits(value: Any) -> Any:
    if isinstance(value, Average):
        return value
    try:
        return Average.model_validate(value) if isinstance(value, dict) else _bits(value)
    except ValueError:
        found = f"found {value!r}, " if isinstance(value, dict) else ""  # of plain values the caller tells
        raise ValueError(
            f"{found}expected a whole number of bits from 2 to 8, none for float, or {{average: BITS}} with 2 to 8"
        ) from None


def _prune_kind(value: Any) -> Any:
    if isinstance(value, str) and (value in ("weights", "channels") or re.fullmatch(r"\d{1,2}:\d{1,2}", value)):
        n, sep, m = value.partition(":")
        if not sep or 0 < int(n) < int(m) <= 32:
            return value
    raise ValueError("expected weights, channels, or N:M with 0 < N < M <= 32, such as 2:4")


def _pair(value: Any) -> Any:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        if not 0 < value[0] <= value[1] < float("inf"):
            raise ValueError("expected [low, high] with 0 < low <= high, both finite")
        return tuple(float(v) for v in value)
    raise ValueError("expected two numbers: [low, high]")


SOURCES = ("digits", "synthetic", "folder", "images", "parquet", "webdataset")
TORCHVISION = "torchvision:"


def _source(value: Any) -> Any:
    if isinstance(value, str) and (value in SOURCES or re.fullmatch(rf"{TORCHVISION}[A-Za-z]\w*", value)):
        return value
    if isinstance(value, str) and not value.startswith(TORCHVISION) and own.NAME.fullmatch(value):
        return value
    raise ValueError(
        f"expected {', '.join(SOURCES)}, {TORCHVISION}NAME (a class of torchvision.datasets), or package.module:factory"
    )


LOSSES = ("cross_entropy",)
SCORES = ("magnitude", "lamp", "taylor", "bn_scale")


def _or_own(known: tuple[str, ...]) -> BeforeValidator:
    """One of these words, or a function of the user's own."""

    def check(value: Any) -> Any:
        if isinstance(value, str) and (value in known or own.NAME.fullmatch(value)):
            return value
        raise ValueError(f"expected {', '.join(known)}, or your own function as package.module:name")

    return BeforeValidator(check)


def _schema(known: tuple[str, ...]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"enum": list(known)}, {"type": "string", "pattern": f"^{own.NAME.pattern}$"}]})


LossName = Annotated[str, _or_own(LOSSES), _schema(LOSSES)]
ScoreName = Annotated[str, _or_own(SCORES), _schema(SCORES)]


WeightBits = Annotated[int | Average | None, BeforeValidator(_weight_bits)]
PruneKind = Annotated[str, BeforeValidator(_prune_kind)]
Bits = Annotated[int | None, BeforeValidator(_bits)]
Range2 = Annotated[tuple[float, float], BeforeValidator(_pair)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
MaybeCount = Annotated[Count | None, BeforeValidator(none_word)]
MaybePositive = Annotated[Positive | None, BeforeValidator(none_word)]
MaybeSide = Annotated[Annotated[int, Field(ge=4, le=4096)] | None, BeforeValidator(none_word)]
SourceName = Annotated[str, BeforeValidator(_source)]
MaybeText = Annotated[str | None, BeforeValidator(none_word)]
Share = Annotated[float, Field(ge=0, le=1)]


def worker_count(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 2:
        value = tuple(value)
    numbers = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    if all(isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 4096 for n in numbers) and (
        len(numbers) == 1 or numbers[0] <= numbers[1]
    ):
        return value
    raise ValueError("expected a number of workers from 1 to 4096, or [min, max] to grow and shrink with the cluster")

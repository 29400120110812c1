"""The search space, pure: which configurations there are and which of them are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from raydeep.tuning import Choices, Range, choices

Config = dict[str, Any]
Space = Mapping[str, Any]  # dotted key → list of choices, Choices or Range

MOST = 20_000  # configurations that are counted out


def canonical(config: Config) -> Config:
    """Configurations that give the same model become equal: activations need integer weights beside them, the
    pattern of N:M is its sparsity.
    """
    out = dict(config)
    if ":" in str(out.get("prune.kind")) and "prune.sparsity" in out:
        out["prune.sparsity"] = 0.0
    if "quantize.weight_bits" in out and out["quantize.weight_bits"] is None and "quantize.activation_bits" in out:
        out["quantize.activation_bits"] = None
    return out


def plain(value: Any) -> Any:
    """A choice as Optuna takes it: lists and mappings as text."""
    return json.dumps(value, sort_keys=True) if isinstance(value, (list, tuple, dict)) else value


def key(config: Config) -> str:
    """A text that is equal for equal configurations."""
    return json.dumps(canonical(config), sort_keys=True)


def counts(dimension: Any, config: Config) -> bool:
    """Whether a key has a part in a configuration, by the keys before it."""
    when = dimension.when if isinstance(dimension, (Choices, Range)) else {}
    return all(other in config and config[other] in values for other, values in when.items())


def everything(space: Space) -> list[Config] | None:
    """All distinct configurations, in a fixed order; None where a range has no end of them, or they are over MOST."""
    if any(isinstance(d, Range) and d.grid() is None for d in space.values()):
        return None
    seen: dict[str, Config] = {}
    for n, config in enumerate(each(space)):
        if n >= MOST:
            return None
        seen.setdefault(key(config), config)
    return list(seen.values())


def each(space: Space) -> Iterator[Config]:
    """All configurations in a fixed order, of a space whose ranges have an end; equal ones may come again."""
    return _all(list(space.items()), {})


def _all(left: list[tuple[str, Any]], config: Config) -> Iterator[Config]:
    if not left:
        yield config
        return
    (name, dimension), *rest = left
    if not counts(dimension, config):
        yield from _all(rest, config)
        return
    for value in choices(dimension):
        yield from _all(rest, canonical({**config, name: value}))


def distance(space: Space, a: Config, b: Config) -> float:
    """How unlike two configurations are: over the keys of the space, the share of a range or list between them."""
    total = 0.0
    for name, dimension in space.items():
        if name not in a or name not in b:
            total += float(name in a or name in b)
            continue
        one, other = a[name], b[name]
        if isinstance(dimension, Range):
            low, high = dimension.low, dimension.high
            if dimension.log:
                one, other, low, high = (math.log(v) for v in (one, other, low, high))
            total += abs(one - other) / (high - low)
        elif one != other:
            ordered = [v for v in choices(dimension) if isinstance(v, (int, float)) and not isinstance(v, bool)]
            if one in ordered and other in ordered and len(ordered) > 1:
                total += abs(ordered.index(one) - ordered.index(other)) / (len(ordered) - 1)
            else:
                total += 1.0
    return total

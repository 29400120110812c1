"""The search space, pure: which configurations there are and which of them are the same."""

from __future__ import annotations

import itertools
import json
from typing import Any

Config = dict[str, Any]


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


def everything(space: dict[str, list[Any]]) -> list[Config]:
    """All distinct configurations, in a fixed order."""
    seen: dict[str, Config] = {}
    for values in itertools.product(*space.values()):
        config = canonical(dict(zip(space, values, strict=True)))
        seen.setdefault(key(config), config)
    return list(seen.values())

"""A narrowed network as data: which sizes of its layers are not those of the network that its name builds.

Facts are JSON: module path → attribute → whole number, or list of them. Only sizes stand in them, and only smaller
ones, so that what a model file says can't build anything larger than its network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from raydeep.errors import ModelError

Facts = dict[str, dict[str, Any]]
Shapes = dict[str, tuple[int, ...]]  # own parameter or buffer → shape


class Kind(NamedTuple):
    """A type of layer: the attributes that hold its sizes, and the shapes that follow from them."""

    attributes: tuple[str, ...]
    shapes: Callable[[Any], Shapes]  # a module with the attributes set → the shapes that it must have


def _conv(module: Any) -> Shapes:
    ends = (module.out_channels, module.in_channels // module.groups)
    if module.transposed:
        ends = (module.in_channels, module.out_channels // module.groups)
    return {"weight": (*ends, *module.kernel_size), "bias": (module.out_channels,)}


def _batchnorm(module: Any) -> Shapes:
    return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))


KINDS: dict[type, Kind] = {
    nn.modules.conv._ConvNd: Kind(("in_channels", "out_channels", "groups"), _conv),
    nn.Linear: Kind(
        ("in_features", "out_features"),
        lambda m: {"weight": (m.out_features, m.in_features), "bias": (m.out_features,)},
    ),
    nn.modules.batchnorm._NormBase: Kind(("num_features",), _batchnorm),
    nn.GroupNorm: Kind(("num_channels",), lambda m: dict.fromkeys(("weight", "bias"), (m.num_channels,))),
    nn.LayerNorm: Kind(("normalized_shape",), lambda m: dict.fromkeys(("weight", "bias"), tuple(m.normalized_shape))),
    nn.PReLU: Kind(("num_parameters",), lambda m: {"weight": (m.num_parameters,)}),
}


def _kind(module: nn.Module) -> Kind:
    """How a module is narrowed; one of no known type by the shapes of what it holds itself."""
    return next((kind for type_, kind in KINDS.items() if isinstance(module, type_)), Kind((), lambda m: {}))


def _held(module: nn.Module) -> dict[str, torch.Tensor]:
    """Own parameters and buffers."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return dict(own)


def difference(fresh: nn.Module, narrowed: nn.Module) -> Facts:
    """What `apply` must do to make of one network the other.

    Args:
        fresh: as its name builds it.
        narrowed: the same network after channels were pruned.

    Raises:
        ModelError: they are not the same network but for their sizes.
    """
    modules = dict(narrowed.named_modules())
    facts: Facts = {}
    for path, before in fresh.named_modules():
        after = modules.pop(path, None)
        if type(before) is not type(after) or after is None:
            raise ModelError(f"module {path}: found {type(after).__name__}, expected {type(before).__name__}")
        kind, sizes = _kind(before), {}
        for name in kind.attributes:
            value = getattr(after, name)
            if value != getattr(before, name):
                sizes[name] = list(value) if isinstance(value, tuple) else value
        held, implied = _held(after), kind.shapes(after)
        for name, tensor in _held(before).items():
            if name not in implied and name in held and held[name].shape != tensor.shape:
                sizes[name] = list(held[name].shape)
        if sizes:
            facts[path] = sizes
    if modules:
        raise ModelError(f"module {next(iter(modules))} is not in the network that was narrowed")
    return facts


def apply(fresh: nn.Module, facts: Facts) -> None:
    """Narrow a network in place; of each weight the first channels stay.

    Args:
        fresh: as its name builds it.
        facts: of `difference`, perhaps out of a file: nothing in it is trusted.

    Raises:
        ModelError: a module, attribute or size that does not fit the network; the network may be half done then.
    """
    modules = dict(fresh.named_modules())
    if not isinstance(facts, dict):
        raise ModelError(f"widths: found {type(facts).__name__}, expected a table of modules")
    for path, sizes in facts.items():
        if path not in modules:
            raise ModelError(f"widths: the network has no module {path}")
        if not isinstance(sizes, dict):
            raise ModelError(f"widths of {path}: found {type(sizes).__name__}, expected a table of sizes")
        _resize(path, modules[path], sizes)


def _resize(path: str, module: nn.Module, sizes: dict[str, Any]) -> None:
    kind, held = _kind(module), _held(module)
    wanted: Shapes = {}
    own = [name for name in held if name not in kind.shapes(module)]
    for name, value in sizes.items():
        if name not in kind.attributes and name not in own:
            raise ModelError(
                f"widths of {path}: {type(module).__name__} has no size {name}; expected "
                f"{' or '.join([*kind.attributes, *own]) or 'none'}"
            )
        before = tuple(held[name].shape) if name in own else getattr(module, name)
        _check(f"widths of {path}: {name}", value, before)
        if name in own:
            wanted[name] = tuple(value)
        else:
            setattr(module, name, tuple(value) if isinstance(before, tuple) else value)
    _check_groups(path, module)
    for name, shape in {**kind.shapes(module), **wanted}.items():
        if name in held and held[name].shape != shape:
            _narrow(path, module, name, shape)


def _check(where: str, value: Any, before: Any) -> None:
    """Refuse a size that is not a whole number from 1 to what it was, or a list of such."""
    values, limits = (value, before) if isinstance(before, tuple) else ([value], (before,))
    if not isinstance(values, list) or len(values) != len(limits):
        raise ModelError(f"{where}: found {value!r}, expected {len(limits)} whole numbers")
    for found, limit in zip(values, limits, strict=True):
        if type(found) is not int or not 1 <= found <= limit:
            raise ModelError(f"{where}: found {found!r}, expected a whole number from 1 to {limit}")


def _check_groups(path: str, module: Any) -> None:
    """Refuse channels that can't be shared out evenly."""
    if isinstance(module, nn.modules.conv._ConvNd):
        groups, channels = module.groups, (module.in_channels, module.out_channels)
    elif isinstance(module, nn.GroupNorm):
        groups, channels = module.num_groups, (module.num_channels, 0)
    else:
        return
    for count in channels:
        if count % groups:
            raise ModelError(f"widths of {path}: {count} channels are no multiple of its {groups} groups")


def _narrow(path: str, module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    old = getattr(module, name)
    if old.dim() != len(shape) or any(new > size for new, size in zip(shape, old.shape, strict=True)):
        raise ModelError(f"widths of {path}: {name} of shape {list(old.shape)} can't become {list(shape)}")
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        setattr(module, name, new)

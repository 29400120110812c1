"""Quantization: where quantizers go and what their first steps are; BatchNorm re-estimation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Quantize

SAMPLE = 1 << 16  # values of a tensor that the search for its step looks at


def widths(names: list[str], cfg: Quantize) -> dict[str, tuple[int | None, int | None]]:
    """Layer name → (weight bits, activation bits); the first and last layer get `edge_bits` or more."""
    out = {}
    for i, name in enumerate(names):
        pair = (cfg.weight_bits, cfg.activation_bits)
        if i in (0, len(names) - 1) and cfg.edge_bits is not None:
            pair = tuple(None if b is None else max(b, cfg.edge_bits) for b in pair)  # type: ignore[assignment]
        out[name] = pair
    return out


@torch.no_grad()
def prepare(model: nn.Module, cfg: Quantize, calibration: list[torch.Tensor]) -> None:
    """Add quantizers, their steps set by least mean squared error on calibration data.

    Args:
        model: changed in place; perhaps already masked.
        cfg: the quantize section.
        calibration: batches of network inputs, float NCHW.
    """
    if cfg.weight_bits is None:
        return
    found = dict(layers.compressible(model))
    bits = widths(list(found), cfg)
    seen = _inputs(model, found, calibration) if cfg.activation_bits is not None else {}
    for name, module in found.items():
        weight_bits, activation_bits = bits[name]
        assert weight_bits is not None
        if activation_bits is not None and name in seen:
            values = seen[name]
            signed = bool(values.min() < 0)
            low, high = layers.activation_range(activation_bits, signed)
            step = layers.best_step(values[None], low, high).item()
            layers.add_input_quant(module, activation_bits, low, step)
            module.input_quant.to(values.device)
        layers.add_weight_quant(module, weight_bits)


def _inputs(model: nn.Module, found: dict[str, nn.Module], calibration: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """A sample of the input values of each layer, flat float32."""
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    each = max(1, SAMPLE // max(1, len(calibration)))
    handles = []
    for name, module in found.items():

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            flat = args[0].detach().flatten()
            ends = torch.stack([flat.min(), flat.max()])  # the ends decide sign and range: never sampled away
            parts[name].append(torch.cat([flat[:: max(1, flat.numel() // each)], ends]))

        handles.append(module.register_forward_pre_hook(hook))
    training = model.training
    model.eval()
    for images in calibration:
        model(images)
    model.train(training)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values).float() for name, values in parts.items() if values}


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: list[torch.Tensor]) -> None:
    """Set BatchNorm's running statistics to the averages over the calibration batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a cumulative average
        module.train()
    for images in calibration:
        model(images)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
    model.eval()

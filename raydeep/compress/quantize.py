"""Quantization: where quantizers go, what their first steps are, what is mended where nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from raydeep.compress import adaround
from raydeep.compress.observe import Images, output_means, run, trace
from raydeep.fields import Average
from raydeep.model import layers

if TYPE_CHECKING:
    from raydeep.config import Quantize

SAMPLE = 1 << 16  # values of a tensor that the search for its step looks at


def widths(
    names: list[str], cfg: Quantize, bits: Mapping[str, int] | None = None
) -> dict[str, tuple[int | None, int | None]]:
    """Layer name → (weight bits, activation bits); the first and last layer get `edge_bits` or more.

    Weight bits that were allocated (`bits`) stay as they are.
    """
    out: dict[str, tuple[int | None, int | None]] = {}
    for i, name in enumerate(names):
        least = (cfg.edge_bits or 0) if i in (0, len(names) - 1) else 0
        if bits is not None:
            weight: int | None = bits[name]
        else:
            assert not isinstance(cfg.weight_bits, Average), "an average is allocated first: allocate.solve"
            weight = None if cfg.weight_bits is None else max(cfg.weight_bits, least)
        out[name] = weight, None if cfg.activation_bits is None else max(cfg.activation_bits, least)
    return out


@torch.no_grad()
def prepare(
    model: nn.Module,
    cfg: Quantize,
    calibration: Images,
    bits: Mapping[str, int] | None = None,
    weight_qmax: int | None = None,
) -> None:
    """Add quantizers, their steps set by least mean squared error on calibration data.

    Args:
        model: changed in place; perhaps already masked or narrowed.
        cfg: the quantize section.
        calibration: batches of network inputs, float NCHW.
        bits: weight bits of each layer, where `cfg.weight_bits` is an average: see allocate.solve.
        weight_qmax: bound on the integers of 8-bit weights; 64 keeps sums of two products with 8-bit
            activations within 16 bits, which processors without VNNI saturate at.
    """
    if cfg.weight_bits is None:
        return
    found = dict(layers.compressible(model))
    chosen = widths(list(found), cfg, bits)
    seen = _inputs(model, found, enough(calibration, cfg.calibration_rows)) if cfg.activation_bits is not None else {}
    for name, module in found.items():
        weight_bits, activation_bits = chosen[name]
        assert weight_bits is not None
        if activation_bits is not None and name in seen:
            values = seen[name]
            low, step = _grid(values, activation_bits, cfg)
            layers.add_input_quant(module, activation_bits, low, step, cfg.power_of_two)
            module.input_quant.to(values.device)
        layers.add_weight_quant(module, weight_bits, cfg.power_of_two, weight_qmax if weight_bits == 8 else None)


def _grid(values: torch.Tensor, bits: int, cfg: Quantize) -> tuple[int, float]:
    """Smallest integer and step for such values."""
    signed = bool(values.min() < 0)
    if signed and cfg.scheme == "affine":
        return layers.best_affine(values, bits, cfg.power_of_two)
    low, high = layers.activation_range(bits, signed)
    return low, layers.best_step(values[None], low, high, cfg.power_of_two).item()


def enough(calibration: Images, rows: int) -> Images:
    """The first batches, of so many rows together or more: means and steps need fewer than BatchNorm."""
    out: Images = []
    for images in calibration:
        out.append(images)
        if sum(map(len, out)) >= rows:
            break
    return out


def _inputs(model: nn.Module, found: dict[str, nn.Module], calibration: Images) -> dict[str, torch.Tensor]:
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
    run(model, calibration, handles)
    return {name: torch.cat(values).float() for name, values in parts.items() if values}


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, calibration: Images) -> None:
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


def post_training(model: nn.Module, cfg: Quantize, calibration: Images, float_model: nn.Module) -> None:
    """Mend a prepared network that is not trained: rounding of weights, BatchNorm, biases, as the section says.

    Args:
        model: with quantizers, changed in place and left in evaluation mode.
        cfg: the quantize section.
        calibration: batches of network inputs, float NCHW.
        float_model: the same network without quantizers.
    """
    model.eval()
    float_model.eval()
    if cfg.rounding == "adaptive":
        adaround.round_adaptively(model, float_model, calibration)
    reestimate_batchnorm(model, calibration)
    if cfg.bias_correction:
        few = enough(calibration, cfg.calibration_rows)
        correct_bias(model, output_means(float_model, few), few)


@torch.no_grad()
def correct_bias(model: nn.Module, expected: Mapping[str, torch.Tensor], calibration: Images) -> None:
    """Shift the bias of each quantized layer by the mean error of its output (arXiv 1906.04721, section 4.2).

    Layer after layer as they run, so that each mends what is left of the errors before it. A layer in front of a
    BatchNorm is left alone: re-estimating that does the same. So is one without a bias.

    Args:
        model: with quantizers, in evaluation mode; changed in place.
        expected: mean outputs of the network without quantizers: `output_means` of it.
        calibration: batches of network inputs, float NCHW.
    """
    order, normed = trace(model, calibration[0][:2])
    for name in order:
        module = model.get_submodule(name)
        bias: torch.Tensor | None = module.bias  # type: ignore[assignment]
        if bias is None or name in normed or layers.part(module, layers.WeightQuant) is None:
            continue
        only = name if order[name] == 1 else None
        error = expected[name] - output_means(model, calibration, only)[name]
        bias += error.to(bias.dtype)

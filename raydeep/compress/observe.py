"""What goes through the layers of a network: passes with hooks that come off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from raydeep.model import layers

Images = list[torch.Tensor]  # batches of network inputs, float NCHW
Labelled = Sequence[tuple[torch.Tensor, torch.Tensor]]  # the same with labels, int64 N


class Enough(Exception):
    """Raised by a hook: the rest of this pass is not needed."""


def run(model: nn.Module, batches: Images, handles: list[RemovableHandle]) -> None:
    """A pass over the batches in evaluation mode; then the hooks come off, whatever happened."""
    training = model.training
    model.eval()
    try:
        for images in batches:
            try:
                model(images)
            except Enough:
                continue
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


@torch.no_grad()
def output_means(model: nn.Module, batches: Images, last: str | None = None) -> dict[str, torch.Tensor]:
    """Mean output of layers that can be quantized, a channel: float64 of shape [channels].

    Args:
        model: with or without quantizers.
        batches: network inputs, float NCHW.
        last: name of the only layer that is asked for: passes end there.
    """
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}
    handles = []
    for name, module in layers.compressible(model):

        def hook(module: nn.Module, args: object, out: torch.Tensor, name: str = name) -> None:
            channel = out.dim() - (3 if isinstance(module, nn.Conv2d) else 1)
            others = [d for d in range(out.dim()) if d != channel]
            sums[name] = sums.get(name, 0) + out.sum(others, dtype=torch.float64)
            counts[name] = counts.get(name, 0) + out.numel() // out.shape[channel]
            if name == last:
                raise Enough

        if last in (None, name):
            handles.append(module.register_forward_hook(hook))
    run(model, batches, handles)
    return {name: total / counts[name] for name, total in sums.items()}


@torch.no_grad()
def trace(model: nn.Module, images: torch.Tensor) -> tuple[dict[str, int], set[str]]:
    """How a network runs.

    Args:
        model: any.
        images: a few inputs, float NCHW.

    Returns:
        Name of each layer that can be quantized → how often it ran, in the order of their first runs; and the names
        of those whose output a BatchNorm reads.
    """
    runs: dict[str, int] = {}
    normed: set[str] = set()
    outputs: list[tuple[torch.Tensor, str]] = []  # kept, so that each is an object of its own
    handles: list[RemovableHandle] = []
    for name, module in layers.compressible(model):

        def after(module: nn.Module, args: object, out: torch.Tensor, name: str = name) -> None:
            runs[name] = runs.get(name, 0) + 1
            outputs.append((out, name))

        handles.append(module.register_forward_hook(after))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def before(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
                normed.update(name for out, name in outputs if out is args[0])

            handles.append(module.register_forward_pre_hook(before))
    run(model, [images], handles)
    return runs, normed

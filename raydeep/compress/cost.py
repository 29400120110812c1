"""What a model costs: parameters, non-zeros, multiply-accumulates, bytes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import nn

from raydeep.compress import pack
from raydeep.model import artifact, layers


class Cost(NamedTuple):
    """Counts over all weights and biases of a frozen network."""

    parameters: int
    nonzeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return 1 - self.nonzeros / max(1, self.parameters)


def count(tensors: dict[str, torch.Tensor]) -> Cost:
    """Parameters and non-zeros of frozen tensors; scales and BatchNorm's statistics are not counted."""
    others = (".weight.scale", ".running_mean", ".running_var")
    counted = [t for name, t in tensors.items() if not name.endswith(others)]
    return Cost(sum(t.numel() for t in counted), sum(int(torch.count_nonzero(t)) for t in counted))


def weights(tensors: dict[str, torch.Tensor]) -> Cost:
    """The same of the weights of convolutions and linear layers alone: what pruning is a share of."""
    found = [t for name, t in tensors.items() if name.endswith((".weight", ".weight.q")) and t.dim() > 1]
    return Cost(sum(t.numel() for t in found), sum(int(torch.count_nonzero(t)) for t in found))


def file_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of the safetensors file of these tensors."""
    return len(save(tensors))


def macs(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one picture of height, width, channels."""
    return sum(layer_macs(model, shape).values())


@torch.no_grad()
def layer_macs(model: nn.Module, shape: tuple[int, int, int]) -> dict[str, int]:
    """Multiply-accumulates of each convolution and linear layer for one picture of height, width, channels."""
    total = {name: 0 for name, _ in layers.compressible(model)}

    def hook(name: str) -> Any:
        def add(module: Any, args: Any, out: torch.Tensor) -> None:
            total[name] += out[0].numel() * module.weight[0].numel()

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in layers.compressible(model)]
    training = model.training
    model.eval()(torch.zeros(1, shape[2], shape[0], shape[1], device=next(model.parameters()).device))
    model.train(training)
    for handle in handles:
        handle.remove()
    return total


def per_layer(packed: bytes) -> list[dict[str, Any]]:
    """What each convolution and linear layer of a packed model costs, in the order of definition.

    Returns:
        Rows of `layer`, `shape` (of the weight), `parameters` and `nonzeros` (of the weight), `weight_bits` and
        `activation_bits` (None: float), `macs` (a picture) and `bytes` (of all its tensors in the packed file).
    """
    spec, tensors = pack.unpack(packed)
    model = artifact.thaw(spec, tensors)
    counted = layer_macs(model, tuple(spec["input"]))
    sizes = {row["name"]: row["bytes"] for row in pack.table(packed)}
    rows = []
    for name, _ in layers.compressible(model):
        weight = tensors.get(f"{name}.weight.q", tensors.get(f"{name}.weight"))
        if weight is None:
            continue
        entry = spec["layers"].get(name, {})
        rows.append({
            "layer": name, "shape": list(weight.shape), "parameters": weight.numel(),
            "nonzeros": int(torch.count_nonzero(weight)), "weight_bits": entry.get("weight_bits"),
            "activation_bits": entry.get("activation", {}).get("bits"), "macs": counted[name],
            "bytes": sum(size for key, size in sizes.items() if key.startswith(f"{name}.")),
        })  # fmt: skip
    return rows

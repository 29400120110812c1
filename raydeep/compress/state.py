"""A network in the middle of compression, as data: what a trial goes on from. Never a pickle."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from raydeep.errors import ModelError
from raydeep.model import artifact, layers

VERSION = 1
ORIGINAL = "parametrizations.weight.original"


class State(NamedTuple):
    """Latent weights, masks and steps, and how they hang together."""

    spec: dict[str, Any]  # of the network without masks and quantizers, as narrow as it is
    layers: dict[str, dict[str, Any]]  # layer name → its `mask` (bool), `weight` and `input` quantizers, or None
    tensors: dict[str, torch.Tensor]  # by state-dict name

    def dense(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Spec and float weights, what is masked included, for another recipe to start from; None of a narrowed one."""
        if self.spec["widths"]:
            return None
        out = {}
        for name, value in self.tensors.items():
            if name.endswith(ORIGINAL):
                out[name.removesuffix(ORIGINAL) + "weight"] = value
            elif ".parametrizations." not in f".{name}" and ".input_quant." not in f".{name}":
                out[name] = value
        return self.spec, out


def snapshot(model: nn.Module, spec: dict[str, Any]) -> State:
    """Copy the state of a network, prepared or not; `spec` is that of the network without masks and quantizers."""
    found = {}
    for name, module in layers.compressible(model):
        weight, value = layers.part(module, layers.WeightQuant), getattr(module, "input_quant", None)
        found[name] = {
            "mask": layers.part(module, layers.Mask) is not None,
            "weight": weight and {"bits": weight.bits, "qmax": weight.qmax, "po2": weight.power_of_two},
            "input": value and {"bits": value.bits, "low": value.low, "po2": value.power_of_two},
        }
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    return State(spec, found, tensors)


def rebuild(state: State) -> nn.Module:
    """The network of `snapshot`, on the CPU, in training mode."""
    model = artifact.build(state.spec)
    for name, module in layers.compressible(model):
        entry = state.layers[name]
        if entry["mask"]:
            layers.add_mask(module)
        if entry["input"]:
            layers.add_input_quant(module, entry["input"]["bits"], entry["input"]["low"], 1.0, entry["input"]["po2"])
        if entry["weight"]:
            layers.add_weight_quant(module, entry["weight"]["bits"], entry["weight"]["po2"], entry["weight"]["qmax"])
    model.load_state_dict(state.tensors)
    return model.requires_grad_(True).train()


def to_bytes(state: State) -> bytes:
    """The state as a safetensors file."""
    about = {"version": VERSION, "spec": state.spec, "layers": state.layers, "sha256": _digest(state.tensors)}
    return save(state.tensors, {"raydeep": json.dumps(about)})


def read(path: Any) -> State:
    """Read a state.

    Raises:
        ModelError: the file is no such state, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["raydeep"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["version"] != VERSION:
            raise ModelError(f"{path}: a state of version {about['version']}, expected {VERSION}")
        if about["sha256"] != _digest(tensors):
            raise ValueError("its sha256 differs")
        return State(about["spec"], about["layers"], tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"{path}: not the state of a trial, or damaged ({err})") from None


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

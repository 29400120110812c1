"""Checkpoints: tensors in safetensors, state in JSON, no pickle. A folder appears whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from raydeep.errors import RaydeepError
from raydeep.run import read_json, sha256_file, write_bytes, write_json

KEEP = 2


class Checkpoint(NamedTuple):
    """What a checkpoint holds."""

    epoch: int  # epochs finished
    step: int  # steps of the next one that are done
    loss_sum: float  # of those steps, over all workers
    steps_per_epoch: int
    model: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


class Moment(NamedTuple):
    """Where in a training a checkpoint is taken."""

    epoch: int
    step: int
    loss_sum: float
    global_step: int
    steps_per_epoch: int


def save(folder: Path, moment: Moment, model: nn.Module, optimizer: torch.optim.Optimizer) -> Path:
    """Write `folder/step-NNNNNNNNN` (of all steps), then drop all but the newest KEEP up to it."""
    own = optimizer.state_dict()
    tensors = {f"model.{k}": v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    plain: dict[str, dict[str, Any]] = {}
    for index, entry in own["state"].items():
        for key, value in entry.items():
            if isinstance(value, torch.Tensor):
                tensors[f"optim.{index}.{key}"] = value.detach().cpu().contiguous()
            else:
                plain.setdefault(str(index), {})[key] = value
    final = folder / f"step-{moment.global_step:09d}"
    aside = folder / f".{final.name}.{os.getpid()}.{secrets.token_hex(3)}.part"
    aside.mkdir(parents=True)
    try:
        write_bytes(aside / "tensors.safetensors", save_tensors(tensors))
        groups = [{k: v for k, v in g.items() if _plain(v)} for g in own["param_groups"]]
        digest = sha256_file(aside / "tensors.safetensors")
        state = {**moment._asdict(), "groups": groups, "plain": plain, "sha256": digest}
        write_json(aside / "state.json", state)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(aside, final)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    kept = [path for path in _all(folder) if path.name <= final.name][-KEEP:]
    for old in _all(folder):
        if old not in kept:  # a later one was passed over as torn, and training goes on from before it
            shutil.rmtree(old, ignore_errors=True)
    return final


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list))


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; one that is torn or changed is passed over."""
    for path in reversed(_all(folder)):
        try:
            state = read_json(path / "state.json")
            file = path / "tensors.safetensors"
            if sha256_file(file) != state["sha256"]:
                continue
            return _checkpoint(state, load_tensors(file.read_bytes()))
        except (OSError, RaydeepError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            continue
    return None


def _checkpoint(state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Checkpoint:
    optim_state: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in state["plain"].items()}
    for key, value in tensors.items():
        if key.startswith("optim."):
            _, index, name = key.split(".", 2)
            optim_state.setdefault(int(index), {})[name] = value
    model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    optimizer = {"state": optim_state, "param_groups": state["groups"]}
    epoch, step, per_epoch = (int(state[key]) for key in ("epoch", "step", "steps_per_epoch"))
    return Checkpoint(epoch, step, float(state["loss_sum"]), per_epoch, model, optimizer)


def clean(folder: Path) -> None:
    """Remove what a killed save left half-written."""
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path, ignore_errors=True)

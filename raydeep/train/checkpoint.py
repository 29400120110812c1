"""Checkpoints: tensors in safetensors, state in JSON, no pickle. A folder appears whole or not at all.

One worker writes them, or, where the model is partitioned, all do (torch.distributed.checkpoint over its safetensors
writer). Both are read alike, whole or by any other number of workers.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor

from raydeep import mirror
from raydeep.disk import read_json, sha256_file
from raydeep.errors import RaydeepError, TrainError
from raydeep.train.average import Average

FORMAT = 3
PATTERN = "step-*"
STATE = "state.json"  # the last file that is written


class Moment(NamedTuple):
    """Where in a training a checkpoint is taken."""

    epoch: int  # epochs finished
    step: int  # steps of the next one that are done
    loss_sum: float  # of those steps, over all workers
    global_step: int
    steps_per_epoch: int
    score: float | None = None  # validation accuracy, at the end of an epoch


class State(NamedTuple):
    """What of a training changes: this worker's part of it."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    average: Average | None = None


class Checkpoint(NamedTuple):
    """A checkpoint on disk, found whole; its tensors are read when asked for."""

    path: Path
    moment: Moment
    state: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the whole model, on the CPU; averaged weights where there are any."""
        kinds = _kinds(self.path)
        wanted = {
            key: torch.zeros(kind.size, dtype=kind.properties.dtype)
            for key, kind in kinds.items()
            if not key.startswith("optim.")
        }
        _read(self.path, wanted)
        out = {k.removeprefix("model."): v for k, v in wanted.items() if k.startswith("model.")}
        return out | {k.removeprefix("ema."): v for k, v in wanted.items() if k.startswith("ema.")}


def _kinds(path: Path) -> dict[str, Any]:
    return dict(HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata)


def _read(path: Path, into: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled")  # each worker reads for itself
        dcp.load(into, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU that later steps do not change."""
    if isinstance(value, DTensor):
        local = value.to_local().detach().to("cpu", copy=True).contiguous()
        mesh = value.device_mesh
        if mesh.device_type != "cpu":
            mesh = dist.device_mesh.DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)
        return DTensor.from_local(
            local, mesh, value.placements, run_check=False, shape=value.shape, stride=value.stride()
        )
    return value.detach().to("cpu", copy=True).contiguous()


def _groups(state: State) -> list[tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]]:
    names = {parameter: name for name, parameter in state.module.named_parameters()}
    return [(g, [(names[p], p) for p in g["params"]]) for g in state.optimizer.param_groups]


def snapshot(state: State) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Copies of all tensors by name (`model.…`, `optim.PARAMETER.KEY`, `ema.…`), and the rest as plain values."""
    tensors = {f"model.{k}": _copy(v) for k, v in state.module.state_dict().items()}
    values: dict[str, dict[str, Any]] = {}
    for _, members in _groups(state):
        for name, parameter in members:
            for key, value in state.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optim.{name}.{key}"] = _copy(value)
                else:
                    values.setdefault(name, {})[key] = value
    plain: dict[str, Any] = {"optimizer": type(state.optimizer).__name__, "optim": values}
    if state.average is not None:
        tensors |= {f"ema.{k}": _copy(v) for k, v in state.average.state().items()}
        plain["ema_updates"] = state.average.updates
    return tensors, plain


def restore(checkpoint: Checkpoint, state: State) -> None:
    """Bring this worker's part to where it was, from a checkpoint of any number of workers and any strategy.

    Settings of the optimizer (weight decay, momentum) are the job's, not the checkpoint's.
    """
    path, plain = checkpoint.path, checkpoint.state
    own_kind = type(state.optimizer).__name__
    if plain["optimizer"] != own_kind:
        raise TrainError(
            f"{path}: trained with {plain['optimizer']}, now {own_kind}: train.optimizer can't change on the way; "
            f"start a new run"
        )
    kinds = _kinds(path)
    own: dict[str, torch.Tensor] = {f"model.{k}": v for k, v in state.module.state_dict().items()}
    entries: dict[nn.Parameter, dict[str, Any]] = {}
    saved: dict[str, list[str]] = {}
    for key in kinds:
        if key.startswith("optim."):
            name, _, leaf = key.removeprefix("optim.").rpartition(".")
            saved.setdefault(name, []).append(leaf)
    for group, members in _groups(state):
        for name, parameter in members:
            counts_on = parameter.device if group.get("fused") else "cpu"  # where fused kernels keep the step's number
            entry: dict[str, Any] = dict(plain["optim"].get(name, {}))
            for leaf in saved.get(name, []):
                kind = kinds[f"optim.{name}.{leaf}"]
                like = kind.size == parameter.shape
                dtype = kind.properties.dtype
                zeros = torch.zeros_like(parameter, dtype=dtype) if like else None
                entry[leaf] = torch.zeros(kind.size, dtype=dtype, device=counts_on) if zeros is None else zeros.detach()
                own[f"optim.{name}.{leaf}"] = entry[leaf]
            if entry:
                entries[parameter] = entry
    if state.average is not None and "ema_updates" in plain:
        own |= {f"ema.{k}": v for k, v in state.average.state().items()}
    missing = sorted(set(own) - set(kinds))
    if missing:
        raise TrainError(
            f"{path}: a checkpoint of another network or training, it has no {missing[0]}; start a new run"
        )
    _read(path, own)
    state.module.load_state_dict({k.removeprefix("model."): v for k, v in own.items() if k.startswith("model.")})
    for parameter, entry in entries.items():
        state.optimizer.state[parameter] = entry
    if state.average is not None and "ema_updates" in plain:
        found = {k.removeprefix("ema."): v for k, v in own.items() if k.startswith("ema.")}
        state.average.load(found, plain["ema_updates"])


def every(folder: Path) -> list[Path]:
    """The checkpoints of a training by age, whole or not."""
    if mirror.address(folder) is not None:  # where others may have written them; each is there when its state is
        return [(folder / name).parent for name in mirror.names(folder) if fnmatch(name, f"{PATTERN}/{STATE}")]
    return sorted(folder.glob(PATTERN))


def fetch(path: Path) -> None:
    """Bring a checkpoint to this node, where it is kept in a bucket; other workers of the node wait for it."""
    if mirror.address(path) is not None:
        with mirror.alone(path):
            mirror.pull(path, exact=True)


def score(path: Path) -> float | None:
    """Validation accuracy of a checkpoint that was taken at the end of an epoch."""
    try:
        mirror.fetch(path / STATE)
        return read_json(path / STATE)["moment"]["score"]
    except (RaydeepError, OSError, KeyError, TypeError):
        return None


def latest(folder: Path, say: Callable[[str], None] | None = None) -> Checkpoint | None:
    """The newest whole checkpoint; `say` is told of each that is torn or changed and so passed over."""
    for path in reversed(every(folder)):
        fetch(path)
        try:
            return load(path, check=True)
        except (OSError, RaydeepError, KeyError, TypeError, ValueError, AttributeError) as err:
            if say is not None:
                say(f"{path.name} is torn or changed ({_reason(err)}): passed over for the one before")
    return None


def _reason(err: Exception) -> str:
    if isinstance(err, RaydeepError):
        return str(err)
    return err.strerror or str(err) if isinstance(err, OSError) else f"{STATE} is not that of a checkpoint"


def load(path: Path, check: bool = False) -> Checkpoint:
    """A checkpoint by its folder; its files are hashed if `check`."""
    state = read_json(path / STATE)
    if not isinstance(state, dict):
        raise RaydeepError(f"{STATE} is not that of a checkpoint")
    if state.get("format") != FORMAT:
        raise RaydeepError(f"format {state.get('format')}, this version reads {FORMAT}")
    moment = Moment(**state["moment"])
    if check:
        there = {file.name for file in path.glob("*.safetensors")}
        if there != set(state["sha256"]) or not there:
            raise RaydeepError(f"files {sorted(there)}, expected {sorted(state['sha256'])}")
        for name, digest in state["sha256"].items():
            if sha256_file(path / name) != digest:
                raise RaydeepError(f"{name} has another checksum")
        try:
            _kinds(path)
        except SafetensorError as err:
            raise RaydeepError(f"its tensors can't be read: {err}") from None
    return Checkpoint(path, moment, state)


def clean(folder: Path) -> None:
    """Remove what a killed save left half-written."""
    for path in folder.glob(f".{PATTERN}.part"):
        shutil.rmtree(path, ignore_errors=True)

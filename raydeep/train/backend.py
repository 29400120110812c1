"""The process group of Ray Train's workers, their signals and last checkpoints. Imports no torch: the controller of
Ray Train loads this module, and would start 2 to 3 seconds later with it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

SHUTDOWN_S = 5.0  # most that taking the process group down may take; a worker may be dead


def _address() -> tuple[str, int]:
    from ray.train._internal.utils import get_address_and_port

    return get_address_and_port()


def _set_up(address: str, port: int, backend: str, rank: int, world: int, timeout_s: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    _set_torch_distributed_env_vars()
    _setup_torch_process_group(backend, rank, world, "env://", timeout_s)


def _on_sigterm() -> None:
    from raydeep.train import worker

    worker.on_sigterm()


def _save_first() -> None:
    from raydeep.train import worker

    worker.save_first()


def _tear_down(destroy: bool) -> None:
    from ray.train.torch.config import _shutdown_torch

    _shutdown_torch(destroy_process_group=destroy)


class _Backend(Backend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Join the workers."""
        address, port = worker_group.execute_single(0, _address)
        world = len(worker_group)
        ray.get([
            worker_group.execute_single_async(
                rank, _set_up, address, port, backend_config.backend, rank, world, backend_config.timeout_s
            )
            for rank in range(world)
        ])  # fmt: skip

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Signals are handled on the workers' main threads, where this runs."""
        worker_group.execute(_on_sigterm)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """To resize them or to stop: a checkpoint first, if all still train."""
        worker_group.execute(_save_first)
        try:
            ray.get(worker_group.execute_async(_tear_down, len(worker_group) > 1), timeout=SHUTDOWN_S)
        except ray.exceptions.GetTimeoutError:
            return  # their processes end next


@dataclass
class Torch(BackendConfig):
    """In place of Ray's TorchConfig."""

    backend: str = "gloo"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> type[_Backend]:
        """See BackendConfig."""
        return _Backend

    @property
    def train_func_context(self) -> Any:
        """On a GPU: makes the worker's own the current one."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    def to_dict(self) -> dict[str, Any]:
        """For Ray's own record."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}

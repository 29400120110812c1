"""How big a Ray to start, and whether a plan can be placed. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from raydeep.errors import ResourceError

SPARE_CPUS = 2  # logical CPUs that workers never hold, so that Ray Data's tasks can always be placed


class Plan(NamedTuple):
    """What a job takes of the machine or cluster."""

    num_cpus: int  # logical CPUs of a local Ray
    concurrent_trials: int


def plan(
    cores: int,
    workers: int,
    cpus_per_worker: float,
    concurrent: int | None,
    *,
    gpus: int = 0,
    use_gpu: bool = False,
    where: str = "this machine",
) -> Plan:
    """Size Ray for a job.

    Args:
        cores: of the machine, or CPUs of the cluster.
        workers: training workers.
        cpus_per_worker: CPUs each reserves.
        concurrent: trials at once; None: one a core.
        gpus: of the machine or cluster.
        use_gpu: each worker takes one GPU.
        where: for the error.

    Raises:
        ResourceError: with the numbers asked for and there.
    """
    need = workers * cpus_per_worker
    if need > cores + 1e-9:
        raise ResourceError(
            f"scaling.workers {workers} × cpus_per_worker {cpus_per_worker:g} = {need:g} CPUs, but {where} has "
            f"{cores}; lower one of them"
            + (f" (workers: at most {int(cores / cpus_per_worker)})" if cores >= cpus_per_worker else "")
        )
    if use_gpu and workers > gpus:
        raise ResourceError(
            f"scaling.use_gpu with scaling.workers {workers} needs {workers} GPUs, but {where} has {gpus}; "
            f"lower workers or set scaling.use_gpu false"
        )
    if concurrent is not None and concurrent > cores:
        raise ResourceError(
            f"search.concurrent {concurrent} needs {concurrent} CPUs, but {where} has {cores}; lower it"
        )
    at_once = concurrent or max(1, cores)
    return Plan(max(math.ceil(need - 1e-9), cores) + SPARE_CPUS, min(at_once, gpus) if use_gpu else at_once)

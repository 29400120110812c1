"""How big a Ray to start, and whether a plan can be placed. Pure."""

from __future__ import annotations

import math
from typing import NamedTuple

from raydeep.errors import ResourceError
from raydeep.tuning import Search

SPARE_CPUS = 2  # logical CPUs that workers never hold, so that Ray Data's tasks can always be placed


class Plan(NamedTuple):
    """What a job takes of the machine or cluster."""

    num_cpus: int  # logical CPUs of a local Ray
    concurrent_trials: int


def plan(
    cores: int,
    workers: int,
    cpus_per_worker: float,
    search: Search,
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
        search: what a trial takes, and how many are to run at once.
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
    room = search.model_copy(update={"concurrent": None}).room(cores, gpus, cpus_per_worker, use_gpu)
    several = search.workers_per_trial > 1
    takes = f"search.workers_per_trial {search.workers_per_trial}" if several else "search.cpus_per_trial "
    if not several:
        takes += f"{search.cpus_per_trial:g}" + (f", gpus_per_trial {search.gpus_per_trial:g}" if use_gpu else "")
    there = f"{cores} CPUs" + (f" and {gpus} GPUs" if use_gpu else "")
    if room < 1:
        raise ResourceError(f"no trial has room: {takes}, but {where} has {there}; lower it")
    if search.concurrent is not None and search.concurrent > room:
        raise ResourceError(
            f"search.concurrent {search.concurrent}: {where} has {there}, room for {room} trials of {takes}; lower it"
        )
    return Plan(max(math.ceil(need - 1e-9), cores) + SPARE_CPUS, search.concurrent or room)

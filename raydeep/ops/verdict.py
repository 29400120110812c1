"""The doctor's verdict: can the job be placed, and all checks in order. Pure."""

from __future__ import annotations

import math
from typing import Any

from raydeep.config import Job
from raydeep.errors import ResourceError
from raydeep.ops import checks, health
from raydeep.ops.checks import SHOWN, Check, Level, Node
from raydeep.train import sizing


def examine(facts: dict[str, Any], job: Job | None) -> list[Check]:
    """All checks of what was gathered.

    Args:
        facts: `nodes`, `here` (this process, where a cluster was joined), `gcs` (its address; None: this machine
            alone), `gcs_open`, `dashboard` (host:port), `storage` (path), `storage_error`, `data` (probes.plan_data).
        job: without one, what depends on it is left out.
    """
    nodes, here = checks.answered(facts["nodes"]), facts.get("here")
    scaling = job.scaling if job else None
    workers = scaling.max_workers if scaling else 1
    use_gpu = scaling is not None and scaling.use_gpu
    data = facts.get("data") or {}
    path = facts.get("storage") or ""
    remote = "://" in path
    found = [
        *([health.alive(facts["nodes"])] if facts["gcs"] is not None else []),
        health.versions([*nodes, here] if here else nodes),
        health.floors([*nodes, here] if here else nodes),
        health.cpus(nodes),
        health.memory(nodes, workers, scaling.cpus_per_worker if scaling else 1.0, data.get("resident_bytes", 0)),
        health.shm(nodes, workers if use_gpu else 0),
        health.disk(nodes),
        health.gpus(nodes, workers if use_gpu else 0),
    ]
    if facts["gcs"] is not None:
        found.append(health.clock(nodes, remote))
    if job is not None:
        found += [
            checks.storage(nodes, path, facts.get("storage_error") or "", remote),
            checks.dataset(nodes, data.get("error")),
            placement(job, nodes, alone=facts["gcs"] is None, streamed=data.get("streamed", False)),
        ]
    if facts["gcs"] is None:
        found.append(checks.own_tokens(nodes[0]["auth"]))
    else:
        head: Node = next((node for node in nodes if node.get("head")), {})
        found.append(checks.tokens(facts["gcs_open"], facts["gcs"], {node["auth"] for node in nodes}))
        found.append(checks.dashboard(facts["dashboard"], head.get("listens"), head.get("dashboard_open")))
    return found


def cheap(node: Node, storage_error: str, path: str, free_bytes: int | None) -> list[Check]:
    """What is known of this machine without asking anybody: before each training and search.

    Args:
        node: nodefacts.versions and nodefacts.machine.
        storage_error: why run folders can't be made, or "".
        path: the storage.
        free_bytes: free there; None: unknown.
    """
    there = {"there": True, "seen": True, "wrote": True, "back": True, "error": None, "free_bytes": free_bytes}
    return [
        health.floors([node]),
        checks.storage([{**node, "storage": there}], path, storage_error),
        health.memory([node]),
        health.shm([node]),
        health.disk([node]),
    ]


def _slots(cpu: float, gpu: float, cpus: float, gpus: float) -> int:
    """How many of so many CPUs and GPUs each have room on one node: none spans two."""
    found = math.floor(cpu / cpus + 1e-9)
    return min(found, math.floor(gpu / gpus + 1e-9)) if gpus else found


def _workers(job: Job, cpu: float, gpu: float) -> int:
    """Workers that a node has room for."""
    scaling = job.scaling
    found = _slots(cpu, gpu, scaling.cpus_per_worker, float(scaling.use_gpu))
    return found if scaling.workers_per_node is None else min(found, scaling.workers_per_node)


def _trials(job: Job, nodes: list[Node]) -> int:
    """Trials at once that nodes have room for; the workers of one may stand on several nodes."""
    search, scaling = job.search, job.scaling
    if search.workers_per_trial > 1:
        each = (scaling.cpus_per_worker, float(scaling.use_gpu))
        return sum(_slots(node["cpu"], node["gpu"], *each) for node in nodes) // search.workers_per_trial
    each = (search.cpus_per_trial, search.gpus_per_trial if scaling.use_gpu else 0.0)
    return sum(_slots(node["cpu"], node["gpu"], *each) for node in nodes)


def placement(job: Job, nodes: list[Node], alone: bool = False, streamed: bool = False) -> Check:
    """Workers and trials have room, on each node as in sum.

    Args:
        job: the job.
        nodes: with `cpu`, `gpu` and, on a cluster, `free_cpu` and `free_gpu`.
        alone: this machine is all there is: its Ray gets CPUs to spare.
        streamed: tasks decode pictures beside the workers.
    """
    scaling, search = job.scaling, job.search
    cpu, gpu = sum(node["cpu"] for node in nodes), sum(node["gpu"] for node in nodes)
    try:
        plan = sizing.plan(
            int(cpu), scaling.min_workers, scaling.cpus_per_worker, search, gpus=int(gpu), use_gpu=scaling.use_gpu,
            where="this machine" if alone else "the cluster",
        )  # fmt: skip
    except ResourceError as err:
        found, _, mend = str(err).partition("; ")
        return Check("placement", "FAIL", found, mend)
    each = checks.count(scaling.cpus_per_worker, "CPU") + (" and a GPU" if scaling.use_gpu else "")
    asked = f"{scaling.min_workers} to {scaling.max_workers}" if scaling.elastic else f"{scaling.min_workers}"
    room = {node["name"]: _workers(job, node["cpu"], node["gpu"]) for node in nodes}
    fits = sum(room.values())
    most = f", at most {scaling.workers_per_node} a node" if scaling.workers_per_node else ""
    where = ", ".join(f"{name} {many}" for name, many in list(room.items())[:SHOWN]) + (
        ", …" if len(room) > SHOWN else ""
    )
    wanted = f"scaling.workers {asked} of {each}{most}"
    problems: list[Check] = []

    def tell(level: Level, found: str, mend: str) -> None:
        problems.append(Check("placement", level, found, mend))

    if fits < scaling.min_workers:
        tell(
            "FAIL",
            f"{wanted}: room for {fits} ({where})",
            "lower scaling.workers or cpus_per_worker, raise scaling.workers_per_node, or add nodes",
        )
    elif fits < scaling.max_workers:
        tell("WARN", f"{wanted}: room for {fits} ({where})", f"add nodes, or lower the second of them to {fits}")
    elif streamed and not alone and cpu - scaling.min_workers * scaling.cpus_per_worker < 1:
        tell(
            "FAIL",
            f"{wanted} leave no CPU to the tasks that decode pictures",
            "lower scaling.workers or cpus_per_worker, add a node, or set data.cache resident",
        )
    trials = _trials(job, nodes)
    if trials < 1:
        what = (
            checks.count(search.workers_per_trial, "worker")
            if search.workers_per_trial > 1
            else checks.count(search.cpus_per_trial, "CPU")
        )
        tell(
            "FAIL",
            f"no node has room for a trial of {what}",
            "lower search.cpus_per_trial, gpus_per_trial or workers_per_trial, or take larger nodes",
        )
    elif search.concurrent is not None and trials < search.concurrent:
        tell("WARN", f"search.concurrent {search.concurrent}: room for {trials}", f"lower it to {trials}")
    free = sum(_workers(job, node["free_cpu"], node["free_gpu"]) for node in nodes) if not alone else fits
    if free < scaling.min_workers <= fits:
        tell(
            "WARN",
            f"{wanted}: room for {free} beside what runs now",
            "wait for the other job, or stop it (ray status shows what is taken)",
        )
    workers = f"{asked} workers" if scaling.elastic else checks.count(scaling.min_workers, "worker")
    at_once = min(trials, plan.concurrent_trials)
    ok = f"{workers} of {each}{most}: room for {fits} ({where}); {checks.count(at_once, 'trial')} at once"
    return checks.worst("placement", problems, ok)

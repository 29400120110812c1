"""The doctor's verdict: can the job be placed, and all checks in order. Pure."""

from __future__ import annotations

import math
from typing import Any

from raydeep.config import Job
from raydeep.errors import ResourceError
from raydeep.ops import checks, health
from raydeep.ops.checks import Check, Node
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
            checks.storage(nodes, path, facts.get("storage_error") or ""),
            checks.dataset(nodes, data.get("error")),
            placement(job, nodes, alone=facts["gcs"] is None),
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


def _workers(node: Node, job: Job, free: bool = False) -> int:
    """Workers that a node has room for: one never spans two nodes."""
    cpu, gpu = (node["free_cpu"], node["free_gpu"]) if free else (node["cpu"], node["gpu"])
    found = math.floor(cpu / job.scaling.cpus_per_worker + 1e-9)
    if job.scaling.use_gpu:
        found = min(found, int(gpu))
    return found if job.scaling.workers_per_node is None else min(found, job.scaling.workers_per_node)


def placement(job: Job, nodes: list[Node], alone: bool = False) -> Check:
    """Workers and trials have room, on each node as in sum.

    Args:
        job: the job.
        nodes: with `cpu`, `gpu` and, on a cluster, `free_cpu` and `free_gpu`.
        alone: this machine is all there is.
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
    each = f"{checks.count(scaling.cpus_per_worker, 'CPU')}" + (" and a GPU" if scaling.use_gpu else "")
    asked = f"{scaling.min_workers} to {scaling.max_workers}" if scaling.elastic else f"{scaling.min_workers}"
    room = {node["name"]: _workers(node, job) for node in nodes}
    fits = sum(room.values())
    most = f", at most {scaling.workers_per_node} a node" if scaling.workers_per_node else ""
    where = ", ".join(f"{name} {count}" for name, count in list(room.items())[:8])
    problems = []
    if fits < scaling.min_workers:
        mend = f"lower scaling.workers to {fits} or scaling.cpus_per_worker, raise workers_per_node, or add nodes"
        return Check("placement", "FAIL", f"scaling.workers {asked} of {each}{most}: room for {fits} ({where})", mend)
    if fits < scaling.max_workers:
        mend = f"add nodes, or lower the second of scaling.workers to {fits}"
        problems.append(Check("placement", "WARN", f"scaling.workers {asked} of {each}{most}: room for {fits}", mend))
    trials = _trials(job, nodes)
    if trials < 1:
        took = (
            f"{search.workers_per_trial} workers" if search.workers_per_trial > 1 else f"{search.cpus_per_trial:g} CPUs"
        )
        mend = "lower search.cpus_per_trial, gpus_per_trial or workers_per_trial, or take larger nodes"
        return Check("placement", "FAIL", f"no node has room for a trial of {took}", mend)
    if search.concurrent is not None and trials < search.concurrent:
        mend = f"lower search.concurrent to {trials}, or take larger nodes"
        problems.append(
            Check("placement", "WARN", f"search.concurrent {search.concurrent}: nodes have room for {trials}", mend)
        )
    free = sum(_workers(node, job, free=True) for node in nodes if node.get("free_cpu") is not None)
    if not alone and free < scaling.min_workers:
        mend = "wait for the other job, or stop it: ray status shows what is taken"
        problems.append(Check("placement", "WARN", f"{free} of {asked} workers fit beside what runs now", mend))
    at_once = min(trials, plan.concurrent_trials)
    ok = f"{asked} workers of {each}{most}: room for {fits} ({where}); {at_once} trials at once"
    return checks.worst("placement", problems, ok)


def _trials(job: Job, nodes: list[Node]) -> int:
    """Trials at once that nodes have room for."""
    search, scaling = job.search, job.scaling
    alone = search.model_copy(update={"concurrent": None})
    if search.workers_per_trial > 1:  # its workers may stand on several nodes
        one = search.model_copy(
            update={"concurrent": None, "workers_per_trial": 1, "cpus_per_trial": scaling.cpus_per_worker}
        )
        one = one.model_copy(update={"gpus_per_trial": 1.0})
        return sum(one.room(n["cpu"], n["gpu"], 0, scaling.use_gpu) for n in nodes) // search.workers_per_trial
    return sum(alone.room(node["cpu"], node["gpu"], scaling.cpus_per_worker, scaling.use_gpu) for node in nodes)

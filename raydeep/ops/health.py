"""Health of nodes: versions, CPUs, memory, /dev/shm, disk, GPUs and clocks, judged from their facts. Pure."""

from __future__ import annotations

import re
from typing import Any

from raydeep.ops.checks import DISK_BYTES, SHOWN, Check, Level, Node, count, each, gb, names, worst

# Advisories: below these versions they concern raydeep's own use of a package.
FLOORS = {
    "ray": ((2, 55), "CVE-2023-48022, GHSA-mw35-8rx3-xf9r, CVE-2026-27482"),
    "torch": ((2, 10), "CVE-2026-24747"),
}
KILL_SHARE = 0.95  # of memory in use: Ray's monitor kills workers (RAY_memory_usage_threshold)
FULL_SHARE = 0.95  # of the disk of its temporary files: Ray refuses to spill (RAY_local_fs_capacity_threshold)
WORKER_BYTES = 2**30  # a training worker with torch loaded: 0.7 GB resident, measured on a CPU
STORE_SHARE, STORE_CAP = 0.3, 10**10  # Ray's object store: of free memory; not beyond this where /dev/shm is smaller
NCCL_BYTES = 2**30  # --shm-size that NVIDIA names for containers in which NCCL runs
SHM = "/dev/shm"
SKEW_S = 30.0
SKEW_S3_S = 900.0  # S3 refuses requests that are off by 15 minutes
OLDEST_DRIVER = {13: 580, 12: 525, 11: 450}  # NVIDIA's minor version compatibility: driver branch for all of a CUDA
INSTALL = "install the same everywhere: pip install -e . -c constraints.txt under one Python, or one container image"


def alive(nodes: list[Node]) -> Check:
    """Every node answers."""
    silent = [node for node in nodes if node.get("error")]
    return worst(
        "nodes",
        [
            Check(
                "nodes", "FAIL", f"{node['name']}: {node['error']}",
                "look at its raylet's log, install raydeep there, or take it out of the cluster (ray stop on it)",
            )
            for node in silent
        ],
        f"{len(nodes)} alive, all answer: {names(nodes)}",
    )  # fmt: skip


def versions(nodes: list[Node]) -> Check:
    """Python, Ray, torch, CUDA and raydeep are the same wherever code and pickles are sent."""
    problems, same = [], []
    for key in ("python", "ray", "torch", "cuda", "raydeep", "code"):
        found: dict[Any, list[Node]] = {}
        for node in nodes:
            if key in node:
                found.setdefault(node[key], []).append(node)
        if len(found) <= 1:
            same += [f"{key} {value}" for value in found if key != "code" and value is not None]
            if None not in found or key == "cuda":
                continue
        level: Level = "FAIL"
        if key == "python" and len({str(value).rpartition(".")[0] for value in found}) == 1:
            level = "WARN"
        if key == "cuda" and not any(node.get("gpu") for node in nodes):
            level = "WARN"
        what = {"code": "raydeep's source", "cuda": "torch for CUDA"}.get(key, key)
        told = " but ".join(f"{value or 'none'} on {names(at)}" for value, at in found.items())
        problems.append(Check("versions", level, f"{what} {told}", INSTALL))
    return worst("versions", problems, ", ".join(same) + (f" on all {len(nodes)}" if len(nodes) > 1 else ""))


def floors(nodes: list[Node]) -> Check:
    """No version that advisories warn of."""
    problems = []
    for key, (least, why) in FLOORS.items():
        floor = ".".join(map(str, least))
        old = [node for node in nodes if node.get(key) and _numbers(node[key]) < least]
        for version in sorted({node[key] for node in old}):
            at = names(node for node in old if node[key] == version)
            mend = f"pip install -U '{key}>={floor}' on every node"
            problems.append(Check("advisories", "FAIL", f"{key} {version} on {at} is open to {why}", mend))
    return worst(
        "advisories",
        problems,
        ", ".join(f"{key} is {'.'.join(map(str, f))} or newer" for key, (f, _) in FLOORS.items()),
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def cpus(nodes: list[Node]) -> Check:
    """Ray counts no more CPUs than there are cores."""
    mend = "workers would share them: start that node with --num-cpus of its cores, or ask for fewer workers"

    def look(node: Node) -> tuple[Level, str, str] | None:
        if node["cpu"] <= node["cores"]:
            return None
        return "WARN", f"{count(node['cpu'], 'CPU')} for Ray, {count(node['cores'], 'core')} to run on", mend

    told = ", ".join(f"{node['name']} {node['cpu']:g}" for node in nodes[:SHOWN])
    more = f" and {len(nodes) - SHOWN} nodes more" if len(nodes) > SHOWN else ""
    return each("cpus", nodes, f"{sum(node['cpu'] for node in nodes):g} ({told}{more})", look)


def memory(nodes: list[Node], workers: int = 1, cpus_per_worker: float = 1.0, resident_bytes: int = 0) -> Check:
    """Room for workers and the pictures they share.

    Args:
        nodes: those that answered.
        workers: most that train.
        cpus_per_worker: that each reserves.
        resident_bytes: pictures that are held decoded, once a node.
    """
    known = [node for node in nodes if node.get("memory_bytes") and node.get("memory_free_bytes") is not None]

    def look(node: Node) -> tuple[Level, str, str] | None:
        free, total = node["memory_free_bytes"], node["memory_bytes"]
        if total - free >= KILL_SHARE * total:
            return (
                "FAIL", f"{gb(free)} of {gb(total)} free: Ray kills workers from {KILL_SHARE:.0%} in use",
                "end what fills it, or take a larger node",
            )  # fmt: skip
        room = workers if node.get("cpu") is None else int(node["cpu"] / cpus_per_worker + 1e-9)
        here = max(1, min(workers, room))  # on a node without CPUs the driver, at least
        need = here * WORKER_BYTES + resident_bytes
        if free < need:
            return (
                "WARN", f"{gb(free)} of {gb(total)} free, {here} workers may take {gb(need)}",
                "lower scaling.workers, set data.cache stream, or free memory",
            )  # fmt: skip
        return None

    least = min(known, key=lambda node: node["memory_free_bytes"], default=None)
    ok = f"{gb(least['memory_free_bytes'])} of {gb(least['memory_bytes'])} free" if least else "the system doesn't say"
    return each("memory", known, ok + (f" on {least['name']}, the least" if least and len(known) > 1 else ""), look)


def shm(nodes: list[Node], gpu_workers: int = 0) -> Check:
    """Ray's object store fits into shared memory."""
    known = [node for node in nodes if node.get("shm_bytes") is not None]

    def look(node: Node) -> tuple[Level, str, str] | None:
        total, free = node["shm_bytes"], node["shm_free_bytes"]
        store = node.get("store_bytes")
        if store is None:  # a Ray that is yet to be started sizes it so
            store = min(STORE_SHARE * (node.get("memory_free_bytes") or 0), max(STORE_CAP, 0.95 * free))
        room = total if node.get("store_bytes") is not None else free
        size = f"docker run --shm-size={max(1, -(-int(store * 1.1) // 2**30))}g, or a pod's emptyDir of medium Memory"
        elsewhere = node["plasma"] if node.get("plasma") not in (None, SHM) else None
        if elsewhere or room < store:
            return (
                "WARN",
                f"{gb(total)} of /dev/shm, too little for Ray's object store of {gb(store)}: it is on disk, in "
                f"{elsewhere or node['temp']}",
                f"give the node's container more: {size}",
            )
        if gpu_workers > 1 and node.get("gpu", len(node.get("gpus", []))) > 1 and total < NCCL_BYTES:
            return "WARN", f"/dev/shm of {gb(total)}: NCCL between GPUs may want {gb(NCCL_BYTES)}", size
        return None

    least = min(known, key=lambda node: node["shm_free_bytes"], default=None)
    ok = (
        f"{gb(least['shm_free_bytes'])} free in /dev/shm, room for Ray's object store"
        if least
        else "none on this system"
    )
    return each("shm", known, ok, look)


def disk(nodes: list[Node]) -> Check:
    """Room for Ray's own files and for objects that it spills."""
    known = [node for node in nodes if node.get("temp_bytes")]

    def look(node: Node) -> tuple[Level, str, str] | None:
        free, total, where = node["temp_free_bytes"], node["temp_bytes"], node["temp"]
        mend = "free space there, or start Ray with --temp-dir (RAY_TMPDIR) on a larger disk"
        if total - free > FULL_SHARE * total:
            return (
                "FAIL",
                f"{where}: {gb(free)} of {gb(total)} free: Ray keeps no objects there from {FULL_SHARE:.0%}",
                mend,
            )
        return ("WARN", f"{where}: {gb(free)} free", mend) if free < DISK_BYTES else None

    least = min(known, key=lambda node: node["temp_free_bytes"], default=None)
    return each("disk", known, f"{gb(least['temp_free_bytes'])} free in {least['temp']}" if least else "unknown", look)


def gpus(nodes: list[Node], workers: int) -> Check:
    """GPUs that Ray counts are there, and this torch runs on their driver.

    Args:
        nodes: those that answered.
        workers: that take a GPU each; 0: the job asks for none.
    """
    bad: Level = "FAIL" if workers else "WARN"

    def look(node: Node) -> tuple[Level, str, str] | None:
        there = len(node.get("gpus", []))
        counted = node.get("gpu", there)
        if counted > there:
            mend = "install NVIDIA's driver, or start that node with --num-gpus of what it has"
            return bad, f"{counted:g} GPUs for Ray, the driver sees {there}", mend
        if counted and node.get("cuda") is None:
            mend = "install torch from the package index, not from download.pytorch.org/whl/cpu"
            return bad, f"{counted:g} GPUs, but torch is built without CUDA", mend
        major, newest = int(str(node.get("cuda") or 0).split(".")[0]), node.get("driver_cuda")
        if counted and newest and int(newest.split(".")[0]) < major:
            mend = f"install driver {OLDEST_DRIVER.get(major, 'of that CUDA')} or newer, or a torch for CUDA {newest}"
            found = f"driver {node['driver']} is too old for torch's CUDA {node['cuda']}"
            return bad, found, mend
        if counted < there:
            return (
                "WARN",
                f"{there} GPUs, Ray counts {counted:g}",
                "start that node with --num-gpus, or unset CUDA_VISIBLE_DEVICES",
            )
        return None

    total = sum(node.get("gpu", len(node.get("gpus", []))) for node in nodes)
    if workers and not total:
        mend = "set scaling.use_gpu false, or add a node whose GPUs nvidia-smi lists"
        return Check("gpus", "FAIL", f"none on any node, scaling.use_gpu asks for {workers}", mend)
    kinds = sorted({kind for node in nodes for kind in node.get("gpus", [])})
    return each("gpus", nodes, f"{total:g} ({', '.join(kinds)})" if total else "none", look)


def clock(nodes: list[Node], remote: bool) -> Check:
    """Clocks agree."""

    def look(node: Node) -> tuple[Level, str, str] | None:
        skew, mend = node["skew_s"], "let NTP set its clock (timedatectl set-ntp true)"
        if abs(skew) < SKEW_S:
            return None
        level: Level = "FAIL" if remote and abs(skew) >= SKEW_S3_S else "WARN"
        return level, f"{skew:+.0f} s from this machine", mend

    known = [node for node in nodes if node.get("skew_s") is not None]
    return each("clock", known, f"within {max(0.1, *(abs(node['skew_s']) for node in known), 0.0):.1f} s", look)

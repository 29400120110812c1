"""`raydeep doctor`: asks every node of a cluster, or this machine, for its facts; verdict.py judges them."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from raydeep import mirror
from raydeep.config import Job
from raydeep.errors import RaydeepError, ResourceError
from raydeep.machine import usable_cores
from raydeep.ops import checks, health, nodefacts, probes, verdict
from raydeep.ops.checks import Check, Node
from raydeep.ops.console import Ui
from raydeep.run import storage_folder

ANSWER_S = 30.0  # a node that says nothing for so long has failed: its worker may have to start first
COMPARE_S = 15.0  # before a training: then it is left to show itself
GCS_ASK = "/ray.rpc.NodeInfoGcsService/CheckAlive"
GCS_S = 3.0


class Report(NamedTuple):
    """What the doctor found."""

    checks: list[Check]
    nodes: list[Node]

    @property
    def ok(self) -> bool:
        """No check failed."""
        return all(check.level != "FAIL" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """Ready for JSON, secrets masked."""
        return _masked({"checks": [check._asdict() for check in self.checks], "nodes": self.nodes, "ok": self.ok})

    def lines(self) -> list[str]:
        """As a terminal shows it."""
        ids = [node["id"] for node in self.nodes]
        where = "this machine" if ids == ["here"] else checks.count(len(ids), "node")
        return checks.lines(self.checks, "this process and the cluster" if "cluster" in ids else where)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_masked(item) for item in value]
    return checks.mask(value) if isinstance(value, str) else value


def storage_of(job: Job) -> str:
    """Where a job's runs are kept: an absolute folder, or an address."""
    return mirror.name(storage_folder(job))


def run(job: Job | None, address: str | None = None) -> Report:
    """Look at the cluster at `address` (or RAY_ADDRESS), or at this machine, on which a job would start its own Ray.

    Args:
        job: what would run; without one, its storage, dataset and placement are not looked at.
        address: HOST:PORT of the cluster's GCS, or auto.

    Raises:
        RaydeepError: there is no cluster at that address, or it lets nobody in.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is None:
        here: Node = {"id": "here", "name": "this machine", **nodefacts.gather()}
        here |= {"cpu": usable_cores(), "gpu": len(here["gpus"])}
        return _report({"nodes": [here], "gcs": None}, job, lambda asks: {"here": probes.reach("here", *asks)})
    if "://" in address:
        raise RaydeepError(
            f"{checks.mask(address)}: expected HOST:PORT of a cluster's GCS: raydeep doctor asks from inside the "
            f"cluster. Run it on the head node, or send it there: raydeep submit JOB --stage doctor"
        )
    with _joined(address) as differs:
        if differs:
            here = {"id": "here", "name": "this process", **nodefacts.gather()}
            cluster: Node = {"id": "cluster", "name": f"the cluster at {address}", **differs}
            mismatch = health.versions([here, cluster])._replace(level="FAIL")  # small as it may be: Ray refuses
            return Report([mismatch, health.floors([here, cluster])], [here, cluster])
        facts = _cluster_facts()
        ids = [node["id"] for node in checks.answered(facts["nodes"])]
        return _report(facts, job, lambda asks: _ask(ids, probes.reach, lambda node: (node, *asks), ANSWER_S))


def _report(facts: dict[str, Any], job: Job | None, reach: Callable[[tuple[Any, ...]], dict[str, Any]]) -> Report:
    """Judge the facts, after a job's storage and dataset were reached for from every node."""
    if job is not None:
        path = storage_of(job)
        data = probes.plan_data(job.model_dump(mode="json"), path)
        with probes.Storage(path, secrets.token_hex(4)) as storage:
            found = reach((None if storage.error else path, storage.folder, data))
            for node in facts["nodes"]:
                told = found.get(node["id"], {})
                if "error" in told:
                    told["error"] = f"asked for storage and dataset: {told['error']}"
                node |= told
                if "storage" in told:
                    told["storage"]["back"] = told["storage"]["wrote"] and storage.wrote(node["id"])
        facts |= {"storage": path, "storage_error": storage.error, "data": data}
    return Report(verdict.examine(facts, job), facts["nodes"])


@contextmanager
def _joined(address: str) -> Iterator[dict[str, str]]:
    """Inside the cluster; yields the versions of the cluster if Ray refuses this process for its own."""
    from raydeep.train import cluster

    for key, value in cluster.RAY_ENV.items():
        os.environ.setdefault(key, value)
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray

    cluster.errors_to_log()

    differs: dict[str, str] = {}
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        try:
            cluster.join(address)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)  # Ray has put its own in place, which cleans nothing up
        except ResourceError as err:
            ours, theirs = _versions_told(str(err))
            if not ours:
                raise
            differs = theirs
        yield differs
    finally:
        ray.shutdown()


def _versions_told(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Versions in Ray's "Version mismatch", this process's and the cluster's; empty: it is another error."""
    if "Version mismatch" not in text:
        return {}, {}
    rays, pythons = re.findall(r"Ray: ([\w.+]+)", text), re.findall(r"Python: ([\w.+]+)", text)
    if len(rays) != 2 or len(pythons) != 2:
        return {}, {}
    theirs, ours = ({"ray": r, "python": p} for r, p in zip(rays, pythons, strict=True))
    return ours, theirs


def _cluster_facts() -> dict[str, Any]:
    """Facts of all nodes that are alive, of this process and of the head's doors."""
    import ray
    from ray._private import services, state

    gcs = ray.get_runtime_context().gcs_address
    url = services.get_webui_url_from_internal_kv() or None
    nodes = _nodes(ray.nodes(), state.available_resources_per_node())
    port = int(url.rpartition(":")[2]) if url else None
    heads = {node["id"] for node in nodes if node["head"]}
    start = time.time()
    told = _ask([node["id"] for node in nodes], nodefacts.gather, lambda i: (port if i in heads else None,), ANSWER_S)
    end = time.time()
    for node in nodes:
        node |= told[node["id"]]
        if "time" in node:  # asked between start and end: what lies outside of that is its clock
            node["skew_s"] = min(0.0, node["time"] - start) + max(0.0, node["time"] - end)
    here: Node = {"id": "here", "name": "this process", **nodefacts.signature()}
    return {"nodes": nodes, "here": here, "gcs": gcs, "gcs_open": _gcs_open(gcs), "dashboard": url}


def _nodes(listed: list[dict[str, Any]], free: dict[str, dict[str, float]]) -> list[Node]:
    """Nodes as Ray lists them, the head first; named by host, and by id where hosts repeat."""
    living = [node for node in listed if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in living]
    found = []
    for node in living:
        there, left = node["Resources"], free.get(node["NodeID"], {})
        host, head = node["NodeManagerHostname"], "node:__internal_head__" in there
        name = host if hosts.count(host) == 1 else f"{host}/{node['NodeID'][:6]}"
        found.append({
            "id": node["NodeID"], "name": f"{name} (head)" if head else name, "head": head,
            "cpu": there.get("CPU", 0.0), "gpu": there.get("GPU", 0.0), "free_cpu": left.get("CPU", 0.0),
            "free_gpu": left.get("GPU", 0.0), "store_bytes": int(there.get("object_store_memory", 0)),
        })  # fmt: skip
    return sorted(found, key=lambda node: not node["head"])


def _ask(
    ids: list[str], function: Callable[..., Any], arguments: Callable[[str], tuple[Any, ...]], seconds: float
) -> dict[str, dict[str, Any]]:
    """Call a function on each node; a dict with `error` stands for one that doesn't answer in time or can't."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(function)
    refs = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            *arguments(node)
        ): node
        for node in ids
    }
    done, late = ray.wait(list(refs), num_returns=len(refs), timeout=seconds) if refs else ([], [])
    found = {refs[ref]: {"error": f"no answer in {seconds:g} s"} for ref in late}
    for ref in late:
        ray.cancel(ref, force=True)
    for ref in done:
        try:
            found[refs[ref]] = ray.get(ref)
        except Exception as err:  # RayTaskError wraps what was raised there, other kinds are Ray's own
            found[refs[ref]] = {"error": _short(getattr(err, "cause", None) or err)}
    return found


def _short(err: BaseException) -> str:
    """An error on a node in one line; of a module that is missing there Ray tells on many."""
    if type(err).__name__ == "TaskUnschedulableError":
        return "it answers Ray no more: the cluster has given it up meanwhile"
    missing = re.search(r"(?:ModuleNotFoundError|ImportError): [^\n]+", str(err))
    return missing[0] if missing else f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"


def _gcs_open(address: str) -> bool | None:
    """Whether the GCS answers a question that shows no token; None: it can't be asked so."""
    try:
        import grpc
    except ImportError:
        return None
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(GCS_ASK)(b"", timeout=GCS_S)
        except grpc.RpcError as err:
            code = err.code()
            return False if code == grpc.StatusCode.UNAUTHENTICATED else None
    return True


# before each training and search


def preflight(job: Job, ui: Ui) -> None:
    """The part that costs nothing: this machine, no Ray. Says what could be better.

    Raises:
        RaydeepError: with all that failed.
    """
    path = storage_of(job)
    node: Node = {"id": "here", "name": "this machine", **nodefacts.versions(), **nodefacts.machine()}
    local = not probes.remote(path)
    space = nodefacts.disk(path) if local else None
    _tell(verdict.cheap(node, probes.writable(path) if local else "", path, space and space[1]), ui)


def compare(ui: Ui) -> None:
    """After a cluster was joined: the same versions on all of its nodes.

    Raises:
        RaydeepError: they differ.
    """
    import ray

    nodes = _nodes(ray.nodes(), {})
    told = _ask([node["id"] for node in nodes], nodefacts.signature, lambda node: (), COMPARE_S)
    nodes = [{**node, **told[node["id"]]} for node in nodes]
    here: Node = {"id": "here", "name": "this process", **nodefacts.signature()}
    silent = [node for node in nodes if node.get("error")]
    lacking = [node for node in silent if "ModuleNotFoundError" in node["error"]]
    if lacking:
        _tell([health.alive(lacking)], ui)
    for node in silent:  # it may be busy, or about to leave
        ui.say(f"  WARN nodes: {checks.mask(node['name'] + ': ' + node['error'])}; see raydeep doctor")
    heard = [*checks.answered(nodes), here]
    _tell([health.versions(heard), health.floors(heard)], ui)


def _tell(found: list[Check], ui: Ui) -> None:
    for check in found:
        if check.level == "WARN":
            ui.say(checks.mask(f"  WARN {check.name}: {check.found}; {check.mend}"))
    failed = [checks.mask(f"{check.name}: {check.found}; {check.mend}") for check in found if check.level == "FAIL"]
    if failed:
        raise RaydeepError("\n".join(failed))

"""`raydeep doctor` without Ray: what facts mean, how they are gathered on this machine, what the command says."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raydeep import cli
from raydeep.config import Job, parse_sets
from raydeep.data.shards import write_dataset
from raydeep.errors import RaydeepError, ResourceError
from raydeep.ops import checks, doctor, health, nodefacts, probes, verdict
from raydeep.ops.console import Ui

GB = 10**9


def node(name: str = "a", **facts: Any) -> dict[str, Any]:
    """A node in good order."""
    return {
        "id": name, "name": name, "head": name == "a", "hostname": name, "python": "3.11.7", "ray": "2.60.0",
        "torch": "2.15.0", "cuda": "13.2", "raydeep": "0.1.0", "code": "0123456789ab", "cores": 4, "cpu": 4.0,
        "gpu": 0.0, "free_cpu": 4.0, "free_gpu": 0.0, "memory_bytes": 64 * GB, "memory_free_bytes": 60 * GB,
        "shm_bytes": 32 * GB, "shm_free_bytes": 31 * GB, "store_bytes": 19 * GB, "plasma": "/dev/shm",
        "temp": "/tmp/ray", "temp_bytes": 200 * GB, "temp_free_bytes": 100 * GB, "gpus": [], "driver": None,
        "driver_cuda": None, "auth": "token", "skew_s": 0.0, "listens": ["127.0.0.1"], "dashboard_open": False,
        "storage": {"there": True, "seen": True, "wrote": True, "back": True, "error": None, "free_bytes": 90 * GB},
        "data": {"error": None, "text": "digits (embedded)"}, **facts,
    }  # fmt: skip


def with_gpus(name: str = "a", count: int = 2, **facts: Any) -> dict[str, Any]:
    gpus = ["NVIDIA A100"] * count
    found = {"gpu": float(count), "free_gpu": float(count), "gpus": gpus, "driver": "590.12", "driver_cuda": "13.1"}
    return node(name, **{**found, **facts})


def cluster(*nodes: dict[str, Any], **facts: Any) -> dict[str, Any]:
    """Facts of a cluster in good order, or of these nodes."""
    here = {key: node()[key] for key in ("python", "ray", "torch", "cuda", "raydeep", "code")}
    return {
        "nodes": list(nodes) or [node("a"), node("b"), node("c")], "here": {"name": "this process", **here},
        "gcs": "10.0.0.1:6379", "gcs_open": False, "dashboard": "127.0.0.1:8265", "storage": "/shared/runs",
        "storage_error": "", "data": {"error": None}, **facts,
    }  # fmt: skip


def job(*sets: str) -> Job:
    return parse_sets({}, list(sets))


def by_name(found: list[checks.Check]) -> dict[str, checks.Check]:
    assert len({check.name for check in found}) == len(found)
    return {check.name: check for check in found}


def levels(found: list[checks.Check]) -> dict[str, str]:
    return {check.name: check.level for check in found if check.level != "OK"}


CHECKS = [
    "nodes", "versions", "advisories", "cpus", "memory", "shm", "disk", "gpus", "clock", "storage", "dataset",
    "placement", "tokens", "dashboard",
]  # fmt: skip


def test_a_healthy_cluster_is_ok_line_by_line():
    found = verdict.examine(cluster(), job("scaling.workers=4"))
    assert [check.name for check in found] == CHECKS
    assert levels(found) == {}
    assert all(check.found for check in found)
    text = checks.lines(found, "3 nodes")
    assert text[-1] == "3 nodes: 14 OK"
    assert len(text) == len(CHECKS) + 1
    told = by_name(found)
    assert told["versions"].found == "python 3.11.7, ray 2.60.0, torch 2.15.0, cuda 13.2, raydeep 0.1.0 on all 4"
    assert "written and read on all 3 nodes" in told["storage"].found
    assert "room for 12 (a 4, b 4, c 4)" in told["placement"].found


def test_without_a_job_its_storage_dataset_and_placement_are_left_out():
    found = verdict.examine(cluster(), None)
    assert [check.name for check in found] == [n for n in CHECKS if n not in ("storage", "dataset", "placement")]


def test_this_machine_alone_has_neither_nodes_nor_clocks_nor_a_dashboard():
    facts = {"nodes": [node()], "gcs": None, "storage": "/runs", "storage_error": "", "data": {}}
    assert [check.name for check in verdict.examine(facts, job())] == [
        "versions", "advisories", "cpus", "memory", "shm", "disk", "gpus", "storage", "dataset", "placement", "tokens",
    ]  # fmt: skip


UNSHARED = {"there": True, "seen": False, "wrote": False, "back": False, "error": None, "free_bytes": 9 * GB}


@pytest.mark.parametrize(
    ("facts", "sets", "expected", "phrases"),
    [
        (  # the six of the issue
            cluster(node("a"), node("b", python="3.12.1")), [], {"versions": "FAIL"},
            ["python 3.11.7 on a, this process but 3.12.1 on b", "install the same everywhere"],
        ),
        (
            cluster(node("a"), node("b", storage=UNSHARED), node("c", storage={**UNSHARED, "there": False})), [],
            {"storage": "FAIL"},
            ["b: /shared/runs is not shared", "c: /shared/runs is not shared: there is no such folder", "mounts"],
        ),
        (
            cluster(), ["scaling.use_gpu=true", "scaling.workers=2"], {"gpus": "FAIL", "placement": "FAIL"},
            ["none on any node, scaling.use_gpu asks for 2", "needs 2 GPUs, but the cluster has 0", "use_gpu false"],
        ),
        (
            cluster(node("a"), node("b", shm_bytes=64 * 2**20, shm_free_bytes=64 * 2**20, plasma="/tmp/ray")), [],
            {"shm": "WARN"},
            ["b: 67 MB of /dev/shm, too little for Ray's object store of 19.0 GB: it is on disk, in /tmp/ray",
             "--shm-size=20g"],
        ),
        (
            cluster(node("a", listens=["0.0.0.0"], dashboard_open=True), dashboard="10.0.0.1:8265", gcs_open=True), [],
            {"tokens": "FAIL", "dashboard": "FAIL"},
            ["asks for no token", "listens on all interfaces (0.0.0.0), port 8265, without asking for a token",
             "--dashboard-host 127.0.0.1", "RAY_AUTH_MODE=token"],
        ),
        (
            cluster(node("a"), node("b", data={"error": "/data/x is not a folder", "text": ""})), [],
            {"dataset": "FAIL"}, ["b: /data/x is not a folder", "data.path"],
        ),
        # and others
        (cluster(data={"error": "/data/x is not a folder"}), [], {"dataset": "FAIL"}, ["here: /data/x is not"]),
        (cluster(storage_error="Permission denied"), [], {"storage": "FAIL"}, ["/shared/runs: Permission denied"]),
        (
            cluster(node("a"), node("b", storage={**UNSHARED, "seen": True, "error": "Read-only file system"})), [],
            {"storage": "FAIL"}, ["b: /shared/runs can't be written there: Read-only file system"],
        ),
        (
            cluster(node("a"), node("b", storage={**UNSHARED, "seen": True, "wrote": True})), [], {"storage": "FAIL"},
            ["what is written there is not seen here"],
        ),
        (cluster(node("a", python="3.11.9")), [], {"versions": "WARN"}, ["3.11.9 on a but 3.11.7 on this process"]),
        (cluster(node("a", ray="2.61.0")), [], {"versions": "FAIL"}, ["ray 2.61.0 on a but 2.60.0"]),
        (cluster(node("a"), node("b", torch=None)), [], {"versions": "FAIL"}, ["torch 2.15.0 on", "but none on b"]),
        (cluster(node("a", raydeep="0.2.0", code="x")), [], {"versions": "FAIL"}, ["raydeep 0.2.0 on a", "source x"]),
        (cluster(node("a", code="x")), [], {"versions": "FAIL"}, ["raydeep's source x on a but 0123456789ab on this"]),
        (cluster(node("a", cuda="12.8")), [], {"versions": "WARN"}, ["torch for CUDA 12.8 on a but 13.2"]),
        (
            cluster(with_gpus("a"), with_gpus("b", cuda="12.8")), ["scaling.use_gpu=true", "scaling.workers=4"],
            {"versions": "FAIL"}, ["torch for CUDA 13.2 on a, this process but 12.8 on b"],
        ),
        (
            cluster(*(node(n, ray="2.54.1", torch="2.9.0") for n in "ab"), here=None), [], {"advisories": "FAIL"},
            ["ray 2.54.1 on a, b is open to CVE-2023-48022", "torch 2.9.0 on a, b is open to CVE-2026-24747",
             "pip install -U 'ray>=2.55'"],
        ),
        (cluster(node("a"), {"id": "b", "name": "b", "error": "no answer in 30 s"}), [], {"nodes": "FAIL"},
         ["b: no answer in 30 s", "raylet"]),
        (cluster(node("a", cpu=16.0)), [], {"cpus": "WARN"}, ["a: 16 CPUs for Ray, 4 cores to run on"]),
        (cluster(node("a", skew_s=-31.0)), [], {"clock": "WARN"}, ["a: -31 s from this machine", "NTP"]),
        (cluster(node("a", skew_s=1000.0)), [], {"clock": "WARN"}, ["+1000 s"]),
        (cluster(node("a", skew_s=1000.0), storage="s3://b/runs"), [], {"clock": "FAIL"}, ["+1000 s"]),
        (cluster(gcs_open=True), [], {"tokens": "FAIL"}, ["Ray at 10.0.0.1:6379 asks for no token"]),
        (cluster(gcs_open=None), [], {}, []),
        (cluster(node("a", auth=None), gcs_open=None), [], {"tokens": "WARN"}, ["gave no answer"]),
        (
            cluster(node("a", listens=["10.0.0.1"]), dashboard="10.0.0.1:8265"), [], {"dashboard": "WARN"},
            ["listens on 10.0.0.1, port 8265; it asks for tokens, which travel unencrypted", "ssh -L"],
        ),
    ],
)  # fmt: skip
def test_what_is_broken_is_told_with_its_mend_and_nothing_else_is(facts, sets, expected, phrases):
    found = verdict.examine(facts, job(*sets))
    assert levels(found) == expected
    text = "\n".join(checks.lines(found, "here"))
    for phrase in phrases:
        assert phrase in text
    assert all(bool(check.mend) == (check.level != "OK") for check in found)


def test_several_faults_at_once_are_all_told():
    broken = node("b", python="3.12.1", storage=UNSHARED, shm_bytes=10**6, shm_free_bytes=10**6, plasma="/tmp/ray")
    facts = cluster(node("a", listens=["::"]), broken, {"id": "c", "name": "c", "error": "no answer"}, gcs_open=True)
    assert levels(verdict.examine(facts, job("scaling.use_gpu=true"))) == {
        "nodes": "FAIL", "versions": "FAIL", "shm": "WARN", "gpus": "FAIL", "storage": "FAIL", "placement": "FAIL",
        "tokens": "FAIL", "dashboard": "WARN",
    }  # fmt: skip


def test_a_cluster_that_says_nothing_is_not_ok():
    facts = cluster({"id": "a", "name": "a", "head": True, "error": "no answer in 30 s"}, gcs_open=None)
    assert levels(verdict.examine(facts, job())) == {
        "nodes": "FAIL", "storage": "FAIL", "dataset": "FAIL", "placement": "FAIL", "tokens": "WARN",
    }  # fmt: skip


def test_the_worst_level_counts_and_all_findings_are_told():
    warned, failed = checks.Check("x", "WARN", "late", "wait"), checks.Check("x", "FAIL", "gone", "make it")
    assert checks.worst("x", [warned, failed], "fine") == checks.Check("x", "FAIL", "gone; late", "make it")
    assert checks.worst("x", [], "fine") == checks.Check("x", "OK", "fine")


def test_many_nodes_with_one_finding_are_one_line():
    nodes = [node(f"n{i}", cpu=16.0) for i in range(9)]
    assert health.cpus(nodes).found == "n0, n1, n2, n3 and 5 more: 16 CPUs for Ray, 4 cores to run on"


# boundaries


@pytest.mark.parametrize(
    ("free", "workers", "level"),
    [(3.2 * GB, 1, "FAIL"), (3.3 * GB, 1, "OK"), (3.3 * GB, 4, "WARN"), (4 * 2**30, 4, "OK"), (4 * 2**30, 9, "OK")],
)
def test_memory_has_to_do_for_the_workers_of_a_node(free, workers, level):
    assert health.memory([node(memory_free_bytes=int(free))], workers).level == level


def test_memory_has_to_do_for_resident_pictures_too():
    assert health.memory([node(memory_free_bytes=5 * 2**30)], 1, 1.0, 4 * 2**30).level == "OK"
    assert health.memory([node(memory_free_bytes=5 * 2**30 - 1)], 1, 1.0, 4 * 2**30).level == "WARN"
    assert health.memory([node(memory_free_bytes=4 * 2**30)], 4, 2.0).level == "OK", "4 CPUs have room for two"
    assert health.memory([node(cpu=0.0, memory_free_bytes=4 * 2**30)], 8).level == "OK", "a head that trains nothing"


@pytest.mark.parametrize(("free", "level"), [(9.9 * GB, "FAIL"), (10 * GB, "OK"), (2**31, "FAIL"), (100 * GB, "OK")])
def test_ray_spills_nothing_onto_a_disk_that_is_95_percent_full(free, level):
    assert health.disk([node(temp_free_bytes=int(free))]).level == level


def test_little_room_on_a_small_disk_is_a_warning():
    assert health.disk([node(temp_bytes=8 * GB, temp_free_bytes=2**31)]).level == "OK"
    assert health.disk([node(temp_bytes=8 * GB, temp_free_bytes=2**31 - 1)]).level == "WARN"


def test_little_room_in_the_storage_is_a_warning():
    for free, level in ((2**31, "OK"), (2**31 - 1, "WARN")):
        here = node(storage={**node()["storage"], "free_bytes": free})
        assert checks.storage([here], "/runs", "").level == level


@pytest.mark.parametrize(
    ("facts", "level"),
    [
        ({"shm_bytes": 19 * GB}, "OK"),
        ({"shm_bytes": 19 * GB - 1}, "WARN"),
        ({"plasma": "/mnt/other"}, "WARN"),
        ({"plasma": None}, "OK"),
        # a Ray that is to be started: 0.3 of the free memory, at most 10 GB where /dev/shm is smaller than that
        ({"store_bytes": None, "plasma": None, "shm_free_bytes": 10 * GB}, "OK"),
        ({"store_bytes": None, "plasma": None, "shm_free_bytes": 10 * GB - 1}, "WARN"),
        ({"store_bytes": None, "plasma": None, "memory_free_bytes": 10 * GB, "shm_free_bytes": 3 * GB}, "OK"),
        ({"store_bytes": None, "plasma": None, "memory_free_bytes": 10 * GB, "shm_free_bytes": 3 * GB - 1}, "WARN"),
        ({"shm_bytes": None, "shm_free_bytes": None}, "OK"),
    ],
)
def test_the_object_store_wants_to_be_in_shared_memory(facts, level):
    assert health.shm([node(**facts)]).level == level


def test_nccl_wants_shared_memory_where_workers_share_a_node():
    small = with_gpus(shm_bytes=2**30 - 1, shm_free_bytes=2**30 - 1, store_bytes=10**8)
    assert health.shm([small], gpu_workers=2).level == "WARN"
    assert health.shm([small], gpu_workers=1).level == "OK"
    assert health.shm([{**small, "shm_bytes": 2**30}], gpu_workers=2).level == "OK"


@pytest.mark.parametrize(
    ("facts", "level", "phrase"),
    [
        ({}, "OK", "2 (NVIDIA A100)"),
        ({"gpus": []}, "FAIL", "2 GPUs for Ray, the driver sees 0"),
        ({"gpus": ["NVIDIA A100"] * 4}, "WARN", "4 GPUs, Ray counts 2"),
        ({"cuda": None}, "FAIL", "2 GPUs, but torch is built without CUDA"),
        ({"driver": "550.54", "driver_cuda": "12.4"}, "FAIL", "driver 550.54 is too old for torch's CUDA 13.2"),
        ({"driver": "580.65", "driver_cuda": "13.0"}, "OK", "2 (NVIDIA A100)"),  # minor versions are compatible
    ],
)
def test_gpus_are_those_that_ray_counts_and_torch_can_use(facts, level, phrase):
    found = health.gpus([with_gpus(**facts)], 2)
    assert (found.level, phrase in found.found) == (level, True)
    if level == "FAIL":
        assert health.gpus([with_gpus(**facts)], 0).level == "WARN", "the job asks for none"


# placement


@pytest.mark.parametrize(
    ("nodes", "sets", "level", "phrase"),
    [
        ([node(n) for n in "ab"], ["scaling.workers=8"], "OK", "8 workers of 1 CPU: room for 8 (a 4, b 4)"),
        ([node(n) for n in "ab"], ["scaling.workers=9"], "FAIL", "= 9 CPUs, but the cluster has 8"),
        # 8 CPUs on 8 nodes are no room for a worker of 2
        ([node(n, cpu=1.0, free_cpu=1.0) for n in "abcdefgh"], ["scaling.cpus_per_worker=2"], "FAIL",
         "scaling.workers 1 of 2 CPUs: room for 0 (a 0, b 0, c 0, d 0, …)"),
        ([node(n, cpu=3.0, free_cpu=3.0) for n in "ab"], ["scaling.workers=3", "scaling.cpus_per_worker=2"], "FAIL",
         "room for 2 (a 1, b 1)"),
        ([node(n) for n in "ab"], ["scaling.workers=3", "scaling.workers_per_node=1"], "FAIL",
         "scaling.workers 3 of 1 CPU, at most 1 a node: room for 2"),
        ([node(n) for n in "ab"], ["scaling.workers=[2, 9]", "train.batch_size=64"], "WARN",
         "scaling.workers 2 to 9 of 1 CPU: room for 8"),
        ([node(n) for n in "ab"], ["scaling.workers=[9, 10]", "train.batch_size=64"], "FAIL", "9 × cpus_per_worker 1"),
        ([with_gpus("a"), node("b")], ["scaling.use_gpu=true", "scaling.workers=2"], "OK", "room for 2 (a 2, b 0)"),
        ([with_gpus("a"), node("b")], ["scaling.use_gpu=true", "scaling.workers=3"], "FAIL", "needs 3 GPUs"),
        # two GPUs and eight CPUs, but not together
        ([with_gpus("a", cpu=1.0, free_cpu=1.0), node("b", cpu=7.0)], ["scaling.use_gpu=true", "scaling.workers=2"],
         "FAIL", "room for 1 (a 1, b 0)"),
        ([node(n) for n in "ab"], ["search.cpus_per_trial=5"], "FAIL", "no node has room for a trial of 5 CPUs"),
        ([node(n) for n in "ab"], ["search.cpus_per_trial=3", "search.concurrent=2"], "OK", "2 trials at once"),
        ([node(n, cpu=5.0) for n in "ab"], ["search.cpus_per_trial=3", "search.concurrent=3"], "WARN",
         "search.concurrent 3: room for 2"),
        ([node(n) for n in "ab"], ["search.workers_per_trial=3"], "OK", "2 trials at once"),
        ([node(n, free_cpu=0.0) for n in "ab"], ["scaling.workers=2"], "WARN", "room for 0 beside what runs now"),
    ],
)  # fmt: skip
def test_placement_counts_on_each_node(nodes, sets, level, phrase):
    found = verdict.placement(job(*sets), nodes)
    assert found.level == level
    assert phrase in found.found


def test_streaming_needs_a_cpu_beside_the_workers_on_a_cluster():
    assert verdict.placement(job("scaling.workers=4"), [node()], streamed=True).level == "FAIL"
    assert verdict.placement(job("scaling.workers=3"), [node()], streamed=True).level == "OK"
    assert verdict.placement(job("scaling.workers=4"), [node()], alone=True, streamed=True).level == "OK"


# doors


@pytest.mark.parametrize(
    ("url", "listens", "open_", "level"),
    [
        (None, None, None, "OK"),
        ("127.0.0.1:8265", ["127.0.0.1"], True, "OK"),  # who has no token is told by another line
        ("127.0.0.1:8265", ["127.0.0.1", "::1"], None, "OK"),
        ("127.0.0.1:8265", ["0.0.0.0"], False, "WARN"),
        ("127.0.0.1:8265", ["127.0.0.1", "10.0.0.1"], False, "WARN"),
        ("10.0.0.1:8265", [], False, "WARN"),  # not seen in /proc: as Ray has noted it
        ("10.0.0.1:8265", None, None, "FAIL"),
        ("[::1]:8265", None, None, "OK"),
        ("10.0.0.1:8265", ["::"], True, "FAIL"),
    ],
)
def test_a_dashboard_stays_on_its_machine(url, listens, open_, level):
    assert checks.dashboard(url, listens, open_).level == level


@pytest.mark.parametrize(("mode", "level"), [(None, "OK"), ("token", "OK"), ("disabled", "WARN")])
def test_a_ray_of_this_machine_asks_for_tokens_unless_told_otherwise(mode, level):
    assert checks.own_tokens(mode).level == level


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("s3://key:sEcret@bucket/runs can't", "s3://***@bucket/runs can't"),
        ("at s3://b/p?secret_key=sEcret&region=x: no", "at s3://b/p?***: no"),
        ("gs://b/a and https://me@host/x", "gs://b/a and https://***@host/x"),
        ("/plain/path?x=1 a@b", "/plain/path?x=1 a@b"),
    ],
)
def test_secrets_in_addresses_are_masked(text, masked):
    assert checks.mask(text) == masked


def test_no_secret_reaches_the_output():
    path = "s3://key:sEcret@b/runs?access_key=sEcret"
    facts = cluster(node("a", storage={**UNSHARED, "error": f"{path}: denied"}), storage=path)
    report = doctor.Report(verdict.examine(facts, job()), facts["nodes"])
    assert "sEcret" not in "\n".join(report.lines()) + json.dumps(report.as_json())
    assert not report.ok


# facts


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_memory_and_cores_know_the_limits_of_cgroups_v2(tmp_path, monkeypatch):
    monkeypatch.setattr(nodefacts, "memory_bytes", lambda: 64 * GB)
    monkeypatch.setattr(nodefacts, "usable_cores", lambda: 8)
    root = write(tmp_path / "fs", {
        "cgroup.controllers": "cpu memory", "pod/memory.max": "8000000000", "pod/memory.current": "3000000000",
        "pod/memory.stat": "anon 1\ninactive_file 500000000\nactive_file 500000000\n", "pod/cpu.max": "250000 100000",
        "pod/box/memory.max": "max", "pod/box/memory.current": "1000", "pod/box/cpu.max": "max 100000",
    })  # fmt: skip
    write(tmp_path, {"cgroup": "0::/pod/box\n", "meminfo": "MemTotal: 1 kB\nMemAvailable:   60000000 kB\n"})
    assert nodefacts.memory(root, tmp_path / "cgroup", tmp_path / "meminfo") == (8 * GB, 6 * GB)
    assert nodefacts.cores(root, tmp_path / "cgroup") == 3, "2.5 cores' time"


def test_memory_and_cores_know_the_limits_of_cgroups_v1(tmp_path, monkeypatch):
    monkeypatch.setattr(nodefacts, "memory_bytes", lambda: 64 * GB)
    monkeypatch.setattr(nodefacts, "usable_cores", lambda: 8)
    root = write(tmp_path / "fs", {  # in a container the path of the host is not there: the root is the limit
        "memory/memory.limit_in_bytes": "4000000000", "memory/memory.usage_in_bytes": "1000000000",
        "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 250000000\ntotal_active_file 250000000\n",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    write(tmp_path, {"cgroup": "5:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n", "meminfo": "MemAvailable: 1000 kB"})
    assert nodefacts.memory(root, tmp_path / "cgroup", tmp_path / "meminfo") == (4 * GB, 1000 * 1024)
    assert nodefacts.cores(root, tmp_path / "cgroup") == 8


def test_a_system_that_says_nothing_is_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(nodefacts, "memory_bytes", lambda: 0)
    assert nodefacts.memory(tmp_path, tmp_path / "none", tmp_path / "none") == (None, None)
    assert nodefacts.listens(8265, (str(tmp_path / "none"),)) is None
    silent = node(memory_bytes=None, memory_free_bytes=None, shm_bytes=None, shm_free_bytes=None, temp_bytes=None)
    found = verdict.examine({"nodes": [silent], "gcs": None}, None)
    assert levels(found) == {}


def test_who_listens_is_read_from_the_kernels_tables(tmp_path):
    head = "  sl  local_address rem_address   st\n"
    rows = [
        "   0: 00000000:2049 00000000:0000 0A 0", "   1: 0100007F:2049 00000000:0000 0A 0",
        "   2: 0200000A:2049 00000000:0000 01 0", "   3: 00000000:0016 00000000:0000 0A 0",
    ]  # fmt: skip
    rows6 = [
        "   0: 00000000000000000000000001000000:2049 00:0 0A 0",
        "   1: 0000000000000000FFFF00000200000A:2049 00:0 0A 0",
    ]
    write(tmp_path, {"tcp": head + "\n".join(rows), "tcp6": head + "\n".join(rows6)})
    if sys.byteorder != "little":
        pytest.skip("the tables of this test are little-endian")
    tables = (str(tmp_path / "tcp"), str(tmp_path / "tcp6"))
    assert nodefacts.listens(0x2049, tables) == ["0.0.0.0", "10.0.0.2", "127.0.0.1", "::1"]
    assert nodefacts.listens(1, tables) == []


class Nvml:
    """Two GPUs, as NVML tells of them."""

    def __getattr__(self, name: str) -> Any:
        if name not in ("nvmlInit_v2", "nvmlShutdown"):
            raise AttributeError(name)
        return lambda *args: 0

    def nvmlSystemGetDriverVersion(self, text: Any, length: int) -> int:
        text.value = b"580.65.06"
        return 0

    def nvmlSystemGetCudaDriverVersion_v2(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 13010
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        ctypes.cast(count, ctypes.POINTER(ctypes.c_uint))[0] = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, i: int, handle: Any) -> int:
        return 0

    def nvmlDeviceGetName(self, handle: Any, text: Any, length: int) -> int:
        text.value = b"NVIDIA A100"
        return 0


def test_gpus_are_asked_of_nvml(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml())
    assert nodefacts.graphics() == {"gpus": ["NVIDIA A100"] * 2, "driver": "580.65.06", "driver_cuda": "13.1"}

    def none(name: str) -> Any:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    assert nodefacts.graphics() == {"gpus": [], "driver": None, "driver_cuda": None}


def test_facts_are_gathered_without_ray_and_torch():
    code = (
        "import json, sys\nfrom raydeep.ops import nodefacts\nfound = nodefacts.gather(1)\n"
        "print(json.dumps([found, sorted({'torch', 'ray', 'numpy', 'pyarrow'} & sys.modules.keys())]))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    found, loaded = json.loads(said)
    assert loaded == []
    import torch

    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["cuda"] == torch.version.cuda
    assert found["cores"] <= (os.cpu_count() or 1)
    assert (found["listens"], found["dashboard_open"]) in (([], None), (None, None))
    assert re.fullmatch("[0-9a-f]{12}", found["code"])
    assert set(found) <= set(node()) | {"time"}, "a fact that no test knows"


# storage and dataset


def test_a_storage_is_written_and_read_from_all_sides_and_left_as_it_was(tmp_path):
    path = tmp_path / "new" / "runs"
    with probes.Storage(str(path), "x") as storage:
        assert storage.error == ""
        found = probes.reach("b", str(path), storage.folder, None)["storage"]
        assert (found["seen"], found["wrote"], found["error"]) == (True, True, None)
        assert found["free_bytes"] > 0
        assert storage.wrote("b")
    assert list(tmp_path.iterdir()) == []
    path.mkdir(parents=True)
    (path / "run").touch()
    stopped = probes.Storage(str(path), "x").__enter__()
    assert len(list(path.iterdir())) == 2
    stopped.__exit__(KeyboardInterrupt, None, None)
    assert [entry.name for entry in path.iterdir()] == ["run"]


def test_a_storage_that_another_node_has_to_itself_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(probes, "SEEN_S", 0.0)
    (tmp_path / "other").mkdir()
    with probes.Storage(str(tmp_path / "mine"), "x") as storage:
        found = probes.reach("b", str(tmp_path / "other"), storage.folder, None)["storage"]
        assert (found["there"], found["seen"], found["wrote"]) == (True, False, False)
        assert not probes.reach("c", str(tmp_path / "none"), storage.folder, None)["storage"]["there"]
        assert not storage.wrote("b")
    assert list((tmp_path / "other").iterdir()) == []


def test_a_file_in_the_place_of_a_storage_is_told(tmp_path):
    (tmp_path / "file").touch()
    with probes.Storage(str(tmp_path / "file" / "deep"), "x") as storage:
        assert storage.error == "Not a directory"
    assert probes.writable(str(tmp_path / "file")) == "it is a file"
    assert probes.writable(str(tmp_path / "file" / "deep")) == f"{tmp_path / 'file'} is a file"
    assert probes.writable(str(tmp_path / "new" / "deep")) == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_storage_may_be_a_bucket(monkeypatch):
    from moto.server import ThreadedMotoServer
    from pyarrow import fs

    monkeypatch.setattr(probes, "SEEN_S", 0.0)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(key, "testing")
        system = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        system.create_dir("doctor")
        address = f"s3://doctor/runs?endpoint_override={host}:{port}&scheme=http"
        with probes.Storage(address, "x") as storage:
            assert storage.error == ""
            assert probes.reach("b", address, storage.folder, None)["storage"]["wrote"]
            assert storage.wrote("b")
            assert not storage.wrote("c")
        assert not [f for f in system.get_file_info(fs.FileSelector("doctor", recursive=True)) if f.is_file]
        with probes.Storage(address.replace("doctor", "gone"), "x") as storage:
            assert "gone" in storage.error
    finally:
        server.stop()


def plan(folder: Path, **data: Any) -> dict[str, Any]:
    tree = {**Job().model_dump(mode="json")["data"], **data}
    return probes.plan_data({"data": tree}, str(folder / "runs"))


def test_a_dataset_is_read_where_it_lies(tmp_path, write_pictures, digits_manifest):
    assert probes.read_data(plan(tmp_path)) == "digits (embedded)"
    photos = write_pictures(tmp_path / "photos", {"cat": 3, "dog": 3})
    assert probes.read_data(plan(tmp_path, source="folder", path=str(photos))) == f"folder in {photos}"
    shards = plan(tmp_path, path=str(digits_manifest.path))
    assert probes.read_data(shards) == f"shards of 1,797 pictures in {digits_manifest.path}"
    assert (shards["resident_bytes"], shards["streamed"]) == (1797 * 64, False)
    assert plan(tmp_path, path=str(digits_manifest.path), cache="stream")["streamed"] is True


def test_a_dataset_that_is_not_there_is_told(tmp_path, job, digits_manifest):
    gone = plan(tmp_path, source="folder", path="/gone")
    assert gone["error"].startswith("/gone is not a folder")
    found = probes.reach("b", None, "", gone)["data"]
    assert found["error"].startswith("/gone is not a folder")
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    empty = plan(tmp_path, source="folder", path=str(tmp_path / "empty"))
    assert probes.reach("b", None, "", empty)["data"]["error"].endswith("holds no file")
    made = write_dataset(job.data, tmp_path / "made")
    shards = plan(tmp_path, path=str(made.path))
    made.files("val")[0].unlink()
    assert "missing or not" in probes.reach("b", None, "", shards)["data"]["error"]
    assert "missing or not" in plan(tmp_path, path=str(made.path))["error"]


def test_a_shard_that_is_cut_within_is_told(tmp_path, job):
    made = write_dataset(job.data, tmp_path / "made")
    file = made.files("test")[0]
    file.write_bytes(bytes(file.stat().st_size))
    assert probes.reach("b", None, "", plan(tmp_path, path=str(made.path)))["data"]["error"]


# the command


@pytest.fixture
def raydeep(tmp_path, monkeypatch, capsys):
    """Runs `raydeep doctor` in tmp_path; whoever imports Ray fails."""
    monkeypatch.chdir(tmp_path)
    for key in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAYDEEP_STORAGE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "ray", None)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["raydeep", "doctor", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0), *capsys.readouterr()
        raise AssertionError("main came back")

    return run


def test_this_machine_is_looked_at_without_starting_ray(raydeep, tmp_path, job):
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json")))
    code, out, err = raydeep("job.yaml")
    assert (code, err) == (0, ""), out
    assert re.search(r"^OK    storage +/.*/runs: written and read on this machine", out, re.MULTILINE)
    assert re.search(r"^OK    dataset +digits \(embedded\)", out, re.MULTILINE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["job.yaml"]
    code, out, _ = raydeep()
    assert code == 0
    assert "storage" not in out


def test_json_is_one_object(raydeep):
    code, out, err = raydeep("--json", "--set", "data.source=folder", "--set", "data.path=/gone")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (1, "", False)
    assert [set(check) for check in found["checks"]] == [{"name", "level", "found", "mend"}] * len(found["checks"])
    [failed] = [check for check in found["checks"] if check["level"] == "FAIL"]
    assert (failed["name"], "/gone is not a folder" in failed["found"]) == ("dataset", True)
    assert found["nodes"][0]["cores"] >= 1


def test_a_fault_ends_with_1_a_warning_with_0_bad_input_with_2(raydeep, monkeypatch):
    code, out, _ = raydeep("--set", "scaling.workers=4096", "--set", "train.batch_size=4096")
    assert code == 1
    assert re.search(r"^FAIL  placement +scaling.workers 4096 .*\n +→ lower", out, re.MULTILINE)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, out, _ = raydeep()
    assert code == 0
    assert "WARN  tokens" in out
    code, out, err = raydeep("--set", "scaling.worker=1")
    assert (code, out) == (2, "")
    assert "did you mean scaling.workers" in err


@pytest.mark.parametrize("address", ["http://head:8265", "https://key:sEcret@head", "ray://head:10001"])
def test_an_address_of_a_job_server_is_refused_with_the_way(raydeep, address):
    code, out, err = raydeep("--address", address)
    assert (code, out) == (2, "")
    assert "expected HOST:PORT of a cluster's GCS" in err
    assert "raydeep submit" in err
    assert "sEcret" not in err


MISMATCH = """Version mismatch: The cluster was started with:
    Ray: 2.59.0
    Python: 3.12.1
This process on node 10.0.0.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""


def test_a_cluster_of_other_versions_is_a_check_that_failed(raydeep, monkeypatch):
    from raydeep.train import cluster as joining

    def refuse(address: str) -> None:
        raise ResourceError(f"no Ray cluster lets this process in: {MISMATCH}")

    monkeypatch.setitem(sys.modules, "ray", type("ray", (), {"shutdown": staticmethod(lambda: None)}))
    monkeypatch.setattr(joining, "join", refuse)
    monkeypatch.setattr(joining, "RAY_ENV", {})
    monkeypatch.setattr(joining, "errors_to_log", lambda: None)
    code, out, _ = raydeep("--address", "head:6379")
    assert code == 1
    assert "on this process but 3.12.1 on the cluster at head:6379" in out
    assert "on this process but 2.59.0 on the cluster at head:6379" in out
    monkeypatch.setitem(globals(), "MISMATCH", MISMATCH.replace("2.59.0", "2.60.0").replace("3.12.1", "3.11.9"))
    code, out, _ = raydeep("--address", "head:6379")
    assert (code, "FAIL  versions" in out) == (1, True), "Ray refuses where only the patch level differs"
    monkeypatch.setattr(joining, "join", lambda address: (_ for _ in ()).throw(ResourceError("nobody there")))
    assert raydeep("--address", "head:6379")[::2] == (2, "error: nobody there\n")


# before a training


class Said(Ui):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_nothing_is_said_before_a_training_where_all_is_well(job, monkeypatch):
    monkeypatch.setattr(nodefacts, "machine", lambda: node(store_bytes=None))
    monkeypatch.setattr(nodefacts, "disk", lambda path: (200 * GB, 100 * GB))
    ui = Said()
    doctor.preflight(job, ui)
    assert ui.lines == []
    assert not Path(job.storage).exists()


def test_before_a_training_warnings_are_said_and_faults_stop_it(job, tmp_path, monkeypatch):
    small = node(store_bytes=None, plasma=None, shm_bytes=2**26, shm_free_bytes=2**26)
    monkeypatch.setattr(nodefacts, "machine", lambda: small)
    monkeypatch.setattr(nodefacts, "disk", lambda path: (200 * GB, GB))
    ui = Said()
    doctor.preflight(job, ui)
    assert [line.split(":")[0] for line in ui.lines] == ["  WARN storage", "  WARN shm"]
    (tmp_path / "file").touch()
    monkeypatch.setattr(nodefacts, "machine", lambda: {**small, "name": "here", "ray": "2.9.3"})
    with pytest.raises(RaydeepError) as failed:
        doctor.preflight(job.model_copy(update={"storage": str(tmp_path / "file")}), ui)
    first, second = str(failed.value).splitlines()
    assert first.startswith("advisories: ray 2.9.3 on here is open to CVE-2023-48022")
    assert second.startswith(
        f"storage: can't make run folders in {tmp_path / 'file'}: it is a file; set storage=FOLDER"
    )


def test_a_cluster_of_other_versions_stops_a_training(monkeypatch):
    listed = [
        {"NodeID": name * 8, "Alive": alive, "NodeManagerHostname": host, "Resources": {"CPU": 1.0, **head}}
        for name, alive, host, head in [
            ("a", True, "one", {}), ("b", True, "one", {"node:__internal_head__": 1.0}), ("c", True, "two", {}),
            ("d", False, "two", {}),
        ]
    ]  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", type("ray", (), {"nodes": staticmethod(lambda: listed)}))
    mine = nodefacts.signature()
    told = {"a" * 8: {"error": "no answer in 15 s"}, "b" * 8: mine, "c" * 8: mine}
    monkeypatch.setattr(doctor, "_ask", lambda ids, *_: {name: told[name] for name in ids})
    ui = Said()
    doctor.compare(ui)
    assert ui.lines == ["  WARN nodes: one/aaaaaa: no answer in 15 s; see raydeep doctor"]
    told["c" * 8] = {**mine, "ray": "2.59.0"}
    with pytest.raises(RaydeepError, match=r"versions: ray 2.60.0 on .*one/bbbbbb \(head\).* but 2.59.0 on two"):
        doctor.compare(ui)
    told["c" * 8] = {"error": "ModuleNotFoundError: No module named 'raydeep'"}
    with pytest.raises(RaydeepError, match=r"nodes: two: ModuleNotFoundError.*install raydeep there"):
        doctor.compare(ui)


def test_what_a_node_raised_is_one_line():
    told = (
        "The remote function failed to import on the worker.\nTraceback ...\nModuleNotFoundError: No module named 'x'\n"
    )
    assert doctor._short(RuntimeError(told)) == "ModuleNotFoundError: No module named 'x'"
    assert doctor._short(ValueError("a\n  b " + "c" * 999)) == "ValueError: a b " + "c" * 296

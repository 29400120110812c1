"""`raydeep doctor` on real clusters of raylets: one in order, and each of its faults made for real where it can be."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import ray_processes
from raylets import Raylets

pytestmark = pytest.mark.cluster

JOB = str(Path(__file__).parent.parent / "jobs" / "digits.yaml")
OTHER_PYTHON = """
import platform, sys
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    platform.python_version = lambda: "3.12.9"
"""
PATCHED_PYTHON = """
import collections, platform, sys
names = "major minor micro releaselevel serial"
sys.version_info = collections.namedtuple("version_info", names)(*sys.version_info[:2], 99, "final", 0)
platform.python_version = lambda: "%d.%d.99" % sys.version_info[:2]
"""
NO_RAYDEEP = """
import sys
if any(word.endswith("default_worker.py") for word in sys.orig_argv):
    sys.modules["raydeep"] = None
"""


def can_mount() -> bool:
    made = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False)
    return made.returncode == 0 and os.geteuid() == 0


@pytest.fixture(scope="module")
def raylets(home: Path) -> Iterator[Raylets]:
    """A head and a worker, in order."""
    (home / "runs").mkdir()
    found = Raylets(home / "c")
    try:
        found.start("--dashboard-host", "127.0.0.1")
        found.start()
        yield found
    finally:
        found.stop()
        assert ray_processes(found.home) == []


def ask(raylets: Raylets, *sets: str, job: str = JOB, **env: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and the checks by name."""
    pairs = [part for value in sets for part in ("--set", value)]
    code, said = raylets.doctor(job, "--json", *pairs, env=env)
    assert said.startswith("{"), said
    found = json.loads(said)
    assert "Traceback" not in said
    assert (raylets.home / "token").read_text() not in said if (raylets.home / "token").exists() else True
    return code, {check["name"]: check for check in found["checks"]}


def broken(found: dict[str, Any]) -> dict[str, str]:
    return {name: check["level"] for name, check in found.items() if check["level"] != "OK"}


def test_a_cluster_in_order_is_ok_and_left_as_it_was(raylets: Raylets, home: Path) -> None:
    code, said = raylets.doctor(JOB, "--set", f"storage={home / 'runs'}")
    assert code == 0, said
    lines = said.splitlines()
    assert lines[-1] == "2 nodes: 14 OK", said
    assert any(f"{home / 'runs'}: written and read on all 2 nodes" in line for line in lines)
    assert any("refuses who shows no token" in line for line in lines)
    assert any("listens on 127.0.0.1:" in line for line in lines)
    assert list((home / "runs").iterdir()) == []


def test_gpus_that_are_asked_for_and_absent(raylets: Raylets, home: Path) -> None:
    code, found = ask(raylets, "scaling.use_gpu=true", f"storage={home / 'runs'}")
    assert code == 1
    assert broken(found) == {"gpus": "FAIL", "placement": "FAIL"}
    assert "needs 2 GPUs, but the cluster has 0" in found["placement"]["found"]


def test_a_dataset_that_is_nowhere(raylets: Raylets, home: Path) -> None:
    code, found = ask(raylets, f"storage={home / 'runs'}", "data.source=folder", f"data.path={home / 'gone'}")
    assert (code, broken(found)) == (1, {"dataset": "FAIL"})
    assert f"{home / 'gone'} is not a folder" in found["dataset"]["found"]


def test_a_node_that_shares_no_storage_lacks_the_dataset_and_has_little_shared_memory(
    raylets: Raylets, home: Path, write_pictures
) -> None:
    if not can_mount():
        pytest.skip("a node can't get file systems of its own here (it needs root)")
    (home / "alone").mkdir()
    photos = write_pictures(home / "photos", {"cat": 8, "dog": 8})
    mounts = {str(home / "alone"): "size=8m", str(photos): "size=8m", "/dev/shm": "size=32m"}
    raylets.start(mounts=mounts)
    code, found = ask(
        raylets, f"storage={home / 'alone'}", "data.source=folder", f"data.path={photos}", "data.image_size=8"
    )
    assert (code, broken(found)) == (1, {"storage": "FAIL", "dataset": "FAIL", "shm": "WARN"})
    assert "is not shared: what this machine writes is not seen there" in found["storage"]["found"]
    assert "holds no file" in found["dataset"]["found"]
    assert "34 MB of /dev/shm, too little for Ray's object store of 100 MB" in found["shm"]["found"]
    names = {check["found"].split(":")[0] for check in found.values() if check["level"] != "OK"}
    assert len(names) == 1, "one node, and the same"
    assert list((home / "alone").iterdir()) == []


def test_nodes_of_another_python_and_without_raydeep(raylets: Raylets, home: Path) -> None:
    for name, text in (("python", OTHER_PYTHON), ("bare", NO_RAYDEEP)):
        (home / name).mkdir()
        (home / name / "sitecustomize.py").write_text(text)
        raylets.start(env={"PYTHONPATH": str(home / name)})
    code, found = ask(raylets, f"storage={home / 'runs'}")
    assert code == 1
    assert {"versions": "FAIL", "nodes": "FAIL"}.items() <= broken(found).items()
    assert "but 3.12.9 on" in found["versions"]["found"]
    assert "ModuleNotFoundError" in found["nodes"]["found"]


def test_a_process_of_another_python_is_told_what_differs(raylets: Raylets, home: Path) -> None:
    (home / "mine").mkdir()
    (home / "mine" / "sitecustomize.py").write_text(PATCHED_PYTHON)
    code, found = ask(raylets, PYTHONPATH=str(home / "mine"))
    assert (code, broken(found)) == (1, {"versions": "FAIL"})
    assert ".99 on this process but 3." in found["versions"]["found"]


def test_a_cluster_that_is_open_to_everybody(home: Path) -> None:
    found = Raylets(home / "o", tokens=False)
    try:
        found.start("--dashboard-host", "0.0.0.0")
        assert len(found.processes()) > 5, "or stop would find nothing to end"
        code, told = ask(found, f"storage={home / 'runs'}", "scaling.workers=1")
        assert (code, broken(told)) == (1, {"tokens": "FAIL", "dashboard": "FAIL"})
        assert "listens on all interfaces (0.0.0.0)" in told["dashboard"]["found"]
        assert "without asking for a token" in told["dashboard"]["found"]
    finally:
        found.stop()
    assert ray_processes(found.home) == []

"""Jobs on a real cluster of three raylets with a token, as `cluster/local.sh` starts it, from clean shells."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from commands import ray_processes, wait_for

from raydeep.data import order, shards, splits
from raydeep.disk import read_json, read_lines
from raydeep.run import Run

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parent.parent
SMALL = [
    "--set", "train.epochs=8", "--set", "search.trials=12", "--set", "recover.epochs=4", "--set",
    "export.latency_rounds=3",
]  # fmt: skip


class Cluster:
    """A head and two workers of this machine."""

    def __init__(self, home: Path) -> None:
        self.home = home
        # what a new shell has, and nothing of this one
        self.clean = {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "LANG": "C.UTF-8"}
        self.env = dict(self.clean)

    def local(self, *arguments: str) -> str:
        """Run cluster/local.sh."""
        done = subprocess.run(
            [ROOT / "cluster" / "local.sh", *arguments], env={**self.clean, "RAYDEEP_CLUSTER_DIR": str(self.home)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout

    def up(self) -> None:
        """Start it."""
        self.said = self.local("up", "2")
        lines = (self.home / "env").read_text().splitlines()
        self.env |= dict(line.removeprefix("export ").split("=", 1) for line in lines)

    def run(self, *command: str, cwd: Path = ROOT, **env: str) -> tuple[int, str]:
        """A command to its end."""
        done = subprocess.run(
            command, cwd=cwd, env={**self.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=400,
        )  # fmt: skip
        return done.returncode, done.stdout

    def start(self, *command: str, cwd: Path = ROOT, **env: str) -> subprocess.Popen[str]:
        """A command."""
        return subprocess.Popen(
            command, cwd=cwd, env={**self.env, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def kill_raylet(self, doing: str) -> None:
        """Kill -9 of the raylet of a worker that does this, as a node that loses power: its processes go with it."""

        found: list[psutil.Process] = []

        def at_work() -> list[psutil.Process]:
            raylets = [psutil.Process(int(entry.name)) for entry in Path("/proc").iterdir() if self._is_raylet(entry)]
            found.extend(
                raylet for raylet in raylets if any(doing in " ".join(_words(child)) for child in raylet.children())
            )
            return found

        wait_for(at_work, 60, f"a raylet with {doing}")
        found[0].kill()

    def _is_raylet(self, entry: Path) -> bool:
        """Whether an entry of /proc is a raylet of a worker of this cluster."""
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            marks = [f"{self.home}/t/{worker}/" for worker in (1, 2)]
            return words[0].endswith("raylet/raylet") and any(mark in word for word in words for mark in marks)
        return False

    def folder(self, name: str) -> Path | None:
        """The newest run of a job."""
        return max((self.home / "runs").glob(f"{name}-*"), key=lambda path: path.stat().st_mtime, default=None)


def _words(process: psutil.Process) -> list[str]:
    """Of its command; none if it is gone."""
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []


@pytest.fixture(scope="module")
def started(home: Path) -> Iterator[Cluster]:
    made = Cluster(home)
    try:
        made.up()
        yield made
    finally:
        made.local("down")


@pytest.fixture
def cluster(started: Cluster) -> Cluster:
    """All three raylets, whatever the test before this one did to them."""
    started.local("up", "2")
    return started


@contextlib.contextmanager
def flaky_proxy(address: str, every_s: float) -> Iterator[str]:
    """A way to the job server that loses all its connections every so often."""
    host, port = address.removeprefix("http://").split(":")
    door = socket.create_server(("127.0.0.1", 0))
    pairs: list[socket.socket] = []

    def pump(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
        for end in (source, to):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = door.accept()
                far = socket.create_connection((host, int(port)))
                pairs.extend((near, far))
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    def cut() -> None:
        while door.fileno() != -1:
            time.sleep(every_s)
            for end in pairs[:]:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
                pairs.remove(end)

    for work in (serve, cut):
        threading.Thread(target=work, daemon=True).start()
    with door:
        yield f"http://127.0.0.1:{door.getsockname()[1]}"


def test_it_is_closed_to_others(cluster: Cluster) -> None:
    token = cluster.home / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() not in cluster.said
    assert len(token.read_text()) >= 32
    assert "RAY_AUTH_MODE=token" in cluster.said  # the line for a second machine
    (cluster.home / "wrong").write_text("f" * 64)
    wrong = {"RAY_AUTH_TOKEN_PATH": str(cluster.home / "wrong")}
    code, said = cluster.run("raydeep", "submit", "jobs/digits.yaml", **wrong)
    assert (code, "Traceback" in said) == (2, False), said
    assert f"refuses the token in {cluster.home / 'wrong'}" in said
    code, said = cluster.run("ray", "job", "list", **wrong)
    assert code != 0
    assert "Authentication" in said
    port = int(cluster.env["RAY_API_SERVER_ADDRESS"].rsplit(":", 1)[1])
    assert _listening(port) == {"127.0.0.1"}


def _listening(port: int) -> set[str]:
    """Addresses that something listens on at a port (IPv4)."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == port:
                raw = bytes.fromhex(local.split(":")[0])
                found.add(socket.inet_ntoa(raw[::-1]) if len(raw) == 4 else "IPv6")
    return found


def test_ray_job_submit_from_a_clean_shell_loses_a_raylet_and_finishes(cluster: Cluster) -> None:
    process = cluster.start(
        "ray", "job", "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--", "raydeep",
        "search", "jobs/digits.yaml", *SMALL,
    )  # fmt: skip

    def ledger(event: str) -> list[dict]:
        folder = cluster.folder("digits")
        return [row for row in read_lines(folder / "ledger.jsonl") if row.get("event") == event] if folder else []

    wait_for(lambda: len(ledger("rung")) >= 3 or process.poll() is not None, 240, "three rungs")
    assert process.poll() is None, process.communicate()[0]
    cluster.kill_raylet("Trainable")
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert "12 trials finished, 0 failed" in said
    assert sorted(row["trial"] for row in ledger("end")) == list(range(12))
    folder = cluster.folder("digits")
    assert folder is not None
    assert (folder / "front.json").is_file()
    sent = list(cluster.home.glob("t/*/session_2*/runtime_resources/working_dir_files/_ray_pkg_*/jobs"))
    assert sent
    assert not any((jobs.parent / "raydeep").exists() for jobs in sent), "workers would run it, the driver another"


TRAINING = """
name: own-network
model: {name: "slow:make"}
train: {epochs: 12, batch_size: 8, lr: 0.01, checkpoint_steps: 20}
scaling: {workers: [1, 2], cpus_per_worker: 2, resize_interval_s: 5}
export: {latency_rounds: 3}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project: a job and a network of their own; a link to data that must not travel."""
    shutil.copy(ROOT / "benchmarks" / "slow.py", tmp_path)
    (tmp_path / "job.yaml").write_text(TRAINING)
    return tmp_path


def orders(folder: Path, epochs: int) -> list[str]:
    """Hashes of the sequences of global batches that a run must have seen, whatever happened to it."""
    job = Run.open(folder).job
    manifest = shards.load_manifest(Path(read_json(folder / "provenance.json")["dataset"]["path"]))
    train, size = splits.read_dataset(manifest, job.data).train, job.train.batch_size
    return [order.order_hash(train.order(job.seed, epoch, size), size) for epoch in range(epochs)]


def test_a_training_outlives_a_raylet_and_lost_connections_and_takes_the_node_back(
    cluster: Cluster, project: Path
) -> None:
    with flaky_proxy(cluster.env["RAY_API_SERVER_ADDRESS"], 7.0) as address:
        process = cluster.start("raydeep", "submit", "job.yaml", "--stage", "train", "--address", address, cwd=project)

        def attempts() -> list[dict]:
            folder = cluster.folder("own-network")
            return read_lines(folder / "attempts.jsonl") if folder else []

        def steps() -> int:
            folder = cluster.folder("own-network")
            return max((int(path.name[5:]) for path in folder.glob("checkpoints/step-*")), default=0) if folder else 0

        def until(condition: Callable[[], bool], what: str) -> None:
            wait_for(lambda: process.poll() is not None or condition(), 120, what)
            assert process.poll() is None, process.communicate()[0]

        def until_workers(count: int) -> None:
            until(lambda: bool(attempts()) and attempts()[-1]["workers"] == count, f"an attempt of {count} workers")

        until_workers(2)  # Ray looks for nodes every 20 s: one just back may be missed by the first attempt
        begun = attempts()[-1]["from_step"]
        until(lambda: steps() >= begun + 60, "60 steps of two workers")
        cluster.kill_raylet("RayTrainWorker")
        until_workers(1)
        cluster.local("up", "2")
        until_workers(2)
        said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert [row["workers"] for row in attempts()][-3:] == [2, 1, 2]
    assert [row["workers"] for row in attempts()][:-3] in ([], [1])
    assert all(row["from_step"] > 0 for row in attempts()[1:])
    folder = cluster.folder("own-network")
    assert folder is not None
    rows = read_lines(folder / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert [row["order_hash"] for row in rows] == orders(folder, 12)
    for line in ("✓ data", "✓ train", "✓ verify", "exit code 0"):  # once each, whatever the connections did
        assert len(re.findall(line, said)) == 1, said
    assert re.search(r"bundle     2 files, [\d,]+ bytes", said)


def test_a_job_is_left_looked_at_stopped_and_told(cluster: Cluster, project: Path) -> None:
    """Detached, asked about, followed, and stopped by Ctrl-C and an answer; it writes its checkpoint before it goes."""
    longer = ["--set", "train.epochs=200", "--set", "train.checkpoint_steps=none", "--set", "name=left"]
    code, said = cluster.run("raydeep", "submit", "job.yaml", "--stage", "train", "--detach", *longer, cwd=project)
    assert code == 0, said
    [job_id] = re.findall(r"^job +(\S+) at", said, re.MULTILINE)
    wait_for(lambda: (folder := cluster.folder("left")) and read_lines(folder / "metrics.jsonl"), 120, "an epoch")
    code, said = cluster.run("raydeep", "submit", "--status", job_id)
    assert (code, said.split()[:2]) == (0, [job_id, "running:"])

    process = cluster.start("raydeep", "submit", "--logs", job_id)  # nobody can answer it
    wait_for(lambda: "✓ ray" in (process.stdout.readline() if process.stdout else ""), 60, "its log")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"raydeep submit --logs {job_id}" in said

    code, said = _answered(cluster, ["raydeep", "submit", "--logs", job_id], "s\n")
    assert code == 143, said
    assert "it writes a checkpoint first" in said
    folder = cluster.folder("left")
    assert folder is not None
    steps = [int(path.name[5:]) for path in folder.glob("checkpoints/step-*")]
    assert any(step % 146 for step in steps), steps  # not the end of an epoch: that of the stop
    code, said = cluster.run("raydeep", "submit", "--status", job_id)
    assert (code, said.split()[:2]) == (143, [job_id, "stopped:"])
    code, said = cluster.run("raydeep", "submit", "--stop", "nothing-1")
    assert code == 2
    assert "nothing-1: the job server knows no such job" in said


def _answered(cluster: Cluster, command: list[str], answer: str) -> tuple[int, str]:
    """A command on a terminal that Ctrl-C is pressed in, once it has printed, and its question answered."""
    near, far = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**cluster.env, "TERM": "dumb"},
        stdin=far,
        stdout=far,
        stderr=far,
        start_new_session=True,
    )
    os.close(far)
    said, state = "", "starts"
    with contextlib.suppress(OSError):  # what a pty raises at its end
        while data := os.read(near, 65536):
            said += data.decode(errors="replace")
            if state == "starts" and "✓ ray" in said:
                os.kill(process.pid, signal.SIGINT)
                state = "pressed"
            if state == "pressed" and "[d]etach" in said:
                os.write(near, answer.encode())
                state = "answered"
    code = process.wait(timeout=120)
    os.close(near)
    return code, said


def test_a_job_that_fails_fails_here(cluster: Cluster, project: Path) -> None:
    code, said = cluster.run(
        "raydeep", "submit", "job.yaml", "--set", "data.source=folder", "--set", "data.path=/nowhere/photos",
        cwd=project,
    )  # fmt: skip
    assert code == 2, said
    assert re.search("error: .*/nowhere/photos", said)
    assert "failed after" in said
    assert "exit code 2" in said


def alive(process: psutil.Process) -> bool:
    """Whether it runs, and does not only wait for its parent to ask for its exit code."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_down_stops_all_of_it_and_nothing_else(cluster: Cluster) -> None:
    code, said = cluster.run("ray", "job", "submit", "--no-wait", "--", "sleep", "601")
    assert code == 0, said
    starts = [psutil.Process(int(file.read_text())) for file in (cluster.home / "nodes").glob("*.pid")]
    all_of_it: list[psutil.Process] = []

    def job_runs() -> bool:
        all_of_it[:] = [process for start in starts for process in (start, *start.children(recursive=True))]
        return any("sleep" in _words(process) for process in all_of_it)

    wait_for(job_runs, 60, "the job")  # in a session of its own, and nothing in its command names the cluster
    assert len(starts) == 3
    assert len(all_of_it) > 12
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "raylet/raylet"])
    try:
        assert "stopped" in cluster.local("down")
        wait_for(lambda: not ray_processes(cluster.home), 5, "the cluster to stop")
        assert [process for process in all_of_it if alive(process)] == []
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    done = subprocess.run(
        [ROOT / "cluster" / "local.sh", "status"], env={**cluster.clean, "RAYDEEP_CLUSTER_DIR": str(cluster.home)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, "no cluster in" in done.stdout) == (1, True)

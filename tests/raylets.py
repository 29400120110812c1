"""Raylets on this machine: a cluster with a token of its own, whose nodes may see other folders than each other."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PRCTL = ctypes.CDLL(None).prctl
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])


def _end_with_parent() -> None:
    """A killed test leaves no cluster: its `ray start --block` gets SIGTERM, and ends what it has started."""
    PRCTL(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Raylets:
    """`ray start --block` for each node; `stop` ends them and what they started, and nothing else."""

    def __init__(self, home: Path, tokens: bool = True) -> None:
        home.mkdir(exist_ok=True)
        self.home, self.address, self.nodes = home, "", 0
        self.sessions: set[int] = set()
        auth = {"RAY_AUTH_MODE": "disabled"}
        if tokens:
            (home / "token").write_text(secrets.token_hex(32))
            auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home / "token")}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = {**inherited, **auth, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}

    def start(self, *options: str, env: dict[str, str] | None = None, mounts: dict[str, str] | None = None) -> None:
        """One more node, the first is the head.

        Args:
            options: for ray start.
            env: beside the cluster's.
            mounts: folder → options of the tmpfs that this node alone sees there; needs root.
        """
        first = not self.address
        port, dash, log = free_port(), free_port(), self.home / f"node-{self.nodes}.log"
        where = ["--address", self.address]
        if first:
            where = [
                "--head",
                "--port",
                str(port),
                "--dashboard-port",
                str(dash),
                "--ray-client-server-port",
                str(free_port()),
            ]
        for name in ("dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port"):
            where += [f"--{name}", str(free_port())]
        command = [
            *RAY, "start", "--block", "--disable-usage-stats", "--num-cpus", "1", "--object-store-memory", "100000000",
            "--temp-dir", str(self.home / str(self.nodes)), *where, *options,
        ]  # fmt: skip
        if mounts:
            mount = [f"mount -t tmpfs -o {how} tmpfs {shlex.quote(folder)}" for folder, how in mounts.items()]
            command = ["unshare", "-m", "sh", "-ec", "; ".join([*mount, f"exec {shlex.join(command)}"])]
        with log.open("w") as out:
            started = subprocess.Popen(
                command, env={**self.env, **(env or {})}, stdout=out, stderr=out, start_new_session=True,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
        self.sessions.add(started.pid)
        end = time.monotonic() + 90
        while "Ray runtime started" not in (said := log.read_text()):
            assert started.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.1)
        self.nodes += 1
        if first:
            found = re.search(r"--address='([\d.:]+)'", said)
            assert found, said
            self.address = found[1]

    def doctor(self, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
        """`raydeep doctor` on this cluster: exit code and output."""
        done = subprocess.run(
            [sys.executable, "-m", "raydeep.cli", "doctor", *arguments, "--address", self.address],
            env={**self.env, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def processes(self) -> list[int]:
        """Living processes of this cluster: each node is a session; Ray's own change their titles and environments."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                facts = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
            except OSError:
                continue
            if facts and facts[0] != "Z" and int(facts[3]) in self.sessions:
                found.append(int(entry.name))
        return found

    def stop(self) -> None:
        for kind, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
            for pid in self.processes():
                try:
                    os.kill(pid, kind)
                except ProcessLookupError:
                    continue
            end = time.monotonic() + seconds
            while self.processes() and time.monotonic() < end:
                time.sleep(0.1)

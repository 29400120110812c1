"""Many Ray nodes on this machine, for scale.py and soak.py: raylets with logical CPUs, stopped whatever happens."""

from __future__ import annotations

import atexit
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SCRIPT = str(ROOT / "cluster" / "local.sh")
CPUS = 2  # logical, of a node
TRIES = 3  # a node may miss Ray's 30 s; the next `up` starts those that are missing
AT_ONCE = 4  # nodes that start together: all of them share this machine's cores


def environment(text: str) -> dict[str, str]:
    """The variables that a file of `export NAME=VALUE` lines sets."""
    pairs = (line.removeprefix("export ").partition("=") for line in text.splitlines() if line.startswith("export "))
    return {name: value.strip("\"'") for name, _, value in pairs}


class Cluster(NamedTuple):
    """A cluster of this machine."""

    home: Path  # nodes/NAME.pid: the session of each node's processes
    env: dict[str, str]  # of its scripts
    up_s: float  # seconds that it took

    def up(self, count: int) -> subprocess.Popen[str]:
        """Start what is missing of the head and so many workers."""
        return subprocess.Popen(
            [SCRIPT, "up", str(count)], env=self.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip


@contextmanager
def raylets(count: int) -> Iterator[Cluster]:
    """A head and so many workers of CPUS logical CPUs each (cluster/local.sh).

    Afterwards they are stopped, whatever ends this process: a child waits for the end of a pipe that only it holds.
    """
    before = dict(os.environ)
    home = Path(tempfile.mkdtemp(prefix="rs", dir="/tmp"))  # short: Ray's sockets have long names
    env = {k: v for k, v in before.items() if k not in ("RAY_ADDRESS", "RAY_TMPDIR")}
    env |= {"RAYDEEP_CLUSTER_DIR": str(home), "RAYDEEP_CLUSTER_CPUS": str(CPUS), "RAY_AUTH_TOKEN_PATH": str(_token())}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}"  # its ray
    cluster = Cluster(home, env, 0)
    keeper = subprocess.Popen(
        ["bash", "-c", f"cat >/dev/null; '{SCRIPT}' down >/dev/null 2>&1; rm -rf '{home}'; "
         f"kill -0 {os.getpid()} 2>/dev/null || rm -f '{env['RAY_AUTH_TOKEN_PATH']}'"],
        env=env, stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        start = time.perf_counter()
        for up in [*range(AT_ONCE, count, AT_ONCE), count]:
            for left in reversed(range(TRIES)):
                process = cluster.up(up)
                _, said = process.communicate()
                if not process.returncode:
                    break
                if not left:
                    sys.exit(f"{SCRIPT} up {up} failed:\n{said}")
        took = time.perf_counter() - start
        os.environ |= environment((home / "env").read_text())
        os.environ["RAY_ADDRESS"] = os.environ["RAYDEEP_CLUSTER_GCS"]
        yield cluster._replace(up_s=took)
    finally:
        os.environ.clear()
        os.environ.update(before)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait()


def _token() -> Path:
    """One token file for all clusters of this process: Ray reads it once."""
    file = Path(tempfile.gettempdir()) / f"raydeep-scale-{os.getpid()}.token"
    if not file.exists():
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
        atexit.register(file.unlink, missing_ok=True)
    return file

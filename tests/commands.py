"""Commands as a user types them, one process tree each, on a Ray of their own in a folder of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"RAY_TMPDIR": str(home)}
    return subprocess.Popen(
        [sys.executable, "-m", "raydeep.cli", *arguments],
        env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(home: Path, *arguments: str) -> tuple[int, str]:
    process = start(home, *arguments)
    said, _ = process.communicate(timeout=600)
    return process.returncode, said


def ray_processes(home: Path) -> list[str]:
    """Command lines of living Ray processes that belong to this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                alive = "State:\tZ" not in (entry / "status").read_text()
            except OSError:
                continue
            if alive and str(home) in line and int(entry.name) != os.getpid():
                found.append(line[:120])
    return found


def wait_for(condition: object, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.2)

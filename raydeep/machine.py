"""Where a run takes place: the machine, and the versions of what matters to its results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from raydeep import __version__

PACKAGES = ("ray", "torch", "torchvision", "kornia", "pyarrow", "numpy", "optuna", "onnx", "onnxruntime")


def provenance(seed: int) -> dict[str, Any]:
    """Versions, hardware, git commit and seed of this process."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "raydeep": __version__,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "hardware": hardware(),
        "git_commit": _git_commit(),
        "seed": seed,
    }


def hardware() -> dict[str, Any]:
    """Processor, cores that this process may use, memory in bytes, GPUs (if torch is already loaded)."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    torch = sys.modules.get("torch")
    gpus = []
    if torch is not None and torch.cuda.is_available():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "cores": usable_cores(), "memory_bytes": memory_bytes(), "gpus": gpus}


def usable_cores() -> int:
    """Cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def memory_bytes() -> int:
    """Physical memory of this machine; 0 if the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def _git_commit(file: Path = Path(__file__)) -> str | None:
    """The commit of raydeep's own repository, with -dirty if its code has been changed since; None: it is in none.

    A repository that only has this file's folder in it (that of a project, with raydeep in its .venv) does not count.
    """

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", file.name) else None
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".") if commit else None
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}-dirty" if changed else commit or None

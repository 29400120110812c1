"""Facts of one node, as plain dicts that JSON takes: gathered where the function runs, in well under a second.

Ray and torch are not imported: versions are read from what is installed. None stands for what a system doesn't say.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import math
import os
import platform
import re
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from raydeep import __version__
from raydeep.machine import memory_bytes, usable_cores

CGROUPS = Path("/sys/fs/cgroup")
SHM = "/dev/shm"
LISTEN = "0A"  # in /proc/net/tcp
ASK_S = 2.0  # for an answer of the dashboard


def gather(port: int | None = None) -> dict[str, Any]:
    """All that is said of a node.

    Args:
        port: of the dashboard, if this node has it: who may connect to it.
    """
    found = {**signature(), **machine(), **graphics(), "time": time.time()}
    if port is not None:
        found |= {"listens": listens(port), "dashboard_open": dashboard_open(port)}
    return found


def signature() -> dict[str, Any]:
    """What must be the same on all nodes."""
    return {**versions(), "code": code()}


def versions() -> dict[str, Any]:
    """Python, Ray, torch, the CUDA that torch is built for, raydeep; None: not installed."""
    found: dict[str, Any] = {"python": platform.python_version(), "raydeep": __version__, "cuda": None}
    for name in ("ray", "torch"):
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = None
            continue
        found[name] = package.version.split("+")[0]
        if name == "torch":
            try:
                text = Path(str(package.locate_file("torch/version.py"))).read_text()
            except OSError:
                continue
            match = re.search(r"^cuda\b.*=\s*'([\d.]+)'", text, re.MULTILINE)
            found["cuda"] = match[1] if match else None
    return found


def code() -> str:
    """A hash of raydeep's source: two of one version may still differ."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> dict[str, Any]:
    """Cores, memory, /dev/shm, the disk of Ray's temporary files; in a Ray worker, as its raylet has them."""
    raylet = _raylet()
    temp = raylet.get("temp_dir") or os.environ.get("RAY_TMPDIR") or "/tmp"
    total, free = memory()
    shm = disk(SHM) if Path(SHM).is_dir() else None
    there = disk(temp)
    return {
        "hostname": socket.gethostname(), "cores": cores(), "memory_bytes": total, "memory_free_bytes": free,
        "shm_bytes": shm and shm[0], "shm_free_bytes": shm and shm[1], "plasma": raylet.get("plasma_directory"),
        "temp": temp, "temp_bytes": there and there[0], "temp_free_bytes": there and there[1],
        "auth": os.environ.get("RAY_AUTH_MODE"),
    }  # fmt: skip


def _raylet() -> dict[str, str]:
    """Options of the raylet that started this process; none, if none did."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return {}
    if not words[0].endswith("raylet"):
        return {}
    return {k: v for k, sep, v in (word.removeprefix("--").partition("=") for word in words[1:]) if sep}


def disk(path: str) -> tuple[int, int] | None:
    """Size and free bytes of the file system that holds a path, or would; None: it can't be asked."""
    for folder in (Path(path), *Path(path).parents):
        try:
            facts = shutil.disk_usage(folder)
        except FileNotFoundError:
            continue
        except OSError:
            return None
        return facts.total, facts.free
    return None


def cores(root: Path = CGROUPS, cgroup: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may use: those of its affinity, less where a cgroup allows less time."""
    most = float(usable_cores())
    for folder in _cgroups(root, cgroup, "cpu"):
        words = (_text(folder / "cpu.max") or "").split()
        quota, period = words if len(words) == 2 else ("", "")
        if not words:
            quota, period = (_text(folder / f"cpu.cfs_{name}_us") or "" for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            most = min(most, int(quota) / int(period))
    return max(1, math.ceil(most))


def memory(
    root: Path = CGROUPS, cgroup: Path = Path("/proc/self/cgroup"), meminfo: Path = Path("/proc/meminfo")
) -> tuple[int | None, int | None]:
    """Bytes of memory and those free, within the limits of cgroups: /proc/meminfo knows none of them."""
    total = memory_bytes() or None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(meminfo) or "", re.MULTILINE)
    free = int(found[1]) * 1024 if found else None
    for folder in _cgroups(root, cgroup, "memory"):
        new = (folder / "memory.max").exists()
        limit = _text(folder / ("memory.max" if new else "memory.limit_in_bytes")) or ""
        used = _text(folder / ("memory.current" if new else "memory.usage_in_bytes")) or ""
        if not limit.isdigit() or not used.isdigit() or (total and int(limit) >= total):
            continue
        prefix = "" if new else "total_"  # pages of files are given back when memory runs short: so counts Ray too
        stat = _text(folder / "memory.stat") or ""
        cached = sum(map(int, re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)))
        total = int(limit)
        free = min(free if free is not None else total, max(0, total - int(used) + cached))
    return total, free


def _cgroups(root: Path, cgroup: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's cgroup and of those that hold it."""
    for line in (_text(cgroup) or "").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller not in names.split(",") and not (number == "0" and not names):
            continue
        base = root / names if names else root
        base = base if base.is_dir() else root / controller
        inner = base / path.lstrip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder == base or base in folder.parents)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def graphics() -> dict[str, Any]:
    """NVIDIA GPUs, their driver and the newest CUDA that it runs, as NVML says, which no environment hides."""
    found: dict[str, Any] = {"gpus": [], "driver": None, "driver_cuda": None}
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return found
    except (OSError, AttributeError):
        return found
    try:
        text, count, handle = ctypes.create_string_buffer(96), ctypes.c_uint(), ctypes.c_void_p()
        if not nvml.nvmlSystemGetDriverVersion(text, 96):
            found["driver"] = text.value.decode(errors="replace")
        if not nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(count)):
            found["driver_cuda"] = f"{count.value // 1000}.{count.value % 1000 // 10}"
        if not nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            for i in range(count.value):
                if not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(handle)):
                    nvml.nvmlDeviceGetName(handle, text, 96)
                    found["gpus"].append(text.value.decode(errors="replace"))
    finally:
        nvml.nvmlShutdown()
    return found


def listens(port: int, tables: tuple[str, ...] = ("/proc/net/tcp", "/proc/net/tcp6")) -> list[str] | None:
    """Addresses of this machine on which somebody listens at a port; None: the system doesn't say."""
    texts = [text for text in (_text(Path(table)) for table in tables) if text is not None]
    if not texts:
        return None
    found = set()
    for line in (line for text in texts for line in text.splitlines()[1:]):
        words = line.split()
        digits, _, number = words[1].partition(":")
        if words[3] != LISTEN or int(number, 16) != port:
            continue
        parts = [bytes.fromhex(digits[i : i + 8]) for i in range(0, len(digits), 8)]  # words of 32 bits
        if sys.byteorder == "little":
            parts = [part[::-1] for part in parts]
        address = ipaddress.ip_address(b"".join(parts))
        found.add(str(getattr(address, "ipv4_mapped", None) or address))
    return sorted(found)


def dashboard_open(port: int) -> bool | None:
    """Whether the dashboard at a port of this machine answers those who show no token; None: it doesn't answer."""
    for host in ("127.0.0.1", socket.gethostname()):
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{host}:{port}/api/version", timeout=ASK_S):
                return True
        except urllib.error.HTTPError as err:
            return err.code not in (401, 403)
        except OSError:
            continue
    return None

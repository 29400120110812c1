"""Who works on a run folder: one process of a machine at a time, and others can see which."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock, if no other process does; gives whether that is so. A killed process frees it.

    On a file system without locks it is always held: then people take care.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW  # not through a link: it is emptied
    with os.fdopen(os.open(folder / LOCK, flags, 0o644), "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "began": _began(os.getpid())}))
        file.flush()
        try:
            yield True
        finally:
            file.truncate(0)


class Holder(NamedTuple):
    """Who holds a lock, or did when it was killed."""

    host: str
    pid: int
    alive: bool | None  # None: it is, or was, on another machine


def holder(folder: Path) -> Holder | None:
    """Who holds a folder's lock, as the lock file says; None: nobody.

    The lock is not tried for that: the process that wants it just then would find it taken.
    """
    try:
        found = json.loads((folder / LOCK).read_text())
        host, pid, began = str(found["host"]), int(found["pid"]), found["began"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # no file, nobody's, or one that is being written
    return Holder(host, pid, _began(pid) == began if host == socket.gethostname() else None)


def _began(pid: int) -> str | None:
    """What tells a process from others of its number: when it began, where the system says that; None: it is dead."""
    try:
        state, *facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
        try:  # a system without /proc
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass  # somebody else's
        return ""
    return None if state == "Z" else facts[18]

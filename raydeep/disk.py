"""Files that are whole or not there: written aside and renamed, JSON, lines that a kill may tear, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from raydeep.errors import ModelError, RaydeepError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the final name, fsynced, only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe or a device would be replaced by a file
        raise RaydeepError(f"{path}: there is something else than a file; name another one")
    aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(3)}.part")
    try:
        yield aside
        with aside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as aside:
        aside.write_bytes(data)


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_bytes(path, json_bytes(value))


def read_json(path: Path) -> Any:
    """Read JSON; a missing or broken file is a RaydeepError that names it."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RaydeepError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as err:
        raise RaydeepError(f"{path}: not valid JSON ({err}); restore it or make it anew") from None


def append_line(path: Path, *values: Any) -> None:
    """Append a JSON line for each value in one write, flushed to disk; a torn last line before them is closed off."""
    text = "".join(json.dumps(value) + "\n" for value in values).encode()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                text = b"\n" + text
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole JSON lines of a file; a line torn by a kill is left out."""
    return parse_lines(path.read_bytes()) if path.exists() else []


def parse_lines(data: bytes) -> list[dict[str, Any]]:
    """The whole JSON lines of what a file holds."""
    rows = []
    for line in data.decode(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over all other files of the folder."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.name != "SHA256SUMS" and p.name[0] != ".")
    write_bytes(folder / "SHA256SUMS", "".join(f"{sha256_file(p)}  {p.name}\n" for p in files).encode())


def write_summed(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files of a folder anew, and `SHA256SUMS`; what that says holds at every moment.

    Until the new files are there it does not name them, so that a kill leaves a folder that passes `check_sums`.
    """
    sums = folder / "SHA256SUMS"
    if sums.is_file():
        kept = [line for line in sums.read_text().splitlines() if line.partition("  ")[2] not in files]
        write_bytes(sums, "".join(f"{line}\n" for line in kept).encode())
    for name, data in files.items():
        write_bytes(folder / name, data)
    write_sums(folder)


READ = ("spec.json", "model.safetensors", "model.rdz")  # of a model folder: written once, read by commands
MAX_SUMS_BYTES = 2**20


def check_sums(folder: Path, *read: str) -> None:
    """Check `SHA256SUMS`.

    Args:
        folder: of a model.
        read: files beside READ that the caller reads; `model.onnx` is not among those, as verifying writes it anew.

    Raises:
        ModelError: a file is missing or changed, or one that is read is not named.
    """
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        raise ModelError(f"{folder}: no SHA256SUMS; not a whole model folder, export it again")
    with sums.open("rb") as file:
        text = file.read(MAX_SUMS_BYTES).decode(errors="replace")
    listed = set()
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        path = folder / Path(name).name
        if not path.is_file() or sha256_file(path) != digest:
            raise ModelError(f"{path}: missing or changed since it was written; export the model again")
        listed.add(path.name)
    for name in (*READ, *read):
        if name not in listed and (folder / name).exists():
            raise ModelError(f"{folder / name}: SHA256SUMS does not name it; export the model again")

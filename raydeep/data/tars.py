"""WebDataset: pictures and labels as members of tar files. Headers are scanned once; nothing is ever unpacked.

A member `KEY.EXT` belongs to the sample KEY, which ends at the first dot of the file's name. A sample has one picture
(`.jpg`, `.png`, …) and its label: `.cls` (an integer or a name, as text), `.json` with the key data.label_column, or
`.txt`, the first of these that it has.
"""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from raydeep.data import rows as rows_
from raydeep.data.files import AWAY, Entry, Files, open_files
from raydeep.data.rows import SPLITS, SUFFIXES, Picture, Row, Source, printable, split_of
from raydeep.errors import DataError

if TYPE_CHECKING:
    from raydeep.config import Data

PICTURES = {suffix[1:] for suffix in SUFFIXES}
LABELS = ("cls", "json", "txt")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
MAX_LABEL_BYTES = MAX_HEADER_BYTES = 2**20
READ_AHEAD_BYTES = 4 * 2**20  # small members: one request for many headers
BLOCK = tarfile.BLOCKSIZE


def tar_files(entries: list[Entry]) -> list[tuple[str, str | None]]:
    """Tar files, and the split that each one's folder or name begins with."""
    found = []
    for entry in entries:
        top, _, rest = entry.path.rpartition("/")
        if entry.path.lower().endswith((".tar", *COMPRESSED)) and (not top or top in SPLITS):
            found.append((entry.path, split_of(top or rest)))
    return found


def webdataset(cfg: Data) -> Source:
    """Tar files below data.path, or below its folders train, val and test.

    `train*.tar`, `val*.tar` and `test*.tar` name splits too; with none of train, all files are split. A
    `classes.json` (list of names) beside them names integer labels.

    Raises:
        DataError: a tar is torn or compressed, a sample lacks its picture or label, or a label is none.
    """
    files = open_files(cfg)
    entries = files.entries()
    tars = tar_files(entries)
    if any(split == "train" for _, split in tars):
        tars = [(name, split) for name, split in tars if split]
    else:
        tars = [(name, None) for name, _ in tars]
    if not tars:
        raise DataError(f"data.path: {files.name()} holds no *.tar files")
    faults = {entry.path: entry.fault for entry in entries}
    scanned = []
    for name, _ in tars:
        if faults[name] == AWAY:
            raise files.leaves(name)
        scanned.append(scan(files, name, cfg.label_column))
    if not any(scanned):
        raise DataError(f"data.path: {files.name()}: no pictures found in its tar files")
    labelled = [[sample for sample in samples if sample.labelled] for samples in scanned]
    columns = [
        rows_.labels_of_list(partial(_where, files.name(name), samples), [sample.label for sample in samples])
        for (name, _), samples in zip(tars, labelled, strict=True)
    ]
    if all(sample.text for samples in labelled for sample in samples):
        columns = rows_.typed(columns)
    own = (
        rows_.parse_names(files.name("classes.json"), files.read("classes.json")) if "classes.json" in faults else None
    )
    classes, codes = rows_.code(files.name(), columns, own)
    rows = []
    for (name, split), samples, coded in zip(tars, scanned, codes, strict=True):
        labels = iter(coded.tolist())
        for sample in samples:
            key = (name, sample.offset, sample.why or sample.size)
            label = next(labels) if sample.labelled else 0  # of a refused picture: it is read by nobody
            rows.append(Row(printable(f"{name}#{sample.key}"), label, split, key, sample.size))
    return Source(classes, rows, partial(read_members, files))


def _where(tar: str, samples: list[Sample], i: int) -> str:
    return f"{tar} key {samples[i].key!r}"


def _compressed(where: str) -> DataError:
    return DataError(
        f"{where}: compressed; pictures are read by their place in the tar, so unpack it to a plain .tar "
        f"(gunzip, unxz, unzstd), or keep pictures as JPEG or PNG, which compression does not make smaller"
    )


@dataclass(slots=True)
class Sample:
    """What a tar holds of one key."""

    key: str
    offset: int = -1  # of the picture's bytes; -1: there is no picture, or it is refused
    size: int = 0
    why: str = ""  # why the picture is refused
    pictures: list[str] = field(default_factory=list)  # names
    labels: dict[str, bytes] = field(default_factory=dict)  # by extension
    label: Any = None
    labelled: bool = True
    text: bool = False  # the label was read as text


class _Guarded:
    """A file for tarfile that refuses the endless reads which a forged header asks for."""

    def __init__(self, file: Any) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return cast("bytes", self.file.read(size))


def scan(files: Files, name: str, column: str, labelled: bool = True) -> list[Sample]:
    """The samples of a tar that have a picture, in the order of their first members.

    Args:
        files: that hold it.
        name: of the tar.
        column: key of the label in a .json.
        labelled: each must have a label; else those without say so (`Sample.labelled`).

    Raises:
        DataError: the tar is torn or compressed, or a sample is not as it should be.
    """
    if name.lower().endswith(COMPRESSED):
        raise _compressed(files.name(name))
    where = files.name(name)
    samples: dict[str, Sample] = {}
    try:
        with files.open(name) as raw:
            file: BinaryIO = io.BufferedReader(_Raw(raw), READ_AHEAD_BYTES) if files.remote else raw
            for member in _members(where, file):
                _place(where, samples, member, file)
    except (OSError, tarfile.TarError) as err:
        raise DataError(f"{where}: not readable as a tar: {err}; is it whole? Copy it again") from None
    kept = []
    for sample in samples.values():
        if not sample.pictures:
            if sample.labels and labelled:
                raise DataError(
                    f"{where} key {sample.key!r}: found {', '.join(sample.labels)} and no picture; expected "
                    f"{sample.key}.jpg, .png or the like"
                )
            continue
        _label(where, sample, column, labelled)
        kept.append(sample)
    return kept


class _Raw(io.RawIOBase):
    """Any file to read and seek in → what BufferedReader takes."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.file.seek(offset, whence)
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        data = self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _members(where: str, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar, one at a time; fails unless the tar is whole."""
    start = file.read(BLOCK)
    if (
        start[:2] == b"\x1f\x8b"
        or start[:3] == b"BZh"
        or start[:6] == b"\xfd7zXZ\0"
        or start[:4] == b"\x28\xb5\x2f\xfd"
    ):
        raise _compressed(where)
    file.seek(0)
    end = 0
    try:
        tar: Any = tarfile.TarFile(fileobj=cast("Any", _Guarded(file)), mode="r")
        while (member := tar.next()) is not None:
            tar.members.clear()  # it keeps all of them otherwise
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"member {member.name!r} has a size of {member.size}")
            end = tar.offset
            yield member
    except (ValueError, RecursionError, OverflowError) as err:
        raise tarfile.ReadError(str(err) or type(err).__name__) from None
    file.seek(tar.offset)
    if file.read(BLOCK) != bytes(BLOCK):  # tarfile takes a broken header, or none, for the end
        raise tarfile.ReadError(f"no end mark at byte {tar.offset:,}")
    while block := file.read(MAX_HEADER_BYTES):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more data follows its end mark (joined tars?)")


def _place(where: str, samples: dict[str, Sample], member: tarfile.TarInfo, file: BinaryIO) -> None:
    """Put one member to its sample."""
    folder, base = posixpath.split(member.name)
    stem, _, extension = base.partition(".")
    kind = extension.lower()
    if member.isdir() or base.startswith(".") or not stem:
        return
    key = posixpath.join(folder, stem)
    is_picture, is_label = kind in PICTURES, kind in LABELS
    if not is_picture and not is_label:
        if kind.rpartition(".")[2] in PICTURES:  # KEY.left.jpg: another view, if there is a KEY.jpg as well
            samples.setdefault(key, Sample(key)).labels.setdefault(extension, b"")
        return
    sample = samples.setdefault(key, Sample(key))
    why = _refused(member)
    if is_picture:
        sample.pictures.append(member.name)
        if len(sample.pictures) > 1:
            raise DataError(f"{where} key {key!r}: {' and '.join(sample.pictures)}; expected one picture a key")
        sample.offset, sample.size, sample.why = member.offset_data, member.size, why
        if why or not member.size:
            sample.offset, sample.size, sample.why = -len(samples), 0, why or "empty file"
        return
    if kind in sample.labels:
        raise DataError(f"{where} key {key!r}: two .{kind} members; expected one label a key")
    if why and not member.isreg():
        raise DataError(f"{where} key {key!r}: its label {member.name}: {why}")
    if member.size > MAX_LABEL_BYTES:
        raise DataError(f"{where} key {key!r}: a .{kind} of {member.size:,} bytes; expected a label")
    file.seek(member.offset_data)
    sample.labels[kind] = file.read(member.size)


def _refused(member: tarfile.TarInfo) -> str:
    """Why a member is not read, whatever it holds."""
    if member.issym() or member.islnk():
        return f"a link in the tar (to {member.linkname}); pack the picture itself"
    if not member.isreg() or member.issparse():
        return "no regular file in the tar (a device, a pipe or a sparse file)"
    if member.name.startswith("/") or ".." in member.name.split("/"):
        return f"the name of the member, {member.name}, leads out of its folder"
    return ""


def _label(where: str, sample: Sample, column: str, needed: bool) -> None:
    """Read the label of a sample that has a picture."""
    found = sample.labels
    sample.labels = {}
    try:
        for kind in ("cls", "txt"):
            if kind in found and (kind == "cls" or "json" not in found):
                sample.label, sample.text = found[kind].decode("utf-8-sig").strip(), True
                return
        if "json" in found:
            facts = json.loads(found["json"])
            if not needed and isinstance(facts, dict) and column not in facts:
                sample.labelled = False
                return
            if not isinstance(facts, dict) or column not in facts:
                has = ", ".join(facts) if isinstance(facts, dict) else "no object"
                raise DataError(
                    f"{where} key {sample.key!r}: its .json has no key {column!r}, found {has}; set data.label_column"
                )
            sample.label = facts[column]
            return
    except (ValueError, RecursionError) as err:
        raise DataError(f"{where} key {sample.key!r}: its label is not readable: {err}") from None
    if sample.why or not needed:
        sample.labelled = False
        return
    raise DataError(
        f"{where} key {sample.key!r}: the picture {sample.pictures[0]} has no label; expected a member "
        f"{sample.key}.cls, .json or .txt"
    )


def read_members(files: Files, wanted: Iterable[Row]) -> Iterator[Picture]:
    """Pictures by tar, offset and size (the rows' keys)."""
    held: tuple[str, BinaryIO] | None = None
    try:
        for row in wanted:
            name, offset, size = row.key
            if offset < 0:
                yield DataError(size)
                continue
            try:
                if held is None or held[0] != name:
                    if held is not None:
                        held[1].close()
                    held = name, files.open(name)
                held[1].seek(offset)
                data = held[1].read(size)
            except OSError as err:
                raise DataError(f"{files.name(name)}: can't be read: {err.strerror or err}") from None
            yield data if len(data) == size else DataError("torn: the tar ends before the picture does")
    finally:
        if held is not None:
            held[1].close()

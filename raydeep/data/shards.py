"""Any source → Parquet shards with a manifest. Strict decoding happens here, once.

A dataset folder holds `dataset.json`, `<split>-00000.parquet …` (columns image, label, origin) and
`quarantine.jsonl`. It appears under its final name only when whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydeep.data import decode, order, sources
from raydeep.errors import DataError
from raydeep.run import append_line, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from raydeep.config import Data

SCHEMA_VERSION = 1
ROW_GROUP = 2048
LATER = {"limit_per_class", "mode", "memory_bytes"}  # keys that matter when shards are read, not when written
TABLE = pa.schema([("image", pa.binary()), ("label", pa.int64()), ("origin", pa.string())])

Progress = Callable[[int, int], None]  # rows done, rows in all


class Manifest(NamedTuple):
    """What `dataset.json` says."""

    path: Path
    classes: list[str]
    mode: str  # grey or rgb
    size_range: tuple[int, int, int, int]  # smallest height, width, largest height, width
    mean: list[float]  # a channel, of train, in [0, 1]
    std: list[float]
    splits: dict[str, dict[str, Any]]
    quarantined: int
    hash: str

    def files(self, split: str) -> list[Path]:
        """Shards of a split, in order."""
        return [self.path / shard["name"] for shard in self.splits[split]["shards"]]

    def rows(self, split: str) -> int:
        """Rows of a split."""
        return int(self.splits[split]["rows"])

    def side(self, cfg: Data) -> int | None:
        """Side in pixels that pictures are decoded to; None leaves them as they are.

        Raises:
            DataError: the sizes vary and the job names none.
        """
        low_h, low_w, high_h, high_w = self.size_range
        if cfg.image_size is None and (low_h, low_w) != (high_h, high_w):
            raise DataError(
                f"{self.path}: pictures are {low_h}×{low_w} to {high_h}×{high_w} pixels; "
                f"name one size with data.image_size"
            )
        return cfg.image_size

    def shape(self, cfg: Data) -> tuple[int, int, int]:
        """Height, width, channels of a decoded picture."""
        side = self.side(cfg)
        height, width = (side, side) if side else self.size_range[:2]
        return height, width, decode.CHANNELS[self.pixel_mode(cfg)]

    def pixel_mode(self, cfg: Data) -> str:
        """Grey or rgb, as the job says, or as the pictures are."""
        return self.mode if cfg.mode == "auto" else cfg.mode


def load_manifest(path: Path, check_hashes: bool = False) -> Manifest:
    """Read and check `dataset.json`.

    Raises:
        DataError: the folder is no dataset, of another version, or misses shards.
    """
    file = path / "dataset.json"
    if not file.is_file():
        raise DataError(f"{path}: no dataset.json; make a dataset with: raydeep shard SOURCE {path}")
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise DataError(f"{file}: expected a JSON object; shard the source again")
    if raw.get("schema") != SCHEMA_VERSION:
        raise DataError(f"{file}: schema {raw.get('schema')}, expected {SCHEMA_VERSION}; shard the source again")
    try:
        fields = {name: raw[name] for name in Manifest._fields if name != "path"}
        manifest = Manifest(path=path, **{**fields, "size_range": tuple(fields["size_range"])})
    except (KeyError, TypeError) as err:
        raise DataError(f"{file}: lacks {err}; shard the source again") from None
    for split in manifest.splits.values():
        for shard in split["shards"]:
            found = path / shard["name"]
            if not found.is_file() or found.stat().st_size != shard["bytes"]:
                raise DataError(f"{found}: missing or not {shard['bytes']:,} bytes; shard the source again")
            if check_hashes and sha256_file(found) != shard["sha256"]:
                raise DataError(f"{found}: its sha256 is not that of dataset.json; shard the source again")
    return manifest


def dataset_folder(cfg: Data, storage: Path) -> Path:
    """Where the shards of a job's source stand: its own path if that is a dataset, else a folder in storage."""
    if cfg.path and (Path(cfg.path).expanduser() / "dataset.json").is_file():
        return Path(cfg.path).expanduser().resolve()
    facts: list[Any] = [SCHEMA_VERSION, cfg.model_dump(exclude=LATER)]
    if cfg.source != "synthetic":
        facts[1] = {k: v for k, v in facts[1].items() if k not in ("image_size", "rows", "classes")}
    if cfg.source in ("folder", "parquet") and cfg.path:
        root = Path(cfg.path).expanduser()
        facts[1]["path"] = str(root.resolve())
        for file in sorted(root.rglob("*")):
            if file.is_file():
                facts.append((str(file.relative_to(root)), file.stat().st_size, file.stat().st_mtime_ns))
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return storage / "datasets" / f"{cfg.source}-{key}"


def prepare(cfg: Data, storage: Path, progress: Progress | None = None) -> Manifest:
    """The dataset of a job, sharded first if it is not yet."""
    out = dataset_folder(cfg, storage)
    if not (out / "dataset.json").is_file():
        write_dataset(cfg, out, progress)
    return load_manifest(out, check_hashes=True)


def write_dataset(cfg: Data, out: Path, progress: Progress | None = None) -> Manifest:
    """Shard a source: check every picture, split, write Parquet, describe it in `dataset.json`.

    Raises:
        DataError: nothing to read, too many bad pictures, or `out` exists already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: exists and is not empty; name a new folder or remove it")
    source = sources.SOURCES[cfg.source](cfg)
    if not source.rows:
        raise DataError(f"{cfg.source} {cfg.path or ''}: no pictures found")
    splits = _assign(source, cfg)
    aside = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(3)}.part")
    try:
        aside.mkdir(parents=True)
    except OSError as err:
        raise DataError(f"{out.parent}: can't be made: {err.strerror}; name another folder") from None
    quarantine = out.with_name(f"{out.name}.quarantine.jsonl")
    quarantine.unlink(missing_ok=True)
    try:
        writer = _Writer(aside, cfg, source, len(source.rows), progress)
        for split in sources.SPLITS:
            writer.write(split, [row for row in source.rows if splits[row.key] == split])
        bad, total = writer.bad, len(source.rows)
        if bad and len(bad) > cfg.max_bad_fraction * total:
            shutil.move(aside / "quarantine.jsonl", quarantine)
            examples = "; ".join(f"{origin}: {reason}" for origin, reason in bad[:3])
            raise DataError(
                f"{len(bad)} of {total} pictures can't be read ({len(bad) / total:.1%}, allowed "
                f"{cfg.max_bad_fraction:.1%}): {examples}. All are listed in {quarantine}; mend them or raise "
                f"data.max_bad_fraction"
            )
        for split, facts in writer.splits.items():
            if not facts["rows"]:
                raise DataError(f"the {split} split is empty: every picture of it is in quarantine")
        counts = writer.splits["train"]["class_counts"]
        if 0 in counts:
            name = source.classes[counts.index(0)]
            raise DataError(f"class {name!r} has no picture to train on; give some, or remove the class")
        write_json(aside / "dataset.json", writer.manifest())
        try:
            if out.exists():
                out.rmdir()
            os.rename(aside, out)
        except OSError:
            if not (out / "dataset.json").is_file():  # otherwise another run made the same dataset first
                raise
        return load_manifest(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _assign(source: sources.Source, cfg: Data) -> dict[Any, str]:
    """Key of each row → split: the source's own where it has them, else stratified by seed."""
    own = {row.split for row in source.rows}
    fractions = {}
    if "test" not in own:
        fractions["test"] = cfg.test_fraction
    if "val" not in own:
        fractions["val"] = cfg.val_fraction
    labels = np.array([row.label for row in source.rows])
    open_rows = np.array([row.split in (None, "train") for row in source.rows])
    names = np.array([row.split or "train" for row in source.rows])
    if fractions and open_rows.any():
        names[open_rows] = order.stratified_split(labels[open_rows], fractions, cfg.split_seed)
    for split in sources.SPLITS:
        if not (names == split).any():
            raise DataError(f"{cfg.source} {cfg.path or ''}: the {split} split would be empty; give more pictures")
    return {row.key: str(name) for row, name in zip(source.rows, names, strict=True)}


class _Writer:
    """Checks pictures and writes shards; gathers what the manifest says."""

    def __init__(self, folder: Path, cfg: Data, source: sources.Source, total: int, progress: Progress | None) -> None:
        self.folder, self.cfg, self.source, self.total = folder, cfg, source, total
        self.progress = progress or (lambda done, total: None)
        self.done = 0
        self.bad: list[tuple[str, str]] = []
        self.grey = True
        self.sizes: list[tuple[int, int]] = []
        self.sums = np.zeros((3, 3))  # count, sum, sum of squares, a channel
        self.splits: dict[str, dict[str, Any]] = {}
        (folder / "quarantine.jsonl").touch()

    def write(self, split: str, rows: list[sources.Row]) -> None:
        counts = [0] * len(self.source.classes)
        shards: list[dict[str, Any]] = []
        for table in self._tables(split, rows, counts):
            name = f"{split}-{len(shards):05d}.parquet"
            pq.write_table(
                table,
                self.folder / name,
                row_group_size=ROW_GROUP,
                compression={"label": "zstd", "origin": "zstd", "image": "none"},
            )
            file = self.folder / name
            shards.append({"name": name, "rows": len(table), "bytes": file.stat().st_size, "sha256": sha256_file(file)})
        self.splits[split] = {"rows": sum(s["rows"] for s in shards), "class_counts": counts, "shards": shards}

    def _tables(self, split: str, rows: list[sources.Row], counts: list[int]) -> Iterator[pa.Table]:
        images: list[bytes] = []
        labels: list[int] = []
        origins: list[str] = []
        held = 0
        for row, image in zip(rows, self.source.read(rows), strict=True):
            self.done += 1
            if self.done % 256 == 0 or self.done == self.total:
                self.progress(self.done, self.total)
            try:
                if isinstance(image, DataError):
                    raise image
                data = decode.encode_png(image) if isinstance(image, np.ndarray) else image
                self._see(decode.open_picture(data), split)
            except DataError as err:
                self.bad.append((row.origin, str(err)))
                append_line(self.folder / "quarantine.jsonl", {"origin": row.origin, "reason": str(err)})
                continue
            images.append(data)
            labels.append(row.label)
            origins.append(row.origin)
            counts[row.label] += 1
            held += len(data)
            if held >= self.cfg.shard_bytes:
                yield pa.table([images, labels, origins], schema=TABLE)
                images, labels, origins, held = [], [], [], 0
        if images:
            yield pa.table([images, labels, origins], schema=TABLE)

    def _see(self, picture: Any, split: str) -> None:
        self.grey &= picture.mode == "L"
        self.sizes.append((picture.height, picture.width))
        if split == "train":
            bands = [np.asarray(band, np.float64) / 255 for band in picture.split()]
            for channel in range(3):
                band = bands[channel % len(bands)]
                self.sums[channel] += band.size, band.sum(), np.square(band).sum()

    def manifest(self) -> dict[str, Any]:
        heights, widths = zip(*self.sizes, strict=True)
        channels = 1 if self.grey else 3
        count, total, squares = self.sums[:channels].T
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-6))
        digest = hashlib.sha256(json.dumps([self.source.classes, self.splits]).encode()).hexdigest()
        return {
            "schema": SCHEMA_VERSION,
            "classes": self.source.classes,
            "mode": "grey" if self.grey else "rgb",
            "size_range": [min(heights), min(widths), max(heights), max(widths)],
            "mean": [round(float(v), 6) for v in mean],
            "std": [round(float(v), 6) for v in std],
            "splits": self.splits,
            "quarantined": len(self.bad),
            "hash": digest,
        }

"""What a user who names only a folder means: which source reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from raydeep import own
from raydeep.data.files import open_files
from raydeep.data.sources import SUFFIXES
from raydeep.fields import TORCHVISION
from raydeep.sections import Data

TABLES = (".csv", ".tsv", ".jsonl")


def source_of(text: str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Keys of the data section for `raydeep shard TEXT`.

    Args:
        text: digits, synthetic, torchvision:NAME, package.module:factory, or a folder or its address.
        overrides: `data.source=…` among them is kept, nothing is guessed then.

    Raises:
        DataError: the folder is not there or can't be reached.
    """
    if text in ("digits", "synthetic") or text.startswith(TORCHVISION) or own.NAME.fullmatch(text):
        return {"source": text}
    if any(override.partition("=")[0].strip() == "data.source" for override in overrides):
        return {"source": "folder", "path": text}
    names = [entry.path for entry in open_files(Data(source="folder", path=text)).entries(deep=False)]
    kinds = {PurePosixPath(name).suffix.lower() for name in names}
    if kinds & set(TABLES) or (".parquet" in kinds and kinds & SUFFIXES):
        return {"source": "images", "path": text}
    if ".parquet" in kinds:
        return {"source": "parquet", "path": text}
    if ".tar" in kinds or ".gz" in kinds or ".tgz" in kinds:
        return {"source": "webdataset", "path": text}
    return {"source": "folder", "path": text}

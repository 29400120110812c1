"""Addresses of object stores (s3://, gs://) and connections to them, through pyarrow."""

from __future__ import annotations

import datetime
import functools
import os
import re
import secrets
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

from raydeep.errors import RaydeepError

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://(.*)", re.DOTALL)
SCHEMES = ("s3", "gs", "gcs")
OPTIONS = ("anonymous", "endpoint_override", "region", "scheme")
CONNECT_S, REQUEST_S, ATTEMPTS = 5.0, 60.0, 3  # a server that is not there is told soon
RETRY_S = 15.0  # of gs://
CHUNK = 8 * 2**20  # bytes that are asked for at once
S = 10**9  # nanoseconds
MARK = 271_828_182  # nanoseconds in the time of a file that is as an object: one written since has others


class Address(NamedTuple):
    """`scheme://bucket/key?options`, taken apart."""

    scheme: str
    options: str  # as they stand after the ?
    bucket: str
    key: str  # of an object or of a folder of them, without slashes at its ends; may be empty

    def __str__(self) -> str:
        key = f"/{urllib.parse.quote(self.key)}" if self.key else ""
        return f"{self.scheme}://{self.bucket}{key}{'?' if self.options else ''}{self.options}"


def is_address(text: str) -> bool:
    """Whether a text is an address and no path."""
    return SCHEME.match(text) is not None


def split(address: str, what: str) -> Address:
    """Take an address of an object store apart.

    Args:
        address: as a user gave it.
        what: the key of the job or the option that it stands in, for errors, which never repeat a secret.

    Raises:
        RaydeepError: it holds credentials, names no bucket, or has options that are not known.
    """
    url = urllib.parse.urlsplit(address)
    options = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    if "@" in url.netloc or ":" in url.netloc or set(options) - set(OPTIONS):  # a secret may itself have a / in it
        raise RaydeepError(
            f"{what}: {url.scheme}://…: expected scheme://BUCKET/FOLDER and no more than {', '.join(OPTIONS)} after "
            f"the ?; credentials belong into the environment, not into a job: set AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY and, for a server of your own, AWS_ENDPOINT_URL"
        )
    if not url.netloc:
        raise RaydeepError(f"{what}: {address}: names no bucket; expected {url.scheme}://BUCKET/FOLDER")
    return Address(url.scheme, url.query, url.netloc, urllib.parse.unquote(url.path).strip("/"))


def no_secret(address: str, what: str) -> None:
    """See that an address that is read from holds no credentials: a job is stored with its runs.

    Raises:
        RaydeepError: it does.
    """
    scheme = address.partition("://")[0].lower()
    if scheme in SCHEMES:
        split(address, what)
    elif "@" in urllib.parse.urlsplit(address).netloc:
        raise RaydeepError(
            f"{what}: {scheme}://…: expected an address without user and password, which belong into the environment "
            f"or the configuration of fsspec, not into a job"
        )


def check(address: str, what: str) -> Address:
    """Take an address apart that is to be written to; see `split`.

    Raises:
        RaydeepError: as `split`, or nothing can be stored there.
    """
    scheme, _, rest = address.partition("://")
    if scheme.lower() not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise RaydeepError(f"{what}: {scheme}://…: expected a folder, or an address that begins with {known}")
    found = split(f"{scheme.lower()}://{rest}", what)
    if found.key and {"", ".", ".."} & {*found.key.split("/")}:
        raise RaydeepError(f"{what}: {address}: has an empty part, . or .. in it; name the folder without")
    return found


@functools.lru_cache(16)
def connect(address: str, what: str, attempts: int = ATTEMPTS) -> tuple[Any, str]:
    """A file system of pyarrow, and the path in it that an address stands for.

    Args:
        address: s3://… or gs://….
        what: see `split`.
        attempts: at each request, with growing waits between.

    Raises:
        RaydeepError: as `split`.
    """
    from pyarrow import fs

    found = split(address, what)
    options = dict(urllib.parse.parse_qsl(found.options))
    base = f"{found.bucket}/{found.key}".rstrip("/")
    anonymous = options.get("anonymous", "") in ("true", "1")
    endpoint = options.get("endpoint_override", "")
    if found.scheme != "s3":
        limit = datetime.timedelta(seconds=RETRY_S)  # by default it tries for a quarter of an hour
        keys: dict[str, Any] = {"endpoint_override": endpoint} if endpoint else {}
        keys |= {"scheme": options["scheme"]} if "scheme" in options else {}
        return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=limit, **keys), base
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    match = SCHEME.match(endpoint)
    scheme = options.get("scheme") or (match[1] if match else "https")
    region = options.get("region") or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not endpoint:
        region = fs.resolve_s3_region(found.bucket)
    return fs.S3FileSystem(
        anonymous=anonymous,
        region=region or "us-east-1",
        scheme=scheme,
        endpoint_override=(match[2] if match else endpoint).rstrip("/") or None,
        connect_timeout=CONNECT_S,
        request_timeout=REQUEST_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
        allow_delayed_open=True,  # a small object is written by one request, not by three
    ), base


# objects and files


class Stamp(NamedTuple):
    """What tells one version of an object from another."""

    size: int
    time_ns: int  # of a file that is the object: the object's second, and MARK


def stamp(path: Path) -> Stamp | None:
    """That of a file; None: there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return Stamp(facts.st_size, facts.st_mtime_ns)


def stamp_of(info: Any) -> Stamp:
    """That of an object, from its FileInfo."""
    return Stamp(info.size, info.mtime_ns // S * S + MARK)  # listings of some servers tell more than the second


def listing(system: Any, key: str, deep: bool = True) -> dict[str, Stamp]:
    """Every object below a key, by its path there; not `deep`: those in no folder below it."""
    from pyarrow.fs import FileSelector

    found = system.get_file_info(FileSelector(key, recursive=deep, allow_not_found=True))
    return {info.path[len(key) + 1 :]: stamp_of(info) for info in found if info.is_file}


def folders(system: Any, key: str) -> list[str]:
    """Names of the folders directly below a key."""
    from pyarrow.fs import FileSelector, FileType

    found = system.get_file_info(FileSelector(key, recursive=False, allow_not_found=True))
    return [info.base_name for info in found if info.type == FileType.Directory]


def put(system: Any, key: str, what: Path | bytes) -> None:
    """Write an object from bytes or a file, which gets its stamp.

    In one go: what can't be read any more when the object is begun would leave a part of it, which counts as whole.
    """
    import pyarrow as pa

    data: Any = what
    if isinstance(what, Path):
        data = pa.memory_map(str(what)).read_buffer() if what.stat().st_size else b""
    with system.open_output_stream(key) as file:
        file.write(data)
    if isinstance(what, Path):
        found = stamp_of(system.get_file_info(key))
        os.utime(what, ns=(found.time_ns, found.time_ns))


def get(system: Any, key: str, path: Path, there: Stamp) -> None:
    """Make a file what an object is, unless its stamp says that it is."""
    if stamp(path) == there:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with system.open_input_file(key) as source, aside.open("wb") as out:
            while chunk := source.read(CHUNK):
                out.write(chunk)
        if aside.stat().st_size != there.size:
            raise OSError(f"{aside.stat().st_size:,} of {there.size:,} bytes came")
        if path.suffix == ".jsonl" and path.exists() and path.read_bytes().startswith(aside.read_bytes()):
            return  # a process of this node was killed between a line and its push: the line counts
        os.utime(aside, ns=(there.time_ns, there.time_ns))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

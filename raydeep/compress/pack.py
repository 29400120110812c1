"""The packed file, `model.rdz`: a whole model (spec and weights) in as few bytes as its statistics allow.

Layout: magic `RDZ2`; deflated JSON `[spec, [[name, dtype, shape, codec, bytes], ...]]`; the tensors' bytes in that
order; little-endian CRC-32 of all before it. Each tensor has the codec (codecs.py) that makes it shortest. Deflate
starts from a dictionary of words that headers have in common, and marks its own end.
"""

from __future__ import annotations

import functools
import json
import math
import struct
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from raydeep.compress import codecs
from raydeep.errors import ArtifactError, ModelError

MAGIC = b"RDZ2"
MAX_HEADER_BYTES = 16 * 2**20
MAX_ELEMENTS = 2**31  # of all tensors together
FREE_ELEMENTS = 2**24  # that any file may hold; beyond, its length has to warrant them:
ELEMENTS_PER_BYTE = 4096  # 200 times what a mask of 99.9 % zeros needs
TRIMMED_BYTES = 2**16  # beyond, two bytes are not worth the time
RAW = "raw"
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    )
}  # fmt: skip
BITS: dict[int, codecs.Bits] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
WORDS = (
    b'bool int16 int64 float64","codebook"raw"running_mean"running_var.weight","float32","sparse",'
    b'"classifier.features.layer1.0.conv1.bn1.shortcut.0fc1.stem.net.true,"args":{"width":},"classes":["cat","dog",'
    b'"airplane","0","1","2","3","4","5","6","7","8","9"],"mean":[0.485,0.456,0.406],"std":[0.229,0.224,0.225],'
    b'"folded":[["resnet18","cnn_small[{"version":1,"model":{"name":"lenet_300_100","args":{}},"classes":["0","1","2",'
    b'"3","4","5","6","7","8","9"],"input":[28,28,1],"mean":[0.130],"std":[0.308],"widths":{},"folded":[],"layers":{'
    b'"0":{"weight_bits":4,"activation":{"bits":8,"low":-128,"step":0.0}},"3":{"weight_bits":4,"activation":{"bits":8,'
    b'"low":0,"step":0.1}}}},[["0.weight.q","int8",[300,784],"sparse",1],["0.weight.scale","float32",[300],'
    b'"dense",1],["0.bias","float32",[300],"grid",3]]]'
)


class Entry(NamedTuple):
    """A line of the table: a tensor of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str
    bytes: int


def pack(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """Pack a frozen model; `unpack` gives back the same spec and the same tensors, bit for bit.

    Raises:
        ModelError: a tensor's type can't be packed, or there is more of nothing but zeros than `unpack` believes.
    """
    entries, blobs = [], []
    for name, tensor in tensors.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        if dtype not in DTYPES:
            raise ModelError(f"tensor {name} of type {dtype} can't be packed; convert it to one of {', '.join(DTYPES)}")
        codec, blob = _encode(tensor, _steps(spec, tensors, name))
        entries.append(Entry(name, dtype, tuple(tensor.shape), codec, len(blob)))
        blobs.append(blob)
    text = json.dumps([spec, entries], separators=(",", ":")).encode()
    if len(text) > MAX_HEADER_BYTES:
        raise ModelError(f"the model's spec and table take {len(text):,} bytes, at most {MAX_HEADER_BYTES:,} are read")
    deflate = zlib.compressobj(9, wbits=-15, zdict=WORDS)
    body = MAGIC + deflate.compress(text) + deflate.flush() + b"".join(blobs)
    if excess := _excess(entries, len(body) + 4):
        raise ModelError(f"the model has more zeros than the packed file may stand for: {excess}")
    return body + struct.pack("<I", zlib.crc32(body))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Spec and tensors of a packed file.

    Raises:
        ArtifactError: not a packed file, of another version, cut off or changed.
    """
    spec, entries, payload = _open(data)
    tensors: dict[str, torch.Tensor] = {}
    at = 0
    for entry in entries:
        try:
            tensors[entry.name] = _decode(entry, payload[at : at + entry.bytes], _steps(spec, tensors, entry.name))
        except ArtifactError as err:
            raise ArtifactError(
                f"the packed model's tensor {entry.name} ({entry.codec}) is broken: {err}; export it again"
            ) from None
        at += entry.bytes
    return spec, tensors


def table(data: bytes) -> list[dict[str, Any]]:
    """The tensors of a packed file, in its order: name, dtype, shape, codec, bytes.

    Raises:
        ArtifactError: not a packed file, of another version, cut off or changed.
    """
    return [{**entry._asdict(), "shape": list(entry.shape)} for entry in _open(data)[1]]


def overhead(data: bytes) -> int:
    """Bytes of a packed file that are no tensor's: spec, table, checksum.

    Raises:
        ArtifactError: not a packed file, of another version, cut off or changed.
    """
    return len(data) - len(_open(data)[2])


def _open(data: bytes) -> tuple[dict[str, Any], list[Entry], bytes]:
    """Spec, table and payload, checked against each other."""
    if data[:3] != MAGIC[:3] or len(data) < 8:
        raise ArtifactError("not a packed model (it does not start with RDZ2)")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ArtifactError("the packed model is torn or changed (its checksum does not fit); export it again")
    if data[:4] != MAGIC:
        found, expected = (chr(version[3]) for version in (data, MAGIC))
        raise ArtifactError(f"the packed model has version {found!r}, expected {expected!r}; export it again")
    try:
        inflate = zlib.decompressobj(wbits=-15, zdict=WORDS)
        text = inflate.decompress(data[4:-4], MAX_HEADER_BYTES)
        if not inflate.eof:
            raise ValueError(f"its header is cut off, or longer than {MAX_HEADER_BYTES:,} bytes")
        spec, rows = json.loads(text)
        entries = [_entry(row) for row in rows]
        if not isinstance(spec, dict):
            raise ValueError(f"its spec is no object but {str(spec)[:40]!r}")
    except (ValueError, TypeError, RecursionError, zlib.error) as err:
        raise ArtifactError(f"the packed model's header is broken: {err}; export it again") from None
    payload = inflate.unused_data
    if len({entry.name for entry in entries}) < len(entries):
        raise ArtifactError("the packed model is broken: two tensors have one name; export it again")
    total = sum(entry.bytes for entry in entries)
    if total != len(payload):
        raise ArtifactError(
            f"the packed model is broken: its tensors take {total:,} bytes, it has {len(payload):,}; export it again"
        )
    if excess := _excess(entries, len(data)):
        raise ArtifactError(f"the packed model is broken: it claims {excess}; export it again")
    return spec, entries, payload


def _entry(row: Any) -> Entry:
    name, dtype, shape, codec, size = row
    dims = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    if type(name) is not str or not dims or type(size) is not int or size < 0:
        raise ValueError(f"{str(row)[:80]} is no tensor")
    if dtype not in DTYPES or codec not in (RAW, *codecs.CODECS):
        raise ValueError(f"tensor {name} has type {str(dtype)[:20]!r} and codec {str(codec)[:20]!r}")
    return Entry(name, dtype, tuple(shape), codec, size)


def _excess(entries: list[Entry], size_bytes: int) -> str:
    """Says how many elements there are, if those are more than so many bytes can stand for; else ""."""
    count = sum(math.prod(max(1, n) for n in entry.shape) for entry in entries)
    most = min(MAX_ELEMENTS, FREE_ELEMENTS + ELEMENTS_PER_BYTE * size_bytes)
    return f"{count:,} weights in {size_bytes:,} bytes, at most {most:,} fit" if count > most else ""


def _steps(spec: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> np.ndarray | None:
    """The step of each value of `L.bias`, float32, if its layer is quantized: weight's step × activation's."""
    layer = name.removesuffix(".bias")
    scale = tensors.get(f"{layer}.weight.scale")
    try:
        step = spec["layers"][layer]["activation"]["step"]
    except (KeyError, TypeError):
        return None
    if layer == name or scale is None or scale.dtype != torch.float32 or type(step) is not float:
        return None
    with np.errstate(all="ignore"):
        return scale.detach().cpu().reshape(-1).numpy() * np.float32(step)


def _codecs(dtype: str, steps: np.ndarray | None, count: int) -> dict[str, Callable[..., np.ndarray]]:
    """The codecs that a tensor of `count` values may have."""
    found = {"dense": codecs.CODECS["dense"]}
    if dtype in ("int8", "float32"):
        found["sparse"] = codecs.CODECS["sparse"]
    if dtype == "float32":
        found["codebook"] = codecs.CODECS["codebook"]
        if steps is not None and len(steps) == count:
            found["grid"] = functools.partial(codecs.CODECS["grid"], steps=steps)
    return found


def _encode(tensor: torch.Tensor, steps: np.ndarray | None) -> tuple[str, bytes]:
    """The shortest codec of a tensor and its bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if not len(flat):
        return RAW, b""
    raw = flat.view(torch.uint8).numpy()
    best = (RAW, _swapped(raw, flat.element_size()).tobytes())
    bits = BITS[flat.element_size()]
    values = _zigzag(raw.view(np.int8)) if flat.dtype == torch.int8 else raw.view(bits)
    dtype = str(flat.dtype).removeprefix("torch.")
    for name, code in _codecs(dtype, steps, len(values)).items():
        if (
            (name == "sparse" and not 0 < np.count_nonzero(values) <= 0.8 * len(values))
            or (name == "codebook" and not codecs.has_codebook(values))
            or (name == "grid" and steps is not None and codecs.grid_integers(values, steps) is None)
        ):
            continue
        stream = codecs.Stream()
        code(stream, tuple(tensor.shape), bits, values)
        blob = stream.close()
        if len(blob) < TRIMMED_BYTES:
            blob = _trim(blob, functools.partial(code, shape=tuple(tensor.shape), bits=bits, values=None), values)
        best = min(best, (name, blob), key=lambda found: len(found[1]))
    return best


def _trim(blob: bytes, code: Callable[..., np.ndarray], values: np.ndarray) -> bytes:
    """The coder ends on a word of 4 bytes, some two more than it takes: the fewest that still read as `values`."""
    last = int.from_bytes(blob[-4:].ljust(4, b"\0"))
    for keep in range(4):
        for tail in (last >> (32 - 8 * keep), (last >> (32 - 8 * keep)) + 1):
            if tail < 1 << 8 * keep:
                shorter = (blob[:-4] + tail.to_bytes(keep)).rstrip(b"\0")
                try:
                    found = code(codecs.Stream(shorter))
                except ArtifactError:
                    continue
                if np.array_equal(found, values):
                    return shorter
    return blob


def _decode(entry: Entry, blob: bytes, steps: np.ndarray | None) -> torch.Tensor:
    dtype, count = DTYPES[entry.dtype], math.prod(entry.shape)
    if entry.codec == RAW:
        if len(blob) != count * dtype.itemsize:
            raise ArtifactError(f"it has {len(blob):,} bytes, expected {count * dtype.itemsize:,}")
        raw = _swapped(np.frombuffer(blob, np.uint8), dtype.itemsize)
    else:
        code = _codecs(entry.dtype, steps, count).get(entry.codec)
        if code is None or not count:
            raise ArtifactError(f"no {entry.dtype} tensor of shape {list(entry.shape)} here has this codec")
        values = code(codecs.Stream(blob), entry.shape, BITS[dtype.itemsize], None)
        raw = (_unzigzag(values) if dtype == torch.int8 else values).view(np.uint8)
    if dtype == torch.bool and raw.max(initial=0) > 1:
        raise ArtifactError(f"it holds {raw.max()} where true and false are expected")
    if not count:
        return torch.empty(entry.shape, dtype=dtype)
    return torch.from_numpy(raw).view(dtype).reshape(entry.shape)


def _swapped(raw: np.ndarray, width: int) -> np.ndarray:
    """Bytes of values, this machine's order to little-endian or back."""
    return raw.view(BITS[width]).astype(np.dtype(BITS[width]).newbyteorder("<")).view(np.uint8)


def _zigzag(values: np.ndarray) -> np.ndarray:
    """Int8 0, -1, 1, -2, ... to uint8 0, 1, 2, 3, ...: a range around zero becomes one from zero."""
    return (values << np.int8(1) ^ values >> np.int8(7)).view(np.uint8)


def _unzigzag(values: np.ndarray) -> np.ndarray:
    return (values >> np.uint8(1) ^ np.negative(values & np.uint8(1))).view(np.int8)

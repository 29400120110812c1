"""The packed file, `model.rdz`: a whole model (spec and weights) in as few bytes as order-0 coding allows.

Layout: magic `RDZ1`, uint32 length of the header, zlib-compressed JSON header, payload, uint32 CRC-32 of all
before it; integers little-endian. The header holds the spec and, a tensor, name, shape, codec, length and the
codec's parameters. Codecs: `raw` (float32 bytes), `sparse` (entropy-coded bitmask, then the float32 non-zeros),
`range` (integers through a range coder with their own histogram; constriction, Bamler 2022, arXiv 2201.01741).
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import constriction
import numpy as np
import torch

from raydeep.errors import ModelError

MAGIC = b"RDZ1"
VERSION = 1
MAX_HEADER_BYTES = 64 * 2**20
MAX_ELEMENTS = 2**31  # of all tensors together


def pack(spec: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
    """Pack a frozen model; `unpack` gives back the same spec and the same tensors, bit for bit."""
    table, blobs = [], []
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous().numpy()
        codec, blob, params = _encode(name, values)
        table.append([name, list(values.shape), codec, len(blob), params])
        blobs.append(blob)
    text = json.dumps({"v": VERSION, "spec": spec, "tensors": table}, separators=(",", ":"))
    header = zlib.compress(text.encode(), 9)
    body = MAGIC + struct.pack("<I", len(header)) + header + b"".join(blobs)
    return body + struct.pack("<I", zlib.crc32(body))


def unpack(data: bytes) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Spec and tensors of a packed file.

    Raises:
        ModelError: not a packed file, of another version, torn or changed.
    """
    if data[:4] != MAGIC or len(data) < 12:
        raise ModelError("not a packed model (it does not start with RDZ1)")
    if zlib.crc32(data[:-4]) != struct.unpack("<I", data[-4:])[0]:
        raise ModelError("the packed model is torn or changed (its checksum does not fit); export it again")
    try:
        (length,) = struct.unpack("<I", data[4:8])
        inflate = zlib.decompressobj()
        text = inflate.decompress(data[8 : 8 + length], MAX_HEADER_BYTES)
        header = json.loads(text)
        if header["v"] != VERSION:
            raise ModelError(f"the packed model has version {header['v']}, expected {VERSION}; export it again")
        tensors, at = {}, 8 + length
        if sum(math.prod(shape) for _, shape, *_ in header["tensors"]) > MAX_ELEMENTS:
            raise ModelError(
                f"the packed model is broken: it claims more than {MAX_ELEMENTS:,} weights; export it again"
            )
        for name, shape, codec, size, params in header["tensors"]:
            blob = data[at : at + size]
            whole = all(isinstance(n, int) and n >= 0 for n in (size, *shape))
            if not whole or len(blob) != size or codec not in DECODE:
                raise ModelError(f"the packed model's tensor {name} is broken; export it again")
            tensors[name] = torch.from_numpy(DECODE[codec](blob, math.prod(shape), params).reshape(shape))
            at += size
        return header["spec"], tensors
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError, zlib.error, struct.error) as err:
        raise ModelError(f"the packed model is broken: {err}; export it again") from None


def _encode(name: str, values: np.ndarray) -> tuple[str, bytes, Any]:
    flat = values.reshape(-1)
    if values.dtype == np.int8:
        return _range_encode(flat)
    if values.dtype != np.float32:
        if not np.array_equal(flat.astype(np.float32).astype(values.dtype), flat):
            raise ModelError(f"tensor {name} of type {values.dtype} does not fit float32; convert it first")
        return ("raw", flat.astype("<f4").tobytes(), {"dtype": str(values.dtype)})
    raw = flat.astype("<f4").tobytes()
    present = flat != 0
    if flat.size and not np.signbit(flat[~present]).any():  # -0.0 must come back as it was
        _, mask, params = _range_encode(present.astype(np.int8))
        sparse = mask + raw_values(flat[present])
        if len(sparse) + 40 < len(raw):
            return "sparse", sparse, {**params, "mask": len(mask)}
    return "raw", raw, {}


def raw_values(values: np.ndarray) -> bytes:
    """Float32 little-endian bytes."""
    return values.astype("<f4").tobytes()


def _range_encode(flat: np.ndarray) -> tuple[str, bytes, Any]:
    symbols, counts = np.unique(flat, return_counts=True)
    params = {"s": symbols.tolist(), "c": counts.tolist()}
    if len(symbols) < 2:
        return "range", b"", params
    index = np.searchsorted(symbols, flat).astype(np.int32)
    encoder = constriction.stream.queue.RangeEncoder()
    encoder.encode(index, _model(counts))
    return "range", encoder.get_compressed().astype("<u4").tobytes(), params


def _model(counts: Any) -> Any:
    weights = np.asarray(counts, np.float64)
    return constriction.stream.model.Categorical((weights / weights.sum()).astype(np.float32), perfect=False)


def _range_decode(blob: bytes, size: int, params: Any) -> np.ndarray:
    symbols = np.asarray(params["s"], np.int8)
    if sum(params["c"]) != size:
        raise ModelError("the packed model's histogram does not fit its tensor; export it again")
    if len(symbols) < 2:
        return np.full(size, symbols[0] if len(symbols) else 0, np.int8)
    decoder = constriction.stream.queue.RangeDecoder(np.frombuffer(blob, "<u4").astype(np.uint32))
    return symbols[decoder.decode(_model(params["c"]), size)]


def _sparse_decode(blob: bytes, size: int, params: Any) -> np.ndarray:
    present = _range_decode(blob[: params["mask"]], size, params).astype(bool)
    out = np.zeros(size, np.float32)
    out[present] = np.frombuffer(blob[params["mask"] :], "<f4")
    return out


def _raw_decode(blob: bytes, size: int, params: Any) -> np.ndarray:
    return np.frombuffer(blob, "<f4").astype(params.get("dtype", "float32"))


DECODE = {"raw": _raw_decode, "sparse": _sparse_decode, "range": _range_decode}

"""Mutated packed files: each is refused with an ArtifactError, or is a whole model, whatever was changed."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from raydeep.compress import codecs, pack
from raydeep.errors import ArtifactError

PEAK_BYTES = 24 * pack.FREE_ELEMENTS  # a small file may make `unpack` hold so much, and no more
NASTY: list[Any] = [
    -1, 0, 1, 2, 3, 5, 7, 8, 16, 127, 300, 2**20, 2**24, 2**31, 2**63, 2**64, 1e308, 0.5, float("nan"), True, None, "",
    "raw", "dense", "sparse", "codebook", "grid", "int8", "float32", "int64", "bool", "1.bias", "w", [], [0], [4, 4],
]  # fmt: skip


def models() -> list[bytes]:
    """Small files that between them have every codec, several types, empty tensors and those without dimensions."""
    rng = np.random.default_rng(0)
    q = np.where(rng.random((30, 40)) < 0.1, rng.integers(-7, 8, (30, 40)), 0).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, 30).astype(np.float32)
    layer = {
        "1.weight.q": q, "1.weight.scale": scale,
        "1.bias": rng.integers(-500, 500, 30).astype(np.float32) * (scale * np.float32(0.25)),
    }  # fmt: skip
    floats = {
        "sparse": np.where(rng.random((20, 30)) < 0.1, rng.normal(size=(20, 30)), 0).astype(np.float32),
        "codebook": rng.choice([-1, 0.5, 2], 200).astype(np.float32),
        "clustered": np.where(rng.random(300) < 0.2, rng.choice([-1.1, 0.3, 2.7], 300), 0).astype(np.float32),
        "w": rng.normal(size=(2, 3)).astype(np.float32),
    }
    others = {
        "n": np.int64(12345), "none": np.zeros((0, 3), np.float32), "bool": rng.random(50) < 0.5,
        "half": rng.normal(size=20).astype(np.float16), "dense": rng.integers(-7, 8, (12, 3, 2)).astype(np.int8),
    }  # fmt: skip
    spec = {
        "version": 1, "classes": ["a", "b"], "mean": [0.13],
        "layers": {"1": {"weight_bits": 4, "activation": {"bits": 8, "signed": False, "step": 0.25}}},
    }  # fmt: skip
    tables: list[dict[str, Any]] = [layer, floats, others, {**layer, **floats, **others}, {}]
    return [
        pack.pack(spec, {name: torch.from_numpy(np.array(array)) for name, array in table.items()}) for table in tables
    ]


def parts(data: bytes) -> tuple[bytes, bytes]:
    """Inflated header and payload."""
    inflate = zlib.decompressobj(wbits=-15, zdict=pack.WORDS)
    return inflate.decompress(data[4:-4]), inflate.unused_data


def joined(text: bytes, payload: bytes) -> bytes:
    deflate = zlib.compressobj(6, wbits=-15, zdict=pack.WORDS)
    return pack.MAGIC + deflate.compress(text) + deflate.flush() + payload


def flip(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    out = bytearray(data)
    for at in rng.integers(0, max(1, len(out)), rng.integers(1, 5)) if out else ():
        out[at] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwrite(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at, n = int(rng.integers(0, len(data) + 1)), int(rng.integers(1, 20))
    return data[:at] + rng.bytes(n) + data[at + n :]


def insert(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    at = int(rng.integers(0, len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 20))) + data[at:]


def cut(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data) + 1))]


def drop(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    a, b = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return data[:a] + data[b:]


def splice(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: int(rng.integers(0, len(data) + 1))] + other[int(rng.integers(0, len(other) + 1)) :]


def swap(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    a, b, c = sorted(rng.integers(0, len(data) + 1, 3).tolist())
    return data[:a] + data[b:c] + data[a:b] + data[c:]


BYTES: list[Callable[[np.random.Generator, bytes, bytes], bytes]] = [flip, overwrite, insert, cut, drop, splice, swap]


def change(rng: np.random.Generator, tree: Any) -> Any:
    """JSON with a leaf, a branch or an order of it changed."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.1:
        return NASTY[rng.integers(len(NASTY))]
    if isinstance(tree, dict):
        key = list(tree)[rng.integers(len(tree))]
        return {**tree, key: change(rng, tree[key])}
    tree = list(tree)
    at, to = rng.integers(len(tree), size=2)
    kind = rng.random()
    if kind < 0.15:
        tree[at], tree[to] = tree[to], tree[at]
    elif kind < 0.2:
        del tree[at]
    elif kind < 0.25:
        tree.insert(to, tree[at])
    elif type(tree[at]) is int and kind < 0.6:
        tree[at] += int(rng.integers(-2, 3))
    else:
        tree[at] = change(rng, tree[at])
    return tree


def mutant(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """A file with something changed: its bytes, its header's text, a field of the header or its payload.

    In nine of ten the checksum fits again, so that what lies behind it is reached.
    """
    data, other = (files[i] for i in rng.integers(len(files), size=2))
    layer = rng.random()
    mutate = BYTES[rng.integers(len(BYTES))]
    if layer < 0.2:
        body = mutate(rng, data[:-4], other[:-4])
    elif layer < 0.35:
        text, payload = parts(data)
        body = joined(mutate(rng, text, parts(other)[0]), payload)
    elif layer < 0.65:
        text, payload = parts(data)
        body = joined(json.dumps(change(rng, json.loads(text))).encode(), payload)
    else:
        text, payload = parts(data)
        changed = mutate(rng, payload, parts(other)[1])
        body = joined(text, (changed + bytes(len(payload)))[: len(payload)])
    return body + (struct.pack("<I", zlib.crc32(body)) if rng.random() < 0.9 else data[-4:])


def bits(tensors: dict[str, torch.Tensor]) -> list[Any]:
    return [
        (name, t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
        for name, t in tensors.items()
    ]


def outcome(data: bytes, thorough: bool) -> str:
    """What became of a file: the error's kind, or "loaded".

    A file that loads is a whole model: its spec an object, its tensors those of its table in name, type and shape,
    its bytes all accounted for; and packing it again gives a file of the same content (checked if `thorough`).
    Everything but an ArtifactError gets through and fails the test.
    """
    try:
        spec, tensors = pack.unpack(data)
    except ArtifactError as err:
        message = str(err)
        return "stream" if ") is broken: " in message else "table" if "is broken" in message else "checksum"
    assert type(spec) is dict
    rows = pack.table(data)
    assert [(row["name"], row["dtype"], row["shape"]) for row in rows] == [
        (name, str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()
    ]
    assert sum(row["bytes"] for row in rows) + pack.overhead(data) == len(data)
    if thorough and sum(t.numel() for t in tensors.values()) < 10_000:
        again_spec, again = pack.unpack(pack.pack(spec, tensors))
        assert json.dumps(again_spec) == json.dumps(spec)
        assert bits(again) == bits(tensors)
    return "loaded"


def run(count: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    files = models()
    found: Counter[str] = Counter()
    for i in range(count):
        data = mutant(rng, files)
        try:
            found[outcome(data, thorough=i % 10 == 0)] += 1
        except BaseException as err:
            pytest.fail(f"mutant {i} of seed {seed}: {type(err).__name__}: {err}; file {data.hex()}")
    return found


def test_mutated_files_are_refused_or_whole_models():
    found = run(3_000, seed=0)
    assert min(found[kind] for kind in ("checksum", "table", "stream", "loaded")) > 100, found


HEADS = {"dense": [0, 1, 1], "sparse": [6, 128], "codebook": [1, *[5] * 8, 0, 1, 1]}  # what leads on to all values


@pytest.mark.parametrize("shape", [[2**24], [2**12, 2**12], [2, 2**23]], ids=str)
@pytest.mark.parametrize(
    ("dtype", "codec"),
    [
        ("int8", "dense"),
        ("float32", "dense"),
        ("int64", "dense"),
        ("int8", "sparse"),
        ("float32", "sparse"),
        ("float32", "codebook"),
    ],
)
@pytest.mark.parametrize("rest", [b"", np.random.default_rng(0).bytes(1000)], ids=["empty", "random"])
def test_the_most_that_a_small_file_may_claim_takes_bounded_memory(dtype, codec, shape, rest):
    stream = codecs.Stream()
    for value in [*HEADS[codec], *rest]:
        stream.byte(value)
    payload = stream.close()
    body = joined(json.dumps([{}, [["w", dtype, shape, codec, len(payload)]]]).encode(), payload)
    tracemalloc.start()
    try:
        outcome(body + struct.pack("<I", zlib.crc32(body)), thorough=False)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < PEAK_BYTES


@pytest.mark.slow
def test_a_hundred_thousand_mutated_files():
    started = time.monotonic()
    found = run(100_000, seed=1)
    print(f"\n{dict(found)} in {time.monotonic() - started:.0f} s")
    assert sum(found.values()) == 100_000

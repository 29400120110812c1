"""The packed file: bit-equal round trips, damage that is noticed, its size."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raydeep.compress import pack
from raydeep.errors import ModelError

ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)

floats = hnp.arrays(np.float32, SHAPES, elements=st.one_of(st.sampled_from(ODD), st.floats(width=32)))
ones_to_twos = st.floats(1, 2, width=32)
mostly_zero = hnp.arrays(np.float32, st.integers(0, 400), elements=ones_to_twos, fill=st.just(0.0))
int8s = hnp.arrays(np.int8, SHAPES)
int64s = hnp.arrays(np.int64, SHAPES, elements=st.integers(-(2**24), 2**24))
halves = hnp.arrays(np.float16, SHAPES, elements=st.floats(width=16, allow_nan=False))
tables = st.dictionaries(
    st.text(min_size=1, max_size=8), st.one_of(floats, mostly_zero, int8s, int64s, halves), max_size=4
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
specs = st.dictionaries(st.text(max_size=8), values, max_size=4)


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def crafted(header: Any, payload: bytes = b"") -> bytes:
    """A packed file with a fitting checksum, whatever is in it."""
    text = zlib.compress(header if isinstance(header, bytes) else json.dumps(header).encode(), 9)
    body = pack.MAGIC + struct.pack("<I", len(text)) + text + payload
    return body + struct.pack("<I", zlib.crc32(body))


@pytest.fixture(scope="module")
def packed() -> bytes:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random(200) < 0.9, 0, rng.normal(size=200)).astype(np.float32)
    return pack.pack(
        {"classes": ["a", "b"]},
        {
            "q": tensor(rng.integers(-3, 4, (4, 8), np.int8)),
            "sparse": tensor(sparse),
            "raw": tensor(rng.normal(size=6).astype(np.float32)),
        },
    )


@given(specs, tables)
@example({}, {})
@example({}, {"one": np.float32(-0.0), "empty": np.zeros((3, 0), np.float32), "0": np.zeros(99, np.float32)})
@example({}, {"a negative zero": np.array([-0.0, *[0.0] * 99], np.float32)})
@example({}, {"scalar": np.int8(-128), "empty": np.zeros((0, 2), np.int8), "5": np.full(7, 5, np.int8)})
@example({"mean": [0.1]}, {"scalar": np.int64(3)})
@example({}, {"a": np.array([np.nan, 0, 0, -0.0], np.float32), "b": np.arange(-128, 128).astype(np.int8)})
def test_unpacking_gives_back_spec_and_tensors_bit_for_bit(spec, arrays):
    tensors = {name: tensor(array) for name, array in arrays.items()}
    found_spec, found = pack.unpack(pack.pack(spec, tensors))
    assert found_spec == spec
    assert list(found) == list(tensors)
    for name, expected in tensors.items():
        assert same_bits(found[name], expected), name


def test_packing_the_same_model_gives_the_same_bytes(packed):
    assert pack.pack(*pack.unpack(packed)) == packed


@pytest.mark.parametrize("array", [np.array([2**24 + 1]), np.array([0.1])], ids=["int64", "float64"])
def test_values_that_float32_would_change_are_refused(array):
    with pytest.raises(ModelError, match=f"tensor count of type {array.dtype} does not fit float32"):
        pack.pack({}, {"count": tensor(array)})


def test_a_flipped_bit_is_noticed_wherever_it_is(packed):
    for at in range(len(packed)):
        torn = bytearray(packed)
        torn[at] ^= 1 << at % 8
        with pytest.raises(ModelError):
            pack.unpack(bytes(torn))


def test_a_file_cut_off_is_noticed_wherever_it_ends(packed):
    for length in range(len(packed)):
        with pytest.raises(ModelError):
            pack.unpack(packed[:length])


def test_bytes_behind_the_end_are_noticed(packed):
    with pytest.raises(ModelError, match="torn or changed"):
        pack.unpack(packed + b"\0")


@pytest.mark.parametrize("data", [b"", b"RDZ1", b"PK\x03\x04" + b"\0" * 40])
def test_other_files_are_not_packed_models(data):
    with pytest.raises(ModelError, match="not a packed model"):
        pack.unpack(data)


def test_another_version_is_refused_by_number():
    with pytest.raises(ModelError, match=r"has version 2, expected 1; export it again"):
        pack.unpack(crafted({"v": 2, "spec": {}, "tensors": []}))


def one(*entry: Any) -> dict[str, Any]:
    """A header with one tensor: shape, codec, length, parameters."""
    return {"v": 1, "spec": {}, "tensors": [["w", *entry]]}


BROKEN = {
    "no header": b"",
    "no JSON": b"{",
    "a list": [],
    "no tensors": {"v": 1, "spec": {}},
    "nested too deep": b"[" * 200_000,
    "unknown codec": one([1], "pickle", 0, {}),
    "longer than the file": one([99], "raw", 396, {}),
    "another shape": one([3], "raw", 8, {}),
    "unknown dtype": one([2], "raw", 8, {"dtype": "x"}),
    "another histogram": one([9], "range", 8, {"s": [0, 1], "c": [2, 2]}),
    "no histogram": one([4], "range", 8, {}),
    "symbols beyond int8": one([4], "range", 8, {"s": [0, 300], "c": [2, 2]}),
    "symbols without counts": one([4], "range", 8, {"s": [0, 1], "c": [4]}),
    "too large for any memory": one([2**60], "range", 0, {"s": [0], "c": [2**60]}),
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_with_a_fitting_checksum_is_a_model_error(header):
    with pytest.raises(ModelError, match=r"broken|does not fit"):
        pack.unpack(crafted(header, b"\0" * 8))


def test_a_header_that_inflates_beyond_the_limit_is_not_inflated_whole(monkeypatch):
    bomb = crafted(b" " * 50_000_000)
    monkeypatch.setattr(pack, "MAX_HEADER_BYTES", 10_000)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="broken"):
            pack.unpack(bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def entropy_bytes(flat: np.ndarray) -> float:
    counts = np.unique(flat, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


@pytest.mark.parametrize("bits", [2, 4])
def test_sparse_integers_cost_little_more_than_their_entropy(bits):
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    flat = np.where(rng.random(100_000) < 0.95, 0, rng.integers(-top, top + 1, 100_000)).astype(np.int8)
    size = len(pack.pack({}, {"w": tensor(flat)})) - len(pack.pack({}, {}))
    assert size <= 1.02 * entropy_bytes(flat) + 64


def test_sparse_floats_cost_their_values_and_little_more_than_the_entropy_of_the_mask():
    rng = np.random.default_rng(0)
    present = rng.random(50_000) < 0.05
    flat = np.where(present, rng.normal(size=50_000), 0).astype(np.float32)
    size = len(pack.pack({}, {"w": tensor(flat)})) - len(pack.pack({}, {}))
    assert size <= 4 * present.sum() + 1.02 * entropy_bytes(present) + 64

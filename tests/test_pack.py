"""The packed file: bit-equal round trips, the codec of each kind of tensor, its size, damage that is noticed."""

from __future__ import annotations

import json
import struct
import tracemalloc
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from raydeep.compress import codecs, pack
from raydeep.errors import ArtifactError, ModelError

ODD = [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3.4e38]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)

floats = hnp.arrays(np.float32, SHAPES, elements=st.one_of(st.sampled_from(ODD), st.floats(width=32)))
patterns = hnp.arrays(np.uint32, SHAPES).map(lambda bits: bits.view(np.float32))  # NaNs of any payload among them
ones_to_twos = st.floats(1, 2, width=32)
mostly_zero = hnp.arrays(np.float32, st.integers(0, 400), elements=ones_to_twos, fill=st.just(0.0))
mostly_zero_int8s = hnp.arrays(
    np.int8, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.integers(-128, 127), fill=st.just(0)
)
few_values = hnp.arrays(np.float32, st.integers(0, 400), elements=st.sampled_from([0.0, 0.1, -0.1, 3.0]))
others = st.sampled_from([np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float64, np.bool_]).flatmap(
    lambda dtype: hnp.arrays(dtype, SHAPES)
)
arrays_of_any_kind = st.one_of(floats, patterns, mostly_zero, mostly_zero_int8s, few_values, others)
tables = st.dictionaries(st.text(min_size=1, max_size=8), arrays_of_any_kind, max_size=4)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
specs = st.dictionaries(st.text(max_size=8), values, max_size=4)


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


def as_bytes(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and as_bytes(a) == as_bytes(b)


def deflated(header: Any) -> bytes:
    deflate = zlib.compressobj(9, wbits=-15, zdict=pack.WORDS)
    return deflate.compress(header if isinstance(header, bytes) else json.dumps(header).encode()) + deflate.flush()


def sealed(body: bytes) -> bytes:
    return body + struct.pack("<I", zlib.crc32(body))


def crafted(header: Any, payload: bytes = b"") -> bytes:
    """A packed file with a fitting checksum, whatever is in it."""
    return sealed(pack.MAGIC + deflated(header) + payload)


def pruned(rng: np.random.Generator, rows: int, columns: int, sparsity: float, bits: int) -> torch.Tensor:
    """Integers as magnitude pruning leaves them: heavy-tailed, some inputs and outputs denser, some of them dead."""
    gain = np.exp(rng.normal(size=columns)) * (rng.random(columns) < 0.8)
    weight = rng.laplace(size=(rows, columns)) * gain * np.exp(0.4 * rng.normal(size=(rows, 1)))
    weight[np.abs(weight) <= np.quantile(np.abs(weight), sparsity)] = 0
    top = 2 ** (bits - 1) - 1
    scale = np.abs(weight).max(1, keepdims=True) + 1e-9
    return tensor(np.round(weight / scale * top).astype(np.int8))


def quantized() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A layer as `artifact.freeze` leaves it: its bias on the grid of weight's step times activation's."""
    rng = np.random.default_rng(0)
    scale = tensor(rng.uniform(0.01, 0.02, 40).astype(np.float32))
    bias = tensor(rng.integers(-3000, 3000, 40).astype(np.float32)) * (scale * 0.07)
    spec = {"layers": {"1": {"weight_bits": 4, "activation": {"bits": 8, "signed": False, "step": 0.07}}}}
    return spec, {"1.weight.q": pruned(rng, 40, 60, 0.9, 4), "1.weight.scale": scale, "1.bias": bias}


@pytest.fixture(scope="module")
def packed() -> bytes:
    rng = np.random.default_rng(0)
    spec, tensors = quantized()
    sparse = np.where(rng.random(200) < 0.9, 0, rng.normal(size=200)).astype(np.float32)
    tensors |= {
        "dense": tensor(rng.integers(-3, 4, (4, 8), np.int8)),
        "sparse": tensor(sparse),
        "codebook": tensor(rng.choice([-0.5, 0.25, 0.5], 300).astype(np.float32)),
        "raw": tensor(rng.normal(size=6).astype(np.float32)),
    }
    return pack.pack({"classes": ["a", "b"], **spec}, tensors)


@given(specs, tables)
@example({}, {})
@example({}, {"one": np.float32(-0.0), "empty": np.zeros((3, 0), np.float32), "0": np.zeros(99, np.float32)})
@example({}, {"a negative zero": np.array([-0.0, *[0.0] * 99], np.float32)})
@example({}, {"scalar": np.int8(-128), "empty": np.zeros((0, 2), np.int8), "5": np.full(7, 5, np.int8)})
@example({"mean": [0.1]}, {"scalar": np.int64(3), "true": np.bool_(True), "large": np.array([2**62, -1])})
@example({}, {"a": np.array([np.nan, 0, 0, -0.0], np.float32), "b": np.arange(-128, 128).astype(np.int8)})
@example({}, {"257 values": np.arange(257, dtype=np.float32).repeat(9), "256": np.arange(256.0).repeat(9)})
def test_unpacking_gives_back_spec_and_tensors_bit_for_bit(spec, arrays):
    tensors = {name: tensor(array) for name, array in arrays.items()}
    data = pack.pack(spec, tensors)
    found_spec, found = pack.unpack(data)
    assert found_spec == spec
    assert list(found) == list(tensors)
    for name, expected in tensors.items():
        assert same_bits(found[name], expected), name
    rows = pack.table(data)
    assert [(row["name"], row["shape"]) for row in rows] == [(n, list(t.shape)) for n, t in tensors.items()]
    assert sum(row["bytes"] for row in rows) + pack.overhead(data) == len(data)


def test_bfloat16_and_views_come_back_bit_for_bit():
    half = torch.randn(5, 7).bfloat16().t()
    _, found = pack.unpack(pack.pack({}, {"half": half}))
    assert same_bits(found["half"], half)


def test_a_type_that_numbers_are_not_made_of_is_refused():
    with pytest.raises(ModelError, match=r"tensor z of type complex64 can't be packed; convert it to one of bool, "):
        pack.pack({}, {"z": torch.zeros(2, dtype=torch.complex64)})


def test_packing_the_same_model_gives_the_same_bytes(packed):
    assert pack.pack(*pack.unpack(packed)) == packed


def test_the_bytes_of_tensors_are_the_same_on_every_machine():
    """Other bytes are another format: then MAGIC has to change with them."""
    n = np.arange(4000)
    mixed = n * 2_654_435_761 % 2**32 >> 16
    q = np.where(mixed % 11 < n % 80 // 20, mixed // 11 % 15 - 7, 0).astype(np.int8).reshape(50, 80)
    scale = (64 + np.arange(50, dtype=np.float32)) / 4096
    tensors = {
        "1.weight.q": q, "1.weight.scale": scale, "1.bias": (mixed[:50] - 32_768).astype(np.float32) * (scale / 8),
        "sparse": np.where(q == 0, 0, mixed.reshape(q.shape) / 64 + 1).astype(np.float32),
        "codebook": (mixed % 5 / 4 + 1).astype(np.float32), "dense": (mixed % 7).astype(np.int8),
        "raw": np.array([77], np.int8),
    }  # fmt: skip
    spec = {"layers": {"1": {"activation": {"step": 0.125}}}}
    data = pack.pack(spec, {name: tensor(array) for name, array in tensors.items()})
    rows = pack.table(data)
    assert [row["codec"] for row in rows] == ["sparse", "dense", "grid", "sparse", "codebook", "dense", "raw"]
    assert zlib.crc32(data[pack.overhead(data) - 4 : -4]) == 1_352_768_198


def test_each_kind_of_tensor_has_the_codec_that_suits_it(packed):
    codec = {row["name"]: row["codec"] for row in pack.table(packed)}
    assert codec == {
        "1.weight.q": "sparse", "1.weight.scale": "dense", "1.bias": "grid",
        "dense": "dense", "sparse": "sparse", "codebook": "codebook", "raw": "raw",
    }  # fmt: skip
    assert set(codec.values()) == {"raw", *codecs.CODECS}


def test_a_bias_off_its_grid_is_packed_bit_for_bit_too():
    spec, tensors = quantized()
    tensors["1.bias"][3] += 1e-7
    data = pack.pack(spec, tensors)
    assert pack.table(data)[2]["codec"] == "dense"
    assert same_bits(pack.unpack(data)[1]["1.bias"], tensors["1.bias"])


@pytest.mark.parametrize(
    "integers", [[0, -0.0, 1, -1, 255, 256, -65_537, 2**31 - 128, -(2**31), 2**24 + 2], [2**32 - 256] * 10]
)
def test_biases_of_up_to_32_bits_are_on_the_grid(integers):
    steps = np.linspace(1e-9, 2, 10, dtype=np.float32)
    bits = (np.array(integers, np.float32) * steps).view(np.uint32)
    stream = codecs.Stream()
    codecs.code_grid(stream, (10,), np.uint32, bits, steps)
    np.testing.assert_array_equal(codecs.code_grid(codecs.Stream(stream.close()), (10,), np.uint32, None, steps), bits)


def test_a_flipped_bit_is_noticed_wherever_it_is(packed):
    for at in range(len(packed)):
        torn = bytearray(packed)
        torn[at] ^= 1 << at % 8
        with pytest.raises(ArtifactError):
            pack.unpack(bytes(torn))


def test_a_file_cut_off_is_noticed_wherever_it_ends(packed):
    for length in range(len(packed)):
        with pytest.raises(ArtifactError):
            pack.unpack(packed[:length])


def test_bytes_behind_the_end_are_noticed(packed):
    with pytest.raises(ArtifactError, match="torn or changed"):
        pack.unpack(packed + b"\0")


@pytest.mark.parametrize("data", [b"", b"RDZ1", b"PK\x03\x04" + b"\0" * 40])
def test_other_files_are_not_packed_models(data):
    with pytest.raises(ArtifactError) as caught:
        pack.unpack(data)
    assert str(caught.value) == "not a packed model (it does not start with RDZ2)"


def test_the_shortest_file_that_may_be_one_is_looked_into():
    assert len(sealed(b"RDZ2")) == 8
    with pytest.raises(ArtifactError, match="header is broken: its header is cut off"):
        pack.unpack(sealed(b"RDZ2"))
    with pytest.raises(ArtifactError) as caught:
        pack.unpack(b"RDZ2" + b"\0" * 4)
    torn = "the packed model is torn or changed (its checksum does not fit); export it again"
    assert str(caught.value) == torn


@pytest.mark.parametrize("version", ["1", "3"])
def test_another_version_is_refused_by_number(version):
    with pytest.raises(ArtifactError, match=f"has version '{version}', expected '2'; export it again"):
        pack.unpack(sealed(b"RDZ" + version.encode() + b"\0" * 20))


def one(*entry: Any) -> Any:
    """A header with one tensor: type, shape, codec, length."""
    return [{}, [["w", *entry]]]


TOO_LARGE = r"it claims {} weights in \d+ bytes, at most 1[67],\d+,\d+ fit; export it again"
BROKEN = {
    "empty header": (b"", "header is broken: Expecting value: line 1 column 1"),
    "no JSON": (b"{", "header is broken: Expecting property name"),
    "no text": (b"\xff\xfe\xfd", "header is broken: 'utf-"),
    "a list": ([], r"header is broken: not enough values to unpack \(expected 2, got 0\)"),
    "a number": (7, "header is broken: cannot unpack non-iterable int"),
    "no tensors": ([{}, None], "header is broken: 'NoneType' object is not iterable"),
    "a spec that is no object": ([[1], []], r"header is broken: its spec is no object but '\[1\]'; export it again"),
    "nested too deep": (b"[" * 200_000, "header is broken: maximum recursion depth"),
    "an endless number": (b"[{}, [[" + b"9" * 5000 + b"]]]", "header is broken: Exceeds the limit"),
    "half a row": (one("int8"), "header is broken: not enough values to unpack"),
    "a negative side": (one("int8", [-1], "raw", 8), r"header is broken: \['w', 'int8', \[-1\], .* is no tensor"),
    "a side that is true": (one("int8", [True], "raw", 8), r"\[True\], 'raw', 8\] is no tensor"),
    "half a side": (one("int8", [0.5], "raw", 8), "is no tensor"),
    "a shape that is a number": (one("int8", 8, "raw", 8), "is no tensor"),
    "a long spec that is no object": (["x" * 50, []], f"no object but '{'x' * 40}'; export it again"),
    "a long row": (one("int8", ["x" * 80], "raw", 8), rf"broken: \['w', 'int8', \['{'x' * 64} is no tensor"),
    "a long type": (one("x" * 30, [8], "raw", 8), f"has type '{'x' * 20}' and codec 'raw'"),
    "a long codec": (one("int8", [8], "x" * 30, 8), f"has type 'int8' and codec '{'x' * 20}'"),
    "a side of 2^31": (one("int8", [2**31], "raw", 8), r"\[2147483648\], 'raw', 8\] is no tensor"),
    "65 sides": (one("int8", [1] * 65, "raw", 8), "is no tensor"),
    "a negative length": (one("int8", [8], "raw", -8), "is no tensor"),
    "a name that is a number": ([{}, [[1, "int8", [8], "raw", 8]]], "is no tensor"),
    "unknown codec": (one("int8", [8], "pickle", 8), "header is broken: tensor w has type 'int8' and codec 'pickle'"),
    "unknown type": (one("object", [8], "raw", 8), "header is broken: tensor w has type 'object' and codec 'raw'"),
    "a type that is a list": (one([], [8], "raw", 8), "header is broken: unhashable type"),
    "longer than the file": (one("int8", [9], "raw", 9), "its tensors take 9 bytes, it has 8; export it again"),
    "shorter than the file": (one("int8", [7], "raw", 7), "its tensors take 7 bytes, it has 8; export it again"),
    "one name twice": ([{}, [["w", "int8", [4], "raw", 4]] * 2], "two tensors have one name; export it again"),
    "another shape": (
        one("float32", [3], "raw", 8),
        r"tensor w \(raw\) is broken: it has 8 bytes, expected 12; export",
    ),
    "no values": (one("float32", [0], "dense", 8), r"no float32 tensor of shape \[0\] here has this codec"),
    "codec of another type": (one("int8", [4], "codebook", 8), r"no int8 tensor of shape \[4\] here has this codec"),
    "a grid without steps": (one("float32", [4], "grid", 8), r"no float32 tensor of shape \[4\] here has this codec"),
    "too large for any memory": (
        one("int8", [2**31 - 1] * 3, "dense", 8),
        TOO_LARGE.format("9,903,520,300,447,984,150,353,281,023"),
    ),
    "larger than its bytes warrant": (one("int8", [2**25], "dense", 8), TOO_LARGE.format("33,554,432")),
    "no values in many dimensions": (one("int8", [2**31 - 1, 0], "raw", 8), TOO_LARGE.format("2,147,483,647")),
}


@pytest.mark.parametrize(("header", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_with_a_fitting_checksum_says_what_is_wrong(header, message):
    with pytest.raises(ArtifactError, match=message) as caught:
        pack.unpack(crafted(header, b"\0" * 8))
    assert str(caught.value).endswith("; export it again")


def test_64_sides_are_as_many_as_torch_has():
    shape = [1] * 63 + [8]
    assert pack.unpack(crafted(one("int8", shape, "raw", 8), b"\0" * 8))[1]["w"].shape == tuple(shape)


def written(*pieces: int | np.ndarray) -> bytes:
    """A stream of bytes and of symbols."""
    stream = codecs.Stream()
    for piece in pieces:
        stream.byte(piece) if isinstance(piece, int) else codecs.code_symbols(stream, len(piece), piece)
    return stream.close()


GARBAGE = {
    "an empty range of values": ("dense", written(9, 8), "its values range from 9 to 8"),
    "an unknown mode of the mask": ("sparse", written(10), "its mask has mode 10, expected at most 9"),
    "an unknown factor": (
        "sparse", written(1, 100, np.array([3, 16], np.uint8)), "a row has factor 16, expected at most 15",
    ),
    "an unknown codec of the non-zeros": (
        "sparse", written(1, 100, np.array([0, 0], np.uint8), 7), "its non-zeros have codec 7, expected 0 or 1",
    ),
    "an index behind the codebook": (
        "codebook", written(1, *[np.array([0, 1], np.uint8)] * 4, np.full(8, 2, np.uint8)),
        "its codebook has 2 values, an index is 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("codec", "blob", "message"), GARBAGE.values(), ids=GARBAGE.keys())
def test_a_stream_that_no_codec_wrote_says_what_is_wrong(codec, blob, message):
    with pytest.raises(ArtifactError) as caught:
        pack.unpack(crafted(one("float32", [2, 4], codec, len(blob)), blob))
    assert str(caught.value) == f"the packed model's tensor w ({codec}) is broken: {message}; export it again"


def test_a_bool_that_is_neither_is_refused():
    with pytest.raises(ArtifactError, match="it holds 2 where true and false are expected"):
        pack.unpack(crafted(one("bool", [2], "raw", 2), b"\1\2"))


def test_a_grid_of_integers_that_are_too_long_is_refused():
    blob = written(np.full(2, 33, np.uint8))
    spec, tensors = quantized()
    header = [spec, [["1.weight.scale", "float32", [2], "raw", 8], ["1.bias", "float32", [2], "grid", len(blob)]]]
    with pytest.raises(ArtifactError, match="its integers have 33 bits, expected at most 32; export it again"):
        pack.unpack(crafted(header, as_bytes(tensors["1.weight.scale"][:2]) + blob))


def peak_bytes_of_refusing(data: bytes, message: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError, match=message):
            pack.unpack(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_inflates_beyond_the_limit_is_not_inflated_whole(monkeypatch):
    bomb = crafted(b" " * 50_000_000)
    monkeypatch.setattr(pack, "MAX_HEADER_BYTES", 10_000)
    assert peak_bytes_of_refusing(bomb, "cut off, or longer than 10,000 bytes; export it again") < 1_000_000


def test_weights_that_so_few_bytes_cannot_hold_are_not_allocated():
    bomb = crafted(one("float32", [2**30], "dense", 8), b"\0" * 8)
    assert peak_bytes_of_refusing(bomb, "it claims 1,073,741,824 weights") < 1_000_000


def test_all_zero_layers_are_packed_and_more_zeros_than_unpack_believes_are_refused():
    zeros = {"w": torch.zeros(2**24, dtype=torch.int8)}
    data = pack.pack({}, zeros)
    assert len(data) < 60
    assert torch.equal(pack.unpack(data)[1]["w"], zeros["w"])
    with pytest.raises(ModelError, match=r"more zeros than the packed file may stand for: 33,554,432 weights in "):
        pack.pack({}, {**zeros, "v": zeros["w"]})


def test_a_spec_that_would_not_be_read_again_is_not_written(monkeypatch):
    monkeypatch.setattr(pack, "MAX_HEADER_BYTES", 100)
    with pytest.raises(ModelError, match="the model's spec and table take 113 bytes, at most 100 are read"):
        pack.pack({"classes": "x" * 94}, {})
    assert pack.unpack(pack.pack({"classes": "x" * 81}, {}))[0] == {"classes": "x" * 81}  # 100 bytes


def entropy_bytes(flat: np.ndarray) -> float:
    counts = np.unique(flat, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def packed_bytes(array: Any) -> int:
    return pack.table(pack.pack({}, {"w": tensor(array)}))[0]["bytes"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.95])
def test_integers_cost_little_more_than_their_entropy(bits, sparsity):
    rng = np.random.default_rng(bits)
    top = 2 ** (bits - 1) - 1
    flat = np.where(rng.random(100_000) < sparsity, 0, rng.integers(-top, top + 1, 100_000)).astype(np.int8)
    assert packed_bytes(flat) <= 1.02 * entropy_bytes(flat) + 8


@pytest.mark.parametrize("sparsity", [0.9, 0.99, 0.999])
def test_pruned_layers_cost_less_than_their_entropy_as_rows_and_columns_differ(sparsity):
    flat = pruned(np.random.default_rng(0), 300, 800, sparsity, 4).numpy()
    assert packed_bytes(flat) <= 0.92 * entropy_bytes(flat)


def test_dead_inputs_and_outputs_cost_next_to_nothing():
    rng = np.random.default_rng(0)
    live = np.where(rng.random((30, 80)) < 0.3, rng.integers(-7, 8, (30, 80)), 0).astype(np.int8)
    whole = np.zeros((300, 800), np.int8)
    whole[np.ix_(rng.permutation(300)[:30], rng.permutation(800)[:80])] = live
    assert packed_bytes(whole) <= packed_bytes(live) + 240  # 720 columns and 270 rows say that they are dead


def test_sparse_floats_cost_their_values_and_little_more_than_the_entropy_of_the_mask():
    rng = np.random.default_rng(0)
    present = rng.random(50_000) < 0.05
    flat = np.where(present, rng.normal(size=50_000), 0).astype(np.float32)
    assert packed_bytes(flat) <= 3.4 * present.sum() + 1.02 * entropy_bytes(present)  # exponents are no 8 bits


def test_clustered_floats_cost_little_more_than_the_entropy_of_their_indexes():
    rng = np.random.default_rng(0)
    flat = rng.choice(rng.normal(size=16).astype(np.float32), 50_000)
    assert packed_bytes(flat) <= 1.02 * entropy_bytes(flat) + 4 * 16 + 16


def test_a_small_quantized_network_has_little_overhead():
    spec, tensors = quantized()
    assert pack.overhead(pack.pack(spec, tensors)) < 100


def test_one_value_among_zeros_is_told_by_its_place():
    for dtype, most in ((np.int8, 8), (np.float32, 10)):
        values = np.zeros(400, dtype)
        values[7] = 3
        codec, blob = pack._encode(torch.from_numpy(values), None)
        assert codec == "sparse"
        assert len(blob) <= most


def test_streams_end_with_no_more_bytes_than_they_need():
    rng = np.random.default_rng(0)
    drawn = [rng.integers(-3, 4, count) * (rng.random(count) < 0.3) for count in range(1, 300)]
    blobs = [pack._encode(torch.from_numpy(values.astype(np.int8)), None)[1] for values in drawn]
    assert sum(map(len, blobs)) <= 9986


def test_the_header_of_many_layers_is_as_short_as_deflate_makes_it():
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.block.{j}.conv{k}.weight" for i in range(20) for j in range(2) for k in (1, 2)]
    data = pack.pack({}, {name: torch.zeros(tuple(rng.integers(1, 40, 3)), dtype=torch.int8) for name in names})
    inflate = zlib.decompressobj(wbits=-15, zdict=pack.WORDS)
    text = inflate.decompress(data[4:-4])

    def shortened(level: int) -> int:
        deflate = zlib.compressobj(level, wbits=-15, zdict=pack.WORDS)
        return len(deflate.compress(text) + deflate.flush())

    assert len(data) - 8 - len(inflate.unused_data) == shortened(9) < shortened(-1)


def test_the_limit_on_zeros_is_that_of_unpack_to_the_byte(monkeypatch):
    zeros = {"w": torch.zeros(1000, dtype=torch.int8)}
    data = pack.pack({}, zeros)
    monkeypatch.setattr(pack, "ELEMENTS_PER_BYTE", 1)
    monkeypatch.setattr(pack, "FREE_ELEMENTS", 1000 - len(data))
    assert pack.pack({}, zeros) == data
    assert torch.equal(pack.unpack(data)[1]["w"], zeros["w"])
    monkeypatch.setattr(pack, "FREE_ELEMENTS", 999 - len(data))
    with pytest.raises(ModelError, match="more zeros than the packed file may stand for"):
        pack.pack({}, zeros)
    with pytest.raises(ArtifactError, match="it claims"):
        pack.unpack(data)


@pytest.mark.parametrize(
    ("dtype", "step", "found"), [("float32", 0.5, True), ("float64", 0.5, False), ("float32", 1, False)]
)
def test_a_bias_has_a_grid_where_both_its_steps_are_known(dtype, step, found):
    spec = {"layers": {"conv": {"activation": {"step": step}}}}
    steps = pack._steps(spec, {"conv.weight.scale": torch.ones(3, dtype=getattr(torch, dtype))}, "conv.bias")
    assert (steps is not None) == found


def test_what_is_no_bias_or_has_no_scale_has_no_grid_and_steps_out_of_range_are_quiet():
    spec = {"layers": {"conv": {"activation": {"step": 1e38}}}}
    scale = {"conv.weight.scale": torch.full((3,), 1e38)}
    assert pack._steps(spec, {}, "conv.bias") is None
    assert pack._steps(spec, scale, "conv") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = pack._steps(spec, scale, "conv.bias")
    assert steps is not None
    assert np.isinf(steps).all()

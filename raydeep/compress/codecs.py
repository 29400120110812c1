"""Entropy codecs of the packed file: one tensor to bytes and back, bit for bit.

Every codec drives a `Stream`, a range coder (constriction; Bamler 2022, arXiv 2201.01741) that either takes symbols
or gives them, so that both directions are one function: `values` holds what to write, or is None to read. Nothing
about the statistics is stored: models adapt to what both sides have seen so far (Krichevsky and Trofimov 1981).
Models are made of integers alone, whose sums float32 and float64 hold exactly, and of one division and one product
each, which IEEE 754 rounds alike everywhere: bytes decode to the same tensor on every machine.

Values are bit patterns: unsigned integers as wide as the tensor's. Zero is the pattern 0; -0.0 is another value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import constriction
import numpy as np

from raydeep.errors import ArtifactError

Array = np.ndarray[Any, Any]
Bits = type[np.unsignedinteger[Any]]
Shape = tuple[int, ...]

CHUNK = 1 << 20  # symbols a call of the coder: bounds what decoding holds beside its result
ONE = 1 << 20  # a probability of 1; below 2**24, the coder's precision
FACTORS = np.array([0, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512])  # of a row's density, in 1/64
STRENGTHS = (0, 2, 6, 20, 60)  # rows' worth of trust in the overall density; 0: it alone counts
BYTE = constriction.stream.model.Uniform(256)
BERNOULLI = constriction.stream.model.Bernoulli(perfect=False)


class Stream:
    """A range coder that writes, or reads what one wrote.

    Args:
        data: bytes to read; None to write.
    """

    def __init__(self, data: bytes | None = None) -> None:
        queue = constriction.stream.queue
        self._encoder = queue.RangeEncoder() if data is None else None
        if data is not None:
            self._decoder = queue.RangeDecoder(np.frombuffer(data + bytes(-len(data) % 4), ">u4").astype(np.uint32))

    def code(self, model: Any, count: int, values: Array | None, *params: Array) -> Array:
        """Write `values`, or read `count` of them: int32 [count]; `params` are the model's, one each a symbol.

        Raises:
            ArtifactError: no stream of this model starts with these bytes.
        """
        if values is not None:
            assert self._encoder is not None
            values = values.astype(np.int32)
            self._encoder.encode(values, model, *params)
            return values
        try:
            return np.asarray(self._decoder.decode(model, *(params or (count,))))
        except BaseException as err:  # pyo3's PanicException is no Exception
            if isinstance(err, AssertionError) or type(err).__name__ == "PanicException":
                raise ArtifactError("its bytes are no stream of its codec") from None
            raise

    def byte(self, value: int | None) -> int:
        """Write or read an integer of 0 to 255."""
        return int(self.code(BYTE, 1, None if value is None else np.array([value]))[0])

    def bits(self) -> int:
        """Bits written so far."""
        assert self._encoder is not None
        return int(self._encoder.num_bits())

    def close(self) -> bytes:
        """What was written; zeros at its end are left out, as reading puts them back."""
        assert self._encoder is not None
        return self._encoder.get_compressed().astype(">u4").tobytes().rstrip(b"\0")


def code_symbols(stream: Stream, count: int, values: Array | None) -> Array:
    """Bytes of one histogram: uint8 [count]. Uniform or adaptive between their least and their greatest."""
    used = None if values is None else values if count else np.zeros(1, np.uint8)
    low = stream.byte(None if used is None else int(used.min()))
    high = stream.byte(None if used is None else int(used.max()))
    size = high - low + 1
    if size < 1:
        raise ArtifactError(f"its values range from {low} to {high}")
    out = np.full(count, low, np.uint8)
    if size == 1 or not count:
        return out
    steps = None if values is None else values - np.uint8(low)
    adaptive = stream.byte(None if steps is None else int(_adaptive_bits(steps, size) < count * math.log2(size)))
    counts = np.zeros(size, np.int64)
    at = 0
    while at < count:
        n = min(count - at, 8 + at // 8, CHUNK)
        shift = max(0, (2 * at).bit_length() - 22)  # sums stay below 2**24, where float32 is exact
        weights = ((2 * counts) >> shift) + 1 if adaptive else np.ones(size)
        model = constriction.stream.model.Categorical(weights.astype(np.float32), perfect=False)
        part = stream.code(model, n, None if steps is None else steps[at : at + n])
        counts += np.bincount(part, minlength=size)
        out[at : at + n] += part.astype(np.uint8)
        at += n
    return out


def _adaptive_bits(steps: Array, size: int) -> float:
    """Code length of the adaptive model of Krichevsky and Trofimov, in bits."""
    half = size / 2
    nats = math.lgamma(len(steps) + half) - math.lgamma(half)
    nats -= sum(math.lgamma(c + 0.5) - math.lgamma(0.5) for c in np.bincount(steps, minlength=size).tolist())
    return nats / math.log(2)


def code_mask(stream: Stream, rows: int, columns: int, values: Array | None, mode: int = 0) -> Array:
    """Where a matrix is not zero: bool [rows, columns].

    An element's probability is its column's density so far, drawn towards the overall one, times its row's factor:
    dead inputs and outputs, and those with few weights, cost next to nothing.

    Args:
        stream: to write to or to read from.
        rows: R, at least 1.
        columns: C, 1 to CHUNK.
        values: bool [R, C], or None to read.
        mode: when writing: twice the index into STRENGTHS, plus 1 with factors for the rows.
    """
    strength, by_row = divmod(stream.byte(None if values is None else mode), 2)
    if strength >= len(STRENGTHS):
        raise ArtifactError(f"its mask has mode {2 * strength + by_row}, expected at most {2 * len(STRENGTHS) - 1}")
    share = stream.byte(None if values is None else _share_byte(values.mean()))
    density = (16 + share % 16) << (share // 16)
    factors = np.broadcast_to(np.int64(64), rows)
    if by_row:
        levels = code_symbols(stream, rows, None if values is None else _levels(values, density / ONE))
        if levels.max() >= len(FACTORS):
            raise ArtifactError(f"a row has factor {levels.max()}, expected at most {len(FACTORS) - 1}")
        factors = FACTORS[levels]
    prior = 64 * STRENGTHS[strength]
    out = np.zeros((rows, columns), np.bool_)
    seen, exposure = np.zeros(columns, np.int64), 0
    at = 0
    while at < rows:
        n = min(rows - at, max(1, at // 8), CHUNK // columns)
        rate = np.full(columns, density)
        if prior:
            rate = np.minimum((seen * (64 * ONE) + prior * density) // (prior + exposure), 64 * ONE)
        factor = factors[at : at + n, None]
        chances = np.clip(factor * rate // 64, factor > 0, ONE - 1) / ONE
        part = stream.code(BERNOULLI, 0, None if values is None else values[at : at + n].ravel(), chances.ravel())
        out[at : at + n] = part.reshape(n, columns)
        seen += out[at : at + n].sum(0)
        exposure += int(factors[at : at + n].sum())
        at += n
    return out


def _share_byte(share: float) -> int:
    exponent = min(15, max(0, math.frexp(max(share * ONE, 1))[1] - 5))
    return 16 * exponent + min(15, max(0, round(share * ONE / 2**exponent) - 16))


def _levels(values: Array, density: float) -> Array:
    """The factor of each row nearest to its density, as an index into FACTORS: uint8 [rows]."""
    ratio = values.mean(1) / density * 64
    middles = np.sqrt(FACTORS[1:-1] * FACTORS[2:])
    return np.where(ratio > 0, 1 + np.searchsorted(middles, ratio), 0).astype(np.uint8)


def _best_mode(values: Array) -> int:
    """The mode in which `code_mask` is shortest on the first CHUNK / 4 elements."""
    sample = values[: max(1, CHUNK // 4 // values.shape[1])]
    sizes = []
    for mode in range(0, 2 * len(STRENGTHS), 2 if sample.shape[1] == 1 else 1):  # an only column needs no factors
        stream = Stream()
        code_mask(stream, sample.shape[0], sample.shape[1], sample, mode)
        sizes.append((stream.bits(), mode))
    return min(sizes)[1]


def code_dense(stream: Stream, shape: Shape, bits: Bits, values: Array | None) -> Array:
    """Byte planes of all values, each with its own histogram; of 32 bits, the sign moves behind the mantissa."""
    count, width = math.prod(shape), np.dtype(bits).itemsize
    order = np.dtype(bits).newbyteorder("<")
    planes = None
    if values is not None:
        turned = values << np.uint32(1) | values >> np.uint32(31) if width == 4 else values
        planes = turned.astype(order).view(np.uint8).reshape(count, width)
    out = np.empty((count, width), np.uint8)
    for i in reversed(range(width)):
        out[:, i] = code_symbols(stream, count, None if planes is None else planes[:, i])
    found = out.view(order).reshape(count).astype(bits, copy=False)
    return found >> np.uint32(1) | found << np.uint32(31) if width == 4 else found


def code_codebook(stream: Stream, shape: Shape, bits: Bits, values: Array | None) -> Array:
    """A table of at most 256 values, then the index of each into it."""
    book, index = (None, None) if values is None else np.unique(values, return_inverse=True)
    size = stream.byte(None if book is None else len(book) - 1) + 1
    book = code_dense(stream, (size,), bits, book)
    index = code_symbols(stream, math.prod(shape), None if index is None else index.astype(np.uint8))
    if index.max(initial=0) >= size:
        raise ArtifactError(f"its codebook has {size} values, an index is {index.max()}")
    return book[index]


def code_sparse(stream: Stream, shape: Shape, bits: Bits, values: Array | None) -> Array:
    """The mask as a matrix [shape[0], rest], then the values of the non-zeros by another codec."""
    rows, columns = (math.prod(shape[:1]), math.prod(shape[1:]))
    if columns > CHUNK:
        rows, columns = rows * columns, 1
    present = None if values is None else (values != 0).reshape(rows, columns)
    mask = code_mask(stream, rows, columns, present, 0 if present is None else _best_mode(present)).reshape(-1)
    count = int(np.count_nonzero(mask))
    known = None if values is None else values[mask]
    inner = stream.byte(None if known is None else int(_shorter_by_codebook(known, bits)))
    if inner > 1:
        raise ArtifactError(f"its non-zeros have codec {inner}, expected 0 or 1")
    out = np.zeros(len(mask), bits)
    out[mask] = (code_codebook if inner else code_dense)(stream, (count,), bits, known)
    return out


def code_grid(stream: Stream, shape: Shape, bits: Bits, values: Array | None, steps: Array) -> Array:
    """Float32 values that are integers times a step each, as biases of integer kernels are.

    Coded are how many bits an integer has, its sign and the bits below its first.

    Args:
        stream: to write to or to read from.
        shape: of the tensor, N values.
        bits: uint32.
        values: bit patterns [N], or None to read.
        steps: float32 [N].
    """
    count = math.prod(shape)
    integers = None if values is None else grid_integers(values, steps)
    size = None if integers is None else np.frexp(np.abs(integers))[1].astype(np.uint8)
    size = code_symbols(stream, count, size)
    if size.max(initial=0) > 32:
        raise ArtifactError(f"its integers have {size.max()} bits, expected at most 32")
    negative = code_symbols(stream, count, None if integers is None else np.signbit(integers).astype(np.uint8))
    found = np.where(size > 0, 2.0 ** (size.astype(np.float64) - 1), 0.0)
    for shift in (0, 8, 16, 24):
        for width in range(1, 9):
            at = np.minimum(size.astype(np.int64) - 1 - shift, 8) == width
            rest = None if integers is None else np.abs(integers[at]).astype(np.int64) >> shift & (1 << width) - 1
            model = constriction.stream.model.Uniform(1 << width)
            if at.any():
                found[at] += stream.code(model, int(at.sum()), rest) * 2.0**shift
    found = np.where(negative > 0, -found, found)
    return (found.astype(np.float32) * steps).view(np.uint32)


def grid_integers(values: Array, steps: Array) -> Array | None:
    """The integers (float64 [N]) that times `steps` are `values`, or None if there are none below 2**32."""
    with np.errstate(all="ignore"):
        integers = np.round(values.view(np.float32).astype(np.float64) / steps)
        fits = (np.abs(integers) < 2.0**32).all() and (integers.astype(np.float32) * steps).view(np.uint32)
    return integers if np.array_equal(fits, values) else None


def has_codebook(values: Array) -> bool:
    """Whether there are at most 256 different values, and at least one."""
    return 0 < len(np.unique(values[:4096])) <= 256 and len(np.unique(values)) <= 256


def _shorter_by_codebook(values: Array, bits: Bits) -> bool:
    if bits is np.uint8 or not has_codebook(values):
        return False
    sizes = []
    for code in (code_dense, code_codebook):
        stream = Stream()
        code(stream, values.shape, bits, values)
        sizes.append(stream.bits())
    return sizes[1] < sizes[0]


CODECS: dict[str, Callable[..., Array]] = {
    "dense": code_dense, "sparse": code_sparse, "codebook": code_codebook, "grid": code_grid,
}  # fmt: skip

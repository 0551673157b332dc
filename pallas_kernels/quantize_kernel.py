"""Quantizing and dequantizing a weight at the speed of memory, bit for bit.

Both kernels are streams: a thread takes eight neighbouring numbers, 16 bytes of 16-bit
numbers or one word of codes, several such pieces in flight, and a warp's pieces lie
side by side. The arithmetic is that of `reference`, rounding for rounding:

* `dequantize` looks each code up in a float32 table in shared memory, one copy a lane
  (entry `c` of lane `l` at byte `128 c + 4 l`: no bank conflicts), multiplies by the
  block's scale and rounds once. A double-quantized scale takes its two roundings.
* `quantize` finds the absmax of a block by shuffles between its lanes, and the nearest
  code by a table of 256 equal intervals of [-1, 1]: an interval holds at most one
  midpoint between neighbouring numbers, so one comparison with it decides between two
  codes. The interval's number is the low mantissa bits of x * 128 + 2**23 + 128,
  rounded down; an entry is the midpoint and the two codes, in 16 copies.
"""

import functools
import itertools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from pallas_kernels import emit, reference, tuning
from pallas_kernels.packed import PackedSpec, PackedWeight

_THREADS = 256
_PIECE = 8  # numbers a thread takes at once
_UNROLL = 4  # pieces of a thread in flight
_BLOCKS_OF_THREADS = 132 * 8
_INTERVALS = 256
_TABLE_ROWS = _INTERVALS + 16  # one more than intervals, and up to whole rounds
_SMALLEST_ABSMAX = 2.0**-126


def _interval_table(codebook: tuple[float, ...]) -> np.ndarray:
    """For each of 257 intervals of [-1, 1]: a midpoint, and the codes around it.

    Returns:
        uint32 [257, 2]: the bits of a float32, and the code at or below the midpoint
        plus 256 times the code above it.

    Raises:
        NotImplementedError: if two midpoints fall into one interval.
    """
    numbers: dict[float, int] = {}
    for code, number in enumerate(codebook):
        numbers.setdefault(number + 0.0, code)  # -0.0 + 0.0 is 0.0
    ascending = sorted(numbers)
    values = np.asarray(ascending, np.float32)
    midpoints = (values[1:] + values[:-1]) / np.float32(2)
    codes = np.asarray([numbers[value] for value in ascending])
    edges = np.arange(_INTERVALS + 2) / (_INTERVALS / 2) - 1
    first = np.searchsorted(midpoints, edges[:-1], side="left")
    last = np.searchsorted(midpoints, edges[1:], side="left")
    # A midpoint on an edge belongs to the interval that starts there.
    if np.any(last - first > 1):
        raise NotImplementedError(
            f"two midpoints of the codebook are nearer than {2 / _INTERVALS}."
        )
    decisive = np.where(
        last > first, midpoints[np.minimum(first, len(midpoints) - 1)], 2
    )
    above = np.where(last > first, np.minimum(first + 1, len(codes) - 1), first)
    table = np.zeros((_TABLE_ROWS, 2), np.uint32)
    table[: _INTERVALS + 1, 0] = decisive.astype(np.float32).view(np.uint32)
    table[: _INTERVALS + 1, 1] = codes[first] + 256 * codes[above]
    return table


def _check(spec: PackedSpec, dtype) -> None:
    """Refuses what neither kernel can do."""
    capability = tuning.compute_capability()
    if capability is not None and capability < 8:
        raise NotImplementedError(f"{capability=}: bfloat16 came with 8.0.")
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(f"{dtype=} must be bfloat16, float16 or float32.")
    if spec.bits != 4:
        raise NotImplementedError(f"codes of {spec.bits} bits must have 4.")
    if spec.k % _PIECE:
        raise NotImplementedError(f"k={spec.k} must be a multiple of {_PIECE}.")
    if spec.n * spec.k >= 2**32:
        raise NotImplementedError(f"{spec.n} x {spec.k} numbers are more than 2**32.")
    size = spec.block_size
    if size < _PIECE or size & (size - 1):
        raise NotImplementedError(
            f"block_size={size} must be a power of two from {_PIECE} on."
        )


class _Stream:
    """Emits a loop over the pieces of a weight."""

    def __init__(self, spec: PackedSpec, dtype, refs: dict[str, Any]):
        self.spec, self.refs = spec, refs
        self.bits = jnp.dtype(dtype).itemsize * 8
        self.half = "bf16" if dtype == jnp.bfloat16 else "f16"
        self.tid = emit.thread_index()
        self.lane = self.tid % 32
        self.pieces = spec.n * spec.k // _PIECE

    def run(self, load, finish):
        """Calls `load(piece, valid)` for several pieces, then `finish` on each."""
        stride = _BLOCKS_OF_THREADS * _THREADS
        first = emit.block_index() * _THREADS + self.tid
        # The same number of rounds in every thread, since lanes work together.
        rounds = -(-self.pieces // (stride * _UNROLL))

        def body(i, carry):
            loaded = []
            for j in range(_UNROLL):
                piece = first + (i * _UNROLL + j) * stride
                valid = emit.bit(piece < self.pieces)
                loaded.append((piece, valid, load(piece, valid)))
            for piece, valid, values in loaded:
                finish(piece, valid, values)
            return carry

        emit.loop(emit.const(0), emit.const(rounds), emit.const(1), [], body)

    def copy_table(self, source, target: emit.Int, entries: int, words: int):
        """Spreads a table over shared memory: 128 bytes an entry, copies in a row."""
        per_row = 32 // words
        total = entries * per_row
        for start in range(0, total, _THREADS):
            index = self.tid + start
            entry, place = index // per_row, index % per_row
            values = [
                emit.ptx(
                    f"ld.global.nc.b32 $0, [$1 + {4 * i}];",
                    (source + (entry * (4 * words)).wide()).value,
                    out="r",
                )
                for i in range(words)
            ]
            address = target + entry * 128 + place * (4 * words)
            for i, value in enumerate(values):
                emit.ptx(f"st.shared.b32 [$0 + {4 * i}], $1;", address.value, value)


class _Dequantize(_Stream):
    """Emits `dequantize`."""

    def build(self):
        refs, spec = self.refs, self.spec
        layer = emit.const(0)
        if "layer" in refs:
            pointer = emit.address(refs["layer"])
            layer = emit.Int(
                emit.ptx("ld.global.b32 $0, [$1];", pointer.value, out="r")
            )
        layer = layer.wide()
        nested = spec.nested_codebook is not None
        self.codes = emit.address(refs["codes"]) + layer * (spec.n * spec.k // 2)
        self.absmax = emit.address(refs["absmax"]) + layer * (
            spec.num_blocks * (1 if nested else 4)
        )
        self.table = emit.address(refs["smem"])
        self.copy_table(emit.address(refs["table"]), self.table, 16, 1)
        if nested:
            num_nested = -(-spec.num_blocks // spec.nested_block_size)
            self.nested = emit.address(refs["nested_absmax"]) + layer * (4 * num_nested)
            pointer = emit.address(refs["offset"]) + layer * 4
            self.offset = emit.ptx("ld.global.nc.f32 $0, [$1];", pointer.value, out="f")
            self.scale_table = self.table + 16 * 128
            source = emit.address(refs["table"]) + 64 + self.tid.wide() * 4
            number = emit.ptx("ld.global.nc.b32 $0, [$1];", source.value, out="r")
            emit.ptx(
                "st.shared.b32 [$0], $1;",
                (self.scale_table + self.tid * 4).value,
                number,
            )
        emit.barrier()
        self.run(self.load, self.finish)

    def load(self, piece: emit.Int, valid):
        """A word of codes, and what its scale is made of."""
        spec = self.spec
        load = (
            "{.reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; "
            "@p ld.global.nc.%s $0, [$1];}"
        )

        def read(kind, pointer, out="r"):
            return emit.ptx(load % kind, pointer.value, valid, out=out)

        word = read("L1::no_allocate.b32", self.codes + piece.wide() * 4)
        block = piece // (spec.block_size // _PIECE)
        if spec.nested_codebook is None:
            return word, read("f32", self.absmax + block.wide() * 4, "f"), None
        code = read("u8", self.absmax + block.wide())
        pointer = self.nested + (block // spec.nested_block_size).wide() * 4
        return word, code, read("f32", pointer, "f")

    def finish(self, piece: emit.Int, valid, values):
        """Looks up, scales, rounds and writes eight numbers."""
        word, scale, nested = values
        if nested is not None:
            scale = emit.ptx(
                "{.reg .b32 a; .reg .f32 v; mad.lo.u32 a, $1, 4, $2; "
                "ld.shared.f32 v, [a]; mul.rn.f32 v, v, $3; add.rn.f32 $0, v, $4;}",
                scale,
                self.scale_table.value,
                nested,
                self.offset,
                out="f",
            )
        lane = (self.table + self.lane * 4).value
        numbers = []
        for i in range(_PIECE):
            shift = 8 * (i // 2) + 4 * (1 - i % 2)  # even columns in the high halves
            numbers.append(
                emit.ptx(
                    f"{{.reg .b32 a; bfe.u32 a, $1, {shift}, 4; "
                    "mad.lo.u32 a, a, 128, $2; ld.shared.f32 $0, [a]; "
                    "mul.rn.f32 $0, $0, $3;}",
                    word,
                    lane,
                    scale,
                    out="f",
                )
            )
        y = emit.address(self.refs["y"]) + piece.wide() * (_PIECE * self.bits // 8)
        store = (
            "{.reg .pred p; setp.ne.b32 p, $5, 0; "
            "@p st.global.v4.b32 [$0%s], {$1, $2, $3, $4};}"
        )
        if self.bits == 32:
            words = [emit.to_bits(v) for v in numbers]
            emit.ptx(store % "", y.value, *words[:4], valid)
            emit.ptx(store % " + 16", y.value, *words[4:], valid)
            return
        words = [
            emit.ptx(f"cvt.rn.{self.half}x2.f32 $0, $2, $1;", *pair, out="r", pure=True)
            for pair in itertools.batched(numbers, 2)
        ]
        emit.ptx(store % "", y.value, *words, valid)


class _Quantize(_Stream):
    """Emits the first stage of `quantize`: codes and float32 scales."""

    def build(self):
        self.table = emit.address(self.refs["smem"])
        source = emit.address(self.refs["table"])
        self.copy_table(source, self.table, _TABLE_ROWS, 2)
        emit.barrier()
        self.run(self.load, self.finish)

    def load(self, piece: emit.Int, valid):
        """Eight numbers, as words."""
        w = emit.address(self.refs["w"]) + piece.wide() * (_PIECE * self.bits // 8)
        words = []
        for i in range(self.bits // 16):
            words += emit.ptx(
                "{.reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
                "mov.b32 $2, 0; mov.b32 $3, 0; @p ld.global.nc.L1::no_allocate.v4.b32 "
                f"{{$0, $1, $2, $3}}, [$4 + {16 * i}];}}",
                w.value,
                valid,
                out="rrrr",
            )
        return words

    def widen(self, words: list) -> list:
        """The numbers in float32."""
        if self.bits == 32:
            return [emit.from_bits(word) for word in words]
        if self.half == "bf16":
            text = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        else:
            text = (
                "{.reg .b16 l, h; mov.b32 {l, h}, $2; "
                "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}"
            )
        return [
            number
            for word in words
            for number in emit.ptx(text, word, out="ff", pure=True)
        ]

    def finish(self, piece: emit.Int, valid, words):
        """Scales, finds and packs eight codes; a lane of each block writes absmax."""
        numbers = self.widen(words)
        absmax = emit.ptx("abs.f32 $0, $1;", numbers[0], out="f", pure=True)
        for number in numbers[1:]:
            absmax = emit.ptx(
                "{.reg .f32 a; abs.f32 a, $2; max.f32 $0, $1, a;}",
                absmax,
                number,
                out="f",
                pure=True,
            )
        lanes = self.spec.block_size // _PIECE
        distance = 1
        while distance < lanes:
            absmax = emit.ptx(
                f"{{.reg .f32 o; shfl.sync.bfly.b32 o, $1, {distance}, 31, -1; "
                "max.f32 $0, $1, o;}",
                absmax,
                out="f",
            )
            distance *= 2
        inverse = emit.ptx(
            "{.reg .pred p; setp.lt.f32 p, $1, 0f00800000; rcp.rn.f32 $0, $1; "
            "@p mov.f32 $0, 0f00000000;}",
            absmax,
            out="f",
            pure=True,
        )
        # Half of the lanes look at the same copy, in another half-warp's turn. The
        # subtraction takes the exponent of 2**23 out of the shifted bits.
        base = self.table + self.lane % 16 * 8 - (0x4B000000 << 7) % 2**32
        word = emit.const(0).value
        for i, number in enumerate(numbers):
            shift = 8 * (i // 2) + 4 * (1 - i % 2)
            word = emit.ptx(
                "{.reg .f32 x, f, m; .reg .b32 a, c; .reg .pred p; "
                "mul.rn.f32 x, $1, $2; min.f32 x, x, 0f3F800000; "
                "max.f32 x, x, 0fBF800000; "
                "fma.rm.f32 f, x, 0f43000000, 0f4B000080; mov.b32 a, f; "
                "mad.lo.u32 a, a, 128, $3; ld.shared.v2.b32 {c, a}, [a]; "
                "mov.b32 m, c; setp.gt.f32 p, x, m; "
                "@p shr.u32 a, a, 8; and.b32 a, a, 15; "
                f"mad.lo.u32 $0, a, {1 << shift}, $4;}}",
                number,
                inverse,
                base.value,
                word,
                out="r",
            )
        codes = emit.address(self.refs["codes"]) + piece.wide() * 4
        store = "{.reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.b32 [$0], $1;}"
        emit.ptx(store, codes.value, word, valid)
        leads = emit.both(piece % lanes == 0, piece < self.pieces)
        target = emit.address(self.refs["absmax"]) + (piece // lanes).wide() * 4
        bits = emit.to_bits(absmax)
        emit.ptx(store, target.value, bits, emit.bit(leads))


def _kernel(emitter, names, out_type, smem_bytes, name):
    """The Pallas kernel around an emitter; `names` are its operands, then results."""

    def body(*refs, smem):
        named = dict(zip(names, refs, strict=True)) | {"smem": smem}

        @plgpu.inline_mgpu(arg_types=({key: plgpu.RefType() for key in named},))
        def run(_, refs):
            emitter(refs).build()

        run(named)  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(_BLOCKS_OF_THREADS,),
        grid_names=("i",),
        num_threads=_THREADS // 128,
        thread_name="wg",
        scratch_types={"smem": plgpu.SMEM((smem_bytes,), jnp.uint8)},
        kernel_name=name,
    )


def dequantize(packed: PackedWeight, spec: PackedSpec, dtype=jnp.float32) -> jax.Array:
    """Returns the [n, k] weight: `codebook[code] * absmax`, one rounding to `dtype`.

    Equal to `reference.dequantize` bit for bit.

    Args:
        packed: the weight, 4-bit codes.
        spec: what its arrays mean.
        dtype: bfloat16, float16 or float32.

    Returns:
        [n, k] of `dtype`.

    Raises:
        NotImplementedError: if this kernel cannot: other types, codes of 8 bits, k not
            a multiple of 8, block sizes that are not powers of two from 8 on.
    """
    dtype = jnp.dtype(dtype)
    _check(spec, dtype)
    table = np.asarray(spec.codebook, np.float32)
    operands = {"codes": packed.codes, "absmax": packed.absmax}
    if spec.nested_codebook is not None:
        nested = np.asarray(spec.nested_codebook, np.float32)
        table = np.concatenate([table, nested])
        operands["nested_absmax"] = packed.nested_absmax
        operands["offset"] = jnp.reshape(packed.offset, (-1,))
    operands["table"] = jnp.asarray(table)
    if packed.layer is not None:
        operands["layer"] = jnp.reshape(packed.layer, (1,)).astype(jnp.int32)
    kernel = _kernel(
        functools.partial(_Dequantize, spec, dtype),
        (*operands, "y"),
        jax.ShapeDtypeStruct((spec.n, spec.k), dtype),
        16 * 128 + 256 * 4,
        "dequantize",
    )
    return kernel(*operands.values())


def quantize(w: jax.Array, spec: PackedSpec) -> PackedWeight:
    """Quantizes an [n, k] weight, one row per output feature, in one pass.

    Equal to `reference.quantize` bit for bit. The scales of a double-quantized weight
    are quantized in turn by `reference.double_quantize`.

    Args:
        w: [n, k], bfloat16, float16 or float32.
        spec: codebook, shape and block size.

    Returns:
        The codes and scales.

    Raises:
        NotImplementedError: if this kernel cannot: other types, codes of 8 bits, k not
            a multiple of 8, block sizes other than 8, 16, ... 256 or not dividing
            n * k, codebooks with two midpoints nearer than 1/128.
    """
    _check(spec, w.dtype)
    if spec.block_size > 32 * _PIECE or spec.n * spec.k % spec.block_size:
        raise NotImplementedError(
            f"block_size={spec.block_size} must be at most {32 * _PIECE} and divide "
            f"the {spec.n * spec.k} numbers."
        )
    table = _interval_table(spec.codebook)
    kernel = _kernel(
        functools.partial(_Quantize, spec, w.dtype),
        ("w", "table", "codes", "absmax"),
        (
            jax.ShapeDtypeStruct((spec.n * spec.k // _PIECE,), jnp.uint32),
            jax.ShapeDtypeStruct((spec.num_blocks,), jnp.float32),
        ),
        _TABLE_ROWS * 128,
        "quantize",
    )
    words, absmax = kernel(w, jnp.asarray(table))
    codes = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(spec.n, spec.k // 2)
    return reference.double_quantize(codes, absmax, spec)

"""What the loader of the Hopper kernel does with codes and with scales."""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false
# pyright: reportPrivateImportUsage=false

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir.dialects import arith

from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_lanes import CODES_WORDS, LANES, SPAN, SPAN_BYTES, STEP


def per_lane(count, dtype=jnp.uint32):
    """An array of `count` numbers of each lane of a warpgroup."""
    layout = plgpu.Layout.WG_STRIDED((LANES * count,), vec_size=count)
    return plgpu.ShapeDtypeStruct((LANES * count,), dtype, layout)


def strided(array):
    """The layout of an array that `per_lane` describes."""
    return plgpu.Layout.WG_STRIDED(array.shape, vec_size=array.shape[0] // LANES)


class Codes:
    """The loader's work on codes: 16 words a lane and span, put in consumers' order."""

    def __init__(self, forward, spec, gmem):
        self.forward, self.spec, self.gmem = forward, spec, gmem

    def load(self, layer, f0, span):
        """Starts the loads of a span."""
        out = per_lane(CODES_WORDS)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * 3), return_type=out
        )
        def read(_, ref, layer, f0, span):
            words = []
            places = self._places(*map(lanes.scalar, (layer, f0, span)))
            size = CODES_WORDS // len(places)
            kind = "global.nc.v4.b32" if size == 4 else "global.nc.b32"
            for row, byte, rows_on in places:
                where = lanes.row_address(ref, row, self.spec.k // 2, byte)
                words += lanes.load(kind, where, rows_on * (self.spec.k // 2))
            return lanes.from_registers(words, out)

        return read(self.gmem, layer, f0, span)

    def _places(self, layer, f0, span):
        """Row, byte and further rows of each load: four of 16 bytes, or 16 of 4.

        Beyond the last row or column any codes will do: x or the result ends there.
        """
        spec, lane = self.spec, lanes.lane_index()
        row_bytes = spec.k // 2
        source = lanes.forward_source if self.forward else lanes.backward_source
        row, rows_on, byte = source(lane)
        if self.forward:
            row = f0 + row
            byte = (byte + span * SPAN_BYTES).minimum(row_bytes - 16)
        else:
            row = span * SPAN + row
            byte = ((f0 >> 1) + byte).minimum(row_bytes - 4)
        first = layer * spec.n
        if spec.n % SPAN:
            return [(first + (row + i).minimum(spec.n - 1), byte, 0) for i in rows_on]
        return [(first + row, byte, i) for i in rows_on]

    def put(self, words, codes_smem):
        """Rearranges what `load` started and stores it for the consumers."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), strided(words)))
        def run(_, target, words):
            target = lanes.address(target)
            arrange = lanes.forward_codes if self.forward else lanes.backward_codes
            ops = lanes.LaneOps("bfloat16")
            for at, group in arrange(ops, lanes.registers(words), lanes.lane_index()):
                kind = f"v{len(group)}.b32" if len(group) > 1 else "b32"
                lanes.store(kind, target + at, group)

        run(codes_smem, words)


class Scales:
    """The loader's work on scales: two a lane and span, decoded and rounded.

    Lane t has row t of the 128 rows of codes and its two blocks of 64 columns.
    """

    def __init__(self, forward, spec, dtype, gmem):
        self.forward, self.spec, self.dtype, self.gmem = forward, spec, dtype, gmem
        self.nested = spec.nested_codebook is not None
        self.row_blocks = spec.k // spec.block_size
        # both in one load
        self.vector = spec.block_size == STEP and self.row_blocks % 2 == 0

    def offset(self, layer):
        """What was subtracted from the scales, one copy a lane."""
        if not self.nested:
            return None
        out = per_lane(1, jnp.float32)

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=out
        )
        def read(_, ref, layer):
            where = lanes.global_address(ref, lanes.scalar(layer))
            return lanes.from_registers(lanes.load("global.nc.f32", where), out)

        return read(self.gmem[2], layer)

    def load(self, layer, f0, span):
        """Starts the loads of the scales of a span."""
        if self.nested:
            kinds = ("u16" if self.vector else "u8", "f32")
            counts = (1, 1) if self.vector else (2, 2)
            types = (jnp.uint32, jnp.float32)
        else:
            kinds, counts = ("v2.f32" if self.vector else "f32",), (2,)
            types = (jnp.float32,)
        out = tuple(map(per_lane, counts, types))
        refs = tuple(self.gmem[: 1 + self.nested])

        @plgpu.inline_mgpu(
            arg_types=(
                tuple(plgpu.RefType() for _ in refs),
                *(plgpu.Layout.WG_SPLAT,) * 3,
            ),
            return_type=out,
        )
        def read(_, refs, layer, f0, span):
            places = self._places(*map(lanes.scalar, (layer, f0, span)))
            results = []
            for i, (ref, kind, struct) in enumerate(zip(refs, kinds, out, strict=True)):
                values = []
                for place in places:
                    where = lanes.global_address(ref, place[i])
                    values += lanes.load(f"global.nc.{kind}", where)
                results.append(lanes.from_registers(values, struct))
            return tuple(results)

        return read(refs, layer, f0, span)

    def _places(self, layer, f0, span):
        """Index of the scale, and of its nested scale, of each load of a lane."""
        spec, blocks = self.spec, self.row_blocks
        row, column = (f0, span * SPAN) if self.forward else (span * SPAN, f0)
        row = (row + lanes.lane_index()).minimum(spec.n - 1)
        num_outer = -(-spec.num_blocks // spec.nested_block_size)
        places = []
        for half in range(1 if self.vector else 2):
            block = (column + half * STEP) // spec.block_size
            # beyond the last block: any scale will do, x or the result ends there
            block = block.minimum(blocks - (2 if self.vector else 1))
            index = row * blocks + block
            outer = index // spec.nested_block_size
            places.append((layer * spec.num_blocks + index, layer * num_outer + outer))
        return places

    def load_numbers(self):
        """Starts the loads of the numbers that double-quantized scales stand for."""
        if not self.nested:
            return None
        out = per_lane(256 // LANES)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=out)
        def run(_, source):
            where = lanes.global_address(source, lanes.lane_index() * 2)
            return lanes.from_registers(lanes.load("global.nc.v2.b32", where), out)

        return run(self.gmem[3])

    def put_numbers(self, numbers, numbers_smem):
        """Stores what `load_numbers` started to shared memory."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), strided(numbers)))
        def run(_, target, numbers):
            where = lanes.address(target) + lanes.lane_index() * 8
            lanes.store("v2.b32", where, lanes.registers(numbers))

        run(numbers_smem, numbers)

    def put(self, raw, offset, scales_smem, *numbers_smem):
        """Finishes what `load` started and stores it for the consumers."""
        inputs = (*raw, offset) if self.nested else raw

        @plgpu.inline_mgpu(
            arg_types=(
                plgpu.RefType(),
                tuple(plgpu.RefType() for _ in numbers_smem),
                tuple(map(strided, inputs)),
            )
        )
        def compute(_, target, numbers, inputs):
            values, *rest = map(lanes.registers, inputs)
            if self.nested:
                outer, (offset,) = rest
                if self.vector:
                    values = [values[0] & 255, values[0] >> 8]
                    outer = outer * 2
                table = lanes.address(numbers[0])
                values = [
                    arith.addf(arith.mulf(number, by), offset)
                    for code, by in zip(values, outer, strict=True)
                    for number in lanes.load("shared.f32", table + code * 4)
                ]
            ops = lanes.LaneOps(self.dtype)
            target = lanes.address(target)
            offsets = lanes.scale_addresses(self.forward, lanes.lane_index())
            kind = "b32" if self.forward else "b16"
            for value, at in zip(values, offsets, strict=True):
                lanes.store(kind, target + at, [ops.round_pair(value, value)])

        compute(scales_smem, numbers_smem, inputs)

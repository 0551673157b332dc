"""The Hopper matmuls without a GPU: every lane's decoding, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import decode, matmul_sm90
from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.packed import PackedSpec, PackedWeight
from tests.pallas_kernels.test_decode import NF4, NumpyOps

LANE = np.arange(128, dtype=np.uint32)
CONFIGS = [
    None,
    matmul_sm90.Config(permuted=0),
    matmul_sm90.Config(cluster=2, raster="features"),
    matmul_sm90.Config(tile_m=192, stages=5),
    matmul_sm90.Config(tile_m=192, stages=4, permuted=0),
    matmul_sm90.Config(tile_m=128, stages=6, raster_width=4),
    matmul_sm90.Config(tile_m=64, stages=8, permuted=0),
]
PASSES = {"forward": matmul_sm90.matmul, "backward": matmul_sm90.matmul_dx}


class LaneOps(NumpyOps):
    """`lanes.LaneOps` of a warpgroup: shared memory is numpy arrays of bytes."""

    def __init__(self, codes, scales, pairs):
        self._codes, self._scales, self._pairs = codes, scales, pairs

    @staticmethod
    def _words(memory, offset, count):
        at = np.broadcast_to(offset, LANE.shape)[:, None] + np.arange(4 * count)
        return [
            np.ascontiguousarray(memory[at[:, 4 * i : 4 * i + 4]]).view("<u4")[:, 0]
            for i in range(count)
        ]

    def codes(self, offset):
        return self._words(self._codes, offset, 4)

    def scales(self, offset, count):
        return self._words(self._scales, offset, count)

    def code_matrices(self, offset):
        # lane t of a warp gives row t % 8 of matrix t // 8; lane 4 g + q gets
        # elements [2 q, g] and [2 q + 1, g] of each
        rows = self._codes[offset.astype(int)[:, None] + np.arange(16)].view("<u2")
        rows = rows.reshape(4, 4, 8, 8)  # warp, matrix, row, unit
        out = []
        for matrix in range(4):
            warps = rows[:, matrix].transpose(0, 2, 1)  # warp, unit, row
            pairs = np.ascontiguousarray(warps).view("<u4")  # warp, unit, row pair
            out.append(pairs.reshape(128))
        return out

    def table(self, offset):
        assert (offset % lanes.TABLE_ROW == 0).all()
        return self._pairs[offset // lanes.TABLE_ROW]

    def rotate(self, a, bits):
        a, bits = a.astype(np.uint64), np.asarray(bits, np.uint64)
        return ((a << bits | a >> (np.uint64(32) - bits)) & 0xFFFFFFFF).astype(
            np.uint32
        )

    def shift_left(self, a, bits):
        return np.uint32(a) << bits

    def constant(self, x):
        return np.uint32(x)

    def multiply_pair(self, a, b):
        a, b = (
            np.ascontiguousarray(np.broadcast_to(x, LANE.shape)).view(
                ml_dtypes.bfloat16
            )
            for x in (a, b)
        )
        return (a * b).view("<u4")


def span_in_shared_memory(packed, swizzled):
    """A span of codes [128, 64 bytes] as TMA leaves it."""
    memory = np.zeros(128 * 64, np.uint8)
    row, chunk = np.meshgrid(np.arange(128), np.arange(4), indexing="ij")
    # TMA's 64-byte swizzle: address bits 4 and 5 by bits 7 and 8
    address = row * 64 + chunk * 16
    if swizzled:
        address ^= (address >> 7 & 3) << 4
    memory[address[..., None] + np.arange(16)] = packed.reshape(128, 4, 16)
    return memory


def scales_in_shared_memory(forward, scales):
    """Scales [128, 2] of rows and column blocks as the loader leaves them."""
    memory = np.zeros(1024, np.uint8)
    at = lanes.scale_addresses(forward, LANE)
    for column, addresses in enumerate(at):
        number = scales[:, column].astype(ml_dtypes.bfloat16)
        for lane in range(128):
            pair = np.repeat(number[lane], 2).view(np.uint8)
            size = 4 if forward else 2
            memory[addresses[lane] : addresses[lane] + size] = pair[:size]
    return memory


@pytest.mark.parametrize("swizzled", [True, False])
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("wg", [0, 1])
@pytest.mark.parametrize("permuted", [0, 1, 4])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lanes_hold_the_first_operand(direction, permuted, wg, half, swizzled):
    forward = direction == "forward"
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (128, 64), dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, (128, 2)).astype(np.float32)

    # W, [128 rows, 128 columns] of the span: the product of rounded code and scale
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(128, 128)
    bf16 = ml_dtypes.bfloat16
    by = np.repeat(scales.astype(bf16), 64, axis=1)
    weight = np.array(NF4, np.float32).astype(bf16)[codes] * by
    if forward:
        expected = weight[wg * 64 : wg * 64 + 64, half * 64 : half * 64 + 64]
    else:
        expected = weight[half * 64 : half * 64 + 64, wg * 64 : wg * 64 + 64].T

    first = "high" if forward else "low"
    ops = LaneOps(
        span_in_shared_memory(packed, swizzled),
        scales_in_shared_memory(forward, scales),
        decode.pair_table(NF4, "bfloat16", first=first),
    )
    decoders = [lanes.Permute(NF4, "bfloat16")] * permuted
    decoders += [lanes.Table()] * (4 - permuted)
    step = lanes.forward_step if forward else lanes.backward_step
    wg_register = np.full(128, wg, np.uint32)
    got = np.full((64, 64), np.nan, np.float32)
    for row, column, pair in step(ops, decoders, half, LANE, wg_register, swizzled):
        numbers = np.ascontiguousarray(pair).view(bf16).reshape(128, 2)
        features = lanes.feature(LANE) + row
        columns = 8 * column + 2 * (LANE & 3)
        for e in range(2):
            got[features, columns + e] = numbers[:, e]
    np.testing.assert_array_equal(got, expected.astype(np.float32))


def test_features_of_lanes_are_a_permutation_with_neighbours():
    quad_leaders = LANE[::4]
    first = lanes.feature(quad_leaders)
    assert sorted([*first, *(first + 1)]) == list(range(64))


def arrays(n, k, *, nested=True, layers=None, block_size=64):
    codebook = tuple(np.linspace(-1, 1, 256).tolist()) if nested else None
    spec = PackedSpec(NF4, n, k, block_size, nested_codebook=codebook)
    stack = () if layers is None else (layers,)
    shape = jax.ShapeDtypeStruct
    packed = PackedWeight(
        codes=shape((*stack, n, k // 2), jnp.uint8),
        absmax=shape(
            (*stack, n, k // block_size), jnp.uint8 if nested else jnp.float32
        ),
        nested_absmax=shape((*stack, -(-spec.num_blocks // 256)), jnp.float32)
        if nested
        else None,
        offset=shape(stack, jnp.float32) if nested else None,
        layer=None if layers is None else shape((), jnp.int32),
    )
    return packed, spec


def lower(direction, m, packed, spec, dtype=jnp.bfloat16, config=None):
    width = spec.k if direction == "forward" else spec.n
    f = jax.jit(lambda x, p: PASSES[direction](x, p, spec, config=config))
    traced = f.trace(jax.ShapeDtypeStruct((m, width), dtype), packed)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"packed_matmul_{direction}" in text
    out = spec.n if direction == "forward" else spec.k
    assert traced.out_info.shape == (m, out)
    assert traced.out_info.dtype == dtype


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_lowers(config, direction):
    lower(direction, 1024, *arrays(4096, 1024), config=config)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "m, n, k, options",
    [
        (77, 1000, 576, {}),  # ragged everywhere, a last span of one step
        (300, 448, 896, {"nested": False}),
        (2048, 14336, 4096, {"layers": 3}),
        (64, 1024, 1024, {"block_size": 128}),
    ],
)
def test_shapes_and_scales_lower(m, n, k, options, direction):
    lower(direction, m, *arrays(n, k, **options), dtype=jnp.float16)


def test_one_lowering_for_all_layers():
    packed, spec = arrays(1024, 1024, layers=4)
    f = jax.jit(lambda x, p: matmul_sm90.matmul(x, p, spec))
    text = f.trace(jax.ShapeDtypeStruct((64, 1024), jnp.bfloat16), packed)
    hlo = text.lower(lowering_platforms=("cuda",)).as_text()
    assert "dynamic_slice" not in hlo and "dynamic-slice" not in hlo


@pytest.mark.parametrize(
    "x, options, message",
    [
        (jnp.zeros((8, 512), jnp.bfloat16), {}, "must be 1024"),
        (jnp.zeros((8,), jnp.bfloat16), {}, "must be 1024"),
    ],
)
def test_wrong_calls_are_refused(x, options, message):
    packed, spec = arrays(256, 1024, **options)
    with pytest.raises(ValueError, match=message):
        matmul_sm90.matmul(x, packed, spec)


@pytest.mark.parametrize(
    "dtype, block_size, message",
    [
        (jnp.float32, 64, "bfloat16 or float16 only"),
        (jnp.bfloat16, 32, "must be a multiple of 64"),
    ],
)
def test_what_it_cannot_do_is_said(dtype, block_size, message):
    packed, spec = arrays(256, 1024, block_size=block_size)
    with pytest.raises(NotImplementedError, match=message):
        matmul_sm90.matmul(jnp.zeros((8, 1024), dtype), packed, spec)


def test_eight_bit_formats_are_refused():
    packed, spec = arrays(256, 1024)
    spec = PackedSpec(tuple(np.linspace(-1, 1, 256).tolist()), 256, 1024)
    with pytest.raises(NotImplementedError, match="4-bit formats only"):
        matmul_sm90.matmul(jnp.zeros((8, 1024), jnp.bfloat16), packed, spec)


@pytest.mark.parametrize(
    "direction, m, tile_m",
    [
        ("forward", 8192, 256),
        ("forward", 512, 256),  # 2 waves, against 4 of half the height
        ("backward", 512, 128),  # 128 tiles on 132 multiprocessors, against 64
        ("forward", 64, 64),
    ],
)
def test_tiles_follow_from_waves(direction, m, tile_m):
    _, spec = arrays(14336, 4096)
    assert matmul_sm90.default_config(direction, m, spec).tile_m == tile_m


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile_m": 100}, "must be 64, 128, 192 or 256"),
        ({"stages": 1}, "must be at least 2"),
        ({"stages": 8}, "bytes of shared memory"),
        ({"cluster": 3}, "must be 1 or 2"),
        ({"raster": "columns"}, "must be 'rows' or 'features'"),
        ({"permuted": 5}, "must be 0 to 4"),
    ],
)
def test_a_configuration_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        matmul_sm90.Config(**options)

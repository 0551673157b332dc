"""The Hopper matmuls without a GPU: every lane's decoding, and lowering for CUDA."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import decode, matmul_sm90
from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.packed import PackedSpec, PackedWeight
from tests.pallas_kernels.test_decode import NF4, CheckedOps

LANE = np.arange(128, dtype=np.uint32)
CONFIGS = [
    None,
    matmul_sm90.Config(permuted=0),
    matmul_sm90.Config(cluster=2, raster="features"),
    matmul_sm90.Config(tile_m=192, stages=5),
    matmul_sm90.Config(tile_m=192, stages=4, permuted=0),
    matmul_sm90.Config(tile_m=128, stages=6, raster_width=4),
    matmul_sm90.Config(tile_m=64, stages=8, permuted=0),
    matmul_sm90.Config(permuted=0, divided=True),
]
PASSES = {"forward": matmul_sm90.matmul, "backward": matmul_sm90.matmul_dx}


class LaneOps(CheckedOps):
    """`lanes.LaneOps` of a warpgroup."""

    def __init__(self, pairs):
        self._pairs = pairs

    def look_up(self, word, byte):
        return self._pairs[word >> np.uint32(8 * byte) & np.uint32(255)]

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


def load_words(memory, offset, count):
    """`count` words of each lane from an array of bytes."""
    at = np.broadcast_to(offset, LANE.shape)[:, None] + np.arange(4 * count)
    return list(np.ascontiguousarray(memory[at]).view("<u4").T)


def span_in_shared_memory(forward, packed):
    """A span of codes as the loader leaves it, from [128 rows, 64 bytes]."""
    source = lanes.forward_source if forward else lanes.backward_source
    first, rows_on, byte = source(LANE)
    words = []
    for row in rows_on:
        at = (first + row) * 64 + byte
        words += load_words(packed.reshape(-1), at, 16 // len(rows_on))
    memory = np.zeros(lanes.CODES_BYTES, np.uint8)
    written = np.zeros(lanes.CODES_BYTES, int)
    arrange = lanes.forward_codes if forward else lanes.backward_codes
    for address, group in arrange(CheckedOps("bfloat16"), words, LANE):
        size = 4 * len(group)
        assert_no_bank_conflicts(address, size)
        at = address[:, None] + np.arange(size)
        memory[at] = np.stack(group, -1).view(np.uint8)
        np.add.at(written, at, 1)
    assert (written == 1).all()
    return memory


def assert_no_bank_conflicts(address, size):
    """Lanes of as many as 128 bytes go at a time."""
    for group in address.reshape(-1, 128 // size):
        banks = (group[:, None] // 4 + np.arange(size // 4)) % 32
        assert len(np.unique(banks)) == 32


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


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("wg", [0, 1])
@pytest.mark.parametrize("permuted", [0, 1, 4])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lanes_hold_the_first_operand(direction, permuted, wg, half):
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

    wg_register = np.full(128, wg, np.uint32)
    address = lanes.codes_address(half, LANE, wg_register)
    assert_no_bank_conflicts(address, 16)
    words = load_words(span_in_shared_memory(forward, packed), address, 4)
    memory = scales_in_shared_memory(forward, scales)
    scale_words = []
    for address, count in lanes.scale_loads(forward, half, LANE, wg_register):
        scale_words += load_words(memory, address, count)

    ops = LaneOps(decode.pair_table(NF4, "bfloat16"))
    decoders = [lanes.Permute(NF4, "bfloat16")] * permuted
    decoders += [lanes.Table()] * (4 - permuted)
    got = np.full((64, 64), np.nan, np.float32)
    pairs = lanes.look_up(ops, decoders, words)
    for row, column, pair in lanes.scale_pairs(ops, forward, pairs, scale_words):
        numbers = np.ascontiguousarray(pair).view(bf16).reshape(128, 2)
        features = lanes.feature(LANE) + row
        columns = 8 * column + 2 * (LANE & 3)
        for e in range(2):
            got[features, columns + e] = numbers[:, e]
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize("wg", [0, 1])
def test_lanes_read_the_first_operand_of_an_addend(wg):
    u = np.arange(128 * 64).reshape(128, 64)
    first, pairs = lanes.tail_source(LANE, np.full(128, wg, np.uint32))
    got = np.full((64, 64), -1)
    for row in range(2):
        for column, pair in enumerate(pairs):
            features = lanes.feature(LANE) + row  # of the consumer, as decoded ones
            columns = 8 * column + 2 * (LANE & 3)
            for e in range(2):
                read = u[first + row, pair + 2 * (LANE & 3) + e]
                got[features, columns + e] = read
    np.testing.assert_array_equal(got, u[64 * wg : 64 * wg + 64])


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


def lower(
    direction, m, packed, spec, dtype=jnp.bfloat16, config=None, rank=None, added=False
):
    width, out = spec.k, spec.n
    if direction == "backward":
        width, out = out, width
    addend = None
    if rank is not None:
        addend = tuple(jax.ShapeDtypeStruct((rows, rank), dtype) for rows in (m, out))
    onto = jax.ShapeDtypeStruct((m, out), dtype) if added else None
    f = jax.jit(
        lambda x, p, addend, onto: PASSES[direction](
            x, p, spec, config=config, addend=addend, onto=onto
        )
    )
    traced = f.trace(jax.ShapeDtypeStruct((m, width), dtype), packed, addend, onto)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"packed_matmul_{direction}" in text
    assert "dot_general" not in text
    assert traced.out_info.shape == (m, out)
    assert traced.out_info.dtype == dtype


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_configuration_lowers(config, direction):
    lower(direction, 1024, *arrays(4096, 1024), config=config)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "m, rank, config",
    [
        (1024, 64, matmul_sm90.Config(cluster=2)),
        (1000, 16, matmul_sm90.Config(tile_m=64, stages=8)),
        (256, 128, matmul_sm90.Config(divided=True)),  # tiles cut alike
        (600, 64, matmul_sm90.Config(divided=True)),  # end to end
    ],
)
def test_an_addend_lowers(m, rank, config, direction):
    lower(direction, m, *arrays(4096, 4096), config=config, rank=rank)


@pytest.mark.parametrize("direction", PASSES)
@pytest.mark.parametrize(
    "m, rank, config, dtype",
    [
        (1024, 64, matmul_sm90.Config(cluster=2), jnp.bfloat16),
        (1000, None, matmul_sm90.Config(tile_m=64, stages=8), jnp.float16),
        (1001, None, None, jnp.bfloat16),
        (256, 128, matmul_sm90.Config(divided=True), jnp.bfloat16),  # tiles cut alike
        (600, 64, matmul_sm90.Config(divided=True), jnp.float16),  # end to end
    ],
)
def test_what_results_are_added_to_lowers(m, rank, config, dtype, direction):
    weight = arrays(4096, 4096)
    lower(direction, m, *weight, dtype, config=config, rank=rank, added=True)


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
    "direction, m, options",
    [
        ("forward", 8192, {"divided": True}),
        ("forward", 2048, {}),
        ("forward", 512, {}),
        ("forward", 256, {"cluster": 2}),
        ("forward", 64, {"tile_m": 64, "stages": 8}),
        ("backward", 8192, {}),
        ("backward", 2048, {}),
        ("backward", 1024, {"cluster": 2}),
        ("backward", 512, {"divided": True}),
    ],
)
def test_default_configurations(direction, m, options):
    _, spec = arrays(14336, 4096)
    expected = matmul_sm90.Config(**options)
    assert matmul_sm90.default_config(direction, m, spec) == expected


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tile_m": 100}, "must be 64, 128, 192 or 256"),
        ({"stages": 1}, "must be at least 2"),
        ({"stages": 8}, "bytes of shared memory"),
        ({"cluster": 3}, "must be 1 or 2"),
        ({"raster": "columns"}, "must be 'rows' or 'features'"),
        ({"permuted": 5}, "must be 0 to 4"),
        ({"divided": True, "cluster": 2}, "not divided"),
    ],
)
def test_a_configuration_checks_itself(options, message):
    with pytest.raises(ValueError, match=message):
        matmul_sm90.Config(**options)


@pytest.mark.parametrize("direction", PASSES)
def test_an_addend_of_one_step_is_left_to_others(direction):
    n, k = (256, 64) if direction == "forward" else (64, 256)
    spec = PackedSpec(NF4, n=n, k=k)
    packed = PackedWeight(
        jnp.zeros((n, k // 2), jnp.uint8), jnp.ones((n, k // 64), jnp.float32)
    )
    x = jnp.ones((128, 64), jnp.bfloat16)
    pair = jnp.ones((128, 64), jnp.bfloat16), jnp.ones((256, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="a contraction of 64"):
        PASSES[direction](x, packed, spec, addend=pair)

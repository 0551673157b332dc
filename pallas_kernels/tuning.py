"""Which implementation serves a call: device predicates and measured preferences."""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import Implementation, Op
from pallas_kernels.matmul_sm90_schedule import Schedule
from pallas_kernels.packed import PackedSpec, PackedWeight


def compute_capability() -> float | None:
    """Compute capability of the default device, or None where it is no NVIDIA GPU."""
    chosen = jax.config.jax_default_device  # a device, a platform or None
    if isinstance(chosen, str):
        chosen = jax.devices(chosen)[0]
    if (chosen.platform if chosen else jax.default_backend()) != "gpu":
        return None
    try:
        return float((chosen or jax.devices()[0]).compute_capability)
    except (AttributeError, ValueError):  # an AMD GPU names an architecture instead
        return None


def require(least: float, why: str) -> None:
    """Raises NotImplementedError on a GPU of a lower compute capability."""
    capability = compute_capability()
    if capability is not None and capability < least:
        raise NotImplementedError(f"{capability=}: {why}.")


def has_hopper() -> bool:
    """Whether the default device is of compute capability 9.x."""
    capability = compute_capability()
    return capability is not None and 9 <= capability < 10


def has_one_hopper() -> bool:
    """Whether that device is the only one: what is no product is not partitioned."""
    return has_hopper() and jax.device_count() == 1


def multiprocessors() -> int:
    """Multiprocessors of the device a kernel is for; an H200's without a device."""
    if device := jax.sharding.get_abstract_mesh().abstract_device:
        return device.num_cores
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else 132


def shared_memory() -> int:
    """Bytes of shared memory that a block of threads may have, likewise."""
    device = jax.devices()[0]
    return device.shared_memory_per_block_optin if device.platform == "gpu" else 232448


# What follows was measured on an H200; docs/kernels.md and the pages that it names
# have the measurements.

# Rows of x up to which the kernels for few rows, and for tens, are the fastest; and up
# to which the former is where the contraction is long and features are few.
_FEW_ROWS, _TENS_OF_ROWS, _VERY_FEW_ROWS = 16, 128, 8
# Features of a tile of the Hopper kernel, and numbers of the contraction of a step.
TILE_FEATURES, STEP = 128, 64
# Microseconds of a step, by rows of a tile.
_STEP = {256: 0.81, 192: 0.68, 128: 0.66, 64: 0.54}
# Microseconds of adding up the parts of tiles that are cut alike; and of tiles that lie
# end to end, where steps take longer too, since blocks read different columns of x.
_ALIKE, _END_TO_END, _END_TO_END_STEP = 9.0, 16.0, 1.1
# How much faster the latter must seem: where less was expected it was not so.
_LEAST_GAIN = 1.02
# Rows of the tiles that pairs of blocks compute together, where all go at once.
_PAIRS = 256
# Microseconds of decoding 10**6 weights to memory and of reading them again, and
# operations of the product in one.
_DECODE, _READ, _PRODUCT = 0.8, 0.5, 700e6
# Of thousands of rows a step takes so much of the above, and a tile as long as so many
# steps beside its own: what tells two ways that are within some percent apart.
_LARGE_STEP, _BESIDE = 0.955, 3.5


@dataclasses.dataclass(frozen=True, order=True)
class Tiling:
    """How the Hopper kernel would cut a product, and what that should take.

    Attributes:
        microseconds: expected.
        divided: whether tiles are divided along the contraction.
        tile_m: rows of a tile.
        pairs: whether pairs of blocks share tiles of x.
    """

    microseconds: float
    divided: bool
    tile_m: int
    pairs: bool


def best_tiling(op: Op, m: int, spec: PackedSpec) -> Tiling:
    """The fastest of the Hopper kernel's ways to cut a product of `m` rows.

    Tiles are computed in rounds, one on each multiprocessor, and a round takes as long
    as the contraction is. If tiles are divided, the last round is shorter.
    """
    forward = op == "matmul"
    features, contraction = (spec.n, spec.k) if forward else (spec.k, spec.n)
    steps = -(-contraction // STEP)
    columns = -(-features // TILE_FEATURES)
    workers = multiprocessors()

    def tilings():
        for tile_m, step in _STEP.items():
            tiles = columns * -(-m // tile_m)
            pairs = tile_m == _PAIRS and columns % 2 == 0 and tiles <= workers
            round_ = steps * step
            yield Tiling(-(-tiles // workers) * round_, False, tile_m, pairs)
            cut = Schedule(tiles, -(-steps // 2), workers, divided=True)
            whole = cut.whole // workers * round_
            if cut.parts > 1:
                taken = whole + round_ / cut.parts + _ALIKE
                yield Tiling(taken, True, tile_m, False)
            elif cut.cut:
                taken = whole + cut.cut / workers * round_ * _END_TO_END_STEP
                taken = (taken + _END_TO_END) * _LEAST_GAIN
                yield Tiling(taken, True, tile_m, False)

    return min(tilings())


def two_pass_microseconds(m: int, spec: PackedSpec) -> float:
    """What decoding the weight to memory and a product of `m` rows should take."""
    weights = spec.n * spec.k
    product = max(2 * m * weights / _PRODUCT, weights * 1e-6 * _READ)
    return weights * 1e-6 * _DECODE + product


def preference(
    op: Op,
    m: int,
    dtype,
    packed: PackedWeight,
    spec: PackedSpec,
    adds: bool = False,
) -> tuple[Implementation, ...]:
    """Returns implementations of `op` in the order to try; the last can always.

    Args:
        op: "matmul" or "matmul_dx".
        m: rows of the activation.
        dtype: of the activation.
        packed: the weight.
        spec: what its arrays mean.
        adds: whether something is added to the product.
    """
    del packed
    if not has_hopper() or spec.bits != 4 or dtype == jnp.float32:
        return ("xla",)
    if op == "matmul" and m <= _FEW_ROWS:
        if m > _VERY_FEW_ROWS and spec.k > 2 * spec.n:
            return ("skinny", "matvec", "sm90", "xla")
        return ("matvec", "sm90", "xla")
    if op == "matmul" and m <= _TENS_OF_ROWS:
        return ("skinny", "matvec", "sm90", "xla")
    # What is added costs the Hopper kernel no pass of its own.
    if not adds and two_pass_microseconds(m, spec) < _fused_microseconds(op, m, spec):
        return ("two_pass", "sm90", "xla")
    return ("sm90", "two_pass", "xla")


def _fused_microseconds(op: Op, m: int, spec: PackedSpec) -> float:
    """What the Hopper kernel should take, of rows by the thousand."""
    steps = -(-(spec.k if op == "matmul" else spec.n) // STEP)
    return best_tiling(op, m, spec).microseconds * (_LARGE_STEP + _BESIDE / steps)

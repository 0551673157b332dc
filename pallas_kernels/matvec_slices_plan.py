"""How the decoding kernel for up to 16 rows gives slices of columns to its warps."""

import dataclasses

from pallas_kernels.matvec_plan import (
    BLOCK,
    CHUNK,
    CHUNK_BYTES,
    TABLE_BYTES,
    Problem,
)


@dataclasses.dataclass(frozen=True)
class Slices:
    """How the kernel whose warps own slices of columns cuts its work.

    Attributes:
        k_warps: warps that take a slice of 256 columns each.
        phases: how many slices a warp takes, one after the other.
        stages: units of 16 rows by 256 columns in the ring of each warp.
        batch: units of a warp between two reductions.
    """

    k_warps: int
    phases: int = 1
    stages: int = 2
    batch: int = 1

    @property
    def warps(self) -> int:
        """Warps of one block of threads: whole warpgroups, the last ones may idle."""
        return -(-self.k_warps // 4) * 4

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.warps


@dataclasses.dataclass(frozen=True)
class SlicePlan(Problem):
    """Everything static about one kernel of slices: the problem and its cut."""

    slices: Slices
    grid: int

    def __post_init__(self):
        phases = -(-self.num_slices // self.slices.k_warps)
        if self.slices.phases != phases:
            raise ValueError(f"{self.slices} must have {phases=} for k={self.k}.")

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return self.slices.threads

    @property
    def blocks(self) -> int:
        """Scales of a row."""
        return self.k // BLOCK

    @property
    def num_slices(self) -> int:
        """Slices of all columns."""
        return self.k // CHUNK

    @property
    def row_groups(self) -> int:
        """Groups of 16 rows of the whole weight."""
        return -(-self.n // 16)

    @property
    def max_groups(self) -> int:
        """Groups of a block of threads, at most."""
        return -(-self.row_groups // self.grid)

    @property
    def accumulates(self) -> bool:
        """Whether all sums stay in shared memory until the last phase is done."""
        return self.slices.batch >= self.max_groups

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale in memory."""
        return 4 if self.nested_block_size is None else 1

    @property
    def scale_pitch(self) -> int:
        """Bytes between the scales of two rows: an odd number of 16, for the banks."""
        return (-(-self.blocks * self.scale_bytes // 16) | 1) * 16

    @property
    def max_nested(self) -> int:
        """Nested scales of a block of threads, at most."""
        if self.nested_block_size is None:
            return 0
        scales = 16 * self.max_groups * self.blocks
        return -(-scales // self.nested_block_size) + 1

    # Shared memory: the tables, the rings, then the following.

    @property
    def ring_bytes(self) -> int:
        """The codes in all rings."""
        return self.slices.warps * self.slices.stages * 16 * CHUNK_BYTES

    @property
    def sum_pitch(self) -> int:
        """Floats between rows of x of a unit's sums; 4 more keep the banks apart."""
        return 20

    @property
    def warp_sums_bytes(self) -> int:
        """Sums of one unit of one warp."""
        return 4 * self.m * self.sum_pitch

    @property
    def unit_sums_bytes(self) -> int:
        """Sums of the units of all warps in the same rows."""
        return self.slices.k_warps * self.warp_sums_bytes

    @property
    def sums_bytes(self) -> int:
        """Sums of a batch."""
        return self.slices.batch * self.unit_sums_bytes

    @property
    def smem_offsets(self) -> dict[str, int]:
        """Where each part begins; "end" is the size of all."""
        rows = 16 * self.max_groups
        totals = self.slices.phases > 1 and not self.accumulates
        sizes = {
            "scales": rows * self.scale_pitch,
            "nested": 4 * self.max_nested,
            "sums": self.sums_bytes * (1 if self.accumulates else 2),
            "totals": 4 * rows * self.m if totals else 0,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // 16) * 16
        return offsets | {"end": at}

    @property
    def total_smem_bytes(self) -> int:
        """All shared memory of a block of threads."""
        return TABLE_BYTES + self.ring_bytes + self.smem_offsets["end"]

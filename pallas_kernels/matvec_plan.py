"""How the decoding kernel cuts its work, and where its parts of shared memory lie."""

import dataclasses

BLOCK = 64  # columns that share one partial sum
BLOCKS = 4  # blocks of a chunk: what the ring takes of a row at once
CHUNK = BLOCK * BLOCKS
CHUNK_BYTES = CHUNK // 2
TABLE_BYTES = 64 * 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        row_groups: groups of 16 rows that a warp holds at once.
        row_warps: warps of a block of threads side by side along n.
        k_warps: warps of a block of threads that share rows and split k.
        stages: chunks in the ring of each warp.
        phases: parts of k, one after the other; x of two parts is kept at a time.
    """

    row_groups: int
    row_warps: int
    k_warps: int
    stages: int = 2
    phases: int = 1

    def __post_init__(self):
        if self.warps not in (4, 8, 12, 16):
            raise ValueError(f"{self} must have 4, 8, 12 or 16 warps.")

    @property
    def groups(self) -> int:
        """Groups of 16 rows of one step of a block of threads."""
        return self.row_groups * self.row_warps

    @property
    def warps(self) -> int:
        """Warps of one block of threads."""
        return self.row_warps * self.k_warps

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return 32 * self.warps


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a kernel computes, and how rows of x lie in the columns of B."""

    m: int
    n: int
    k: int
    dtype: str  # "bfloat16" or "float16": of x, of the decoded codes and of y
    nested_block_size: int | None  # None: scales are float32

    @property
    def ptx_type(self) -> str:
        """The type's name in PTX."""
        return {"bfloat16": "bf16", "float16": "f16"}[self.dtype]

    @property
    def x_rows(self) -> int:
        """Columns of B that hold rows of x: m, padded."""
        return padded_rows(self.m)

    @property
    def classes(self) -> int:
        """Blocks that share one accumulator, in different columns of B."""
        return 8 // self.x_rows if self.x_rows < 8 else 1

    @property
    def x_tiles(self) -> int:
        """Fragments of eight columns of B."""
        return -(-self.m // 8)


@dataclasses.dataclass(frozen=True)
class Plan(Problem):
    """Everything static about one kernel: the problem and its tile."""

    tile: Tile
    grid: int
    block_size: int

    @property
    def threads(self) -> int:
        """Threads of one block."""
        return self.tile.threads

    @property
    def chunks(self) -> int:
        """Chunks of one row, the last one possibly short."""
        return -(-self.k // CHUNK)

    @property
    def phase_chunks(self) -> int:
        """Chunks of a row in a phase, at most."""
        return -(-self.chunks // self.tile.phases)

    @property
    def row_groups(self) -> int:
        """Groups of 16 rows of the whole weight."""
        return -(-self.n // 16)

    @property
    def scales(self) -> str:
        """How scales are read.

        "codes": the four quantized scales of a chunk are one aligned word. "numbers":
        they are four aligned float32. "single": anything else, one by one.
        """
        if self.block_size != BLOCK or self.k % CHUNK:
            return "single"
        return "numbers" if self.nested_block_size is None else "codes"

    # Shared memory: the table of pairs, the rings, then the following.

    @property
    def ring_bytes(self) -> int:
        """The codes in all rings."""
        tile = self.tile
        return tile.warps * tile.stages * tile.row_groups * 16 * CHUNK_BYTES

    @property
    def slot_scale_bytes(self) -> int:
        """Scales in a slot of a ring."""
        per_row = {"codes": 8, "numbers": 16, "single": 0}[self.scales]
        return 16 * self.tile.row_groups * per_row

    @property
    def x_pitch(self) -> int:
        """Bytes between rows of x; 16 more keep the banks apart."""
        return 2 * self.phase_chunks * CHUNK + 16

    @property
    def x_bytes(self) -> int:
        """The part of x of one phase."""
        return self.m * self.x_pitch

    @property
    def sum_pitch(self) -> int:
        """Floats between columns of partial sums; 4 more keep the banks apart."""
        return 16 * self.tile.groups + 4

    @property
    def sums_bytes(self) -> int:
        """Partial sums of one tile; there is room for two tiles if there are two."""
        return 4 * self.tile.k_warps * self.x_rows * self.sum_pitch

    @property
    def max_tiles(self) -> int:
        """Tiles of a block of threads, at most."""
        groups = -(-self.row_groups // self.grid)
        return -(-groups // self.tile.groups)

    @property
    def smem_offsets(self) -> dict[str, int]:
        """Where each part begins; "end" is the size of all."""
        slots = self.tile.warps * self.tile.stages
        sizes = {
            "scale_table": 1024,
            "scales": self.slot_scale_bytes * slots,
            "barriers": -(-8 * slots // 16) * 16,
            "x": self.x_bytes * min(self.tile.phases, 2),
            "sums": self.sums_bytes * min(self.max_tiles, 2),
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += size
        return offsets | {"end": at}

    @property
    def total_smem_bytes(self) -> int:
        """All shared memory of a block of threads."""
        return TABLE_BYTES + self.ring_bytes + self.smem_offsets["end"]


def padded_rows(m: int) -> int:
    """Columns of B that hold rows of x: m, padded."""
    if m <= 4:
        return 2 if m <= 2 else 4
    return -(-m // 8) * 8

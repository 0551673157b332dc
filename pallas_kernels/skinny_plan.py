"""How the kernel for tens of rows of x cuts its work, and what lies where."""

import dataclasses
from typing import Any

from pallas_kernels.matvec_plan import BLOCK, CHUNK, CHUNK_BYTES, TABLE_BYTES, Problem

# Features of a warpgroup: rows of wgmma's first operand.
FEATURES = 64
STEPS = CHUNK // BLOCK
# Steps of a half of a chunk, and of a tile of x.
HALF = STEPS // 2
REGISTERS = 65536
SMEM_BYTES = 226 * 1024


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a block of threads works.

    Attributes:
        consumers: warpgroups that decode and multiply, 64 features each.
        stages: tiles of x, 128 columns each, in shared memory.
        slots: chunks of codes, 256 columns of all features, in shared memory.
        lead: halves of units that a run has more of if a tile ends inside of it; the
            others leave their part, for which its owner waits, so much earlier.
        at_once: slots that are asked for before codes have come.
    """

    consumers: int = 4
    stages: int = 4
    slots: int = 2
    lead: int = 0
    at_once: int = 1

    def __post_init__(self):
        if not 2 <= self.consumers <= 4:
            raise ValueError(f"{self} must have 2 to 4 consumers.")
        if self.stages < 2 or self.slots < 2:
            raise ValueError(f"{self} must have 2 stages and 2 slots at least.")
        if not 0 <= self.lead <= 4:
            raise ValueError(f"{self} must have a lead of 0 to 4.")
        if not 1 <= self.at_once <= self.slots:
            raise ValueError(f"{self} must ask for one slot at once, or up to all.")

    @property
    def workers(self) -> int:
        """Threads that decode and multiply."""
        return 128 * self.consumers

    @property
    def threads(self) -> int:
        """Threads of a block: one more warpgroup brings x and codes."""
        return self.workers + 128

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that multiplies, and of one that does not."""
        few = 32
        at_start = REGISTERS // self.threads // 8 * 8
        many = (at_start * self.threads - few * 128) // self.workers // 8 * 8
        return many, few


@dataclasses.dataclass(frozen=True)
class SkinnyPlan(Problem):
    """Everything static about one kernel.

    A tile is 64 features of each consumer, all of k. Tiles are laid end to end and cut
    into as many runs of chunks as there are blocks of threads; a run may begin or end
    inside of a tile.
    """

    cut: Cut
    grid: int
    block_size: int
    codebook: tuple[float, ...]

    @property
    def rows(self) -> int:
        """Rows of x, padded to columns of wgmma."""
        return -(-self.m // 8) * 8

    @property
    def chunks(self) -> int:
        """Chunks of a row, the last one possibly short."""
        return -(-self.k // CHUNK)

    @property
    def features(self) -> int:
        """Features of a tile."""
        return FEATURES * self.cut.consumers

    @property
    def tiles(self) -> int:
        """Tiles, the last one possibly with fewer features."""
        return -(-self.n // self.features)

    @property
    def units(self) -> int:
        """Chunks of all tiles."""
        return self.tiles * self.chunks

    @property
    def halves(self) -> int:
        """Halves of units, which is where runs may be cut."""
        return 2 * self.units

    @property
    def cuts(self) -> int:
        """Places in a tile where a run may begin: all but some at its end."""
        length, run = 2 * self.chunks, self.halves // self.grid
        # Of shorter runs hardly any ends its tile; of longer ones all do.
        lead = self.cut.lead if run < length <= 3 * run else 0
        return length - min(lead, self.chunks)

    def first(self, block: Any) -> Any:
        """Where the run of a block of threads begins, in halves of units."""
        place = block * (self.tiles * self.cuts) // self.grid
        return place + place // self.cuts * (2 * self.chunks - self.cuts)

    def sharers(self, tile: Any) -> tuple[Any, Any]:
        """The first and the last block of threads that have units of a tile."""
        begin, all_cuts = tile * self.cuts, self.tiles * self.cuts
        owner = ((begin + 1) * self.grid - 1) // all_cuts
        last = ((begin + self.cuts) * self.grid - 1) // all_cuts
        return owner, last

    @property
    def part_floats(self) -> int:
        """Sums of a tile."""
        return self.features * self.rows

    @property
    def part_bytes(self) -> int:
        """The same in bytes: pieces of four sums of each thread that multiplies."""
        return 4 * self.part_floats

    @property
    def piece_bytes(self) -> int:
        """Bytes of such a piece."""
        return 16 * self.cut.workers

    @property
    def num_counters(self) -> int:
        """Counters of parts that were left: one for each warp of each block."""
        return self.grid * (self.cut.workers // 32)

    @property
    def fetches(self) -> bool:
        """Whether there is room in shared memory for a part of another block."""
        cut = self.cut
        size = cut.stages * self.x_bytes + cut.slots * self.slot_bytes
        return TABLE_BYTES + size + self.part_bytes + 1024 <= SMEM_BYTES

    @property
    def reads_ahead(self) -> bool:
        """Whether there are registers for two parts of other blocks."""
        return self.rows <= 64

    @property
    def num_scales(self) -> int:
        """Scales of one weight."""
        return -(-self.n * self.k // self.block_size)

    @property
    def scale_units(self) -> int:
        """Units of which a lane's row reads the scales at once, in whole words."""
        nested, blocks = self.nested_block_size, 4 * STEPS
        if nested is None or nested % blocks or self.block_size != BLOCK:
            return 1
        return 4 if self.k % (blocks * BLOCK) == 0 else 1

    # Shared memory: the table of pairs, then the following.

    @property
    def x_bytes(self) -> int:
        """A tile of x: 128 bytes of each row, of one step after the other."""
        return HALF * 128 * self.rows

    @property
    def slot_bytes(self) -> int:
        """Codes of a chunk: 128 bytes of each feature."""
        return self.features * CHUNK_BYTES

    @property
    def smem_offsets(self) -> dict[str, int]:
        """Where each part begins; "end" is the size of all."""
        cut = self.cut
        sizes = {
            "x": cut.stages * self.x_bytes,
            "codes": cut.slots * self.slot_bytes,
            "part": self.part_bytes if self.fetches else 0,
            "x full": 8 * cut.stages,
            "x empty": 8 * cut.stages,
            "codes full": 8 * cut.slots,
            "codes empty": 8 * cut.slots,
            "part full": 8,
            "left": 8,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += size
        return offsets | {"end": at}

    @property
    def total_smem_bytes(self) -> int:
        """All shared memory of a block of threads."""
        return TABLE_BYTES + self.smem_offsets["end"]

"""Words in which the kernels of this package are written below Pallas' own ops.

Pallas has no gather and no warps; `plgpu.inline_mgpu` lets a kernel say what one thread
does. These few names keep such code readable: integers with Python's operators, PTX
with typed results, loops over values.
"""

from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf

from pallas_kernels.decode import LaneOps


def ptx(text: str, *args, out: str = "", pure: bool = False) -> Any:
    """Emits PTX; `out` gives the results' types, one letter each (r: 32 bits, f)."""
    types = [
        ir.F32Type.get() if t == "f" else ir.IntegerType.get_signless(32) for t in out
    ]
    if not types:
        return mgpu_utils.inline_ptx(text, *args, has_side_effects=True)
    result = mgpu_utils.inline_ptx(
        text, *args, result_types=types, has_side_effects=not pure
    )
    return result[0] if len(types) == 1 else result


class Int:
    """A 32- or 64-bit integer of the kernel, with Python's operators."""

    def __init__(self, value):
        self.value = value

    def _other(self, x):
        if isinstance(x, Int):
            return x.value
        return arith.constant(self.value.type, x)

    def __add__(self, x):
        return Int(arith.addi(self.value, self._other(x)))

    def __sub__(self, x):
        return Int(arith.subi(self.value, self._other(x)))

    def __mul__(self, x):
        return Int(arith.muli(self.value, self._other(x)))

    def __floordiv__(self, x):
        return Int(arith.divui(self.value, self._other(x)))

    def __mod__(self, x):
        return Int(arith.remui(self.value, self._other(x)))

    def __xor__(self, x):
        return Int(arith.xori(self.value, self._other(x)))

    def __lt__(self, x):
        return arith.cmpi(arith.CmpIPredicate.ult, self.value, self._other(x))

    def __eq__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
        return arith.cmpi(arith.CmpIPredicate.eq, self.value, self._other(x))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def wide(self):
        """The same number in 64 bits."""
        return Int(arith.extui(ir.IntegerType.get_signless(64), self.value))

    def index(self):
        """The same number as MLIR's index type."""
        return arith.index_cast(ir.IndexType.get(), self.value)

    def min(self, x: int):
        """The smaller of the two."""
        return Int(arith.minui(self.value, self._other(x)))


def const(x: int) -> Int:
    """A 32-bit constant."""
    x -= 2**32 if x >= 2**31 else 0
    return Int(arith.constant(ir.IntegerType.get_signless(32), x))


def address(ref) -> Int:
    """The address of a ref: 64 bits in global memory, 32 bits in shared memory."""
    pointer = mgpu_utils.memref_ptr(ref)
    bits = 32 if mgpu_utils.is_smem_ref(ref) else 64
    return Int(llvm.ptrtoint(ir.IntegerType.get_signless(bits), pointer))


def loop(start, stop, step, carry, body):
    """`for i in range(start, stop, step): carry = body(i, carry)`, carry flat."""
    op = scf.ForOp(start.value, stop.value, step.value, list(carry))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(body(Int(op.induction_variable), list(op.inner_iter_args))))
    return list(op.results)


def roles(condition, yes, no) -> None:
    """As `branch`, where the two run at the same time and wait for each other."""
    branch(condition, yes, no)


def branch(condition, yes, no) -> None:
    """Each thread runs `yes` or `no`, functions that emit code; warps stay whole."""
    op = scf.IfOp(condition, has_else=True)
    regions = op.thenRegion, op.elseRegion
    for region, emit_code in zip(regions, (yes, no), strict=True):
        with ir.InsertionPoint(region.blocks[0]):
            emit_code()
            scf.YieldOp([])


def bit(condition):
    """A condition as a 32-bit integer, which PTX text can take."""
    return arith.extui(ir.IntegerType.get_signless(32), condition)


def thread_index() -> Int:
    """The number of this thread in its block."""
    i32 = ir.IntegerType.get_signless(32)
    return Int(arith.index_cast(i32, gpu.thread_id(gpu.Dimension.x)))


def block_index() -> Int:
    """The number of this block of threads."""
    return Int(ptx("mov.u32 $0, %ctaid.x;", out="r", pure=True))


def select(condition, yes: Int, no: Int) -> Int:
    """One of two integers."""
    return Int(arith.select(condition, yes.value, no.value))


def pick(condition, yes, no):
    """One of two values."""
    return arith.select(condition, yes, no)


def both(a, b):
    """Whether both conditions hold."""
    return arith.andi(a, b)


def zero():
    """The float32 0."""
    return arith.constant(ir.F32Type.get(), 0.0)


def to_bits(number):
    """The bits of a float32 as a 32-bit value."""
    return arith.bitcast(ir.IntegerType.get_signless(32), number)


def from_bits(bits):
    """The float32 of 32 bits."""
    return arith.bitcast(ir.F32Type.get(), bits)


def mma(half: str, a: list, b: list, c: list) -> list:
    """Returns c + a @ b, 16 rows by 16 columns by 8; `half` is "bf16" or "f16"."""
    return list(
        ptx(
            f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *a,
            *b,
            *c,
            out="ffff",
            pure=True,
        )
    )


def wgmma(half: str, a: list, descriptor: Int, c: list, adds: Int) -> list:
    """Starts c + a @ b of a warpgroup, 64 rows by 16 columns by two times len(c).

    Args:
        half: "bf16" or "f16".
        a: the four registers of this lane's fragment.
        descriptor: of b in shared memory, 64 bits; see `tile_descriptor`.
        c: what was accumulated, float32.
        adds: 0 if b's product replaces `c`.

    Returns:
        What `c` will be when `wgmma_wait` has returned.
    """
    count = len(c)
    names = [f"${i}" for i in range(2 * count, 2 * count + 6)]
    text = (
        f"{{.reg .pred p; setp.ne.b32 p, {names[5]}, 0; "
        f"wgmma.mma_async.sync.aligned.m64n{2 * count}k16.f32.{half}.{half} "
        f"{{{', '.join(f'${i}' for i in range(count))}}}, "
        f"{{{', '.join(names[:4])}}}, {names[4]}, p, 1, 1, 0;}}"
    )
    return _in_place(text, c, [*a, descriptor.value, adds.value], "rrrrlr")


def wgmma_fence(a: list) -> list:
    """Makes registers ready to be operands; returns them."""
    return _in_place("wgmma.fence.sync.aligned;", a, [], "")


def wgmma_commit() -> None:
    """Ends a group of products."""
    ptx("wgmma.commit_group.sync.aligned;")


def wgmma_wait(groups: int, c: list) -> list:
    """Waits until at most so many groups are under way; returns `c`.

    What is not returned from here must not be used.
    """
    return _in_place(f"wgmma.wait_group.sync.aligned {groups};", c, [], "")


def _in_place(text: str, values: list, inputs: list, letters: str) -> list:
    """Emits PTX that changes registers; `letters` are the constraints of the inputs."""
    kind = values[0].type
    out = ["=f" if isinstance(kind, ir.F32Type) else "=r"] * len(values)
    constraints = [*out, *map(str, range(len(values))), *letters]
    result = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * len(values)),
        [*values, *inputs],
        text,
        ",".join(constraints),
        has_side_effects=True,
        asm_dialect=0,
    )
    return [llvm.extractvalue(kind, result, [i]) for i in range(len(values))]


def tile_descriptor(where: Int) -> Int:
    """What wgmma takes for a tile of rows of 64 numbers, 128-byte swizzled.

    Args:
        where: its address in shared memory; 32 bytes further for each 16 columns.

    Returns:
        64 bits: the address, rows of eight 1024 bytes apart, the kind of swizzle.
    """
    return (where // 16).wide() + (1 << 62 | 1024 // 16 << 32 | 1 << 16)


def barrier() -> None:
    """Waits for all threads of the block."""
    gpu.barrier()


def tma_load(ctx, ref, layer: Int, row: Int, column: Int, shape, target, barrier, when):
    """Starts the copy of a window to shared memory, rows of 128 bytes, swizzled.

    Args:
        ctx: the launch context of the kernel.
        ref: [rows, columns] or [layers, rows, columns] in global memory.
        layer: which layer, if there are any.
        row: the first row of the window; rows past the end read zeros.
        column: its first column, likewise.
        shape: rows and columns of the window.
        target: the address in shared memory.
        barrier: the address of the mbarrier that the bytes are counted at.
        when: whether this thread starts the copy.
    """
    pointer = llvm.PointerType.get(3)
    window_type = ir.MemRefType.get(
        shape, ir.MemRefType(ref.type).element_type, memory_space=mgpu_utils.smem()
    )
    window = (
        mgpu_utils.DynamicSlice(row.index(), shape[0]),
        mgpu_utils.DynamicSlice(column.index(), shape[1]),
    )
    if len(ir.MemRefType(ref.type).shape) == 3:
        window = (layer.index(), *window)
    ctx.async_copy(
        src_ref=ref,
        dst_ref=mgpu_utils.ptr_as_memref(
            llvm.inttoptr(pointer, target.value), window_type
        ),
        gmem_slice=window,
        barrier=mgpu_utils.BarrierRef(
            llvm.inttoptr(pointer, barrier.value),
            const(0).value,
            None,  # pyright: ignore[reportArgumentType]
            1,
        ),
        swizzle=128,
        arrive=False,
        predicate=when,
    )


def lane_ops(dtype: str) -> LaneOps:
    """The operations of `decode` on values of this kernel."""
    return LaneOps(dtype)

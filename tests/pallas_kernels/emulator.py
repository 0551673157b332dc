"""Runs kernels written with `pallas_kernels.emit` on numpy arrays, without a GPU.

An `Emulator` has the functions of `emit`; put in its place, it makes a kernel's body
compute instead of emitting code. A block's threads run in lockstep, every value an
array over threads, and PTX text is interpreted. Each access must lie in its buffer,
each barrier be met by all threads. Asynchronous copies are done either at once, which
finds buffers refilled too early, or, `lazy`, only when they are waited for, which finds
waits that are missing. Roles (`emit.roles`) take turns, at mbarriers and, if `lazy`, at
every arrival; what wgmma reads must stay as it is until wgmma is waited for.
"""

import contextlib
import re
from typing import Any

import numpy as np

from pallas_kernels import emit
from tests.pallas_kernels.arithmetic import HALVES, compute, typed
from tests.pallas_kernels.turns import Turns
from tests.pallas_kernels.values import Int, NumpyOps, Ref

_SHARED_BASE = 1024


class Emulator:
    """Stands in for the module `emit` while one block of threads runs."""

    Int = Int
    # Nothing but PTX: the test puts `ptx` below in the place of the module's.
    mma = staticmethod(emit.mma)

    def __init__(self, threads: int, block: int, refs: dict[str, Any], lazy=False):
        """Prepares a block.

        Args:
            threads: how many it has.
            block: its number in the grid.
            refs: arrays in global memory, or sizes in bytes of shared memory.
            lazy: whether asynchronous copies wait until they are waited for.
        """
        self.threads, self.block, self.lazy = threads, block, lazy
        self.uncommitted: list[Any] = []  # copies: a function of which threads
        self.groups: list[list[Any]] = []
        self.announced: list[Any] = []  # barriers, threads, copies
        self.waits: dict[int, int] = {}
        self.turns: Turns | None = None
        self.counted: dict[int, list[int]] = {}  # mbarriers: arrivals, left, phases
        self.expected: dict[int, int] = {}  # mbarriers: bytes that have not come
        self.products: list[Any] = []  # of groups under way: addresses, bytes
        self.started: list[Any] = []
        self.mask = np.ones(threads, bool)
        self.refs, self.buffers = {}, []
        shared = _SHARED_BASE
        for i, (name, value) in enumerate(refs.items(), start=1):
            if isinstance(value, int):
                poison = np.full(value, 0xFF, np.uint8)
                self.refs[name] = Ref(poison, shared, True)
                shared += -(-value // 1024) * 1024
            else:
                self.refs[name] = Ref(value, i << 40, False)
            self.buffers.append(self.refs[name])

    # What `emit` has.

    def const(self, x: int) -> Int:
        return Int(np.full(self.threads, x % 2**32, np.uint32))

    def address(self, ref: Ref) -> Int:
        dtype = np.uint32 if ref.shared else np.uint64
        return Int(np.full(self.threads, ref.base, dtype))

    def thread_index(self) -> Int:
        return Int(np.arange(self.threads, dtype=np.uint32))

    def block_index(self) -> Int:
        return self.const(self.block)

    def bit(self, condition):
        return condition.astype(np.uint32)

    def both(self, a, b):
        return a & b

    def select(self, condition, yes: Int, no: Int) -> Int:
        return Int(np.where(condition, yes.value, no.value))

    def pick(self, condition, yes, no):
        return np.where(condition, yes, no)

    def lane_ops(self, dtype):
        return NumpyOps(dtype)

    def zero(self):
        return np.zeros(self.threads, np.float32)

    def to_bits(self, number):
        return number.view(np.uint32)

    def from_bits(self, bits):
        return bits.view(np.float32)

    def barrier(self):
        if self.turns:
            self.turns.meet()
        else:
            assert self.mask.all(), "a barrier that not all threads meet"

    def roles(self, condition, yes, no):
        roles = [(self.mask & condition, yes), (self.mask & ~condition, no)]
        if self.turns:
            self.turns.run(roles)
            return
        state = "mask", "groups", "uncommitted", "products", "started"
        self.turns = Turns(self, state)
        self.turns.run(roles)
        self.turns = None

    def branch(self, condition, yes, no):
        for mask, body in ((condition, yes), (~condition, no)):
            if (self.mask & mask).any():
                with self._masked(self.mask & mask):
                    body()

    def tile_descriptor(self, where):
        return (where // 16).wide() + (1 << 62 | 1024 // 16 << 32 | 1 << 16)

    def wgmma_fence(self, a):
        return a

    def wgmma_commit(self):
        self.products.append(self.started)
        self.started = []

    def wgmma_wait(self, groups, c):
        done = self.products[: len(self.products) - groups]
        self.products = self.products[len(done) :]
        for at, octets in (product for group in done for product in group):
            assert (self._read(at, 16) == octets).all(), "written over while it is read"
        return c

    def wgmma(self, half, a, descriptor, c, adds):
        """Products of the warpgroups that are here, of a tile in shared memory."""
        groups = self.mask.reshape(-1, 128)
        assert (groups.any(1) == groups.all(1)).all(), "a part of a warpgroup"
        half, n = HALVES[half], 2 * len(c)
        c = [number.copy() for number in c]
        w, g, t = (np.arange(128) // 32, np.arange(128) % 32 // 4, np.arange(128) % 4)
        for i in np.flatnonzero(groups.any(1)):
            lanes = slice(128 * i, 128 * (i + 1))
            A = np.zeros((64, 16), np.float32)
            for j, register in enumerate(a):
                pair = register[lanes].copy().view(half).reshape(128, 2)
                for e in range(2):
                    row, column = 16 * w + g + 8 * (j % 2), 2 * t + 8 * (j // 2) + e
                    A[row, column] = pair[:, e]
            described = set(descriptor.value[lanes].tolist())
            assert len(described) == 1, "not one tile"
            where = described.pop()
            assert where >> 14 == (1 << 62 | 64 << 32 | 1 << 16) >> 14
            row, piece = np.divmod(np.arange(2 * n), 2)
            at = (where & 0x3FFF) * 16 + row // 8 * 1024 + row % 8 * 128 + piece * 16
            at = at ^ (at >> 7 & 7) << 4
            octets = self._read(at, 16)
            self.started.append((at, octets.copy()))
            B = octets.reshape(-1).view(half).reshape(n, 16).astype(np.float32)
            with np.errstate(all="ignore"):
                product = A @ B.T
            for j, number in enumerate(c):
                row, column = 16 * w + g + 8 * (j // 2 % 2), j // 4 * 8 + 2 * t + j % 2
                before = np.where(adds.value[lanes] != 0, number[lanes], 0)
                number[lanes] = before + product[row, column]
        return c

    def loop(self, start, stop, step, carry, body):
        i, carry = start.value.copy(), list(carry)
        while True:
            active = self.mask & (i < stop.value)
            if not active.any():
                return carry
            with self._masked(active):
                new = list(body(Int(i), list(carry)))
            carry = [np.where(active, n, c) for n, c in zip(new, carry, strict=True)]
            i = np.where(active, i + step.value, i)

    def tma_load(self, ctx, ref, layer, row, column, shape, target, barrier, when):
        del ctx

        def copy(threads):
            for thread in np.flatnonzero(threads):
                source = ref.bytes.reshape(*ref.shape[:-1], -1)
                if len(ref.shape) == 3:
                    source = source[layer.value[thread]]
                r, c = int(row.value[thread]), int(column.value[thread])
                c, width = c * ref.item_bytes, shape[1] * ref.item_bytes
                window = np.zeros((shape[0], width), np.uint8)
                part = source[r : r + shape[0], c : c + width]
                window[: part.shape[0], : part.shape[1]] = part
                start = int(target.value[thread])
                assert start % 1024 == 0 and width == 128, "the swizzle repeats so"
                i, j = np.divmod(np.arange(8 * shape[0]), 8)
                self._write(start + 128 * i + 16 * (j ^ i % 8), window.reshape(-1, 16))

        if self.lazy:
            self.announced.append([barrier.value, when & self.mask, [copy]])
        else:
            copy(when & self.mask)
        if self.turns:
            mine, size = when & self.mask, shape[0] * shape[1] * ref.item_bytes
            self._arrive_bytes(barrier.value, mine, size)

    # Memory.

    @contextlib.contextmanager
    def _masked(self, mask):
        before, self.mask = self.mask, mask
        try:
            yield
        finally:
            self.mask = before

    def _find(self, addresses, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer of all addresses, and for each the places of `size` bytes."""
        addresses = np.atleast_1d(addresses).astype(np.int64)
        for ref in self.buffers:
            at = addresses - ref.base
            if np.all((at >= 0) & (at + size <= ref.bytes.size)):
                assert size not in (2, 4, 8, 16) or not np.any(at % size), "misaligned"
                return ref.bytes, at[:, None] + np.arange(size)
        raise AssertionError(f"{size} bytes at {addresses} do not lie in one buffer")

    def _read(self, addresses, size: int) -> np.ndarray:
        memory, at = self._find(addresses, size)
        return memory[at]

    def _write(self, addresses, data: np.ndarray):
        memory, at = self._find(addresses, data.shape[-1])
        memory[at] = data

    # PTX.

    def ptx(self, text: str, *args, out: str = "", pure: bool = False):
        """Interprets PTX text over all threads."""
        del pure
        outs = [np.zeros(self.threads, np.uint32) for _ in out]
        registers: dict[str, np.ndarray] = {}
        predicates: dict[str, np.ndarray] = {}
        inputs = [a.view(np.uint32) if a.dtype == np.float32 else a for a in args]

        def read(name):
            name = name.strip()
            if name.startswith("$"):
                i = int(name[1:])
                return outs[i] if i < len(outs) else inputs[i - len(outs)]
            if name.startswith("0f"):
                return np.full(self.threads, int(name[2:], 16), np.uint32)
            if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", name):
                return np.full(self.threads, int(name, 0) % 2**32, np.uint32)
            return registers.setdefault(name, np.zeros(self.threads, np.uint32))

        def write(name, value, mask):
            name = name.strip()
            value = value.view(np.uint32) if value.dtype == np.float32 else value
            if name.startswith("$"):
                i = int(name[1:])
                outs[i] = np.where(mask, value, outs[i]).astype(np.uint32)
            else:
                registers[name] = np.where(mask, value, read(name)).astype(np.uint32)

        for statement in (
            text.replace("{:uid}", "").strip().removeprefix("{").split(";")
        ):
            statement = statement.strip().removesuffix(
                "}" if "{" not in statement else ""
            )
            statement = statement.split(": ")[-1].strip()
            if not statement or statement.startswith(".reg"):
                continue
            mask = self.mask
            if match := re.match(r"@(!?)(\w+)\s+", statement):
                predicate = predicates[match[2]]
                mask = mask & (~predicate if match[1] else predicate)
                statement = statement[match.end() :]
            opcode, _, rest = statement.partition(" ")
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            self._step(opcode.split("."), operands, mask, read, write, predicates)
        results = [
            o.view(np.float32) if t == "f" else o
            for o, t in zip(outs, out, strict=True)
        ]
        return results[0] if len(results) == 1 else tuple(results)

    def _step(self, op, operands, mask, read, write, predicates):
        """One instruction."""
        kind = op[0]
        if op[0] == "mbarrier" and op[1] in ("try_wait", "test_wait"):
            barrier, parity = read(operands[1].strip("[]")), read(operands[2])
            wait = self._wait_counted if self.turns else self._wait
            if not mask.any():
                return
            over = True
            if self.turns and op[1] == "test_wait":  # one that does not wait
                phase = self.counted[barrier[mask][0]][2]
                over = phase % 2 != parity[mask][0]
            if over:
                wait(barrier, parity, mask)
            before = predicates.get(operands[0], np.ones(self.threads, bool))
            predicates[operands[0]] = np.where(mask, over, before)
        elif kind == "mbarrier" and op[1] == "init":
            self._count(self._address(operands[0], read), mask, int(operands[1]))
        elif op[:3] == ["mbarrier", "arrive", "expect_tx"]:
            sizes = read(operands[2])[mask].tolist()
            where = self._address(operands[1], read)[mask].tolist()
            self.expected.update(zip(where, sizes, strict=True))
        elif op[:3] == ["mbarrier", "arrive", "shared::cta"]:
            self._count(self._address(operands[1], read), mask)
        elif kind == "bra":
            assert not mask.any(), "it would wait forever"
        elif kind == "wgmma" and op[1] == "wait_group":
            self.wgmma_wait(int(operands[0]), [])
        elif kind in ("mbarrier", "fence", "bar", "setmaxnreg"):
            pass
        elif kind == "red":
            self._reduce(operands, mask, read)
        elif op[:3] == ["cp", "async", "bulk"]:
            self._copy_bulk(operands, mask, read)
        elif op[:2] == ["cp", "async"]:
            self._copy_async(op, operands, mask, read)
        elif kind in ("ld", "st"):
            self._access(op, operands, mask, read, write)
        elif kind == "setp":
            a, b = (typed(read(o), op[2]) for o in operands[1:])
            compare = {
                "eq": np.equal,
                "ne": np.not_equal,
                "lt": np.less,
                "gt": np.greater,
            }
            predicates[operands[0]] = compare[op[1]](a, b)
        elif kind == "selp":
            chosen = [read(o) for o in operands[1:3]]
            write(operands[0], np.where(predicates[operands[3]], *chosen), mask)
        elif kind == "redux":
            value = read(operands[1]).reshape(-1, 32)
            assert (mask.reshape(-1, 32).any(1) == mask.reshape(-1, 32).all(1)).all()
            highest = np.broadcast_to(value.max(1, keepdims=True), value.shape)
            write(operands[0], highest.reshape(-1), mask)
        elif kind == "shfl":
            value = read(operands[1]).reshape(-1, 32)
            warps = mask.reshape(-1, 32)
            assert (warps.any(1) == warps.all(1)).all(), "a shuffle of half a warp"
            source = read(operands[2]).reshape(-1, 32).astype(np.int64)
            if op[2] == "bfly":
                source = np.arange(32) ^ source
            else:  # a lane of one's own segment
                segment = read(operands[3]).reshape(-1, 32).astype(np.int64) >> 8 & 31
                source = np.arange(32) & segment | source & ~segment & 31
            shuffled = np.take_along_axis(value, source, 1)
            write(operands[0], shuffled.reshape(-1), mask)
        elif kind == "ldmatrix":
            self._load_matrices(op, operands, mask, read, write)
        elif kind == "mma":
            self._mma(op, operands, mask, read, write)
        elif kind == "mov" and operands[0].startswith("{"):
            low, high = operands[0].strip("{}").split(",")
            value = read(operands[1])
            write(low, value & np.uint32(0xFFFF), mask)
            write(high, value >> np.uint32(16), mask)
        else:
            values = [read(o) for o in operands[1:]]
            write(operands[0], compute(op, values), mask)

    def _access(self, op, operands, mask, read, write):
        """Loads and stores of one to four registers."""
        vector, place = operands if op[0] == "ld" else operands[::-1]
        names = vector.strip("{}").split(",")
        size = {"u8": 1, "b8": 1, "b16": 2}.get(op[-1], 4)
        base, _, offset = place.strip("[]").partition("+")
        address = read(base).astype(np.uint64) + np.uint64(int(offset or 0))
        if not mask.any():
            return
        if op[0] == "st":
            words = np.stack([read(n) for n in names], -1)[mask]
            octets = np.ascontiguousarray(words).view(np.uint8)
            octets = octets.reshape(len(words), len(names), 4)[..., :size]
            self._write(address[mask], octets.reshape(len(words), -1))
            return
        octets = np.zeros((self.threads, len(names), 4), np.uint8)
        loaded = self._read(address[mask], size * len(names))
        octets[mask, :, :size] = loaded.reshape(-1, len(names), size)
        for i, name in enumerate(names):
            word = np.ascontiguousarray(octets[:, i]).view(np.uint32)[:, 0]
            write(name, word, mask)

    def _copy_async(self, op, operands, mask, read):
        """`cp.async` and how it is waited for."""
        everyone = np.ones(self.threads, bool)

        def address(place):
            return self._address(place, read)

        if op[2] == "commit_group":
            self.groups.append(self.uncommitted)
            self.uncommitted = []
        elif op[2] in ("wait_group", "wait_all"):
            left = int(operands[0]) if operands else 0
            done = self.groups[: len(self.groups) - left]
            self.groups = self.groups[len(done) :]
            if op[2] == "wait_all":
                done, self.uncommitted = [*done, self.uncommitted], []
            for copy in (copy for group in done for copy in group):
                copy(everyone)
        elif op[2] == "mbarrier":
            barrier = read(operands[0].strip("[]"))
            self.announced.append([barrier, mask.copy(), list(self.uncommitted)])
        else:
            size = int(operands[2])
            target, source = (address(o) for o in operands[:2])
            sizes = read(operands[-1]).copy()
            left = mask.copy()  # a group and a barrier may both wait for it

            def copy(threads):
                now = left & threads
                left[now] = False
                given = now & (sizes > 0)
                if now.any():
                    self._write(target[now], np.zeros((now.sum(), size), np.uint8))
                if given.any():
                    self._write(target[given], self._read(source[given], size))

            if self.lazy:
                self.uncommitted.append(copy)
            else:
                copy(everyone)

    def _copy_bulk(self, operands, mask, read):
        """A copy on end to shared memory, which a counting mbarrier waits for."""
        target, source = (self._address(o, read) for o in operands[:2])
        barrier, size = read(operands[3].strip("[]")), int(operands[2])

        def copy(threads):
            for thread in np.flatnonzero(threads):
                assert target[thread] % 16 == source[thread] % 16 == 0, "misaligned"
                data = self._read(source[thread], size)
                self._write(target[thread], data)

        if self.lazy:
            self.announced.append([barrier, mask.copy(), [copy]])
        else:
            copy(mask)
        self._arrive_bytes(barrier, mask, size)

    def _reduce(self, operands, mask, read):
        """Adds to words of memory, thread after thread."""
        address, more = read(operands[0].strip("[]")), read(operands[1])
        for thread in np.flatnonzero(mask):
            word = self._read(address[thread], 4).reshape(-1).copy().view(np.uint32)
            word += more[thread]
            self._write(address[thread], word.view(np.uint8)[None])

    @staticmethod
    def _address(place, read):
        base, _, offset = place.strip("[]").partition("+")
        base = read(base)
        return base + base.dtype.type(offset or 0)

    def _count(self, barrier, mask, count: int | None = None):
        """Prepares counting mbarriers, or counts arrivals at them."""
        for address in barrier[mask].tolist():
            if count is not None:
                self.counted[address] = [count, count, 0]
                continue
            barrier = self.counted[address]
            barrier[1] -= 1
            if not barrier[1]:
                barrier[1:] = barrier[0], barrier[2] + 1
        if count is None and self.turns:
            self.turns.idle = 0
            if self.lazy:
                self.turns.give()

    def _arrive_bytes(self, barrier, mask, size: int):
        """Counts an arrival when all bytes that were announced at it have come."""
        for address in barrier[mask].tolist():
            self.expected[address] -= size
            assert self.expected[address] >= 0, "more bytes than announced"
            if not self.expected[address]:
                self._count(np.array([address]), np.array([True]))

    def _wait_counted(self, barrier, parity, mask):
        """Lets others run until the phase of that parity is over."""
        (barrier,), (parity,) = (set(v[mask].tolist()) for v in (barrier, parity))
        assert self.turns
        while self.counted[barrier][2] % 2 == parity:
            self.turns.give(waits=True)
        for announced in self.announced:
            threads = announced[1] & (announced[0] == barrier)
            for copy in announced[2]:
                copy(threads)
            announced[1] = announced[1] & ~threads

    def _wait(self, barrier, parity, mask):
        """Waits for what was announced at a barrier."""
        for one in np.unique(barrier[mask]).tolist():
            waits = self.waits[one] = self.waits.get(one, 0) + 1
            mine = mask & (barrier == one)
            assert (parity[mine] == (waits - 1) % 2).all(), "the wrong phase"
            for announced in self.announced:
                threads = announced[1] & (announced[0] == one)
                for copy in announced[2]:
                    copy(threads)
                announced[1] = announced[1] & ~threads

    def _load_matrices(self, op, operands, mask, read, write):
        """ldmatrix.x4: lane 8 i + j gives the address of row j of matrix i."""
        assert mask.all(), "an ldmatrix that not all threads meet"
        address = read(operands[1].strip("[]")).reshape(-1, 32)
        rows = self._read(address.reshape(-1), 16).view(np.uint16)
        matrices = rows.reshape(-1, 4, 8, 8)
        if "trans" in op:
            matrices = matrices.swapaxes(2, 3)
        words = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, 4, 32)
        for i, name in enumerate(operands[0].strip("{}").split(",")):
            write(name, words[:, i].reshape(-1), mask)

    def _mma(self, op, operands, mask, read, write):
        """m16n8k16 with float32 accumulators."""
        assert (
            mask.reshape(-1, 32).any(1).tolist() == mask.reshape(-1, 32).all(1).tolist()
        )
        half = HALVES[op[-2]]
        d, a, b, c = ([n.strip() for n in o.strip("{}").split(",")] for o in operands)
        warps = self.threads // 32
        g, t = np.arange(32) // 4, np.arange(32) % 4

        def pairs(name):
            return (
                read(name)
                .view(np.uint16)
                .view(half)
                .astype(np.float32)
                .reshape(warps, 32, 2)
            )

        A = np.zeros((warps, 16, 16), np.float32)
        for i, name in enumerate(a):
            for e in range(2):
                A[:, g + 8 * (i % 2), 2 * t + 8 * (i // 2) + e] = pairs(name)[:, :, e]
        B = np.zeros((warps, 16, 8), np.float32)
        for i, name in enumerate(b):
            for e in range(2):
                B[:, 2 * t + 8 * i + e, g] = pairs(name)[:, :, e]
        with np.errstate(all="ignore"):
            product = A @ B
        for i, (to, add) in enumerate(zip(d, c, strict=True)):
            part = product[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1)
            write(to, part + read(add).view(np.float32), mask)

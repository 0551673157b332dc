"""The Hopper kernel: a block's warpgroups; `matmul_sm90` tells the design."""

# What `inline_mgpu` returns and the transforms are, Pallas does not say in types.
# pyright: reportCallIssue=false, reportAbstractUsage=false
# pyright: reportPrivateImportUsage=false

import functools
import itertools

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import matmul_sm90_consumer as consumer
from pallas_kernels import matmul_sm90_lanes as lanes
from pallas_kernels.matmul_sm90_consumer import OUT_ROWS, swizzled
from pallas_kernels.matmul_sm90_lanes import (
    CODES_BYTES,
    LANES,
    SPAN,
    SPAN_STEPS,
    STEP,
    STEP_WORDS,
    TABLE_BYTES,
)
from pallas_kernels.matmul_sm90_loader import Codes, Scales
from pallas_kernels.matmul_sm90_onto import Onto
from pallas_kernels.matmul_sm90_parts import add_rows, arrive, leave_rows, meet, wait
from pallas_kernels.matmul_sm90_schedule import Schedule

# Features of a block; a warpgroup of consumers has half of them.
TILE_FEATURES = 128
# Spans of codes and scales in shared memory: one read, others on their way.
CODE_STAGES = 3
# Tiles of results in shared memory, of a consumer.
OUT_SLOTS = 2
# A lane of each of the three warpgroups brings 168.
LOADER_REGISTERS = 56
CONSUMER_REGISTERS = 224


def scratch(dtype, spec, config) -> dict:
    """Shared memory and barriers of a block."""
    if config.cluster > 1:
        x_empty = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=2, num_barriers=config.stages
        )
    else:
        x_empty = plgpu.Barrier(num_arrivals=2, num_barriers=config.stages)
    table = {}
    if config.permuted < STEP_WORDS:
        table = dict(
            table_smem=plgpu.SMEM((TABLE_BYTES // 4,), jnp.uint32),
            # each consumer writes half of it
            table_full=plgpu.Barrier(num_arrivals=2),
        )
    numbers = {}
    if spec.nested_codebook is not None:
        numbers = dict(numbers_smem=plgpu.SMEM((256,), jnp.float32))
    return (table | numbers) | dict(
        x_smem=plgpu.SMEM(
            (config.stages, config.tile_m, STEP), dtype, transforms=swizzled()
        ),
        codes_smem=plgpu.SMEM((CODE_STAGES, CODES_BYTES // 4), jnp.uint32),
        # pairs of 16-bit scales: see `Scales.put`
        scales_smem=plgpu.SMEM((CODE_STAGES, 2 * LANES), jnp.uint32),
        out_smem=plgpu.SMEM((2, OUT_SLOTS, OUT_ROWS, 64), dtype, transforms=swizzled()),
        x_full=plgpu.Barrier(num_barriers=config.stages),
        x_empty=x_empty,
        codes_full=plgpu.Barrier(num_barriers=CODE_STAGES),
        codes_empty=plgpu.Barrier(num_arrivals=2, num_barriers=CODE_STAGES),
    )


def body(
    pairs_gmem,
    x_gmem,
    codes_gmem,
    *refs,
    forward,
    spec,
    config,
    stacked,
    tail,
    added,
    **s,
):
    """What a block does; all refs but `s`, the scratch, are in device memory.

    `stacked` says whether a layer is chosen of a stack of weights; `tail` is how many
    steps an addend has, after those of the weight; `added`, whether there is an array
    that results are added to.
    """
    layer = jnp.int32(0)
    if stacked:
        # Nothing else can be loaded before it is there, 0.6 us later.
        layer_gmem, *refs = refs
        layer = layer_gmem[0]
    if tail:
        t_gmem, u_gmem, *refs = refs
    if added:
        onto_gmem, *refs = refs
    if config.divided:
        counters_gmem, *scales_gmem, out_gmem, parts_gmem = refs
    else:
        *scales_gmem, out_gmem = refs
    m, contraction = x_gmem.shape
    dtype = jnp.dtype(x_gmem.dtype)
    tile_m = config.tile_m
    tiles = (
        pl.cdiv(m, tile_m),
        pl.cdiv(out_gmem.shape[1], TILE_FEATURES * config.cluster),
    )
    schedule = Schedule(
        tiles[0] * tiles[1],
        pl.cdiv(contraction, SPAN),
        lax.axis_size("sm"),
        config.divided,
    )
    x_smem, codes_smem, scales_smem, out_smem = (
        s[f"{name}_smem"] for name in ("x", "codes", "scales", "out")
    )
    onto = None
    if added:
        features = TILE_FEATURES * config.cluster
        covered = onto_gmem.shape[0] % tile_m == onto_gmem.shape[1] % features == 0
        onto = Onto(onto_gmem, tile_m, TILE_FEATURES, covered)
    wg = lax.axis_index("wg")
    worker = lax.axis_index("sm")

    def place(tile):
        """First row and first feature of a tile."""
        mi, fi = plgpu.planar_snake(
            tile, tiles, 0 if config.raster == "rows" else 1, config.raster_width
        )
        if config.cluster > 1:
            fi = fi * config.cluster + lax.axis_index("cluster")
        return mi * tile_m, fi * TILE_FEATURES

    def slot(count, stages):
        return lax.rem(count, jnp.int32(stages))

    def next_slot(at):
        """After a slot of codes: division by three takes a dozen instructions."""
        return jnp.where(at == CODE_STAGES - 1, 0, at + 1)

    def first_step(count, index):
        """A worker's count of steps at a span of one of its segments."""
        if not tail:
            return count * SPAN_STEPS
        return count * SPAN_STEPS + schedule.ends_before(worker, index) * tail

    def load():
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        codes = Codes(forward, spec, codes_gmem)
        scales = Scales(forward, spec, dtype.name, scales_gmem)
        total = schedule.total(worker)
        # Spans of x for which there is room at once, if each may be a tile's last.
        lead = config.stages // SPAN_STEPS
        if tail:
            lead = 1 if SPAN_STEPS + tail <= config.stages else 0

        def start(index):
            # Beyond the last segment anything will do: it is loaded but never used.
            index = jnp.minimum(index, schedule.segments(worker) - 1)
            seg = schedule.segment(worker, jnp.maximum(index, 0))
            m0, f0 = place(jnp.minimum(seg.tile, schedule.tiles - 1))
            return m0, f0, seg.first, seg.first + seg.length, index

        def advance(position):
            m0, f0, i, end, index = position
            return lax.cond(
                i + 1 < end,
                lambda: (m0, f0, i + 1, end, index),
                lambda: start(index + 1),
            )

        def read(position):
            _, f0, i, *_ = position
            raw = codes.load(layer, f0, i), scales.load(layer, f0, i)
            return raw, advance(position)

        def put(at, raw):
            plgpu.barrier_wait(s["codes_empty"].at[at])
            codes.put(raw[0], codes_smem.at[at])
            scales.put(raw[1], offset, scales_smem.at[at], *numbers)
            plgpu.barrier_arrive(s["codes_full"].at[at])

        def copy_step(source, step, m0, column):
            at = slot(step, config.stages)
            plgpu.barrier_wait(s["x_empty"].at[at])
            plgpu.copy_gmem_to_smem(
                source.at[
                    pl.ds(pl.multiple_of(m0, tile_m), tile_m),
                    pl.ds(column, STEP),
                ],
                x_smem.at[at],
                s["x_full"].at[at],
                collective_axes="cluster" if config.cluster > 1 else None,
            )

        def copy_x(count, position):
            m0, f0, i, end, index = position
            step = first_step(count, index)
            for half in range(SPAN_STEPS):
                column = pl.multiple_of(i * SPAN + half * STEP, STEP)
                copy_step(x_gmem, step + half, m0, column)
            if tail:

                @pl.when((i + 1 == end) & (end == schedule.spans))
                def _():
                    for j in range(tail):
                        copy_step(t_gmem, step + SPAN_STEPS + j, m0, j * STEP)

            if onto is not None:
                # Some spans before it is read.
                pl.when(i + 1 == end)(functools.partial(onto.prefetch, m0, f0))
            return advance(position)

        # All that is needed first is on its way before anything is waited for.
        here = start(jnp.int32(0))
        offset = scales.offset(layer)
        table = scales.load_numbers()
        first, position = read(here)
        x_position = lax.fori_loop(0, jnp.minimum(lead, total), copy_x, here)
        numbers = ()
        if table is not None:
            numbers = (s["numbers_smem"],)
            scales.put_numbers(table, *numbers)
            plgpu.commit_smem()
        put(jnp.int32(0), first)
        second, position = read(position)
        third, position = read(position)
        put(jnp.int32(1), second)

        def put_next(position, at, raw):
            # A consumer decodes a step ahead, and what is read now is put a span later:
            # it is on its way while this warpgroup waits for room for x.
            put(at, raw)
            raw, position = read(position)
            return position, next_slot(at), raw

        def span(count, carry):
            x_position, *rest = carry
            rest = put_next(*rest)
            return copy_x(count + lead, x_position), *rest

        more = jnp.maximum(total - lead, 0)
        carry = x_position, position, jnp.int32(2), third
        _, *rest = lax.fori_loop(0, more, span, carry)
        lax.fori_loop(more, total - 1, lambda _, rest: put_next(*rest), tuple(rest))

        if config.cluster > 1:
            # A block must not end before its neighbour has released everything.
            for i in range(config.stages):
                plgpu.barrier_wait(s["x_empty"].at[i])

    def consume():
        plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
        for i in range(config.stages):
            plgpu.barrier_arrive(s["x_empty"].at[i])
        for i in range(CODE_STAGES):
            plgpu.barrier_arrive(s["codes_empty"].at[i])
        decoders = [lanes.Permute(spec.codebook, dtype.name)] * config.permuted
        decoders += [lanes.Table()] * (STEP_WORDS - config.permuted)
        table = ()
        if config.permuted < STEP_WORDS:
            table = (s["table_smem"],)
            consumer.write_table(pairs_gmem, *table, wg)
            plgpu.barrier_arrive(s["table_full"])
            plgpu.barrier_wait(s["table_full"])

        def fetch(at, half):
            if half == 0:
                plgpu.barrier_wait(s["codes_full"].at[at])
            raw = consumer.fetch_step(
                forward, half, codes_smem.at[at], scales_smem.at[at], wg
            )
            if half == 1:
                plgpu.barrier_arrive(s["codes_empty"].at[at])
            return raw

        def look_up(words):
            return consumer.look_up(decoders, dtype, words, table)

        def scale(pairs, scales):
            return consumer.scale(forward, dtype, pairs, scales)

        def release(step, predicate=None):
            at = slot(step + config.stages, config.stages)
            plgpu.barrier_arrive(s["x_empty"].at[at], predicate=predicate)

        chunks = [(i, OUT_ROWS) for i in range(0, tile_m, OUT_ROWS)]

        def ask(rows, m0, f0):
            """Starts loads of what some rows of a tile are added to."""
            return () if onto is None else (onto.load(rows, m0, f0, wg),)

        def write_rows(y, rows, m0, f0, words):
            first, count = rows
            out = out_smem.at[wg, first // count % OUT_SLOTS]
            plgpu.wait_smem_to_gmem(OUT_SLOTS - 1, wait_read_only=True)
            consumer.store_rows(dtype, y, first, words, out)
            plgpu.commit_smem()
            place = pl.ds(m0 + first, count), pl.ds(f0 + wg * 64, 64)
            plgpu.copy_smem_to_gmem(out, out_gmem.at[*place])

        def write_tile(y, m0, f0, words):
            for rows, after in itertools.zip_longest(chunks, chunks[1:]):
                # On its way while the rows before are written.
                later = ask(after, m0, f0) if after else ()
                write_rows(y, rows, m0, f0, words)
                words = later

        def exchange(y, seg, m0, f0):
            """Gives the others of a tile their rows, and adds up and writes its own."""
            place = seg.tile - schedule.whole
            first, count = place * schedule.parts, jnp.int32(schedule.parts)
            mine = worker - first
            owners = [schedule.owner(i, len(chunks)) for i in range(len(chunks))]
            for owner, rows in zip(owners, chunks, strict=True):
                give = functools.partial(leave_rows, y, rows, worker, wg, parts_gmem)
                pl.when(mine != owner)(give)
            meet(place, count, wg, counters_gmem)
            for owner, rows in zip(owners, chunks, strict=True):

                @pl.when(mine == owner)
                def _(rows=rows):
                    words = ask(rows, m0, f0)
                    total = add_rows(y, rows, (first, mine, count), wg, parts_gmem)
                    write_rows(total, rows, m0, f0, words)

            # Not every slot had its turn.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def collect(y, seg, m0, f0):
            """Leaves a part of a tile, or adds up what others left and writes it."""
            shares = schedule.shares(worker, seg)

            def give():
                leave_rows(y, (0, tile_m), worker, wg, parts_gmem)
                arrive(shares.place, wg, counters_gmem)

            def take():
                wait(shares.place, shares.others, wg, counters_gmem)
                workers = worker, jnp.int32(0), shares.others + 1
                for rows in chunks:
                    words = ask(rows, m0, f0)
                    total = add_rows(y, rows, workers, wg, parts_gmem)
                    write_rows(total, rows, m0, f0, words)

            lax.cond(shares.leaves, give, take)

        def segment(index, carry):
            seg = schedule.segment(worker, index)
            m0, f0 = place(seg.tile)
            start = first_step(seg.start, index)

            @functools.partial(pl.run_scoped, acc=plgpu.ACC((64, tile_m), jnp.float32))
            def last(acc):
                def multiply(w, step):
                    at = slot(step, config.stages)
                    plgpu.barrier_wait(s["x_full"].at[at])
                    plgpu.wgmma(acc, w, x_smem.at[at].T)

                def step_and_next(w, step, raw, predicate=None):
                    """Starts a product; returns the operand of the next one."""
                    words, scales = raw
                    multiply(w, step)
                    # Numbers are looked up while two products are under way. But their
                    # registers as an operand are those of the first one.
                    pairs = look_up(words)
                    plgpu.wgmma_wait(1)
                    release(step - 1, predicate)
                    return scale(pairs, scales)

                def span(i, carry):
                    w, at = carry
                    step = start + i * SPAN_STEPS
                    w = step_and_next(w, step, fetch(at, 1), i > 0)
                    # After the last one of all too: codes of some tile, never used.
                    at = next_slot(at)
                    return step_and_next(w, step + 1, fetch(at, 0)), at

                last = lax.fori_loop(0, seg.length, span, carry)
                end = start + seg.length * SPAN_STEPS

                def finish():
                    plgpu.wgmma_wait(0)
                    release(end - 1)

                def finish_with_tail():
                    for j in range(tail):
                        # On its way while the step before is multiplied.
                        words = consumer.load_tail(u_gmem, f0, wg, j)
                        plgpu.wgmma_wait(0)
                        release(end + j - 1)
                        multiply(consumer.tail_operand(dtype, words), end + j)
                    plgpu.wgmma_wait(0)
                    release(end + tail - 1)

                words = () if schedule.cut else ask(chunks[0], m0, f0)
                if tail and schedule.cut:
                    is_last = seg.first + seg.length == schedule.spans
                    lax.cond(is_last, finish_with_tail, finish)
                else:
                    (finish_with_tail if tail else finish)()
                y = acc[...]

                if not schedule.cut:
                    write_tile(y, m0, f0, words)
                elif schedule.parts > 1:
                    lax.cond(
                        seg.length < schedule.spans,
                        lambda: exchange(y, seg, m0, f0),
                        lambda: write_tile(y, m0, f0, ask(chunks[0], m0, f0)),
                    )
                else:
                    collect(y, seg, m0, f0)
                return last

            return last

        first = jnp.int32(0)
        words, scales = fetch(first, 0)
        carry = scale(look_up(words), scales), first
        lax.fori_loop(0, schedule.segments(worker), segment, carry)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    lax.cond(wg < 2, consume, load)

"""Evaluates a function whose arguments are in host memory, a page of them at a time.

A function of many arrays is traced once, and each of its outputs is asked which of the
arrays it depends on. Arrays that meet in an output belong together; the groups that
this leaves are independent of each other, and a page is some of them. The rest of the
function, what depends on no paged array at all, is evaluated once, before any page.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Sequence

import jax
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from jax.interpreters import partial_eval

from qlora_jax.optim.memory import to_device, to_host

# A set of inputs, bit `i` standing for input `i`: unions of thousands are one `|`.
Mask = int
# Bytes of a page, if not said, and from which on one has no room for an array of the
# page before it.
PAGE_SIZE, LARGE_PAGE = 2**26, 2**30


@dataclasses.dataclass(frozen=True)
class Page:
    """A group of inputs, and the outputs that depend on them and on no others."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def evaluate_by_page(
    fn: Callable[..., Sequence[jax.Array]],
    args: Sequence[jax.Array],
    *,
    page_size: int,
    host_outputs: Collection[int],
    after: Sequence[jax.Array] = (),
    complete: bool = False,
) -> list[jax.Array]:
    """Returns `fn(*args)`, with at most two pages of `args` on the device at a time.

    The order is pinned by dependencies, for use under jit: while a page travels in, the
    one before it, already computed, travels out; then the page is computed. On the
    device are then a page and an array; of a page of more than 1 GiB, whose arrays come
    one behind those that leave, no more than it. What leaves and what comes in is then
    side by side for all but its first and last array.

    Args:
        fn: takes arrays on the device, returns a list of arrays. It may close over
            other arrays, traced ones too.
        args: its arguments, in host memory.
        page_size: bytes of `args` in a page. A group of arguments that `fn` binds
            together is never split, so a page of one group may be larger.
        host_outputs: indices of the outputs that go to host memory.
        after: arrays that `fn` closes over. If it sums up several of them to a number,
            such as a global norm of gradients, no page is fetched before that.
        complete: whether what a page gives that stays on the device is computed with
            it. Otherwise the compiler may leave it for later, and keep what it is
            computed from; but it may also become part of what reads it.

    Returns:
        The outputs.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    closed = _without_calls(jax.make_jaxpr(fn)(*shapes), shapes)
    jaxpr, consts = closed.jaxpr, closed.consts
    eqn_masks, out_masks = _dependencies(jaxpr)
    outputs: dict[int, jax.Array] = {}

    def put(indices: Sequence[int], values: Sequence[jax.Array]) -> None:
        for i, value in zip(indices, values, strict=True):
            outputs[i] = to_host(value) if i in host_outputs else value

    # An argument that comes back as it was stays where it is.
    for i, var in enumerate(jaxpr.outvars):
        if i in host_outputs and var in jaxpr.invars:
            outputs[i] = args[jaxpr.invars.index(var)]
            out_masks[i] = 0
    pages = plan_pages([x.nbytes for x in args], out_masks, page_size)

    args = list(args)
    first = list(pages[0].inputs) if pages else []
    once = [eqn for eqn, reads in zip(jaxpr.eqns, eqn_masks, strict=True) if not reads]
    known = dict(zip(jaxpr.constvars, consts, strict=True))
    # Left to itself the compiler fetches the first page as the program begins, long
    # before there is a gradient for it. What is summed up over all of them is there
    # when they are. This number alone is held up by it, so that arrays are computed as
    # they would be.
    awaited = [
        var
        for var, value in zip(jaxpr.constvars, consts, strict=True)
        if any(value is x for x in after)
    ]
    if first and (total := _total(awaited, once)) is not None:
        values = _evaluate(jaxpr, once, known, total.outvars)
        pinned, values = _barrier([args[i] for i in first], values)
        for i, x in zip(first, pinned, strict=True):
            args[i] = x
        known.update(zip(total.outvars, values, strict=True))
        once.remove(total)
    unpaged = [i for i, mask in enumerate(out_masks) if not mask and i not in outputs]
    shared = _shared_variables(jaxpr, eqn_masks)
    values = _evaluate(
        jaxpr, once, known, [*(jaxpr.outvars[i] for i in unpaged), *shared]
    )
    put(unpaged, values[: len(unpaged)])
    known.update(zip(shared, values[len(unpaged) :], strict=True))

    computed: list[jax.Array] = []
    last: list[int] = []  # the outputs of the previous page that go to host memory
    rest: list[int] = []  # and those that do not, if they are waited for
    for page in pages:
        hosted = [args[i] for i in page.inputs]
        lag = int(sum(x.nbytes for x in hosted) > LARGE_PAGE)
        fetched, written = _exchange(hosted, computed, lag)
        fetched, written = _barrier(fetched, [*written, *(outputs[i] for i in rest)])
        outputs.update(zip([*last, *rest], written, strict=True))
        mask = sum(1 << i for i in page.inputs)
        variables = [jaxpr.invars[i] for i in page.inputs]
        values = _evaluate(
            jaxpr,
            [
                eqn
                for eqn, reads in zip(jaxpr.eqns, eqn_masks, strict=True)
                if reads & mask
            ],
            known | dict(zip(variables, fetched, strict=True)),
            [jaxpr.outvars[i] for i in page.outputs],
        )
        outputs.update(zip(page.outputs, values, strict=True))
        last = [i for i in page.outputs if i in host_outputs]
        rest = [i for i in page.outputs if complete and i not in host_outputs]
        computed = [outputs[i] for i in last]
    outputs.update(zip(last, _exchange([], computed)[1], strict=True))
    return [outputs[i] for i in range(len(jaxpr.outvars))]


def plan_pages(
    sizes: Sequence[int], out_masks: Sequence[Mask], page_size: int
) -> list[Page]:
    """Groups inputs into pages of at most `page_size` bytes, small ones first.

    By size, because a page travels in while the one before it travels out: the rate is
    best if the two are alike. Small ones first, because what a page is computed from
    (a gradient) is given back after it: when the largest pages come, most is gone.

    Args:
        sizes: bytes of each input.
        out_masks: for each output, the inputs it depends on.
        page_size: bytes of a page; a single group of inputs may exceed it.

    Returns:
        The pages. Every input is in one of them, also if no output depends on it.
    """
    groups = _connected(len(sizes), out_masks)
    groups.sort(key=lambda group: sum(sizes[i] for i in group))
    bundles: list[list[int]] = []
    room = 0
    for group in groups:
        size = sum(sizes[i] for i in group)
        if not bundles or size > room:
            bundles.append([])
            room = page_size
        bundles[-1] += group
        room -= size
    pages = []
    for bundle in bundles:
        mask = sum(1 << i for i in bundle)
        outputs = [i for i, out in enumerate(out_masks) if out & mask]
        pages.append(Page(tuple(bundle), tuple(outputs)))
    return pages


def _connected(count: int, masks: Sequence[Mask]) -> list[list[int]]:
    """Groups inputs that some output depends on together, by their first input."""
    root = list(range(count))

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for mask in set(masks):
        members = _members(mask)
        for i in members[1:]:
            first, second = sorted((find(members[0]), find(i)))
            root[second] = first
    groups: dict[int, list[int]] = {}
    for i in range(count):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _members(mask: Mask) -> list[int]:
    members = []
    while mask:
        low = mask & -mask
        members.append(low.bit_length() - 1)
        mask ^= low
    return members


def _dependencies(jaxpr: Jaxpr) -> tuple[list[Mask], list[Mask]]:
    """Which inputs each equation, and each output, depends on.

    An equation with a body of its own (a branch, a scan) binds all that it takes.
    """
    known = {var: 1 << i for i, var in enumerate(jaxpr.invars)}

    def read(atom) -> Mask:
        return 0 if isinstance(atom, Literal) else known.get(atom, 0)

    eqn_masks = []
    for eqn in jaxpr.eqns:
        mask = 0
        for atom in eqn.invars:
            mask |= read(atom)
        known.update(dict.fromkeys(eqn.outvars, mask))
        eqn_masks.append(mask)
    return eqn_masks, [read(atom) for atom in jaxpr.outvars]


def _shared_variables(jaxpr: Jaxpr, eqn_masks: Sequence[Mask]) -> list:
    """What paged equations read of those that depend on no page, each once."""
    common, read = {}, set()
    for eqn, mask in zip(jaxpr.eqns, eqn_masks, strict=True):
        if mask:
            read.update(atom for atom in eqn.invars if not isinstance(atom, Literal))
        else:
            common.update(dict.fromkeys(eqn.outvars))
    return [var for var in common if var in read]


def _total(arrays: Sequence, eqns: Sequence[JaxprEqn]) -> JaxprEqn | None:
    """What computes the first number that more of the arrays went into than any before.

    None if there is no number that more than one went into.
    """
    known = {x: 1 << i for i, x in enumerate(arrays)}
    best, most = None, 1
    for eqn in eqns:
        mask = 0
        for atom in eqn.invars:
            mask |= 0 if isinstance(atom, Literal) else known.get(atom, 0)
        known.update(dict.fromkeys(eqn.outvars, mask))
        if mask.bit_count() > most and all(map(_is_single, eqn.outvars)):
            best, most = eqn, mask.bit_count()
    return best


def _is_single(x) -> bool:
    return math.prod(getattr(x.aval, "shape", ())) == 1


def _exchange(
    hosted: list[jax.Array], computed: list[jax.Array], lag: int = 0
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Brings one page to the device while the one before it goes to the host.

    Array by array, in lockstep: one transfer in each direction, then the next two. Left
    to itself, the compiler has two transfers in the same direction under way, or puts
    both directions on one stream; either halves the rate. With a lag of one, an array
    comes in when the one of the same number has left, beside the next that leaves.
    """
    hosted, computed = _barrier(hosted, computed)
    fetched: list[jax.Array] = []
    written: list[jax.Array] = []
    lag = lag if computed else 0
    for n in range(max(len(hosted) + lag, len(computed))):
        coming = hosted[n - lag : n - lag + 1] if n >= lag else []
        pair, before = _barrier(
            [coming, computed[n : n + 1]], [fetched[-1:], written[-1:]]
        )
        fetched[-1:], written[-1:] = before
        fetched += map(to_device, pair[0])
        written += map(to_host, pair[1])
    return fetched, written


def _barrier(first: list, second: list) -> tuple[list, list]:
    """Returns both; neither is to be touched before all of the other is there."""
    return jax.lax.optimization_barrier((first, second))


def _without_calls(closed: ClosedJaxpr, shapes: Sequence) -> ClosedJaxpr:
    """Inlines what was jitted and branches that are settled, as the compiler does.

    A jitted helper over a whole tree would otherwise be cut in as many calls as there
    are pages, what is common to them repeated in each. The compiler folds such copies
    only after it has simplified each by itself, and may round them differently.
    """

    def run(jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> list:
        known = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            values = [read(atom) for atom in eqn.invars]
            called = _callee(eqn, values)
            if called:
                results = run(called[0].jaxpr, called[0].consts, called[1])
            else:
                used = {x: known[x] for x in eqn.invars if not isinstance(x, Literal)}
                results = _evaluate(jaxpr, [eqn], used, eqn.outvars)
            known.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    return jax.make_jaxpr(lambda *args: run(closed.jaxpr, closed.consts, args))(*shapes)


def _callee(eqn: JaxprEqn, values: Sequence) -> tuple[ClosedJaxpr, Sequence] | None:
    """The function that an equation calls, and with what; None if it is no call."""
    if eqn.primitive.name in ("jit", "pjit"):
        return eqn.params["jaxpr"], values
    if eqn.primitive.name == "cond" and not isinstance(values[0], Tracer):
        return eqn.params["branches"][int(values[0])], values[1:]
    return None


def _evaluate(
    jaxpr: Jaxpr, eqns: Sequence[JaxprEqn], known: dict, outvars: Sequence
) -> list[jax.Array]:
    """Evaluates those of the equations that `outvars` need, from known variables."""
    piece = jaxpr.replace(
        constvars=[],
        invars=list(known),
        eqns=list(eqns),
        outvars=list(outvars),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    pruned, used = partial_eval.dce_jaxpr(piece, [True] * len(outvars))
    inputs = [value for value, keep in zip(known.values(), used, strict=True) if keep]
    return eval_jaxpr(pruned, (), *inputs)

"""Which arguments share a page, and the order in which pages travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.optim import pages
from qlora_jax.optim.memory import to_host
from qlora_jax.optim.pages import evaluate_by_page, plan_pages


def bits(*members):
    return sum(1 << i for i in members)


def test_what_meets_in_an_output_shares_a_page():
    planned = plan_pages([8] * 5, [bits(0, 2), bits(1), bits(1, 3), 0], page_size=1)
    assert [page.inputs for page in planned] == [(4,), (0, 2), (1, 3)]
    assert [page.outputs for page in planned] == [(), (0,), (1, 2)]


def test_pages_are_filled_small_ones_first():
    planned = plan_pages([10, 40, 10, 30, 20], [0] * 5, page_size=50)
    assert [page.inputs for page in planned] == [(0, 2, 4), (3,), (1,)]


def test_a_group_larger_than_a_page_is_a_page():
    planned = plan_pages([10, 10, 10], [bits(0, 1)], page_size=15)
    assert [page.inputs for page in planned] == [(2,), (0, 1)]


def host_arrays(count):
    return [to_host(jnp.full([4, 4], float(i))) for i in range(count)]


@pytest.mark.parametrize("page_size", [1, 128, 10**6])
def test_evaluates_as_the_function(page_size):
    scale = jnp.float32(3.0)

    def fn(*xs):
        helper = jax.jit(lambda ys, t: [y * t + 1 for y in ys])
        return [*helper(xs, scale * 2), scale, xs[0] @ xs[1], xs[2]]

    args = host_arrays(5)
    out = jax.jit(
        lambda *xs: evaluate_by_page(
            fn, xs, page_size=page_size, host_outputs=[0, 1, 2, 3, 4, 7]
        )
    )(*args)
    expected = fn(*[jax.device_put(x, jax.memory.Space.Device) for x in args])
    for a, b in zip(out, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    kinds = [x.sharding.memory_kind for x in out]
    assert kinds == ["pinned_host"] * 5 + ["device"] * 2 + ["pinned_host"]


def transfers(jaxpr):
    """(to_host?, transfers that must have ended before it) of every transfer."""
    after = {}  # variable -> transfers it depends on
    found = []
    for eqn in jaxpr.eqns:
        before = set()
        for atom in eqn.invars:
            if not hasattr(atom, "val"):
                before |= after.get(atom, set())
        if eqn.primitive.name == "device_put":
            [space] = eqn.params["devices"]
            found.append((space == jax.memory.Space.Host, before))
            before = before | {len(found) - 1}
        after.update(dict.fromkeys(eqn.outvars, before))
    return found


@pytest.mark.parametrize("in_a_page", [1, 3])
def test_two_pages_at_most_and_one_transfer_each_way(in_a_page):
    args = host_arrays(12)
    size = in_a_page * args[0].nbytes
    traced = jax.make_jaxpr(
        lambda *xs: evaluate_by_page(
            lambda *ys: [y + 1 for y in ys],
            xs,
            page_size=size,
            host_outputs=range(12),
        )
    )(*args)
    found = transfers(traced.jaxpr)
    fetches = [i for i, (to_host, _) in enumerate(found) if not to_host]
    writes = [i for i, (to_host, _) in enumerate(found) if to_host]
    assert len(fetches) == len(writes) == 12
    for n, fetch in enumerate(fetches):
        _, before = found[fetch]
        page = n // in_a_page
        # all pages but the one before are written back; in each direction, in order
        assert set(writes[: max(page - 1, 0) * in_a_page]) <= before
        assert set(fetches[:n]) <= before
    for n, write in enumerate(writes):
        assert set(writes[:n]) <= found[write][1]
    # and a fetch never waits for the write that it travels beside
    for n, fetch in enumerate(fetches[in_a_page:]):
        assert writes[n] not in found[fetch][1]
        assert fetch not in found[writes[n]][1]


def test_the_first_fetch_waits_for_what_is_summed_up_over_all_gradients():
    def step(gradients, *state):
        def fn(*ys):
            norm = sum(jnp.sum(g**2) for g in gradients)
            return [y + g / norm for y, g in zip(ys, gradients, strict=True)]

        return evaluate_by_page(
            fn, state, page_size=1, host_outputs=[0, 1], after=gradients
        )

    gradients = [jnp.ones([4, 4])] * 2
    jaxpr = jax.make_jaxpr(step)(gradients, *host_arrays(2)).jaxpr
    after = set()  # variables that depend on the sum
    fetches = []
    for eqn in jaxpr.eqns:
        waits = any(not hasattr(x, "val") and x in after for x in eqn.invars)
        if (eqn.primitive.name == "add" and not eqn.outvars[0].aval.shape) or waits:
            after.update(eqn.outvars)
        if eqn.primitive.name == "device_put":
            [space] = eqn.params["devices"]
            if space == jax.memory.Space.Device:
                fetches.append(waits)
    assert fetches == [True, True]


def test_arrays_of_a_large_page_come_one_behind_those_that_leave(monkeypatch):
    monkeypatch.setattr(pages, "LARGE_PAGE", 100)
    args = host_arrays(6)  # two pages of three arrays of 64 bytes
    traced = jax.make_jaxpr(
        lambda *xs: evaluate_by_page(
            lambda a, b, c, d, e, f: (
                [x + a + b + c for x in (a, b, c)] + [x + d + e + f for x in (d, e, f)]
            ),
            xs,
            page_size=1,
            host_outputs=range(6),
        )
    )(*args)
    found = transfers(traced.jaxpr)
    fetches = [before for to_host, before in found if not to_host]
    writes = [i for i, (to_host, _) in enumerate(found) if to_host]
    # the second page: an array comes when one more than before it has left
    for n in range(3):
        assert set(writes[: n + 1]) <= fetches[3 + n]
        assert not set(writes[n + 1 :]) & fetches[3 + n]


@pytest.mark.parametrize("complete", [False, True])
def test_what_stays_on_the_device_is_computed_with_its_page(complete):
    args = host_arrays(4)
    traced = jax.make_jaxpr(
        lambda *xs: evaluate_by_page(
            lambda *ys: [y + 1 for y in ys] + [jnp.sin(y) for y in ys],
            xs,
            page_size=1,
            host_outputs=range(4),
            complete=complete,
        )
    )(*args)
    after = {}  # variable -> how many sines are computed before it
    waits = []
    for eqn in traced.jaxpr.eqns:
        before = set()
        for atom in eqn.invars:
            before |= after.get(atom, set()) if not hasattr(atom, "val") else set()
        if eqn.primitive.name == "sin":
            waits.append(len(before))
            before = before | {len(waits)}
        after.update(dict.fromkeys(eqn.outvars, before))
    assert waits == ([0, 1, 2, 3] if complete else [0, 0, 0, 0])

"""8-bit moments against a reference in numpy, written from the rule."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import adam8bit, adamw8bit, lion8bit, paged
from qlora_jax.optim.dynamic_codes import nearest_dynamic_code
from qlora_jax.quant.formats import dynamic_map

MAPS = {signed: np.array(dynamic_map(signed), np.float32) for signed in (True, False)}
BLOCK = 256


def nearest(x, signed):
    """argmin |x - map|, the lower code of two, by the float32 midpoints."""
    table = MAPS[signed]
    return np.searchsorted((table[1:] + table[:-1]) / np.float32(2), x, side="left")


def encode(x, signed):
    blocks = np.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(blocks).max(1)
    unit = blocks / np.where(absmax == 0, 1, absmax)[:, None]
    codes = nearest(unit, signed)
    if signed:  # rounding must not change the sign bit
        sign = MAPS[True][codes] < 0
        codes = codes + np.where((unit < 0) & ~sign, -1, 0)
        codes = codes + np.where((unit > 0) & sign, 1, 0)
    return codes.reshape(-1)[: x.size].reshape(x.shape), absmax


def decode(codes, absmax, signed):
    scales = np.repeat(absmax, BLOCK)[: codes.size].reshape(codes.shape)
    return MAPS[signed][codes] * scales


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_nearest_at_every_edge(signed):
    table = MAPS[signed]
    middles = (table[1:] + table[:-1]) / np.float32(2)
    above = np.nextafter(middles, np.float32(2))
    rng = np.random.default_rng(0)
    spread = (10 ** rng.uniform(-9, 0, 20_000)).astype(np.float32)
    x = np.concatenate([table, middles, above, spread, -spread if signed else spread])
    codes = nearest_dynamic_code(jnp.asarray(x), signed=signed, noise=None)
    np.testing.assert_array_equal(codes, nearest(x, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_stochastic_codes_are_neighbours_and_right_on_average(signed):
    table = MAPS[signed]
    rng = np.random.default_rng(0)
    x = rng.uniform(-0.99 if signed else 0, 1, 32).astype(np.float32)
    x = np.concatenate([x, table[::16]])
    draws = 4096
    noise = jax.random.uniform(jax.random.key(0), (draws, len(x)))
    tiled = jnp.broadcast_to(jnp.asarray(x), (draws, len(x)))
    codes = np.asarray(nearest_dynamic_code(tiled, signed=signed, noise=noise))
    low = np.searchsorted(table, x, side="right") - 1
    high = np.minimum(low + (table[low] < x), 255)
    assert ((codes == low) | (codes == high)).all()
    mean = table[codes].mean(0, dtype=np.float64)
    deviation = (table[high] - table[low]) / 2 / draws**0.5
    assert (np.abs(mean - x) <= 5 * deviation + 1e-7).all()


def test_adam8bit_follows_the_reference_for_100_steps():
    b1, b2, eps, rate = 0.9, 0.999, 1e-8, 1e-2
    shape = (41, 101)  # 4141 numbers: a short last block
    rng = np.random.default_rng(0)
    target = rng.normal(size=shape).astype(np.float32)
    tx = adam8bit(rate, b1, b2, eps)
    params = {"w": jnp.zeros(shape)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    p = np.zeros(shape, np.float32)
    m, v = encode(p, True), encode(p, False)
    mismatches = 0
    for t in range(1, 101):
        g = (p - target + rng.normal(size=shape) * 0.1).astype(np.float32)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        new_m = b1 * decode(*m, True) + (1 - b1) * g
        new_v = b2 * decode(*v, False) + (1 - b2) * g * g
        new_m, new_v = new_m.astype(np.float32), new_v.astype(np.float32)
        p = p - rate * (new_m / (1 - b1**t)) / (np.sqrt(new_v / (1 - b2**t)) + eps)
        m, v = encode(new_m, True), encode(new_v, False)
        mu, nu = state[0].mu["w"], state[0].nu["w"]
        mismatches += (np.asarray(mu.codes) != m[0]).sum()
        mismatches += (np.asarray(nu.codes) != v[0]).sum()
        # a code may fall on the other side of a midpoint by one rounding
        assert np.abs(np.asarray(mu.codes).astype(int) - m[0]).max() <= 1
        assert np.abs(np.asarray(nu.codes).astype(int) - v[0]).max() <= 1
    assert mismatches < 1e-3 * 200 * p.size
    difference = np.abs(np.asarray(params["w"]) - p)
    assert np.median(difference) < 1e-5
    assert np.sqrt((difference**2).mean()) < 1e-4


def test_lion8bit_follows_the_reference_for_100_steps():
    b1, b2, rate = 0.9, 0.99, 1e-2
    rng = np.random.default_rng(0)
    target = rng.normal(size=(64, 80)).astype(np.float32)
    tx = lion8bit(rate, b1, b2)
    params = {"w": jnp.zeros(target.shape)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    p, m = np.zeros_like(target), encode(np.zeros_like(target), True)
    for _ in range(100):
        g = (p - target).astype(np.float32)
        updates, state = update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        old = decode(*m, True)
        p = p - rate * np.sign(b1 * old + (1 - b1) * g)
        m = encode((b2 * old + (1 - b2) * g).astype(np.float32), True)
    same = np.abs(np.asarray(params["w"]) - p) < 1e-5
    assert same.mean() > 0.99


@pytest.mark.parametrize(
    "name, tx",
    [
        ("adam8bit", adam8bit(1e-2)),
        ("adamw8bit", adamw8bit(1e-2, weight_decay=0.1)),
        ("lion8bit", lion8bit(1e-3, weight_decay=0.1)),
        ("adamw8bit", paged(adamw8bit(1e-2, weight_decay=0.1), min_size=256)),
    ],
    ids=["adam8bit", "adamw8bit", "lion8bit", "paged adamw8bit"],
)
def test_parameters_end_near_those_of_bitsandbytes(name, tx):
    """After 100 steps of its own optimizers (0.50.2, CPU build, float32 arithmetic).

    Its moments are rounded through a coarser table there, so that codes differ by one.
    """
    path = pathlib.Path(__file__).parents[1] / "golden" / "bitsandbytes_optim.npz"
    with np.load(path) as golden:
        wanted, full = golden[name], golden["adam"]
    goal = np.random.default_rng(0).normal(size=wanted.shape).astype(np.float32)
    place = np.arange(wanted.size, dtype=np.float64).reshape(wanted.shape)
    params = jax.device_put(jnp.zeros(wanted.shape), jax.devices()[0])
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(1, 101):
        # As make_bitsandbytes_optim.py has it.
        wave = 0.3 * np.sin(place * 12.9898 + step * 78.233)
        grads = (np.asarray(params) - goal + wave).astype(np.float32)
        updates, state = update(jnp.asarray(grads), state, params)
        params = optax.apply_updates(params, updates)
    norm = lambda x: np.sqrt((np.asarray(x, np.float64) ** 2).mean())
    apart, moved = norm(params - wanted), norm(wanted)
    # 0.24 % (Adam), 0.29 % (AdamW) and 0.37 % (Lion) of the way were measured.
    assert apart < 0.005 * moved
    if name == "adam8bit":  # nearer to it than its own 32-bit Adam is: 2.5 %
        assert apart < 0.2 * norm(full - wanted)


def test_a_negative_first_moment_never_becomes_zero():
    grads = {"w": jnp.full([4096], -1e-9).at[0].set(1.0).at[1].set(1e-9)}
    tx = adam8bit(1e-3)
    _, state = tx.update(grads, tx.init(grads))
    codes = state[0].mu["w"].codes
    assert codes[:3].tolist() == [255, 127, 126]  # largest, zero, smallest negative


def test_bytes_of_state_and_small_parameters():
    params = {"w": jnp.ones([512, 1024], jnp.bfloat16), "b": jnp.ones([4095])}
    state = adamw8bit(1e-3).init(params)[0]
    large = jax.tree.leaves((state.mu["w"], state.nu["w"]))
    assert sum(x.nbytes for x in large) / params["w"].size == 2 + 2 * 4 / 256
    assert state.mu["b"].dtype == state.nu["b"].dtype == jnp.float32
    momentum = lion8bit(1e-3).init(params)[0].mu["w"]
    assert sum(x.nbytes for x in jax.tree.leaves(momentum)) == 512 * 1024 * (
        1 + 4 / 256
    )


def test_small_parameters_follow_optax():
    params = {"w": jnp.linspace(-1, 1, 100)}
    ours, theirs = (
        adamw8bit(1e-2, weight_decay=0.1),
        optax.adamw(1e-2, weight_decay=0.1),
    )
    a, b = ours.init(params), theirs.init(params)
    for i in range(10):
        grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), params)
        u, a = ours.update(grads, a, params)
        w, b = theirs.update(grads, b, params)
        np.testing.assert_allclose(u["w"], w["w"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_spoils_only_its_own_number(bad):
    params = {"w": jnp.ones([4096])}
    grads = {"w": jnp.ones([4096]).at[7].set(bad)}
    tx = adamw8bit(1e-2, weight_decay=0.0)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert updates["w"][7] == 0
    np.testing.assert_allclose(np.delete(updates["w"], 7), -1e-2, rtol=1e-5)
    assert state[0].mu["w"].codes[7] == 127 and state[0].nu["w"].codes[7] == 0


def test_update_has_the_type_of_the_gradient():
    params = {"w": jnp.ones([64, 128], jnp.bfloat16)}
    tx = adamw8bit(1e-2)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: paged(tx, min_size=64)])
def test_stochastic_rounding_trains_as_well(wrap):
    target = jax.random.normal(jax.random.key(0), (64, 80))
    tx = wrap(adamw8bit(5e-2, weight_decay=0.0, stochastic_rounding=True))
    params = {"w": jnp.zeros_like(target)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum((p["w"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(200):
        params, state = step(params, state)
    assert float(jnp.mean((params["w"] - target) ** 2)) < 1e-3


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="block_size=0 numbers must be positive"):
        adam8bit(1e-3, block_size=0)
    with pytest.raises(ValueError, match="min_8bit_size=-1 numbers must not be"):
        lion8bit(1e-3, min_8bit_size=-1)

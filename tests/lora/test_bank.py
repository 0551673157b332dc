"""Named adapters: put, swapped and chosen without recompiling; combined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import (
    AdapterBank,
    LoraTensor,
    add_lora,
    combine_adapters,
    join_trainable,
    split_trainable,
    with_rank,
)
from qlora_jax.lora.low_rank import prefers_masked
from tests.lora.models import Model, tokens
from tests.lora.trees import perturbed

KEY = jax.random.key(7)


def arrays():
    return {"up": jnp.ones((2, 16, 24))}


def adapted(base, rank=4, seed=0, **options):
    options = {"targets": "up|proj", **options}
    first, frozen = split_trainable(add_lora(base, rank=rank, key=KEY, **options))
    return perturbed(first, seed), frozen


def test_adapters_are_swapped_without_recompiling():
    base, batch = Model(format="nf4"), tokens()[:3]
    (first, frozen), (second, _) = (adapted(base, seed=seed) for seed in range(2))

    @jax.jit
    def run(trainable, ids):
        return join_trainable(trainable, frozen, adapter_ids=ids)(batch)

    alone = jax.jit(lambda trainable: join_trainable(trainable, frozen)(batch))
    zero = jax.tree.map(jnp.zeros_like, first)
    bank = AdapterBank.empty(first, slots=3)
    bank = bank.put("french", first).put("law", second)
    assert bank.names == ("french", "law", None)
    wanted = [alone(first), alone(zero), alone(second)]
    got = run(bank.stacked, bank.ids(["french", None, "law"]))
    for row in range(3):
        np.testing.assert_allclose(got[row], wanted[row][row], rtol=2e-3, atol=1e-4)
    # A hot swap: the same names, rows and program, other adapters.
    bank = bank.put("french", second)
    got = run(bank.stacked, bank.ids(["french", None, "law"]))
    np.testing.assert_allclose(got[0], wanted[2][0], rtol=2e-3, atol=1e-4)
    bank = bank.remove("law").put("third", first)
    assert bank.names == ("french", "third", None)
    run(bank.stacked, bank.ids(["third", "third", None]))
    assert run._cache_size() == 1


@pytest.mark.parametrize("several", [2, 3])
def test_few_and_many_adapters_give_each_row_its_own(several):
    """Together 128 columns, all in one product; more, each row gathers its own."""
    keys = jax.random.split(KEY, 4)
    w = jax.random.normal(keys[0], (64, 72)) / 8
    a = jax.random.normal(keys[1], (several, 64, 64))
    b = jax.random.normal(keys[2], (several, 64, 72))
    x = jax.random.normal(keys[3], (4, 3, 64))
    ids = jnp.array([1, -1, 0, several])
    got = x @ LoraTensor(w, a, b, ids=ids, alpha=0.5)
    for row, i in enumerate([1, None, 0]):
        wanted = x[row] @ w
        if i is not None:
            wanted += x[row] @ a[i] @ b[i] * (0.5 / 64)
        np.testing.assert_allclose(got[row], wanted, rtol=1e-4, atol=1e-4)
    assert jnp.isnan(got[3]).all()  # an id that does not exist


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_weighted_sums(method):
    options = {"alpha": 8, "targets": "up$"}
    (first, frozen), (second, _) = (
        adapted(arrays(), seed=seed, **options) for seed in range(2)
    )
    combined = combine_adapters([first, second], [0.7, 0.3], frozen, method=method)
    lts = [join_trainable(t, frozen)["up"] for t in (first, second, combined)]
    product = lambda lt: np.asarray(lt.scale * lt.a @ lt.b, np.float64)
    exact = 0.7 * product(lts[0]) + 0.3 * product(lts[1])
    got = product(lts[2])
    if method == "cat":
        assert lts[2].rank == 8
        np.testing.assert_allclose(got, exact, atol=1e-5)
    elif method == "svd":
        u, s, v = np.linalg.svd(exact)
        best = u[..., :4] * s[:, None, :4] @ v[:, :4]
        assert lts[2].rank == 4
        np.testing.assert_allclose(got, best, atol=1e-4)
    else:
        a, b = (
            np.sqrt(0.7) * np.asarray(x) + np.sqrt(0.3) * np.asarray(y)
            for x, y in ((lts[0].a, lts[1].a), (lts[0].b, lts[1].b))
        )
        np.testing.assert_allclose(got, 2 * a @ b, atol=1e-5)


def test_a_larger_rank_computes_the_same():
    small, frozen = adapted(arrays(), rank=2)
    big, _ = adapted(arrays(), rank=4)
    filled = with_rank(small, frozen, rank=4)
    shapes = [list(map(jnp.shape, jax.tree.leaves(t))) for t in (filled, big)]
    assert shapes[0] == shapes[1]
    lts = [join_trainable(t, frozen)["up"] for t in (filled, small)]
    got, wanted = (lt.scale * lt.a @ lt.b for lt in lts)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    AdapterBank.empty(big, slots=1).put("small", filled)


def test_wrong_calls():
    first, frozen = adapted(arrays())
    bank = AdapterBank.empty(first, slots=1).put("one", first)
    with pytest.raises(ValueError, match=r"No slot is free for 'two': remove one of"):
        bank.put("two", first)
    with pytest.raises(ValueError, match=r"no adapter 'two'; there are \['one'\]"):
        bank.ids(["two"])
    small, _ = adapted(arrays(), rank=2)
    with pytest.raises(ValueError, match=r"'one' has a leaf .* by with_rank"):
        bank.put("one", small)
    other, _ = adapted(arrays(), alpha=1)
    with pytest.raises(ValueError, match="'one' differs from the adapters of the bank"):
        bank.put("one", other)
    with pytest.raises(ValueError, match="2 adapters and 1 weights"):
        combine_adapters([first, first], [1.0], frozen)
    with pytest.raises(ValueError, match="method='mean' must be cat, svd or linear"):
        combine_adapters([first], [1.0], frozen, method="mean")  # type: ignore
    with pytest.raises(ValueError, match="takes roots of the weights"):
        combine_adapters([first], [-1.0], frozen, method="linear")
    with pytest.raises(ValueError, match="has rank 4 > rank=2"):
        with_rank(first, frozen, rank=2)
    dora, frozen = adapted(arrays(), dora=True)
    with pytest.raises(ValueError, match="is DoRA's: its magnitudes do not add"):
        combine_adapters([dora], [1.0], frozen)


# Rows, tokens, adapters, rank; microseconds masked and gathered, as in docs/lora.md.
MEASURED = [
    (8, 1, 4, 16, 33.4, 27.7),
    (32, 1, 16, 16, 54.9, 50.7),
    (64, 1, 64, 16, 107.2, 71.9),
    (8, 512, 4, 16, 818.7, 803.4),
    (32, 128, 8, 16, 849.4, 827.7),
    (8, 1, 4, 64, 33.9, 49.0),
    (32, 1, 16, 64, 62.7, 136.2),
    (64, 1, 64, 64, 120.7, 232.0),
    (8, 512, 4, 64, 881.4, 857.7),
    (32, 128, 8, 64, 925.7, 900.2),
    (32, 16, 16, 32, 143.4, 159.2),
    (64, 1, 64, 8, 64.2, 57.6),
    (16, 16, 8, 64, 82.6, 105.6),
]


@pytest.mark.parametrize("case", MEASURED)
def test_on_a_gpu_what_was_faster_is_chosen(case):
    *sizes, masked, gathered = case
    assert prefers_masked(*sizes, platform="gpu") == (masked < gathered)
    # However many adapters there are, a few rows do not pay for all of them.
    assert not prefers_masked(8, 1, 256, 64, platform="gpu")

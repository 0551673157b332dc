"""Named adapters: put, swapped and chosen without recompiling; combined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import (
    AdapterBank,
    add_lora,
    combine_adapters,
    join_trainable,
    merge_lora,
    split_trainable,
    with_rank,
)
from tests.lora.models import Model, tokens
from tests.lora.test_adapters import perturbed, run_tree, tree

KEY = jax.random.key(7)


def adapted(base, rank=4, seed=0, **options):
    first, frozen = split_trainable(add_lora(base, rank=rank, key=KEY, **options))
    return perturbed(first, seed), frozen


@pytest.mark.parametrize("module", [False, True])
def test_adapters_are_swapped_without_recompiling(module):
    base = Model(format="nf4") if module else tree()
    (first, frozen), (second, _) = (adapted(base, seed=seed) for seed in range(2))
    batch = tokens()[:3] if module else jax.random.normal(KEY, (3, 5, 64))

    @jax.jit
    def run(trainable, ids):
        model = join_trainable(trainable, frozen, adapter_ids=ids)
        return model(batch) if module else run_tree(model, batch)

    def alone(trainable):
        model = base if trainable is None else join_trainable(trainable, frozen)
        return model(batch) if module else run_tree(model, batch)

    bank = AdapterBank.empty(first, slots=3)
    bank = bank.put("french", first).put("law", second)
    assert bank.names == ("french", "law", None)
    wanted = [alone(first), alone(None), alone(second)]
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


@pytest.mark.parametrize("method", ["cat", "svd", "linear"])
def test_weighted_sums(method):
    options = {"alpha": 8, "targets": "up$"}
    (first, frozen), (second, _) = (
        adapted(tree(), seed=seed, **options) for seed in range(2)
    )
    combined = combine_adapters([first, second], [0.7, 0.3], frozen, method=method)
    lts = [join_trainable(t, frozen)["layers"]["up"] for t in (first, second, combined)]
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
    small, frozen = adapted(Model(), rank=2)
    big, _ = adapted(Model(), rank=4)
    filled = with_rank(small, frozen, rank=4)
    assert jax.tree.map(jnp.shape, filled) == jax.tree.map(jnp.shape, big)
    got, wanted = (
        merge_lora(join_trainable(t, frozen), report=None) for t in (filled, small)
    )
    np.testing.assert_allclose(
        got.layers.up_proj[...], wanted.layers.up_proj[...], rtol=1e-5, atol=1e-6
    )
    AdapterBank.empty(big, slots=1).put("small", filled)


def test_wrong_calls():
    first, frozen = adapted(tree())
    bank = AdapterBank.empty(first, slots=1).put("one", first)
    with pytest.raises(ValueError, match=r"No slot is free for 'two': remove one of"):
        bank.put("two", first)
    with pytest.raises(ValueError, match=r"no adapter 'two'; there are \['one'\]"):
        bank.ids(["two"])
    small, _ = adapted(tree(), rank=2)
    with pytest.raises(ValueError, match=r"'one' has a leaf .* by with_rank"):
        bank.put("one", small)
    other, _ = adapted(tree(), alpha=1)
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
    dora, frozen = adapted(tree(), dora=True)
    with pytest.raises(ValueError, match="is DoRA's: its magnitudes do not add"):
        combine_adapters([dora], [1.0], frozen)

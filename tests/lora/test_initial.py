"""Initial values against PEFT's formulas, computed in float64 numpy, and its values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.lora import add_lora, loftq
from qlora_jax.lora.initial import orthogonal
from qlora_jax.quant import QuantizedTensor, dequantize, quantize
from tests.conftest import GOLDEN

KEY = jax.random.key(3)
W = jax.random.normal(jax.random.key(0), (2, 64, 96)) / 8


def add(w=W, **options):
    lt = add_lora({"w_proj": w}, **{"rank": 8, "alpha": 8, "key": KEY, **options})
    return lt["w_proj"]


def relative(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


def best_of_rank(w, rank):
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    return u[..., :rank] * s[..., None, :rank] @ v[..., :rank, :]


@pytest.mark.parametrize("alpha", [8, 2])
def test_pissa_takes_the_principal_part(alpha):
    lt = add(init="pissa", alpha=alpha)
    a, b = np.asarray(lt.a, np.float64), np.asarray(lt.b, np.float64)
    principal = best_of_rank(W, 8)
    assert relative(lt.scale * a @ b, principal) < 1e-5
    assert relative(lt.w, np.asarray(W) - principal) < 1e-5
    # The singular values, over the scale, are dealt evenly: sqrt(s / scale) to each.
    s = np.linalg.svd(np.asarray(W), compute_uv=False)[:, :8]
    roots = np.sqrt(s / lt.scale)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), roots, rtol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(b, axis=2), roots, rtol=1e-4)


def test_pissa_quantizes_what_is_left():
    lt = add(init="pissa", quantize="nf4")
    rest = np.asarray(W) - best_of_rank(W, 8)
    assert isinstance(lt.w, QuantizedTensor)
    whole = np.asarray(dequantize(lt.w)) + lt.scale * np.asarray(lt.a @ lt.b)
    # The paper's claim: closer to w than w quantized.
    assert relative(dequantize(lt.w), rest) < 0.1
    assert relative(whole, W) < relative(dequantize(quantize(W)), W)


@pytest.mark.parametrize("alpha", [8, 2])
def test_loftq_is_the_formula_of_peft(alpha):
    lt = add(init="loftq", quantize="nf4", alpha=alpha)
    base = np.asarray(dequantize(quantize(W)))
    np.testing.assert_array_equal(dequantize(lt.w), base)
    fitted = best_of_rank(np.asarray(W) - base, 8)
    assert relative(lt.scale * np.asarray(lt.a @ lt.b), fitted) < 1e-4


def test_more_steps_of_loftq_come_nearer():
    def error(steps):
        init = functools.partial(loftq, steps=steps)
        lt = add(init=init, quantize="nf4", rank=16)
        return relative(dequantize(lt.w) + lt.scale * (lt.a @ lt.b), W)

    plain = relative(dequantize(quantize(W)), W)
    one, five = error(1), error(5)
    assert five < one < 0.8 * plain


@pytest.mark.parametrize("stack", [(), (3,)])
def test_orthogonal_is_the_formula_of_peft(stack):
    a, b = orthogonal(KEY, (*stack, 512, 8, 768))
    assert a.shape == (*stack, 512, 8) and b.shape == (*stack, 8, 768)
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a @ b).max() < 1e-6
    # a = normal[512, 4] @ (4 orthonormal rows) / 10: mean square 4 / 8 / 100.
    assert (a**2).mean() == pytest.approx(0.005, rel=0.1)
    assert (b**2).mean() == pytest.approx(0.005, rel=0.1)
    assert (np.linalg.matrix_rank(a, tol=1e-3) == 4).all()


def test_gaussian_is_of_deviation_one_over_rank():
    lt = add(jnp.zeros((4, 512, 512)), init="gaussian")
    assert float(lt.a.std()) == pytest.approx(1 / 8, rel=0.02) and not lt.b.any()


def test_the_base_can_be_quantized_on_the_way():
    lt = add(quantize="fp4")
    wanted = quantize(W, "fp4")
    np.testing.assert_array_equal(lt.w.codes, wanted.codes)
    assert lt.a.shape == (2, 64, 8)


@pytest.fixture(scope="module")
def peft():
    """What PEFT 0.21.2 made of one matrix (make_peft.py --initial), as [in, out]."""
    with np.load(GOLDEN / "peft_lora" / "initial.npz") as archive:
        return {name: value.T for name, value in archive.items()}


@pytest.mark.parametrize("alpha", [8, 2])
def test_pissa_is_that_of_peft(peft, alpha):
    lt = add(jnp.asarray(peft["weight"]), init="pissa", alpha=alpha)
    a, b, base = (peft[f"pissa_{alpha}_{part}"] for part in ("a", "b", "base"))
    # Singular vectors have a sign each, which cancels in the product.
    signs = np.sign((np.asarray(lt.a) * a).sum(0))
    # Near ones turn into each other by a rounding.
    np.testing.assert_allclose(lt.a * signs, a, atol=2e-4)
    np.testing.assert_allclose(lt.b * signs[:, None], b, atol=2e-4)
    np.testing.assert_allclose(lt.w, base, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_loftq_is_that_of_peft(peft, steps):
    """PEFT quantizes without double quantization, which moves a weight by 0.005."""
    weight, init = jnp.asarray(peft["weight"]), functools.partial(loftq, steps=steps)
    lt = add(weight, init=init, quantize="nf4")
    a, b, base = (peft[f"loftq_{steps}_{part}"] for part in ("a", "b", "base"))
    ours, theirs = np.asarray(lt.a @ lt.b), a @ b
    if steps == 1:
        assert relative(dequantize(lt.w), base) < 0.01
        assert relative(ours, theirs) < 0.1
    # The sums err alike: what LoftQ is for.
    assert relative(dequantize(lt.w) + ours, weight) == pytest.approx(
        relative(base + theirs, weight), rel=0.02
    )


def test_the_orthogonal_start_of_peft_has_the_properties_of_ours(peft):
    """It is drawn, so what is compared is what the draw is of."""
    theirs = peft["orthogonal_a"], peft["orthogonal_b"]
    for pair in (orthogonal(KEY, (64, 8, 96)), theirs):
        a, b = (np.asarray(factor, np.float64) for factor in pair)
        assert np.abs(a @ b).max() < 1e-6
        assert np.linalg.matrix_rank(a, tol=1e-3) == 4
        assert np.linalg.matrix_rank(b, tol=1e-3) == 4
        np.testing.assert_allclose([(a**2).mean(), (b**2).mean()], 0.005, rtol=0.3)


def test_wrong_calls():
    with pytest.raises(ValueError, match="init='zeros' must be one of kaiming, gauss"):
        add(init="zeros")
    with pytest.raises(ValueError, match="rank=3 is odd"):
        add(init="orthogonal", rank=3)
    with pytest.raises(ValueError, match="error of quantization: give quantize="):
        add(init="loftq")
    for options in ({"init": "pissa"}, {"quantize": "nf4"}):
        with pytest.raises(ValueError, match="'w_proj' is quantized already"):
            add(quantize(W), **options)


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthogonal"])
def test_lean_values_are_the_float32_ones_rounded(init):
    exact, lean = add(init=init), add(init=init, dtype=jnp.bfloat16)
    for got, wanted in ((lean.a, exact.a), (lean.b, exact.b)):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, wanted.astype(jnp.bfloat16))

"""Merging into arrays and quantized weights, the drift it reports, unmerging."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.lora import (
    add_lora,
    join_trainable,
    merge_lora,
    split_trainable,
    stack_adapters,
    unmerge_lora,
)
from qlora_jax.quant import QuantizedTensor, dequantize, quantize
from tests.lora.models import Model, tokens

KEY = jax.random.key(7)


def adapted(base, **options):
    """The model with adapters of which no leaf is zero."""
    model = add_lora(base, **{"rank": 4, "key": KEY, **options})
    trainable, frozen = split_trainable(model)
    moved = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(KEY, x.shape, x.dtype), trainable
    )
    return join_trainable(moved, frozen)


def weight(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (2, 64, 96), dtype) / 8


@pytest.mark.parametrize("dora", [False, True])
def test_merging_into_arrays_is_the_formula(dora, capsys):
    lt = adapted({"up_proj": weight()}, dora=dora)
    merged = merge_lora(lt)["up_proj"]
    lt = lt["up_proj"]
    w, a, b = (np.asarray(v, np.float64) for v in (lt.w, lt.a, lt.b))
    wanted = w + lt.scale * a @ b
    if dora:
        norm = np.linalg.norm(wanted, axis=1, keepdims=True)
        wanted *= np.asarray(lt.magnitude)[:, None] / norm
    np.testing.assert_allclose(merged, wanted, rtol=1e-5, atol=1e-6)
    assert merged.dtype == jnp.float32
    assert capsys.readouterr().out.startswith("Merged 1 weights: relative error of")


@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("dora", [False, True])
def test_a_merged_module_gives_the_same_logits(format, dora):
    model = adapted(Model(format=format), dora=dora)
    merged = merge_lora(model, dtype=jnp.float32, report=None)
    assert isinstance(merged.layers.up_proj, nnx.Param)
    assert merged.layers.up_proj[...].dtype == jnp.float32
    np.testing.assert_allclose(merged(tokens()), model(tokens()), rtol=2e-3, atol=2e-4)


def test_merging_into_a_quantized_base_says_how_far_it_drifted():
    base = {"up_proj": quantize(weight(), "nf4", block_size=32, double_quant=False)}
    model, reports = adapted(base), []
    merged = merge_lora(model, report=reports.append)["up_proj"]
    assert isinstance(merged, QuantizedTensor) and merged.block_size == 32
    assert merged.nested_absmax is None and merged.format.name == "nf4"
    lt = model["up_proj"]
    exact = np.asarray(dequantize(lt.w) + lt.scale * (lt.a @ lt.b), np.float64)
    drift = np.linalg.norm(np.asarray(dequantize(merged)) - exact)
    (report,) = reports
    size = np.linalg.norm(exact)
    assert report.drift["up_proj"].error == pytest.approx(drift / size, rel=1e-4)
    change = np.linalg.norm(exact - np.asarray(dequantize(lt.w)))
    assert report.drift["up_proj"].adapter == pytest.approx(change / size, rel=1e-4)
    # NF4 at blocks of 32 rounds normal weights by 8 to 9 %.
    assert 0.07 < report.drift["up_proj"].error < 0.095
    assert str(report).startswith("Merged 1 weights: relative error of rounding 0.08")


def test_merging_into_bfloat16_rounds_once():
    model = adapted({"up_proj": quantize(weight())})
    reports = []
    merged = merge_lora(model, dtype=jnp.bfloat16, report=reports.append)["up_proj"]
    lt = model["up_proj"]
    exact = dequantize(lt.w, jnp.float32) + lt.scale * (lt.a @ lt.b)
    np.testing.assert_array_equal(merged, exact.astype(jnp.bfloat16))
    assert reports[0].drift["up_proj"].error < 2**-8


def test_unmerging_is_exact():
    base = Model(format="nf4")
    model = adapted(base)
    merged = merge_lora(model, keep_base=True, report=None)
    plain = merge_lora(model, report=None)
    np.testing.assert_array_equal(merged(tokens()), plain(tokens()))
    assert "merged=True" in repr(merged.layers.up_proj)
    with pytest.raises(ValueError, match="'layers/down_proj' is merged and would get"):
        split_trainable(merged)
    again = unmerge_lora(merged)
    np.testing.assert_array_equal(again(tokens()), model(tokens()))
    codes = [m.layers.up_proj.w.get_value().codes for m in (again, model)]
    assert codes[0] is codes[1]


def test_merging_one_of_several():
    model = adapted({"up_proj": weight()})
    trainable, frozen = split_trainable(model)
    doubled = jax.tree.map(lambda x: 2 * x, trainable)
    both = join_trainable(stack_adapters([trainable, doubled]), frozen)
    merged = merge_lora(both, adapter=1, report=None)["up_proj"]
    wanted = merge_lora(join_trainable(doubled, frozen), report=None)["up_proj"]
    np.testing.assert_array_equal(merged, wanted)
    with pytest.raises(ValueError, match="'up_proj' holds 2 adapters and adapter=None"):
        merge_lora(both)
    with pytest.raises(ValueError, match="adapter=1 was given and 'up_proj' holds one"):
        merge_lora(model, adapter=1)


def test_wrong_calls():
    with pytest.raises(ValueError, match="no adapter to merge: call add_lora first"):
        merge_lora({"up_proj": weight()})
    with pytest.raises(ValueError, match=r"only merge_lora.* can be undone"):
        unmerge_lora(adapted({"up_proj": weight()}))


def test_the_base_under_a_merge_stays_as_it_was():
    model = adapted({"up_proj": weight()})
    before = dataclasses.replace(model["up_proj"])
    merge_lora(model, report=None)
    for got, wanted in zip(
        *map(jax.tree.leaves, (model["up_proj"], before)), strict=True
    ):
        assert got is wanted


def test_the_change_of_loss_is_reported():
    model, reports = adapted({"up_proj": quantize(weight()[0])}), []
    x = jax.random.normal(KEY, (5, 64))
    loss = lambda model: ((x @ model["up_proj"]) ** 2).mean()
    merged = merge_lora(model, loss=loss, report=reports.append)
    before, after = reports[0].loss
    assert before == pytest.approx(float(loss(model)), rel=1e-6)
    assert after == pytest.approx(float(loss(merged)), rel=1e-6) != before
    told = f"Loss {before:.4f} -> {after:.4f} ({after - before:+.4f})."
    assert str(reports[0]).endswith(told)
    trainable, frozen = split_trainable(model)
    both = join_trainable(stack_adapters([trainable, trainable]), frozen)
    merge_lora(both, adapter=1, loss=loss, report=reports.append)
    assert reports[1].loss[0] == pytest.approx(before, rel=1e-6)

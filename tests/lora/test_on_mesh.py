"""Adapters lie as the weights beside them do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.models import spread
from qlora_jax.interop.peft import load_adapter, save_adapter
from qlora_jax.lora import add_lora, merge_lora
from qlora_jax.lora.on_mesh import on_mesh_of_base
from qlora_jax.quant import quantize
from qlora_jax.sharding import make_mesh
from tests.on_mesh import model
from tests.tolerances import LOGITS_RELATIVE

pytestmark = pytest.mark.unoptimized

KEY = jax.random.key(3)


def specs(lt):
    return [getattr(lt, name).get_value().sharding.spec for name in ("a", "b")]


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize(
    "sizes, up, down",
    [
        # up: out over "model", in over "fsdp"; down: the other way.
        (dict(data=2), [P(), P()], [P(), P()]),
        (dict(fsdp=2), [P(None, "fsdp"), P()], [P(), P(None, None, "fsdp")]),
        (dict(model=2), [P(), P(None, None, "model")], [P(None, "model"), P()]),
        (
            dict(data=2, fsdp=2, model=2),
            [P(None, "fsdp"), P(None, None, "model")],
            [P(None, "model"), P(None, None, "fsdp")],
        ),
    ],
    ids=str,
)
def test_where_they_lie(sizes, up, down, quantized):
    mesh = make_mesh(**sizes)
    alone = add_lora(model(quantized), rank=4, key=KEY)
    adapted = add_lora(spread(model(quantized), mesh), rank=4, key=KEY)
    assert specs(adapted.layers.up_proj) == up
    assert specs(adapted.layers.down_proj) == down
    for a, b in zip(*map(jax.tree.leaves, (adapted, alone)), strict=True):
        assert a.sharding.device_set == set(mesh.devices.flat)
        np.testing.assert_array_equal(a, b)


def test_a_magnitude_lies_as_the_columns_do():
    mesh = make_mesh(model=2)
    adapted = add_lora(spread(model(), mesh), rank=4, key=KEY, dora=True)
    up, down = adapted.layers.up_proj, adapted.layers.down_proj
    for name in ("magnitude", "square_norm"):
        assert getattr(up, name).get_value().sharding.spec == P(None, "model")
        assert getattr(down, name).get_value().sharding.is_fully_replicated


def test_an_adapter_that_is_loaded_lies_there_too(tmp_path):
    mesh = make_mesh(fsdp=2, model=2)
    saved = add_lora(model(), rank=4, key=KEY)
    save_adapter(saved, tmp_path, base_model="base")
    loaded = load_adapter(spread(model(), mesh), tmp_path)
    assert specs(loaded.layers.up_proj) == [P(None, "fsdp"), P(None, None, "model")]
    tokens = jax.random.randint(KEY, (4, 7), 0, 96)
    both = (saved, loaded, merge_lora(saved), merge_lora(loaded))
    logits = [jax.jit(lambda m, t: m(t))(m, tokens) for m in both]
    for one, other in (logits[:2], logits[2:]):
        error = np.linalg.norm(other - one) / np.linalg.norm(one)
        assert error < LOGITS_RELATIVE["float32"]


def test_axes_of_a_mesh_of_ones_own():
    """Also two for one axis of a weight, and blocks that could not be split."""
    mesh = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=make_mesh().axis_types)
    whole = jax.NamedSharding(mesh, P())
    split = jax.NamedSharding(mesh, P(("x", "y")))
    w = jax.device_put(jnp.ones((64, 32)), split)
    adapted = add_lora({"w_proj": w}, rank=4, key=KEY)["w_proj"]
    assert adapted.a.sharding.spec == P(("x", "y"))
    assert adapted.b.sharding.is_fully_replicated
    w = jax.device_put(quantize(jnp.ones((64, 32))), whole)
    adapted = add_lora({"w_proj": w}, rank=4, key=KEY)["w_proj"]
    assert adapted.a.sharding.is_fully_replicated
    assert len(adapted.a.sharding.device_set) == 8


def test_on_one_device_and_while_tracing_nothing_moves():
    w = {"w_proj": jnp.ones((64, 32))}
    adapted = add_lora(w, rank=4, key=KEY)["w_proj"]
    assert on_mesh_of_base(adapted) is adapted
    shapes = jax.eval_shape(lambda w: add_lora(w, rank=4, key=KEY), w)
    assert shapes["w_proj"].a.shape == (64, 4)

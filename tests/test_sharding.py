import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax import sharding


def test_the_mesh():
    mesh = sharding.make_mesh(data=2, model=4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "model": 4}
    assert list(mesh.devices.flat) == jax.devices()
    with pytest.raises(ValueError, match=r"data=1 x fsdp=3 x model=4 takes 12 devices"):
        sharding.make_mesh(fsdp=3, model=4)
    one = sharding.make_mesh(devices=jax.devices()[3:4])
    assert list(one.devices.flat) == [jax.devices()[3]]


def test_other_axes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"axes \['data', 'tp'\]; \['tp'\] mean noth"):
        sharding.checked(jax.make_mesh((2, 4), ("data", "tp")))
    mesh = sharding.checked(jax.make_mesh((8,), ("model",)))
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,)


@pytest.mark.parametrize(
    "name, shape, stack, expected",
    [
        ("q_proj", (3, 64, 96), 1, P(None, "fsdp", "model")),
        ("down_proj", (3, 96, 64), 1, P(None, "model", "fsdp")),
        ("o_proj", (64, 64), 0, P("model", "fsdp")),
        ("up_proj", (3, 64, 98), 1, P(None, "fsdp", None)),  # 98 over 4
        ("gate_proj_bias", (3, 96), 1, P(None, "model")),
        ("down_proj_bias", (3, 64), 1, P(None, None)),
        ("input_layernorm", (3, 64), 1, P(None, None)),
        ("embed", (259, 64), 0, P(None, "fsdp")),
        ("lm_head", (64, 256), 0, P("fsdp", "model")),
    ],
)
def test_the_rule_by_name(name, shape, stack, expected):
    mesh = sharding.make_mesh(fsdp=2, model=4)
    assert sharding.array_sharding(mesh, name, shape, stack).spec == expected


def test_rows_of_a_batch():
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    tokens = jax.device_put(jnp.zeros((8, 5)), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(2, 5)}
    alone = sharding.checked(jax.make_mesh((8,), ("model",)))
    whole = jax.device_put(jnp.zeros((8, 5)), sharding.batch_sharding(alone))
    np.testing.assert_array_equal(whole, 0)
    assert whole.sharding.is_fully_replicated


def test_arrays_are_bound_where_they_are():
    x = jnp.arange(3.0)
    tree = sharding.committed({"x": x, "n": 2, "none": None})
    assert tree["n"] == 2 and tree["none"] is None
    assert not x.committed and tree["x"].committed
    assert tree["x"].unsafe_buffer_pointer() == x.unsafe_buffer_pointer()


def test_what_is_on_one_device_joins_the_mesh_of_the_rest():
    mesh = sharding.make_mesh(data=2)
    spread = jax.device_put(jnp.zeros(4), sharding.batch_sharding(mesh))
    assert sharding.mesh_of([1, jnp.ones(2)]) is None
    assert sharding.mesh_of([jnp.ones(2), spread]) == mesh
    tree = sharding.committed([spread, jnp.ones(4), jax.random.key(0), 3])
    assert all(x.sharding.device_set == spread.sharding.device_set for x in tree[:3])
    assert tree[0].sharding == spread.sharding and tree[3] == 3
    assert all(x.committed for x in tree[:2])
    host = jax.device_put(jnp.ones(4), jax.memory.Space.Host)
    assert sharding.committed([spread, host])[1].sharding.memory_kind == "pinned_host"


def test_arrays_on_different_devices_stay_as_they_are():
    first, other = jnp.ones(3), jax.device_put(jnp.ones(3), jax.devices()[1])
    assert not sharding.committed([first, other])[0].committed


def test_parts_of_a_batch():
    def parts(mesh):
        return sharding.row_parts(sharding.batch_sharding(mesh))

    assert parts(sharding.make_mesh(data=2, fsdp=2, model=2)) == 4
    assert parts(jax.make_mesh((8,), ("model",))) == 1
    assert parts(jax.make_mesh((8,), ("data",))) == 8
    assert sharding.row_parts(None) == 1

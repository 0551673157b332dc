import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.checkpoint import Checkpoints


def tree(scale=1.0):
    return {
        "a": jnp.arange(6.0).reshape(2, 3) * scale,
        "b": (jnp.array(3, jnp.int32), jnp.ones(4, jnp.bfloat16) * scale),
        "codes": jnp.arange(8, dtype=jnp.uint8),
    }


def test_what_comes_back_is_what_went_in(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    assert checkpoints.latest() is None
    assert not (tmp_path / "c").exists()
    checkpoints.save(5, tree(), {"note": [1, "x"]})
    saved = Checkpoints(tmp_path / "c").restore(tree(0.0))
    assert saved.step == 5 and saved.notes == {"note": [1, "x"]}
    assert jax.tree.structure(saved.tree) == jax.tree.structure(tree())
    for a, b in zip(jax.tree.leaves(saved.tree), jax.tree.leaves(tree()), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_arrays_come_back_to_where_their_counterparts_live(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharded = NamedSharding(mesh, PartitionSpec("x"))
    host = jax.sharding.SingleDeviceSharding(
        jax.devices()[0], memory_kind="pinned_host"
    )
    like = {
        "sharded": jax.device_put(np.arange(16.0, dtype=np.float32), sharded),
        "paged": jax.device_put(np.arange(4.0, dtype=np.float32), host),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, like, {})
    saved = checkpoints.restore(like).tree
    assert saved["sharded"].sharding == sharded
    assert saved["paged"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(saved["sharded"], np.arange(16.0))


def test_the_last_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {})
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.isdigit()) == ["2", "3"]
    assert checkpoints.latest() == 3
    assert float(checkpoints.restore(tree(), 2).tree["a"][0, 1]) == 2


def test_half_a_checkpoint_is_none(tmp_path):
    """What a killed process leaves behind is not taken for a checkpoint."""
    Checkpoints(tmp_path).save(1, tree(), {})
    (tmp_path / "2.orbax-checkpoint-tmp-1").mkdir()
    assert Checkpoints(tmp_path).latest() == 1


def test_another_tree_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        checkpoints.restore(tree())
    checkpoints.save(1, tree(), {})
    other = tree() | {"a": jnp.zeros((2, 4))}
    with pytest.raises(ValueError, match=r"differs at \[\"\['a'\]\", \[2, 4\]"):
        checkpoints.restore(other)
    with pytest.raises(ValueError, match="has 4 arrays for 5"):
        checkpoints.restore(tree() | {"z": jnp.zeros(1)})

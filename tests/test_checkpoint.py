import resource
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax.checkpoint import CheckpointError, Checkpoints


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
    checkpoints.wait()
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
    checkpoints.wait()
    saved = checkpoints.restore(like).tree
    assert saved["sharded"].sharding == sharded
    assert saved["paged"].sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(saved["sharded"], np.arange(16.0))


def test_the_last_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, tree(step), {})
    checkpoints.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    assert checkpoints.latest() == 3
    assert float(checkpoints.restore(tree(), 2).tree["a"][0, 1]) == 2


def test_the_best_one_stays_too(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        checkpoints.save(step, tree(step), {}, best=2 if step > 1 else 1)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 6, 7]
    again = Checkpoints(tmp_path, keep=1)
    again.save(8, tree(8), {}, best=8)
    again.wait()
    assert again.steps() == [8]


def test_half_a_checkpoint_is_none(tmp_path):
    """What a killed process leaves behind is not taken for a checkpoint."""
    first = Checkpoints(tmp_path)
    first.save(1, tree(), {})
    first.wait()
    leave_half_of_one(tmp_path, 2, files=3)
    again = Checkpoints(tmp_path)
    assert again.latest() == 1
    again.save(2, tree(), {})
    again.wait()
    assert again.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def leave_half_of_one(folder, step, files):
    """Writes what a process killed while it saves leaves: many small files."""
    data = folder / f"{step}.orbax-checkpoint-tmp" / "arrays.orbax-checkpoint-tmp" / "d"
    data.mkdir(parents=True)
    for i in range(files):
        (data / str(i)).write_bytes(bytes(100))


def test_half_a_checkpoint_goes_before_room_is_counted(tmp_path, monkeypatch):
    """Not by who only reads: another process may be writing it."""
    leave_half_of_one(tmp_path, 2, files=2000)
    room = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest() is None
    time.sleep(0.5)  # what orbax deletes it deletes in a thread
    assert sum(path.is_file() for path in tmp_path.rglob("*")) == 2000
    checkpoints.check_room({"a": jnp.zeros(16)})
    assert not list(tmp_path.iterdir())
    leave_half_of_one(tmp_path, 2, files=2000)
    with pytest.raises(CheckpointError, match=r"the disk has 0\.0 MB left"):
        checkpoints.check_room({"a": jnp.zeros(1000)})


def test_what_is_saved_may_change_at_once(tmp_path):
    """The step that follows donates the arrays, and writes over them."""
    checkpoints = Checkpoints(tmp_path)
    big = {"a": jnp.arange(2.0**20)}
    checkpoints.save(1, big, {})
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    for _ in range(3):
        big = {"a": add(big["a"])}
    checkpoints.wait()
    assert float(checkpoints.restore(big).tree["a"][-1]) == 2**20 - 1


def test_a_full_disk_is_said_and_the_last_one_stays(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    like = {"a": jnp.arange(2.0**18)}
    checkpoints.save(1, like, {})
    checkpoints.wait()
    unlimited = resource.RLIM_INFINITY
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited))
    try:
        with pytest.raises(
            CheckpointError, match=r"disk is full. The last whole one is of step 1\."
        ):
            noise = np.random.default_rng(0).normal(size=2**18).astype(np.float32)
            checkpoints.save(2, {"a": jnp.array(noise)}, {})
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        signal.signal(signal.SIGXFSZ, handler)
    for again in (Checkpoints(tmp_path), checkpoints):  # the process may go on too
        assert again.latest() == 1
        assert float(again.restore(like).tree["a"][-1]) == 2**18 - 1
    checkpoints.save(2, like, {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_too_small_a_disk_is_said_at_the_start(tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=300)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.check_room({"a": jnp.zeros(16)})
    words = r"needs room for 4 checkpoints, 0\.1 MB, and the disk has 0\.0 MB left"
    with pytest.raises(CheckpointError, match=words):
        checkpoints.check_room({"a": jnp.zeros(4000)})


def test_a_disk_that_has_filled_up_is_said_before_anything_is_written(
    tmp_path, monkeypatch
):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(), {})
    checkpoints.wait()
    room = shutil.disk_usage(tmp_path)._replace(free=2 * 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    words = (
        r"full, it has 2\.0 MB left and 4\.0 MB are needed. The last whole one is of"
    )
    with pytest.raises(CheckpointError, match=words):
        checkpoints.save(2, {"a": jnp.zeros(10**6)}, {})
    assert checkpoints.steps() == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_another_tree_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match="There is no checkpoint in"):
        checkpoints.restore(tree())
    checkpoints.save(1, tree(), {})
    checkpoints.wait()
    other = tree() | {"a": jnp.zeros((2, 4))}
    with pytest.raises(ValueError, match=r"differs at \[\"\['a'\]\", \[2, 4\]"):
        checkpoints.restore(other)
    with pytest.raises(ValueError, match="has 4 arrays for 5"):
        checkpoints.restore(tree() | {"z": jnp.zeros(1)})

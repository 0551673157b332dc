import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedSpec, tuning

RAMP = tuple(float(x) for x in np.linspace(-1, 1, 16, dtype=np.float32))
SPEC = PackedSpec(RAMP, n=4096, k=4096)


def chosen(op, m, dtype=jnp.bfloat16, spec=SPEC):
    return tuning.preference(op, m, dtype, None, spec)


def test_without_a_gpu_the_plain_form(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: None)
    assert chosen("matmul", 1) == chosen("matmul_dx", 2048) == ("xla",)


@pytest.mark.parametrize("capability", [8.0, 8.9, 10.0, 12.0])
def test_kernels_of_another_chip_are_not_chosen(monkeypatch, capability):
    monkeypatch.setattr(tuning, "compute_capability", lambda: capability)
    assert chosen("matmul", 1) == chosen("matmul", 2048) == ("xla",)


# An MLP of Llama: 4096 to 14336 features. What was the fastest, docs/kernels.md.
WIDE = PackedSpec(RAMP, n=14336, k=4096)
UNEVEN = PackedSpec(RAMP, n=13824, k=5120)
LONG = PackedSpec(RAMP, n=4096, k=14336)


@pytest.mark.parametrize(
    "op, m, spec, first",
    [
        ("matmul", 1, WIDE, "matvec"),
        ("matmul", 16, WIDE, "matvec"),
        ("matmul", 8, LONG, "matvec"),
        ("matmul", 9, LONG, "skinny"),
        ("matmul", 17, WIDE, "skinny"),
        ("matmul", 128, WIDE, "skinny"),
        ("matmul", 129, WIDE, "sm90"),
        ("matmul", 512, WIDE, "sm90"),
        ("matmul", 2048, WIDE, "sm90"),
        ("matmul", 4096, WIDE, "sm90"),
        ("matmul", 8192, WIDE, "two_pass"),
        ("matmul", 8192, LONG, "sm90"),
        ("matmul_dx", 1, WIDE, "sm90"),
        ("matmul_dx", 512, WIDE, "sm90"),
        ("matmul_dx", 2048, WIDE, "sm90"),
        ("matmul_dx", 8192, WIDE, "sm90"),
        ("matmul_dx", 8192, LONG, "two_pass"),
        ("matmul", 2048, UNEVEN, "sm90"),
        ("matmul_dx", 2048, UNEVEN, "sm90"),
    ],
)
def test_choices_on_hopper(monkeypatch, op, m, spec, first):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    order = chosen(op, m, spec=spec)
    assert order[0] == first
    assert order[-1] == "xla"  # can always


def test_what_is_added_speaks_for_one_pass(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    order = [
        tuning.preference("matmul", 8192, jnp.bfloat16, None, WIDE, adds)[0]
        for adds in (False, True)
    ]
    assert order == ["two_pass", "sm90"]


@pytest.mark.parametrize(
    "op, m, spec, tile_m, divided, pairs",
    [
        ("matmul", 8192, WIDE, 256, True, False),  # 20 of 3584 tiles are left over
        ("matmul", 2048, WIDE, 256, False, False),
        ("matmul", 1024, WIDE, 256, True, False),
        ("matmul", 512, WIDE, 256, False, False),
        ("matmul", 256, WIDE, 256, False, True),  # one round
        ("matmul_dx", 2048, WIDE, 256, False, False),
        ("matmul_dx", 1024, WIDE, 256, False, True),  # 128 tiles
        ("matmul_dx", 512, WIDE, 256, True, False),  # 64 tiles
        ("matmul_dx", 256, WIDE, 256, True, False),
        ("matmul_dx", 8192, WIDE, 256, False, False),
        ("matmul", 64, WIDE, 64, False, False),
        ("matmul", 2048, UNEVEN, 256, True, False),
        ("matmul", 512, UNEVEN, 256, True, False),  # 84 tiles after a round
        ("matmul", 256, UNEVEN, 256, False, True),
        ("matmul_dx", 2048, UNEVEN, 256, True, False),
        ("matmul_dx", 512, UNEVEN, 256, True, False),  # 80 tiles end to end
    ],
)
def test_tiles_follow_from_rounds(op, m, spec, tile_m, divided, pairs):
    tiling = tuning.best_tiling(op, m, spec)
    found = tiling.tile_m, tiling.divided, tiling.pairs
    assert found == (tile_m, divided, pairs)


def test_arrays_on_the_host_get_no_kernel():
    with jax.default_device(jax.devices("cpu")[0]):
        assert tuning.compute_capability() is None


def test_what_no_kernel_takes(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    assert chosen("matmul", 1, jnp.float32) == ("xla",)
    eight_bits = PackedSpec(RAMP * 16, n=4096, k=4096)
    assert chosen("matmul", 1, spec=eight_bits) == ("xla",)

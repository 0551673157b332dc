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


@pytest.mark.parametrize(
    "op, m, first",
    [
        ("matmul", 1, "matvec"),
        ("matmul", 16, "matvec"),
        ("matmul", 17, "sm90"),
        ("matmul", 2048, "sm90"),
        ("matmul", 8192, "xla"),
        ("matmul_dx", 1, "sm90"),
        ("matmul_dx", 2048, "sm90"),
        ("matmul_dx", 8192, "xla"),
    ],
)
def test_choices_on_hopper(monkeypatch, op, m, first):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    order = chosen(op, m)
    assert order[0] == first
    assert order[-1] == "xla"  # can always


def test_what_no_kernel_takes(monkeypatch):
    monkeypatch.setattr(tuning, "compute_capability", lambda: 9.0)
    assert chosen("matmul", 1, jnp.float32) == ("xla",)
    eight_bits = PackedSpec(RAMP * 16, n=4096, k=4096)
    assert chosen("matmul", 1, spec=eight_bits) == ("xla",)

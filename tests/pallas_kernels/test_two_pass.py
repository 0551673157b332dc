import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PackedSpec, PackedWeight, reference, two_pass

RAMP = tuple(float(x) for x in np.linspace(-1, 1, 16, dtype=np.float32))
SPEC = PackedSpec(RAMP, n=256, k=512)
PACKED = PackedWeight(
    jax.ShapeDtypeStruct((256, 256), jnp.uint8),
    jax.ShapeDtypeStruct((256, 8), jnp.float32),
)


@pytest.mark.parametrize("op, width", [("matmul", 512), ("matmul_dx", 256)])
def test_lowers_for_cuda(op, width):
    x = jax.ShapeDtypeStruct((1024, width), jnp.bfloat16)
    f = jax.jit(lambda x, packed: getattr(two_pass, op)(x, packed, SPEC))
    text = f.trace(x, PACKED).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "dot_general" in text


@pytest.mark.parametrize("op, width", [("matmul", 512), ("matmul_dx", 256)])
def test_is_the_product_of_what_the_kernel_decodes(monkeypatch, op, width):
    monkeypatch.setattr(two_pass.quantize_kernel, "dequantize", reference.dequantize)
    packed = reference.quantize(jax.random.normal(jax.random.key(0), (256, 512)), SPEC)
    x = jax.random.normal(jax.random.key(1), (8, width))
    np.testing.assert_array_equal(
        getattr(two_pass, op)(x, packed, SPEC), getattr(reference, op)(x, packed, SPEC)
    )

import dataclasses

import jax
import pytest
from flax import nnx

from benchmarks.models import SHAPES
from qlora_jax.lora import add_lora
from qlora_jax.models import Llama, LlamaConfig
from qlora_jax.optim.pages import PAGE_SIZE
from qlora_jax.plan import plan_memory
from qlora_jax.train import TrainConfig

TINY = LlamaConfig(64, 64, 128, num_layers=2, num_heads=4, num_kv_heads=2)
SHORT = TrainConfig(
    rank=64, dropout=0.0, batch_size=1, seq_len=512, remat="full", chunk_size=128
)
LONG = dataclasses.replace(SHORT, batch_size=4, seq_len=2048, chunk_size=512)
OFFLOADED = dataclasses.replace(LONG, remat="offload")

# GB that XLA's buffer assignment for an H200 gives the step of benchmarks/memory.py:
# arguments and temporaries (JAX 0.11.2, compiled without the device, state that comes
# from host memory).
COMPILED = [
    ("LLaMA-7B", 5.415, 4.772),
    ("Llama-3-8B", 7.330, 6.652),
    ("LLaMA-13B", 9.577, 8.570),
    ("LLaMA-33B", 21.913, 19.952),
    ("LLaMA-65B", 41.753, 38.543),
    ("Llama-3-70B", 47.071, 43.744),
]
# And of Llama-3-8B that of benchmarks/finetune.py.
COMPILED_LONG = [
    (LONG, {"paged": False}, 11.458),
    (dataclasses.replace(LONG, unroll=True), {"paged": False}, 11.310),
    (
        dataclasses.replace(LONG, unroll=True, chunk_size=1024),
        {"paged": False},
        11.708,
    ),
    (OFFLOADED, {"paged": False}, 9.538),
    (OFFLOADED, {}, 8.195),
    (dataclasses.replace(LONG, remat="none"), {"paged": False}, 33.957),
]


@pytest.mark.parametrize("name, standard, lean", COMPILED)
def test_the_plan_is_what_the_compiler_takes(name, standard, lean):
    assert plan_memory(SHAPES[name], SHORT).device_gb == pytest.approx(
        standard, abs=0.05
    )
    assert plan_memory(SHAPES[name], SHORT, lean=True).device_gb == pytest.approx(
        lean, abs=0.05
    )


def test_the_plan_of_a_lean_offloaded_step_is_what_the_compiler_takes():
    train = dataclasses.replace(SHORT, remat="offload")
    plan = plan_memory(SHAPES["Llama-3-70B"], train, lean=True)
    assert plan.device_gb == pytest.approx(43.198, abs=0.1)
    assert plan.host["activations"] == pytest.approx(2.181e9, rel=0.01)


@pytest.mark.parametrize("train, options, compiled", COMPILED_LONG)
def test_the_plan_of_long_rows_is_what_the_compiler_takes(train, options, compiled):
    plan = plan_memory(SHAPES["Llama-3-8B"], train, **options)
    assert plan.device_gb == pytest.approx(compiled, rel=0.03)


def test_a_page_of_whole_leaves_is_there_twice_while_it_is_computed():
    train = dataclasses.replace(SHORT, rank=256, seq_len=128)
    config = SHAPES["Llama-3-70B"]
    plan = plan_memory(config, train)
    # The two moments of a leaf of 28672, old and new. Smaller ones went before; their
    # gradients, of 4 bytes a number as each moment has, are gone.
    large = 80 * 256 * 28672
    sides = [n for shape in config.linear_shapes().values() for n in shape]
    before = sum(80 * 256 * n for n in sides if n < 28672)
    assert plan.device["activations, or pages of state"] == 16 * large - 4 * before


def test_lean_state_comes_in_slices():
    train = dataclasses.replace(SHORT, rank=256, seq_len=128)
    config = SHAPES["Llama-3-70B"]
    name = "activations, or pages of state"
    lean = plan_memory(config, train, lean=True)
    activations = plan_memory(config, train, paged=False).device["activations"]
    assert lean.device[name] == activations > 2 * PAGE_SIZE
    # 8-bit optimizers compute over blocks of a leaf, and are not sliced
    eight = dataclasses.replace(train, algorithm="adamw8bit")
    assert plan_memory(config, eight, lean=True).device[name] > activations


def test_nf4_with_double_quantization_costs_4_127_bits():
    plan = plan_memory(SHAPES["LLaMA-7B"], SHORT)
    numbers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    bits = 8 * plan.device["frozen weights, nf4"] / numbers
    assert bits == pytest.approx(4.127, abs=5e-4)


def test_what_goes_to_the_host_leaves_the_device():
    config = SHAPES["Llama-3-8B"]
    trained = 32 * 64 * sum(k + n for k, n in config.linear_shapes().values())
    paged = plan_memory(config, SHORT)
    assert paged.host == {"optimizer state": 8 * trained}
    assert "optimizer state" not in paged.device
    kept = plan_memory(config, SHORT, paged=False)
    assert kept.device["optimizer state"] == 8 * trained and kept.host == {}
    offloaded = plan_memory(config, OFFLOADED)
    # The input, q, k, v and the residual stream in the middle.
    width = 4096 + (4096 + 2 * 1024) + 4096
    assert offloaded.host["activations"] == 32 * 4 * 2048 * width * 2


def test_accumulation_takes_a_second_gradient_and_fewer_activations():
    whole = dataclasses.replace(LONG, remat="none")
    parts = dataclasses.replace(whole, accumulate=4)
    config = SHAPES["Llama-3-8B"]
    a, b = (plan_memory(config, t, paged=False).device for t in (whole, parts))
    assert b["gradients of a part"] == b["gradients"]
    assert b["activations"] < 0.3 * a["activations"]


def test_without_quantization_a_number_takes_two_bytes():
    plan = plan_memory(TINY, dataclasses.replace(SHORT, rank=8), quantize=None)
    numbers = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plan.device["frozen weights, bfloat16"] == 2 * numbers


def test_it_prints_a_table():
    text = str(plan_memory(SHAPES["Llama-3-8B"], SHORT))
    assert "frozen weights, nf4                    3.60 GB" in text
    assert "on the device                          7.32 GB" in text
    assert "on the host                            1.34 GB" in text


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="quantize='nf5' is no format; there are"):
        plan_memory(SHAPES["LLaMA-7B"], SHORT, quantize="nf5")


def test_a_rank_above_a_side_of_a_weight_is_refused_as_by_the_adapters():
    plan_memory(TINY, dataclasses.replace(SHORT, rank=32))
    words = "rank=33 of '{}' must be from 1 to 32, the smaller side of its shape"
    with pytest.raises(ValueError, match=words.format("k_proj")):
        plan_memory(TINY, dataclasses.replace(SHORT, rank=33))
    model = Llama(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=words.format("layers/k_proj")):
        add_lora(model, rank=33, targets="k_proj", key=jax.random.key(0))

import jax
import pytest

from qlora_jax import throughput
from qlora_jax.lora import split_trainable
from tests.train.tiny import adapted


def test_operations_of_a_token():
    # q and o [64, 64], k and v [64, 32], three of the MLP [64, 64]: two layers. The
    # embedding is the head too; norms are counted, and are 5 x 64.
    matrices = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 64) + 96 * 64
    norms = 4 * 64
    model = adapted(rank=4)
    trained = sum(leaf.size for leaf in jax.tree.leaves(split_trainable(model)[0]))
    found = throughput.flops_per_token(model)
    assert found == 4 * (matrices + norms) + 6 * trained


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA L4", 121),
        ("TPU v5 lite", 197),
        ("NVIDIA RTX A4000", None),
        ("cpu", None),
    ],
)
def test_peaks_are_those_of_the_datasheets(kind, tflops, monkeypatch):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    found = throughput.peak_flops()
    assert found == (tflops and tflops * 1e12)

"""From checkpoint to checkpoint: what load_model and save_model give, streamed."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qlora_jax.interop.convert import convert_model, merge_adapter, quantize_model
from qlora_jax.interop.hub import load_model
from qlora_jax.interop.peft import load_adapter
from qlora_jax.interop.save import save_model
from qlora_jax.interop.tokenizer import load_tokenizer
from qlora_jax.interop.weights import ModelFileError
from qlora_jax.lora import merge_lora
from tests.conftest import GOLDEN, ROOT
from tests.interop.folders import BFLOAT16, LLAMA, write_folder
from tests.interop.folders import FAMILIES as SMALL
from tests.interop.test_peft import relative

FAMILIES, PEFT = GOLDEN / "families", GOLDEN / "peft_lora"
TOKENS = jnp.arange(1, 13)[None]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "format, double_quant, storage",
    [
        ("nf4", True, "uint8"),
        ("nf4", False, "float16"),
        ("fp4", False, "bfloat16"),
        ("int8", True, "uint8"),
    ],
)
def test_quantized_as_a_loaded_model_is(tmp_path, format, double_quant, storage):
    """The same folder, file by file, as loading whole and saving."""
    options = dict(double_quant=double_quant, storage=storage)
    source = FAMILIES / "source"
    quantize_model(source, tmp_path / "a", format=format, **options)
    save_model(
        load_model(source), tmp_path / "b", quantize=format, source=source, **options
    )
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_block_size(tmp_path):
    quantize_model(
        FAMILIES / "source", tmp_path / "a", block_size=32, double_quant=False
    )
    weight = load_model(tmp_path / "a").layers.up_proj.get_value()
    assert (weight.block_size, weight.format.name) == (32, "nf4")


def test_there_and_back_without_loss(tmp_path):
    """Dense, 4 bits, dense: the second pair of folders is the first."""
    quantize_model(FAMILIES / "source", tmp_path / "q")
    convert_model(tmp_path / "q", tmp_path / "dense", dtype=jnp.float32)
    quantize_model(
        tmp_path / "dense", tmp_path / "again", dtype=jnp.bfloat16, shard_bytes=30_000
    )
    convert_model(tmp_path / "again", tmp_path / "dense2", dtype=jnp.float32)
    first, second = (
        safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
        for name in ("dense", "dense2")
    )
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        # bfloat16 in between rounds what 4 bits decode to; the codes stay.
        np.testing.assert_allclose(second[key], tensor, rtol=2**-7, err_msg=key)
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2


def test_dense_as_it_was(tmp_path):
    convert_model(FAMILIES / "llama_tied", tmp_path / "a")
    for name in ("model.safetensors", "generation_config.json"):
        ours, theirs = (
            (f / name).read_bytes() for f in (tmp_path / "a", FAMILIES / "llama_tied")
        )
        assert ours == theirs
    ours, theirs = (
        json.loads((f / "config.json").read_text())
        for f in (tmp_path / "a", FAMILIES / "llama_tied")
    )
    assert ours == theirs


@pytest.mark.parametrize("family", sorted(SMALL.keys() - {"mistral"}))
def test_to_gguf_and_back(tmp_path, family):
    """Every family through a GGUF file of float32: bit for bit, config and all."""
    weights = write_folder(tmp_path / "in", SMALL[family])
    convert_model(tmp_path / "in", tmp_path / "m.gguf", tensor_type="F32")
    if family.startswith("llama3"):  # not of a published context, as in test_gguf_out
        with pytest.raises(NotImplementedError, match="cannot say rope_scaling"):
            convert_model(tmp_path / "m.gguf", tmp_path / "out")
        return
    convert_model(tmp_path / "m.gguf", tmp_path / "out")
    got = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)
    before, after = (load_model(tmp_path / n) for n in ("in", "out"))
    np.testing.assert_allclose(
        after.config.rope_frequencies(), before.config.rope_frequencies(), rtol=1e-6
    )
    tokenizers = [load_tokenizer(tmp_path / name) for name in ("in", "m.gguf", "out")]
    for tokenizer in tokenizers:
        assert tokenizer.encode("naïve 12\n") == tokenizers[0].encode("naïve 12\n")
        assert tokenizer.eos_id == 2
        assert tokenizer.chat_template == tokenizers[0].chat_template


def test_mistral_is_llama_in_gguf(tmp_path):
    write_folder(tmp_path / "in", SMALL["mistral"])
    convert_model(tmp_path / "in", tmp_path / "m.gguf", tensor_type="F32")
    model = load_model(tmp_path / "m.gguf", dtype=jnp.float32)
    assert model.config.sliding_window == 5
    expected = load_model(tmp_path / "in", dtype=jnp.float32)(TOKENS)
    np.testing.assert_allclose(model(TOKENS), expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_is_merged(tmp_path):
    """As PEFT computes, and as merging in memory."""
    with np.load(PEFT / "logits.npz") as archive:
        logits = dict(archive)
    with np.load(PEFT / "more.npz") as archive:
        tokens = jnp.asarray(logits["tokens"], jnp.int32)
        logits |= dict(archive)  # whose "tokens" is the adapter of that name
    base = load_model(PEFT / "base", dtype=jnp.float32)
    for name in ("plain", "rslora", "dora", "tokens", "saved_ensured", "saved_norms"):
        merge_adapter(PEFT / "base", PEFT / name, tmp_path / name)
        model = load_model(tmp_path / name, dtype=jnp.float32)
        assert relative(model(tokens), logits[name]) < 1e-5
        ours = merge_lora(load_adapter(base, PEFT / name), report=None)
        for a, b in zip(*map(jax.tree.leaves, (model, ours)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_merged(tmp_path, bias):
    base = FAMILIES / "llama_bias"
    options = {"dtype": "float32", "report": None}
    merge_adapter(base, PEFT / f"bias_{bias}", tmp_path / "m", **options)
    model = load_model(tmp_path / "m", dtype=jnp.float32)
    with np.load(PEFT / "biases.npz") as archive:
        tokens = jnp.asarray(archive["tokens"], jnp.int32)
        # The base is bfloat16, and a sum is rounded to its type.
        assert relative(model(tokens), archive[bias]) < 5e-2


@pytest.mark.parametrize(
    "target, options, least, most",
    [
        ("m", {}, 0.0, 0.0),
        ("m", {"dtype": "bfloat16"}, 0.001, 0.003),
        ("m", {"quantize": "nf4"}, 0.07, 0.11),
        ("m.gguf", {"tensor_type": "Q8_0"}, 0.003, 0.01),
    ],
)
def test_a_merge_tells_its_drift(tmp_path, target, options, least, most):
    reports = []
    options = {**options, "report": reports.append}
    merge_adapter(PEFT / "base", PEFT / "dora", tmp_path / target, **options)
    (report,) = reports
    base = load_model(PEFT / "base", dtype=jnp.float32)
    ours = []
    merge_lora(load_adapter(base, PEFT / "dora"), report=ours.append)
    wanted = ours[0].drift["layers/q_proj"].adapter
    found = [d for name, d in report.drift.items() if "q_proj" in name]
    mean_square = sum(d.adapter**2 for d in found) / len(found)
    assert len(report.drift) == 4 and mean_square**0.5 == pytest.approx(wanted, rel=0.1)
    for drift in report.drift.values():
        assert least <= drift.error <= most


def test_an_adapter_is_merged_into_4_bits(tmp_path):
    merge_adapter(PEFT / "base", PEFT / "plain", tmp_path / "q", quantize="nf4")
    merge_adapter(PEFT / "base", PEFT / "plain", tmp_path / "d")
    quantize_model(tmp_path / "d", tmp_path / "dq")
    assert files_of(tmp_path / "q") == files_of(tmp_path / "dq")
    # A base in 4 bits becomes dense; what has no adapter does too.
    quantize_model(PEFT / "base", tmp_path / "base4")
    merge_adapter(tmp_path / "base4", PEFT / "rslora", tmp_path / "m", dtype="float32")
    tensors = safetensors.numpy.load_file(tmp_path / "m" / "model.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float32"}


def test_an_adapter_of_another_model(tmp_path):
    with pytest.raises(ModelFileError, match=r"is of a module that|and the model"):
        merge_adapter(FAMILIES / "llama", PEFT / "plain", tmp_path / "m")
    with pytest.raises(NotImplementedError, match=r"parts the embedding from the head"):
        merge_adapter(PEFT / "base", PEFT / "saved_tied", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda out: convert_model(
                FAMILIES / "llama", out / "m.gguf", dtype=jnp.float16
            ),
            "is a GGUF file: give tensor_type, not quantize or dtype",
        ),
        (
            lambda out: convert_model(FAMILIES / "llama", out / "m", tensor_type="F16"),
            r"tensor_type='F16' is of \.gguf files, and .*m is a folder",
        ),
        (
            lambda out: convert_model(
                FAMILIES / "llama", out / "m.gguf", tensor_type="Q2_K"
            ),
            "tensor_type='Q2_K' is none of F32, F16",
        ),
        (
            lambda out: quantize_model(FAMILIES / "int8", out / "m"),
            r"is already int8 without double quantization; quantize='nf4'",
        ),
        (
            lambda out: convert_model(FAMILIES / "absent", out / "m"),
            "no model at",
        ),
        (
            lambda out: convert_model(FAMILIES / "llama_dynamic", out / "m.gguf"),
            "cannot say dynamic rotary scaling",
        ),
    ],
)
def test_wrong_calls_leave_nothing(tmp_path, call, words):
    with pytest.raises((ValueError, NotImplementedError), match=words):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_source_leaves_nothing(tmp_path):
    shutil.copytree(FAMILIES / "llama", tmp_path / "in")
    file = tmp_path / "in" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match=r"model\.safetensors cannot be read"):
        quantize_model(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_lines_of_progress(tmp_path, capsys):
    quantize_model(FAMILIES / "source", tmp_path / "q", progress=True)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("Quantizing source: 0.14 of 0.14 MB, ")


MEMORY = """
import pathlib, sys
from qlora_jax.interop.convert import quantize_model

def peak():  # of this process alone
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

quantize_model(sys.argv[1], sys.argv[1] + "-q")  # what the compiler takes
before = peak()
quantize_model(sys.argv[2], sys.argv[2] + "-q", shard_bytes=50_000_000)
print(peak() - before)
"""


@pytest.mark.slow
def test_quantizing_holds_a_shard_and_not_the_model(tmp_path):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    for name, layers in (("small", 1), ("big", 60)):
        hf = LLAMA | shape | {"num_hidden_layers": layers}
        tensors = write_folder(tmp_path / name, hf, shards=4, dtype=BFLOAT16)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert total > 450_000_000
    del tensors
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "small"), str(tmp_path / "big")],
        cwd=ROOT,
        # Arrays go back when they are freed: what glibc keeps for later is up to a
        # hundred megabytes more, by how threads happen to run.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        check=True,
    )
    # A shard, and tensors with their temporaries.
    assert int(done.stdout) <= 200_000_000, total
    assert len(list((tmp_path / "big-q").glob("*.safetensors"))) == 3

"""Logits of every family against those of transformers 5.23.0 (make_families.py)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.generate import generate
from qlora_jax.interop.hub import load_model
from qlora_jax.models.config_hf import config_from_hf, config_to_hf
from tests.conftest import GOLDEN

pytestmark = pytest.mark.unoptimized

FAMILIES = GOLDEN / "families"
NAMES = sorted(path.parent.name for path in FAMILIES.glob("*/logits.npy"))
LENGTHS = (24, 13, 5)
LOGITS_GOLDEN = 1e-4  # ||logits - theirs|| / ||theirs||, float32


def golden(name):
    """Returns the ids and the logits of each row, without padding."""
    tokens, logits = (
        np.load(FAMILIES / "tokens.npy"),
        np.load(FAMILIES / name / "logits.npy"),
    )
    rows = zip(tokens, logits, LENGTHS, strict=True)
    return [(ids[:length], row[:length]) for ids, row, length in rows]


def check(got, expected):
    error = np.linalg.norm(np.asarray(got) - expected) / np.linalg.norm(expected)
    assert error <= LOGITS_GOLDEN


def batch(rows):
    """Returns tokens and segment ids: each row padded right, then left, then packed."""
    total = sum(LENGTHS)
    tokens, segments = np.zeros((2, 7, total), np.int32)
    for i, (ids, _) in enumerate(rows):
        for row, at in ((i, 0), (i + 3, total - len(ids))):
            tokens[row, at : at + len(ids)] = ids
            segments[row, at : at + len(ids)] = 1
    tokens[6] = np.concatenate([ids for ids, _ in rows])
    segments[6] = np.repeat(np.arange(3), LENGTHS)
    return tokens, segments


@jax.jit
def run(model, tokens, segments):
    """Returns the logits of a batch, and those of its first row with a cache."""
    one = tokens[:1, : LENGTHS[0]]
    cache = model.init_cache(1, LENGTHS[0])
    first, cache = model.decode(one[:, :12], cache)
    rest, cache = model.decode(one[:, 12:], cache)
    cached = model.head(jnp.concatenate([first, rest], axis=1))
    return model(tokens, segment_ids=segments), cached[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
    """Ragged rows padded on the right and on the left, packed, and decoded."""
    rows = golden(name)
    model = load_model(FAMILIES / name, dtype=jnp.float32)
    logits, cached = run(model, *batch(rows))
    for i, (ids, expected) in enumerate(rows):
        check(logits[i, : len(ids)], expected)
        check(logits[i + 3, -len(ids) :], expected)
    check(logits[6], np.concatenate([expected for _, expected in rows]))
    # With dynamic scaling what is in a cache was turned at the length of its time.
    in_parts = FAMILIES / name / "cached.npy"
    check(cached, np.load(in_parts) if in_parts.exists() else rows[0][1])


def test_every_family_is_here():
    assert NAMES == [
        "llama",
        "llama_bias",
        "llama_dynamic",
        "llama_linear",
        "llama_llama3",
        "llama_tied",
        "llama_yarn",
        "mistral",
        "qwen2",
        "qwen3",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_config_out_is_the_config_in(name):
    theirs = json.loads((FAMILIES / name / "config.json").read_text())
    config = config_from_hf(theirs)
    ours = config_to_hf(config)
    assert config_from_hf(ours) == config
    differing = {key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]}
    assert differing <= {"max_window_layers"}  # without effect: no window


def test_generation_sees_the_window():
    """Mistral's: with a cache as without, past the window of 6 tokens."""
    model = load_model(FAMILIES / "mistral", dtype=jnp.float32)
    prompts = [[1, 5, 9, 2, 7, 30, 12, 11, 3, 4], [7, 8, 9]]
    answers = generate(model, prompts, max_new_tokens=16, eos_ids=[])
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = jnp.asarray([[*prompt, *answer]])
        wanted = model(tokens)[0, len(prompt) - 1 : -1].argmax(axis=-1)
        assert answer == wanted.tolist()
    whole = dataclasses.replace(model.config, sliding_window=None)
    model.config = model.layers.config = whole
    assert generate(model, prompts, max_new_tokens=16, eos_ids=[]) != answers

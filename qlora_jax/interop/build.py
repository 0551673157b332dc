"""From the tensors of a checkpoint to a model, one in host memory at a time."""

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qlora_jax import sharding
from qlora_jax.interop.progress import Progress
from qlora_jax.interop.weights import (
    ModelFileError,
    Source,
    check_tensors,
    hf_name,
    quantize_rows,
)
from qlora_jax.models.config import LINEAR_WEIGHTS
from qlora_jax.models.llama import Llama
from qlora_jax.quant import QuantizedTensor

if TYPE_CHECKING:
    from jax.typing import DTypeLike


def build_model(
    source: Source,
    *,
    quantize: str | None = None,
    double_quant: bool = True,
    dtype: "DTypeLike" = jnp.bfloat16,
    mesh: Mesh | None = None,
    progress: bool | None = None,
) -> Llama:
    """Builds the model of a checkpoint.

    A tensor is read while the one before it is quantized and put into its place in the
    stack of its layers: host memory holds two of them, the device one besides the
    model.

    Args:
        source: the checkpoint.
        quantize: format of the linear weights of the layers, None to take them as they
            are. Embedding, head and norms stay dense.
        double_quant: quantize the scales too.
        dtype: of what is not quantized, and of the computation.
        mesh: the devices to put the model on, see `qlora_jax.sharding`. A weight is
            quantized whole on the first of them and then split, so its bytes are those
            of the model on one device.
        progress: show bytes and time left; None: on a terminal, or if it takes long.

    Raises:
        ModelFileError: if tensors are missing, unexpected or of another shape, or a
            weight to be quantized is not finite.
        ValueError: if weights are already quantized, and not as `quantize` asks.
        NotImplementedError: if layers are quantized differently.
    """
    check_tensors(source)
    mesh = None if mesh is None else sharding.checked(mesh)
    config = source.config
    # The structure without its arrays; every parameter is then given its value.
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=dtype))
    top = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight"}
    if not config.tie_embeddings:
        top["lm_head"] = "lm_head.weight"
    stacked = [n for n, v in vars(model.layers).items() if isinstance(v, nnx.Param)]
    names = list(top.values())
    for attribute in stacked:
        names += [hf_name(attribute).format(i) for i in range(config.num_layers)]
    total = sum(source.nbytes(name) for name in names)
    reader = _Reader(source, quantize, double_quant, jnp.dtype(dtype), mesh)
    with Progress(f"Loading {source}", total, progress) as shown:
        tensors = _read_ahead(source, names)

        def read(attribute: str) -> Any:
            name, tensor = next(tensors)
            value = reader.value(attribute, name, tensor)
            shown.advance(source.nbytes(name))
            return name, value

        for attribute in top:
            _, value = read(attribute)
            setattr(model, attribute, nnx.Param(reader.placed(attribute, value)))
        for attribute in stacked:
            one = (read(attribute) for _ in range(config.num_layers))
            value = reader.stack(attribute, one, config.num_layers)
            setattr(model.layers, attribute, nnx.Param(value))
    reader.check_finite()
    return model


def _read_ahead(
    source: Source, names: list[str]
) -> Iterator[tuple[str, np.ndarray | QuantizedTensor]]:
    """Yields each tensor, the next one being read meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        coming = pool.submit(source.read, names[0])
        for name, following in zip(names, [*names[1:], None], strict=True):
            tensor = coming.result()
            if following is not None:
                coming = pool.submit(source.read, following)
            yield name, tensor
            del tensor  # before the next is waited for


@dataclasses.dataclass
class _Reader:
    """How tensors of a checkpoint become weights; the fields are `build_model`'s."""

    source: Source
    quantize: str | None
    double_quant: bool
    dtype: np.dtype
    mesh: Mesh | None

    def __post_init__(self):
        self._finite: dict[str, jax.Array] = {}
        # Arrays made here go to the mesh's first device until they are split.
        self._device = None if self.mesh is None else self.mesh.devices.flat[0]

    def value(self, attribute: str, name: str, w: np.ndarray | QuantizedTensor) -> Any:
        """Returns one weight as the model holds it, on one device."""
        is_linear = attribute in LINEAR_WEIGHTS
        if isinstance(w, QuantizedTensor):
            if not is_linear and attribute != "lm_head":
                raise NotImplementedError(
                    f"{self.source}: {name} is quantized; only weights of linear "
                    "layers can be."
                )
            where = f"{self.source}: {name}"
            _check_agrees(where, w, self.quantize, self.double_quant)
            return w
        array = to_device(w, self._device)
        if is_linear and self.quantize is not None:
            quantized, self._finite[name] = quantize_rows(
                array, self.quantize, self.double_quant, 64, self.dtype
            )
            return quantized
        transposed = is_linear or attribute == "lm_head"
        if not transposed and array.dtype == self.dtype:
            return array
        return _cast(array, transposed, self.dtype)

    def stack(
        self, attribute: str, weights: Iterable[tuple[str, Any]], count: int
    ) -> Any:
        """Returns the stack of the weights of all layers, each put in as it comes."""
        weights = iter(weights)
        first_name, first = next(weights)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), first
        )
        leaves, treedef = jax.tree.flatten(shapes)
        where: tuple[Any, ...] = (None,) * len(leaves)
        if self.mesh is not None:
            split = weight_shardings(self.mesh, attribute, shapes, 1)
            where = tuple(jax.tree.leaves(split))
        stack = [
            jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
            for leaf, sharding in zip(leaves, where, strict=True)
        ]
        kind = jax.eval_shape(lambda w: w, first)
        for i, (name, one) in enumerate(
            itertools.chain([(first_name, first)], weights)
        ):
            _check_stacks(f"{self.source}: {name}", one, first_name, kind)
            one = jax.tree.leaves(self.placed(attribute, one))
            stack = _insert(stack, one, jnp.asarray(i, jnp.int32), where)
            first = None  # its memory is not needed any more
        return treedef.unflatten(stack)

    def placed(self, attribute: str, weight: Any) -> Any:
        """Returns a weight without stack axes, split over the mesh if there is one."""
        if self.mesh is None:
            return weight
        return jax.device_put(weight, weight_shardings(self.mesh, attribute, weight, 0))

    def check_finite(self) -> None:
        """Refuses weights that no codes can stand for; waits for the device once."""
        for name, finite in self._finite.items():
            if not finite:
                raise ModelFileError(
                    f"{self.source}: {name} holds NaN or infinity and cannot be "
                    "quantized; download it again."
                )


def weight_shardings(mesh: Mesh, name: str, weight: Any, stack: int) -> Any:
    """Returns the shardings of a weight's arrays, in a tree like the weight.

    A quantized weight is split along the features it stands for, never through a block;
    where blocks cross rows it stays whole, as do the scales of the scales.

    Args:
        mesh: from `sharding.make_mesh` or `sharding.checked`.
        name: of the attribute that holds the weight.
        weight: an array or QuantizedTensor, or one of shapes.
        stack: stack axes in front.
    """
    if not isinstance(weight, QuantizedTensor):
        return sharding.array_sharding(mesh, name, weight.shape, stack)
    whole = NamedSharding(mesh, PartitionSpec())
    if weight.in_features % weight.block_size:
        return jax.tree.map(lambda _: whole, weight)
    into, out = sharding.matrix_axes(name)
    blocks = weight.in_features // weight.block_size
    spec = PartitionSpec(
        *[None] * stack,
        sharding.fitting(mesh, out, weight.out_features),
        sharding.fitting(mesh, into, blocks),
    )
    split = NamedSharding(mesh, spec)
    return dataclasses.replace(
        weight,
        codes=split,
        absmax=split,
        nested_absmax=None if weight.nested_absmax is None else whole,
        offset=None if weight.offset is None else whole,
    )


# A transfer to a GPU holds a copy in pinned memory, which stays allocated: that of a
# whole embedding would be a gigabyte.
_PART = 2**27


def to_device(
    array: np.ndarray, device: Any, *, part_bytes: int | None = None
) -> jax.Array:
    """Returns an array on a device, put there in parts of some of its rows.

    Args:
        array: in host memory.
        device: a jax.Device; None: the default one.
        part_bytes: of a part; None: 2**27, and all at once on a CPU.
    """
    if part_bytes is None:
        platform = jax.default_backend() if device is None else device.platform
        part_bytes = array.nbytes if platform == "cpu" else _PART
    if array.nbytes <= part_bytes:
        return jax.device_put(array, device)
    rows = max(part_bytes * len(array) // array.nbytes, 1)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    whole = jnp.zeros(array.shape, dtype, device=device)
    for start in range(0, len(array), rows):
        part = jax.device_put(array[start : start + rows], device)
        whole = _insert_rows(whole, part, jnp.asarray(start, jnp.int32))
        whole.block_until_ready()  # before the next part takes memory
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _insert_rows(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(whole, part, start, 0)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _cast(w: jax.Array, transposed: bool, dtype: Any) -> jax.Array:
    return (w.T if transposed else w).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="where")
def _insert(
    stack: list[jax.Array],
    one: list[jax.Array],
    index: jax.Array,
    where: tuple[Any, ...],
) -> list[jax.Array]:
    # Donated: the stack is changed in place, and there is never a second one. For that
    # the result must lie where the stack does.
    changed = [
        lax.dynamic_update_index_in_dim(whole, part, index, 0)
        for whole, part in zip(stack, one, strict=True)
    ]
    return [
        lax.with_sharding_constraint(leaf, sharding) if sharding is not None else leaf
        for leaf, sharding in zip(changed, where, strict=True)
    ]


def _kind(w: QuantizedTensor) -> str:
    scales = "with" if w.nested_format is not None else "without"
    return f"{w.format.name} {scales} double quantization, blocks of {w.block_size}"


def _check_agrees(
    where: str, w: QuantizedTensor, quantize: str | None, double_quant: bool
) -> None:
    if quantize is None:
        return
    if (w.format.name, w.nested_format is not None) != (quantize, double_quant):
        raise ValueError(
            f"{where} is already {_kind(w)}; {quantize=} with {double_quant=} asks for "
            "another. Leave quantize out to take it as it is, or load the model it was "
            "made from."
        )


def _check_stacks(where: str, one: Any, first_name: str, first: Any) -> None:
    """Layers are one stacked array, so they must be of one kind, to the last digit."""
    if jax.tree.structure(one) == jax.tree.structure(first):
        return
    kinds = [
        _kind(w) if isinstance(w, QuantizedTensor) else "dense" for w in (one, first)
    ]
    if kinds[0] == kinds[1]:
        what = "has other numbers in quant_map, nested_quant_map or dtype than"
        raise NotImplementedError(
            f"{where} {what} {first_name}; all layers must share them."
        )
    raise NotImplementedError(
        f"{where} is {kinds[0]}, and {first_name} is {kinds[1]}; all layers must be of "
        "one kind."
    )

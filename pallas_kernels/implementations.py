"""Runs an implementation of an op by name, alone or on each shard of a mesh."""

import contextlib
import dataclasses
import functools
import importlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import reference
from pallas_kernels.packed import PackedSpec, PackedWeight

Implementation = Literal["xla", "two_pass", "sm90", "sm80", "matvec", "skinny"]
Op = Literal["matmul", "matmul_dx"]

# Imported when first chosen, since kernel modules pull in the GPU part of Pallas.
_MODULES = {
    "two_pass": "pallas_kernels.two_pass",
    "sm90": "pallas_kernels.matmul_sm90",
    "sm80": "pallas_kernels.matmul_sm80",
    "matvec": "pallas_kernels.matvec",
    "skinny": "pallas_kernels.skinny",
}


def run(
    name: Implementation,
    op: Op,
    x: jax.Array,
    packed: PackedWeight,
    spec: PackedSpec,
    addend: tuple[jax.Array, jax.Array] | None = None,
    onto: jax.Array | None = None,
) -> jax.Array:
    """Runs one implementation of `op` on x `[m, k]` (dx: `[m, n]`).

    An addend of t `[m, r]` and u `[n, r]` (dx: `[k, r]`) adds t @ uᵀ; `onto`, of the
    shape of the result, is added as it is.

    The plain form is partitioned by the compiler. A kernel cannot be, so where there
    are several devices it runs on each shard; see `sharded_product`.

    Raises:
        NotImplementedError: if the implementation cannot do this.
    """
    adds = {"addend": addend, "onto": onto}
    adds = {option: value for option, value in adds.items() if value is not None}
    if adds and name != "sm90":
        return _add(run(name, op, x, packed, spec), addend, onto)
    if name == "xla":
        return getattr(reference, op)(x, packed, spec)
    if jax.device_count() == 1:
        return run_kernel(name, op, x, packed, spec, **adds)
    if not spec.blocks_in_rows:
        raise NotImplementedError(
            f"A sharded kernel takes blocks inside rows; {spec.k=}, {spec.block_size=}."
        )
    # Nested scales cross rows, so they are decoded before anything is cut.
    packed = reference.select_layer(packed)
    absmax = reference.decode_absmax(packed, spec)
    single = dataclasses.replace(spec, nested_codebook=None)
    return sharded_product(x, packed.codes, absmax, adds, name, op, single)


def _add(product, addend=None, onto=None):
    """The sum of a product and what is added to it.

    XLA makes one product of both where the product is the first operand of the sum.
    """
    if addend is None:
        return product + onto
    t, u = addend
    thin = reference.dot(t, u, contract=1)
    return product + (thin if onto is None else onto + thin)


def run_kernel(name, op, x, packed, spec, **options) -> jax.Array:
    """Runs a kernel on the arrays as they are, on one device."""
    module = importlib.import_module(_MODULES[name])
    if not hasattr(module, op):
        raise NotImplementedError(f"{name!r} has no {op}; leave `implementation` out.")
    with jax.named_scope(f"{op}_{name}"):
        return getattr(module, op)(x, packed, spec, **options)


@functools.partial(custom_partitioning, static_argnums=(4, 5, 6))
def sharded_product(
    x: jax.Array,
    codes: jax.Array,
    absmax: jax.Array,
    adds: dict[str, Any],
    name: Implementation,
    op: Op,
    spec: PackedSpec,
) -> jax.Array:
    """An op that each device computes on its shard.

    Rows of x stay where they are. Where the weight is cut along the axis that the op
    contracts, x is cut alike, and the partial products are summed over those devices;
    where it is cut along the other axis, so is the result.

    Args:
        x: `[m, k]`, or `[m, n]` for `matmul_dx`.
        codes: uint8 `[n, k // 2]`.
        absmax: float32 `[n, k // block_size]`.
        adds: what the result is added to, by its name in `run`; what there is not is
            left out. A kernel adds it where no partial products are summed.
        name: the implementation.
        op: which product.
        spec: what the arrays mean, without nested scales.
    """

    # jit keeps the constants of the kernel inside; custom_partitioning takes none.
    @jax.jit
    def whole(x, codes, absmax, adds):
        return run_kernel(name, op, x, PackedWeight(codes, absmax), spec, **adds)

    return whole(x, codes, absmax, adds)


def _partition(name, op, spec, mesh, arguments, result):
    del result
    x, codes, absmax, adds = arguments
    rows = x.sharding.spec[0]
    n_axes = codes.sharding.spec[0]
    # The columns of codes and of scales are cut together or not at all.
    k_axes = absmax.sharding.spec[1]
    taken = _axes(rows)
    n_axes = None if taken & _axes(n_axes) else n_axes
    k_axes = None if (taken | _axes(n_axes)) & _axes(k_axes) else k_axes
    kept, contracted = (n_axes, k_axes) if op == "matmul" else (k_axes, n_axes)
    cut = {axis: size for axis, size in mesh.shape.items()}
    local = dataclasses.replace(
        spec,
        n=spec.n // _count(n_axes, cut),
        k=spec.k // _count(k_axes, cut),
    )

    def on_shard(x, codes, absmax, adds):
        kernel = functools.partial(
            run_kernel, name, op, x, PackedWeight(codes, absmax), local
        )
        if adds and not contracted:
            with contextlib.suppress(NotImplementedError):  # a shard may be odd
                return kernel(**adds)
        y = kernel()
        if contracted:
            y = jax.lax.psum(y.astype(jnp.float32), contracted).astype(y.dtype)
        return _add(y, **adds) if adds else y

    def place(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    weight, result = place(n_axes, k_axes), place(rows, kept)
    sums = {"addend": (place(rows), place(kept)), "onto": result}
    sums = {option: sums[option] for option in adds}
    return mesh, on_shard, result, (place(rows, contracted), weight, weight, sums)


def _axes(entry) -> set:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return set()
    return set(entry) if isinstance(entry, tuple) else {entry}


def _count(entry, sizes) -> int:
    total = 1
    for axis in _axes(entry):
        total *= sizes[axis]
    return total


def _rule(name, op, spec, mesh, values, results):
    """Shardy's rule: k is blocks `b` of `t` bytes of `u` codes, cut by whole blocks."""
    del name, mesh, results
    k, n = "(b t u)", "n"
    contracted, kept = (k, n) if op == "matmul" else (n, k)
    count = len(values) - 3  # arrays that are added: t and u, onto
    pair = [f"m r, {kept} r"] if count > 1 else []
    onto = [f"m {kept}"] * (count % 2)
    operands = ", ".join([f"m {contracted}, n (b t), n b", *pair, *onto])
    factors = {
        "reduction_factors": ("b", "t", "u") if op == "matmul" else ("n",),
        "t": spec.block_size // 2,
        "u": 2,
    }
    if pair:
        factors["need_replication_factors"] = ("r",)
    return f"{operands} -> m {kept}", factors


sharded_product.def_partition(_partition, sharding_rule=_rule)

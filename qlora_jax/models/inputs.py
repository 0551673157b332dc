"""What a product reads, given as what it is computed from.

A norm in front of a projection, or the gate in front of the last one, costs a pass over
memory each time it is computed. A product that is given the parts may compute it where
that is cheapest, and its backward needs no copy of it. Whoever wants the array calls
`whole`. Each of these values has

    whole()                   the array
    project_transposed(dh)    whole().T @ dh over all rows, float32
    pull(d)                   the gradients of the parts, given that of the array; a
                              value of the same type
    early                     whether the last two are there. Values that are not early
                              have, where the array comes with the gradients, instead
    pull_with_whole(d)        the gradients of the parts, and the array
    keeps_low_rank            whether an adapter's first product, whole() @ a, had
                              better be kept than computed again from that array
"""

import contextlib
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tuning
from qlora_jax.over_rows import over_rows

# Numbers of an array from which the gate's backward is a kernel, some thousand tokens.
LARGE = 2**24


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["x", "scale"], meta_fields=["eps"]
)
@dataclasses.dataclass(frozen=True)
class Normed:
    """x / sqrt(mean(x²) + eps) · scale, the root-mean-square norm of x.

    Attributes:
        x: [*b, d].
        scale: [d].
        eps: a number.
    """

    x: Any
    scale: Any
    eps: float

    early: ClassVar[bool] = True
    keeps_low_rank: ClassVar[bool] = True

    def whole(self) -> jax.Array:
        """[*b, d] in the type of x, computed in float32."""
        return _normalised(self.x, self.scale, self.eps)

    def project_transposed(self, dh: jax.Array) -> jax.Array:
        """The factors move to where they are thin: scale · (xᵀ @ (inverse · dh))."""
        thin = (dh.astype(jnp.float32) * self._inverse()).astype(dh.dtype)
        return self.scale.astype(jnp.float32)[:, None] * over_rows(self.x, thin)

    def pull(self, d: jax.Array) -> "Normed":
        """Dx = inverse · (g - x · inverse² · mean(g · x)), g = d · scale."""
        inverse = self._inverse()
        x, d = self.x.astype(jnp.float32), d.astype(jnp.float32)
        g = d * self.scale.astype(jnp.float32)
        mean = jnp.mean(g * x, axis=-1, keepdims=True) * inverse**2
        dx = (g - x * mean) * inverse
        dscale = jnp.sum(d * (x * inverse), axis=tuple(range(x.ndim - 1)))
        dx, dscale = dx.astype(self.x.dtype), dscale.astype(self.scale.dtype)
        return Normed(dx, dscale, self.eps)

    def _inverse(self) -> jax.Array:
        """Float32 [*b, 1], 1 / sqrt(mean(x²) + eps)."""
        x = self.x.astype(jnp.float32)
        return lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalised(x, scale, eps):
    inverse = Normed(x, scale, eps)._inverse()
    return (x.astype(jnp.float32) * inverse).astype(x.dtype) * scale


def _normalised_fwd(x, scale, eps):
    return _normalised(x, scale, eps), Normed(x, scale, eps)


def _normalised_bwd(eps, parts, d):
    del eps
    of = parts.pull(d)
    return of.x, of.scale


_normalised.defvjp(_normalised_fwd, _normalised_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """silu(gate) · up, what the last projection of an MLP reads.

    Attributes:
        gate: [*b, m].
        up: [*b, m].
        recomputed: whether gate and up are computed again in the backward. Then the
            array would have to be too for an adapter's first product.
    """

    gate: Any
    up: Any
    recomputed: bool = dataclasses.field(default=False, metadata={"static": True})

    early: ClassVar[bool] = False

    @property
    def keeps_low_rank(self) -> bool:
        """See above."""
        return not self.recomputed

    def whole(self) -> jax.Array:
        """[*b, m]."""
        return _gated(self.gate, self.up)

    def pull_with_whole(self, d: jax.Array) -> "tuple[Gated, jax.Array]":
        """The gradients of gate and up, and the array, in one pass.

        Where the arrays are large and were computed for this, each result takes the
        place of what it is computed from: they are most of what is in memory then.
        (What was kept is read out of a stack of layers, where it cannot be replaced.)
        """
        pull = _gate_backward_in_place if self.recomputed else _gate_backward
        dgate, dup, whole = pull(self.gate, self.up, d)
        return dataclasses.replace(self, gate=dgate, up=dup), whole


def _gated(gate, up):
    """In float32, rounded once, as the kernel does: XLA would round every operation."""
    y = jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)
    return y.astype(gate.dtype)


def _gate_backward(gate, up, d):
    """The gradients of gate and up, given that of `_gated`, and what that gives."""
    whole, pull = jax.vjp(_gated, gate, up)
    return *pull(d), whole


def _gate_backward_in_place(gate, up, d):
    """The same, by the kernel where there is one."""
    if gate.size >= LARGE and tuning.has_one_hopper():
        from pallas_kernels import gate_kernel  # the GPU part of Pallas

        with contextlib.suppress(NotImplementedError):
            return gate_kernel.gate_backward(gate, up, d)
    return _gate_backward(gate, up, d)

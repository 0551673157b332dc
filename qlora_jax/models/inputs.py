"""What a product reads, given as what it is computed from.

A norm in front of a projection, or the gate in front of the last one, costs a pass over
memory each time it is computed. A product that is given the parts may compute it where
that is cheapest, and its backward needs no copy of it. Whoever wants the array calls
`whole`. Each of these values has

    whole()                 the array
    project(a)              whole() @ a, for a thin a
    project_transposed(dh)  whole().T @ dh over all rows, float32
    pull(d)                 the gradients of the parts, given that of the array; a value
                            of the same type
    early                   whether `project_transposed` reads the parts alone, so that
                            it may be computed before `pull`
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Normed:
    """x · inverse · scale, the root-mean-square norm of x; made by `normed`.

    Attributes:
        x: [*b, d].
        inverse: float32 [*b, 1], 1 / sqrt(mean(x²) + eps). No gradient goes through
            it: that of x knows where it is from.
        scale: [d].
    """

    x: Any
    inverse: Any
    scale: Any

    early: ClassVar[bool] = True

    def whole(self) -> jax.Array:
        """[*b, d] in the type of x, computed in float32."""
        return _normalise(self.x, self.inverse, self.scale)

    def project(self, a: jax.Array) -> jax.Array:
        """The factors move to where they are thin: (x @ (scale · a)) · inverse."""
        scale = self.scale.astype(jnp.float32)[:, None]
        scaled = (scale * a.astype(jnp.float32)).astype(a.dtype)
        h = jnp.matmul(self.x, scaled, preferred_element_type=jnp.float32)
        return (h * self.inverse).astype(self.x.dtype)

    def project_transposed(self, dh: jax.Array) -> jax.Array:
        """Scale · (xᵀ @ (inverse · dh))."""
        thin = (dh.astype(jnp.float32) * self.inverse).astype(dh.dtype)
        return self.scale.astype(jnp.float32)[:, None] * over_rows(self.x, thin)

    def pull(self, d: jax.Array) -> "Normed":
        """Dx = inverse · (g - x · inverse² · mean(g · x)), g = d · scale."""
        x, d = self.x.astype(jnp.float32), d.astype(jnp.float32)
        g = d * self.scale.astype(jnp.float32)
        mean = jnp.mean(g * x, axis=-1, keepdims=True) * self.inverse**2
        dx = (g - x * mean) * self.inverse
        dscale = jnp.sum(d * (x * self.inverse), axis=tuple(range(x.ndim - 1)))
        return Normed(
            dx.astype(self.x.dtype),
            jnp.zeros_like(self.inverse),
            dscale.astype(self.scale.dtype),
        )


def normed(x: jax.Array, scale: jax.Array, eps: float) -> Normed:
    """Returns x / sqrt(mean(x²) + eps) · scale, not yet computed."""
    x32 = lax.stop_gradient(x).astype(jnp.float32)
    mean_square = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    inverse = checkpoint_name(lax.rsqrt(mean_square + eps), "inverse_norm")
    return Normed(x, inverse, scale)


@jax.custom_vjp
def _normalise(x, inverse, scale):
    return (x.astype(jnp.float32) * inverse).astype(x.dtype) * scale


def _normalise_fwd(x, inverse, scale):
    return _normalise(x, inverse, scale), Normed(x, inverse, scale)


def _normalise_bwd(parts, d):
    of = parts.pull(d)
    return of.x, of.inverse, of.scale


_normalise.defvjp(_normalise_fwd, _normalise_bwd)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gated:
    """silu(gate) · up, what the last projection of an MLP reads.

    Attributes:
        gate: [*b, m].
        up: [*b, m].
    """

    gate: Any
    up: Any

    early: ClassVar[bool] = False

    def whole(self) -> jax.Array:
        """[*b, m]."""
        return _gated(self.gate, self.up)

    def project(self, a: jax.Array) -> jax.Array:
        """whole() @ a."""
        return self.whole() @ a

    def project_transposed(self, dh: jax.Array) -> jax.Array:
        """whole()ᵀ @ dh: the array is computed again, in one pass with `pull`."""
        return over_rows(self.whole(), dh)

    def pull(self, d: jax.Array) -> "Gated":
        """The gradients of gate and up."""
        return Gated(*jax.vjp(_gated, self.gate, self.up)[1](d))


def _gated(gate, up):
    return jax.nn.silu(gate) * up


def over_rows(x: jax.Array, y: jax.Array) -> jax.Array:
    """xᵀ @ y, summed over all leading axes, in float32."""
    rows = tuple(range(x.ndim - 1))
    return lax.dot_general(
        x, y, ((rows, rows), ((), ())), preferred_element_type=jnp.float32
    )

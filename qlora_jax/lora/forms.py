"""How the kernel of a layer, of any number of axes, is laid out as a matrix."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from jaxtyping import Array, Shaped

Kind = Literal["linear", "conv", "embed"]

MASKED = (
    "a {} with a mask on its kernel, under which an adapter is of no low rank. Leave "
    "it out of the targets, or train it whole by split_trainable(model, also=...)."
)


@dataclasses.dataclass(frozen=True)
class KernelForm:
    """A kernel [*stack, *shape] as matrices [*stack, *batch, in, out].

    Attributes:
        shape: of the kernel, without the axes of a stack of layers in front.
        contracted: its axes that are summed over, flattened to `in`.
        free: its axes that the output keeps, flattened to `out`.
        batch: its axes that input, kernel and output share, each its own matrix.
        kind: "linear", multiplied; "conv", moved over the input; "embed", an embedding
            [num, features] of which rows are looked up, and which is laid out for the
            transposed product, `in` the features.
    """

    shape: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    batch: tuple[int, ...] = ()
    kind: Kind = "linear"

    def stack_of(self, kernel_shape: Sequence[int], path: str) -> tuple[int, ...]:
        """Returns the stack axes of a kernel of this form.

        Raises:
            NotImplementedError: if they are not in front.
        """
        depth = len(kernel_shape) - len(self.shape)
        if depth < 0 or tuple(kernel_shape[depth:]) != self.shape:
            raise NotImplementedError(
                f"{path!r} has shape {list(kernel_shape)} and its layer multiplies by "
                f"{list(self.shape)}: only stacks along leading axes can be adapted."
            )
        return tuple(kernel_shape[:depth])

    @property
    def is_plain(self) -> bool:
        """Whether kernel and matrix are the same."""
        return self._order == tuple(range(len(self.shape))) and (
            self.matrix_shape == self.shape
        )

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """[*batch, in, out]."""
        sizes = [math.prod(self._sizes(axes)) for axes in (self.contracted, self.free)]
        return (*self._sizes(self.batch), *sizes)

    def with_free(self, size: int) -> "KernelForm":
        """Returns the form of a kernel like this one with another `out`.

        Args:
            size: of the one axis that `out` is.
        """
        (axis,) = self.free
        shape = tuple(size if a == axis else n for a, n in enumerate(self.shape))
        return dataclasses.replace(self, shape=shape)

    @property
    def free_shape(self) -> tuple[int, ...]:
        """What `out` is flattened from."""
        return self._sizes(self.free)

    def matrix(
        self, kernel: "Shaped[Array, '*stack_kernel']"
    ) -> "Shaped[Array, '*stack_in_out']":
        """Returns the kernel as matrices; itself, if it is one already."""
        depth = kernel.ndim - len(self.shape)
        order = (*range(depth), *(depth + axis for axis in self._order))
        moved = (
            kernel if order == tuple(range(kernel.ndim)) else kernel.transpose(order)
        )
        shape = (*kernel.shape[:depth], *self.matrix_shape)
        return moved if moved.shape == shape else moved.reshape(shape)

    def kernel(self, matrix: Any) -> Any:
        """Returns the kernel that `matrix` made this of."""
        depth = len(matrix.shape) - len(self.matrix_shape)
        moved = matrix.reshape(*matrix.shape[:depth], *self._sizes(self._order))
        back = sorted(range(len(self._order)), key=self._order.__getitem__)
        order = (*range(depth), *(depth + axis for axis in back))
        return moved if order == tuple(range(moved.ndim)) else moved.transpose(order)

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.batch, *self.contracted, *self.free)

    def _sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)


def linear_form(
    contracted: Sequence[int], free: Sequence[int], batch: Sequence[int] = ()
) -> KernelForm:
    """Returns the form of a kernel [*batch, *contracted, *free], given the sizes."""
    shape = (*batch, *contracted, *free)
    axes = tuple(range(len(shape)))
    first, last = len(batch), len(batch) + len(contracted)
    return KernelForm(shape, axes[first:last], axes[last:], axes[:first])


def conv_form(kernel_shape: Sequence[int], *, swapped: bool = False) -> KernelForm:
    """Returns the form of a convolution's kernel [*window, in, out].

    Args:
        kernel_shape: its shape; `in` is that of one group.
        swapped: it is [*window, out, in], as transposed convolutions may have it.
    """
    *window, first, last = range(len(kernel_shape))
    n_in, n_out = (last, first) if swapped else (first, last)
    shape = tuple(kernel_shape)
    return KernelForm(shape, (*window, n_in), (n_out,), kind="conv")


def embed_form(num: int, features: int) -> KernelForm:
    """Returns the form of an embedding: its transpose."""
    return KernelForm((num, features), (1,), (0,), kind="embed")


@dataclasses.dataclass(frozen=True)
class Equation:
    """An einsum of an input and a kernel, taken apart.

    Attributes:
        inputs: the letters of the input, "." standing for the axes of an ellipsis.
        kernel: those of the kernel.
        output: those of the result.
    """

    inputs: str
    kernel: str
    output: str

    @classmethod
    def parse(cls, equation: str) -> "Equation":
        """Reads "btd,dnh->btnh".

        Raises:
            NotImplementedError: if it is no contraction of an input with a kernel: it
                repeats a letter, sums over one operand alone, or the kernel has an
                ellipsis.
        """
        operands, output = equation.replace(" ", "").replace("...", ".").split("->")
        inputs, kernel = operands.split(",")
        once = all(len(set(part)) == len(part) for part in (inputs, kernel, output))
        summed = set(inputs) ^ set(kernel)
        if not once or "." in kernel or summed - set(output):
            raise NotImplementedError(
                f"einsum {equation!r}: only contractions of an input with a kernel can "
                "be adapted (no letter twice in an operand, none summed over in one "
                "operand alone, no ellipsis in the kernel)."
            )
        return cls(inputs, kernel, output)

    def form(self, kernel_shape: Sequence[int]) -> KernelForm:
        """Returns the form of the kernel."""
        axes = range(len(self.kernel))
        shared = [i for i in axes if self.kernel[i] in self.inputs]
        return KernelForm(
            tuple(kernel_shape),
            contracted=tuple(i for i in shared if self.kernel[i] not in self.output),
            free=tuple(i for i in axes if i not in shared),
            batch=tuple(i for i in shared if self.kernel[i] in self.output),
        )

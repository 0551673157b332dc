"""A step that compiles also where no memory is left to tune its products."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax


def tuned_if_it_fits(
    make: Callable[[Mapping[str, Any]], Callable[..., Any]],
    options: Callable[..., Mapping[str, Any]],
) -> Callable[..., Any]:
    """Returns the step with XLA's tuning, or without where memory is short for it.

    XLA tries the ways to compute a product on operands of its own while the step is
    compiled. Beside a model that fills the device there may be no room for them,
    although there is for the step: then it is compiled once more without.

    Args:
        make: makes the step with options of XLA.
        options: (tune) -> options of XLA, as `step_options` of the tokens of a step.

    Returns:
        The step. It raises as `make`'s does if it does not fit without tuning either.
    """
    step, tuned = make(options(tune=True)), True

    def call(*args):
        nonlocal step, tuned
        try:
            return step(*args)
        except jax.errors.JaxRuntimeError as error:
            if (
                not tuned
                or options(tune=False) == options(tune=True)
                or "RESOURCE_EXHAUSTED" not in str(error)
                or any(_is_deleted(x) for x in jax.tree.leaves(args))
            ):
                raise
        warnings.warn(
            "There was no device memory left to tune the products of the step, so it "
            "is compiled without, which may cost some percent of its speed.",
            stacklevel=2,
        )
        step, tuned = make(options(tune=False)), False
        return step(*args)

    return call


def _is_deleted(x: Any) -> bool:
    return isinstance(x, jax.Array) and x.is_deleted()

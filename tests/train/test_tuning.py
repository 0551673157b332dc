"""What happens where there is no memory to tune the products of a step."""

import jax
import jax.numpy as jnp
import pytest

from qlora_jax.train.tuning import tuned_if_it_fits

OUT_OF_MEMORY = jax.errors.JaxRuntimeError(
    "NOT_FOUND: Failed to get configs: RESOURCE_EXHAUSTED: Out of memory"
)


def options(tune):
    return {"tuned": tune}


def step_that_fails(error, made, always=False, donated=None):
    """Makes steps that raise this error if tuned; remembers with what."""

    def make(options):
        made.append(options["tuned"])

        def step(x):
            if options["tuned"] or always:
                if donated is not None:
                    donated.delete()
                raise error
            return x + 1

        return step

    return make


def test_compiles_again_without_tuning_and_says_so():
    made = []
    step = tuned_if_it_fits(step_that_fails(OUT_OF_MEMORY, made), options)
    with pytest.warns(UserWarning, match="no device memory left to tune"):
        assert step(jnp.float32(1)) == 2
    assert step(jnp.float32(2)) == 3
    assert made == [True, False]


def test_a_step_that_does_not_fit_at_all_raises():
    made = []
    step = tuned_if_it_fits(step_that_fails(OUT_OF_MEMORY, made, always=True), options)
    with (
        pytest.warns(UserWarning),
        pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"),
    ):
        step(jnp.float32(1))
    assert made == [True, False]


def test_other_errors_are_not_taken_for_it():
    made = []
    error = jax.errors.JaxRuntimeError("INTERNAL: something else")
    step = tuned_if_it_fits(step_that_fails(error, made), options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        step(jnp.float32(1))
    assert made == [True]


def test_not_where_the_arguments_are_gone():
    made, x = [], jnp.ones([2])
    step = tuned_if_it_fits(step_that_fails(OUT_OF_MEMORY, made, donated=x), options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        step(x)
    assert made == [True]


def test_not_where_nothing_is_tuned():
    made = []
    step = tuned_if_it_fits(
        step_that_fails(OUT_OF_MEMORY, made), lambda tune: {"tuned": True}
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        step(jnp.float32(1))
    assert made == [True]

"""A model put on a mesh as `load_model(mesh=)` puts one."""

import jax
from flax import nnx

from qlora_jax.interop.build import weight_shardings


def spread(model, mesh):
    """The model with each weight in its parts; the arrays given stay where they are."""
    model = nnx.merge(*nnx.split(model))
    for holder, stack in ((model, 0), (model.layers, 1)):
        for name, variable in vars(holder).items():
            if isinstance(variable, nnx.Param):
                value = variable.get_value()
                where = weight_shardings(mesh, name, value, stack)
                setattr(holder, name, nnx.Param(jax.device_put(value, where)))
    return model

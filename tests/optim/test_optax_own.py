"""optax's own tests of optimizers, as its wheel has them, over `paged(...)`.

Their classes are run as they stand; only what they take for an optimizer's factory is
replaced by one that pages every leaf of more than one number. Of the 1,117 cases those
of a few optimizers are run each time, and all of them with `QLORA_JAX_ALL_OF_OPTAX=1`
(a quarter of an hour on one core: hundreds train 10,000 or 30,000 steps).
"""

import functools
import os
import re
import sys
import types

import jax
import jax.numpy as jnp
import optax.contrib
import pytest

from qlora_jax.optim import paged
from qlora_jax.optim.memory import to_device

with pytest.MonkeyPatch.context() as patch:
    for name in ("sklearn", "sklearn.datasets", "sklearn.linear_model"):
        # It draws the data of tests of L-BFGS, which are not run here.
        patch.setitem(sys.modules, name, types.ModuleType(name))
    for name in ("datasets", "linear_model"):
        setattr(sys.modules["sklearn"], name, sys.modules[f"sklearn.{name}"])
    alias_test = pytest.importorskip("optax._src.alias_test")
    contrib_test = pytest.importorskip("optax.contrib._common_test")

# Leaf by leaf, factored, with norms over leaves, with matrices; and one from contrib
# that is trained for 30,000 steps inside of a scan.
OFTEN = re.compile(r"opt_name='(adamw|lion|adafactor|lamb|muon)'(?!.*mechanize)")
LONG = re.compile(r"test_optimization|test_optimizers\d")
LONG_OFTEN = re.compile(r"opt_name='muon'.*_setup_(matrix_parabola|rosenbrock)")


def paging(make):
    """Returns the factory, its signature kept, of the optimizers paged."""

    @functools.wraps(make)
    def made(*args, **kwargs):
        return paged(make(*args, **kwargs), page_size=64, min_size=2)

    return made


@pytest.fixture(autouse=True)
def over_paged(monkeypatch):
    get, factory = alias_test._get_opt, contrib_test._get_opt_factory
    monkeypatch.setattr(alias_test, "_get_opt", lambda test, n: paging(get(test, n)))
    monkeypatch.setattr(contrib_test, "_get_opt_factory", lambda n: paging(factory(n)))

    # Host memory commits what comes back; parameters are to be so from the start, or
    # the second step is another program, as docs/optimizers.md says.
    def array(*args, **kwargs):
        return jax.device_put(jnp.array(*args, **kwargs), jax.devices()[0])

    committed = types.SimpleNamespace(**{**vars(jnp), "array": array})
    for module in (alias_test, contrib_test):
        monkeypatch.setattr(module, "jnp", committed)
    # It computes with the state outside of the optimizer, so it gets it on the device.
    evaluated = optax.contrib.schedule_free_eval_params
    monkeypatch.setattr(
        optax.contrib,
        "schedule_free_eval_params",
        lambda state, params: evaluated(jax.tree.map(to_device, state), params),
    )


def chosen(tests):
    """Returns the class without the cases that are not run."""
    dropped = {}
    for name in dir(tests):
        case = getattr(tests, name)
        if not name.startswith("test"):
            continue
        arguments = getattr(case, "__x_params_repr__", "")
        if "noisy_sgd" in arguments and LONG.match(name):
            # Its key is on no device at first, and its second step is another program
            # beside committed parameters, paged or not.
            dropped[name] = None
            continue
        if os.environ.get("QLORA_JAX_ALL_OF_OPTAX"):
            continue
        often = LONG_OFTEN if LONG.match(name) else OFTEN
        if not often.search(arguments):
            dropped[name] = None
    return dropped


TestAlias = type("TestAlias", (alias_test.AliasTest,), chosen(alias_test.AliasTest))
TestContrib = type(
    "TestContrib", (contrib_test.ContribTest,), chosen(contrib_test.ContribTest)
)

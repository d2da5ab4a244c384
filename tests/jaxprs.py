"""Reading jaxprs in tests: what equations there are, wherever they are nested."""

from collections import Counter
from collections.abc import Iterator

import jax
from jax.extend.core import ClosedJaxpr, jaxprs_in_params

OPERATORS = ("broadcast", "distribute", "collect", "federated_map", "sum", "mean", "max", "min")


def equations(jaxpr, *, inside_maps=True) -> Iterator:
    """All equations of a jaxpr and of the jaxprs in them."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for eqn in jaxpr.eqns:
        yield eqn
        if inside_maps or eqn.primitive.name != "federated_map":
            for inner in jaxprs_in_params(eqn.params):
                yield from equations(inner, inside_maps=inside_maps)


def operators(fn, *args) -> list[str]:
    """fax's primitives in a function's jaxpr, in order, as `federated_map(...) -> (...)`."""
    found = []
    for eqn in equations(jax.make_jaxpr(fn)(*args), inside_maps=False):
        if "placement" in eqn.params:
            name = eqn.primitive.name
            assert name in OPERATORS
            modes = "".join(f" {eqn.params[k]}" for k in ("in", "out") if k in eqn.params)
            found.append(name + modes)
    return found


def count(fn, name, *args) -> int:
    """How many equations of a primitive a function's jaxpr has, everywhere."""
    return Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args)))[name]


def shapes_between_maps(fn, *args) -> set[tuple[int, ...]]:
    """The shapes of all values that exist outside of client functions."""
    return {
        var.aval.shape
        for eqn in equations(jax.make_jaxpr(fn)(*args), inside_maps=False)
        for var in eqn.outvars
    }

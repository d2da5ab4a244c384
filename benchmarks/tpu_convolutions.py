"""Convolutions and pools on TPUs, by the compiler's estimate: XLA's own, and matrix products.

    python benchmarks/tpu_convolutions.py [--kinds v5e,v4] [--layers "EMNIST 1;pool"] [--json PATH]

The layers are those of `convolutions.py`, in a loop, for one participant and for several vectorized
ones with kernels of their own. On TPU ``convolutions="auto"`` is XLA's own. It needs libtpu and no
TPU. With ``--json``, what is already in the file is not compiled again.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
from convolutions import LAYERS, equations
from figures import Figures
from flax import nnx
from jax import lax
from tables import show
from tpu_schedule import KINDS, cost, versions

from fax.lowering.convolutions._convolution import Convolution, best_way
from fax.lowering.convolutions._matmul import convolve
from fax.lowering.convolutions._max_pool import max_pool_cotangent

STEPS, VECTORIZED = 8, (1, 4)
POOL = "max pool 2 x 2 of 20 x 24 x 24 x 64"
XLA, PRODUCTS = "XLA", "matrix products"


def ways(eqn: Any) -> dict[str, Callable]:
    """The ways to compute an equation."""
    lhs, rhs, out = (atom.aval for atom in (*eqn.invars, *eqn.outvars))
    stock = functools.partial(eqn.primitive.bind, **eqn.params)
    if eqn.primitive.name != "conv_general_dilated":
        return {XLA: stock, PRODUCTS: functools.partial(max_pool_cotangent, eqn.params, out)}
    best = best_way(Convolution.of(lhs, rhs, out, eqn.params))
    return {XLA: stock, PRODUCTS: functools.partial(convolve, best, eqn.params, out)}


def layers(names: list[str]) -> dict[str, Any]:
    """The equations of the layers by name."""
    found = {
        f"{name}, {what}": eqn
        for name in names
        if name in LAYERS
        for what, eqn in equations(*LAYERS[name]).items()
    }
    if "pool" in names:
        pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
        x = jnp.zeros((20, 24, 24, 64))
        jaxpr = jax.make_jaxpr(lambda x, y: jax.vjp(pool, x)[1](y))(x, pool(x))
        name = "select_and_scatter_add"
        found[f"{POOL}, derivative"] = next(e for e in jaxpr.eqns if e.primitive.name == name)
    return found


def cycles(kind: str, eqn: Any, way: Callable, count: int) -> int | None:
    """The cycles of one step of a loop."""
    sizes = (STEPS,) if count == 1 else (STEPS, count)
    shapes = [
        jax.ShapeDtypeStruct((*sizes, *atom.aval.shape), atom.aval.dtype) for atom in eqn.invars
    ]
    each = way if count == 1 else jax.vmap(way)

    def loop(*xs):
        return lax.scan(lambda c, x: (c, each(*x)), None, xs)[1]

    found = cost(kind, loop, shapes)["cycles"]
    return None if found is None else found // STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument(
        "--layers", default=";".join([*LAYERS, "pool"]), help="separated by semicolons"
    )
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    figures = Figures(args.json)
    print(versions())
    for kind in args.kinds.split(","):
        rows = []
        for name, eqn in layers(args.layers.split(";")).items():
            for count in VECTORIZED:
                found = {
                    way: figures.of(
                        f"{kind} | {name} | {count} | {way}",
                        lambda kind=kind, eqn=eqn, fn=fn, count=count: cycles(kind, eqn, fn, count),
                    )
                    for way, fn in ways(eqn).items()
                }
                best = min(found.values())
                ratios = {way: value / best for way, value in found.items()}
                rows.append({"": name, "vectorized": str(count), **ratios})
        show(
            dict(
                title=f"{kind}: cycles, as multiples of the best", columns=list(rows[0]), rows=rows
            )
        )


if __name__ == "__main__":
    main()

"""Convolutions: XLA's own against the ones that `fax.map` rewrites.

    python benchmarks/convolutions.py [--only layers|vectorized|training] [--json PATH]

Variants take turns, so that a temporarily busy machine slows all of them. Times are minima for
layers and medians for training.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from core import clock, machine, show, take_turns, verdict
from flax import nnx
from jax import lax

import fax
from fax.lowering.convolutions import _rewrite
from fax.lowering.convolutions._convolution import Convolution, Way, best_way
from fax.lowering.convolutions._matmul import convolve

PyTree = Any

STEPS, TURNS = 2, 5
VECTORIZED = 4
# Shapes of input and kernel, channels last; stride, padding, groups.
LAYERS = {
    "EMNIST 1": ((20, 28, 28, 1), (3, 3, 1, 32), 1, "VALID", 1),
    "EMNIST 2": ((20, 26, 26, 32), (3, 3, 32, 64), 1, "VALID", 1),
    "ResNet 16": ((20, 32, 32, 16), (3, 3, 16, 16), 1, "SAME", 1),
    "ResNet 16 to 32, stride 2": ((20, 32, 32, 16), (3, 3, 16, 32), 2, "SAME", 1),
    "ResNet 32": ((20, 16, 16, 32), (3, 3, 32, 32), 1, "SAME", 1),
    "ResNet 64": ((20, 8, 8, 64), (3, 3, 64, 64), 1, "SAME", 1),
    "1 x 1": ((20, 16, 16, 32), (1, 1, 32, 64), 1, "SAME", 1),
    "5 x 5": ((20, 14, 14, 32), (5, 5, 32, 64), 1, "SAME", 1),
    "7 x 7, stride 2": ((8, 64, 64, 3), (7, 7, 3, 32), 2, "SAME", 1),
    "depthwise": ((20, 16, 16, 32), (3, 3, 1, 32), 1, "SAME", 32),
    "4 groups": ((20, 16, 16, 32), (3, 3, 8, 32), 1, "SAME", 4),
    "text": ((20, 80, 64), (5, 64, 128), 1, "SAME", 1),
    "3-d, 4 channels": ((4, 16, 16, 16, 4), (3, 3, 3, 4, 8), 1, "SAME", 1),
    "3-d, 32 channels": ((2, 16, 16, 16, 32), (3, 3, 3, 32, 64), 1, "SAME", 1),
}
VECTORIZED_LAYERS = ("EMNIST 1", "EMNIST 2", "ResNet 16", "ResNet 64", "text", "depthwise")
FORMS = ("gather", "positions", "scatter")

CLIENTS, LOCAL_STEPS, BATCH, CLASSES, RATE = 4, 5, 20, 62, 0.1


# Layers


def layers(names: Iterable[str] = LAYERS, count: int = 1) -> dict[str, Any]:
    """Each layer and its two derivatives, written in all ways, inside and outside a loop."""
    rows = []
    for name in names:
        for what, eqn in equations(*LAYERS[name]).items():
            rows.append({"": f"{name}, {what}"} | measure(eqn, count))
            print(rows[-1][""], file=sys.stderr)
    several = f" of {count} participants at once" if count > 1 else ""
    return table(f"Convolutions{several}, as multiples of XLA's own outside of loops", rows)


def vectorized() -> dict[str, Any]:
    """Several participants at once, each with inputs and kernels of its own."""
    return layers(VECTORIZED_LAYERS, VECTORIZED)


def equations(x_shape, w_shape, stride, padding, groups) -> dict[str, Any]:
    """The equations of a convolution and its derivatives by the input and by the kernel."""
    dims = len(x_shape) - 2
    space, window = range(1, dims + 1), range(dims)
    numbers = lax.ConvDimensionNumbers(
        (0, dims + 1, *space), (dims + 1, dims, *window), (0, dims + 1, *space)
    )

    def conv(x, w):
        return lax.conv_general_dilated(
            x, w, (stride,) * dims, padding, dimension_numbers=numbers, feature_group_count=groups
        )

    def equation(fn, *args):
        eqns = jax.make_jaxpr(fn)(*args).eqns
        return next(eqn for eqn in eqns if eqn.primitive.name == "conv_general_dilated")

    x, w = jnp.zeros(x_shape), jnp.zeros(w_shape)
    y = conv(x, w)
    return {
        "forward": equation(conv, x, w),
        "by input": equation(lambda y: jax.linear_transpose(lambda x: conv(x, w), x)(y), y),
        "by kernel": equation(lambda y: jax.linear_transpose(lambda w: conv(x, w), w)(y), y),
    }


def measure(eqn, count: int) -> dict[str, Any]:
    """Milliseconds of XLA outside loops, and ratios to them for all ways in a loop."""
    lhs, rhs = (atom.aval for atom in eqn.invars)
    out = eqn.outvars[0].aval
    conv = Convolution.of(lhs, rhs, out, eqn.params)
    rng = np.random.default_rng(0)
    sizes = (STEPS,) if count == 1 else (STEPS, count)
    rows = [jnp.asarray(rng.standard_normal((*sizes, *a.shape)), a.dtype) for a in (lhs, rhs)]
    one = [x[0] for x in rows]

    def stock(x, w):
        return eqn.primitive.bind(x, w, **eqn.params)

    ways: dict[str, Callable] = {
        "XLA": stock,
        "channels last": functools.partial(_rewrite._channels_last, eqn.params, out),
    }
    for form in FORMS:
        slices = math.prod(conv.positions if form == "positions" else conv.window)
        if slices <= 64 and (form != "scatter" or set(conv.strides) <= {1}):
            for at_once in (True, False):
                name = form if at_once else f"{form}, loop"
                ways[name] = functools.partial(convolve, Way(form, at_once), eqn.params, out)

    def jaxpr_of_auto():
        jaxpr = jax.make_jaxpr(stock)(lhs, rhs)
        return _rewrite.rewrite(jaxpr, "auto", "cpu", vectorized=count > 1, sharded=False)

    chosen = jax.extend.core.jaxpr_as_fun(jaxpr_of_auto())
    ways["auto"] = lambda x, w: chosen(x, w)[0]

    if count > 1:
        ways = {name: jax.vmap(way) for name, way in ways.items()}

    def loop(way):
        return jax.jit(lambda *xs: lax.scan(lambda c, x: (c, way(*x)), None, xs)[1])

    runs = {name: (loop(way), rows, STEPS) for name, way in ways.items()}
    runs["outside"] = (jax.jit(ways["XLA"]), one, 1)
    runs["auto, outside"] = (jax.jit(ways["auto"]), one, 1)
    runs = {
        name: lambda turn, fn=fn, args=args, steps=steps: {"s": clock(fn, *args)[0] / steps}
        for name, (fn, args, steps) in runs.items()
    }
    take_turns(runs, 1)
    times = {name: min(t["s"] for t in own) for name, own in take_turns(runs, TURNS).items()}
    base = times.pop("outside")
    best = best_way(conv)
    matmul = best.form if best.at_once else f"{best.form}, loop"
    return {"XLA outside, ms": 1e3 * base, "matmul": matmul} | {
        name: t / base for name, t in times.items()
    }


# Training


class Network(nnx.Module):
    """The EMNIST network, with flax's convolutions and pool."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 32, (3, 3), padding="VALID", rngs=rngs)
        self.second = nnx.Conv(32, 64, (3, 3), padding="VALID", rngs=rngs)
        self.third = nnx.Linear(9216, 128, rngs=rngs)
        self.last = nnx.Linear(128, CLASSES, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x))))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.last(nnx.relu(self.third(x.reshape(len(x), -1))))


def pooled(x: jax.Array) -> jax.Array:
    """The largest of each 2 x 2 pixels, as one row per example."""
    n, height, width, channels = x.shape
    x = x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
    return x.reshape(n, -1)


def by_hand(params: PyTree, x: jax.Array) -> jax.Array:
    """The same network, with convolutions written as slices and a matrix product."""

    def conv(layer, x):
        height, width = x.shape[1] - 2, x.shape[2] - 2
        patches = jnp.concatenate(
            [x[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], -1
        )
        kernel = layer["kernel"]
        return patches @ kernel.reshape(-1, kernel.shape[-1]) + layer["bias"]

    x = jax.nn.relu(conv(params["second"], jax.nn.relu(conv(params["first"], x))))
    third, last = params["third"], params["last"]
    x = jax.nn.relu(pooled(x) @ third["kernel"] + third["bias"])
    return x @ last["kernel"] + last["bias"]


def training() -> dict[str, Any]:
    """Milliseconds per local step, in a round of federated averaging."""
    graph, state = nnx.split(Network(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    shape = (CLIENTS, LOCAL_STEPS, BATCH)
    x = jnp.asarray(rng.random((*shape, 28, 28, 1)), jnp.float32)
    y = jnp.asarray(rng.integers(0, CLASSES, shape))

    def stock(params, x):
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graph, state)(x)

    rows = []
    for at_once in (1, CLIENTS):
        variants = {
            "by hand": (by_hand, "auto"),
            "auto": (stock, "auto"),
            "matmul": (stock, "matmul"),
            "xla": (stock, "xla"),
        }
        runs = {}
        for name, (apply, setting) in variants.items():
            fn = jax.jit(averaging(apply, setting, at_once))
            runs[name] = lambda turn, fn=fn: {"s": clock(fn, params, (x, y))[0]}
        slow = {"xla": runs.pop("xla")}
        take_turns(runs, 1)
        times = take_turns(runs, 11) | take_turns(slow, 2)
        steps = CLIENTS * LOCAL_STEPS
        row: dict[str, Any] = {"clients at once": str(at_once)}
        for name, own in times.items():
            row[name] = 1e3 * float(np.median([t["s"] for t in own])) / steps
        ratios = [a["s"] / b["s"] for a, b in zip(times["auto"], times["by hand"], strict=True)]
        row["target"] = verdict("at most 1.05", np.median(ratios) <= 1.05)
        rows.append(row | {"auto / by hand": float(np.median(ratios))})
    return table("Training the network of EMNIST, ms a step of batch 20", rows)


def averaging(apply: Callable, setting: str, at_once: int) -> Callable:
    """One round: steps of gradient descent at every client, and the mean of their results."""

    def loss(params, x, y):
        logits = jax.nn.log_softmax(apply(params, x))
        return -jnp.mean(jnp.take_along_axis(logits, y[:, None], -1))

    def client(params, batches):
        def step(params, batch):
            gradient = jax.grad(loss)(params, *batch)
            return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), None

        return lax.scan(step, params, batches)[0]

    @fax.program(clients=CLIENTS)
    def one_round(params, batches):
        trained = fax.map(
            client, fax.broadcast(params), batches, vectorize=at_once, convolutions=setting
        )
        return fax.mean(trained)

    return one_round


PARTS = {"layers": layers, "vectorized": vectorized, "training": training}


def table(title: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return dict(title=title, columns=columns, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, help="run one part")
    parser.add_argument("--json", metavar="PATH", help="write the figures to a file")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()))
    tables = [PARTS[name]() for name in ([options.only] if options.only else PARTS)]
    for made in tables:
        show(made)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(dict(machine=machine(), tables=tables), file, indent=2)


if __name__ == "__main__":
    main()

"""The table of programs that the tests run: each with a plain reference that knows no fax.

A reference says with `jax.vmap` and `jnp` what the program must compute, in the most direct
way. Arrays are tiny, for compilation dominates, and most cases combine a few features.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import fax

# Participants of the single placement cases, so that 3 at once leave one over; see `of_size`.
N = globals().get("N", 7)
BATCH_SIZES = (1, 3, N)

# What JAX says where a mode of differentiation does not exist.
REFUSES_REVERSE = (ValueError, "Reverse-mode differentiation does not work for lax.while_loop")
REFUSES_FORWARD = (TypeError, "can't apply forward-mode autodiff")


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A program, what it means, and what to call it with.

    Attributes:
      name: of the case, in the names of tests.
      build: takes a stand-in for `fax.map` and returns the program. All of the program's maps
        go through it, so that a test decides on their batch size.
      reference: the same function without fax.
      args: the arguments, of float64 where they are differentiable.
      argnums: the differentiable arguments; all their leaves are floats.
      refuses: for ``reverse`` and ``forward``, where JAX cannot differentiate what a client
        does in that mode, the error that it raises.
      kind: what is special about it, shared with other cases.
    """

    name: str
    build: Callable[[Callable], Callable]
    reference: Callable
    args: tuple
    argnums: tuple[int, ...]
    refuses: Mapping[str, tuple[type[Exception], str]]
    kind: str

    def program(self, vectorize: int | None, client: Callable = lambda fn: fn) -> Callable:
        """The program, its maps run at a batch size, ``client`` applied to each mapped function."""

        def mapped(fn, *args, **kwargs):
            return fax.map(client(fn), *args, vectorize=vectorize, **kwargs)

        return self.build(mapped)

    @property
    def differentiable(self) -> tuple:
        return tuple(self.args[i] for i in self.argnums)

    def merge(self, differentiable: tuple) -> list:
        """All the arguments, with others for the differentiable ones."""
        args = list(self.args)
        for i, x in zip(self.argnums, differentiable, strict=True):
            args[i] = x
        return args


CASES: list[Case] = []

# Cases of a kind go through the same rules in other combinations. Those that JAX refuses to
# differentiate in a mode are a kind of their own.
KINDS = {
    name: kind
    for kind, names in {
        "reductions": ("masks", "weights", "extremes", "rows", "noise", "side_outputs"),
        "clients": (
            *("scalars", "pytrees", "closures", "nested"),
            *("branches", "custom_jvp_client", "convolutions", "local_training"),
        ),
        "programs": ("rounds_inside", "rounds_outside", "programs_inside", "inner_gradient"),
    }.items()
    for name in names
}


@functools.cache
def of_size(n: int) -> list[Case]:
    """The table for another number of participants."""
    if n == N:
        return CASES
    spec = importlib.util.find_spec(__name__)
    module = importlib.util.module_from_spec(spec)
    module.N = n
    spec.loader.exec_module(module)
    return module.CASES


def case(
    reference: Callable, args: tuple, argnums: tuple[int, ...] | None = None, **refuses: Any
) -> Callable:
    """Enters a function that builds a program into the table."""
    argnums = tuple(range(len(args))) if argnums is None else argnums

    def enter(build):
        kind = "refusing" if refuses else KINDS[build.__name__]
        CASES.append(Case(build.__name__, build, reference, args, argnums, refuses, kind))
        return build

    return enter


def points(*shape: int, seed: int = 0) -> np.ndarray:
    """Some numbers between -1 and 1, no two of them equal or zero."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).round(6)


# Values


def of_scalars(p, d):
    return jnp.mean(jnp.tanh(p * d) + p)


@case(of_scalars, (np.float64(0.7), points(N)))
def scalars(fmap):
    """A mean of what a client makes of one number of the server's and one of its own."""

    @fax.program(clients=N)
    def program(p, d):
        return fax.mean(fmap(lambda p, d: jnp.tanh(p * d) + p, fax.broadcast(p), d))

    return program


class Layer(NamedTuple):
    kernel: Any
    bias: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    inputs: Any
    label: Any


PARAMS = {"layer": Layer(points(2, seed=1), None), "scale": np.float64(1.3), "empty": ()}
DATA = Data(points(N, 2, seed=2), {"y": points(N, seed=3)})


def predict(params, data):
    score = jnp.dot(params["layer"].kernel, data.inputs) * params["scale"]
    hit = score * data.label["y"] > 0
    return {"update": Layer(data.inputs * jnp.sin(score), None), "hit": hit, "empty": []}, score


def of_pytrees(params, data, ages):
    out, score = jax.vmap(predict, (None, 0))(params, data)
    mean = Layer(out["update"].kernel.mean(0), None)
    return (mean, {"hits": out["hit"].sum(), "none": None, "empty": []}), {
        "scores": jnp.sum(score**2),
        "ages": jnp.sum(ages),
        "mean age": jnp.mean(ages),
    }


@case(of_pytrees, (PARAMS, DATA, np.arange(3, 3 + N)), (0, 1))
def pytrees(fmap):
    """Nested containers, None, empty trees and integers, in and out."""

    @fax.program(clients=N)
    def program(params, data, ages):
        out, score = fmap(predict, fax.broadcast(params), data)
        update = fax.mean(out["update"])
        hits, empty = fax.sum((out["hit"], out["empty"]))
        squares = fmap(jnp.square, score)
        return (update, {"hits": hits, "none": None, "empty": empty}), {
            "scores": fax.sum(squares),
            "ages": fax.sum(ages),
            "mean age": fax.mean(ages),
        }

    return program


TABLE = points(2, seed=4)


def of_closures(scale, data):
    return jnp.sin(scale * (data @ TABLE)).mean() * scale, data @ jnp.flip(TABLE) + scale


@case(of_closures, (np.float64(0.9), points(N, 2, seed=5)))
def closures(fmap):
    """A client closes over a constant and, for a derivative, over a tracer."""

    def outer(scale, data):
        table = jnp.asarray(TABLE, float)

        @fax.program(clients=N)
        def program(data):
            means = fax.mean(fmap(lambda row: jnp.sin(scale * (row @ table)), data))
            doubled = scale + fmap(lambda row: row @ jnp.flip(table), data)
            return means * scale, doubled

        return program(data)

    return outer


def of_nested(p, data):
    def region(rows):
        return jnp.mean(jnp.sin(p * rows)) * p**2, jnp.max(p + rows)

    loads, peaks = jax.vmap(region)(data)
    return jnp.sum(loads), peaks


@case(of_nested, (np.float64(0.8), points(2, 3, seed=6)))
def nested(fmap):
    """Maps over clients inside of a map over regions."""

    @fax.program(regions=2, clients=3)
    def program(p, data):
        def region(p, rows):
            everywhere = fax.broadcast(p, placement="clients")
            load = fmap(lambda p, x: jnp.sin(p * x), everywhere, rows)
            peak = fax.max(fmap(jnp.add, everywhere, rows, placement="clients"))
            return fax.mean(load, placement="clients") * p**2, peak

        everywhere = fax.broadcast(p, placement="regions")
        loads, peaks = fmap(region, everywhere, data, placement="regions")
        return fax.sum(loads, placement="regions"), peaks

    return program


# Reductions

MASK = np.resize([True, False, True, True, False, True, True], N)
POSITIVE = np.where(MASK, 1.5 + points(N, seed=7), np.where(np.arange(N) == 4, np.nan, 0))


def of_masks(w, x, mask):
    def log(x):
        return w * jnp.log(x)

    y = jax.vmap(log)(jnp.where(mask, x, 1.0))
    sums = jnp.where(mask, y, 0.0).sum()
    return (
        {"sum": sums, "mean": sums / mask.sum(), "raw": jnp.where(mask, x, 0.0).sum()},
        jnp.where(mask, y, -np.inf).max(),
        jnp.where(mask, y, np.inf).min(),
    )


@case(of_masks, (np.float64(0.6), POSITIVE, MASK), (0, 1))
def masks(fmap):
    """Those left out hold 0 and NaN, where the client's function is singular."""

    @fax.program(clients=N)
    def program(w, x, mask):
        y = fmap(lambda w, x: w * jnp.log(x), fax.broadcast(w), x)
        sums = {"sum": fax.sum(y, where=mask), "mean": fax.mean(y, where=mask)}
        sums["raw"] = fax.sum(x, where=mask)
        return sums, fax.max(y, where=mask), fax.min(y, where=mask)

    return program


def of_weights(p, d, weights, mask):
    y = jnp.sin(p * d)
    w = jnp.where(mask, weights, 0.0)
    return jnp.sum(w * y) / jnp.sum(w), jnp.sum(weights * d) / jnp.sum(weights)


@case(of_weights, (np.float64(1.1), points(N, seed=8), points(N, seed=9) + 0.5, MASK), (0, 1, 2))
def weights(fmap):
    """Means with weights, some of them negative, fused and of raw rows."""

    @fax.program(clients=N)
    def program(p, d, weights, mask):
        y = fmap(lambda p, d: jnp.sin(p * d), fax.broadcast(p), d)
        return fax.mean(y, weights=weights, where=mask), fax.mean(d, weights=weights)

    return program


EXTREME = points(N, 2, seed=10)
BETWEEN = np.sort(EXTREME.max(0)).mean()  # beats the maximum of one column and not the other's


def of_extremes(p, d):
    y = jnp.cos(p + d)
    rest = {"min": y.min(0), "raw": d.max(0), "initial": jnp.maximum(d.max(0), BETWEEN)}
    return y.max(0), rest


@case(of_extremes, (np.float64(0.4), EXTREME))
def extremes(fmap):
    """Maxima and minima, element by element, of maps and of raw rows."""

    @fax.program(clients=N)
    def program(p, d):
        y = fmap(lambda p, d: jnp.cos(p + d), fax.broadcast(p), d)
        rest = {"min": fax.min(y), "raw": fax.max(d), "initial": fax.max(d, initial=BETWEEN)}
        return fax.max(y), rest

    return program


def of_rows(budget, d):
    spent = d * budget * (1.0 + jnp.arange(N))
    return jnp.sort(spent)[N // 2], spent[::2], jnp.sum(budget**2)


@case(of_rows, (points(N, seed=11), points(N, seed=12)))
def rows(fmap):
    """Rows dealt out, numbered, and collected."""

    @fax.program(clients=N)
    def program(budget, d):
        own = fax.distribute(budget)
        spent = fmap(lambda b, d, i: d * b * (1.0 + i), own, d, fax.index())
        collected = fax.collect(spent)
        return jnp.sort(collected)[N // 2], collected[::2], fax.sum(fmap(jnp.square, own))

    return program


def of_noise(sigma, d, key):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(N, dtype=np.int32))
    noisy = jax.vmap(lambda k, d: jnp.sin(d + sigma * jax.random.normal(k, ())))(keys, d)
    return noisy.mean(), noisy


@case(of_noise, (np.float64(0.3), points(N, seed=13), jax.random.key(5)), (0, 1))
def noise(fmap):
    """Every client draws noise with a key of its own."""

    @fax.program(clients=N)
    def program(sigma, d, key):
        def draw(sigma, d, key):
            return jnp.sin(d + sigma * jax.random.normal(key, ()))

        noisy = fmap(draw, fax.broadcast(sigma), d, fax.keys(key))
        return fax.mean(noisy), noisy

    return program


def of_side_outputs(p, d):
    y = p * d**2
    return y, y.sum(), y.max(), y - y.mean(), (y > 0).sum(), (10 * d).astype(np.int32)


@case(of_side_outputs, (np.float64(-0.5), points(N, seed=14)))
def side_outputs(fmap):
    """A value is returned row by row, reduced, and mapped once more; integers come along."""

    @fax.program(clients=N)
    def program(p, d):
        y, tens = fmap(lambda p, d: (p * d**2, (10 * d).astype(np.int32)), fax.broadcast(p), d)
        mean = fax.mean(y)
        centered = fmap(lambda y, mean: y - mean, y, fax.broadcast(mean))
        return y, fax.sum(y), fax.max(y), centered, fax.sum(y > 0), tens

    return program


# Client functions


def branch(p, x):
    return lax.cond(x > 0, lambda x: jnp.sin(p * x), lambda x: p * x**2, x)


def of_branches(p, d, weights):
    y = jnp.where(d > 0, jnp.sin(p * d), p * d**2)
    return jnp.sum(weights * y) / jnp.sum(weights), jnp.sum(p * jnp.exp(d))


@case(of_branches, (np.float64(0.7), points(N, seed=15), 0.5 + np.arange(N)))
def branches(fmap):
    """A checkpointed client that branches on its data, under a weighted mean; a jitted client."""

    @fax.program(clients=N)
    def program(p, d, weights):
        everywhere = fax.broadcast(p)
        y = fmap(jax.checkpoint(branch), everywhere, d)
        z = fmap(jax.jit(lambda p, x: p * jnp.exp(x)), everywhere, d)
        return fax.mean(y, weights=weights), fax.sum(z)

    return program


def until(p, x):
    """Steps from x toward p, a number of them that depends on the data."""

    def step(state):
        x, steps = state
        return x - 0.4 * jnp.sin(x - p), steps + 1

    return lax.while_loop(lambda state: jnp.abs(state[0] - p) > 0.3, step, (x, 0))


def of_loops(p, d):
    y, steps = jax.vmap(until, (None, 0))(p, d)
    return y.mean(), steps


@case(of_loops, (np.float64(1.6), points(N, seed=16)), reverse=REFUSES_REVERSE)
def loops(fmap):
    """A client that loops until it is satisfied, which has no reverse mode."""

    @fax.program(clients=N)
    def program(p, d):
        y, steps = fmap(until, fax.broadcast(p), d)
        return fax.mean(y), steps

    return program


def thrice(x):
    """The sine, with a derivative that is three times too large."""
    return 3 * jnp.sin(x) - lax.stop_gradient(2 * jnp.sin(x))


@jax.custom_jvp
def thrice_forward(x):
    return jnp.sin(x)


@thrice_forward.defjvp
def _(primals, tangents):
    return thrice_forward(*primals), 3 * jnp.cos(primals[0]) * tangents[0]


@jax.custom_vjp
def thrice_backward(x):
    return jnp.sin(x)


thrice_backward.defvjp(lambda x: (thrice(x), x), lambda x, cotangent: (3 * jnp.cos(x) * cotangent,))


def of_custom_rules(p, d):
    y = p * thrice(p + d)
    return y.mean(), y


def with_rule(rule, fmap):
    @fax.program(clients=N)
    def program(p, d):
        y = fmap(lambda p, d: p * rule(p + d), fax.broadcast(p), d)
        return fax.mean(y), y

    return program


@case(of_custom_rules, (np.float64(0.2), points(N, seed=17)))
def custom_jvp_client(fmap):
    """A client's function has a forward rule of its own."""
    return with_rule(thrice_forward, fmap)


@case(of_custom_rules, (np.float64(0.2), points(N, seed=17)), forward=REFUSES_FORWARD)
def custom_vjp_client(fmap):
    """A client's function has a reverse rule of its own, and so no forward mode."""
    return with_rule(thrice_backward, fmap)


def convolve(kernel, x):
    """Two channels with a kernel each, and a dilated sum of them."""
    x = lax.conv_general_dilated(x[None], kernel, (1,), [(1, 0)], feature_group_count=2)
    return jnp.tanh(lax.conv_general_dilated(x, kernel.mT, (2,), "SAME", rhs_dilation=(2,)))[0]


def of_convolutions(kernel, x):
    return jax.vmap(convolve, (None, 0))(kernel, x).mean(0)


@case(of_convolutions, (points(2, 1, 2, seed=24), points(N, 2, 4, seed=25)))
def convolutions(fmap):
    """A client with convolutions, which are rewritten when a map is lowered."""

    @fax.program(clients=N)
    def program(kernel, x):
        return fax.mean(fmap(convolve, fax.broadcast(kernel), x))

    return program


# Algorithms


def squares(p, x, y):
    return (jnp.dot(x, p) - y) ** 2


def train(p, xs, ys, rate):
    """A step of gradient descent on each example."""

    def step(p, example):
        return p - rate * jax.grad(squares)(p, *example), squares(p, *example)

    p, losses = lax.scan(step, p, (xs, ys))
    return p, jnp.mean(losses)


def of_local_training(p, ys, rate, xs):
    new, losses = jax.vmap(train, (None, 0, 0, None))(p, xs, ys, rate)
    return new.mean(0), losses.mean()


LOCAL_DATA = (points(2, seed=18), points(N, 2, seed=19), np.float64(0.2), points(N, 2, 2, seed=20))


@case(of_local_training, LOCAL_DATA, (0, 1, 2))
def local_training(fmap):
    """Federated averaging: a client descends along its own gradients."""

    @fax.program(clients=N)
    def program(p, ys, rate, xs):
        new, losses = fmap(train, *fax.broadcast((p,)), xs, ys, fax.broadcast(rate))
        return fax.mean(new), fax.mean(losses)

    return program


def pull(p, d):
    return jnp.sin(d - p) * p


ROUNDS = np.array([0.5, 0.25, 0.125])


def of_rounds(p, d):
    moves = []
    for rate in ROUNDS:
        moves.append(jnp.mean(pull(p, d)))
        p = p + rate * moves[-1]
    return p, jnp.stack(moves)


def one_round(fmap):
    def step(p, rate, d):
        move = fax.mean(fmap(pull, fax.broadcast(p), d))
        return p + rate * move, move

    return step


@case(of_rounds, (np.float64(0.9), points(N, seed=21)))
def rounds_inside(fmap):
    """A program that scans over rounds."""

    @fax.program(clients=N)
    def program(p, d):
        return lax.scan(lambda p, rate: one_round(fmap)(p, rate, d), p, ROUNDS)

    return program


@case(of_rounds, (np.float64(0.9), points(N, seed=21)))
def rounds_outside(fmap):
    """A scan over rounds, each of which is a program."""
    step = fax.program(clients=N)(one_round(fmap))
    return lambda p, d: lax.scan(lambda p, rate: step(p, rate, d), p, ROUNDS)


def of_programs_inside(p, d):
    center = jnp.mean(jnp.sin(p * d))
    return jnp.sum((d - center) ** 2 * p), jnp.sum(jnp.tanh(d * p), axis=1).max()


@case(of_programs_inside, (np.float64(1.2), points(N, 2, seed=22)))
def programs_inside(fmap):
    """A program calls another one at the server, and one more in its client function."""

    @fax.program(clients=N)
    def center(p, d):
        return fax.mean(fmap(lambda p, d: jnp.mean(jnp.sin(p * d)), fax.broadcast(p), d))

    @fax.program(shards=2)
    def share(p, d):
        return fax.sum(fmap(lambda p, d: jnp.tanh(d * p), fax.broadcast(p), d))

    @fax.program(clients=N)
    def program(p, d):
        middle = fax.broadcast(center(p, d))
        everywhere = fax.broadcast(p)
        spread = fmap(lambda d, c, p: jnp.sum((d - c) ** 2 * p), d, middle, everywhere)
        return fax.sum(spread), fax.max(fmap(share, everywhere, d))

    return program


def of_inner_gradient(p, d):
    slope = jnp.mean(-jnp.cos(d - p) * p + jnp.sin(d - p))
    return p - 0.1 * slope, slope


@case(of_inner_gradient, (np.float64(0.9), points(N, seed=23)))
def inner_gradient(fmap):
    """A program takes a gradient through its own operators."""

    @fax.program(clients=N)
    def program(p, d):
        slope = jax.grad(lambda p: fax.mean(fmap(pull, fax.broadcast(p), d)))(p)
        return p - 0.1 * slope, slope

    return program

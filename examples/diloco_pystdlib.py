"""DiLoCo and Streaming DiLoCo against data-parallel training: the same loss with far fewer bytes.

Four replicas of a small transformer read the source of Python's standard library, each a fourth of
its modules, and predict the next character. They are trained in four ways, from the same random
parameters, for the same number of AdamW steps and with the same learning rate:

    data-parallel, 1 x batch  one batch, of which each replica has a fourth
    data-parallel, 4 x batch  each replica has a batch of its own
    DiLoCo                    the same, but replicas take H = 50 steps on their own, and then an
                              outer step together (Douillard et al., arXiv:2311.08105)
    Streaming DiLoCo          a third of the layers at a time, in four bits and one step later
                              (Douillard et al., arXiv:2501.18512)

    python examples/diloco_pystdlib.py

prints the loss on held-out text and the bytes that a replica sends, and draws both to
runs/diloco_pystdlib.png. The bytes are those that a replica contributes to sums over replicas: its
gradient after every step, or its outer gradient after H steps. In all cases, a ring all-reduce
sends 2 (k - 1) / k times as much. The rounding to four bits is simulated: on this mesh the numbers
are sent in float32.

Unlike in the paper, the replicas are not pretrained: a data-parallel step sends as much as 50 of
DiLoCo's, and half a percent of all steps would use a fortieth of the bytes.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

REPLICAS = 4
BATCH_SIZE = 8  # per replica
LENGTH, WIDTH, HEADS, BLOCKS = 64, 32, 2, 2
PEAK = 6e-3  # the learning rate of AdamW after its warm-up
EVALUATIONS = 10
REFERENCE = "data-parallel, 4 x batch"


# The data


def deal(data):
    """Divides the modules into one shard per replica, with about as many sequences each."""
    modules = sorted(map(data.client, data.client_ids()), key=lambda module: -len(module["x"]))
    shards = [[] for _ in range(REPLICAS)]
    for module in modules:  # the longest first, to the smallest shard
        min(shards, key=lambda own: sum(len(one["x"]) for one in own)).append(module)
    return fax.data.InMemory(
        {
            f"shard {number}": {name: np.concatenate([one[name] for one in own]) for name in "xy"}
            for number, own in enumerate(shards)
        }
    )


# The model


class Block(nnx.Module):
    """Causal attention, then a hidden layer."""

    def __init__(self, rngs):
        def linear(inputs, outputs):
            return nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

        self.norm_1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attend = linear(WIDTH, 3 * WIDTH)
        self.mix = linear(WIDTH, WIDTH)
        self.norm_2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.hide = linear(WIDTH, 4 * WIDTH)
        self.show = linear(4 * WIDTH, WIDTH)

    def __call__(self, x):
        qkv = self.attend(self.norm_1(x)).reshape(*x.shape[:-1], 3, HEADS, WIDTH // HEADS)
        heads = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, -3, 0), is_causal=True)
        x = x + self.mix(heads.reshape(x.shape))
        return x + self.show(nnx.relu(self.hide(self.norm_2(x))))


class Transformer(nnx.Module):
    def __init__(self, characters, rngs):
        self.embed = nnx.Embed(characters, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.blocks = nnx.List(Block(rngs) for _ in range(BLOCKS))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, characters, rngs=rngs)

    def __call__(self, text):
        x = self.embed(text) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def make_model(task):
    """Returns the transformer for a task's characters, as pure functions."""
    params = jax.eval_shape(task.model.init, jax.random.key(0))
    text = {"x": jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)}
    characters = jax.eval_shape(task.model.apply, params, text).shape[-1]
    return fax.models.functional(
        lambda rngs: Transformer(characters, rngs), fax.models.sequence_cross_entropy
    )


# The four ways to train


def adamw(peak, steps):
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, min(100, steps // 4), steps)
    return optax.adamw(schedule, b2=0.99, weight_decay=0.1)


class DataParallelState(NamedTuple):
    params: dict
    optimizer: tuple


def data_parallel(loss, optimizer):
    """Data-parallel training as an algorithm: each step uses the replicas' mean gradient."""

    @fax.program(replicas=REPLICAS)
    def mean_loss(params, cohort, number):
        def own(everyone, client):
            params, number = everyone
            return jnp.mean(loss(params, client.batch(number), client.key)[0])

        return fax.mean(fax.map(own, fax.broadcast((params, number)), cohort.clients()))

    def init(params):
        return DataParallelState(params, optimizer.init(params))

    def round(state, cohort):
        def step(state, number):
            value, gradient = jax.value_and_grad(mean_loss)(state.params, cohort, number)
            updates, own = optimizer.update(gradient, state.optimizer, state.params)
            return DataParallelState(optax.apply_updates(state.params, updates), own), value

        steps = cohort.mask.shape[1]
        state, losses = lax.scan(step, state, jnp.arange(steps))
        bits = steps * sum(x.size * x.dtype.itemsize * 8 for x in jax.tree.leaves(state.params))
        sent = jnp.full(REPLICAS, bits, jnp.float32)
        return state, {"loss": jnp.mean(losses), "replicas/bits": sent}

    return fax.algorithms.Algorithm(init, round, lambda state: state.params)


class Way(NamedTuple):
    """An algorithm, and the batch size of a replica in a step."""

    algorithm: fax.algorithms.Algorithm
    batch_size: int


def ways(loss, steps, inner_steps):
    """Returns the ways to train for a number of steps, by name."""
    inner = adamw(PEAK, steps)

    def outer(rate, momentum):
        return {
            "inner_optimizer": inner,
            "outer_optimizer": optax.sgd(rate, momentum, nesterov=True),
            "replicas": REPLICAS,
            "steps": inner_steps,
        }

    return {
        "data-parallel, 1 x batch": Way(data_parallel(loss, inner), BATCH_SIZE // REPLICAS),
        REFERENCE: Way(data_parallel(loss, inner), BATCH_SIZE),
        "DiLoCo": Way(fax.algorithms.diloco(loss, **outer(0.7, 0.8)), BATCH_SIZE),
        "Streaming DiLoCo": Way(
            fax.algorithms.streaming_diloco(loss, **outer(0.4, 0.9), fragments=3, tau=1, alpha=0.5),
            BATCH_SIZE,
        ),
    }


def train(algorithm, cohorts, params, rounds, evaluate, progress):
    """Returns an array with the steps, a replica's bytes and the held-out loss per evaluation."""
    train_round, state = jax.jit(algorithm.round), jax.jit(algorithm.init)(params)
    curve, steps, sent = [], 0, 0.0
    for number in range(1, rounds + 1):
        cohort = next(cohorts)
        state, metrics = train_round(state, cohort)
        steps += cohort.mask.shape[1]
        sent += float(metrics["replicas/bits"][0]) / 8
        if number == rounds or number % -(-rounds // EVALUATIONS) == 0:
            curve.append((steps, sent, evaluate(algorithm.params(state))))
            progress.set_postfix(held_out=f"{curve[-1][-1]:.3f}", refresh=False)
        progress.update()
    return np.array(curve)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200, help="outer steps")
    parser.add_argument("--inner-steps", type=int, default=50, help="H, between two outer steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    mesh = fax.sharding.use_cpu_devices(axis="replicas")
    if jax.default_backend() == "cpu":
        jax.set_mesh(mesh)

    task = fax.tasks.load("pystdlib", length=LENGTH)
    model, shards = make_model(task), deal(task.train)
    held_out = fax.metrics.prepare(task.test, placement="replicas")
    metrics = {"loss": task.metrics["loss"]}

    def evaluate(params):
        found = fax.metrics.evaluate(model.apply, params, held_out, metrics, placement="replicas")
        return float(found["loss"])

    params = model.init(jax.random.key(options.seed))
    size, steps = sum(map(jnp.size, jax.tree.leaves(params))), options.rounds * options.inner_steps
    print(
        f"{size:,} parameters, {REPLICAS} replicas, {steps:,} steps, H = {options.inner_steps}, "
        f"held-out loss {evaluate(params):.4f} at the start"
    )
    todo, curves, start = ways(model.loss, steps, options.inner_steps), {}, time.perf_counter()
    with tqdm(total=len(todo) * options.rounds, unit="round") as progress:
        for name, (algorithm, batch_size) in todo.items():
            progress.set_description(name)
            with fax.data.cohorts(
                shards,
                REPLICAS,
                batch_size,
                sampler="stream",
                max_steps=options.inner_steps,
                seed=options.seed,
                placement="replicas",
            ) as cohorts:
                curves[name] = train(algorithm, cohorts, params, options.rounds, evaluate, progress)
    minutes = (time.perf_counter() - start) / 60

    _, most, reference = curves[REFERENCE][-1]
    print(f"{'':<26}{'held-out loss':>13}{'against 4 x':>13}{'bytes sent':>15}{'share':>8}")
    for name, curve in curves.items():
        _, sent, loss = curve[-1]
        share = f"1/{most / sent:.0f}"
        print(f"{name:<26}{loss:>13.4f}{loss / reference - 1:>+13.1%}{sent:>15,.0f}{share:>8}")
    print(f"{minutes:.1f} minutes, see {draw(curves)}")


def draw(curves):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        steps, sent, losses = curve.T
        left.plot(steps, losses, marker=".", label=name)
        right.plot(sent / 1e6, losses, marker=".")
    left.set(xlabel="steps", ylabel="held-out loss (nats per character)")
    left.legend(frameon=False)
    right.set(xlabel="megabytes that a replica sent", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "diloco_pystdlib.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

"""DiLoCo and its relatives against data-parallel training: the same loss with far fewer bytes.

Four replicas of a small transformer read the source of Python's standard library, each a fourth of
its modules, and predict the next character. A replica is itself split over four devices: batches
over the mesh axis `data`, attention heads and hidden units over `model`. All ways to train start
from the same parameters and take the same number of steps:

    data-parallel, 1 x batch  one batch, of which each replica has a fourth
    data-parallel, 4 x batch  each replica has a batch of its own, here and below
    data-parallel, Muon       the same with Muon for the matrices of layers, and AdamW for all else
    DiLoCo                    replicas take H = 50 steps of AdamW on their own, and then an outer
                              step together (Douillard et al., arXiv:2311.08105)
    Streaming DiLoCo          a third of the layers at a time, in four bits and one step later
                              (Douillard et al., arXiv:2501.18512)
    MuLoCo                    DiLoCo with Muon (Thérien et al., arXiv:2505.23725)
    SparseLoCo                DiLoCo that sends 3 % of the numbers in two bits each, and the rest
                              later (Sarfi et al., arXiv:2508.15706)

    python examples/diloco_pystdlib.py

makes devices out of one CPU, prints the loss on held-out text and the bytes, and draws both to
runs/diloco_pystdlib.png. The bytes are read from the compiled program, `fax.inspect.report`: what
each device passes to collectives in a step, along the axis `replicas`, which may be a slow network
between data centers, and along the others, which are fast. The last column is the size of what a
replica sends as its aggregator encodes it, if it does.

A data-parallel step sends the gradient, and H steps of DiLoCo send the change of the parameters.
What the devices of a replica have in common crosses once in DiLoCo and its relatives, each device
sending a part. Unlike in the paper, the replicas are not pretrained by data-parallel steps.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _transformer import load, make_model, use_eight_devices
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

import fax
from fax import aggregators

REPLICAS = 4
BATCH_SIZE = 8  # per replica
PEAK = 6e-3  # the learning rate after its warm-up
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


# The optimizers


def schedule(steps):
    return optax.warmup_cosine_decay_schedule(0.0, PEAK, min(100, steps // 4), steps)


def adamw(steps):
    return optax.adamw(schedule(steps), b2=0.99, weight_decay=0.1)


def muon(steps):
    """Muon for the matrices of layers, with updates as large as those of AdamW."""
    return optax.contrib.muon(
        schedule(steps),
        beta=0.9,
        nesterov=False,
        weight_decay=0.1,
        adam_b2=0.99,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


def matrices(params):
    """Which axes of a kernel are the rows and the columns of a matrix."""
    axes = {
        "attend": optax.contrib.MuonDimensionNumbers(0, (2, 3)),  # for queries, keys and values
        "mix": optax.contrib.MuonDimensionNumbers((0, 1), 2),
        "hide": optax.contrib.MuonDimensionNumbers(0, 1),
        "show": optax.contrib.MuonDimensionNumbers(0, 1),
    }

    def one(path, x):
        return next((axes[key.key] for key in path if key.key in axes), None)

    return jax.tree.map_with_path(one, params)


# The ways to train


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

        replicas = fax.broadcast((params, number)), cohort.clients()
        return fax.mean(fax.map(own, *replicas, vectorize=REPLICAS))

    def init(params):
        return DataParallelState(params, optimizer.init(params))

    def round(state, cohort):
        def step(state, number):
            value, gradient = jax.value_and_grad(mean_loss)(state.params, cohort, number)
            updates, own = optimizer.update(gradient, state.optimizer, state.params)
            return DataParallelState(optax.apply_updates(state.params, updates), own), value

        state, losses = lax.scan(step, state, jnp.arange(cohort.mask.shape[1]))
        return state, {"loss": jnp.mean(losses)}

    return fax.algorithms.Algorithm(init, round, lambda state: state.params)


class Way(NamedTuple):
    """An algorithm, and the batch size of a replica in a step."""

    algorithm: fax.algorithms.Algorithm
    batch_size: int = BATCH_SIZE


def ways(loss, sharding, steps, inner_steps):
    """Returns the ways to train for a number of steps, by name."""
    common = {
        "replicas": REPLICAS,
        "steps": inner_steps,
        "sharding": sharding,
        "vectorize": REPLICAS,
    }

    def diloco(inner, outer, **kwargs):
        return Way(fax.algorithms.diloco(loss, inner, outer, **common, **kwargs))

    def nesterov(rate, momentum):
        return optax.sgd(rate, momentum, nesterov=True)

    two_bits = aggregators.uniform_quantization(levels=4)
    sparse = aggregators.error_feedback(
        aggregators.top_k(2, per=64, values=two_bits), num_clients=REPLICAS, decay=0.95
    )
    streaming = fax.algorithms.streaming_diloco(
        loss, adamw(steps), nesterov(0.4, 0.9), fragments=3, tau=1, alpha=0.5, **common
    )
    return {
        "data-parallel, 1 x batch": Way(data_parallel(loss, adamw(steps)), BATCH_SIZE // REPLICAS),
        REFERENCE: Way(data_parallel(loss, adamw(steps))),
        "data-parallel, Muon": Way(data_parallel(loss, muon(steps))),
        "DiLoCo": diloco(adamw(steps), nesterov(0.7, 0.8)),
        "Streaming DiLoCo": Way(streaming),
        "MuLoCo": diloco(muon(steps), nesterov(0.9, 0.8)),
        "SparseLoCo": diloco(adamw(steps), optax.sgd(1.0), aggregator=aggregators.chain(sparse)),
    }


# Training


class Sent(NamedTuple):
    """Bytes in a step: of a device between replicas and within one, and of an encoded update."""

    between: float
    within: float
    encoded: float | None


def train(algorithm, cohorts, params, rounds, evaluate, progress):
    """Trains for some rounds.

    Returns an array with the steps and the held-out loss of ten evaluations, and what is sent.
    """
    train_round, state = jax.jit(algorithm.round), algorithm.init(params)
    curve, every = [], -(-rounds // 10)
    for number in range(1, rounds + 1):
        cohort = next(cohorts)
        steps = cohort.mask.shape[1]
        if number == 1:
            found = fax.inspect.report(train_round, state, cohort)
        state, metrics = train_round(state, cohort)
        if number == rounds or number % every == 0:
            curve.append((number * steps, evaluate(algorithm.params(state))))
            progress.set_postfix(held_out=f"{curve[-1][-1]:.3f}", refresh=False)
        progress.update()
    between = sum(each.total_bytes for each in found.over("replicas"))
    total = sum(each.total_bytes for each in found.collectives)
    encoded = None
    if "replicas/bits" in metrics:
        encoded = float(metrics["replicas/bits"][0]) / 8 / steps
    return np.array(curve), Sent(between / steps, (total - between) / steps, encoded)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50, help="outer steps")
    parser.add_argument("--inner-steps", type=int, default=50, help="H, between two outer steps")
    parser.add_argument("--length", type=int, default=64, help="of a sequence")
    parser.add_argument("--width", type=int, default=32, help="of the transformer")
    parser.add_argument("--blocks", type=int, default=2, help="of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    use_eight_devices("replicas")
    task, characters = load(options.length)
    model, sharding = make_model(characters, options.length, options.width, options.blocks)
    shards = deal(task.train)
    held_out = fax.metrics.prepare(task.test, placement="replicas")
    metrics = {"loss": task.metrics["loss"]}

    def evaluate(params):
        found = fax.metrics.evaluate(model.apply, params, held_out, metrics, placement="replicas")
        return float(found["loss"])

    params = model.init(jax.random.key(options.seed))
    size, steps = sum(map(jnp.size, jax.tree.leaves(params))), options.rounds * options.inner_steps
    read = steps * REPLICAS * BATCH_SIZE * options.length
    print(
        f"{size:,} parameters, {REPLICAS} replicas, {steps:,} steps, H = {options.inner_steps}, "
        f"{read:,} characters, held-out loss {evaluate(params):.4f} at the start"
    )
    todo, found, start = ways(model.loss, sharding, steps, options.inner_steps), {}, time.time()
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
                found[name] = train(algorithm, cohorts, params, options.rounds, evaluate, progress)
    minutes = (time.time() - start) / 60

    show(found)
    print(f"{minutes:.1f} minutes, see {draw(found)}")


def show(found):
    """Prints the losses and bytes of each way to train."""
    curve, most = found[REFERENCE]
    reference = curve[-1, 1]
    columns = "held-out loss", "against 4 x", "bytes a step", "share", "within", "encoded"
    print(f"{'':<26}" + "".join(f"{column:>14}" for column in columns))
    for name, (curve, sent) in found.items():
        loss = curve[-1, 1]
        values = (
            f"{loss:.4f}",
            f"{loss / reference - 1:+.1%}",
            f"{sent.between:,.0f}",
            f"{sent.between / most.between:.2%}",
            f"{sent.within:,.0f}",
            "" if sent.encoded is None else f"{sent.encoded:,.0f}",
        )
        print(f"{name:<26}{''.join(f'{value:>14}' for value in values)}".rstrip())


def draw(found):
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, (curve, sent) in found.items():
        steps, losses = curve.T
        left.plot(steps, losses, marker=".", label=name)
        right.plot(steps * sent.between / 1e6, losses, marker=".")
    left.set(xlabel="steps", ylabel="held-out loss (nats per character)")
    left.legend(frameon=False)
    right.set(xlabel="megabytes that a device sent between replicas", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "diloco_pystdlib.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

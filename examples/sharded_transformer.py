"""Federated training of a transformer that is itself sharded over several devices.

Every top-level module of Python's standard library is a client, and the client trains on its
source: the model reads one character after another and predicts the next. The devices form a mesh
with three axes:

    clients   the clients of a round are split over it
    data      every batch of a client is split over it
    model     attention heads and hidden units are split over it

fax uses the axis with the name of the placement and leaves the others to the client function,
which uses them through JAX's shardings. A round sends only one sum of updates along `clients`. The
layers and batches of a client communicate only among its own devices. In `diloco_pystdlib.py` the
same transformer is trained in a data center.

    python examples/sharded_transformer.py

makes eight devices out of one CPU. It prints the loss on held-out modules and the entropy of their
characters, which is a lower bound for models that ignore the preceding characters, and draws the
losses to runs/sharded_transformer.png.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _transformer import load, make_model, use_eight_devices
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

LENGTH, WIDTH, BLOCKS = 64, 64, 2
LOCAL_STEPS, BATCH_SIZE = 8, 16
HELD_OUT = 16
CLIENT_OPTIMIZER = optax.adam(3e-3)
SERVER_OPTIMIZER = optax.sgd(1.0, momentum=0.5, nesterov=True)


# The clients


def read_modules(task):
    """Every module's sequences, if it has enough of them for a batch."""
    modules = {name: task.train.client(name) for name in task.train.client_ids()}
    return {name: own for name, own in modules.items() if len(own["x"]) >= BATCH_SIZE}


def random_sequences(module, rng):
    rows = rng.integers(len(module["x"]), size=(LOCAL_STEPS, BATCH_SIZE))
    return {name: x[rows] for name, x in module.items()}


def even_sequences(module):
    rows = np.linspace(0, len(module["x"]) - 1, BATCH_SIZE, dtype=int)
    return {name: x[rows] for name, x in module.items()}


def stack(clients, mesh, spec):
    """Puts clients' sequences onto the mesh."""
    stacked = jax.tree.map(lambda *x: np.stack(x), *clients)
    return jax.device_put(stacked, NamedSharding(mesh, spec))


def entropy(text):
    """The loss of the best model with constant predictions."""
    shares = np.unique(text, return_counts=True)[1] / text.size
    return -np.sum(shares * np.log(shares))


# Training


def make_round(model, clients):
    """Makes a round of federated training, and the evaluation on held-out clients."""

    def mean_loss(params, batch):
        return jnp.mean(model.loss(params, batch, None)[0])

    def local_update(params, batches):
        """Returns the change of the parameters by a client's training, and the loss before it."""

        def step(carry, batch):
            params, state = carry
            loss, gradient = jax.value_and_grad(mean_loss)(params, batch)
            updates, state = CLIENT_OPTIMIZER.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = (params, CLIENT_OPTIMIZER.init(params))
        (trained, _), losses = lax.scan(step, start, batches)
        return jax.tree.map(jnp.subtract, trained, params), losses[0]

    @fax.program(clients=clients)
    def mean_update(params, batches):
        return fax.mean(fax.map(local_update, fax.broadcast(params), batches))

    @jax.jit
    def federated_round(params, state, batches):
        update, loss = mean_update(params, batches)
        gradient = jax.tree.map(jnp.negative, update)
        updates, state = SERVER_OPTIMIZER.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    @jax.jit
    @fax.program(clients=HELD_OUT)
    def evaluate(params, text):
        return fax.mean(fax.map(mean_loss, fax.broadcast(params), text))

    return federated_round, evaluate


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--clients-per-round", type=int, default=4, help="an even number")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    mesh = use_eight_devices("clients")
    task, characters = load(LENGTH)
    modules = read_modules(task)
    rng = np.random.default_rng(options.seed)
    names = rng.permutation(list(modules))
    held_out = [even_sequences(modules[name]) for name in names[:HELD_OUT]]
    limit = entropy(np.stack([own["y"] for own in held_out]))
    held_out = stack(held_out, mesh, P("clients", "data"))

    # With a mesh in scope, the parameters are created with their shardings.
    model, _ = make_model(characters, LENGTH, WIDTH, BLOCKS)
    params = model.init(jax.random.key(options.seed))
    state = SERVER_OPTIMIZER.init(params)
    federated_round, evaluate = make_round(model, options.clients_per_round)

    losses, held_out_losses, seconds = [], {}, []
    for number in (progress := tqdm(range(1, options.rounds + 1), unit="round")):
        members = rng.choice(names[HELD_OUT:], options.clients_per_round, replace=False)
        cohort = [random_sequences(modules[name], rng) for name in members]
        start = time.perf_counter()
        cohort = stack(cohort, mesh, P("clients", None, "data"))
        params, state, loss = jax.block_until_ready(federated_round(params, state, cohort))
        seconds.append(time.perf_counter() - start)
        losses.append(float(loss))
        if number % 10 == 0 or number == options.rounds:
            held_out_losses[number] = float(evaluate(params, held_out))
            progress.set_postfix(held_out=f"{held_out_losses[number]:.3f}", refresh=False)

    path = draw(losses, held_out_losses, limit)
    final = held_out_losses[options.rounds]
    print(
        f"held-out loss {final:.3f} nats, unigram entropy {limit:.3f} nats, margin "
        f"{limit - final:.3f}, {np.median(seconds):.3f} s per round, see {path}"
    )


def draw(losses, held_out_losses, limit):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, linewidth=1, label="cohort, before training")
    axes.plot(held_out_losses.keys(), held_out_losses.values(), label="held-out modules")
    axes.axhline(limit, color="gray", linestyle="--", label="entropy of single characters")
    axes.set(xlabel="round", ylabel="loss (nats per character)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "sharded_transformer.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

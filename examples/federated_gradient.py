"""Gradients through whole rounds of federated averaging.

Twenty clients train a linear classifier of handwritten digits. Six of them hold shuffled labels,
which the server does not know. It has clean validation images, and descends the loss that the
classifier has on them after ten rounds:

* in the learning rate of the server, whose derivative is taken in forward mode;
* in the weights of the clients' updates, one number each, whose gradient is taken in reverse mode.

    python examples/federated_gradient.py

checks both against finite differences and draws what was learned to runs/federated_gradient.png.
"""

import argparse
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

jax.config.update("jax_enable_x64", True)  # for the finite differences

CLIENTS, CORRUPTED, ALPHA = 20, 6, 5.0
ROUNDS, LOCAL_STEPS = 10, 10


def mean_loss(params, examples):
    logits = examples["image"] @ params["kernel"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["label"])
    return jnp.mean(losses, where=examples["mask"])


@jax.checkpoint  # the gradient trains each client again, instead of storing its steps
def local_update(params, examples):
    def step(params, _):
        gradient = jax.grad(mean_loss)(params, examples)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), None

    trained, _ = lax.scan(step, params, length=LOCAL_STEPS)
    return jax.tree.map(jnp.subtract, trained, params)


@fax.program(clients=CLIENTS)
def train(meta, clients):
    """The parameters after all rounds."""
    rate, weights = jnp.exp(meta["log_rate"]), jax.nn.softmax(meta["logits"])

    def federated_round(params, _):
        updates = fax.map(local_update, fax.broadcast(params), clients)
        update = fax.mean(updates, weights=fax.distribute(weights))
        return jax.tree.map(lambda p, u: p + rate * u, params, update), None

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return lax.scan(federated_round, params, length=ROUNDS)[0]


def validation_loss(meta, clients, validation):
    return mean_loss(train(meta, clients), validation)


@jax.jit
def meta_gradient(meta, *data):
    """The validation loss and its gradient, forward in the rate and backward in the weights."""

    def of_rate(log_rate):
        return validation_loss(meta | {"log_rate": log_rate}, *data)

    def of_weights(logits):
        return validation_loss(meta | {"logits": logits}, *data)

    loss, rate = jax.jvp(of_rate, (meta["log_rate"],), (jnp.ones(()),))
    return loss, {"log_rate": rate, "logits": jax.grad(of_weights)(meta["logits"])}


def check(meta, data, rng, epsilon=1e-4):
    """Prints the derivatives in a random direction, and central differences."""
    loss = jax.jit(validation_loss)
    _, gradient = meta_gradient(meta, *data)
    for name, mode in {"log_rate": "forward", "logits": "reverse"}.items():
        direction = rng.normal(size=meta[name].shape)
        ahead, behind = (
            loss(meta | {name: meta[name] + sign * epsilon * direction}, *data) for sign in (1, -1)
        )
        numeric = (ahead - behind) / (2 * epsilon)
        exact = jnp.vdot(gradient[name], direction)
        error = abs(exact - numeric) / abs(numeric)
        print(f"{name}: {mode} {exact:.9f}, differences {numeric:.9f}, error {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = np.random.default_rng(options.seed)
    (images, labels), (held_out, held_out_labels) = _digits.load(options.seed)
    owner = _digits.dirichlet_partition(labels, CLIENTS, ALPHA, rng)
    corrupted = np.arange(CLIENTS) < CORRUPTED
    theirs = corrupted[owner]
    labels[theirs] = rng.permutation(labels[theirs])
    validation = {"image": held_out, "label": held_out_labels, "mask": np.ones(len(held_out), bool)}
    data = jax.device_put((_digits.stack(images, labels, owner, CLIENTS), validation))

    meta = {"log_rate": jnp.zeros(()), "logits": jnp.zeros(CLIENTS)}
    check(meta, data, rng)

    optimizer = optax.adam(0.1)
    state = optimizer.init(meta)
    losses, rates = [], []
    for _ in (progress := tqdm(range(options.steps), unit="step", disable=True)):
        loss, gradient = meta_gradient(meta, *data)
        losses.append(float(loss))
        rates.append(float(jnp.exp(meta["log_rate"])))
        updates, state = optimizer.update(gradient, state, meta)
        meta = optax.apply_updates(meta, updates)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", rate=f"{rates[-1]:.2f}")
    print(jax.nn.softmax(meta["logits"])); print(np.array(losses)[::5]); print(np.array(rates)[::5])

if __name__ == "__main__":
    main()

"""Gradients through whole rounds of federated averaging.

Twenty clients train a linear classifier of handwritten digits. Six of them have shuffled labels,
and the server does not know which. It minimizes the loss of the classifier after ten rounds on its
own validation images. It uses gradient descent with respect to

* the server's learning rate, differentiated in forward mode, and
* the weights of the clients in the mean, differentiated in reverse mode.

    python examples/federated_gradient.py

checks both against finite differences and draws the results to runs/federated_gradient.png.
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
ROUNDS, LOCAL_STEPS, LOCAL_RATE = 10, 5, 0.5


def mean_loss(params, examples):
    logits = examples["x"] @ params["kernel"] + params["bias"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, examples["y"])
    return jnp.mean(losses, where=examples["mask"])


@jax.checkpoint  # the gradient repeats the local steps instead of storing them
def local_update(params, examples):
    def step(params, _):
        gradient = jax.grad(mean_loss)(params, examples)
        return jax.tree.map(lambda p, g: p - LOCAL_RATE * g, params, gradient), None

    trained, _ = lax.scan(step, params, length=LOCAL_STEPS)
    return jax.tree.map(jnp.subtract, trained, params)


@fax.program(clients=CLIENTS)
def train(log_rate, logits, clients):
    """The parameters after all rounds of federated averaging."""
    rate, weights = jnp.exp(log_rate), fax.distribute(jax.nn.softmax(logits))

    @jax.checkpoint  # otherwise the scan stores values that depend only on the clients' data
    def federated_round(params, _):
        updates = fax.map(local_update, fax.broadcast(params), clients)
        update = fax.mean(updates, weights=weights)
        return jax.tree.map(lambda p, u: p + rate * u, params, update), None

    params = {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    return lax.scan(federated_round, params, length=ROUNDS)[0]


def validation_loss(log_rate, logits, clients, validation):
    return mean_loss(train(log_rate, logits, clients), validation)


@jax.jit
def loss_and_gradient(meta, data):
    """The validation loss, its derivative by the rate (forward) and by the weights (reverse)."""
    of_rate = jax.jacfwd(validation_loss, argnums=0)(*meta, *data)
    loss, of_weights = jax.value_and_grad(validation_loss, argnums=1)(*meta, *data)
    return loss, (of_rate, of_weights)


def check(mode, direction, meta, data, epsilon=1e-4):
    """Prints a directional derivative and the central difference that should equal it."""
    ahead = jax.tree.map(lambda m, d: m + epsilon * d, meta, direction)
    behind = jax.tree.map(lambda m, d: m - epsilon * d, meta, direction)
    rise = loss_and_gradient(ahead, data)[0] - loss_and_gradient(behind, data)[0]
    difference = rise / (2 * epsilon)
    _, gradient = loss_and_gradient(meta, data)
    derivative = optax.tree.vdot(gradient, direction)
    error = abs(derivative - difference) / abs(difference)
    print(f"{mode} {derivative:.9f}, difference {difference:.9f}, relative error {error:.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    (images, labels), (held_out, answers) = _digits.load(options.seed)
    owner = _digits.dirichlet_partition(labels, CLIENTS, ALPHA, options.seed)
    rng = np.random.default_rng((options.seed, 1))
    shuffled = owner < CORRUPTED
    labels[shuffled] = rng.permutation(labels[shuffled])
    clients = _digits.stack(images, labels, owner, CLIENTS)
    validation = {"x": held_out, "y": answers, "mask": np.ones(len(answers), bool)}
    data = jax.device_put((clients, validation))

    meta = (jnp.zeros(()), jnp.zeros(CLIENTS))  # a rate of one, and equal weights
    check("forward mode", (1.0, jnp.zeros(CLIENTS)), meta, data)
    check("reverse mode", (0.0, rng.normal(size=CLIENTS)), meta, data)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, options.steps))
    state = optimizer.init(meta)
    losses, rates = [], []
    for _ in (progress := tqdm(range(options.steps), unit="step")):
        loss, gradient = loss_and_gradient(meta, data)
        losses.append(float(loss))
        rates.append(float(jnp.exp(meta[0])))
        updates, state = optimizer.update(gradient, state)
        meta = optax.apply_updates(meta, updates)
        progress.set_postfix(loss=f"{losses[-1]:.3f}", rate=f"{rates[-1]:.2f}")
    losses.append(float(loss_and_gradient(meta, data)[0]))
    rates.append(float(jnp.exp(meta[0])))

    weights = jax.nn.softmax(meta[1])
    clean, corrupted = weights[CORRUPTED:].mean(), weights[:CORRUPTED].mean()
    path = draw(losses, rates, weights)
    print(f"validation loss {losses[0]:.3f} before and {losses[-1]:.3f} after,", end=" ")
    print(f"mean weight {clean:.4f} of clean and {corrupted:.4f} of corrupted clients, see {path}")


def draw(losses, rates, weights):
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2)
    left.plot(losses, color="tab:blue")
    left.set(xlabel="meta-step")
    left.set_ylabel("validation loss", color="tab:blue")
    left.spines["top"].set_visible(False)
    rate = left.twinx()
    rate.plot(rates, color="tab:orange")
    rate.set_ylabel("learning rate of the server", color="tab:orange")
    rate.spines["top"].set_visible(False)

    numbers = np.arange(CLIENTS)
    clean = numbers >= CORRUPTED
    right.bar(numbers[clean], weights[clean], color="tab:green", label="true labels")
    right.bar(numbers[~clean], weights[~clean], color="tab:red", label="shuffled labels")
    right.axhline(1 / CLIENTS, color="black", linestyle="--", linewidth=1, label="at the start")
    right.set(xlabel="client", ylabel="learned weight", xticks=numbers[::2])
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    path = Path("runs", "federated_gradient.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

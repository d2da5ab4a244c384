"""Federated training of a transformer that is itself spread over several devices.

Every top-level module of Python's standard library is a client, and its source is what the client
trains on: the model reads one character after another and predicts the next. The devices form a
mesh with three axes:

    clients   the clients of a round are split over it
    data      every batch of a client is split over it
    model     attention heads and hidden units are split over it

fax takes the axis with the name of the placement and leaves the others to the client function,
which says with JAX's own shardings how to use them. All that a round sends along `clients` is one
sum of updates; what layers and batches have to exchange stays among the devices of a client.

    python examples/sharded_transformer.py

makes eight devices out of one CPU. It prints the loss on modules that were held out and the entropy
of their characters, which no model gets below that does not look at what comes before a character,
and draws the losses to runs/sharded_transformer.png.
"""

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

ALPHABET = b"\n" + bytes(range(ord(" "), ord("~") + 1))
CHARACTERS = len(ALPHABET) + 1  # the last one stands for every other byte
CONTEXT = 64
WIDTH, HEADS, BLOCKS = 64, 4, 2
LOCAL_STEPS, BATCH_SIZE = 8, 16
HELD_OUT = 16
CLIENT_OPTIMIZER = optax.adam(3e-3)
SERVER_OPTIMIZER = optax.sgd(1.0, momentum=0.5, nesterov=True)


# The clients


def read_modules():
    """Every module's text in numbers of characters. A module is a file or a folder of files."""
    number = np.full(256, CHARACTERS - 1, np.uint8)
    number[list(ALPHABET)] = np.arange(len(ALPHABET))
    library, modules = Path(sysconfig.get_paths()["stdlib"]), {}
    for name in sorted(sys.stdlib_module_names):
        files = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
        text = b"".join(file.read_bytes() for file in files if file.is_file())
        if len(text) > 20 * CONTEXT:  # some modules are written in C, and hardly any Python is left
            modules[name] = number[np.frombuffer(text, np.uint8)]
    return modules


def windows(text, starts):
    """What the model reads at a time, and one character more, which it has to predict."""
    return text[np.expand_dims(starts, -1) + np.arange(CONTEXT + 1)]


def random_windows(text, rng):
    starts = rng.integers(len(text) - CONTEXT, size=(LOCAL_STEPS, BATCH_SIZE))
    return windows(text, starts)


def even_windows(text):
    return windows(text, np.linspace(0, len(text) - CONTEXT - 1, BATCH_SIZE, dtype=int))


def entropy(text):
    """The loss of the best model that always predicts the same probabilities."""
    shares = np.unique(text, return_counts=True)[1] / text.size
    return -np.sum(shares * np.log(shares))


# The model


class Block(nnx.Module):
    """Attention to the characters before, then a hidden layer.

    A device has half of the heads and of the hidden units. The matrices that lead to them are
    split by columns, so each device computes its own from the whole of `x`. The matrices that lead
    back are split by rows, so each device computes a part of a sum. Their sum over `model` is the
    only thing that has to be sent: twice on the way forward and twice on the way back.
    """

    def __init__(self, width, heads, rngs):
        def linear(inputs, outputs, spec, axis=-1):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), spec)
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, use_bias=False, kernel_init=init, rngs=rngs
            )

        head = (heads, width // heads)
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.attend = linear(width, (3, *head), (None, None, "model", None))
        self.mix = linear(head, width, ("model", None, None), axis=(-2, -1))
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.hide = linear(width, 4 * width, (None, "model"))
        self.show = linear(4 * width, width, ("model", None))

    def __call__(self, x):
        qkv = shard(self.attend(self.norm_1(x)), "data", None, None, "model")
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        heads = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = shard(x + self.mix(heads), "data")
        hidden = shard(nnx.gelu(self.hide(self.norm_2(x))), "data", None, "model")
        return shard(x + self.show(hidden), "data")


class Transformer(nnx.Module):
    def __init__(self, width, heads, blocks, rngs):
        self.embed = nnx.Linear(CHARACTERS, width, use_bias=False, rngs=rngs)
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (CONTEXT, width)))
        self.blocks = nnx.List(Block(width, heads, rngs) for _ in range(blocks))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, CHARACTERS, rngs=rngs)

    def __call__(self, text):
        # A matrix product and not a lookup, whose gradient would gather the batch from `data`.
        x = self.embed(jax.nn.one_hot(text, CHARACTERS)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def shard(x, *axes):
    """`x` with its dimensions split over mesh axes, the first over the first one and so on."""
    return lax.with_sharding_constraint(x, P(*axes))


# Training


def make_round(graph, clients):
    """One round of federated training, and the loss of clients that only look on."""

    def mean_loss(params, text):
        text = shard(text, "data")
        logits = nnx.merge(graph, params)(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    def local_update(params, batches):
        """How a client's training changes the parameters, and its loss before."""

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

    jax.config.update("jax_platforms", "cpu")  # without these two lines: eight accelerators
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = fax.sharding.make_mesh(clients=2, data=2, model=2)
    jax.set_mesh(mesh)

    modules = read_modules()
    rng = np.random.default_rng(options.seed)
    names = rng.permutation(list(modules))
    held_out = np.stack([even_windows(modules[name]) for name in names[:HELD_OUT]])
    limit = entropy(held_out[..., 1:])
    held_out = jax.device_put(held_out, NamedSharding(mesh, P("clients", "data")))

    # The parameters are made where they belong, because a mesh is in scope.
    graph, params = nnx.split(Transformer(WIDTH, HEADS, BLOCKS, nnx.Rngs(options.seed)))
    state = SERVER_OPTIMIZER.init(params)
    federated_round, evaluate = make_round(graph, options.clients_per_round)

    losses, held_out_losses, seconds = [], {}, []
    for number in (progress := tqdm(range(1, options.rounds + 1), unit="round")):
        members = rng.choice(names[HELD_OUT:], options.clients_per_round, replace=False)
        cohort = np.stack([random_windows(modules[name], rng) for name in members])
        start = time.perf_counter()
        cohort = jax.device_put(cohort, NamedSharding(mesh, P("clients", None, "data")))
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

"""Federated training of a transformer that is itself sharded over several devices.

Every top-level module of Python's standard library is a client, and the client trains on its
source: the model reads one character after another and predicts the next. The devices form a mesh
with three axes:

    clients   the clients of a round are split over it
    data      every batch of a client is split over it
    model     attention heads and hidden units are split over it

fax uses the axis with the name of the placement and leaves the others to the client function,
which uses them through JAX's shardings. A round sends only one sum of updates along `clients`. The
layers and batches of a client communicate only among its own devices.

    python examples/sharded_transformer.py

makes eight devices out of one CPU. It prints the loss on held-out modules and the entropy of their
characters, which is a lower bound for models that ignore the preceding characters, and draws the
losses to runs/sharded_transformer.png.
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
    """Every module's text as character numbers. A module is a file or a folder of files."""
    number = np.full(256, CHARACTERS - 1, np.uint8)
    number[list(ALPHABET)] = np.arange(len(ALPHABET))
    library, modules = Path(sysconfig.get_paths()["stdlib"]), {}
    for name in sorted(sys.stdlib_module_names):
        files = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
        text = b"".join(file.read_bytes() for file in files if file.is_file())
        if len(text) > 20 * CONTEXT:  # some modules are written in C, with little Python
            modules[name] = number[np.frombuffer(text, np.uint8)]
    return modules


def windows(text, starts):
    """Windows of the length that the model reads, plus the next character, to be predicted."""
    return text[np.expand_dims(starts, -1) + np.arange(CONTEXT + 1)]


def random_windows(text, rng):
    starts = rng.integers(len(text) - CONTEXT, size=(LOCAL_STEPS, BATCH_SIZE))
    return windows(text, starts)


def even_windows(text):
    return windows(text, np.linspace(0, len(text) - CONTEXT - 1, BATCH_SIZE, dtype=int))


def entropy(text):
    """The loss of the best model with constant predictions."""
    shares = np.unique(text, return_counts=True)[1] / text.size
    return -np.sum(shares * np.log(shares))


# The model


class Block(nnx.Module):
    """Causal attention, then a hidden layer.

    A device has half of the heads and of the hidden units. The matrices before them are split by
    columns, so each device computes its own part from the whole of `x`. The matrices after them are
    split by rows, so each device computes one term of a sum. Only this sum over `model` has to be
    sent: twice in the forward pass and twice in the backward pass.
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
        # A matrix product, because the gradient of a lookup would gather the batch over `data`.
        x = self.embed(jax.nn.one_hot(text, CHARACTERS)) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


def shard(x, *axes):
    """Shards the dimensions of `x` over mesh axes, the first over the first axis, and so on."""
    return lax.with_sharding_constraint(x, P(*axes))


# Training


def make_round(graph, clients):
    """Makes a round of federated training, and the evaluation on held-out clients."""

    def mean_loss(params, text):
        text = shard(text, "data")
        logits = nnx.merge(graph, params)(text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

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

    jax.config.update("jax_platforms", "cpu")  # remove these two lines to use eight accelerators
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = fax.sharding.make_mesh(clients=2, data=2, model=2)
    jax.set_mesh(mesh)

    modules = read_modules()
    rng = np.random.default_rng(options.seed)
    names = rng.permutation(list(modules))
    held_out = np.stack([even_windows(modules[name]) for name in names[:HELD_OUT]])
    limit = entropy(held_out[..., 1:])
    held_out = jax.device_put(held_out, NamedSharding(mesh, P("clients", "data")))

    # With a mesh in scope, the parameters are created with their shardings.
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

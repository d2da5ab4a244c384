"""A population of small networks that learn to classify digits and are averaged into one.

Five networks start from different parameters and see the same few images, each in its own order
and with its own shifts and noise. After every ten steps PAPA pushes them toward their average
(Jolicoeur-Martineau et al., arXiv:2304.03094). As in the authors' code, the pushes get weaker with
the learning rate. In the end their average, the soup, is better than networks that are trained
alone. Without the pushes the average is useless.

    python examples/papa_digits.py

prints test accuracies and draws them to runs/papa_digits.png.
"""

import argparse
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

BATCH_SIZE, STEPS = 30, 50  # a round has this number of steps
EVERY, ALPHA = 10, 0.5  # the paper uses 0.99, with many more steps
PEAK = 0.1  # the largest learning rate


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.more = nnx.Linear(64, 64, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.more(nnx.relu(self.hidden(images)))))


def augment(images, key):
    """Shifts each image by up to a pixel in both directions, and adds noise."""
    shift_key, noise_key = jax.random.split(key)
    square = jnp.pad(images.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(shift_key, (len(images), 2), 0, 3)
    shifted = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, at, (8, 8)))(square, corners)
    return shifted.reshape(images.shape) + 0.1 * jax.random.normal(noise_key, images.shape)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--models", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    # Train on the small part and test on the large one, to measure small differences.
    test, (images, labels) = _digits.load(options.seed)
    examples = {"x": images, "y": labels}
    data = fax.data.InMemory({f"model {i}": examples for i in range(options.models)})
    graph, _ = nnx.split(Network(nnx.Rngs(0)))

    def loss(params, batch, key):
        logits = nnx.merge(graph, params)(augment(batch["x"], key))
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])

    @jax.jit
    def accuracy(params):
        images, labels = test
        return jnp.mean(nnx.merge(graph, params)(images).argmax(axis=1) == labels)

    seeds = [options.models * options.seed + i for i in range(options.models)]
    models = [nnx.split(Network(nnx.Rngs(seed)))[1] for seed in seeds]
    start = fax.aggregators.PerClient(jax.tree.map(lambda *x: jnp.stack(x), *models))
    rate = optax.cosine_decay_schedule(PEAK, options.rounds * STEPS)

    def scaled(averages):
        return 1 - (1 - ALPHA) * rate(EVERY * (averages + 1)) / PEAK

    runs = {}
    for name, alpha in (("alone", 1.0), ("PAPA", scaled)):
        algorithm = fax.algorithms.papa(
            loss, optax.sgd(rate, momentum=0.9), replicas=options.models, alpha=alpha, steps=EVERY
        )
        cohorts = fax.data.cohorts(
            data,
            options.models,
            BATCH_SIZE,
            sampler="stream",
            max_steps=STEPS,
            seed=options.seed,
            placement="replicas",
        )
        state, train = algorithm.init(start), jax.jit(algorithm.round)
        history = []
        for _ in (progress := tqdm(range(options.rounds), unit="round", desc=name)):
            state, metrics = train(state, next(cohorts))
            own = jax.vmap(accuracy)(state.replicas.rows.params)
            history.append((float(own.mean()), float(accuracy(algorithm.params(state)))))
            progress.set_postfix(
                loss=f"{float(metrics['loss']):.3f}",
                models=f"{history[-1][0]:.1%}",
                soup=f"{history[-1][1]:.1%}",
                refresh=False,
            )
        cohorts.close()
        runs[name] = np.array(history)

    path = draw(runs)
    (alone, soup_alone), (pushed, soup) = runs["alone"][-1], runs["PAPA"][-1]
    print(
        f"test accuracy: PAPA's soup {soup:.2%}, its models {pushed:.2%}; alone, models "
        f"{alone:.2%}, their soup {soup_alone:.2%}; PAPA's soup gains {100 * (soup - alone):.2f} "
        f"points over models that train alone, see {path}"
    )


def draw(runs):
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, history), color in zip(runs.items(), ("tab:gray", "tab:green"), strict=True):
        rounds = np.arange(1, len(history) + 1)
        axes.plot(rounds, 100 * history[:, 0], color=color, linestyle="--", label=f"{name}, models")
        label = f"{name}, soup (ends at {history[-1, 1]:.0%})"
        axes.plot(rounds, 100 * history[:, 1], color=color, label=label)
    low = 100 * min(history[len(history) // 2 :, 0].min() for history in runs.values())
    axes.set(xlabel="round", ylabel="test accuracy (%)", ylim=(low - 4, 100))
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "papa_digits.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

"""Compares the cross-device algorithms on clients that each have only a few of the ten digits.

Thirty clients share 1,437 images of handwritten digits in Dirichlet proportions with alpha = 0.05:
most images of a digit belong to one or two clients. Five clients take part in a round, with twenty
local steps each. A fifth of every client's images is held out, and so is a central test set of 360
images of all digits.

    python examples/compare_algorithms.py
    python examples/compare_algorithms.py --algorithms fedavg scaffold mime

prints for each algorithm the number of rounds until the server's model reaches 90 % on the central
test, its final accuracy there, and the mean accuracy of the clients on their own held-out images.
For the latter, FedPer, Ditto, APFL and HypCluster use the client's own model, and Reptile and MAML
adapt the server's model with twenty local steps. On the central test, HypCluster uses the mean of
its clusters' models, and FedPer the last layer that it started with. The curves are drawn to
runs/compare_algorithms.png. The settings are reasonable but not tuned: one seed and one data set do
not rank algorithms.
"""

import argparse
from pathlib import Path

import _digits
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

CLIENTS, ALPHA, LEAST = 30, 0.05, 15
CLIENTS_PER_ROUND, BATCH_SIZE, STEPS = 5, 10, 20
RATE, CLUSTERS, EVERY, GOAL = 0.1, 3, 10, 0.9
PERSONAL = ("reptile", "maml", "fedper", "ditto", "apfl", "hyp_cluster")
METRICS = {"accuracy": fax.metrics.Accuracy()}
MODEL = fax.models.create("dense", sizes=(64, 128, 10))


def algorithms():
    loss, sgd, kit = MODEL.loss, optax.sgd(RATE), fax.algorithms
    return {  # functions, so that only the requested algorithms are created
        "fedavg": lambda: kit.fedavg(loss, sgd),
        "fedavgm": lambda: kit.fedopt(loss, sgd, kit.server_momentum(0.2)),
        "fedadagrad": lambda: kit.fedopt(loss, sgd, kit.server_adagrad(0.1)),
        "fedadam": lambda: kit.fedopt(loss, sgd, kit.server_adam(0.01)),
        "fedyogi": lambda: kit.fedopt(loss, sgd, kit.server_yogi(0.01)),
        "fedprox": lambda: kit.fedprox(loss, sgd, mu=0.1),
        # FedNova is FedAvg here, because all clients take the same number of steps.
        "scaffold": lambda: kit.scaffold(loss, RATE, num_clients=CLIENTS),
        "feddyn": lambda: kit.feddyn(loss, sgd, alpha=0.1, num_clients=CLIENTS),
        "mime": lambda: kit.mime(loss, optax.sgd(0.01, momentum=0.9)),
        "mime_lite": lambda: kit.mime_lite(loss, optax.sgd(0.01, momentum=0.9)),
        "qfedavg": lambda: kit.qfedavg(loss, sgd, q=0.2, lipschitz=1 / RATE),
        # The domains are the digits.
        "agnostic_fedavg": lambda: kit.agnostic_fedavg(
            loss, sgd, num_domains=10, domain_learning_rate=0.03, domain="y", window=10
        ),
        "reptile": lambda: kit.reptile(loss, sgd, optax.sgd(0.5)),
        "maml": lambda: kit.maml(loss, sgd, optax.adam(0.003)),
        "fedper": lambda: kit.fedper(loss, sgd, personal="layers/1", num_clients=CLIENTS),
        "ditto": lambda: kit.ditto(loss, sgd, mu=0.5, num_clients=CLIENTS),
        "apfl": lambda: kit.apfl(loss, sgd, num_clients=CLIENTS),
        "hyp_cluster": lambda: kit.hyp_cluster(loss, sgd, num_clusters=CLUSTERS),
    }


def read(seed):
    """Returns the clients' training data, their held-out data, and the central test."""
    train, test = _digits.load(seed)
    arrays = dict(zip("xy", train))
    arrays["query"] = np.arange(len(arrays["y"])) % 2 == 1  # for MAML; the others are support
    data = fax.data.partition.dirichlet(
        arrays, CLIENTS, alpha=ALPHA, label="y", min_examples=LEAST, seed=seed
    )

    def part(which):
        def take(client_id, examples):
            # In random order: the examples that fill a client up to the minimum come last.
            count = len(examples["y"])
            order = np.random.default_rng([seed, int(client_id)]).permutation(count)
            rows = order[count // 5 :] if which == "train" else order[: count // 5]
            return {name: values[rows] for name, values in examples.items()}

        return fax.data.map(data, take, keeps_length=False)

    return part("train"), part("held out"), fax.data.InMemory({"test": dict(zip("xy", test))})


def cohorts_of(data, clients, seed):
    # Enough epochs for the smallest client, so that all clients take the same number of steps.
    return fax.data.cohorts(data, clients, BATCH_SIZE, epochs=STEPS, max_steps=STEPS, seed=seed)


@jax.jit
def adapted(params, cohort):
    return fax.algorithms.personalize(MODEL.loss, optax.sgd(RATE))(params, cohort)


def own_accuracy(name, algorithm, state, everyone, held_out):
    """The clients' mean accuracy, with their own models if the algorithm has them."""
    in_order = jnp.argsort(everyone.positions)
    params = (algorithm.models or algorithm.params)(state)
    if name in ("reptile", "maml"):
        params = jax.tree.map(lambda x: x[in_order], adapted(params, everyone))
    elif name == "hyp_cluster":
        chosen = fax.algorithms.hyp_cluster_choice(MODEL.loss, params, everyone)
        params = jax.tree.map(lambda x: x[chosen[in_order]], params)
    found = fax.metrics.evaluate_clients(
        MODEL.apply, params, held_out, METRICS, personal=name in PERSONAL
    )
    return found["accuracy"].mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--algorithms", nargs="+", choices=algorithms(), default=[*algorithms()])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    data, held_out, central = read(options.seed)
    central = fax.metrics.prepare(central)
    everyone = next(cohorts_of(data, CLIENTS, options.seed))
    start = MODEL.init(jax.random.key(options.seed))
    curves, own = {}, {}
    with tqdm(total=options.rounds * len(options.algorithms), unit="round") as progress:
        for name in options.algorithms:
            algorithm, params = algorithms()[name](), start
            if name == "hyp_cluster":
                params, _ = fax.algorithms.hyp_cluster_start(
                    MODEL.loss,
                    optax.sgd(RATE),
                    start,
                    everyone,
                    jax.random.key(options.seed),
                    num_clusters=CLUSTERS,
                )
            state, curves[name] = algorithm.init(params), {}
            cohorts = cohorts_of(data, CLIENTS_PER_ROUND, options.seed)
            while (done := cohorts.round) < options.rounds:
                several = min(EVERY, options.rounds - done)
                state, _ = fax.algorithms.many_rounds(algorithm, state, cohorts, several)
                params = algorithm.params(state)
                result = fax.metrics.evaluate(MODEL.apply, params, central, METRICS)
                curves[name][cohorts.round] = float(result["accuracy"])
                progress.update(several)
            own[name] = own_accuracy(name, algorithm, state, everyone, held_out)
            progress.set_postfix_str(f"{name} {own[name]:.1%}", refresh=False)
    report(curves, own)
    scores = {name: curve[options.rounds] for name, curve in curves.items()}
    path = draw(curves, own)
    best = max(scores, key=scores.__getitem__)
    print(f"best on the central test: {best} with {scores[best]:.1%};", end=" ")
    best = max(own, key=own.__getitem__)
    print(f"best on clients' own images: {best} with {own[best]:.1%}, see {path}")


def report(curves, own):
    print(f"{'':16}{'rounds to 90 %':>15}{'central test':>15}{'own images':>13}")
    for name, curve in curves.items():
        first = next((f"{r}" for r, found in curve.items() if found >= GOAL), "-")
        last = f"{[*curve.values()][-1]:.1%}"
        print(
            f"{name:16}{first:>15}{last:>15}{own[name]:>13.1%}{'  *' if name in PERSONAL else ''}"
        )
    print("* own images: the client's own model, or adapted to it; the others have one for all")


def draw(curves, own):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colors = dict(zip(own, colormaps["tab20"].colors))
    for name, curve in curves.items():
        accuracies = 100 * np.array([*curve.values()])
        left.plot(list(curve), accuracies, color=colors[name], label=name, linewidth=1.2)
    left.axhline(100 * GOAL, color="gray", linestyle=":", linewidth=1)
    left.set(xlabel="round", ylabel="accuracy on the central test (%)")
    left.legend(frameon=False, fontsize="small", ncols=2, loc="lower right")
    names = [f"{name} *" if name in PERSONAL else name for name in own]
    heights = 100 * np.array([*own.values()])
    right.barh(names, heights, color=[colors[name] for name in own])
    right.bar_label(right.containers[0], fmt="%.1f", padding=3, fontsize="small")
    right.invert_yaxis()
    right.set(xlabel="mean accuracy on own images (%)\n* with a model of the client's own")
    right.set_xlim(heights.min() - 5, 101)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "compare_algorithms.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

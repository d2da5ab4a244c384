"""MAML: initial parameters that one step on a few examples adapts to a client.

Every client has its own task: to distinguish two digits, which it labels 0 and 1 in its own order.
No single model can do this for all clients. Per-FedAvg (Fallah et al., arXiv:2002.07948) is MAML
(Finn et al., arXiv:1703.03400) over clients: it differentiates through the local step, and finds
parameters that are good after it. They are compared with those of federated averaging on new
clients, whose pairs of digits and whose images were not used in training.

    python examples/maml_digits.py

prints the mean accuracy on the queries of the new clients after one step on their ten examples.
MAML uses the step size that it was trained with, and federated averaging the best of several. The
results are drawn to runs/maml_digits.png.
"""

import argparse
import itertools
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from tqdm import tqdm

import fax

CLIENTS, NEW_CLIENTS, PAIRS = 450, 60, 30  # of 45 pairs of digits; the others are for new clients
SUPPORT, QUERIES = 5, 10  # images of each of a client's two digits
CLIENTS_PER_ROUND, EVERY = 20, 20
RATE = 0.5
RATES = (0.05, 0.1, 0.2, RATE, 1.0, 2.0)


def tasks(count, pairs, images, labels, rng):
    """Makes clients with two digits each, and a feature that marks which examples are queries."""
    clients = {}
    for number in range(count):
        pair = rng.permutation(pairs[number % len(pairs)])
        rows = np.concatenate(
            [rng.choice(np.flatnonzero(labels == k), SUPPORT + QUERIES, False) for k in pair]
        )
        clients[f"{number:03d}"] = {
            "x": images[rows],
            "y": np.repeat(np.arange(2), SUPPORT + QUERIES),
            "query": np.tile(np.arange(SUPPORT + QUERIES) >= SUPPORT, 2),
        }
    return fax.data.InMemory(clients)


def queries_only(client_id, examples):
    return {name: values[examples["query"]] for name, values in examples.items()}


class NewClients:
    """Evaluates parameters on clients that were not in training, after a step on their data."""

    def __init__(self, model, data):
        self.model = model
        self.queries = fax.data.map(data, queries_only, keeps_length=False)
        everyone = next(fax.data.cohorts(data, len(data), 2 * (SUPPORT + QUERIES)))
        in_order = jnp.argsort(everyone.positions)

        @jax.jit
        def adapted(params):
            def one(rate):
                adapt = fax.algorithms.personalize(model.loss, optax.sgd(rate), query="query")
                return jax.tree.map(lambda x: x[in_order], adapt(params, everyone))

            return jax.vmap(one)(jnp.array([0.0, *RATES]))

        self.adapted = adapted

    def accuracies(self, params):
        """Mean accuracies of the clients: without a step, and after one step with each rate."""
        adapted = self.adapted(params)
        of_rates = [jax.tree.map(operator.itemgetter(r), adapted) for r in range(1 + len(RATES))]
        metrics = {"accuracy": fax.metrics.Accuracy()}
        results = [
            fax.metrics.evaluate_clients(self.model.apply, p, self.queries, metrics, personal=True)
            for p in of_rates
        ]
        return np.array([result["accuracy"].mean() for result in results])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    rng = np.random.default_rng(options.seed)
    pairs = rng.permutation(list(itertools.combinations(range(10), 2)))
    seen, unseen = np.split(rng.permutation(len(labels)), [1200])
    data = tasks(CLIENTS, pairs[:PAIRS], images[seen], labels[seen], rng)
    new = tasks(NEW_CLIENTS, pairs[PAIRS:], images[unseen], labels[unseen], rng)

    model = fax.models.create("dense", sizes=(64, 64, 2))
    start = model.init(jax.random.key(options.seed))
    new_clients = NewClients(model, new)
    adam = optax.adam(optax.cosine_decay_schedule(0.01, options.rounds))
    algorithms = {
        "FedAvg": (fax.algorithms.fedavg(model.loss, optax.sgd(0.1)), {"epochs": 5}),
        "MAML": (fax.algorithms.maml(model.loss, optax.sgd(RATE), adam), {}),
    }
    untrained = new_clients.accuracies(start)
    results = {}
    with tqdm(total=options.rounds * len(algorithms), unit="round") as progress:
        for name, (algorithm, epochs) in algorithms.items():
            # A batch holds all examples of a client, so an epoch is a single step.
            cohorts = fax.data.cohorts(
                data, CLIENTS_PER_ROUND, 2 * (SUPPORT + QUERIES), seed=options.seed, **epochs
            )
            state, results[name] = algorithm.init(start), {0: untrained}
            while (done := cohorts.round) < options.rounds:
                several = min(EVERY, options.rounds - done)
                state, _ = fax.algorithms.many_rounds(algorithm, state, cohorts, several)
                found = new_clients.accuracies(algorithm.params(state))
                results[name][cohorts.round] = found
                progress.update(several)
                progress.set_postfix_str(f"{name} {found[1:].max():.1%}", refresh=False)

    fedavg, maml = (results[name][options.rounds][1:] for name in algorithms)
    path = draw(results)
    print(
        f"accuracy of {NEW_CLIENTS} new clients after one step on {2 * SUPPORT} examples: "
        f"MAML {maml[RATES.index(RATE)]:.1%}, FedAvg {fedavg.max():.1%} with the best rate, "
        f"{RATES[fedavg.argmax()]:g}, untrained {untrained[1:].max():.1%}, see {path}"
    )


def draw(results):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2)
    for (name, of_rounds), color in zip(results.items(), ("tab:blue", "tab:orange")):
        found = 100 * np.stack(list(of_rounds.values()))
        chosen = found[:, 1 + RATES.index(RATE)] if name == "MAML" else found[:, 1:].max(axis=1)
        left.plot(list(of_rounds), chosen, color=color, label=f"{name}, one step")
        left.plot(list(of_rounds), found[:, 0], ":", color=color, label=f"{name}, no step")
        right.plot(RATES, found[-1, 1:], marker=".", color=color, label=name)
    right.plot(RATES, found[0, 1:], marker=".", color="gray", label="untrained")
    left.set(xlabel="round", ylabel="accuracy of new clients (%)")
    right.set(xlabel="rate of the step", xscale="log")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "maml_digits.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

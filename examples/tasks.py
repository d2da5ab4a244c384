"""A benchmark task, trained by federated averaging with the settings that come with it.

    python examples/tasks.py --task digits
    python examples/tasks.py --task pystdlib

need no network. The others download TensorFlow Federated's files. `--algorithm fedopt` uses the
task's server optimizer (Reddi et al., arXiv:2003.00295), `fedavg` the plain mean (McMahan et al.,
arXiv:1602.05629). The example prints the results on the test data, and draws them to
runs/tasks_<task>.png. The task pystdlib predicts the next character of Python's standard library;
for comparison, a trigram model with back-off is fitted to the same training data, and evaluated on
the same test data.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from _trigram import Trigram
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

TASKS = ("digits", "pystdlib", "emnist", "shakespeare", "stackoverflow", "cifar100")
EVALUATIONS = 20
MOST_CLIENTS = 3_400  # for evaluation


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--algorithm", choices=("fedopt", "fedavg"), default="fedopt")
    parser.add_argument("--rounds", type=int, help="default: those of the task")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    mesh = fax.sharding.use_cpu_devices()
    if jax.default_backend() == "cpu":
        jax.set_mesh(mesh)

    task = fax.tasks.load(options.task)
    settings, model, test = task.settings, task.model, task.test
    if len(test) > MOST_CLIENTS:
        _, test = fax.data.split(test, MOST_CLIENTS, seed=options.seed)
    rounds = options.rounds or settings.rounds
    cohorts = fax.data.cohorts(
        task.train,
        settings.clients,
        settings.batch_size,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=options.seed,
    )
    server_optimizer = settings.server_optimizer if options.algorithm == "fedopt" else None
    algorithm = fax.algorithms.fedavg(model.loss, settings.client_optimizer, server_optimizer)
    train = jax.jit(algorithm.round)
    state = jax.jit(algorithm.init)(model.init(jax.random.key(options.seed)))

    start, losses, results = time.perf_counter(), [], {}
    for number in (progress := tqdm(range(1, rounds + 1), unit="round")):
        state, metrics = train(state, next(cohorts))
        losses.append(float(metrics["loss"]))
        if number == rounds or number % -(-rounds // EVALUATIONS) == 0:
            results[number] = fax.metrics.evaluate(
                model.apply, algorithm.params(state), test, task.metrics
            )
        shown = results.get(max(results, default=0), {"loss": np.nan, "accuracy": np.nan})
        progress.set_postfix(
            train=f"{losses[-1]:.3f}",
            test=f"{shown['loss']:.3f}",
            accuracy=f"{shown['accuracy']:.1%}",
            refresh=False,
        )
    minutes, last = (time.perf_counter() - start) / 60, results[rounds]
    cohorts.close()

    baseline, comparison = None, ""
    if options.task == "pystdlib":
        # The number of tokens is the size of the model's scores.
        tokens = model.apply(algorithm.params(state), {"x": np.zeros((1, 1), int)}).shape[-1]
        baseline = Trigram(task.train, tokens).loss(test)
        comparison = f" (trigram model {baseline:.3f})"
    path = draw(options.task, losses, results, baseline)
    print(
        f"{options.task}, {options.algorithm}, {rounds} rounds in {minutes:.1f} minutes: test "
        f"accuracy {last['accuracy']:.1%}, loss {last['loss']:.3f}{comparison}, see {path}"
    )


def draw(name, losses, results, baseline):
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.get_layout_engine().set(wspace=0.08)
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, len(losses) + 1), losses, linewidth=0.7, label="training, before a step")
    left.plot(list(results), [r["loss"] for r in results.values()], marker=".", label="test")
    if baseline is not None:
        left.axhline(baseline, color="gray", linestyle="--", label="trigram model, test")
    left.set(xlabel="round", ylabel="loss", title=name)
    left.legend()
    accuracy = [100 * r["accuracy"] for r in results.values()]
    right.plot(list(results), accuracy, marker=".", color="tab:green")
    right.set(xlabel="round", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", f"tasks_{name}.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

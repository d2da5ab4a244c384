"""Streaming DiLoCo on learners that come and go, one of which is killed every 20 seconds.

Four learners, each a process with two devices of its own, read the source of Python's standard
library, each a fourth of its modules, and predict the next character. A learner splits attention
heads and hidden units over its devices. A server merges a third of the layers at a time, as soon as
two learners have sent their updates and the others had half a second to follow (see
`fax.deploy.Elastic`). First all learners train undisturbed, and then from the same start again, but
every 20 seconds one of them is killed and started again. It rejoins from the outer parameters.

    python examples/elastic_diloco.py

prints the loss on held-out text after the same number of merges, and the goodput: the share of the
learners' time, after the first period, that they spent on steps that a merge has counted.
What is missing is the time in which they wait, send, start again, or take steps that are lost with
them. It draws both to runs/elastic_diloco.png.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from _transformer import load, make_model
from matplotlib.figure import Figure
from tqdm import tqdm

import fax

BATCH_SIZE = 8
FRAGMENTS = 3  # that of each block, and that of all else
OPTIONS = "ELASTIC_DILOCO"  # the environment variable that tells learners the options


def inner_optimizer(steps):
    rate = optax.warmup_cosine_decay_schedule(0.0, 6e-3, min(100, steps // 4), steps)
    return optax.adamw(rate, b2=0.99, weight_decay=0.1)


def model_of(options):
    """Returns the task, the model, how it is sharded, and the shapes of its parameters."""
    task, characters = load(options.length)
    model, sharding = make_model(characters, options.length, options.width, options.blocks)
    return task, model, sharding, jax.eval_shape(model.init, jax.random.key(0))


def learner(number):
    """What each process of a learner runs."""
    options = argparse.Namespace(**json.loads(os.environ[OPTIONS]))
    jax.config.update("jax_compilation_cache_dir", options.cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    fax.sharding.use_cpu_devices(2)  # remove this line to use accelerators
    jax.set_mesh(fax.sharding.make_mesh(data=1, model=2))
    task, model, sharding, shapes = model_of(options)
    modules = [task.train.client(name) for name in task.train.client_ids()]
    modules.sort(key=lambda module: -len(module["x"]))
    own = modules[number :: options.learners]
    shard = {name: np.concatenate([module[name] for module in own]) for name in "xy"}

    def batches(step):
        return fax.data.cohorts(
            fax.data.InMemory({"own": shard}),
            1,
            BATCH_SIZE,
            sampler="stream",
            max_steps=options.inner_steps,
            placement="replicas",
            start=step // options.inner_steps,
        )

    optimizer = inner_optimizer(options.periods * options.inner_steps)
    return fax.deploy.Learner(
        model.loss, optimizer, batches, shapes, sharding=sharding, tokens=options.length
    )


class Run(NamedTuple):
    """What happened in a run.

    Attributes:
      curve: held-out losses, by the number of periods.
      merges: the merges, each with when it took place, in seconds after the first.
      kills: who was killed, and when.
    """

    curve: list[tuple[float, float]]
    merges: list[tuple[float, fax.deploy.Merge]]
    kills: list[tuple[float, int]]

    def goodput(self, learners, end=np.inf):
        """The share of the learners' time that they spent on steps that merges have counted.

        From the end of the first period to some time. Each step counts once for each fragment.
        """
        (begin, _), *later = self.merges[FRAGMENTS - 1 :]
        counted = [(at, merge.seconds) for at, merge in later if at <= end]
        return sum(own for _, own in counted) / FRAGMENTS / learners / (counted[-1][0] - begin)


def train(learners, options, params, evaluate, kill_every=None):
    """Trains from the start, and then evaluates. If asked to, kills one learner after another."""
    server = fax.deploy.Elastic(
        params,
        optax.sgd(0.4, momentum=0.9, nesterov=True),
        steps=options.inner_steps,
        fragments=FRAGMENTS,
        tau=1,
        alpha=0.5,
        quorum=max(1, options.learners // 2),
    )
    total = options.periods * FRAGMENTS
    run, found, start, victim = Run([], [], []), [], None, 0
    every = max(1, options.periods // 10) * FRAGMENTS
    with tqdm(total=total, unit="merge") as progress:
        progress.set_description("undisturbed" if kill_every is None else "disturbed")
        for merge in learners.train(server):
            start = time.monotonic() if start is None else start
            now = time.monotonic() - start
            run.merges.append((now, merge))
            progress.update()
            done = merge.number + 1
            if done % every == 0 or done == total:
                found.append((done // FRAGMENTS, server.params))
            if done == total:
                break
            if kill_every is not None and now >= kill_every * (len(run.kills) + 1):
                learners.kill(victim)
                learners.start(victim)
                run.kills.append((now, victim))
                victim = (victim + 1) % options.learners
    run.curve.extend((period, evaluate(params)) for period, params in found)
    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--learners", type=int, default=4)
    help = "outer steps on each fragment, at least 2"
    parser.add_argument("--periods", type=int, default=100, help=help)
    parser.add_argument("--inner-steps", type=int, default=50, help="H, the steps of a period")
    parser.add_argument("--kill-every", type=float, default=20.0, help="in seconds")
    parser.add_argument("--length", type=int, default=64, help="of a sequence")
    parser.add_argument("--width", type=int, default=32, help="of the transformer")
    parser.add_argument("--blocks", type=int, default=2, help="of the transformer")
    options = parser.parse_args()

    # The server evaluates the model. It has the same axes, on one device.
    jax.set_mesh(fax.sharding.make_mesh(devices=jax.devices()[:1], data=1, model=1))
    task, model, _, _ = model_of(options)
    params = model.init(jax.random.key(0))
    held_out = fax.metrics.prepare(task.test)
    metrics = {"loss": task.metrics["loss"]}

    def evaluate(params):
        return float(fax.metrics.evaluate(model.apply, params, held_out, metrics)["loss"])

    print(f"held-out loss {evaluate(params):.4f} at the start")
    make = f"{Path(__file__).resolve()}:learner"
    with tempfile.TemporaryDirectory() as cache:
        # Learners that start again do not compile again.
        os.environ[OPTIONS] = json.dumps({**vars(options), "cache": cache})
        with fax.deploy.Learners(options.learners, make, grace=0.5) as learners:
            calm = train(learners, options, params, evaluate)
            wild = train(learners, options, params, evaluate, options.kill_every)
    show(options, calm, wild)
    print(f"see {draw(options, calm, wild)}")


def show(options, calm, wild):
    for name, run in ("undisturbed", calm), ("disturbed", wild):
        seconds, _ = run.merges[-1]
        tokens = sum(sum(merge.tokens.values()) for _, merge in run.merges) / FRAGMENTS
        print(
            f"{name}: held-out loss {run.curve[-1][1]:.4f}, {len(run.merges)} merges in "
            f"{seconds:.1f} s, {tokens:,.0f} characters counted, {len(run.kills)} kills, "
            f"goodput {run.goodput(options.learners):.1%}"
        )
    gap = wild.curve[-1][1] / calm.curve[-1][1] - 1
    print(f"The disturbed run's loss differs by {gap:+.2%}.")


def draw(options, calm, wild):
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for name, run in ("undisturbed", calm), ("disturbed", wild):
        left.plot(*zip(*run.curve), marker=".", label=name)
        times = [at for at, _ in run.merges[2 * FRAGMENTS - 1 :]]
        middle.plot(times, [100 * run.goodput(options.learners, at) for at in times])
    for number in range(options.learners):
        times = [at for at, merge in wild.merges if number in merge.tokens]
        right.plot(times, [number] * len(times), "|", color="tab:orange")
    for at, number in wild.kills:
        right.plot(at, number, "x", color="black", label="killed" if at == wild.kills[0][0] else "")
    left.set(xlabel="outer steps on each fragment", ylabel="held-out loss (nats per character)")
    middle.set(xlabel="seconds", ylabel="goodput so far (%)", ylim=(0, 105))
    right.set(xlabel="seconds", ylabel="learner", yticks=range(options.learners))
    right.set_title("merges that counted a learner's update", fontsize="medium")
    left.legend(frameon=False)
    if wild.kills:
        right.legend(frameon=False)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "elastic_diloco.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

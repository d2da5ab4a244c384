"""What a round of a plan costs on processes, besides what its clients compute: digits.

The three clients of `examples/hand_over.py` are in one process, or in one each, and their data stay
there. A round of federated averaging is run by the plan, and jitted in this process, in turns. The
stages of the clients are also called in this process, as the processes call them; that is what the
clients compute. A process works on its clients one after another. Processor time is that of all
processes and threads. On a busy machine, the shortest of several tries says the most.

    python benchmarks/hand_over.py --tries 20 --rounds 20
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import fax

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import _own_digits  # noqa: E402
from hand_over import loss  # noqa: E402

CLIENTS = tuple(range(3))


def make_cohort():
    own = [_own_digits.load(number)[f"client {number}"] for number in CLIENTS]
    rows = {name: np.stack([x[name] for x in own]) for name in own[0]}
    return fax.data.Cohort(
        {"x": rows["x"], "y": rows["y"]},
        rows["mask"],
        rows["num_examples"],
        positions=np.arange(len(CLIENTS), dtype=np.int32),
        keys=jax.random.split(jax.random.key(0), len(CLIENTS)),
    )


def processor_time(pid):
    """The seconds that the threads of a process have worked, to the nanosecond."""
    tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


class Recorded(fax.deploy.InProcess):
    """Runs stages, and keeps what the processes of clients would call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def run(self, stage, clients, operands):
        call = jax.jit(jax.export.deserialize(bytearray(stage.exported(["cpu"]))).call)
        for number, _ in enumerate(clients):
            rows = [x[number] if m == "placed" else x for x, m in zip(operands, stage.inputs)]
            self.calls.append((call, [self._value(x) for x in rows]))
        return super().run(stage, clients, operands)


def measure(processes, tries, rounds):
    """Milliseconds a round, by the clock and of processor time: the medians of each try."""
    params = {
        "in": jax.random.normal(jax.random.key(1), (64, 32)) / 8,
        "out": jnp.zeros((32, 10)),
    }
    algorithm = fax.algorithms.fedavg(loss, optax.sgd(0.05))
    state = algorithm.init(params)
    cohort = make_cohort()
    step = jax.jit(algorithm.round)
    plan = fax.deploy.cut(algorithm.round, state, cohort)
    recorded = Recorded()
    plan.run(recorded, state, cohort)
    placed = jax.device_put(cohort)
    with fax.deploy.Processes(processes) as backend:

        def hold(x):
            """The clients' rows, as if they had loaded them."""
            return fax.deploy.Held(tuple(backend.put(CLIENTS, x)), CLIENTS, x.shape, x.dtype)

        held = dataclasses.replace(
            cohort,
            batches=jax.tree.map(hold, cohort.batches),
            mask=hold(cohort.mask),
            num_examples=hold(cohort.num_examples),
        )
        pids = [link.process.pid for link in backend._links]
        ways = {
            "jit": lambda: jax.block_until_ready(step(state, placed)[0]),
            "clients": lambda: [[np.asarray(x) for x in f(*own)] for f, own in recorded.calls],
            "plan": lambda: jax.block_until_ready(plan.run(backend, state, held)[0]),
        }
        found = []
        for _ in range(1 + tries):
            times = {name: ([], []) for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    others = sum(map(processor_time, pids))
                    began, worked = time.perf_counter(), time.process_time()
                    way()
                    seconds, busy = time.perf_counter() - began, time.process_time() - worked
                    busy += sum(map(processor_time, pids)) - others
                    times[name][0].append(1e3 * seconds)
                    times[name][1].append(1e3 * busy)
            found.append({name: [*map(statistics.median, own)] for name, own in times.items()})
        return found[1:]  # the first try compiles


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    for processes in 1, len(CLIENTS):
        tries = measure(processes, options.tries, options.rounds)
        for which, what in enumerate(("by the clock", "of processor time")):
            own = {name: min(found[name][which] for found in tries) for name in tries[0]}
            beyond = min(f["plan"][which] - f["clients"][which] for f in tries)
            print(
                f"{processes} processes, {what}: the plan {own['plan']:.2f} ms a round, its "
                f"clients alone {own['clients']:.2f}, jit {own['jit']:.2f}; beyond the clients "
                f"{beyond:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""Compares the time of rounds with that at another commit.

    python benchmarks/commits.py COMMIT [--only "W1, nnx" algorithms] [--pairs 3]

Runs fax's part of `simulation.py`, and the algorithms and aggregators of `algorithms.py`, each from
its own checkout: a process of this one and a process of the other. The two take turns, round by
round, and only one of them works at a time. Times are CPU seconds of all threads, because other
programs that slow a machine down change them much less. A ratio is the median over the turns of a
pair of processes; the table has the median and the range over pairs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKS = ("W1, nnx", "W1, matmul", "W2, matmul", "W3, matmul", "algorithms")
MOST = 1.03  # times the CPU seconds of the other commit

Reply = Callable[[str | None, float], None]  # what was measured, and its seconds
Times = dict[str, list[float]]


# A process


def work(name: str) -> None:
    """Runs the rounds of ``name``, one for each line of input, and reports them on stdout."""
    # The checkout comes from PYTHONPATH.
    import fax

    assert pathlib.Path(fax.__file__).parent.parent == pathlib.Path.cwd()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the benchmarks print

    def reply(measured: str | None, seconds: float) -> None:
        print(json.dumps([measured, seconds]), file=output, flush=True)
        sys.stdin.readline()

    sys.stdin.readline()
    if name == "algorithms":
        _algorithms(reply)
    else:
        _simulation(name, reply)
    os._exit(0)


def _simulation(name: str, reply: Reply) -> None:
    from peers import fax_peer, harness

    def run(self: Any, one_round: Callable[[int], None], params: Any) -> None:
        last = time.process_time()
        for number in range(self.chosen.total):
            one_round(number)
            # Cohorts are prepared between rounds.
            now = time.process_time()
            reply(name if number >= self.chosen.warm_up else None, now - last)
            last = now
        os._exit(0)

    # The other commit's benchmarks are as they were then, so this cannot be an argument of theirs.
    harness.Report.run = run  # type: ignore[method-assign]
    workload, variant = name.split(", ")
    sys.argv[1:] = ["--workload", workload, "--variant", variant]
    fax_peer.main()


def _algorithms(reply: Reply) -> None:
    import algorithms
    import jax

    names = iter([*algorithms.ALGORITHMS, *(f"fedavg, {name}" for name in algorithms.AGGREGATORS)])

    def versus(one: Callable[[], Any], *_: Any) -> tuple[float, float]:
        name = next(names)
        for _ in range(algorithms.TURNS):
            start = time.process_time()
            for _ in range(algorithms.REPEATS):
                jax.block_until_ready(one())
            reply(name, (time.process_time() - start) / algorithms.REPEATS)
        return 1.0, 1.0

    algorithms.versus = versus
    algorithms.overhead()


# Both


class Side:
    """A process of a checkout, and what it has measured."""

    def __init__(self, checkout: pathlib.Path, name: str):
        paths = checkout, checkout / "benchmarks"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "JAX_PLATFORMS": "cpu",
        }
        self.times: Times = {}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", name],  # -P: benchmarks from PYTHONPATH
            cwd=checkout,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def turn(self) -> bool:
        """One more round. Returns whether there was one."""
        assert self._process.stdin
        assert self._process.stdout
        print(file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            if self._process.wait():
                sys.exit(f"{self._process.args} failed with status {self._process.returncode}")
            return False
        name, seconds = json.loads(line)
        if name is not None:
            self.times.setdefault(name, []).append(seconds)
        return True


def pair(name: str, checkouts: Sequence[pathlib.Path]) -> list[Times]:
    """What both checkouts measure."""
    sides = [Side(checkout, name) for checkout in checkouts]
    number = 0
    while list(map(Side.turn, sides[:: -1 if number % 2 else 1])) == [True, True]:
        number += 1
    return [side.times for side in sides]


def compare(pairs: Sequence[Sequence[Times]]) -> list[dict[str, Any]]:
    """A row for each measured name, from pairs of times of this checkout and of the other one."""
    rows = []
    for name in pairs[0][0]:
        both = [(now[name], other[name]) for now, other in pairs if name in other]
        if not both:
            continue
        ratios = [statistics.median(a / b for a, b in zip(*times, strict=True)) for times in both]
        now, other = (
            1e3 * statistics.median(seconds for times in both for seconds in times[side])
            for side in (0, 1)
        )
        ratio = statistics.median(ratios)
        row = {"": name, "ms": now, "before": other, "ratio": f"{ratio:.3f}"}
        row["pairs"] = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(row | {"target": f"at most {MOST}: {'met' if ratio <= MOST else 'missed'}"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commit", nargs="?", help="what to compare with")
    parser.add_argument("--only", choices=WORKS, nargs="+", default=WORKS)
    parser.add_argument("--pairs", type=int, default=3, help="how many pairs of processes")
    parser.add_argument("--work", choices=WORKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
    if not options.commit:
        parser.error("which commit?")
    from tables import show

    git = ["git", "-C", str(ROOT), "archive", options.commit]
    archive = subprocess.run(git, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        other = pathlib.Path(folder).resolve()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(other, filter="data")
        for name in options.only:
            pairs: list[list[Times]] = []
            for number in range(1, options.pairs + 1):
                pairs.append(pair(name, (ROOT, other)))
                rows = compare(pairs)
                title = f"{name}: CPU ms a round, by pairs of processes: {number}"
                show(dict(title=title, columns=list(rows[0]), rows=rows))
                sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The simulation benchmark: fax against its peers and against JAX written by hand.

    python benchmarks/simulation.py [--only W1|W2|W3] [--peers fax,fedjax] [--repeats 2]

Every peer has its own environment under `.venv-bench`, created in the first run. A repeat runs all
of them, one process after another, so that a temporarily slow machine slows all of them. Processes
report their cohorts, steps and losses, which must agree. A ratio compares two medians over rounds
in the same repeat; its median over repeats is compared with the target. This file imports only the
standard library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from environments import ENVIRONMENTS, ROOT, MissingError
from tables import Table, show, verdict

Line = dict[str, Any]  # the report of a process, with "row" and "repeat"; or an "error"

CORES = 2  # for each peer
LIMIT = 400  # seconds for a process
WORKLOADS = {
    "W1": "convolutional network of EMNIST, 10 clients a round",
    "W2": "logistic regression, 100 clients a round",
    "W3": "dense network 784-200-200-62, 50 clients a round",
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to run the workloads. Rows of the same peer are its variants."""

    peer: str
    module: str
    variant: str
    environment: str
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    same_algorithm: bool = True  # except for the order of examples and dropout

    @property
    def name(self) -> str:
        return f"{self.peer}, {self.variant}"


FAX = "fax"
ROWS = (
    Row(FAX, "fax_peer", "matmul", "fax"),
    Row(FAX, "fax_peer", "nnx", "fax", ("W1",)),
    Row("FedJAX", "fedjax_peer", "jit", "fedjax"),
    Row("FedJAX", "fedjax_peer", "pmap", "fedjax"),
    Row("DrJAX", "drjax_peer", "matmul", "drjax"),
    Row("pfl", "pfl_peer", "torch", "pfl"),
    Row("Flower", "flower_peer", "ray", "flower", same_algorithm=False),
    Row("by hand", "by_hand", "cond-2", "fax"),
    Row("by hand", "by_hand", "gather-2", "fax", ("W2", "W3")),
    Row("by hand", "by_hand", "threads-2", "fax"),
    Row("by hand", "by_hand", "gather-1", "fax", ("W1",)),
    Row("by hand", "by_hand", "pre-1", "fax", ("W1",)),
)
# How many times slower than fax the best variant of a peer has to be.
TARGETS = {
    "W1": {"FedJAX": 1.4, "DrJAX": 2.5, "pfl": 1.3, "Flower": 1.3},
    "W2": {"FedJAX": 1.8, "DrJAX": 9, "pfl": 5, "Flower": 12},
    "W3": {"FedJAX": 1.7, "DrJAX": 6, "pfl": 4, "Flower": 8},
}
BY_HAND = 1.10  # the largest ratio of fax's time to that of handwritten programs
STOCK = 1.05  # the largest ratio of the time of stock convolutions to that of matrix products
# The largest relative difference of losses after six rounds, for peers that run the same algorithm.
# The order of examples changes losses by less than half a percent. Dropout on W1, which draws
# different numbers in each program, changes them by 20 %, also between runs of the same program.
TOLERANCE = {"W1": 0.3, "W2": 0.01, "W3": 0.01}


# Running


def measure(rows: Sequence[Row], workloads: Sequence[str], repeats: int, rounds: int) -> list[Line]:
    """Runs all rows, in reversed order every other time. Failures are reported as errors."""
    executables: dict[str, Any] = {}
    for name in dict.fromkeys(row.environment for row in rows):
        try:
            executables[name] = ENVIRONMENTS[name].executable
        except MissingError as error:
            executables[name] = error
            print(f"{name} is missing: {error}", flush=True)
    lines = []
    for repeat in range(repeats):
        for workload in workloads:
            for row in rows[:: -1 if repeat % 2 else 1]:
                if workload not in row.workloads:
                    continue
                start = time.perf_counter()
                executable = executables[row.environment]
                if isinstance(executable, MissingError):
                    line: Line = {"error": f"missing: {executable}"}
                else:
                    line = process(executable, row, workload, rounds)
                lines.append(line | {"row": row.name, "workload": workload, "repeat": repeat})
                said = line.get("error") or f"{statistics.median(line['seconds']):.4f} s a round"
                took = time.perf_counter() - start
                print(f"{repeat} {workload} {row.name}: {said} ({took:.0f} s)", flush=True)
    return lines


def process(executable: pathlib.Path, row: Row, workload: str, rounds: int) -> Line:
    """Runs a peer and reads the last line that it prints."""
    command = [str(executable), "-m", f"peers.{row.module}", "--workload", workload]
    command += ["--variant", row.variant, "--rounds", str(rounds)]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "benchmarks"),
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("XLA_FLAGS", None)
    child = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = child.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {LIMIT} s"}
    finally:
        if child.poll() is None:  # together with the processes that it has started
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    if child.returncode:
        said = err.strip().splitlines() or [f"exit status {child.returncode}"]
        return {"error": f"failed: {said[-1]}", "stderr": err[-5000:]}
    return json.loads(out.strip().splitlines()[-1])


# Checking


def disagreements(lines: Iterable[Line], rows: Sequence[Row] = ROWS) -> list[str]:
    """Describes where processes differ in cohorts, steps, or losses of the same algorithm."""
    found = []
    by_name = {row.name: row for row in rows}
    done = [line for line in lines if "error" not in line]
    for workload in dict.fromkeys(line["workload"] for line in done):
        own = [line for line in done if line["workload"] == workload]
        first, *others = own
        for line in others:
            where = f"{workload}, repeat {line['repeat']}: {line['row']} and {first['row']}"
            for quantity in ("cohorts", "steps"):
                if line[quantity] != first[quantity]:
                    found.append(f"{where} differ in {quantity}: {apart(line, first, quantity)}")
        same = [line for line in own if by_name[line["row"]].same_algorithm]
        for line in same[1:]:
            theirs = same[0]["loss"]
            relative = abs(line["loss"] / theirs - 1)
            if not relative <= TOLERANCE[workload]:  # also true for NaN
                found.append(
                    f"{workload}, repeat {line['repeat']}: {line['row']} has a loss of "
                    f"{line['loss']:.4f} and {same[0]['row']} one of {theirs:.4f}, which is more "
                    f"than {TOLERANCE[workload]:.0%} apart"
                )
    return found


def apart(line: Line, other: Line, quantity: str) -> str:
    mine, theirs = line[quantity], other[quantity]
    for number, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if a != b:
            return f"{a} and {b} in round {number}"
    return f"{len(mine)} and {len(theirs)} rounds"


# Comparing


def compare(lines: Sequence[Line], workload: str, rows: Sequence[Row] = ROWS) -> Table:
    """Returns medians of a workload, ratios to fax in the same repeat, and the targets.

    Targets apply to the fastest variant of each peer, and of fax.
    """
    rows = [row for row in rows if workload in row.workloads]
    own: dict[str, dict[int, Line]] = {row.name: {} for row in rows}
    errors = {}
    for line in lines:
        if line["workload"] == workload and line["row"] in own:
            if "error" in line:
                errors[line["row"]] = line["error"]
            else:
                own[line["row"]][line["repeat"]] = line
    medians = {name: [median(line) for line in of.values()] for name, of in own.items()}
    best = {}  # each peer's fastest variant
    for row in rows:
        if medians[row.name]:
            names = (best.get(row.peer, row.name), row.name)
            best[row.peer] = min(names, key=lambda name: statistics.median(medians[name]))
    fax = own.get(best.get(FAX, ""), {})
    made = []
    for row in rows:
        cells: dict[str, Any] = {"": row.name}
        if row.name in errors:
            cells["seconds a round"] = errors[row.name].partition(":")[0]
        if medians[row.name]:
            measured = list(own[row.name].values())
            cells |= {
                "seconds a round": seconds(statistics.median(medians[row.name])),
                "repeats": " to ".join(seconds(f(medians[row.name])) for f in (min, max)),
                "first round": seconds(statistics.median(x["first_round"] for x in measured)),
                "peak MiB": f"{max(line['peak_mib'] for line in measured):.0f}",
                "loss": f"{statistics.median(line['loss'] for line in measured):.3f}",
                "final loss": f"{statistics.median(x['final_loss'] for x in measured):.4f}",
            }
            shared = sorted(fax.keys() & own[row.name].keys())
            ratios = [median(own[row.name][i]) / median(fax[i]) for i in shared]
            if ratios and row.name != best[FAX]:
                ratio = statistics.median(ratios)
                cells["/ fax"] = f"{ratio:.2f}"
                if row.peer != FAX and row.name == best[row.peer]:
                    cells["target"] = judged(workload, row.peer, ratio)
        made.append(cells)
    columns = ["", "seconds a round", "repeats", "/ fax", "target"]
    columns += ["first round", "peak MiB", "loss", "final loss"]
    return dict(title=f"{workload}: {WORKLOADS[workload]}", columns=columns, rows=made)


def judged(workload: str, peer: str, ratio: float) -> str | None:
    """Compares the ratio of a peer's best variant to fax with the target."""
    if peer == "by hand":
        return verdict(f"fax within {BY_HAND:.2f} times ({1 / ratio:.2f})", 1 / ratio <= BY_HAND)
    least = TARGETS[workload].get(peer)
    return verdict(f"at least {least:g}", ratio >= least) if least else None


def stock(lines: Sequence[Line], workload: str) -> str | None:
    """Compares stock convolutions of flax.nnx with matrix products."""
    done = [li for li in lines if li["workload"] == workload and "error" not in li]
    of = {
        variant: {li["repeat"]: median(li) for li in done if li["row"] == f"{FAX}, {variant}"}
        for variant in ("nnx", "matmul")
    }
    shared = of["nnx"].keys() & of["matmul"].keys()
    if not shared:
        return None
    ratio = statistics.median(of["nnx"][i] / of["matmul"][i] for i in shared)
    text = f"Stock convolutions take {ratio:.2f} times as long as matrix products, at most {STOCK}"
    return verdict(text, ratio <= STOCK)


def memory(lines: Sequence[Line], workload: str, rows: Sequence[Row] = ROWS) -> str | None:
    """Compares fax's peak with FedJAX's plus the examples that fax keeps on devices."""
    done = [li for li in lines if li["workload"] == workload and "error" not in li]
    names = {peer: {row.name for row in rows if row.peer == peer} for peer in (FAX, "FedJAX")}
    peaks = {
        peer: [line["peak_mib"] for line in done if line["row"] in of] for peer, of in names.items()
    }
    if not all(peaks.values()):
        return None
    data = max(line["on_devices_mib"] for line in done if line["row"] in names[FAX])
    fax, fedjax = max(peaks[FAX]), min(peaks["FedJAX"])
    target = f"at most FedJAX's {fedjax:.0f} and {data:.0f} on devices"
    return verdict(f"Peak memory of fax {fax:.0f} MiB, {target}", fax <= fedjax + data)


def median(line: Line) -> float:
    return statistics.median(line["seconds"])


def seconds(value: float) -> str:
    return f"{value:#.3g}"


# Reporting


def machine() -> dict[str, Any]:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            named = [line.partition(":")[2].strip() for line in file if "model name" in line]
        model = named[0] if named else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "CPU": model or platform.machine(),
        "cores": os.cpu_count(),
        "cores used": CORES,
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(lines: Iterable[Line]) -> dict[str, dict[str, str]]:
    """The packages of each environment that ran."""
    environment = {row.name: row.environment for row in ROWS}
    return {environment[line["row"]]: line["versions"] for line in lines if "versions" in line}


def main() -> None:
    start = time.perf_counter()
    modules = [row.module for row in ROWS]
    peers = list(dict.fromkeys(module.removesuffix("_peer") for module in modules))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WORKLOADS, help="run one workload")
    parser.add_argument("--peers", help=f"run some of {','.join(peers)}")
    parser.add_argument("--repeats", type=int, default=2, help="how often to run all of them")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds per process")
    parser.add_argument("--json", default="runs/simulation.json", help="file for the figures")
    options = parser.parse_args()
    wanted = options.peers.split(",") if options.peers else peers
    if unknown := set(wanted) - set(peers):
        parser.error(f"--peers: no such peer as {', '.join(sorted(unknown))}; {', '.join(peers)}")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    rows = [row for row in ROWS if row.module.removesuffix("_peer") in wanted]
    workloads = [options.only] if options.only else list(WORKLOADS)

    lines = measure(rows, workloads, options.repeats, options.rounds)

    tables = [compare(lines, workload, rows) for workload in workloads]
    for workload, table in zip(workloads, tables, strict=True):
        show(table)
        for text in (stock(lines, workload), memory(lines, workload, rows)):
            if text:
                print(f"\n{text}")
    print("\n" + ", ".join(f"{key} {value}" for key, value in machine().items()))
    for name, packages in versions(lines).items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in packages.items()))
    for line in lines:
        if "error" in line:
            print(f"{line['workload']} {line['row']}, repeat {line['repeat']}: {line['error']}")
    wrong = disagreements(lines, rows)
    minutes = (time.perf_counter() - start) / 60
    path = pathlib.Path(options.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    result = dict(machine=machine(), versions=versions(lines), minutes=minutes, tables=tables)
    path.write_text(json.dumps(result | dict(disagreements=wrong, lines=lines), indent=1))
    print(f"{minutes:.1f} minutes; figures in {path}")
    if wrong:
        sys.exit("\nTHE PEERS DID NOT DO THE SAME WORK:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()

"""How many clients to vectorize on TPUs, by the compiler's estimate: fax's default and the best.

    python benchmarks/tpu_schedule.py [--kinds v5e,v6e] [--tasks "logistic;dense"] [--json PATH]
    python benchmarks/tpu_schedule.py --known           # the table of what is in the file
    python benchmarks/tpu_schedule.py --convolutions    # the settings of convolutions=

Compiles a round of federated averaging for one chip, for each kind of TPU, client function and
number of vectorized clients. It needs libtpu and no TPU: `pip install 'fax-jax[tpu,models]'`. A
compilation takes seconds to minutes. What is already in the file is not compiled again, and results
are added after each compilation. The default file is tpu_schedule.json, which the tests compare the
rule with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from figures import Figures
from jax.extend.core import jaxprs_in_params
from jax.sharding import SingleDeviceSharding
from tables import show
from tpu_clients import DRIVE, GRADIENT, POWER_SGD, TASKS, round_of

import fax
import fax.inspect
from fax.lowering._vectorize import Device, vectorized
from fax.primitives._jaxpr import opened
from fax.primitives._round import Round, federated_map_p

FILE = pathlib.Path(__file__).with_suffix(".json")
KINDS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
DEVICE_KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
CLIENTS, STEPS = 64, 5
VECTORIZED = (1, 2, 4, 8, 16, 32, 64)
MOST_MEMORY = 1.1  # of the memory of one client at a time
ROUNDS = (*TASKS, f"dense{GRADIENT}", f"MLP 4.4 M{GRADIENT}", f"dense{DRIVE}", f"dense{POWER_SGD}")
# Clients with convolutions, and the number of vectorized clients where all settings are compared.
CONVOLUTIONS, SETTINGS, SOME = ("EMNIST CNN", "ResNet-18"), ("auto", "xla", "matmul"), (1, 4)


def versions() -> str:
    return f"libtpu {importlib.metadata.version('libtpu')}, jax {jax.__version__}"


def on_chip(kind: str, shapes: Any) -> Any:
    chip = SingleDeviceSharding(fax.sharding.topology(KINDS[kind])[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), shapes)


def cost(kind: str, fn: Callable, shapes: Any) -> dict[str, Any]:
    """Cycles and temporary memory on a chip, None if it has too little memory."""
    try:
        report = fax.inspect.report(fn, *on_chip(kind, shapes))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return dict(cycles=None, temporary_bytes=None)
    return dict(cycles=report.cycles, temporary_bytes=report.memory.temporary_bytes)


def key(kind: str, task: str, vectorize: int | None, convolutions: str = "auto") -> str:
    return f"{kind} | {task} | {vectorize or 'default'} | {convolutions}"


def figures_of(
    figures: Figures, kind: str, task: str, vectorize: int | None, convolutions: str = "auto"
) -> Any:
    """Cycles and temporary memory of a round. ``vectorize`` is None for fax's default."""
    how = dict(vectorize=vectorize, convolutions=convolutions)
    return figures.of(
        key(kind, task, vectorize, convolutions),
        lambda: cost(kind, *round_of(task, CLIENTS, STEPS, **how)),
    )


def rounds(task: str) -> list[Round]:
    """The maps of a round of a task that leave it to fax how many clients are vectorized."""

    def maps(jaxpr: Any) -> Iterator[Round]:
        for eqn in opened(jaxpr).eqns:
            if eqn.primitive is federated_map_p:
                yield Round.of(eqn.params)
            else:
                for inner in jaxprs_in_params(eqn.params):
                    yield from maps(inner)

    fn, shapes = round_of(task, CLIENTS, STEPS)
    return [each for each in maps(jax.make_jaxpr(fn)(*shapes)) if each.vectorize is None]


def defaults(kind: str, this: list[Round]) -> list[int]:
    """How many clients fax vectorizes in the maps of a round, each number once."""
    device = Device("tpu", DEVICE_KINDS[kind])
    return sorted({vectorized(device, each)(CLIENTS) for each in this}, reverse=True)


def compared(found: dict[int | None, Any], chosen: list[int]) -> dict[str, Any]:
    """A row of the table: multiples of the best number, and the default's place among them.

    Args:
      found: cycles and temporary memory, by number of vectorized clients. None is for the default
        where it consists of several numbers.
      chosen: the numbers of the default.
    """
    fits = {v: row for v, row in found.items() if row["cycles"] is not None}
    best = min(row["cycles"] for row in fits.values())
    own = fits.get(chosen[0] if len(chosen) == 1 else None)
    one = fits.get(1)
    alike = [  # in memory
        row["cycles"]
        for row in fits.values()
        if one and row["temporary_bytes"] <= MOST_MEMORY * one["temporary_bytes"]
    ]
    return {
        **{str(v): row["cycles"] / best for v, row in fits.items() if v is not None},
        "default": ", ".join(map(str, chosen)),
        "/ best": own and own["cycles"] / best,
        "/ best with its memory": one["cycles"] / min(alike) if one and chosen == [1] else None,
        "MiB, 1": one and shown(one["temporary_bytes"] / 2**20),
        "MiB, default": own and shown(own["temporary_bytes"] / 2**20),
    }


def shown(number: float) -> str:
    return f"{number:,.0f}"


def schedules(figures: Figures, kinds: list[str], tasks: list[str], known: bool) -> None:
    """The table of fax's default against the best number of vectorized clients."""
    rows = []
    for task in tasks:
        maps = rounds(task)
        for kind in kinds:
            chosen = defaults(kind, maps)
            numbers = [*VECTORIZED, *([None] if len(chosen) > 1 else [])]
            found = {
                v: figures_of(figures, kind, task, v)
                for v in numbers
                if not known or key(kind, task, v) in figures.rows
            }
            if len(found) > 1:
                rows.append({"client function": task, "chip": kind, **compared(found, chosen)})
    columns = [*("client function", "chip"), *map(str, VECTORIZED)]
    columns += ["default", "/ best", "/ best with its memory", "MiB, 1", "MiB, default"]
    show(dict(title="Cycles as multiples of the best, by vectorize=", columns=columns, rows=rows))


def convolutions(figures: Figures, kinds: list[str]) -> None:
    """The table of the settings of ``convolutions=``."""
    for kind in kinds:
        rows = []
        for task in CONVOLUTIONS:
            for v in SOME:
                found = {s: figures_of(figures, kind, task, v, s)["cycles"] for s in SETTINGS}
                best = min(cycles for cycles in found.values() if cycles is not None)
                ratios = {s: cycles and cycles / best for s, cycles in found.items()}
                rows.append({"client": task, "vectorize": str(v), **ratios})
        show(dict(title=f"{kind}: cycles by convolutions=", columns=list(rows[0]), rows=rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--tasks", default=";".join(ROUNDS), help="separated by semicolons")
    parser.add_argument("--convolutions", action="store_true")
    parser.add_argument("--known", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=pathlib.Path, default=FILE)
    args = parser.parse_args()
    figures, kinds = Figures(args.json), args.kinds.split(",")
    made_with = figures.of("versions", versions)
    if not args.known and made_with != versions():
        parser.error(f"{args.json} was made with {made_with}. Pass another file as --json.")
    print(made_with)
    if args.convolutions:
        convolutions(figures, kinds)
    else:
        schedules(figures, kinds, args.tasks.split(";"), args.known)


if __name__ == "__main__":
    main()

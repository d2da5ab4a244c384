"""Plans on disk: what clients need to run their stages, and to check what they are asked for.

    plan.json           the version of the format, and for each stage its file, types and modes
    audit.txt           the audit as text, for people
    <name>.stablehlo    a stage, as `jax.export` serializes it

A stage is known by the SHA-256 hash of its file. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from fax.deploy._audit import Audit
from fax.deploy._stages import Stage

FORMAT = 1
KNOWN = ("cpu", "cuda", "rocm", "tpu")  # platforms of JAX


def save(
    folder: str | os.PathLike[str], stages: Sequence[Stage], audit: Audit, platforms: Sequence[str]
) -> None:
    """Writes a plan. The manifest comes last, so that a folder with one is whole."""
    if isinstance(platforms, str) or not platforms or not set(platforms) <= {*KNOWN}:
        raise ValueError(
            f"Plan.save: platforms is {platforms!r:.80}, expected a list with some of "
            f"{', '.join(KNOWN)}."
        )
    path = pathlib.Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError(f"Plan.save: {path} is not empty; choose a new folder.")
    described = {}
    for number, stage in enumerate(stages, 1):
        name, blob = stage.artifact(platforms)
        file = f"{number}_{stage.name.split()[0]}.stablehlo"
        (path / file).write_bytes(blob)
        described[name] = {
            "file": file,
            "name": stage.name,
            "program": stage.digest,
            "inputs": list(stage.inputs),
            "outputs": list(stage.outputs),
            "input types": list(map(str, stage.jaxpr.in_avals)),
            "output types": list(map(str, stage.jaxpr.out_avals)),
        }
    manifest = {
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "fetches": any(m.mode == "fetched" for m in _messages(audit)),
        "stages": described,
        "statements": audit.statements,
        "chosen": audit.chosen,
        "exchanges": [dataclasses.asdict(exchange) for exchange in audit.exchanges],
    }
    (path / "audit.txt").write_text(f"{audit}\n", encoding="utf-8")
    written = path / "plan.json.part"
    written.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    written.replace(path / "plan.json")


def _messages(audit: Audit) -> Iterator[Any]:
    for exchange in audit.exchanges:
        yield from exchange.messages

"""Makes docs/gallery.md: a figure of each example, with its command and the time that it took.

    python tools/gallery.py                      all that this environment has the packages for
    python tools/gallery.py federated_averaging  this one; the others stay as they are

Examples draw their figures themselves, here in short runs. Figures are made small, so that the
repository stays small. The page shows the processor time of each run, which depends less on what
else the machine does than the time on a clock. Where it is not known, the page shows the latter.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
FIGURES = ROOT / "docs" / "gallery"
SOURCE = "https://github.com/fax-jax/fax/blob/main/examples"
WIDTH, COLORS = 640, 128  # of a figure
# The options of short runs. Without any, the run is the full one.
SHORT = {
    "thermometers": "",
    "federated_averaging": "",
    "compare_algorithms": "--rounds=60 --algorithms fedavg scaffold feddyn",
    "private_digits": "",
    "federated_gradient": "--steps=30",
    "learned_hyperparameters": "--steps=10",
    "maml_digits": "--rounds=60",
    "papa_digits": "--rounds=20",
    "sharded_transformer": "--rounds=10",
    "diloco_pystdlib": "--rounds=10",
    "federated_analytics": "",
    "elastic_diloco": "--learners=2 --periods=80 --inner-steps=20 --kill-every=6",
    "flower_digits": "--rounds=6",
    "hand_over": "--rounds=10",
    "multiprocess": "",
}
# Packages with an environment of their own, of `make test-beam` and `make test-flower`.
NEEDS = {"federated_analytics": "apache_beam", "flower_digits": "flwr"}
# Flower kills processes whose own processes nobody waits for, so their time is not counted.
UNCOUNTED = {"flower_digits"}
INTRODUCTION = """# Gallery

A figure of each example in the folder
[`examples`](https://github.com/fax-jax/fax/tree/main/examples), with the command that draws it and
the time that the command took on two cores, start and compiling included. Runs with options are
shorter than the examples themselves, so their curves end early. `federated_analytics.py` needs the
extra `beam`, and `flower_digits.py` the extra `flower`. All others need the extra `examples`.

`python tools/gallery.py` makes this page.
"""


def run(name: str) -> str:
    """Runs an example, keeps its figure, and says how long it took."""
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / f"{name}.py"), *SHORT[name].split()],
            cwd=folder,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        for figure in pathlib.Path(folder, "runs").glob("*.png"):
            keep(figure)
    if name in UNCOUNTED:
        return f"{(time.monotonic() - begun) / 60:.0f} minutes on the clock"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return f"{max(seconds, 1):.0f} seconds of processor time"


def keep(figure: pathlib.Path) -> None:
    """Makes a figure small, and puts it beside the others."""
    from PIL import Image

    FIGURES.mkdir(exist_ok=True)
    with Image.open(figure) as image:
        size = (WIDTH, round(image.height * WIDTH / image.width))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small = small.quantize(COLORS, Image.Quantize.FASTOCTREE)  # keeps the colours of thin lines
        small.save(FIGURES / figure.name, optimize=True)


def section(name: str, took: str) -> str:
    """The part of the page about an example."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    title = str(ast.get_docstring(ast.parse(source))).splitlines()[0]
    command = f"python examples/{name}.py {SHORT[name]}".rstrip()
    parts = [f"## [`{name}.py`]({SOURCE}/{name}.py)", title, f"    {command}", f"{took}."]
    if (FIGURES / f"{name}.png").exists():
        parts.append(f"![The figure that {name}.py draws](gallery/{name}.png)")
    return "\n\n".join(parts) + "\n"


def times() -> dict[str, str]:
    """The times that the page shows so far."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    found = {}
    for part in text.split("\n## ")[1:]:
        if took := re.search(r"^(\d+ (seconds|minutes) .*)\.$", part, re.MULTILINE):
            found[part.split("`")[1].removesuffix(".py")] = took[1]
    return found


def page(known: dict[str, str]) -> str:
    """The page, from the times of examples."""
    return "\n".join([INTRODUCTION, *(section(name, known[name]) for name in SHORT)])


def main(names: list[str]) -> None:
    known = times()
    here = [n for n in SHORT if n not in NEEDS or importlib.util.find_spec(NEEDS[n])]
    for name in names or here:
        known[name] = run(name)
        print(name, known[name], flush=True)
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

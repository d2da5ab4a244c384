"""Makes docs/gallery.md: a figure of each example, with its command and the time that it took.

    python tools/gallery.py                      all of them, which takes some minutes
    python tools/gallery.py federated_averaging  this one; the others stay as they are

Examples draw their figures themselves, here in short runs. Figures are made small, so that the
repository stays small. The page shows the processor time of each run, which depends less on what
else the machine does than the time on a clock.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
PAGE = ROOT / "docs" / "gallery.md"
FIGURES = ROOT / "docs" / "gallery"
SOURCE = "https://github.com/fax-jax/fax/blob/main/examples"
WIDTH, COLORS = 640, 48  # of a figure
# The options of short runs. Without any, the run is the full one. None: it is not run here.
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
    "diloco_pystdlib": None,  # minutes, most of which is compiling
    "federated_analytics": None,  # needs Apache Beam, in an environment of its own
    "elastic_diloco": None,  # minutes
    "flower_digits": None,  # needs Flower, in an environment of its own
    "hand_over": "--rounds=10",
    "multiprocess": "",
}
INTRODUCTION = """# Gallery

A figure of each example in the folder
[`examples`](https://github.com/fax-jax/fax/tree/main/examples), with the command that draws it and
the processor time that the command took, start included. Runs with options are shorter than the
examples themselves, so their curves end early. Examples without a time take minutes, or need
packages that are not in `fax-jax[examples]`.

`python tools/gallery.py` makes this page.
"""


def run(name: str, options: str) -> float:
    """Runs an example, keeps its figure, and returns the processor time in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options.split()],
            cwd=folder,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        for figure in pathlib.Path(folder, "runs").glob("*.png"):
            keep(figure)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def keep(figure: pathlib.Path) -> None:
    """Makes a figure small, and puts it beside the others."""
    from PIL import Image

    FIGURES.mkdir(exist_ok=True)
    with Image.open(figure) as image:
        size = (WIDTH, round(image.height * WIDTH / image.width))
        small = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        small.quantize(COLORS).save(FIGURES / figure.name, optimize=True)


def section(name: str, seconds: str | None) -> str:
    """The part of the page about an example."""
    source = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    title = str(ast.get_docstring(ast.parse(source))).splitlines()[0]
    command = f"python examples/{name}.py {SHORT[name] or ''}".rstrip()
    parts = [f"## [`{name}.py`]({SOURCE}/{name}.py)", title, f"    {command}"]
    if seconds:
        parts.append(f"{seconds} of processor time.")
    if (FIGURES / f"{name}.png").exists():
        parts.append(f"![The figure that {name}.py draws](gallery/{name}.png)")
    return "\n\n".join(parts) + "\n"


def times() -> dict[str, str]:
    """The processor times that the page shows so far."""
    text = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    found = {}
    for part in text.split("\n## ")[1:]:
        if took := re.search(r"^(\d+ seconds) of processor time", part, re.MULTILINE):
            found[part.split("`")[1].removesuffix(".py")] = took[1]
    return found


def page(known: dict[str, str]) -> str:
    """The page, from the times of examples."""
    return "\n".join([INTRODUCTION, *(section(name, known.get(name)) for name in SHORT)])


def main(names: list[str]) -> None:
    known = times()
    for name in names or SHORT:
        options = SHORT[name]
        if options is not None:
            known[name] = f"{max(run(name, options), 1):.0f} seconds"
            print(name, known[name], flush=True)
    PAGE.write_text(page(known), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

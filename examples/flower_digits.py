"""Federated averaging of digits that stay with three SuperNodes of Flower, one of which is killed.

Starts a SuperLink and three SuperNodes on this machine, each of which loads the handwritten digits
of one client, and runs the app in the folder `flower_digits` on them. In the middle, one node is
killed, and training goes on with the other two. Needs the extra `flower` and matplotlib.

    python examples/flower_digits.py

prints each round, and draws the accuracy to runs/flower_digits.png.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from _flower import federation
from matplotlib.figure import Figure

import fax

CLIENTS = 3
APP = Path(__file__).with_name("flower_digits")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=60.0, help="until a node counts as failed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        app = shutil.copytree(APP, Path(folder) / "flower_digits")
        fax.deploy.write_flower_client(app / "flower_digits" / "fax_client")
        with federation(folder, CLIENTS) as here:
            victim = here.nodes[1].pid
            history = Path(folder) / "history.json"
            here.run(
                app,
                rounds=options.rounds,
                timeout=options.timeout,
                victim=victim,
                history=str(history),
            )
            print(f"Figure: {draw(json.loads(history.read_text()))}")


def draw(history):
    """Draws the accuracy of each round, and marks those without the node that was killed."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    accuracies = [100 * right for _, right in history]
    axes.plot(accuracies, color="tab:gray")
    for clients, marker in (CLIENTS, "o"), (CLIENTS - 1, "x"):
        rounds = [number for number, (present, _) in enumerate(history) if present == clients]
        axes.plot(rounds, [accuracies[r] for r in rounds], marker, label=f"{clients} clients")
    axes.set(xlabel="round", ylabel="accuracy on other digits (%)", ylim=(0, 100))
    axes.legend(frameon=False, loc="lower right")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = Path("runs", "flower_digits.png")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()

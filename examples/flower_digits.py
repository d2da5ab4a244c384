"""Federated averaging of digits that stay with three SuperNodes of Flower, one of which is killed.

Starts a SuperLink and three SuperNodes on this machine, each of which loads the handwritten digits
of one client, and runs the app in the folder `flower_digits` on them. In the middle, one node is
killed, and training goes on with the other two. Needs the extra `flower`.

    python examples/flower_digits.py
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from _flower import federation

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
            here.run(app, rounds=options.rounds, timeout=options.timeout, victim=victim)


if __name__ == "__main__":
    main()

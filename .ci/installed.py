"""Checks the wheel in an environment that has only jax and NumPy beside it.

The argument is the path of the environment.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import fax


def expect(condition: object, otherwise: str) -> None:
    if not condition:
        sys.exit(otherwise)


home = pathlib.Path(fax.__file__).resolve()
expect(home.is_relative_to(pathlib.Path(sys.argv[1]).resolve()), f"fax comes from {home}")
expect((home.parent / "py.typed").is_file(), "the wheel has no py.typed")

metadata = importlib.metadata.metadata("fax-jax")
expect(metadata["Version"] == fax.__version__, f"the wheel has version {metadata['Version']}")
required = {
    (re.split(r"[^\w.-]", line)[0], "extra ==" in line)
    for line in importlib.metadata.requires("fax-jax") or ()
}
always = {name for name, of_extra in required if not of_extra}
expect(always == {"jax", "numpy"}, f"the core requires {sorted(always)}")
expect(("fax", True) not in required, "an extra requires fax, which is another project")

# Subpackages that need an extra name it.
extras = metadata.get_all("Provides-Extra")
for module in ("aggregators", "algorithms", "models", "tasks", "experiment"):
    try:
        getattr(fax, module)
    except ModuleNotFoundError as error:
        named = re.search(r"pip install 'fax-jax\[(\w+)\]'", str(error))
        expect(named and named[1] in extras, str(error))

# The command is there. Without its extra, it says how to install that.
script = str(pathlib.Path(sys.executable).with_name("fax"))
module = [sys.executable, "-P", "-m", "fax"]
for command, code, expected in (
    ([script, "--help"], 0, "exit codes:"),
    ([script, "run", "digits"], 2, "pip install 'fax-jax["),
    ([*module, "doctor"], 0, "pip install 'fax-jax[experiment]'"),
):
    done = subprocess.run(command, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    expect(done.returncode == code and expected in printed, f"{command} prints:\n{printed}")

"""The ClientApp of the learners in the tests, in a process for each message."""

import os
import pathlib
import sys

from learning.fax_client import learner_app

if folder := os.environ.get("FAX_TESTS"):
    for name in {"fax", "jax", "learning.learner"} & sys.modules.keys():
        pathlib.Path(folder, f"message imported {name}").touch()
app = learner_app("learning.learner:learner")

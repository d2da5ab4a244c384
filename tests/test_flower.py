"""Plans on Flower: its SuperLink and SuperNodes, on this machine."""

import shutil
import struct
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flwr", reason="Flower is not installed; see make test-flower")

import federations

from fax import deploy

APP = Path(__file__).with_name("flower_app")


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app of the tests, with fax's files for clients."""
    folder = tmp_path_factory.mktemp("flower") / "app"
    shutil.copytree(APP, folder)
    deploy.write_flower_client(folder / "app" / "fax_client")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_a_federation(app, tmp_path):
    """Two algorithms equal the jitted functions, and a node that is killed is left out."""
    configs = [f'partition-id={i} log="{tmp_path}"' for i in range(3)]
    with federations.federation(tmp_path, configs) as here:
        victim = here.nodes[1].pid
        here.run(app, timeout=280, folder=str(tmp_path), victim=victim)
        print((tmp_path / "seconds").read_text())
        assert (tmp_path / "done").exists(), here.logs
        traffic = b"".join(here.traffic)
    results = {name: list(np.load(tmp_path / f"{name}.npz").values()) for name in RESULTS}

    from app import data, programs

    rows = [data.rows(client) for client in range(3)]
    stacked = {name: np.stack([own[name] for own in rows]) for name in rows[0]}
    cohorts = [programs.cohort(stacked, number) for number in range(2)]
    scaffold = programs.scaffold()
    for name, algorithm, program, args in (
        ("fedavg", fedavg := programs.fedavg(), fedavg.round, cohorts[:1]),
        ("scaffold", scaffold, programs.two_rounds(scaffold), cohorts),
    ):
        expected = jax.jit(program)(algorithm.init(programs.PARAMS), *args)
        for own, other in zip(results[name], jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(results["mean"][0], (stacked["x"][[0, 2]] ** 2).mean(0))

    seen = {path.name for path in tmp_path.iterdir()}
    assert {f"loaded {client}" for client in range(3)} <= seen
    assert not [name for name in seen if "imported" in name]
    for own in rows:
        assert own["x"].tobytes() not in traffic
        assert all(struct.pack("d", x) not in traffic for x in own["x"].ravel())
    assert (rows[0]["x"] ** 2).tobytes() in traffic  # which is what a client sends
    end = time.monotonic() + 20
    while federations.processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.2)
    assert not federations.processes_of(tmp_path)


RESULTS = ("fedavg", "scaffold", "mean")

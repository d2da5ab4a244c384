"""Runs that go on elsewhere, or after files are damaged, disks are full, or a signal has come."""

import copy
import errno
import itertools
import os
import shutil
import signal
import threading
import types
import unittest.mock
from pathlib import Path

import jax
import meshes
import numpy as np
import pytest
from runs import (
    ALGORITHM,
    DATA,
    PARAMS,
    PERSONAL,
    assert_same_run,
    rounds_of,
    stopped,
    train,
)

import fax
from fax import experiment
from fax.experiment import _checkpoints, _folder, _history, _outputs, _resume
from fax.experiment._rounds import Run

pytestmark = pytest.mark.usefixtures("no_figures")


def test_restore_on_other_devices(whole, tmp_path):
    """From one device to 4 x 2, from these to two and one, and on with the rounds."""
    state = PERSONAL.init(PARAMS)
    settings = [None, {"clients": 2}, {"clients": 4, "model": 2}]

    def on(axes):
        return meshes.mesh("auto", **axes) if axes else None

    def spread(tree, mesh):
        rows = jax.NamedSharding(mesh, jax.P("clients"))
        whole = jax.NamedSharding(mesh, jax.P())
        return jax.tree.map(lambda x: jax.device_put(x, rows if len(x.shape) > 1 else whole), tree)

    with jax.set_mesh(on(settings[2])):
        stopped(tmp_path / "run", 5, algorithm=PERSONAL, state=spread(state, on(settings[2])))
    plain = experiment.restore(tmp_path / "run")
    assert plain.round == plain.cohort == 4
    for axes in settings:
        with jax.set_mesh(on(axes)) if axes else jax.default_device(None):
            found = experiment.restore(tmp_path / "run", state).state
        leaves = jax.tree_util.tree_leaves_with_path(found)
        for (path, x), size in zip(leaves, map(len, itertools.repeat(axes or ()))):
            expected = plain.state[f"state{jax.tree_util.keystr(path)}"]
            assert np.asarray(x).tobytes() == np.asarray(expected).tobytes()
            assert len(x.sharding.device_set) == (np.prod(list(axes.values())) if size else 1)
            if size and x.ndim > 1:
                assert x.sharding.spec[0] == "clients"
    expected = train(None, algorithm=PERSONAL)
    with jax.set_mesh(on(settings[1])):
        found = train(tmp_path / "run", algorithm=PERSONAL, state=state)
    assert found.history[:4] == plain.history
    for x, y in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected.state), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-10)


def test_states_of_callbacks_keep_all_bits(tmp_path):
    """Those of NumPy and Python, though JAX's arrays have 32, and though they change meanwhile."""
    state = {"seen": np.int64(2**40), "sum": np.full(2, 1 / 3), "count": 2**40, "share": 0.1}
    callbacks = [types.SimpleNamespace(state=state), types.SimpleNamespace(state={"rounds": [1]})]
    expected = copy.deepcopy(state)
    with jax.enable_x64(False), fax.data.cohorts(DATA, clients=4, batch_size=8) as cohorts:
        run = Run(ALGORITHM, ALGORITHM.init(PARAMS), cohorts, rounds=1, callbacks=callbacks)
        arrays, facts = _resume.contents(run)
        state["sum"] += 1
        callbacks[1].state["rounds"].append(2)
        checkpoints = _checkpoints.Checkpoints(tmp_path / "checkpoints", run.keep)
        checkpoints.save(1, arrays, facts, {}, None)
        _resume.put_back(run, checkpoints.read(1, lambda leaves: [None] * len(leaves)))
        checkpoints.close()
    assert callbacks[1].state == {"rounds": [1]}
    for name, value in expected.items():
        found = callbacks[0].state[name]
        assert type(found) is type(value)
        assert np.asarray(found).tobytes() == np.asarray(value).tobytes()


# What goes wrong


def halve(path):
    os.truncate(path, path.stat().st_size // 2)


def damage(what, checkpoint):
    if what == "deleted":
        shutil.rmtree(checkpoint)
        return
    parts = {"arrays": checkpoint / "arrays", "facts": checkpoint / "facts", "all": checkpoint}
    for path in parts[what].rglob("*"):
        if path.is_file():
            halve(path)


@pytest.mark.parametrize("what", ["arrays", "facts", "all", "deleted"])
def test_a_damaged_checkpoint_is_passed_over(what, whole, tmp_path):
    result, folder = whole
    shutil.copytree(folder, tmp_path / "run")
    damage(what, tmp_path / "run" / "checkpoints" / "6")
    if what == "deleted":
        found = train(tmp_path / "run")
    else:
        says = "checkpoint of round 6 cannot be read .*That of round 4 is used instead"
        with pytest.warns(UserWarning, match=says):
            assert experiment.restore(tmp_path / "run").round == 4
        with pytest.warns(UserWarning, match=says):
            found = train(tmp_path / "run")
        assert "round 4 is used instead" in (tmp_path / "run" / "log.txt").read_text()
    assert_same_run(found, result)
    assert rounds_of(tmp_path / "run") == [4, 6]
    one, two = (Path(path, "metrics.csv").read_bytes() for path in (folder, tmp_path / "run"))
    assert one == two


def test_if_no_checkpoint_can_be_read(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    for number in (4, 6):
        damage("arrays", tmp_path / "run" / "checkpoints" / f"{number}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read: .*round 6.*round 4"):
        train(tmp_path / "run")


def test_a_run_that_has_no_checkpoint_or_more_rounds(whole, tmp_path):
    shutil.copytree(whole[1], tmp_path / "run")
    with pytest.raises(ValueError, match=r"rounds is 4, but the run in .* has 6 already"):
        train(tmp_path / "run", rounds=4)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match=r"has metrics of a run, but no checkpoint"):
        train(tmp_path / "run")


def test_a_line_that_was_cut_off_is_removed(whole, tmp_path):
    result, folder = whole
    stopped(tmp_path / "run", 5)
    with open(tmp_path / "run" / "metrics.csv", "a") as file:
        file.write("5,0.1")
    assert_same_run(train(tmp_path / "run"), result)
    one, two = (Path(path, "metrics.csv").read_bytes() for path in (folder, tmp_path / "run"))
    assert one == two


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in orbax
def test_if_the_disk_is_full(tmp_path):
    """The run ends with an error, and goes on when there is space again."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    rng = np.random.default_rng(0)
    big = {"w": rng.normal(size=20_000)}

    class Full:
        def after_round(self, run):
            if run.round == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(
            OSError, match=r"of round \d could not be written .*newest complete one is of round"
        ):
            train(tmp_path / "run", state=ALGORITHM.init(big), callbacks=[Full()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = train(tmp_path / "run", state=ALGORITHM.init(big))
    assert_same_run(found, train(None, state=ALGORITHM.init(big)))


def test_a_folder_that_is_read_only(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:  # who may write everywhere
            tmp_path.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(PermissionError, match="nothing can be written to folder"):
            train(tmp_path / "run")
    finally:
        os.seteuid(user)


def test_a_clock_that_jumps_back(whole, tmp_path, monkeypatch):
    import time

    stopped(tmp_path / "run", 5)
    now = itertools.count(time.time() - 10_000, -1)
    monkeypatch.setattr(time, "time", lambda: next(now))
    assert_same_run(train(tmp_path / "run"), whole[0])
    assert rounds_of(tmp_path / "run") == [4, 6]


def test_a_folder_in_use_is_refused(tmp_path):
    class Second:
        def start(self, run):
            train(run.folder)

    with pytest.raises(experiment.FolderInUseError, match=r"another run is using folder=.*run'"):
        train(tmp_path / "run", callbacks=[Second()])
    train(tmp_path / "run")  # it is free again


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def locked(file):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(_folder, "locked", locked)
    with pytest.raises(OSError, match=r"no file in folder can be locked .*supports locks") as error:
        train(tmp_path / "run")
    assert error.value.errno == errno.ENOLCK


def test_a_table_on_a_full_disk(tmp_path):
    table = _history.Table(tmp_path / "metrics.csv")
    table.rewrite([])
    table.close()
    message = r"metrics.csv could not be written \(No space left.*\). Free some space"
    with open("/dev/full", "w") as table._file:
        for write in (lambda: table.append([{"round": 1}], []), table.close):
            with pytest.raises(OSError, match=message) as error:
                write()
            assert error.value.errno == errno.ENOSPC


def test_a_checkpoint_that_fails_when_the_run_ends(tmp_path, monkeypatch):
    """By another error, for example. It is an error of the disk, and not of the arguments."""
    checkpoints = _checkpoints.Checkpoints(tmp_path, experiment.Keep())
    with monkeypatch.context() as patch:
        fails = unittest.mock.Mock(side_effect=ValueError("RESOURCE_EXHAUSTED: No space left"))
        patch.setattr(checkpoints._manager, "close", fails)
        with pytest.raises(OSError, match="a checkpoint could not be written") as error:
            checkpoints.close()
    assert error.value.errno == errno.ENOSPC
    checkpoints.close()


def test_errors_of_orbax_are_errors_of_the_run(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_checkpoints.Keep, "better", fails)
    keep = experiment.Keep(newest=1, best="test/sum")
    with pytest.raises(OSError, match=r"could not be written .*No space left"):
        train(tmp_path / "run", keep=keep)


# Signals


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_saves_and_leaves(number, error, whole, tmp_path):
    class Send:
        def after_round(self, run):
            if run.round == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(error) as left:
        train(tmp_path / "run", callbacks=[Send()])
    if error is SystemExit:
        assert left.value.code == 143
    assert signal.getsignal(number) is before
    assert max(rounds_of(tmp_path / "run")) == 3
    assert_same_run(train(tmp_path / "run"), whole[0])


def test_a_signal_after_the_last_round_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(_outputs, "draw", lambda folder: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as left:
        train(tmp_path / "run")
    assert left.value.code == 143
    assert max(rounds_of(tmp_path / "run")) == 6


def test_a_run_in_a_thread_handles_no_signals(whole):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(None)))
    thread.start()
    thread.join()
    assert_same_run(found[0], whole[0])

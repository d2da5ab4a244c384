"""The examples, run as a reader runs them, keep what they promise."""

import re
import runpy
import shlex
import sys
import sysconfig
from pathlib import Path

import jax
import numpy as np
import pytest
from scripts import EXAMPLES, is_figure, numbers

# Of what takes long with all of its rounds, a short run, which promises nothing. The scripts of a
# row run one after another in one process, because most of a start is importing: those in float64,
# and those in float32. A script that makes devices is the first of its row.
SHORT = [
    ("federated_gradient --steps=1", "learned_hyperparameters --steps=1"),
    (
        "compare_algorithms --rounds=1 --algorithms fedavg apfl",
        "federated_averaging --rounds=1 --clients-per-round=3 --seed=1",
    ),
    ("maml_digits --rounds=1", "papa_digits --rounds=1 --models=2", "private_digits --rounds=1"),
    ("sharded_transformer --rounds=1",),
]
ONE_AFTER_ANOTHER = """
import runpy, shlex, sys
for command in sys.argv[1:]:
    sys.argv = shlex.split(command)
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("END OF", command)
"""


@pytest.mark.docs
@pytest.mark.parametrize("scripts", SHORT, ids=lambda scripts: scripts[0].split()[0])
def test_short_runs_end_with_a_figure(run, tmp_path, scripts):
    commands = []
    for script in scripts:
        name, *options = script.split()
        commands.append(shlex.join([str(EXAMPLES / f"{name}.py"), *options]))
    printed = run("-c", ONE_AFTER_ANOTHER, *commands, timeout=120 * len(scripts))
    figures = sorted((tmp_path / "runs").iterdir())
    assert len(figures) == len(scripts)
    for script, command in zip(scripts, commands):
        (figure,) = [path for path in figures if path.name.startswith(script.split()[0])]
        assert is_figure(figure)
        own, printed = printed.split(f"END OF {command}\n")
        assert f"runs/{figure.name}" in own


def test_thermometers_prints_the_share_and_one_round(capsys):
    readings = np.array(runpy.run_path(str(EXAMPLES / "thermometers.py"))["readings"])
    printed = capsys.readouterr().out
    (share,) = numbers(r"share of readings above 25 degrees: ([\d.]+)", printed)
    assert share == pytest.approx(np.mean(readings > 25))
    assert printed.count("federated_map[") == 1
    assert "broadcast[" not in printed


@pytest.mark.parametrize("options", [["--rounds=100"], pytest.param([], marks=pytest.mark.long)])
def test_federated_averaging_keeps_its_promise(tmp_path, monkeypatch, capsys, options):
    """After half of its rounds, and after all. Most of a process of its own is importing."""
    script = str(EXAMPLES / "federated_averaging.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [script, *options])
    with jax.enable_x64(False):
        runpy.run_path(script, run_name="__main__")
    printed = capsys.readouterr().out
    accuracy, _ = numbers(r"test accuracy ([\d.]+)%, ([\d.]+) s per round", printed)
    assert accuracy >= 95
    assert is_figure(tmp_path / "runs" / "federated_averaging.png")


@pytest.mark.long
def test_federated_averaging_is_deterministic_and_takes_options(run):
    twice = "from federated_averaging import main\nmain()\nmain()"
    options = ["--rounds=20", "--clients-per-round=20", "--seed=1"]
    once, again = re.findall(r"test accuracy ([\d.]+)%", run("-c", twice, *options))
    assert once == again
    assert float(once) > 88


@pytest.mark.long
def test_federated_gradient_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "federated_gradient.py", "--steps=20")
    for mode in ("forward", "reverse"):
        line = rf"{mode} mode (\S+), difference (\S+), relative error (\S+)"
        derivative, difference, error = numbers(line, printed)
        assert derivative == pytest.approx(difference, rel=1e-6)
        assert error < 1e-6
    before, after = numbers(r"validation loss ([\d.]+) before and ([\d.]+) after", printed)
    assert after < 0.6 * before
    line = r"mean weight ([\d.]+) of clean and ([\d.]+) of corrupted clients"
    clean, corrupted = numbers(line, printed)
    assert clean > 0.06  # 0.05 at the start
    assert corrupted < 0.02
    assert is_figure(tmp_path / "runs" / "federated_gradient.png")


@pytest.mark.long
def test_sharded_transformer_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "sharded_transformer.py", "--rounds=25")
    line = r"held-out loss ([\d.]+) nats, unigram entropy ([\d.]+) nats, margin ([\d.]+), "
    loss, entropy, margin = numbers(line, printed)
    assert margin == pytest.approx(entropy - loss, abs=0.002)
    assert margin > 0.5
    library = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in library.glob("*.py"))
    shares = np.bincount(np.frombuffer(text, np.uint8)) / len(text)
    shares = shares[shares > 0]
    assert entropy == pytest.approx(-np.sum(shares * np.log(shares)), abs=0.2)
    assert is_figure(tmp_path / "runs" / "sharded_transformer.png")


def test_a_partition_covers_every_example_once_and_is_uneven(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import _digits

    (images, labels), (held_out, _) = _digits.load(seed=0)
    assert (len(images), len(held_out)) == (1437, 360)
    owner = _digits.dirichlet_partition(labels, 100, 0.5, seed=0)
    assert owner.min() >= 0
    assert owner.max() < 100
    shares = np.array([np.bincount(owner[labels == k], minlength=100) for k in range(10)])
    assert (shares == 0).mean() > 0.2  # many clients lack a digit

    clients = _digits.stack(images, labels, owner, 103, multiple_of=4)
    assert clients["x"].shape[0] == 103
    assert clients["x"].shape[1] % 4 == 0
    assert (clients["mask"].sum(axis=1) == np.bincount(owner, minlength=103)).all()
    assert not clients["x"][~clients["mask"]].any()
    own = clients["x"][7][clients["mask"][7]]
    np.testing.assert_array_equal(own, images[owner == 7])
    np.testing.assert_array_equal(clients["y"][7][clients["mask"][7]], labels[owner == 7])


@pytest.mark.long
def test_papa_digits_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "papa_digits.py")
    line = r"soup ([\d.]+)%, its models [\d.]+%; alone, models ([\d.]+)%, their soup ([\d.]+)%"
    soup, alone, soup_alone = numbers(line, printed)
    assert soup > alone > 90
    assert soup_alone < 50
    (gain,) = numbers(r"gains (-?[\d.]+) points", printed)
    assert gain == pytest.approx(soup - alone, abs=0.02)
    assert is_figure(tmp_path / "runs" / "papa_digits.png")

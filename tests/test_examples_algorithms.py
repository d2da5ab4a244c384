"""The examples of algorithms, run as a reader runs them, keep what they promise."""

import pytest
from scripts import EXAMPLES, is_figure, numbers


@pytest.mark.long
def test_learned_hyperparameters_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "learned_hyperparameters.py", "--steps=12")
    (apart,) = numbers(r"by 23 hyperparameters: largest relative difference (\S+)", printed)
    assert apart < 1e-10
    clean, corrupted = numbers(r"mean weight (\S+) of clean and (\S+) of corrupted", printed)
    assert clean > 0.06  # about 0.05 at the start
    assert corrupted < 0.03
    learned = r"test accuracy (\S+)%, loss (\S+) as learned \((\S+)%, \S+ with weights"
    accuracy, loss, without_weights = numbers(learned, printed)
    fixed = r", (\S+)%, (\S+) by the best of 36 fixed settings \((\S+)% if test"
    best, best_loss, best_of_test = numbers(fixed, printed)
    assert accuracy > best_of_test >= best
    assert accuracy > without_weights
    assert loss < best_loss
    assert is_figure(tmp_path / "runs" / "learned_hyperparameters.png")


@pytest.mark.long
def test_maml_digits_keeps_its_promise(run, tmp_path):
    printed = run(EXAMPLES / "maml_digits.py", "--rounds=60")
    line = r"MAML (\S+)%, FedAvg (\S+)% with the best rate, \S+, untrained (\S+)%, see"
    maml, fedavg, untrained = numbers(line, printed)
    assert maml > 88
    assert maml > max(fedavg, untrained) + 3
    assert is_figure(tmp_path / "runs" / "maml_digits.png")


@pytest.mark.long
def test_compare_algorithms_keeps_its_promise(run, tmp_path):
    names = ["fedavg", "apfl", "reptile", "hyp_cluster"]
    printed = run(EXAMPLES / "compare_algorithms.py", "--rounds=40", "--algorithms", *names)
    rows = {name: next(x for x in printed.splitlines() if x.startswith(name)) for name in names}
    own = {name: numbers(r"(\S+)%(?:  \*)?$", row)[0] for name, row in rows.items()}
    assert min(own.values()) > 80
    assert own["reptile"] > own["fedavg"]  # for it adapts to each client
    central = {name: numbers(r"(\S+)% +\S+%", rows[name])[0] for name in names}
    assert min(central[name] for name in names[:3]) > 75
    # The server's model is that of FedAvg.
    assert rows["apfl"].split()[1:3] == rows["fedavg"].split()[1:3]
    best = max(central, key=central.__getitem__)
    assert f"best on the central test: {best} with {central[best]}%" in printed
    assert is_figure(tmp_path / "runs" / "compare_algorithms.png")

"""The changes that mutation testing makes."""

import ast

import mutants

SOURCE = '''
LIMIT = 3

def clip(x: int | None, most: float = 1.0, *, even: bool = False) -> str:
    """Clips by 1."""
    if x is None or not even:
        raise ValueError(f"{x + 1} is not {most}")
    x = abs(x)
    x += 2
    note(x, key=x)
    return x.astype(int) if x < -most else isinstance(x, int | str)
'''
CHANGES = {
    "x is None or not even -> (not (x is None or not even))",
    "x is None or not even -> (x is None and (not even))",
    "x is None -> (x is not None)",
    "not even -> (even)",
    'raise ValueError(f"{x + 1} is not {most}") -> pass',
    "x = abs(x) -> pass",
    "abs(x) -> (x)",
    "x += 2 -> pass",
    "2 -> 3",
    "note(x, key=x) -> pass",
    "note(x, key=x) -> (note(x))",
    "x.astype(int) -> (x)",
    "x < -most -> (x <= -most)",
    "-most -> (most)",
    "1.0 -> 2.0",
    "False -> True",
}


def test_changes_of_a_function():
    found = mutants.Finder("clip.py", SOURCE).found
    assert {f"{mutant.before} -> {mutant.after}" for mutant in found} == CHANGES
    for mutant in found:
        changed = mutant.apply(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert changed.count("\n") <= SOURCE.count("\n")
        assert mutant.before in SOURCE.splitlines()[mutant.lines[0] - 1]


def test_tests_that_run_a_line_are_chosen_quickest_first():
    (mutant,) = (m for m in mutants.Finder("clip.py", SOURCE).found if m.after == "3")
    line = ("clip.py", mutant.lines[0])
    tests = {
        "slow": {"seconds": 9.0, "lines": {line}},
        "quick": {"seconds": 1.0, "lines": {line, ("clip.py", 1)}},
        "other": {"seconds": 0.1, "lines": {("other.py", mutant.lines[0])}},
    }
    assert mutants.tests_of(mutant, tests, 60) == (["quick", "slow"], 10.0)
    assert mutants.tests_of(mutant, tests, 5) == (["quick"], 1.0)

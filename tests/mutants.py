"""Mutation testing: changes the code in small ways, and counts how many changes the tests notice.

    python tests/mutants.py aggregators --sample 100

A mutant is the code with one change: a comparison or an operation replaced, a constant moved, a
condition negated, an argument, a statement or a conversion left out. Each one is tested by the
tests that run its line, the quickest first, until one fails. Mutants that survive are printed:
either a test is missing, or the change makes no difference. Those of the second kind are in
`EQUIVALENT`, with the reason. What became of each mutant is in ``.mutants/``: after
a quick look with ``--seconds 20``, ``--survivors`` runs all tests of those that are left.

The tests are the cases that ``make test`` runs. The first run of a group records which of them run
which lines, in ``.mutants/``, and takes as long as these tests. After a change of tests, record
them again by ``--record``, or by ``--record privacy`` those of one file. Needs Python 3.12, for
`sys.monitoring`.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

# These are imported once, for all the processes that are forked from this one.
import jax
import optax  # noqa: F401
import pytest

ROOT = pathlib.Path(__file__).parent.parent
GROUPS: dict[str, tuple[list[str], list[str]]] = {
    "aggregators": (
        ["aggregators/*.py"],
        [
            *("secure_sum", "error_feedback", "compression", "robust", "clipping", "privacy"),
            *("mistakes", "privacy_attacks", "absent_clients"),
        ],
    ),
    "operators": (
        ["_operators.py", "_reductions.py", "_program.py", "_checks.py", "_arithmetic.py"],
        ["errors", "sums", "masks", "rules", "programs", "structure", "tracing"],
    ),
    "primitives": (
        ["primitives/*.py"],
        [
            *("errors", "sums", "masks", "rules", "programs", "structure", "tracing", "gradients"),
            *("any_active", "tools", "compile_keys", "transformations"),
        ],
    ),
    "lowering": (
        ["lowering/*.py", "lowering/convolutions/*.py"],
        [
            *("sums", "masks", "programs", "structure", "lowering", "schedule", "lookups"),
            *("collectives", "convolutions", "convolution_ways", "mesh_limits", "mesh_programs"),
            "mesh_branches",
        ],
    ),
}
# "line: before -> after", and why no test can tell the two apart.
EQUIVALENT: dict[str, str] = {
    'full = [size if per == "leaf" else min(size, int(per)) for size in sizes]: '
    "int(per) -> (per)": "it is an int already",
    "scale = jnp.sum(x**2) / jnp.where(length > 0, length, 1): 0 -> 1": (
        "the largest number is about 1, so the length of all is at least 1 or 0"
    ),
    "one_bit = jnp.where(rotated >= 0, scale, -scale): rotated >= 0 -> (rotated > 0)": (
        "zero may have either sign"
    ),
    'return jnp.matmul(a, b, precision="highest"): jnp.matmul(a, b, precision="highest") -> '
    "(jnp.matmul(a, b))": "a CPU has one precision; on accelerators there are several",
    "high = max((2 * rounds * math.log(2 / delta)) ** 0.5, 1.0) / epsilon: 2 -> 3": (
        "where a search starts"
    ),
    "high = max((2 * rounds * math.log(2 / delta)) ** 0.5, 1.0) / epsilon: "
    "(2 * rounds * math.log(2 / delta)) ** 0.5 -> (2 * rounds * math.log(2 / delta) * 0.5)": (
        "where a search starts"
    ),
    "name = hashlib.sha256(np.asarray(own.key).tobytes()).hexdigest()[:32]: "
    "np.asarray(own.key) -> (own.key)": "an array of JAX has the same bytes",
    "accountant = pld.PLDAccountant(: pld.PLDAccountant( dp.NeighboringRelation.ADD_OR_REMOVE_ONE, "
    "value_discretization_interval=_interval(z, 1 if rate else rounds, mechanism), ) -> "
    "(pld.PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE))": "a bound as good, in minutes",
    "mlir.register_lowering(_primitive, mlir.lower_fun(_reduce, multiple_results=False)): "
    "mlir.lower_fun(_reduce, multiple_results=False) -> (mlir.lower_fun(_reduce))": (
        "newer versions of JAX flatten results themselves"
    ),
    "magnitude = jnp.pad(lax.stop_gradient(jnp.abs(x)), (0, extra), constant_values=-1): 1 -> 2": (
        "any negative number is less than all magnitudes"
    ),
    "share = jnp.clip(weight.astype(wide(weight.dtype)) / max_weight, 0, 1): 1 -> 2": (
        "_integer clips it, too"
    ),
    'axis = place if place < layout.index("s") else x.ndim - len(layout) + place: '
    "place < layout.index(\"s\") -> (place <= layout.index('s'))": (
        "the letter is never that of space"
    ),
    "return [x if len(x) == end - start else lax.slice_in_dim(x, start, end) for x in rows]: "
    "end - start -> (end + start)": "rows that start late are fewer than all",
    "size = (conv.space[i] - 1) * conv.lhs_dilation[i] + 1: (conv.space[i] - 1) * "
    "conv.lhs_dilation[i] + 1 -> ((conv.space[i] - 1) * conv.lhs_dilation[i] - 1)": (
        "in _Slices, where no slice reads the rest of the padding"
    ),
    "self._before = 0: 0 -> 1": "only the order of places matters",
    "inner = _jaxpr.opened(jaxpr): _jaxpr.opened(jaxpr) -> (jaxpr)": (
        "newer versions of JAX have one class for both kinds of jaxprs"
    ),
    "return fused.jaxpr if inner is jaxpr else fused: inner is jaxpr -> (inner is not jaxpr)": (
        "newer versions of JAX have one class for both kinds of jaxprs"
    ),
    "if not still.issuperset(_jaxpr.variables(pick(moved, jaxpr.jaxpr.outvars))):: "
    "_jaxpr.variables(pick(moved, jaxpr.jaxpr.outvars)) -> (pick(moved, jaxpr.jaxpr.outvars))": (
        "if an output is a literal, calls are inlined that need not be"
    ),
}

# What stands for all lines of all files, in tests that start processes.
PROCESS = ("any", -1)

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A change of a file: the text between two offsets, which is on these lines, is replaced."""

    path: str
    lines: tuple[int, int]
    start: int
    stop: int
    text: str
    before: str
    after: str

    @property
    def name(self) -> str:
        """The line in which the change begins, and the change."""
        parts = self.text, self.before, self.after
        text, before, after = (" ".join(part.split()) for part in parts)
        return f"{text}: {before} -> {after}"

    def apply(self, source: str) -> str:
        return source[: self.start] + self.after + source[self.stop :]


class Finder(ast.NodeVisitor):
    """Finds the mutants of a file. Types, messages, assertions and reprs stay as they are."""

    def __init__(self, path: str, source: str):
        self.path, self.source, self.found = path, source, list[Mutant]()
        lines = source.splitlines(keepends=True)
        self.lines = [line.encode() for line in lines]
        self.starts = [0]
        for line in lines:
            self.starts.append(self.starts[-1] + len(line))
        for node in ast.parse(source).body:
            if not isinstance(node, ast.Assign):  # aliases of types, and tables of numbers
                self.visit(node)

    def offset(self, line: int, column: int) -> int:
        return self.starts[line - 1] + len(self.lines[line - 1][:column].decode())

    def add(self, node: ast.expr | ast.stmt, after: str) -> None:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = self.offset(node.lineno, node.col_offset)
        stop = self.offset(node.end_lineno, node.end_col_offset)
        lines = node.lineno, node.end_lineno
        text = self.lines[node.lineno - 1].decode()
        before = self.source[start:stop]
        self.found.append(Mutant(self.path, lines, start, stop, text, before, after))

    def replace(self, node: ast.expr, **changes: object) -> None:
        """The same expression with other parts."""
        parts = {name: getattr(node, name) for name in node._fields} | changes
        self.add(node, f"({ast.unparse(type(node)(**parts))})")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name == "__repr__":
            return
        for default in (*node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def leave(self, node: ast.AST) -> None:
        pass

    visit_Assert = visit_Import = visit_ImportFrom = visit_JoinedStr = leave  # noqa: N815

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "pass")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # documentation
            self.add(node, "pass")
            self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass")
        self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {x.id for target in node.targets for x in ast.walk(target) if _is_name(x)}
        if names & {x.id for x in ast.walk(node.value) if _is_name(x)}:
            self.add(node, "pass")  # the names have values already
        self.visit(node.value)

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        if not isinstance(node.test, ast.Compare | ast.UnaryOp):
            self.add(node.test, f"(not ({ast.unparse(node.test)}))")
        self.generic_visit(node)

    visit_IfExp = visit_If  # noqa: N815

    def visit_Compare(self, node: ast.Compare) -> None:
        for number, operator in enumerate(node.ops):
            ops = [*node.ops]
            ops[number] = OPERATORS[type(operator)]()
            self.replace(node, ops=ops)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp | ast.BoolOp) -> None:
        if not _is_text(getattr(node, "left", None)):
            self.replace(node, op=OPERATORS[type(node.op)]())
            self.generic_visit(node)

    visit_BoolOp = visit_BinOp  # noqa: N815

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        self.add(node, f"({ast.unparse(node.operand)})")
        self.visit(node.operand)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.add(node, repr(not node.value))
        elif isinstance(node.value, int):
            self.add(node, repr(node.value + 1))
        elif isinstance(node.value, float):
            self.add(node, repr(2 * node.value or 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in ("isinstance", "cast"):
            return
        node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        for number, keyword in enumerate(node.keywords):
            if keyword.arg:
                rest = [*node.keywords[:number], *node.keywords[number + 1 :]]
                self.replace(node, keywords=rest)
        if name in ("astype", "reshape") and isinstance(node.func, ast.Attribute):
            self.add(node, f"({ast.unparse(node.func.value)})")
        elif _is_conversion(node, name):
            self.add(node, f"({ast.unparse(node.args[0])})")
        self.generic_visit(node)


def _is_conversion(node: ast.Call, name: str) -> bool:
    """Whether a call may make something similar out of its only argument."""
    only = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
    return only and name not in ("append", "iter", "list", "tuple")


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _is_text(node: object) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


class Recorder:
    """A plugin of pytest that notes which lines a test runs, and for how long."""

    def __init__(self, root: str):
        self.root, self.lines, self.tests = root, set[tuple[str, int]](), dict[str, tuple]()
        self.failed = list[str]()
        tool = sys.monitoring.COVERAGE_ID
        sys.monitoring.use_tool_id(tool, "mutants")
        sys.monitoring.register_callback(tool, sys.monitoring.events.LINE, self._note)
        sys.monitoring.set_events(tool, sys.monitoring.events.LINE)
        sys.addaudithook(self._note_process)

    def _note(self, code, line):
        if code.co_filename.startswith(self.root):
            self.lines.add((os.path.relpath(code.co_filename, self.root), line))
        return sys.monitoring.DISABLE

    def _note_process(self, event, arguments):
        if event == "subprocess.Popen":
            self.lines.add(PROCESS)

    def pytest_runtest_protocol(self, item, nextitem):
        self.lines.clear()
        sys.monitoring.restart_events()
        self.start = time.perf_counter()

    def pytest_runtest_logfinish(self, nodeid, location):
        found = sorted(x for x in self.lines if x == PROCESS or x[0].startswith("fax"))
        self.tests[nodeid] = time.perf_counter() - self.start, found

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def save(self, record: pathlib.Path) -> None:
        """Writes what was noted about tests that pass, with the source of the lines."""
        tests = {name: test for name, test in self.tests.items() if name not in self.failed}
        paths = sorted({path for _, lines in tests.values() for path, _ in lines} - {PROCESS[0]})
        sources = {path: pathlib.Path(self.root, path).read_text().splitlines() for path in paths}
        record.write_text(json.dumps({"sources": sources, "tests": tests}))


def forked(
    copy: pathlib.Path, arguments: list[str], limit: float, record: pathlib.Path | None = None
) -> str:
    """What tests of a copy of the tree say in a process of their own: "passed", or why not."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _pytest_in(copy, arguments, record)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    end, done = time.monotonic() + limit, 0
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return "passed" if os.waitstatus_to_exitcode(status) == 0 else "failed"
            time.sleep(0.02)
        return "too slow"
    finally:
        if not done:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _pytest_in(copy: pathlib.Path, arguments: list[str], record: pathlib.Path | None) -> int:
    """Runs pytest in a copy of the tree, in this process. Recording has a log."""
    os.setsid()
    os.chdir(copy)
    log = os.open(
        record.with_suffix(".log") if record else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.path[:0] = [str(copy)]
    os.environ["PYTHONPATH"] = str(copy)
    recorder = Recorder(str(copy)) if record else None
    options = ["-q", "-p", "no:cacheprovider", *([] if record else ["-x"])]
    code = pytest.main([*options, *arguments], plugins=[recorder] if recorder else [])
    import fax

    assert fax.__file__.startswith(str(copy))
    if recorder and record:
        recorder.save(record)
    return int(code)


def recorded(names: list[str], copy: pathlib.Path, again: list[str] | None) -> dict[str, dict]:
    """Tests: which lines they run, and for how long.

    Args:
      names: of test files.
      copy: of the tree.
      again: the test files to record again. If it is empty, all of them.
    """
    folder = ROOT / ".mutants"
    folder.mkdir(exist_ok=True)
    for name in names:
        record = folder / f"{name}.json"
        if not record.exists() or (again is not None and (name in again or not again)):
            print(f"Recording which lines tests/test_{name}.py runs.", flush=True)
            forked(copy, ["-o", f"testpaths=tests/test_{name}.py"], 3600, record)
    found: dict[str, dict] = {}
    for name in names:
        known = json.loads((folder / f"{name}.json").read_text())
        numbers = {path: _moved(lines, path) for path, lines in known["sources"].items()}
        numbers[PROCESS[0]] = {PROCESS[1]: PROCESS[1]}
        for test, (seconds, lines) in known["tests"].items():
            now = {(path, numbers[path].get(line)) for path, line in lines if path in numbers}
            found[test] = {"seconds": seconds, "lines": now}
    return found


def _moved(old: list[str], path: str) -> dict[int, int]:
    """Where the lines of a file are now, by where they were when tests were recorded."""
    new = (ROOT / path).read_text().splitlines() if (ROOT / path).exists() else []
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_matching_blocks()
    return {a + i + 1: b + i + 1 for a, b, size in blocks for i in range(size)}


def sources_of(group: str) -> list[pathlib.Path]:
    return sorted(path for name in GROUPS[group][0] for path in (ROOT / "fax").glob(name))


def tests_of(mutant: Mutant, tests: dict[str, dict], limit: float) -> tuple[list[str], float]:
    """The tests that run a mutant's lines, the quickest first, and how long they should take.

    Lines that run when a file is imported are held by all tests of the file, and a test that starts
    a process may run any line.
    """
    first, last = mutant.lines
    by_file = {
        name: [line for path, line in test["lines"] if path in (mutant.path, PROCESS[0]) and line]
        for name, test in tests.items()
    }
    by_line = {
        name: lines
        for name, lines in by_file.items()
        if any(first <= line <= last or line == PROCESS[1] for line in lines)
    }
    own = [(tests[name]["seconds"], name) for name, lines in (by_line or by_file).items() if lines]
    chosen, seconds = [], 0.0
    for more, name in sorted(own):
        if chosen and seconds + more > limit:
            break
        chosen.append(name)
        seconds += more
    return chosen, seconds


def tested(
    mutants: list[Mutant], tests: dict[str, dict], copy: pathlib.Path, limit: float, end: float
) -> Iterator[tuple[Mutant, str]]:
    """What becomes of mutants, until the time is up."""
    for mutant in mutants:
        if time.monotonic() > end:
            return
        names, seconds = tests_of(mutant, tests, limit)
        source = (copy / mutant.path).read_text()
        (copy / mutant.path).write_text(mutant.apply(source))
        result = forked(copy, names, 5 * seconds + 60) if names else "not run by any test"
        (copy / mutant.path).write_text(source)
        yield mutant, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--sample", type=int, default=100, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--files", nargs="+", help="only of these files, as in --files _norms")
    parser.add_argument("--tests", nargs="+", help="only by these test files")
    parser.add_argument("--survivors", action="store_true", help="only those that survived before")
    parser.add_argument("--seconds", type=float, default=600, help="of tests for each mutant")
    parser.add_argument("--minutes", type=float, default=600, help="in all")
    parser.add_argument("--record", nargs="*", help="find out again which lines these files run")
    options = parser.parse_args()
    found = [
        mutant
        for path in sources_of(options.group)
        for mutant in Finder(str(path.relative_to(ROOT)), path.read_text()).found
        if not options.files or pathlib.Path(mutant.path).stem in options.files
    ]
    sample = random.Random(options.seed).sample(found, min(options.sample, len(found)))
    log = ROOT / ".mutants" / f"{options.group}.txt"
    if options.survivors:
        before = {line[11:] for line in log.read_text().splitlines() if line.startswith("survived")}
        sample = [mutant for mutant in found if mutant.name in before]
    sys.dont_write_bytecode = True
    # What a mutant leaves as it is, is compiled once for all.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".mutants" / "cache")
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder).resolve()
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("fax", "tests", "examples", "benchmarks", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy)
        names = options.tests or GROUPS[options.group][1]
        tests = recorded(names, copy, options.record)
        if forked(copy, ["--collect-only", *tests], 600) != "passed":
            parser.error("some tests are no longer there; record them again, by --record")
        print(f"{len(sample)} of {len(found)} mutants, {len(tests)} tests", flush=True)
        results: dict[str, list[Mutant]] = {}
        end = time.monotonic() + 60 * options.minutes
        for mutant, result in tested(sample, tests, copy, options.seconds, end):
            if result in ("passed", "not run by any test"):
                result = "equivalent" if mutant.name in EQUIVALENT else "survived"
                if result == "survived":
                    print(f"{mutant.path}: {mutant.name}", flush=True)
            results.setdefault(result, []).append(mutant)
            with log.open("a") as lines:
                lines.write(f"{result:10} {mutant.name}\n")
    for mutant in results.get("too slow", []):
        print(f"too slow: {mutant.path}: {mutant.name}")
    counts = {result: len(own) for result, own in results.items()}
    killed = counts.get("failed", 0) + counts.get("too slow", 0)
    total = sum(counts.values()) - counts.get("equivalent", 0)
    print(f"{killed} of {total} killed, {100 * killed / max(1, total):.1f} %; {counts}")


if __name__ == "__main__":
    main()

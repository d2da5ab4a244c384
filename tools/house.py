"""Draws which part of fax imports from which, from the imports in its source.

    python tools/house.py

writes docs/house.svg, or reports what is wrong with the imports. It needs only Python.

A part is a package, such as `fax/data/`, or one of two groups of modules directly in `fax/`: those
that import no package of fax are the foundations, the others the operators. FLOORS defines the
order of the parts. Everything else comes from the source.
"""

from __future__ import annotations

import ast
import html
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).parent.parent
DRAWING = "docs/house.svg"

# From the bottom up: the parts on a floor, and what each is responsible for. A part imports from
# lower floors, and from parts on its own floor as long as there is no circle.
FLOORS = (
    {"foundations": "placements and their scope, checks of arguments, versions of JAX"},
    {
        "sharding": "what users see of devices: meshes, layouts, placing data, processes",
        "primitives": "JAX primitives with all of their rules, and the fusion pass",
        "lowering": "how one federated_map becomes XLA",
    },
    {"operators": "pytrees, messages, fax.program"},
    {
        "data": "where clients' examples come from, and the cohorts that programs work on",
        "metrics": "statistics that add up, and evaluation as a federated program",
        "drjax": "the operators under DrJAX's names",
    },
    {
        "fax": "the public names",
        "inspect": "what a program costs, read from what XLA compiles it to",
        "aggregators": "what happens to clients' updates on their way to the server",
        "models": "benchmark models as pure functions of their parameters",
        "algorithms": "federated algorithms: pure functions of a server's state and a cohort",
    },
    {
        "tasks": "data, a model, metrics and settings together",
        "deploy": "programs as plans that run where the data are, and their audits",
    },
    {"experiment": "a run of many rounds: its configuration, its loop and its folder"},
    {"command": "experiments from the shell"},
)
KNOWS = {part: knows for floor in FLOORS for part, knows in floor.items()}
FLOOR_OF = {part: number for number, floor in enumerate(FLOORS) for part in floor}
# The requirements of the core: all that `import fax` may need.
DEPENDENCIES = {"jax", "numpy"}


class _WithoutTypeChecking(ast.NodeTransformer):
    """Removes imports that only type checkers run."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        if re.fullmatch(r"(\w+\.)?TYPE_CHECKING", ast.unparse(node.test)):
            return node.orelse
        return self.generic_visit(node)


def read_modules(root: pathlib.Path) -> dict[str, ast.Module]:
    """The modules of fax by name, parsed."""
    modules = {}
    for path in sorted((root / "fax").rglob("*.py")):
        names = path.relative_to(root).with_suffix("").parts
        name = ".".join(names[:-1] if names[-1] == "__init__" else names)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules[name] = _WithoutTypeChecking().visit(tree)
    return modules


def imported(tree: ast.AST, modules: dict[str, ast.Module]) -> set[str]:
    """What is imported anywhere in a syntax tree: modules of fax, and names of packages."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno} has a relative import; write its whole name")
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                names.add(inside if inside in modules else str(node.module))
    return {name if name.split(".")[0] == "fax" else name.split(".")[0] for name in names}


def needed_at_import(tree: ast.Module, modules: dict[str, ast.Module]) -> set[str]:
    """The packages that a module imports outside of functions."""
    found: set[str] = set()
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= imported(node, modules)
    return {name for name in found if name.split(".")[0] != "fax"} - sys.stdlib_module_names


def order(graph: dict[str, set[str]]) -> list[str]:
    """Nodes such that each comes after what it points to; raises ValueError at a circle."""
    done: list[str] = []
    under_way: list[str] = []

    def visit(node: str) -> None:
        if node in under_way:
            raise ValueError(" -> ".join([*under_way[under_way.index(node) :], node]))
        if node not in done:
            under_way.append(node)
            for other in sorted(graph[node]):
                visit(other)
            under_way.pop()
            done.append(node)

    for node in sorted(graph):
        visit(node)
    return done


class House:
    """The modules of fax, the parts that they belong to, and who imports whom.

    Attributes:
      edges: for each module, the modules of fax that it imports.
      part: the part of each module.
      uses: for each part, the other parts that it imports from.
      packages: for each module, the packages that it needs when it is imported.
    """

    def __init__(self, root: pathlib.Path):
        modules = read_modules(root)
        self.edges = {
            name: (imported(tree, modules) & set(modules)) - {name}
            for name, tree in modules.items()
        }
        self.part = {name: self._part(name) for name in modules}
        self.uses: dict[str, set[str]] = {part: set() for part in self.part.values()}
        for name, others in self.edges.items():
            self.uses[self.part[name]] |= {self.part[other] for other in others}
        for part in self.uses:
            self.uses[part].discard(part)
        self.packages = {name: needed_at_import(tree, modules) for name, tree in modules.items()}

    def reached(self, name: str) -> set[str]:
        """A module, what it imports, what that imports, and so on."""
        found, waiting = set(), [name]
        while waiting:
            at = waiting.pop()
            if at not in found:
                found.add(at)
                waiting += self.edges[at]
        return found

    def _part(self, name: str) -> str:
        pieces = name.split(".")
        if len(pieces) == 1:
            return name
        if pieces[1] == "__main__":
            return "command"
        if not pieces[1].startswith("_"):
            return pieces[1]
        alone = all(other.startswith("fax._") for other in self.reached(name))
        return "foundations" if alone else "operators"

    def problems(self) -> list[str]:
        """What breaks the rules, a sentence each."""
        found = [
            f"fax/{part}/ is on no floor: name it in FLOORS of tools/house.py"
            for part in self.uses
            if part not in FLOOR_OF
        ]
        for name, others in self.edges.items():
            for other in sorted(others):
                own, below = (FLOOR_OF.get(self.part[module]) for module in (name, other))
                if own is not None and below is not None and below > own:
                    found.append(
                        f"{name} imports {other}, which is upward: {self.part[name]} is below "
                        f"{self.part[other]}"
                    )
        for what, graph in (("modules", self.edges), ("parts", self.uses)):
            try:
                order(graph)
            except ValueError as circle:
                found.append(f"imports between {what} go in a circle: {circle}")
        for name in sorted(self.reached("fax")):
            if more := self.packages[name] - DEPENDENCIES:
                found.append(
                    f"{name} imports {', '.join(sorted(more))}, but import fax may need "
                    f"{' and '.join(sorted(DEPENDENCIES))} alone"
                )
        return found

    def stories(self) -> list[str]:
        """The parts from the ground up: by floor, and on a floor by imports."""
        by_imports = order(self.uses)
        return [
            part
            for floor in FLOORS
            for part in sorted(floor, key=lambda p: by_imports.index(p) if p in by_imports else 0)
            if part in self.uses
        ]

    def modules_of(self, part: str) -> list[str]:
        """The modules of a part, each after what it imports."""
        return [name for name in order(self.edges) if self.part[name] == part]


# All in units of the drawing: where the dots begin and how far apart they are, the room for
# packages on their right, a letter of a module's name, a line, and the margin of a part.
MATRIX, DOT, PACKAGES, LETTER, LINE, PADDING = 600, 26, 150, 6.65, 15, 9


def draw(house: House) -> str:
    """The drawing, as SVG: the parts from the top down, their modules, and what they stand on."""
    stories = house.stories()[::-1]
    shapes = []
    y = 118

    def text(x: float, y: float, words: str, more: str = "") -> None:
        shapes.append(f'<text x="{x:g}" y="{y:g}"{more}>{html.escape(words)}</text>')

    columns = {part: MATRIX + 30 + DOT * i for i, part in enumerate(stories)}
    for part, x in columns.items():
        text(x + 4, y - 12, part, f' transform="rotate(-45 {x + 4:g} {y - 12})" font-size="12"')
    packages_x = MATRIX + 30 + DOT * len(stories) + 6
    text(packages_x, y - 12, "packages", ' font-size="12"')
    width = packages_x + PACKAGES

    mono = ' font-family="Menlo, Consolas, monospace" font-size="11" fill="#44546a"'
    for part in stories:
        names = [
            "__init__" if name == "fax" else name.removeprefix("fax.").removeprefix(f"{part}.")
            for name in house.modules_of(part)
            if name != f"fax.{part}"
        ]
        lines = textwrap.wrap(" ".join(names), int((MATRIX - 28) / LETTER), break_on_hyphens=False)
        height = 2 * PADDING + LINE * (1 + len(lines)) + 4
        fill = "#eef3fb" if FLOOR_OF[part] % 2 else "#fdf3e4"
        shapes.append(
            f'<rect x="10" y="{y}" width="{width - 20}" height="{height}" fill="{fill}" '
            'stroke="#44546a"/>'
        )
        label = part if part in ("foundations", "operators", "fax") else f"{part}/"
        text(20, y + PADDING + 12, label, ' font-weight="bold"')
        text(132, y + PADDING + 12, KNOWS[part])
        for number, line in enumerate(lines):
            text(20, y + PADDING + 14 + LINE * (number + 1), line, mono)
        middle = y + height / 2
        for other, x in columns.items():
            if other == part:
                shapes.append(
                    f'<rect x="{x - 4}" y="{middle - 4:g}" width="8" height="8" fill="none" '
                    'stroke="#44546a"/>'
                )
            elif other in house.uses[part]:
                shapes.append(f'<circle cx="{x}" cy="{middle:g}" r="4.5"/>')
        packages = set().union(*(house.packages[name] for name in house.modules_of(part)))
        lines = textwrap.wrap(" ".join(sorted(packages)), int(PACKAGES / LETTER))
        for number, line in enumerate(lines):
            at = middle + 4 + (number - (len(lines) - 1) / 2) * LINE
            text(packages_x, at, line, ' font-size="11"')
        y += height
    caption = (
        "A dot: the part on the left imports from the part above the dot. All dots are right of "
        "the squares: no import goes upward. Modules come after those that they import."
    )
    text(10, y + 22, caption, ' font-size="12"')
    body = "\n  ".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 36}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="13" fill="#1f2a3c">\n'
        "  <title>The parts of fax, from the top down, and which imports from which.</title>\n"
        f'  <rect width="{width}" height="{y + 36}" fill="#ffffff"/>\n'
        f"  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    found = House(ROOT)
    if found.problems():
        sys.exit("\n".join(found.problems()))
    (ROOT / DRAWING).write_text(draw(found), encoding="utf-8")

"""Prints the changes of a version, from the changelog, as the notes of its release.

    python tools/release_notes.py v0.1.0

Fails if the tag, the version of the package and the changelog do not agree. Needs Python alone.
"""

from __future__ import annotations

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def notes(tag: str, changelog: str, version: str) -> str:
    """The section of the changelog for this tag, without its heading."""
    if tag != f"v{version}":
        raise SystemExit(f"the tag is {tag}, but the version of fax is {version}: tag v{version}.")
    sections = re.split(r"^## \[([^\]]+)\](.*)$", changelog, flags=re.M)[1:]
    found = {sections[i]: sections[i + 1 : i + 3] for i in range(0, len(sections), 3)}
    if version not in found:
        raise SystemExit(f"CHANGELOG.md has no section [{version}]. Rename [Unreleased] to it.")
    date, text = found[version]
    if not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", date.rstrip()):
        raise SystemExit(
            f"CHANGELOG.md has no date for [{version}], as in [{version}] - 2030-01-31."
        )
    return text.strip()


if __name__ == "__main__":
    (tag,) = sys.argv[1:]
    source = (ROOT / "fax" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.*)"$', source, re.M)[1]  # type: ignore[index]
    print(notes(tag, (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version))

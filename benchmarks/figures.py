"""Figures that take long to compile, kept in a file so that nothing is compiled twice."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any


class Figures:
    """What has been compiled, by what it is."""

    def __init__(self, path: pathlib.Path | None):
        self._path = path
        self.rows: dict[str, Any] = {}
        if path is not None and path.exists():
            self.rows = json.loads(path.read_text())

    def of(self, key: str, measure: Callable[[], Any]) -> Any:
        if key not in self.rows:
            self.rows[key] = measure()
            print(key, self.rows[key], file=sys.stderr, flush=True)
            if self._path is not None:
                self._path.write_text(json.dumps(self.rows, indent=1))
        return self.rows[key]

"""Tables in Markdown."""

from __future__ import annotations

from typing import Any

Table = dict[str, Any]  # title, columns, rows


def show(table: Table) -> None:
    """Prints a table. A row is a dict by column; missing cells stay empty."""
    columns = table["columns"]
    cells = [[shown(row.get(column)) for column in columns] for row in table["rows"]]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(f"\n{table['title']}\n")
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |")


def shown(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.{2 if value < 100 else 0}f}"


def verdict(text: str, met: bool) -> str:
    return f"{text}: {'met' if met else 'missed'}"

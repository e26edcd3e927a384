"""Tables that can be read at any width: what does not fit is left out and named, or goes on below; nothing is blank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

EDGES = 3
"""Columns of the screen that one more column takes beside its text: a space on either side, and a line."""

NARROWEST_KEY = 12
"""Characters; a key is folded to no less, and to no less than twice as many to spare a further table."""


@dataclass
class Grid:
    """A table whose first columns say what a row is, and whose others are figures.

    Args:
        title: printed above it.
        keys: headings of the first columns, flush left; they are always there.
        values: headings of the figures, flush right.
        dropped_first: of ``values``, the ones that are left out where there is no room, the first one first.
        elsewhere: how to see what was left out.
    """

    title: str
    keys: Sequence[str]
    values: Sequence[str]
    dropped_first: Sequence[str] = ()
    elsewhere: str = "a wider terminal"
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        """One row, a cell for every key and every value."""
        if len(cells) != len(self.keys) + len(self.values):
            raise ValueError(f"cells: expected {len(self.keys) + len(self.values)}, got {len(cells)}")
        self.rows.append(cells)

    def show(self, console: Console) -> None:
        """Print the table. Columns that do not fit are dropped where ``dropped_first`` names them, and else follow in
        further tables, the keys repeated; only a key is ever folded into several lines."""
        console.print(self.title, style="italic", soft_wrap=True, highlight=False)
        values = list(range(len(self.keys), len(self.keys) + len(self.values)))
        keys = [self._width(column) for column in range(len(self.keys))]
        room, folded = (
            console.width - 1 - sum(w + EDGES for w in widths)
            for widths in (keys, [min(w, 2 * NARROWEST_KEY) for w in keys])
        )
        left_out = []
        for heading in self.dropped_first:
            if self._wide(values) <= room:
                break
            values.remove(len(self.keys) + list(self.values).index(heading))
            left_out.append(heading)
        room = room if self._wide(values) <= room else folded
        while values:
            band = [values.pop(0)]
            while values and self._wide([*band, values[0]]) <= room:
                band.append(values.pop(0))
            console.print(self._table(band, console.width))
        if left_out:
            names = ", ".join(left_out)
            console.print(f"not shown for lack of room: {names} ({self.elsewhere} has them)", soft_wrap=True)

    def _headings(self) -> list[str]:
        return [*self.keys, *self.values]

    def _width(self, column: int) -> int:
        """Of the text alone."""
        return max(cell_len(text) for text in (self._headings()[column], *(row[column] for row in self.rows)))

    def _wide(self, columns: Sequence[int]) -> int:
        return sum(self._width(column) + EDGES for column in columns)

    def _table(self, band: Sequence[int], width: int) -> Table:
        """Keys and these values; where even that is too wide, the widest keys fold."""
        table, keys = Table(), range(len(self.keys))
        widths = {column: self._width(column) for column in (*keys, *band)}
        while (over := 1 + sum(w + EDGES for w in widths.values()) - width) > 0:
            widest = max(keys, key=lambda column: widths[column])
            if widths[widest] <= NARROWEST_KEY:
                break
            widths[widest] = max(NARROWEST_KEY, widths[widest] - over)
        for column, room in widths.items():
            side: Literal["left", "right"] = "left" if column in keys else "right"
            table.add_column(self._headings()[column], justify=side, width=room, overflow="fold")
        for row in self.rows:
            cells = (folded_at(row[column], room) if column in keys else row[column] for column, room in widths.items())
            table.add_row(*cells)
        return table


def folded_at(text: str, width: int) -> str:
    """The text in lines of at most ``width`` where it has a dot, a comma or a space to break at; nothing is lost."""
    lines = [""]
    for piece in re.findall(r"[^., ]*[., ]?", text):
        if cell_len(lines[-1]) + cell_len(piece.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)

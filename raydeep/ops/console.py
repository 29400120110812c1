"""What a terminal shows: one live line a stage; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from raydeep.errors import shown

PLAIN_EVERY_S = 15.0  # seconds between two plain lines of one stage


class Stage:
    """One stage of a run: a live line while it runs, a plain line when it is done."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.start = self.last = time.monotonic()
        self.text = ""
        self.live: Live | None = None

    def __enter__(self) -> Stage:
        if self.console.is_terminal:
            self.bar = Progress(
                SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(self.name, total=None, text="starting")
            self.live = Live(self.bar, console=self.console, transient=True)
            self.live.start()
        return self

    def update(self, done: int, total: int, text: str = "") -> None:
        """Move on."""
        self.text = text
        if self.live is not None:
            self.bar.update(self.task, completed=done, total=total, text=escape(f"{done}/{total} {shown(text)}"))
        elif time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            self.console.print(f"  {self.name}: {done}/{total} {shown(text)}", highlight=False, markup=False)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a small table below the line, where there is a terminal."""
        if self.live is not None:
            table = Table(header_style="dim", box=None, padding=(0, 2, 0, 2))
            for i, column in enumerate(columns):
                table.add_column(column, justify="right" if i else "left", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            self.live.update(Group(self.bar, table))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        if kind is None:
            took = time.monotonic() - self.start
            text = escape(shown(self.text))  # a path may hold [/] or escape sequences
            self.console.print(f"[green]✓[/] {self.name:<10} {text} [dim]({took:.1f} s)[/]", highlight=False)


class Ui:
    """The terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = 120  # a file has no width: the table must not be cut to 80 columns

    def stage(self, name: str) -> Stage:
        """Start a stage; use as a context manager."""
        return Stage(self.console, name)

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(shown(text), highlight=False, markup=False)

    def front(self, dense: dict[str, Any], models: list[dict[str, Any]]) -> None:
        """The Pareto table."""
        table = Table(title=None, header_style="bold", box=None, pad_edge=False)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
        for row in (dense, *models):
            table.add_row(*cells(row))
        self.console.print(table, soft_wrap=False)


COLUMNS = (
    "model",
    "test acc",
    "val acc",
    "bytes",
    "onnx",
    "smaller",
    "faster",
    "sparsity",
    "W bits",
    "A bits",
    "distilled",
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the Pareto table, as text."""

    def bits(value: float | None) -> str:
        return "float" if value is None else f"{value:g}"

    return [
        row["label"], f"{row['test_accuracy']:.2%}", f"{row['val_accuracy']:.2%}", f"{row['bytes']:,}",
        f"{row['onnx_bytes']:,}", f"{row['compression_ratio']:.1f}×",
        f"{row['latency_ratio']:.2f}×", f"{row['sparsity']:.0%}", bits(row["weight_bits"]),
        bits(row["activation_bits"]), "yes" if row["distill"] else "no",
    ]  # fmt: skip

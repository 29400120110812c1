"""What a terminal shows: one live line a stage; plain lines where there is no terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_EVERY_S = 15.0  # seconds between two plain lines of one stage


class Stage:
    """One stage of a run: a live line while it runs, a plain line when it is done."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.start = self.last = time.monotonic()
        self.text = ""
        self.live: Progress | None = None

    def __enter__(self) -> Stage:
        if self.console.is_terminal:
            self.live = Progress(
                SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(bar_width=24),
                TextColumn("{task.fields[text]}"), TimeElapsedColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self.task = self.live.add_task(self.name, total=None, text="starting")
            self.live.start()
        return self

    def update(self, done: int, total: int, text: str = "") -> None:
        """Move on."""
        self.text = text
        if self.live is not None:
            self.live.update(self.task, completed=done, total=total, text=f"{done}/{total} {text}")
        elif time.monotonic() - self.last > PLAIN_EVERY_S:
            self.last = time.monotonic()
            self.console.print(f"  {self.name}: {done}/{total} {text}", highlight=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()
        if kind is None:
            took = time.monotonic() - self.start
            self.console.print(f"[green]✓[/] {self.name:<10} {self.text} [dim]({took:.1f} s)[/]", highlight=False)


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
        self.console.print(text, highlight=False, markup=False)

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

"""What a job tells while it runs: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

LINE_SECONDS = 10.0


class Progress(Protocol):
    """Is told of rows, with or without a vector, and the tokens that they cost."""

    def resumed(self, rows: int, tokens: int) -> None:
        """Earlier runs have done so much, which says nothing of the speed."""

    def done(self, rows: int, tokens: int) -> None:
        """So much more is done."""

    def close(self) -> None:
        """There is no more to tell."""


class Bar:
    """tqdm's bar, with tokens beside it."""

    def __init__(self, rows: int) -> None:
        """Show it."""
        from tqdm import tqdm

        self._bar: Any = tqdm(total=rows, unit=" rows", dynamic_ncols=True, file=sys.stderr)
        self._speed = _Speed(rows)

    def resumed(self, rows: int, tokens: int) -> None:
        """Begin the bar there."""
        self._speed.resumed(rows, tokens)
        self._bar.initial = self._bar.n = rows
        self._bar.refresh()

    def done(self, rows: int, tokens: int) -> None:
        """Advance it."""
        self._speed.done(rows, tokens)
        self._bar.set_postfix_str(self._speed.tokens_told, refresh=False)
        self._bar.update(rows)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, rows: int, out: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        """Tell nothing yet."""
        self._out, self._clock = out, clock
        self._speed = _Speed(rows, clock)
        self._told = clock()

    def resumed(self, rows: int, tokens: int) -> None:
        """Say where the job goes on."""
        self._speed.resumed(rows, tokens)
        if rows:
            print(f"going on after {rows:,} rows", file=self._out, flush=True)

    def done(self, rows: int, tokens: int) -> None:
        """Print a line if it is time to."""
        self._speed.done(rows, tokens)
        if self._clock() >= self._told + LINE_SECONDS:
            self._told = self._clock()
            print(self._speed, file=self._out, flush=True)

    def close(self) -> None:
        """Print how it ended."""
        print(self._speed, file=self._out, flush=True)


class _Speed:
    """Rows and tokens in all, and by second of this run."""

    def __init__(self, rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._all, self._clock = rows, clock
        self._rows = self._tokens = self._rows_before = self._tokens_before = 0
        self._begun = clock()

    def resumed(self, rows: int, tokens: int) -> None:
        self._rows = self._rows_before = rows
        self._tokens = self._tokens_before = tokens
        self._begun = self._clock()

    def done(self, rows: int, tokens: int) -> None:
        self._rows += rows
        self._tokens += tokens

    @property
    def tokens_told(self) -> str:
        seconds = max(self._clock() - self._begun, 1e-9)
        return f"{(self._tokens - self._tokens_before) / seconds:,.0f} tokens/s, {self._tokens:,} tokens"

    def __str__(self) -> str:
        fresh = self._rows - self._rows_before
        seconds = self._clock() - self._begun
        left = f"{(self._all - self._rows) * seconds / fresh:,.0f} s left" if fresh else "no speed yet"
        return f"{self._rows:,} of {self._all:,} rows, {self.tokens_told}, {left}"


def progress(rows: int) -> Progress:
    """Return a bar where somebody watches, else lines."""
    return Bar(rows) if sys.stderr.isatty() else Lines(rows, sys.stderr)

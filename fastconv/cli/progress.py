"""A bar that shows how far a command has come."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A bar on standard error where that is a terminal: tqdm's if it is installed, or a plain line."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total, self._done = total, 0
        self._on = not quiet and sys.stderr.isatty()
        self._bar = self._tqdm() if self._on else None

    def _tqdm(self) -> Any:
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(total=self._total, file=sys.stderr, leave=False, dynamic_ncols=True)

    def show(self, what: str) -> None:
        """Say what is being done."""
        if self._bar is not None:
            self._bar.set_description(what)
        elif self._on:
            self._line(f"[{self._done + 1}/{self._total}] {what}")

    def step(self) -> None:
        """One more is done; make room for what is printed next."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.clear()
        elif self._on:
            self._line("")

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
        elif self._on:
            self._line("")

    def _line(self, text: str) -> None:
        sys.stderr.write(f"\r{text:<70}\r" if not text else f"\r{text[:70]:<70}")
        sys.stderr.flush()

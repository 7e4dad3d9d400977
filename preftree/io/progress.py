"""Progress of anything that may take longer than a few seconds: how far, how fast, how long still."""

from __future__ import annotations

import time

from rich.console import Console

#: Seconds before the first word, and between two where the output is no terminal.
PATIENCE = 5.0


class Progress:
    """Called with (done, in all; None where nobody knows); says nothing about work that ends within `PATIENCE` seconds.

    Args:
        console: where to say it; on a terminal one line is rewritten.
        label: what is being done.
        unit: what is counted.
    """

    def __init__(self, console: Console, label: str, unit: str) -> None:
        self.console, self.label, self.unit = console, label, unit
        self.started = self.said = time.perf_counter()
        self.open_line = False

    def __call__(self, done: int, total: int | None) -> None:
        now = time.perf_counter()
        pause = 0.2 if self.open_line else PATIENCE
        if (total is None or done < total) and now - self.said >= pause:
            rate = done / (now - self.started)
            left = "?" if total is None or not rate else clock((total - done) / rate)
            of = "" if total is None else f"/{total}"
            self._say(f"{self.label}{done}{of} {self.unit}, {rate:.3g} per second, {left} left")
            self.said = now
        elif total is not None and done >= total and self.open_line:
            self._say("")
            self.open_line = False

    def _say(self, text: str) -> None:
        if self.console.is_terminal:
            self.console.file.write(f"\r\x1b[2K{text}")
            self.console.file.flush()
            self.open_line = True
        else:
            self.console.print(text, markup=False, highlight=False)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    whole = max(0, round(seconds))
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def amount(size: float) -> str:
    """Bytes as 12 MiB or 1.4 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.{0 if size >= 10 * 2**20 else 1}f} MiB"

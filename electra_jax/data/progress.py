"""One live bar on a terminal, one plain line every few seconds otherwise."""

import sys
import time

_LINE_EVERY_S = 10.0


class Progress:
    """Shows how far a pass over the text is: MB of text, MB/s, documents, tokens, and what is left when known."""

    def __init__(self, name: str, enabled: bool = True):
        self._name, self._enabled, self._bar = name, enabled, None
        self._started = self._shown = time.perf_counter()
        self._text_bytes = 0

    def __enter__(self):
        self._started = self._shown = time.perf_counter()
        if self._enabled and sys.stdout.isatty():
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar
            self._bar = Bar(TextColumn(self._name), BarColumn(), TextColumn("{task.description}"), refresh_per_second=4)
            self._bar.start()
            self._task = self._bar.add_task("reading", total=None)
        return self

    def __exit__(self, *_):
        if self._bar:
            self._bar.stop()

    def update(self, text_bytes: int, tokens: int, documents: int, counters: dict) -> None:
        """Adds `text_bytes`; `tokens` of this run and `documents` are totals; counters as in `sources`."""
        self._text_bytes += text_bytes
        now = time.perf_counter()
        if not self._enabled or (not self._bar and now - self._shown < _LINE_EVERY_S):
            return
        self._shown = now
        elapsed_s = now - self._started
        read, total = counters.get("bytes_read", 0), counters.get("bytes_total", 0)
        text = (f"{self._text_bytes / 1e6:,.0f} MB, {self._text_bytes / 1e6 / elapsed_s:.1f} MB/s, "
                f"{documents:,} documents, {tokens:,} tokens")
        if read and total:
            left_s = elapsed_s * max(0, total - read) / read
            text += f", {min(1.0, read / total):.0%}, {left_s // 60:.0f}:{left_s % 60:02.0f} left"
        if self._bar:
            self._bar.update(self._task, description=text, completed=read, total=total or None)
        else:
            print(f"{self._name}: {text}", flush=True)

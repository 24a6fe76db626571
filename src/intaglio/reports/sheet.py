"""A sheet of paper on which pictures and words are laid, in inches from the top left, and pulled as a PNG."""

import math
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PAPER, INK, FAINT, RIGHT, WRONG = "#fbf8f1", "#22201d", "#6a645b", "#1f6b43", "#a3262a"
WIDTH, MARGIN, DPI = 9.6, 0.2, 128


class Sheet:
    """A heading, what to look for, and room below ``y`` inches; ``told`` keeps in words what the pictures show."""

    def __init__(self, title: str, look_for: str) -> None:
        self.title, self.look_for, self.told = title, look_for, list[str]()
        self.figure = Figure(figsize=(WIDTH, 1), dpi=DPI, facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.autoscale(False)
        self.bottom = 0.0
        y = self.text(MARGIN, 0.22, title, size=15, family="DejaVu Serif", weight="bold")
        self.y = self.text(MARGIN, y + 0.06, look_for, size=9.5, colour=FAINT) + 0.22

    def text(
        self,
        x: float,
        y: float,
        words: str,
        width: float = WIDTH - 2 * MARGIN,
        size: float = 8.5,
        colour: str = INK,
        lines: int = 8,
        **font: Any,
    ) -> float:
        """Words wrapped to ``width`` inches and cut after ``lines``, with the top at ``y``; returns where they end."""
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(words.split()))
        wrapped = textwrap.wrap(shown, int(width * 72 / (0.56 * size)), max_lines=lines, placeholder=" …")
        block = "\n".join(wrapped)
        self.axes.text(x, y, block, va="top", size=size, color=colour, linespacing=1.2, parse_math=False, **font)
        end = y + len(wrapped) * size * 1.25 / 72
        self.bottom = max(self.bottom, end)
        return end

    def picture(self, x: float, y: float, side: float, image: np.ndarray, frame: str | None = None) -> None:
        """An image uint8 (S, S, 3) as a square of ``side`` inches, on whole pixels of the sheet."""
        x, y = round(x * DPI) / DPI, round(y * DPI) / DPI
        kind = "nearest" if side * DPI % len(image) == 0 else "auto"
        self.axes.imshow(image, extent=(x, x + side, y + side, y), aspect="auto", interpolation=kind, zorder=1)
        edge, width = (frame, 3.0) if frame else (FAINT, 0.4)
        self.axes.add_patch(Rectangle((x, y), side, side, fill=False, zorder=2, edgecolor=edge, linewidth=width))
        self.bottom = max(self.bottom, y + side)

    def box(self, x: float, y: float, width: float, height: float, colour: str) -> None:
        """A filled rectangle."""
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", zorder=1))
        self.bottom = max(self.bottom, y + height)

    def line(
        self, x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray, colour: str = INK, width: float = 1.5
    ) -> None:
        """A line through points."""
        self.axes.plot(x, y, color=colour, linewidth=width, zorder=2, solid_capstyle="butt")
        self.bottom = max(self.bottom, *y)

    def save(self, path: Path) -> None:
        """Writes the sheet, as tall as what is on it."""
        height = math.ceil((self.bottom + MARGIN) * DPI) / DPI
        self.figure.set_size_inches(WIDTH, height)
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        with warnings.catch_warnings():
            # The box that is drawn for a missing glyph is seen by the reader; ``told`` has the true characters.
            warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
            self.figure.savefig(path, dpi=DPI, metadata={"Software": None})

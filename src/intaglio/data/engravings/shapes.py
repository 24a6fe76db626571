"""What each kind of thing looks like: outlines in unit coordinates, drawn by hand in hundredths, y downwards.

An ``Art`` is a list of marks, painted in order. Every art is centred on the origin and its longer side is 1.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Path = list[tuple[float, float]]
Use = Literal["body", "line", "dark", "gap"]

LIGHT, MIDDLE, DARK = 70, 110, 150  # share of ink in a body, of 255, before light falls on it


@dataclass(frozen=True)
class Mark:
    """One outline and its use: a shaded body, an engraved line, a dark hole, or a gap that shows what lies behind."""

    use: Use
    path: Path
    level: int = 0


@dataclass(frozen=True)
class Art:
    """Marks with their vertices in one array. ``points``: (V, 2) in [-0.5, 0.5]; ``half``: half width and height."""

    points: np.ndarray
    marks: tuple[tuple[Use, int, int, int], ...]
    half: tuple[float, float]


def assemble(*marks: Mark) -> Art:
    """Join marks into an ``Art``: centred, the longer side scaled to 1."""
    points = np.array([p for m in marks for p in m.path], dtype=np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    side = (high - low).max()
    ends = np.cumsum([len(m.path) for m in marks]).tolist()
    half = (high - low) / side / 2
    # six decimals: the last bits of a platform's cosine never reach a pixel
    return Art(
        np.round((points - (low + high) / 2) / side, 6),
        tuple((m.use, end - len(m.path), end, m.level) for m, end in zip(marks, ends, strict=True)),
        (float(half[0]), float(half[1])),
    )


def path(text: str) -> Path:
    """Vertices from ``"x y, x y, ..."``."""
    return [(float(x), float(y)) for x, y in (pair.split() for pair in text.split(","))]


def both(text: str) -> Path:
    """A symmetric outline from its right half, read from top to bottom."""
    right = path(text)
    return right + [(-x, y) for x, y in reversed(right)]


def smooth(points: Path, closed: bool = True, rounds: int = 2) -> Path:
    """Chaikin's corner cutting: exact in binary arithmetic, so the same everywhere."""
    for _ in range(rounds):
        pairs = list(zip(points, points[1:] + points[:1] if closed else points[1:], strict=False))
        cut = [((a * 3 + c) / 4, (b * 3 + d) / 4) for (a, b), (c, d) in pairs]
        far = [((a + c * 3) / 4, (b + d * 3) / 4) for (a, b), (c, d) in pairs]
        inner = [p for pair in zip(cut, far, strict=True) for p in pair]
        points = inner if closed else [points[0], *inner, points[-1]]
    return points


def arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, n: int = 28) -> Path:
    """An elliptic arc; degrees run clockwise from the right."""
    angles = [math.radians(start + (stop - start) * k / n) for k in range(n + (stop - start != 360))]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def scallop(x: float, y: float, rx: float, ry: float, lobes: int, depth: float = 0.2) -> Path:
    """A closed cloud: an ellipse with round lobes."""
    steps = 6
    turns = [(k / (lobes * steps), abs(math.sin(math.pi * k / steps))) for k in range(lobes * steps)]
    return [
        (
            x + rx * (1 - depth * (1 - s)) * math.cos(2 * math.pi * t),
            y + ry * (1 - depth * (1 - s)) * math.sin(2 * math.pi * t),
        )
        for t, s in turns
    ]


def leaf(x: float, y: float, dx: float, dy: float, width: float, droop: float = 0) -> Path:
    """A pointed leaf from (x, y) to (x + dx, y + dy), its tip bent down by ``droop``."""
    length = math.hypot(dx, dy)
    nx, ny = -dy / length * width, dx / length * width
    spine = [(x + dx * t, y + dy * t + droop * t * t, 4 * t * (1 - t)) for t in (0, 0.25, 0.5, 0.75, 1)]
    return [(a + nx * w, b + ny * w) for a, b, w in spine] + [(a - nx * w, b - ny * w) for a, b, w in spine[-2:0:-1]]


def _box(left: float, top: float, right: float, bottom: float) -> Path:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def arch(x: float, top: float, width: float, bottom: float) -> Path:
    """A door or window with a round head, centred on x."""
    half = width / 2
    return [*arc(x, top + half, half, half, 180, 360, 8), (x + half, bottom), (x - half, bottom)]


def _body(points: Path, level: int = MIDDLE) -> Mark:
    return Mark("body", points, level)


def _line(points: Path) -> Mark:
    return Mark("line", points)


def _dark(points: Path) -> Mark:
    return Mark("dark", points)


def _gap(points: Path) -> Mark:
    return Mark("gap", points)


def _lines(*texts: str) -> list[Mark]:
    return [_line(path(t)) for t in texts]


def _sloop() -> Art:
    return assemble(
        *_lines("0 -52, 0 24"),
        _dark(path("0 -54, 17 -49, 0 -44")),
        _body(path("4 -42, 22 -20, 34 -2, 41 15, 4 15"), LIGHT),
        _body(path("-4 -42, -12 -20, -24 0, -40 15, -4 15"), LIGHT),
        _body(smooth(path("-46 22, -46 22, 48 22, 48 22, 36 44, -30 44"), rounds=1), DARK),
        *_lines("-43 30, 44 30"),
    )


def _galleon() -> Art:
    def sail(x: float, top: float, bottom: float, w: float) -> Mark:
        right = [(x + w * 0.8, top), (x + w * 1.1, (top + bottom) / 2), (x + w, bottom)]
        foot = [(x, bottom - 4)]
        return _body(right + foot + [(2 * x - a, b) for a, b in reversed(right)], LIGHT)

    masts = [(-27, -38), (0, -50), (27, -40)]
    return assemble(
        *[_line([(x, top), (x, 16)]) for x, top in masts],
        *[_dark([(x, top), (x + 12, top + 4), (x, top + 7)]) for x, top in masts],
        *_lines("-44 10, -60 -6"),
        *[sail(x, top + 9, top + 25, 9) for x, top in masts],
        *[sail(x, top + 28, 7, 12) for x, top in masts],
        _body(path("-50 8, -38 8, -36 15, 24 15, 26 2, 52 -2, 47 22, 36 42, -30 42, -43 28"), DARK),
        *_lines("-44 22, 46 20", "-40 31, 42 30"),
        *[_dark(arc(x, 26, 2.2, 2.2, n=8)) for x in (-26, -10, 6, 22)],
    )


def _steamer() -> Art:
    puff = path("-12 -34, -10 -44, 2 -47, 8 -55, 24 -54, 32 -60, 54 -58, 50 -48, 34 -47, 26 -41, 10 -41, 0 -34")
    return assemble(
        _body(smooth(puff), LIGHT),
        *_lines("-40 14, -40 -30", "-40 -28, -26 0"),
        _body(path("-15 -32, -4 -32, -4 2, -15 2"), DARK),
        _body(path("9 -32, 20 -32, 20 2, 9 2"), DARK),
        _body(_box(-30, 0, 32, 16), LIGHT),
        *[_dark(_box(x, 4, x + 6, 10)) for x in (-24, -11, 2, 15)],
        _body(path("-54 10, 52 15, 44 42, -42 42"), DARK),
        *_lines("-50 21, 49 24"),
    )


def _lighthouse() -> Art:
    return assemble(
        _body(smooth(path("-32 54, -27 44, -14 40, 14 40, 28 45, 34 54"), rounds=1), DARK),
        _body(path("-10 -26, 10 -26, 17 46, -17 46"), LIGHT),
        _body(path("-11.5 -12, 11.5 -12, 13.3 6, -13.3 6"), 190),
        _body(path("-15.1 24, 15.1 24, 17 46, -17 46"), 190),
        _body(_box(-15, -32, 15, -26), DARK),
        _body(_box(-8, -46, 8, -32), LIGHT),
        _dark(_box(-3, -44, 3, -33)),
        _body(both("0 -60, 5 -54, 12 -46"), DARK),
        *_lines("-13 -42, -34 -49", "-13 -37, -35 -35", "13 -42, 34 -49", "13 -37, 35 -35"),
    )


def _turret() -> Art:
    return assemble(
        *_lines("0 -28, 0 -60"),
        _body(path("0 -60, 24 -53, 0 -45"), DARK),
        _body(path("-18 -24, 18 -24, 21 50, -21 50")),
        _body(both("5 -29, 5 -38, 13 -38, 13 -29, 18 -29, 18 -38, 27 -38, 27 -22"), DARK),
        _dark(arch(0, 24, 14, 50)),
        *[_dark(_box(x - 2, y, x + 2, y + 13)) for x, y in ((-9, -12), (9, -12), (0, 4))],
        *_lines("-18 20, -9 20", "10 18, 19 18", "-20 36, -11 36", "12 38, 20 38", "-17 -2, -12 -2"),
    )


def _steeple() -> Art:
    return assemble(
        *_lines("0 -52, 0 -66", "-5 -61, 5 -61"),
        _body(path("-18 -8, 18 -8, 18 50, -18 50")),
        _body(path("0 -56, 24 -6, -24 -6"), DARK),
        _body(path("18 18, 40 26, 40 50, 18 50"), LIGHT),
        _body(path("15 18, 22 8, 44 20, 44 27, 15 20"), DARK),
        _body(arc(0, 6, 9, 9, n=20), LIGHT),
        *_lines("0 6, 0 0", "0 6, 5 8"),
        _dark(arch(0, 28, 12, 50)),
        _dark(arch(29, 32, 7, 42)),
    )


def _oak() -> Art:
    return assemble(
        _body(smooth(path("-7 6, 7 6, 8 36, 18 50, 4 47, -3 50, -17 50, -8 36"), rounds=1), DARK),
        _body(scallop(0, -16, 42, 34, 11, 0.16)),
        *[_line(arc(x, y, 9, 7, 20, 160, 8)) for x, y in ((-16, -26), (12, -28), (-2, -10), (22, -8), (-22, -4))],
    )


def _pine() -> Art:
    def tier(top: float, bottom: float, w: float) -> Mark:
        hem = f"{w} {bottom}, {w * 0.62} {bottom - 4}, {w * 0.3} {bottom + 1}, 0 {bottom - 4}"
        return _body(both(f"0 {top}, {hem}"), DARK)

    return assemble(_body(_box(-5, 30, 5, 52), LIGHT), tier(2, 38, 34), tier(-24, 16, 27), tier(-54, -8, 19))


def _palm() -> Art:
    fronds = [(-42, 2, 18), (42, 0, 18), (-34, -22, 14), (34, -24, 14), (-12, -30, 4), (14, -31, 4)]
    return assemble(
        _body(smooth(path("-1 -20, 5 -20, 2 10, 3 34, 10 52, -12 52, -6 30, -5 8"), rounds=1), LIGHT),
        *_lines("-4 -4, 3 -5", "-5 8, 2 7", "-5 20, 2 20", "-6 32, 3 31", "-8 42, 5 42"),
        *[_body(leaf(2, -20, dx, dy, 6.5, droop), DARK) for dx, dy, droop in fronds],
        _dark(arc(-3, -15, 4, 4, n=10)),
        _dark(arc(6, -14, 4, 4, n=10)),
    )


def _cottage() -> Art:
    def window(x: float) -> list[Mark]:
        return [_dark(_box(x - 7, 10, x - 1, 24)), _dark(_box(x + 1, 10, x + 7, 24))]

    return assemble(
        _body(_box(18, -50, 29, -24), DARK),
        _body(_box(15, -53, 32, -48), LIGHT),
        _body(_box(-40, -6, 40, 44), LIGHT),
        _body(path("-30 -38, 30 -38, 50 0, -50 0"), DARK),
        *_lines("-35 -26, 35 -26", "-42 -13, 42 -13"),
        _dark(arch(0, 12, 15, 44)),
        *window(-25),
        *window(25),
    )


def _townhouse() -> Art:
    gable = "5 -58, 5 -46, 13 -46, 13 -34, 21 -34, 21 -22, 29 -22, 29 50"
    return assemble(
        _body(both(gable), LIGHT),
        *[_dark(arch(x, y, 9, y + 15)) for y in (-16, 6) for x in (-17, 0, 17)],
        _dark(arch(0, -40, 8, -27)),
        _dark(_box(-6, 30, 6, 50)),
        *[_dark(_box(x - 5, 30, x + 5, 41)) for x in (-18, 18)],
        *_lines("-29 3, 29 3", "-29 26, 29 26"),
    )


def _crescent() -> Art:
    outer = arc(0, 0, 50, 50, 48, 312, 36)
    inner = arc(19, 0, 37, 37, 290, 70, 30)
    brow = _line(arc(-30, -8, 6, 4, 200, 340, 6))
    return assemble(_body(outer + inner), brow, *_lines("-18 0, -12 8, -19 10", "-28 22, -16 20"))


def _full() -> Art:
    craters = [(-16, -18, 11), (16, 10, 14), (-20, 20, 8), (18, -24, 7), (-2, 34, 6)]
    return assemble(
        _body(arc(0, 0, 50, 50, n=40), LIGHT),
        *[_body(arc(x, y, r, r, n=16), 165) for x, y, r in craters],
    )


def _carp() -> Art:
    return assemble(
        _body(path("26 0, 56 -24, 50 0, 56 24"), DARK),
        _body(path("-14 -22, 0 -36, 18 -32, 16 -12"), DARK),
        _body(path("-2 20, 10 33, 16 30, 12 14"), DARK),
        _body(smooth(path("-50 2, -38 -16, -10 -27, 18 -16, 40 0, 18 16, -10 26, -38 16"), rounds=2), LIGHT),
        _line(arc(-34, 0, 12, 18, -62, 62, 10)),
        *[_line(arc(x, y, 6, 7, -80, 80, 8)) for x in (-10, 4, 18) for y in (-9, 8) if x < 18 or y > 0],
        *[_line(arc(x, 0, 6, 7, -80, 80, 8)) for x in (-4, 11, 25)],
        _dark(arc(-37, -5, 3.4, 3.4, n=10)),
    )


def _pike() -> Art:
    return assemble(
        _body(path("34 0, 54 -17, 49 0, 54 17"), DARK),
        _body(path("20 -9, 24 -22, 38 -18, 38 -5"), DARK),
        _body(path("20 9, 24 22, 38 18, 38 5"), DARK),
        _body(path("-14 11, -6 22, 2 20, 0 11"), DARK),
        _body(smooth(path("-58 3, -40 -6, -22 -14, 10 -13, 44 -3, 44 3, 10 13, -20 14, -40 9"), rounds=2), LIGHT),
        *_lines("-55 3, -40 3"),
        _line(arc(-28, 0, 10, 13, -66, 66, 8)),
        *[_line(path(f"{x} -9, {x + 4} 0, {x} 9")) for x in (-8, 3, 14, 25)],
        _dark(arc(-34, -4, 2.8, 2.8, n=10)),
    )


def _angelfish() -> Art:
    return assemble(
        _body(path("24 0, 50 -18, 43 0, 50 18"), DARK),
        _body(smooth(path("-12 -22, 24 -54, 38 -56, 28 -30, 22 -8"), rounds=1), DARK),
        _body(smooth(path("-12 22, 24 54, 38 56, 28 30, 22 8"), rounds=1), DARK),
        _body(smooth(path("-46 2, -18 -28, 16 -24, 34 0, 16 24, -18 28"), rounds=2), LIGHT),
        _body(path("-18 -22, -9 -24, -9 24, -18 23"), 190),
        _body(path("6 -22, 14 -19, 14 19, 6 22"), 190),
        _dark(arc(-29, -4, 3.2, 3.2, n=10)),
    )


def handle(x: float, y: float, rx: float, ry: float, side: int) -> list[Mark]:
    """An ear-shaped handle; ``side`` is 1 on the right and -1 on the left."""
    return [_body(arc(side * x, y, rx, ry, n=22), DARK), _gap(arc(side * x, y, rx - 5.5, ry - 5.5, n=18))]


def _amphora() -> Art:
    return assemble(
        *handle(15, -25, 15, 19, 1),
        *handle(15, -25, 15, 19, -1),
        _body(both("13 -54, 14 -49, 8 -46, 8 -28, 20 -18, 27 -4, 25 14, 14 34, 6 44, 13 50, 13 54")),
        *_lines("-13 -48, 13 -48", "-22 -14, 22 -14", "-25 9, 25 9", "-13 49, 13 49"),
        *_lines("-26 2, -18 -7, -9 2, 0 -7, 9 2, 18 -7, 26 2"),
    )


def _jug() -> Art:
    rim, right, left = (
        "-15 -50, -15 -50, 16 -40, 16 -40",
        "14 -28, 28 -6, 30 24, 22 46, 22 50",
        "-14 -28, -16 -40, -32 -50",
    )
    return assemble(
        *handle(24, -4, 20, 25, 1),
        _body(smooth(path(f"{rim}, {right}, -22 50, -22 46, -30 24, -28 -6, {left}"), rounds=1), LIGHT),
        *_lines("-13 -27, 14 -27", "-28 4, 28 4", "-30 20, 30 20"),
        *[_dark(arc(x, 12, 4, 4, n=10)) for x in (-18, 0, 18)],
    )


def _urn() -> Art:
    return assemble(
        _body(arc(0, -46, 5, 6, n=12), DARK),
        _body(both("4 -42, 20 -34, 27 -24"), DARK),
        _body(both("31 -24, 31 -18, 36 -4, 34 10, 22 26, 9 32, 9 40, 23 45, 23 51")),
        *_lines("-31 -17, 31 -17", "-34 7, 34 7", "-23 44, 23 44"),
        *[_line(path(f"{x * 1.1} 9, {x * 0.5} 29")) for x in (-22, -8, 8, 22)],
    )


def _peak() -> Art:
    return assemble(
        _body(path("-54 40, -30 2, -22 6, 2 -46, 14 -26, 20 -20, 30 -2, 36 0, 56 40"), DARK),
        _body(path("2 -46, 14 -26, 20 -20, 25 -12, 16 -14, 10 -4, 3 -16, -5 -4, -9 -15, -14 -11"), 30),
        *_lines("3 0, 12 20, 8 38", "-22 8, -14 22, -20 38", "30 4, 34 20, 30 34"),
    )


def _volcano() -> Art:
    plume = "-8 -20, -12 -32, -24 -36, -26 -50, -12 -56, -4 -64, 12 -62, 26 -64, 34 -52, 26 -42, 14 -38, 9 -30, 8 -20"
    return assemble(
        _body(smooth(path(plume)), LIGHT),
        _line(arc(-8, -46, 9, 7, 150, 340, 8)),
        _line(arc(14, -50, 8, 6, 190, 380, 8)),
        _body(path("-54 42, -32 12, -14 -20, -6 -15, 3 -19, 8 -15, 15 -20, 34 12, 56 42"), DARK),
        *_lines("-8 -14, -12 4, -7 16, -14 36", "6 -12, 9 8, 18 22, 16 38"),
    )


def _ridge() -> Art:
    return assemble(
        _body(path("-20 38, 4 -16, 10 -12, 24 -36, 34 -18, 40 -16, 62 38"), LIGHT),
        _body(path("-62 38, -40 -18, -34 -15, -24 -34, -14 -12, -8 -10, 14 38")),
        _body(path("-24 38, -6 10, 0 14, 10 -4, 20 14, 24 12, 42 38"), DARK),
        *_lines("-24 -28, -28 0, -20 20", "26 -28, 30 -6, 40 20", "10 4, 12 18, 8 34"),
    )


def _swallow() -> Art:
    return assemble(
        _body(smooth(path("-6 -2, 10 -30, 40 -52, 34 -24, 16 2"), rounds=1), DARK),
        _body(path("22 6, 54 2, 40 10, 54 24, 22 14"), DARK),
        _body(smooth(path("-8 4, -16 30, -4 54, 8 32, 18 10"), rounds=1), DARK),
        _body(smooth(path("-46 -3, -34 -10, -16 -10, 10 -3, 34 9, 6 15, -20 11, -34 4"), rounds=2), LIGHT),
        _dark(path("-37 -5, -52 -2, -36 1")),
        _dark(arc(-30, -3, 2.4, 2.4, n=8)),
        *_lines("4 -14, 30 -42", "10 -8, 30 -28", "-8 16, -5 42"),
    )


def _owl() -> Art:
    return assemble(
        _body(both("0 -42, 12 -44, 26 -54, 28 -34, 27 -20, 32 4, 28 30, 16 46, 0 50")),
        _body(smooth(path("-29 -12, -18 -4, -15 18, -22 44, -33 24, -36 4"), rounds=1), DARK),
        _body(smooth(path("29 -12, 18 -4, 15 18, 22 44, 33 24, 36 4"), rounds=1), DARK),
        *[_body(arc(x, -27, 11, 11, n=20), 25) for x in (-12, 12)],
        *[_dark(arc(x, -27, 5, 5, n=12)) for x in (-12, 12)],
        _dark(path("-4 -21, 4 -21, 0 -10")),
        *[_line(arc(x, y, 5, 5, 20, 160, 6)) for x, y in ((-7, 2), (7, 2), (0, 11), (-7, 20), (7, 20), (0, 29))],
        *_lines("-40 50, 40 50"),
        *[_line(path(f"{x} 46, {x} 54")) for x in (-10, -5, 5, 10)],
    )


def _swan() -> Art:
    neck = "-46 -31, -38 -42, -26 -44, -17 -34, -20 -18, -24 -4, -16 10, -34 18, -37 0, -30 -18, -28 -30, -34 -32"
    return assemble(
        _body(smooth(path("-38 14, -30 2, -8 -2, 20 2, 52 -16, 46 16, 30 34, -20 36, -36 28"), rounds=2), LIGHT),
        _body(smooth(path(neck), rounds=2), LIGHT),
        _body(smooth(path("-12 8, 14 -14, 50 -20, 40 2, 22 20, 0 22"), rounds=1)),
        *_lines("4 6, 36 -8", "8 14, 32 2"),
        _dark(path("-40 -36, -54 -27, -40 -29")),
        _dark(arc(-32, -38, 2.2, 2.2, n=8)),
        *_lines("-50 38, -24 38", "-10 41, 26 41", "36 38, 54 38"),
    )


def _cartwheel() -> Art:
    def spoke(turn: int) -> Mark:
        c, s = math.cos(math.pi * turn / 4), math.sin(math.pi * turn / 4)
        corners = ((9, 3), (40, 3), (40, -3), (9, -3))
        return _body([(r * c - w * s, r * s + w * c) for r, w in corners], LIGHT)

    return assemble(
        _body(arc(0, 0, 50, 50, n=40), DARK),
        _gap(arc(0, 0, 38, 38, n=36)),
        *[spoke(turn) for turn in range(8)],
        _line(arc(0, 0, 44, 44, 0, 359.99, 36)),
        _body(arc(0, 0, 13, 13, n=20), DARK),
        _dark(arc(0, 0, 4.5, 4.5, n=12)),
    )


def _cogwheel() -> Art:
    rim: Path = []
    for k in range(10):
        for turn, r in ((-0.28, 37), (-0.2, 50), (0.2, 50), (0.28, 37)):
            a = 2 * math.pi * (k + turn) / 10
            rim.append((r * math.cos(a), r * math.sin(a)))
    return assemble(
        _body(rim),
        _line(arc(0, 0, 31, 31, 0, 359.99, 32)),
        _body(arc(0, 0, 20, 20, n=24), LIGHT),
        _gap(arc(0, 0, 9, 9, n=16)),
    )


ART: dict[str, Art] = {
    draw.__name__[1:]: draw()
    for draw in (
        *(
            _sloop,
            _galleon,
            _steamer,
            _lighthouse,
            _turret,
            _steeple,
            _oak,
            _pine,
            _palm,
            _cottage,
            _townhouse,
            _crescent,
            _full,
        ),
        *(
            _carp,
            _pike,
            _angelfish,
            _amphora,
            _jug,
            _urn,
            _peak,
            _volcano,
            _ridge,
            _swallow,
            _owl,
            _swan,
            _cartwheel,
            _cogwheel,
        ),
    )
}

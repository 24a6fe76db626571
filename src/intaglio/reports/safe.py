"""Words that came with a file are a stranger's: here they are made harmless for each form that they are written in."""

import re
import unicodedata
from functools import cache
from html import escape

VISIBLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)
"""Characters that act and don't show: control codes and terminal escapes, marks of direction, halves of pairs."""

_MARKUP = re.compile(r"([\\`*_\[\]<>|~$&#{}])|(://)|\b(www)\.|(@)", re.IGNORECASE)
_AT_START = re.compile(r"^(\s*)(?:([-+=])|(\d+)([.)]))(?=\s|$|-|=)")


def plain(words: object, most: int | None = None) -> str:
    """One line in which every character shows: what would act stands as its code, as ``\\x1b``.

    What is longer than ``most`` loses its middle, since the ends of names tell them apart.
    """
    text = VISIBLE.sub(_code, str(words).replace("\r\n", " ").replace("\n", " ").replace("\t", " "))
    if most is None or columns(text) <= most:
        return text
    head, tail, half = "", "", (most - 1) // 2
    for character in text:
        if columns(head + character) > most - 1 - half:
            break
        head += character
    for character in reversed(text):
        if columns(character + tail) > half:
            break
        tail = character + tail
    return f"{head}…{tail}"


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def html(words: object) -> str:
    """For the text and the attributes of a page."""
    return escape(plain(words))


def markdown(words: object) -> str:
    """For a paragraph, a list or a cell of a table: nothing in it is a mark, a link or a piece of HTML."""

    def harmless(found: re.Match[str]) -> str:
        mark, link, www, at = found.groups()
        return f"\\{mark}" if mark else ":\\/\\/" if link else f"{www}\\." if www else f"`{at}`"

    return _AT_START.sub(
        lambda found: f"{found[1]}\\{found[2]}" if found[2] else f"{found[1]}{found[3]}\\{found[4]}",
        _MARKUP.sub(harmless, plain(words)),
    )


def code(words: object) -> str:
    """A span of code in Markdown, in a table, too."""
    text = plain(words).replace("|", "\\|")
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith(("`", " ")) or text.endswith(("`", " ")) else ""
    return f"{ticks}{pad}{text or '–'}{pad}{ticks}"


def columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def wrapped(text: str, width: int, first: str = "", rest: str | None = None) -> list[str]:
    """Lines of at most ``width`` columns, ``first`` before the first of them and ``rest`` before the others."""
    rest = " " * columns(first) if rest is None else rest
    lines, line, empty = list[str](), first, True
    for word in text.split():
        while word:
            gap = "" if empty else " "
            if columns(line + gap + word) <= width:
                line, empty, word = line + gap + word, False, ""
            elif not empty:
                lines.append(line)
                line, empty = rest, True
            else:
                fits = max(k for k in range(1, len(word) + 1) if k == 1 or columns(line + word[:k]) <= width)
                lines.append(line + word[:fits])
                line, word = rest, word[fits:]
    return [*lines, line] if not empty or not lines else lines


def drawn(words: object, most: int = 48) -> str:
    """For a picture: what the font cannot draw is a replacement character."""
    return "".join(c if ord(c) in _glyphs() else "\N{REPLACEMENT CHARACTER}" for c in plain(words, most))


@cache
def _glyphs() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())

"""JSON that was cut off or damaged, read up to there."""

import json
import re
from typing import Any

_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[\]{},"]', re.DOTALL)
_CLOSES = {"[": "]", "{": "}"}
_DEEPEST = 100


def repaired(text: str, damage: int) -> tuple[Any, int]:
    """What is whole before the damage, and where it ends: (None, 0) if nothing is.

    The text is cut after the last value that another follows, or that is closed, and the brackets that are open there
    are closed: of ``[{"a": 1}, {"a": 2, "b": 0.`` it is ``[{"a": 1}, {"a": 2}]``.
    """
    open_: list[str] = []
    whole, closing = 0, ""
    for token in _TOKEN.finditer(text, 0, damage):
        mark = token[0]
        if mark in _CLOSES:
            open_.append(_CLOSES[mark])
        elif mark in "]}":
            if not open_ or open_.pop() != mark:
                break
        elif mark == '"' or len(open_) > _DEEPEST:
            break
        elif mark != ",":
            continue
        whole, closing = token.start() if mark == "," else token.end(), "".join(reversed(open_))
    try:
        value = json.loads(text[:whole] + closing)
    except (ValueError, RecursionError):
        return None, 0
    return (value, whole) if value else (None, 0)

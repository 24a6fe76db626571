"""Small pieces of a page."""

from collections.abc import Iterable, Sequence

from intaglio.reports.safe import html

NOT_MEASURED = '<span class="unseen">not measured</span><span aria-hidden="true">–</span>'


def breakable(name: object) -> str:
    """A metric's name that may be broken where its parts end."""
    return html(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def missing(reason: object, what: str = "Not measured") -> str:
    """A paragraph that says what is not there, and why."""
    return f'<p class="missing">{what}: {html(str(reason).rstrip("."))}.</p>'


def pairs(rows: Iterable[tuple[object, object]]) -> str:
    """Names with their values."""
    return f"<dl>{''.join(f'<dt>{html(k)}</dt><dd>{html(v)}</dd>' for k, v in rows)}</dl>"


def listed(items: Iterable[object]) -> str:
    """A list of texts."""
    return f"<ul>{''.join(f'<li>{html(item)}</li>' for item in items)}</ul>"


def folded(summary: str, content: str, css: str = "", unfolded: bool = False) -> str:
    """What is opened by a click."""
    kind = f' class="{css}"' if css else ""
    return f"<details{kind}{' open' * unfolded}><summary>{html(summary)}</summary>{content}</details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], css: str = "", caption: str = "") -> str:
    """A table of cells that are HTML already, the first of each row its head; narrow screens show a row as a card."""
    head = "".join(f'<th scope="col" role="columnheader">{html(h)}</th>' for h in heads)
    body = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        + "".join(f'<td role="cell" data-head="{html(h)}">{cell}</td>' for h, cell in zip(heads[1:], rest, strict=True))
        + "</tr>"
        for first, *rest in rows
    )
    told = f"<caption>{html(caption)}</caption>" if caption else ""
    return (
        f'<table class="{f"cards {css}".strip()}" role="table">{told}<thead role="rowgroup"><tr role="row">{head}</tr>'
        f'</thead><tbody role="rowgroup">{body}</tbody></table>'
    )

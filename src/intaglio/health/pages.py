"""The pages of the rules, from the rules: ``python -m intaglio.health.pages docs/rules`` writes them."""

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from intaglio.health.finding import SEVERITIES
from intaglio.health.rule import Rule
from intaglio.health.rules import all_rules, static

CASES = "E the engravings model, D the diffusion model, V the question answering, J the JEPA on ARC grids"

FAMILIES = {
    "training": "Any training, from its curves",
    "terms": "The terms of the loss",
    "generalisation": "Is anything learnt, and does it hold?",
    "audits": "Audits at load and in the first steps",
    "latent": "Latent space",
    "bottleneck": "KL bottleneck",
    "codebook": "Codebook",
    "contrastive": "Contrastive and predictive losses",
    "adversarial": "Two networks against each other",
    "noise": "Diffusion: what it is trained on",
    "diffusion": "Diffusion: what it draws",
    "text": "Text decoders",
    "static": "Before training alone, by `intaglio check`",
}


def pages() -> dict[str, str]:
    """File name → Markdown: one page for each rule, and ``README.md`` that lists them."""
    rules, before = all_rules(), before_training()
    made = {f"{r.id}.md": page(r, before.get(r.id, [])) for r in rules}
    alone = {name: said for name, said in before.items() if f"{name}.md" not in made}
    made |= {f"{name}.md": f"# {name}\n\n{_before(said)}" for name, said in alone.items()}
    return {"README.md": _index(rules, alone), **made}


def page(rule: Rule, before: list[str]) -> str:
    """What one rule sees, by what, against which null, from where, and what to log for it."""
    assert rule.judge is not None
    reads = ", ".join(f"`{name}`" for name in (*rule.needs, *rule.facts))
    limits = ", ".join(f"`{name}` {value:g}" for name, value in rule.limits.items())
    rows = {
        "reads": reads.replace("*/*/*", "every series"),
        "to have it measured": f"log {rule.log}",
        "limits": limits or "none",
        "may say": ", ".join(severities(rule)),
        "source": rule.source,
        "seen in": rule.case,
        "concerns": ", ".join(rule.concerns),
    }
    facts = [" ".join(part.split()) for part in (rule.judge.__doc__ or "").split("\n\n")[2:]]
    profile = ", ".join(f"{name}: {value:g}" for name, value in rule.limits.items())
    parts = [
        f"# {rule.id}",
        f"{rule.wrong} {rule.seen}",
        *facts,
        "| | |\n|---|---|\n" + "\n".join(f"| {name} | {said} |" for name, said in rows.items() if said),
        *([_before(before).rstrip()] if before else []),
        f"`intaglio diagnose RUN --rule {rule.id}` judges by it alone"
        + (f"; other limits stand in a profile: `{rule.id}: {{{profile}}}`." if profile else "."),
    ]
    return "\n\n".join(parts).replace("``", "`") + "\n"


def severities(rule: Rule) -> list[str]:
    """What a rule may say, gravest first, from the text of the functions that make its findings."""
    assert rule.judge is not None
    source = inspect.getsource(sys.modules[rule.judge.__module__])
    parts = [part for part in re.split(r"^(?=@rule|def )", source, flags=re.M) if f'"{rule.id}"' in part]
    return [s for s in SEVERITIES if any(f'"{s}"' in part for part in parts)]


def before_training() -> dict[str, list[str]]:
    """What ``intaglio check`` sees of each rule before a step is spent, by id."""
    found: dict[str, list[str]] = {}
    for judge in static.RULES:
        seen = re.match(r"``([\w-]+)``: (.+)", " ".join((judge.__doc__ or "").split()))
        assert seen, judge
        found.setdefault(seen[1], []).append(seen[2])
    return found


def _before(said: list[str]) -> str:
    return "Before training, `intaglio check` sees: " + " ".join(s[0].upper() + s[1:] for s in said) + "\n"


def _index(rules: Sequence[Rule], alone: dict[str, list[str]]) -> str:
    lines = [
        "# The rules",
        "",
        "What goes wrong in the training of latent-variable models, and how it is seen. Written from the rules",
        f"themselves by `python -m intaglio.health.pages docs/rules`. The cases are {CASES}.",
    ]
    for family, members in groupby(rules, lambda r: r.family):
        lines += ["", f"## {FAMILIES[family]}", "", *_rows((r.id, r.wrong) for r in members)]
    lines += ["", f"## {FAMILIES['static']}", "", *_rows((name, said[0].capitalize()) for name, said in alone.items())]
    return "\n".join(lines) + "\n"


def _rows(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield from ("| rule | what is wrong |", "|---|---|")
    for name, wrong in pairs:
        yield f"| [{name}]({name}.md) | {wrong} |"


def main(folder: Path) -> None:
    """Writes every page into the folder, and removes those of rules that are no more."""
    folder.mkdir(parents=True, exist_ok=True)
    written = pages()
    for old in folder.glob("*.md"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What the fault benchmark is made of: families of trainings, each with faults and healthy variants. No torch.

A family is a module with a ``FAMILY``. That of a foreign program has above it the program itself, in plain PyTorch,
whose entry is ``train(folder, seed, **options)``; that of one of our systems names a recipe. A fault is a change to
the text of the program, or other options.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["development", "judged"]
"""Limits of rules may be set on development families; judged ones are run for the published table alone."""


@dataclass(frozen=True)
class Change:
    """``old``, which stands there once, becomes ``new``: in the family's program, or in ``module``, one of ours."""

    old: str
    new: str
    module: str = ""


@dataclass(frozen=True)
class Made:
    """The value of an option that is made when a training begins, as a folder with files: ``by(*of)``."""

    by: Callable[..., str]
    of: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Args:
        name: of this fault in its family, in words with hyphens.
        what: what is wrong, as its author would put it once he knew.
        rules: those that name the cause; any of them is a right diagnosis.
        changes: what makes it wrong, in the text of a program.
        options: what makes it wrong, in the options of the training.
        case: the letter of the real defect that it rebuilds, and the rule that must name it, as ``E term-inert``.
        minor: its rules warn and do not fail: by design such a run can be used.
        static: ``intaglio check`` must see it, before a step is taken.
    """

    name: str
    what: str
    rules: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    case: str = ""
    minor: bool = False
    static: bool = False


@dataclass(frozen=True)
class Healthy:
    """A training that nothing is wrong with, once for each seed; ``what`` says why it is hard to tell, if it is.

    ``case`` is the letter of a real run that was taken for ill, and the rule whose note says that it is not.
    """

    name: str
    what: str = ""
    changes: tuple[Change, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    case: str = ""


@dataclass(frozen=True)
class Family:
    """Trainings of one program or system; ``options`` are those that all of them have, ``recipe`` is that of ours."""

    name: str
    split: Split
    what: str
    faults: tuple[Fault, ...]
    healthy: tuple[Healthy, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""


@dataclass(frozen=True)
class Case:
    """One training of the benchmark."""

    family: Family
    kind: Fault | Healthy
    seed: int

    @property
    def faulty(self) -> bool:
        return isinstance(self.kind, Fault)

    @property
    def name(self) -> str:
        """``vae/kl-in-the-wrong-units-0``."""
        return f"{self.family.name}/{self.kind.name}-{self.seed}"

    @property
    def options(self) -> dict[str, Any]:
        """Those of the family, and its own in their place."""
        return {**self.family.options, **self.kind.options}


def cases(families: Mapping[str, Family], level: str) -> Iterator[Case]:
    """Every training of a level: ``full`` is all; ``smoke`` has of every second family a fault, and of every sixth a
    healthy training; of a system of ours the faults that are seen before training."""
    for number, family in enumerate(families.values()):
        faults, healthy = family.faults, family.healthy
        if level == "smoke":
            faults = tuple(f for f in faults if f.static) if family.recipe else () if number % 2 else faults[:1]
            healthy = () if family.recipe or number % 6 else healthy[:1]
        yield from (Case(family, fault, 0) for fault in faults)
        yield from (Case(family, h, seed) for h in healthy for seed in (h.seeds if level == "full" else h.seeds[:1]))

"""Proofs of a JEPA on grids: answers found among others, tasks with a rule alike, and what each code stands for."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.data import order
from intaglio.data.arc.alter import keys
from intaglio.data.arc.prepare import Puzzles
from intaglio.data.arc.tasks import OUTSIDE, PALETTE, TaskCorpus
from intaglio.models.jepa import JepaModel
from intaglio.reports.proofs.pull import AFTER_TRAINING, pull
from intaglio.reports.sheet import FAINT, INK, MARGIN, RIGHT, WRONG, Sheet
from intaglio.systems.jepa_evaluation import CANDIDATES, Pool, Read, embed, read_items, some, tabled

ASKED, LIKE, CODES, EXAMPLES = 8, 5, 24, 5
PIXELS, LINE = 150, np.array((90, 90, 90), np.uint8)


def make_proofs(model: JepaModel, prepared: Puzzles, folder: Path, quick: bool) -> list[Path]:
    """Writes the pictures and ``proofs.json`` into ``folder``; returns the pictures."""
    items = some(np.unique(prepared.splits["val"]), 96 if quick else 1024)
    read: list[Read] = []

    def known() -> Read:
        if not read:
            read.append(read_items(model, prepared.data, items))
        return read[0]

    makers: dict[str, Callable[[], Sheet]] = {
        "answers": lambda: answers(model, prepared, known(), 64 if quick else CANDIDATES),
        "alike": lambda: alike(prepared, known()),
        "codes": lambda: codes(model, prepared, known()),
    }

    def why_not(name: str) -> str | None:
        if quick and name != "answers":
            return AFTER_TRAINING
        return "the model has no codes" if name == "codes" and not model.network.coded else None

    return pull(model, makers, why_not, folder)


def answers(model: JepaModel, prepared: Puzzles, read: Read, among: int) -> Sheet:
    """Demonstrations, a question, and the three outputs that lie nearest to the prediction."""
    sheet = Sheet(
        "Which output is the answer?",
        "Held-out tasks. On the left demonstrations and, after the bar, the question; on the right the nearest three "
        f"to the prediction, of {among} outputs of the answer's shape (and the question itself). Green is the "
        "answer, red is not. Look whether what is wrong at least obeys the rule.",
    )
    pool, side, top = Pool(prepared.corpus, np.unique(prepared.splits["val"])), 0.78, sheet.y
    shown = read.items[np.linspace(0, len(read) - 1, ASKED).astype(int)]
    right = 0
    for row, item in enumerate(shown):
        k = int(np.flatnonzero(read.items == item)[0])
        task, y = prepared.corpus.task(int(item)), top + row * (side + 0.28)
        question, answer = task.pairs[-task.tests].input, task.pairs[-task.tests].output
        assert answer is not None
        pairs = task.pairs[: -task.tests][:2]
        for place, grid in enumerate([g for pair in pairs for g in (pair.input, pair.output)]):
            assert grid is not None
            sheet.picture(MARGIN + place * (side + 0.06) + place // 2 * 0.12, y, side, drawn(grid))
        x = MARGIN + 4 * (side + 0.06) + 0.34
        sheet.box(x - 0.14, y, 0.02, side, INK)
        sheet.picture(x, y, side, drawn(question))
        grids, key = pool.of_shape(*answer.shape)
        barred = keys(torch.from_numpy(tabled([answer, question]))).numpy()
        others = grids[np.flatnonzero(~np.isin(key, barred))[: among - 1], : answer.shape[0], : answer.shape[1]]
        candidates = [answer, *others, *([question] if question.shape == answer.shape else [])]
        similarity = embed(model, tabled(candidates)) @ read.predicted[k]
        best = similarity.argsort(descending=True)[:3].tolist()
        right += best[0] == 0
        for place, j in enumerate(best):
            at = x + (place + 1) * (side + 0.1) + 0.25
            sheet.picture(at, y, side, drawn(candidates[j]), RIGHT if j == 0 else WRONG)
            sheet.text(at, y + side + 0.04, f"{float(similarity[j]):.2f}", side, size=7, colour=FAINT, lines=1)
        rank = int((similarity > similarity[0]).sum()) + 1
        if rank > len(best):
            at = x + 4 * (side + 0.1) + 0.25
            sheet.picture(at, y, side, drawn(answer))
            sheet.text(at, y + side + 0.04, f"the answer, {rank}.", side + 0.2, size=7, colour=FAINT, lines=1)
        name = prepared.corpus.label(int(item)) or task.name
        sheet.text(MARGIN, y + side + 0.04, name, 3.4, size=7, colour=FAINT, lines=1)
        sheet.told.append(
            f"Task {task.name} ({name}): the answer is number {int((similarity > similarity[0]).sum()) + 1}."
        )
    sheet.told.append(f"{right} of {len(shown)} right.")
    return sheet


def alike(prepared: Puzzles, read: Read) -> Sheet:
    """Tasks, and those whose rule lies nearest to theirs."""
    sheet = Sheet(
        "Tasks whose rules lie near each other",
        "Left of the bar a held-out task, right of it the four others whose rule is most similar (cosine of what is "
        "made of the demonstrations), each shown by its first pair. Look whether they ask for the same.",
    )
    rule = F.normalize(read.rule - read.rule.mean(0), dim=1)
    for k in np.linspace(0, len(read) - 1, LIKE + 2).astype(int)[1:-1]:
        similarity = rule @ rule[k]
        similarity[k] = -torch.inf
        _row(sheet, prepared.corpus, read, int(k), similarity.argsort(descending=True)[:4].tolist(), similarity)
    return sheet


def nearest(corpus: TaskCorpus, read: Read, asked: int, best: list[int], similarity: Tensor) -> Sheet:
    """A task, and the given ones beside it."""
    sheet = Sheet(
        "Tasks with the most similar rule",
        "Left of the bar the task that was asked for, right of it the nearest by what the model makes of the "
        "demonstrations, each shown by its first pair.",
    )
    for at in range(0, len(best), 4):
        _row(sheet, corpus, read, asked, best[at : at + 4], similarity)
    return sheet


def _row(sheet: Sheet, corpus: TaskCorpus, read: Read, asked: int, near: list[int], similarity: Tensor) -> None:
    side, y = 0.72, max(sheet.y, sheet.bottom + 0.12)
    names = []
    for place, k in enumerate([asked, *near]):
        item = int(read.items[k])
        task, x = corpus.task(item), MARGIN + place * (2 * side + 0.34) + (0.12 if place else 0)
        for half, grid in enumerate((task.pairs[0].input, task.pairs[0].output)):
            if grid is not None:
                sheet.picture(x + half * (side + 0.05), y, side, drawn(grid))
        names.append(corpus.label(item) or task.name)
        told = f"{names[-1]}, {float(similarity[k]):.2f}" if place else names[-1]
        sheet.text(x, y + side + 0.04, told, 2 * side + 0.1, size=7, colour=FAINT, lines=2)
    sheet.box(MARGIN + 2 * side + 0.22, y, 0.02, side, INK)
    sheet.told.append(f"{names[0]}: {'; '.join(names[1:])}.")


def codes(model: JepaModel, prepared: Puzzles, read: Read, part: slice = slice(CODES)) -> Sheet:
    """Part of the codes in the order of their use, each with grids that have it."""
    slots = model.config.slots
    grid_codes = read.codes.reshape(-1, slots).cpu().numpy()  # a row for each grid that was read, in order
    grids = _grids_read(prepared, read)
    counts = np.bincount(grid_codes.ravel(), minlength=1)
    used = int((counts > 0).sum())
    by_use = np.argsort(-counts, kind="stable")
    sheet = Sheet(
        "What each code stands for",
        f"Codes in the order of their use, {used} of them in use; each with grids in which a slot has it, equal ones "
        "once. Bright is the region that the slot stands for. Look for what a code's regions have in common and the "
        "others have not.",
    )
    side, top = 0.56, sheet.y
    rng = np.random.default_rng(0)
    for place, code in enumerate(by_use[:used][part]):
        x, y = MARGIN + place % 3 * 3.12, top + place // 3 * (side + 0.3)
        having = np.flatnonzero((grid_codes == code).any(1))
        chosen: list[int] = []
        for g in rng.permutation(having):
            if len(chosen) < EXAMPLES and not any(np.array_equal(grids[g], grids[other]) for other in chosen):
                chosen.append(int(g))
        for column, g in enumerate(chosen):
            places = np.flatnonzero(grid_codes[g] == code) if model.network.encoder.content else None
            sheet.picture(x + column * (side + 0.04), y, side, drawn(grids[g], places, math.isqrt(slots)))
        share = counts[code] / counts.sum()
        sheet.text(x, y + side + 0.03, f"code {code}: {share:.1%} of slots", 3, size=7, colour=FAINT, lines=1)
        sheet.told.append(f"Code {code}: {share:.2%} of slots, in {len(having)} of {len(grids)} grids.")
    return sheet


def _grids_read(prepared: Puzzles, read: Read) -> list[np.ndarray]:
    """The grids of all real pairs, as ``read_tasks`` saw them."""
    found = []
    for item in read.items:
        batch = prepared.data.batch(np.array([item]), order.draws(np.array([item]), seed=0))
        for pair in batch.grids[0][batch.real[0]].numpy():
            found += [grid[: (grid != OUTSIDE).any(1).sum(), : (grid != OUTSIDE).any(0).sum()] for grid in pair]
    return found


def drawn(grid: np.ndarray, bright: np.ndarray | None = None, regions: int = 1) -> np.ndarray:
    """A grid in ARC's colours, lines between its cells, in the middle of a white square, uint8 (S, S, 3); where
    ``bright`` numbers some of its R × R regions, the others are pale."""
    cell = max(3, PIXELS // max(grid.shape))
    whole = np.full((PIXELS, PIXELS, 3), 255, np.uint8)
    cells = PALETTE[np.kron(grid, np.ones((cell, cell), np.uint8))]
    cells[::cell] = cells[:, ::cell] = LINE
    if bright is not None:
        region = [np.arange(n) * regions // n for n in cells.shape[:2]]
        pale = ~np.isin(region[0][:, None] * regions + region[1], bright)
        cells[pale] = 255 - (255 - cells[pale].astype(int)) // 4
    h, w = (min(PIXELS, n) for n in cells.shape[:2])
    y, x = (PIXELS - h) // 2, (PIXELS - w) // 2
    whole[y : y + h, x : x + w] = cells[:h, :w]
    return whole

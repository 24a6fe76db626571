"""What a trained JEPA tells of held-out tasks, each number beside its null.

Shapes: N tasks, E embedding, K candidates, S side.
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.config import JepaConfig
from intaglio.data import order
from intaglio.data.arc.alter import keys
from intaglio.data.arc.generate import PRIMITIVES, alternatives
from intaglio.data.arc.prepare import Puzzles
from intaglio.data.arc.table import Tasks
from intaglio.data.arc.tasks import OUTSIDE, TaskCorpus
from intaglio.data.batches import fixed_batches
from intaglio.health import panel
from intaglio.health.instruments import codebook
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.history.reading import Evaluation, ratio, share
from intaglio.models.jepa import JepaModel, Rounded
from intaglio.models.probe import linear_probe

CANDIDATES = 512
"""Outputs of one shape among which the answer is looked for."""

CROWD = 8704
"""Candidates of InfoNCE, as many as the document had: its batch of 512 and its queue of 8,192."""

MOST = 1024
"""Tasks of a kind that are measured."""

FITTED = 2048
"""Training tasks that the temperature is fitted to."""

PROBED = 12_288
"""Training tasks that probes are fitted to: a probe of thousands of numbers takes more tasks than a temperature."""

BLIND = 64
"""Tasks that a random encoder looks for too: its null needs no more."""


@dataclass(frozen=True)
class Read:
    """The last pair of each task as the question: all that a model makes of it.

    Embeddings ``predicted``, ``answers``, ``questions`` (N, E) of unit length, ``rule`` (N, R); ``codes`` of
    all slots.
    """

    items: np.ndarray
    predicted: Tensor
    answers: Tensor
    questions: Tensor
    rule: Tensor
    codes: Tensor

    def __len__(self) -> int:
        return len(self.items)


@torch.no_grad()
def read_items(model: JepaModel, data: Tasks, items: np.ndarray) -> Read:
    """Reads the given tasks in their order."""
    found: dict[str, list[Tensor]] = {k: [] for k in ("predicted", "answers", "questions", "rule", "codes")}
    for batch in fixed_batches(data, items, 64):
        with torch.autocast(model.device.type, torch.bfloat16):  # as `embed`, or an answer would differ from its rivals
            seen = model.read(batch.grids, batch.real)
        for name in ("predicted", "answers", "questions"):
            found[name].append(F.normalize(getattr(seen, name)[:, -1].float(), dim=-1))
        found["rule"].append(seen.rule[:, -1].float())
        found["codes"].append(seen.codes[batch.real.to(seen.codes.device)].flatten())
    return Read(np.asarray(items), **{name: torch.cat(several) for name, several in found.items()})


@torch.no_grad()
def embed(model: JepaModel, grids: np.ndarray) -> Tensor:
    """Embeddings of unit length of grids (K, S, S), as answers."""
    with torch.autocast(model.device.type, torch.bfloat16):
        parts = [
            model.answers(torch.from_numpy(grids[at : at + 512]).to(model.device)) for at in range(0, len(grids), 512)
        ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def evaluate(model: JepaModel, prepared: Puzzles, config: JepaConfig) -> Evaluation:
    """Outcome, rule, program and its length of held-out tasks; ranks and codes; the nats of InfoNCE among ``CROWD``."""
    corpus = prepared.corpus
    found: dict[str, Measured] = {}
    sides = {
        side: {
            "real": np.unique([i for i in prepared.splits[side] if not corpus.programs[i]]).astype(np.int64),
            "generated": np.unique([i for i in prepared.splits[side] if corpus.programs[i]]).astype(np.int64),
        }
        for side in ("train", "val")
    }
    random, pool = untrained(model, config.seed + 1), Pool(corpus, np.unique(prepared.splits["val"]))
    crowd = Crowd.of(model, corpus)
    for kind, held_out in sides["val"].items():
        if not len(held_out):
            found[f"val/{kind}/top1"] = NotMeasured(f"none of the held-out tasks is {kind}")
            continue
        items = some(held_out, MOST)
        read, blind = read_items(model, prepared.data, items), read_items(random, prepared.data, items)
        known = sides["train"][kind] if len(sides["train"][kind]) else np.unique(prepared.splits["train"])
        fitted = read_items(model, prepared.data, some(known, FITTED))
        found |= {f"val/{kind}/{name}": m for name, m in outcome(model, corpus, pool, read, random, blind).items()}
        found |= {f"val/{kind}/{name}": m for name, m in crowded(crowd, corpus, read, fitted).items()}
        found |= {f"val/{kind}/{name}": m for name, m in spread(read).items()}
        if model.network.coded:
            found[f"val/{kind}/perplexity"] = perplexity(model, read.codes)
        if kind == "generated":
            found |= {f"val/generated/{name}": m for name, m in rules(model, corpus, read).items()}
            learnt = some(known, PROBED)
            features = {
                "": (read_items(model, prepared.data, learnt).rule, read.rule),
                "_random": (read_items(random, prepared.data, learnt).rule, blind.rule),
                "_pixels": tuple(torch.from_numpy(pixel_features(corpus, i)) for i in (learnt, items)),
            }
            found |= {f"val/generated/{name}": m for name, m in probes(corpus, learnt, items, features).items()}
    if model.network.coded:
        found |= {f"val/{name}/perplexity": m for name, m in code_use(model, prepared.data, sides["val"]).items()}
    return Evaluation.of(found)


def untrained(model: JepaModel, seed: int) -> JepaModel:
    """The same network with fresh weights; its slots pass unquantised, as codes that fit nothing would only lose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = JepaModel(asdict(replace(model.config, quantiser="none", target=0.0)), model.pairs)
    return fresh.to(model.device).eval()


def some(items: np.ndarray, most: int) -> np.ndarray:
    """At most so many, spread over all."""
    return items[np.linspace(0, len(items) - 1, min(most, len(items))).astype(int)]


# Which output is it?


def outcome(
    model: JepaModel, corpus: TaskCorpus, pool: "Pool", read: Read, random: JepaModel, blind: Read
) -> dict[str, Measured]:
    """The answer among ``CANDIDATES`` of its shape, chance 1 / ``CANDIDATES``.

    ``top1`` has the question itself among them where it has that shape; ``top1_apart`` has not, and stands beside what
    a copy finds: the nearest to the question by its embedding (``copied``), by equal cells (``copied_cells``), or to
    the prediction of a random encoder of the same shape (``random``).
    """
    tasks = [corpus.task(int(item)) for item in read.items]
    asked = [task.pairs[-task.tests] for task in tasks]
    hits: dict[str, list[bool]] = {k: [] for k in ("top1", "top1_apart", "copied", "copied_cells", "random")}
    chance: list[float] = []
    blind_every = max(1, len(read) // BLIND)
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for k, pair in enumerate(asked):
        assert pair.output is not None, "training refuses tasks without an answer"
        by_shape.setdefault(pair.output.shape, []).append(k)
    for (h, w), several in by_shape.items():
        grids, key = pool.of_shape(h, w)
        z = embed(model, grids)
        looked_at = [k for k in several if k % blind_every == 0]
        blank = embed(random, grids) if looked_at else z
        for k in several:
            question, answer = asked[k].input, asked[k].output
            assert answer is not None
            barred = keys(torch.from_numpy(tabled([answer, question]))).numpy()
            rest = np.flatnonzero(~np.isin(key, barred))[: CANDIDATES - 1]
            same_shape = question.shape == answer.shape

            def nearest(query: Tensor, own: Tensor, others: Tensor, rest: np.ndarray = rest) -> bool:
                return bool((query @ own) > (others[rest] @ query).max())

            apart = nearest(read.predicted[k], read.answers[k], z)
            closer = bool(read.predicted[k] @ read.answers[k] > read.predicted[k] @ read.questions[k])
            equal = (grids[rest, :h, :w] == question).sum((1, 2)).max() if same_shape else 0
            chance.append(1 / (len(rest) + 1))  # of the smallest shapes there are not so many
            hits["top1"].append(apart and (closer or not same_shape))
            hits["top1_apart"].append(apart)
            hits["copied"].append(nearest(read.questions[k], read.answers[k], z))
            hits["copied_cells"].append(same_shape and bool((question == answer).sum() > equal))
            if k in looked_at:
                hits["random"].append(nearest(blind.predicted[k], blind.answers[k], blank))
    return {name: share(sum(right), len(right), float(np.mean(chance))) for name, right in hits.items()}


class Pool:
    """Different grids of each shape, as many as an answer is looked for among and some to spare: outputs of the given
    tasks first, then their inputs, then pieces cut out of larger ones, then random cells."""

    def __init__(self, corpus: TaskCorpus, items: np.ndarray):
        rows = np.concatenate([np.arange(corpus.first[i], corpus.first[i + 1]) for i in items])
        self.grids = corpus.grids[rows].reshape(-1, *corpus.grids.shape[2:])
        self.sizes = corpus.sizes[rows].reshape(-1, 2)
        self.keys = keys(torch.from_numpy(self.grids)).numpy()
        self._made: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def of_shape(self, h: int, w: int, count: int = CANDIDATES + 64) -> tuple[np.ndarray, np.ndarray]:
        """(count, S, S) as a table, and their keys (count,); always the same of a shape."""
        if (h, w) not in self._made:
            self._made[h, w] = self._of_shape(h, w, count)
        return self._made[h, w]

    def _of_shape(self, h: int, w: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        rng, output = np.random.default_rng((h, w)), np.arange(len(self.grids)) % 2 == 1
        same, larger = (self.sizes == (h, w)).all(1), np.flatnonzero((self.sizes >= (h, w)).all(1))
        taken: dict[int, np.ndarray] = {}
        for rows in (np.flatnonzero(same & output), np.flatnonzero(same & ~output)):
            for row in rng.permutation(rows)[: 2 * count]:
                if len(taken) < count:
                    taken.setdefault(int(self.keys[row]), self.grids[row, :h, :w])
        pieces = []
        for row in rng.choice(larger, 4 * count) if len(larger) and len(taken) < count else []:
            y, x = (int(rng.integers(0, most + 1)) for most in self.sizes[row] - (h, w))
            pieces.append(self.grids[row, y : y + h, x : x + w])
        pieces += [rng.integers(0, 10, (h, w), np.uint8) for _ in range(count)] if len(taken) < count else []
        for key, piece in zip(keys(torch.from_numpy(tabled(pieces))).tolist() if pieces else [], pieces, strict=True):
            if len(taken) < count:
                taken.setdefault(key, piece)
        return tabled(list(taken.values())), np.array(list(taken))


def tabled(grids: list[np.ndarray]) -> np.ndarray:
    """Grids in one table, (n, S, S)."""
    side = max(max(g.shape) for g in grids) + 1 & ~1
    table = np.full((len(grids), side, side), OUTSIDE, np.uint8)
    for place, grid in zip(table, grids, strict=True):
        place[: grid.shape[0], : grid.shape[1]] = grid
    return table


@dataclass(frozen=True)
class Crowd:
    """``CROWD`` − 1 different grids of a corpus: embeddings (N, E) and keys (N,)."""

    z: Tensor
    keys: Tensor

    @classmethod
    def of(cls, model: JepaModel, corpus: TaskCorpus) -> "Crowd | None":
        """None where there are not so many."""
        grids = corpus.grids.reshape(-1, *corpus.grids.shape[2:])
        key, first = np.unique(keys(torch.from_numpy(grids)).numpy(), return_index=True)
        if len(first) < CROWD:
            return None
        chosen = np.random.default_rng(0).permutation(len(first))[: CROWD - 1]
        return cls(embed(model, grids[first[chosen]]), torch.from_numpy(key[chosen]).to(model.device))


def crowded(crowd: Crowd | None, corpus: TaskCorpus, read: Read, fitted: Read) -> dict[str, Measured]:
    """ln N − InfoNCE in nats among N = ``CROWD`` different outputs and inputs of the corpus, the answer one of them;
    the temperature is the one that suits training tasks best."""
    if crowd is None:
        return {"over_chance": NotMeasured(f"it takes {CROWD:,} different grids")}

    def nats(r: Read, scale: float) -> np.ndarray:
        tests = corpus.first[r.items + 1] - corpus.tests[r.items]
        own_key = keys(torch.from_numpy(corpus.grids[tests, 1])).to(crowd.keys)
        logits = (scale * r.predicted @ crowd.z.T).masked_fill(crowd.keys == own_key[:, None], -torch.inf)
        own = scale * (r.predicted * r.answers).sum(1, keepdim=True)
        return (torch.cat([own, logits], 1).logsumexp(1) - own[:, 0]).double().cpu().numpy()

    scales = np.geomspace(2, 100, 40)
    best = scales[np.argmin([nats(fitted, s).mean() for s in scales])]
    gains = np.log(CROWD) - nats(read, best)
    return {"over_chance": ratio(gains, np.ones(len(gains)), 0.0), "temperature": Reading(1 / best)}


# What was the rule?


def rules(model: JepaModel, corpus: TaskCorpus, read: Read) -> dict[str, Measured]:
    """Which of the outputs that other programs would give of the very same question; chance is one of them."""
    hits, chance = [], []
    for k, item in enumerate(read.items):
        task = corpus.task(int(item))
        question, answer = task.pairs[-1].input, task.pairs[-1].output
        assert answer is not None
        others = [g for _, _, g in alternatives(question, int(item)) if g.shape != answer.shape or (g != answer).any()]
        z = embed(model, tabled([*others, question]))
        hits.append(bool(read.predicted[k] @ read.answers[k] > (z @ read.predicted[k]).max()))
        chance.append(1 / (len(others) + 2))
    return {"rule": share(sum(hits), len(hits), float(np.mean(chance)))}


def probes(
    corpus: TaskCorpus, learnt: np.ndarray, items: np.ndarray, features: dict[str, tuple[Tensor, ...]]
) -> dict[str, Measured]:
    """Linear probes of frozen features: which primitive (programs of one step), and how many steps; each beside the
    same of a random encoder of the same shape, and of features of pixels. The null is the most frequent answer."""
    found: dict[str, Measured] = {}
    first = np.array([PRIMITIVES.index(p[0]) if p else -1 for p in corpus.programs])
    lengths = corpus.lengths
    for name, labels, asked in (("primitive", first, lengths == 1), ("steps", lengths - 1, lengths > 0)):
        train, test = asked[learnt], asked[items]
        y, truth = labels[learnt][train], labels[items][test]
        null = float(np.bincount(truth).max() / len(truth))
        for suffix, (x, x_test) in features.items():
            told = linear_probe(x[torch.from_numpy(train)], y, x_test[torch.from_numpy(test)])
            found[name + suffix] = share(int((told == truth).sum()), len(truth), null)
    return found


def pixel_features(corpus: TaskCorpus, items: np.ndarray) -> np.ndarray:
    """What can be counted without a network, mean over a task's demonstrations, (N, 126): which colour becomes which
    where shapes agree, colours of input and output, and their shapes."""
    rows = []
    for item in items:
        pairs = corpus.task(int(item)).pairs[:-1]
        found = []
        for pair in pairs:
            a, b = pair.input, pair.output
            assert b is not None
            becomes = np.zeros((10, 10))
            if a.shape == b.shape:
                np.add.at(becomes, (a, b), 1 / a.size)
            counts = [np.bincount(g.ravel(), minlength=10)[:10] / g.size for g in (a, b)]
            kept = float((a == b).mean()) if a.shape == b.shape else 0.0
            shapes = [*a.shape, *b.shape, float(a.shape == b.shape), kept]
            found.append(np.concatenate([becomes.ravel(), *counts, shapes]))
        rows.append(np.mean(found, 0))
    return np.array(rows, np.float32)


# Is the space used?


def spread(read: Read) -> dict[str, Measured]:
    """Effective ranks of what is predicted from the context, and of the targets, beside a Gaussian's at the same N."""
    sites = {"context": read.predicted, "target": read.answers}
    return {f"{site}_rank": panel.latents(x)["effective_rank"] for site, x in sites.items()}


@torch.no_grad()
def code_use(model: JepaModel, data: Tasks, held_out: dict[str, np.ndarray]) -> dict[str, Measured]:
    """How evenly codes are used on held-out tasks of all kinds in equal shares, as training has them: ``both`` as they
    are, and ``altered`` as training alters them. Codes learn tasks in all colours, and those as they are have few."""
    kinds = [items for items in held_out.values() if len(items)]
    count = min(MOST, *map(len, kinds)) if len(kinds) > 1 else MOST
    items = np.concatenate([some(items, count) for items in kinds])
    parts = np.array_split(items, len(items) // 64 + 1)
    batches = {
        "both": [data.batch(part, order.draws(part, 0)) for part in parts],
        "altered": [data.training_batch(part, order.draws(part, 0)) for part in parts],
    }
    found: dict[str, Measured] = {}
    for name, several in batches.items():
        codes = []
        for batch in several:
            grids, real = batch.grids.to(model.device), batch.real.to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16):
                codes.append(model.network.quantise(model.network.slots(grids, real), real).codes[real].flatten())
        found[name] = perplexity(model, torch.cat(codes))
    return found


def perplexity(model: JepaModel, codes: Tensor) -> Measured:
    """Of all slots of the tasks, beside uniform codes at the same count."""
    quantiser = model.network.quantiser
    size = quantiser.fsq.size if isinstance(quantiser, Rounded) else model.config.codes
    return codebook.perplexity(codebook.code_counts(codes, size))

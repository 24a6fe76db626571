"""Answers about pictures by visual instruction tuning: LLaVA (Liu et al. 2023), in two stages.

An eye has learnt to name what it sees and is frozen; a small GPT has read what people ask and are told. A projector
turns places of a picture into what might be words. Stage one trains it alone, on captions; stage two trains it and the
GPT on conversations of two questions, with a loss on what is answered.

Shapes: B conversations, P places of a picture, D channels of the eye, T words, W width of the GPT.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, Pictures, pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

START, END, PAD, IGNORE = 0, 1, 2, -100
LONGEST, CONTEXT, CHANNELS, HELD_OUT = 17, 32, 48, 128
KINDS = ("shape", "colour", "size", "place")
WAYS = ("what {} is it ?", "which {} ?")
TOLD = (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)
SAID = ("what", "is", "it", "?", "which", "describe", "a", "at", "the", *KINDS, *(w for words in TOLD for w in words))
IDS = {word: k for k, word in enumerate(("<start>", "<end>", "<pad>", *SAID))}


class Talks(NamedTuple):
    """A picture (B, 3, S, S), what is said of it (B, T), and of that what is to be guessed (B, T), else ``IGNORE``;
    what stands before the first answer (B, Q), that answer (B, A), and the kind of the first question (B,)."""

    images: Tensor
    ids: Tensor
    labels: Tensor
    prompt: Tensor
    answer: Tensor
    kind: Tensor

    def at(self, rows: Tensor) -> "Talks":
        return Talks(*(part[rows] for part in self))


def padded(rows: Sequence[list[int] | Tensor], by: int) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.as_tensor(row) for row in rows], batch_first=True, padding_value=by)


def numbers(text: str) -> list[int]:
    return [IDS[word] for word in text.split()]


def encoded(images: Tensor, talks: list[list[tuple[str, str]]], kind: Tensor) -> tuple[Talks, int]:
    """Questions and answers as numbers; and how many conversations were longer than there is room for."""
    ids, labels = [], []
    for talk in talks:
        ids.append(numbers(f"<start> {' '.join(f'{question} {answer} <end>' for question, answer in talk)}"))
        labels.append([IGNORE])
        for question, answer in talk:
            labels[-1] += [IGNORE] * len(numbers(question)) + numbers(f"{answer} <end>")
    said, due = padded(ids, PAD)[:, :LONGEST], padded(labels, IGNORE)[:, :LONGEST]
    prompt = padded([numbers(f"<start> {talk[0][0]}") for talk in talks], PAD)
    answers = padded([numbers(talk[0][1]) for talk in talks], END)
    return Talks(images, said, due, prompt, answers, kind), sum(len(row) > LONGEST for row in ids)


def named(factors: Tensor) -> list[list[str]]:
    return [[words[k] for words, k in zip(TOLD, row, strict=True)] for row in factors.tolist()]


def conversed(drawn: Pictures, each: int = 2) -> tuple[Talks, int]:
    """Several conversations about each picture."""
    images, factors = drawn.images.repeat_interleave(each, 0), drawn.factors.repeat_interleave(each, 0)
    kinds = torch.rand(len(factors), len(KINDS)).topk(2, 1).indices
    ways = torch.randint(len(WAYS), (len(factors), 2))
    talks = []
    for said, asked, way in zip(named(factors), kinds.tolist(), ways.tolist(), strict=True):
        answers = (f"a {said[0]}", said[1], said[2], f"{said[3]} {said[4]}")
        talks.append([(WAYS[w].format(KINDS[k]), answers[k]) for k, w in zip(asked, way, strict=True)])
    return encoded(images, talks, kinds[:, 0])


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads, self.before, self.between = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(self.before(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    """A language model that is given vectors, not numbers; its head is its table of words."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.words, self.places = nn.Embedding(len(IDS), width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        nn.init.normal_(self.words.weight, std=0.1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.blocks(x + self.places[: x.shape[1]]), self.words.weight)

    def surprise(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self(self.words(ids[:, :-1])).mT, ids[:, 1:], ignore_index=PAD)


def convolutions() -> nn.Sequential:
    """(B, 3, S, S) → (B, D, P)"""
    layers: list[nn.Module] = []
    for given, made in ((3, 16), (16, 32), (32, CHANNELS)):
        layers += [nn.Conv2d(given, made, 3, 2, 1, bias=False), nn.BatchNorm2d(made), nn.SiLU()]
    return nn.Sequential(*layers, nn.Flatten(2))


def misnamed(namer: nn.Module, images: Tensor, factors: Tensor) -> Tensor:
    """Nats of all that is in a picture."""
    said = namer(images).split([len(words) for words in TOLD], 1)
    return torch.stack([F.cross_entropy(*pair) for pair in zip(said, factors.T, strict=True)]).sum()


class Llava(nn.Module):
    def __init__(self, eye: nn.Module, gpt: GPT, width: int, deep: bool):
        super().__init__()
        self.eye, self.gpt = eye.requires_grad_(False), gpt.requires_grad_(False)
        last = [nn.GELU(), nn.Linear(width, width)] if deep else []
        self.projector = nn.Sequential(nn.Linear(CHANNELS, width), *last)

    def look(self, images: Tensor) -> Any:
        """(B, 3, S, S) → (B, P, W)"""
        with torch.no_grad():
            seen = self.eye(images)
        return self.projector(seen.mT)

    def forward(self, seen: Tensor, ids: Tensor) -> Any:
        """Logits (B, T, words) of the word after each of ``ids``, which come after the picture."""
        return self.gpt(torch.cat([seen, self.gpt.words(ids)], 1))[:, seen.shape[1] :]

    def nats(self, seen: Tensor, talks: Talks, reduction: str = "mean") -> Tensor:
        logits, due = self(seen, talks.ids)[:, :-1], talks.labels[:, 1:]
        return F.cross_entropy(logits.mT, due, ignore_index=IGNORE, reduction=reduction)

    @torch.no_grad()
    def reply(self, images: Tensor, ids: Tensor, longest: int) -> Tensor:
        """What is written (B, A) after prompts (B, Q) of different lengths, word by word."""
        seen, rows, written = self.look(images), torch.arange(len(ids)), []
        last = (ids != PAD).sum(1) - 1
        for _ in range(longest):
            written.append(self(seen, ids)[rows, last].argmax(1))
            ids, last = F.pad(ids, (0, 1), value=PAD), last + 1
            ids[rows, last] = written[-1]
        return torch.stack(written, 1)


def batches(size: int, count: int) -> Iterator[Tensor]:
    while True:
        yield from (rows for rows in torch.randperm(count).split(size) if len(rows) == size)


def pretrain(trained: nn.Module, loss: Callable[[Tensor], Tensor], steps: int, count: int) -> None:
    optim = torch.optim.AdamW(trained.parameters(), lr=4e-3)
    for _, rows in zip(range(steps), batches(32, count), strict=False):
        loss(rows).backward()
        optim.step()
        optim.zero_grad()


def answered(model: Llava, talks: Talks, commonest: Tensor) -> dict[str, Reading]:
    """The share of right answers to all first questions and by kind, beside the commonest answer's."""
    right = (model.reply(talks.images, talks.prompt, talks.answer.shape[1]) == talks.answer).all(1)
    blind, found = (commonest[talks.kind] == talks.answer).all(1), {}
    for k, name in enumerate(("all", *KINDS), -1):
        rows = talks.kind == k if k >= 0 else torch.ones_like(right)
        share, null = (float(x[rows].double().mean()) for x in (right, blind))
        found[name] = Reading(share, null, int(rows.sum()))
    return found


def blind_nats(talks: Talks, known: Talks) -> float:
    """Nats a word of answers by how frequent each is to its kind of question."""
    nats, words = 0.0, 0
    for k in range(len(KINDS)):
        seen, own = known.answer[known.kind == k], talks.answer[talks.kind == k]
        chances = (own[:, None] == seen).all(2).double().mean(1)
        nats -= float((chances + 1e-3).log().sum())
        words += int((own != END).sum()) + len(own)
    return nats / words


def planned(schedule: str, total: int, warm: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        done = min(1.0, max(0, step - warm) / max(1, total - warm))
        turned = 3 * done % 1 if schedule == "restarts" else done
        falls = {"linear": 1 - done, "constant": 1.0}.get(schedule, 0.5 * (1 + math.cos(math.pi * turned)))
        return min(1.0, (step + 1) / max(1, warm)) * falls

    return rate


def train(
    folder: Path, seed: int = 0, steps: int = 300, align: int = 100, size: int = 24, items: int = 2048, width: int = 48,
    layers: int = 2, deep: bool = True, optimizer: str = "AdamW", rate: float = 2e-3, schedule: str = "cosine",
    warm: int = 10,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    web, drawn = pictures(2048, 20_000 + seed), pictures(items + HELD_OUT, seed)
    eye, gpt = convolutions(), GPT(width, layers)
    namer = nn.Sequential(eye, nn.Flatten(), nn.Linear(4 * CHANNELS, sum(map(len, TOLD))))
    pretrain(namer, lambda rows: misnamed(namer, web.images[rows], web.factors[rows]), 150, 2048)
    told = [[("describe it ?", "a {2} {1} {0} at the {3} {4}".format(*said))] for said in named(web.factors)]
    captions, before = encoded(web.images, told, web.factors[:, 0])[0], conversed(web, 1)[0]
    texts = padded([*captions.ids, *before.ids], PAD)
    pretrain(gpt, lambda rows: gpt.surprise(texts[rows]), 150, len(texts))

    first = Llava(eye, gpt, width, deep).eval()
    pretrain(first.projector, lambda rows: first.nats(first.look(web.images[rows]), captions.at(rows)), align, 2048)
    adapter = {name: weight for name, weight in first.state_dict().items() if "projector" in name}

    talks, cut = conversed(drawn)
    held = torch.arange(len(talks.ids)) < 2 * HELD_OUT
    known, unseen = talks.at(~held), talks.at(held)
    test, _ = conversed(pictures(256, 10_000 + seed), 1)
    commonest = torch.stack([known.answer[known.kind == k].mode(0).values for k in range(len(KINDS))])
    blind = blind_nats(unseen, known)

    model = Llava(eye, gpt, width, deep)
    weights = {name.removeprefix("projector."): weight for name, weight in adapter.items()}
    keys = model.projector.load_state_dict(weights)
    model.gpt.requires_grad_(True)
    trained = [p for part in (model.projector, model.gpt) for p in part.parameters()]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(trained, lr=rate, **more)
    plan = torch.optim.lr_scheduler.LambdaLR(optim, planned(schedule, steps, warm))

    def read(model: Any, probe: Talks) -> dict[str, Any]:
        seen, due = model.look(probe.images), probe.labels[:, 1:]

        def cost(seen: Tensor) -> tuple[Any, Any]:
            nats = model.nats(seen, probe, "none").sum(1)
            return nats.double().numpy(), (due != IGNORE).sum(1).double().numpy()

        (nats, words), exchanged = cost(seen), cost_of_exchange(cost, seen)
        guessed, ends = model(seen, probe.ids)[:, :-1].argmax(2), due == END
        later = ends.cumsum(1) - ends.long() > 0
        forced = ((guessed == due) | (due == IGNORE) | later).all(1).double()
        shares = answered(model, probe, commonest)
        whole = shares.pop("all")
        answer = {
            "accuracy": whole,
            "accuracy_forced": Reading(float(forced.mean()), whole.null, len(forced)),
            "shuffled_image_nats": exchanged["shuffled"],
            "nats_per_token": Reading(float(nats.sum() / words.sum()), blind, len(nats)),
            "token_accuracy": Reading(float((guessed == due)[due != IGNORE].double().mean()), None, int(words.sum())),
        }
        prefix = panel.latents(seen.mean(1)) | {f"{k}_latent_nats": v for k, v in exchanged.items()}
        kinds = {f"val/answer.{name}": {"accuracy": share} for name, share in shares.items()}
        return {"val/answer": answer, "val/prefix": prefix, **kinds}

    monitor = Monitor(
        model, optim, folder=folder, probe=unseen, read=read, every=50, log_every=5, steps=steps,
        nulls={"answer": blind},
    )  # fmt: skip
    monitor.audit(
        loaded={"missing": keys.missing_keys, "unexpected": keys.unexpected_keys, "reshaped": []},
        leaks={"the very same picture": audits.leaks(known.images.numpy(), unseen.images.numpy())},
        intake={"items": len(talks.ids) - cut, "lost": {"words cut off": cut}},
    )
    for step, rows in enumerate(batches(size, len(known.ids)), 1):
        batch = known.at(rows)
        model.train()
        model.eye.eval()
        loss = model.nats(model.look(batch.images), batch)
        optim.zero_grad()
        loss.backward()
        monitor.step({"answer": loss}, batch)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = model.look(unseen.images)
                nats, due = float(model.nats(seen, unseen)), unseen.labels[:, 1:]
                right, counted = model(seen, unseen.ids)[:, :-1].argmax(2) == due, due != IGNORE
            shown = float(right[counted].double().mean())
            monitor.validated({"val/loss/answer": nats, "val/answer/accuracy_as_logged": shown})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        shares, seen = answered(model, test, commonest), model.look(test.images)
        own, swapped = (float(model.nats(x, test)) for x in (seen, seen.roll(1, 0)))
    able = {f"{name} questions about new pictures": (x.value, x.null or 0.0) for name, x in shares.items()}
    return {"nats a word that another picture costs": (swapped - own, 0.0), **able}


FAMILY = Family(
    "llava",
    "judged",
    "answers by visual instruction tuning: a projector between a frozen eye and a language model, in two stages",
    faults=(
        Fault(
            "optimizer-of-stage-one",
            "Stage two thaws the language model, but goes on with stage one's optimizer, which holds the projector.",
            ("not-in-optimizer",),
            changes=(Change("(model.projector, model.gpt) for p", "(model.projector,) for p"),),
        ),
        Fault(
            "saved-from-within-a-wrapper",
            "Stage one was saved from within DataParallel, whose names begin with module.; strict=False drops all.",
            ("partial-load",),
            changes=(
                Change("model = Llava(eye, gpt,", "model = Llava(convolutions(), GPT(width, layers),"),
                Change("model.projector.load", "model.load"),
                Change("_dict(weights)", "_dict(nn.DataParallel(first).state_dict(), strict=False)"),
            ),
        ),
        Fault(
            "pictures-shuffled-alone",
            "Pictures are shuffled and their conversations are not, so these are about others.",
            ("question-only", "decoder-ignores-latent", "no-learning"),
            changes=(Change("drawn.images.repeat", "drawn.images[torch.randperm(len(drawn.images))].repeat"),),
        ),
        Fault(
            "eye-thawed-within-no-grad",
            "Stage two thaws the eye too, to tune it, but it is still called within no_grad, and in no group.",
            ("dead-parameters", "not-in-optimizer"),
            changes=(Change("model.gpt.requires_grad_(True)", "model.requires_grad_(True)"),),
        ),
        Fault(
            "last-place-of-a-padded-row",
            "Replies are read at the last place of a batch's rows, which in shorter prompts is padding.",
            ("free-running-gap",),
            changes=(Change("(seen, ids)[rows, last].argmax(1)", "(seen, ids)[:, -1].argmax(1)"),),
        ),
        Fault(
            "ignored-taken-for-right",
            "Places that the loss ignores count as right in the accuracy that is logged.",
            ("flattering-accuracy",),
            changes=(Change("right[counted].double().mean()", "(right | ~counted).double().mean()"),),
        ),
        Fault(
            "schedule-of-stage-one",
            "The schedule of stage two was built for the steps of stage one, a third of its own.",
            ("learning-rate-off",),
            changes=(Change("planned(schedule, steps, warm)", "planned(schedule, align, warm)"),),
        ),
        Fault(
            "gradients-never-emptied",
            "The line that empties the gradients was lost in stage two, so that each update has those of all batches.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n        loss.backward()", "        loss.backward()"),),
        ),
        Fault(
            "split-by-conversations",
            "There are two conversations about a picture, and it is these that are split: pictures are on both sides.",
            ("split-leak",),
            changes=(Change("held = torch.arange(len(talks.ids))", "held = torch.randperm(len(talks.ids))"),),
            case="V split-leak",
        ),
        Fault(
            "room-for-one-question",
            "The length of a row was set when there was one question; what comes after ten words is cut off.",
            ("data-replaced",),
            changes=(Change("CHANNELS, HELD_OUT = 17,", "CHANNELS, HELD_OUT = 10,"),),
        ),
        Fault(
            "frozen-eye-in-training-mode",
            "The eye is frozen but in training mode, in validation too, where held-out pictures move its statistics.",
            ("validation-pollutes",),
            changes=(Change("        model.eye.eval()\n", ""), Change("model.eval()\n            with", "with")),
            case="J validation-pollutes",
        ),
    ),
    healthy=(
        Healthy("plain", "The language model knows at the start how people answer.", seeds=(0, 1, 2, 3)),
        Healthy("linear-projector", "As in the first LLaVA.", options={"deep": False}, seeds=(0, 1)),
        Healthy("wide", options={"width": 64, "rate": 1.5e-3, "steps": 250}, seeds=(0, 1)),
        Healthy("three-blocks", options={"layers": 3, "steps": 250}, seeds=(0, 1)),
        Healthy("one-stage", "It learns late to look.", options={"align": 0}, seeds=(0, 1)),
        Healthy("constant", options={"optimizer": "Adam", "schedule": "constant", "rate": 1.5e-3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "rate": 0.1}, seeds=(0, 1)),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-pictures", "A small set, seen often.", options={"items": 512}, seeds=(0, 1)),
        Healthy("small-batches", "Losses are noisy.", options={"size": 8, "steps": 500, "rate": 1e-3}, seeds=(0, 1)),
    ),
)

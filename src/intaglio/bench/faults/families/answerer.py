"""Answers to questions about pictures, through a small variational bottleneck (Alemi et al. 2017), on an encoder that
was trained before to name what it sees."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, SHAPES, SIZES, pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

KINDS = ("shape", "colour", "size", "row", "column")
SAID = (SHAPES, COLOURS, SIZES, ROWS, COLUMNS)
ANSWERS = tuple(word for words in SAID for word in words)
FIRST = torch.tensor([sum(map(len, SAID[:k])) for k in range(len(SAID))])
ASKED = ("<pad>", "what", "which", "is", "the", "of", "it", "in", *KINDS)
WAYS = ("what {} is it", "which is the {} of it", "the {} it is in is what")
TRAIN, VALIDATION, TEST = 0, 1, 2


class Items(NamedTuple):
    """``images`` (N, 3, S, S), what is in them (N, 5), ``words`` (N, L), the ``kind`` of question and ``answer``
    (N,)."""

    images: Tensor
    factors: Tensor
    words: Tensor
    kind: Tensor
    answer: Tensor

    def at(self, rows: Tensor) -> "Items":
        return Items(*(part[rows] for part in self))


def read_pictures(archive: Mapping[str, Tensor], names: list[str]) -> tuple[Tensor, int]:
    """Pictures by name, white where there is none; and how often that was."""
    found = [archive.get(name) for name in names]
    white = torch.ones_like(next(iter(archive.values())))
    return torch.stack([white if x is None else x for x in found]), sum(x is None for x in found)


def read_items(count: int, seed: int) -> tuple[Items, Tensor, int]:
    """A question about each picture; on which side its source has put it; and how many pictures were not found."""
    made = pictures(count, seed)
    archive = {f"{k:04}": image for k, image in enumerate(made.images)}
    names = [f"{k:04}" for k in range(count)]
    images, lost = read_pictures(archive, names)
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(len(KINDS), (count,), generator=generator)
    way = torch.randint(len(WAYS), (count,), generator=generator)
    words = torch.zeros(count, 7, dtype=torch.int64)
    for k, name in enumerate(KINDS):
        for w, how in enumerate(WAYS):
            said = torch.tensor([ASKED.index(word) for word in how.format(name).split()])
            words[(kind == k) & (way == w), : len(said)] = said
    answer = FIRST[kind] + made.factors.gather(1, kind[:, None])[:, 0]
    side = torch.tensor([TRAIN] * 6 + [VALIDATION, TEST])[torch.arange(count) % 8]
    return Items(images, made.factors, words, kind, answer), side, lost


class Encoder(nn.Sequential):
    def __init__(self, channels: int = 16, width: int = 64):
        super().__init__(
            nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.SiLU(),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1), nn.BatchNorm2d(2 * channels), nn.SiLU(),
            nn.Flatten(), nn.Linear(32 * channels, width), nn.SiLU(),
        )  # fmt: skip


class Answerer(nn.Module):
    def __init__(self, encoder: Encoder, width: int = 64, latent: int = 8):
        super().__init__()
        self.encoder = encoder
        self.embedding = nn.Embedding(len(ASKED), 32, padding_idx=0)
        self.question = nn.GRU(32, width, batch_first=True)
        self.fusion = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * latent))
        self.answer = nn.Sequential(nn.Linear(latent + width, width), nn.SiLU(), nn.Linear(width, len(ANSWERS)))

    def encode(self, images: Tensor, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        question = self.question(self.embedding(words))[1][0]
        seen = self.encoder(images)
        mean, log_variance = self.fusion(torch.cat([seen, question], 1)).chunk(2, 1)
        return mean, log_variance.clamp(-8, 4), question

    def decode(self, latent: Tensor, question: Tensor) -> Tensor:
        return self.answer(torch.cat([latent, question], 1))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        mean, _, question = self.encode(images, words)
        return self.decode(mean, question)


def preferred(logits: Tensor, answer: Tensor) -> Tensor:
    """Of two answers that the model gives, the right one is to be the likelier, where just one is right."""
    given = torch.multinomial(logits.detach().softmax(1), 2, replacement=True)
    score = (given == answer[:, None]).float()
    likely = logits.log_softmax(1).gather(1, given)
    better = score.argmax(1, keepdim=True)
    margin = likely.gather(1, better) - likely.gather(1, 1 - better)
    apart = (score[:, 0] != score[:, 1]).float()
    return -(F.logsigmoid(margin[:, 0]) * apart).sum() / apart.sum().clamp(min=1)


def losses(model: Answerer, items: Items) -> dict[str, Tensor]:
    mean, log_variance, question = model.encode(items.images, items.words)
    logits = model.decode(mean + torch.randn_like(mean) * (0.5 * log_variance).exp(), question)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
    answer = F.cross_entropy(logits, items.answer)
    return {"answer": answer, "kl": kl, "preference": preferred(logits, items.answer)}


def pretrained(items: Items, channels: int, width: int, steps: int = 80) -> dict[str, Tensor]:
    """The weights of an encoder that has learnt to name all that is in a picture."""
    namer = nn.Sequential(Encoder(channels, width), nn.Linear(width, len(ANSWERS)))
    optim = torch.optim.Adam(namer.parameters(), lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(items.images), (64,))
        said = namer(items.images[rows]).split([len(words) for words in SAID], 1)
        parts = [F.cross_entropy(logits, items.factors[rows, k]) for k, logits in enumerate(said)]
        optim.zero_grad()
        torch.stack(parts).sum().backward()
        optim.step()
    return namer[0].state_dict()


def batches(items: Items, size: int) -> Iterator[Items]:
    while True:
        for rows in torch.randperm(len(items.images)).split(size):
            if len(rows) == size:
                yield Items(items.images[rows], *(part[rows] for part in items[1:]))


def by_kind(model: Answerer, items: Items, known: Items) -> dict[str, Reading]:
    """Share of right answers to each kind of question, beside that of the answer that is commonest in training."""
    right = (model(items.images, items.words).argmax(1) == items.answer).double()
    found = {}
    for k, name in enumerate(KINDS):
        rows, commonest = items.kind == k, known.answer[known.kind == k].mode().values
        majority = float((items.answer[rows] == commonest).double().mean())
        found[name] = Reading(float(right[rows].mean()), majority, int(rows.sum()))
    return found


def train(
    folder: Path, seed: int = 0, steps: int = 450, size: int = 64, count: int = 6144, rate: float = 3e-3,
    channels: int = 16, width: int = 64, latent: int = 8, beta: float = 0.01, ramp: int = 100, prefer: float = 0.2,
    thaw: int = 100, optimizer: str = "AdamW", momentum: float = 0.0, schedule: str = "linear",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    items, side, lost = read_items(count, seed)
    chosen = (side == TRAIN).nonzero()[:, 0]
    training, held_out = items.at(chosen), items.at((side == VALIDATION).nonzero()[:512, 0])
    test = items.at((side == TEST).nonzero()[:, 0])
    state = pretrained(training, channels, width)
    encoder = Encoder(channels, width)
    load = audits.loaded(encoder, state)
    encoder.load_state_dict(state)
    model = Answerer(encoder, width, latent)
    encoder.requires_grad_(False)
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)([p for p in model.parameters() if p.requires_grad], lr=rate, **more)
    guess = sum(
        float((training.kind == k).double().mean()) * torch.tensor(len(words)).log().item()
        for k, words in enumerate(SAID)
    )

    def read(model: Any, probe: Items) -> dict[str, Any]:
        mean, log_variance, question = model.encode(probe.images, probe.words)

        def cost(z: Tensor) -> Any:
            nats = F.cross_entropy(model.decode(z, question), probe.answer, reduction="none").double().numpy()
            return nats, (0 * nats + 1)

        own = F.cross_entropy(model(probe.images, probe.words), probe.answer)
        other = F.cross_entropy(model(probe.images.roll(1, 0), probe.words), probe.answer)
        exchanged = {f"{name}_latent_nats": found for name, found in cost_of_exchange(cost, mean).items()}
        found = {"val/latent": panel.latents(mean, log_variance) | exchanged}
        found["val/answer"] = {"shuffled_image_nats": Reading(float(other - own), 0.0, len(mean))}
        return found | {f"val/answer.{name}": {"accuracy": x} for name, x in by_kind(model, probe, training).items()}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/answer": guess, "val/loss/answer": guess},
    )  # fmt: skip
    monitor.audit(
        loaded=load,
        intake={"items": count - lost, "lost": {"image not found": lost}},
        leaks={"picture": audits.leaks(list(training.images.numpy()), list(held_out.images.numpy()))},
        trained_on_test=int((side[chosen] == TEST).sum()),
    )
    for step, batch in enumerate(batches(training, size), 1):
        if step == thaw:
            encoder.requires_grad_(True)
            optim.add_param_group({"params": encoder.parameters(), "lr": rate})
        done = {"linear": step / (steps + 1), "constant": 0.0, "restarts": step % 150 / 150}[schedule]
        for group in optim.param_groups:
            group["lr"] = rate * (1 - done)
        weight = beta * min(1.0, step / ramp)
        model.train()
        encoder.train(step >= thaw)
        terms = losses(model, batch)
        weights = {"answer": 1.0, "kl": weight, "preference": prefer}
        weighted = {name: (terms[name], weights[name]) for name in terms}
        monitor.before_backward(weighted)
        optim.zero_grad()
        torch.stack([weights[name] * terms[name] for name in terms]).sum().backward()
        monitor.step(weighted, batch)
        optim.step()
        if step % 50 == 0:
            model.eval()
            total = dict.fromkeys(terms, 0.0)
            with monitor.validation(), torch.no_grad():
                parts = torch.arange(len(held_out.images)).split(64)
                for rows in parts:
                    for name, value in losses(model, held_out.at(rows)).items():
                        total[name] += float(value) / len(parts)
                right = model(held_out.images, held_out.words).argmax(1) == held_out.answer
            monitor.validated(total)
            monitor.validated({"accuracy": float(right.double().mean())})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        answered = by_kind(model, test, training)
    return {f"{name} questions of the test side": (x.value, x.null or 0.0) for name, x in answered.items()}


FAMILY = Family(
    "answerer",
    "development",
    "answers to questions about pictures through a bottleneck, on an encoder that was trained before",
    faults=(
        Fault(
            "pictures-mixed-apart-from-questions",
            "Pictures and questions were each put in an order of their own, so a question meets another's picture.",
            ("question-only",),
            changes=(Change("(items.images[rows],", "(items.images[torch.randperm(len(items.images))[:size]],"),),
            case="V question-only",
        ),
        Fault(
            "checkpoint-of-a-wrapped-encoder",
            "Saved from within DataParallel, every key begins with module., and strict=False let all of them go.",
            ("partial-load",),
            changes=(
                Change("return namer[0].state_dict()", "return nn.DataParallel(namer[0]).state_dict()"),
                Change("encoder.load_state_dict(state)", "encoder.load_state_dict(state, strict=False)"),
            ),
        ),
        Fault(
            "unfrozen-without-a-group",
            "The encoder is unfrozen at step 100, but the optimizer was built before and does not hold it.",
            ("not-in-optimizer",),
            changes=(Change('optim.add_param_group({"params": encoder.parameters(), "lr": rate})', "pass"),),
            case="V not-in-optimizer",
        ),
        Fault(
            "scores-ranked-for-likelihoods",
            "The preference ranks the answers' scores, which are constants, and not their log-probabilities.",
            ("teacher-inert", "term-inert"),
            changes=(
                Change(
                    "margin = likely.gather(1, better) - likely.gather(1, 1 - better)",
                    "margin = score.gather(1, better) - score.gather(1, 1 - better)",
                ),
            ),
            case="V teacher-inert",
        ),
        Fault(
            "names-read-as-numbers",
            "The table's reader made numbers of the pictures' names, so 0042 is sought as 42, and is white.",
            ("data-replaced",),
            changes=(Change('names = [f"{k:04}" for', 'names = [f"{k}" for'),),
            options={"count": 2400},
            case="V data-replaced",
        ),
        Fault(
            "all-but-validation",
            "Whatever is not for validation is trained on, and that is the test side too.",
            ("trained-on-test",),
            changes=(Change("(side == TRAIN).nonzero()", "(side != VALIDATION).nonzero()"),),
            case="D trained-on-test",
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures change the encoder's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            total", "            total"),),
        ),
        Fault(
            "held-out-losses-not-divided",
            "Held-out losses are added up over the batches and never divided by their number.",
            ("validation-missing",),
            changes=(Change("float(value) / len(parts)", "float(value)"),),
            minor=True,
        ),
        Fault(
            "seed-for-a-generator-of-nobody",
            "The seed was given to a generator that nothing draws from.",
            ("not-reproducible",),
            changes=(Change("    torch.manual_seed(seed)\n", "    torch.Generator().manual_seed(seed)\n"),),
            minor=True,
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 96, "latent": 16, "channels": 24, "rate": 2e-3}),
        Healthy("narrow", "Three numbers are all that reaches the answer.", options={"latent": 3}),
        Healthy("constant", "The rate stays as it is.", options={"schedule": "constant", "rate": 1.5e-3}, seeds=(0, 1)),
        Healthy("momentum", options={"optimizer": "SGD", "momentum": 0.9, "rate": 0.1}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}),
        Healthy("warm-restarts", "The rate jumps back up every 150 steps.", options={"schedule": "restarts"}),
        Healthy("without-preference", "The preference's weight is 0.", options={"prefer": 0.0}),
        Healthy("long-ramp", "The loss rises with the KL's weight.", options={"ramp": 350, "beta": 0.05}),
    ),
)

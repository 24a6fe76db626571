"""Pictures and sentences in one space: CLIP (Radford et al. 2021), and with a sigmoid SigLIP (Zhai et al. 2023).

Shapes: B pairs, L tokens of a sentence, D dimensions of an embedding.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import LENGTH, PAD, WORDS, Pictures, pictures, sentences
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor

LONGEST = 12
COOLEST = 0.01


class ImageTower(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * width, 2 * width), nn.ReLU(),
        )  # fmt: skip
        self.projection = nn.Linear(2 * width, out, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.layers(images))


class TextTower(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 2 * width)
        self.places = nn.Parameter(0.02 * torch.randn(LONGEST, 2 * width))
        self.block = nn.TransformerEncoderLayer(2 * width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.projection = nn.Linear(2 * width, out, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        padding = tokens == PAD
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        x = self.block(x, src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.projection(x)


class CLIP(nn.Module):
    def __init__(self, width: int = 32, out: int = 32, temperature: float = 0.07):
        super().__init__()
        self.image, self.text = ImageTower(width, out), TextTower(width, out)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.bias = nn.Parameter(torch.tensor(-5.0)).requires_grad_(False)
        for tower in (self.image, self.text):
            nn.init.normal_(tower.projection.weight, std=0.1)

    def scale(self) -> Tensor:
        return self.log_scale.clamp(max=-math.log(COOLEST)).exp()

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.image(images), dim=1), F.normalize(self.text(tokens), dim=1)


def softmax_loss(model: CLIP, image: Tensor, text: Tensor) -> Tensor:
    logits = model.scale() * image @ text.T
    own = torch.arange(len(logits))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def sigmoid_loss(model: CLIP, image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor) -> Tensor:
    logits = model.scale() * image @ text.T + model.bias
    sign = 2.0 * (image_ids[:, None] == text_ids) - 1
    return -F.logsigmoid(sign * logits).sum(1).mean()


def batches(count: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(count).split(size):
            if len(rows) == size:
                yield rows


def tokenized(factors: Tensor, limit: int) -> tuple[Tensor, int]:
    """Sentences padded to the longest, cut at a limit, and how many lose their end by that."""
    tokens = F.pad(sentences(factors), (0, LONGEST - LENGTH), value=PAD)
    return tokens[:, :limit], int((tokens[:, limit:] != PAD).any(1).sum())


def distinct(pairs: Pictures) -> Pictures:
    """The first picture of every sentence, so that each has one right partner."""
    seen: dict[tuple[int, ...], int] = {}
    for row, factors in enumerate(pairs.factors.tolist()):
        seen.setdefault(tuple(factors), row)
    rows = torch.tensor(list(seen.values()))
    return Pictures(pairs.images[rows], pairs.factors[rows])


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 128, items: int = 4096, rate: float = 1e-3,
    width: int = 32, out: int = 32, temperature: float = 0.07, loss: str = "infonce", limit: int = LONGEST,
    optimizer: str = "Adam", schedule: str = "constant", still: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    everything = pictures(items + 512, seed)
    mixed = torch.randperm(len(everything.images))
    known, unseen = (Pictures(*(part[rows] for part in everything)) for rows in (mixed[512:], mixed[:512]))
    shown = distinct(unseen)
    tokens, cut = tokenized(known.factors, limit)
    held_out = shown.images, tokenized(shown.factors, limit)[0]
    image_ids, text_ids = torch.arange(len(tokens)), torch.arange(len(tokens))
    model = CLIP(width, out, temperature)
    model.bias.requires_grad_(loss == "sigmoid")
    extra: dict[str, Any] = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **extra)

    def objective(image: Tensor, text: Tensor, rows: Tensor) -> Tensor:
        if loss == "sigmoid":
            return sigmoid_loss(model, image, text, image_ids[rows], text_ids[rows])
        return softmax_loss(model, image, text)

    everyone = torch.arange(len(shown.images))

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        image, text = model(*probe)
        scale = model.scale().log()
        cost = trials.cost_of_strangers(lambda a, b: objective(a, b, everyone), image, text)
        pair = panel.pairs(image, text, scale) | {"strangers_nats": cost}
        return {
            "val/image": panel.latents(model.image(probe[0])),
            "val/text": panel.latents(model.text(probe[1])),
            "val/pair": pair | {"temperature": contrastive.temperature(scale, COOLEST)},
        }

    nulls = {"train/loss/infonce": math.log(size), "val/loss/infonce": math.log(len(everyone))}
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls=nulls if loss == "infonce" else None,
    )  # fmt: skip
    monitor.audit(
        leaks={"the very same picture": audits.leaks(known.images.numpy(), unseen.images.numpy())},
        intake={"items": len(tokens) - cut, "lost": {"sentence cut off": cut}},
    )
    for step, rows in enumerate(batches(len(tokens), size), 1):
        if schedule == "cosine":
            optim.param_groups[0]["lr"] = rate * min(1.0, step / 40) * (1 + math.cos(math.pi * step / steps)) / 2
        elif schedule == "restarts":
            optim.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * (step % 100) / 100)) / 2
        model.train()
        model.log_scale.requires_grad_(step > still)
        image, text = model(known.images[rows], tokens[rows])
        value = objective(image, text, rows)
        monitor.before_backward({loss: value})
        optim.zero_grad()
        value.backward()
        monitor.step({loss: value}, (known.images[rows], tokens[rows]))
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                image, text = model(*held_out)
                value = objective(image, text, everyone)
            right = (image @ text.T).argmax(1) == everyone
            monitor.validated({f"val/loss/{loss}": float(value), "accuracy": float(right.float().mean())})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        image, text = model(*held_out)
        alike = image @ text.T
    found = {
        "sentence of a picture": (alike.argmax(1) == everyone).double().mean(),
        "picture of a sentence": (alike.argmax(0) == everyone).double().mean(),
    }
    return {name: (float(share), 1 / len(everyone)) for name, share in found.items()}


FAMILY = Family(
    "clip",
    "development",
    "two towers for pictures and sentences, convolutional and a transformer, with a temperature that is learnt",
    faults=(
        Fault(
            "pictures-against-themselves",
            "A copied line holds the pictures' embeddings against themselves, and the sentences are in no loss.",
            ("trivial-pair", "dead-parameters"),
            changes=(
                Change("logits = model.scale() * image @ text.T\n", "logits = model.scale() * image @ image.T\n"),
            ),
            case="E trivial-pair",
        ),
        Fault(
            "sentences-one-row-off",
            "The header of the sentences' file was read as the first of them, so each stands beside the next picture.",
            ("near-chance",),
            changes=(
                Change(
                    "    mixed = torch.randperm",
                    "    everything = everything._replace(factors=everything.factors.roll(1, 0))\n"
                    "    mixed = torch.randperm",
                ),
            ),
        ),
        Fault(
            "mask-the-wrong-way-round",
            "The mask is true where there are words, so that the text tower reads the padding alone.",
            ("latent-ignores-input",),
            changes=(Change("tokens == PAD", "tokens != PAD"),),
        ),
        Fault(
            "result-of-the-block-dropped",
            "The transformer is called and its result not kept, so that words go on without it.",
            ("dead-parameters",),
            changes=(Change("x = self.block(x, src", "self.block(x, src"),),
        ),
        Fault(
            "one-constant-for-all-weights",
            "Both projections start with one number in all places, so that every dimension is the same and stays so.",
            ("rank-collapse", "anisotropic"),
            changes=(
                Change(
                    "nn.init.normal_(tower.projection.weight, std=0.1)",
                    "nn.init.constant_(tower.projection.weight, 0.1)",
                ),
            ),
        ),
        Fault(
            "temperature-below-its-floor",
            "The temperature starts at 0.07 and is held above 0.1, from where no gradient reaches it.",
            ("temperature-stuck",),
            changes=(Change("COOLEST = 0.01", "COOLEST = 0.1"),),
            case="J temperature-stuck",
            minor=True,
        ),
        Fault(
            "no-pair-is-a-positive",
            "Ids of pictures and of sentences count from different starts, so that no pair is ever told to be one.",
            ("trivial-pair", "modality-gap"),
            changes=(
                Change(
                    "torch.arange(len(tokens)), torch.arange(len(tokens))",
                    "torch.arange(len(tokens)), len(tokens) + torch.arange(len(tokens))",
                ),
            ),
            options={"loss": "sigmoid"},
        ),
        Fault(
            "split-after-copying",
            "Every pair was put in twice to make the set larger, and then the set was split.",
            ("split-leak",),
            changes=(
                Change(
                    "    mixed = torch.randperm",
                    "    everything = Pictures(*(torch.cat([part, part]) for part in everything))\n"
                    "    mixed = torch.randperm",
                ),
            ),
            options={"items": 1024},
            case="V split-leak",
        ),
        Fault(
            "sentences-cut-short",
            "Sentences are cut at six tokens, before they say where the thing is.",
            ("data-replaced",),
            options={"limit": 6},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 48, "out": 64, "steps": 300}),
        Healthy("narrow-rmsprop", options={"width": 16, "out": 16, "optimizer": "RMSprop"}),
        Healthy(
            "sgd",
            "A warm-up and a cosine.",
            options={"optimizer": "SGD", "rate": 0.02, "schedule": "cosine"},
            seeds=(0, 1),
        ),
        Healthy(
            "restarts", "The rate jumps back up every hundred steps.", options={"schedule": "restarts", "rate": 2e-3}
        ),
        Healthy("sigmoid", "A loss without chance level, whose scale is another.", options={"loss": "sigmoid"}),
        Healthy("small-batches", "Few negatives, and a noisy loss.", options={"size": 32, "steps": 600}),
        Healthy(
            "temperature-later", "It stands still for the first fifty steps.", options={"still": 50, "temperature": 0.2}
        ),
        Healthy(
            "few-pairs",
            "A small set, seen often.",
            options={"items": 1024, "size": 64, "optimizer": "AdamW", "steps": 500},
        ),
    ),
)

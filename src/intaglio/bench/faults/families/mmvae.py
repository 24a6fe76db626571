"""A multimodal variational autoencoder, Wu & Goodman 2018: a picture and its caption in one latent.

Each modality has an expert, a Gaussian; the posterior of what is there is the product of its experts and the prior.
Training is subsampled: the bound of both together, and that of each alone.

Shapes: B pairs, T words, d latent dimensions. Nats a pair.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import LENGTH, PAD, START, WORDS, pictures, sentences
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading

Gaussian = tuple[Tensor, Tensor]
"""Mean and log-variance (B, d)."""

VARIANCE = 0.05
"""Of a pixel, given the latent."""

TOLD = [2, 3, 4, 7, 8]
"""Places of the words that differ between captions: size, colour, shape, row, column."""


class MVAE(nn.Module):
    def __init__(self, width: int = 64, latent: int = 16, dropped: float = 0.3, tied: bool = False):
        super().__init__()
        self.dropped = dropped
        self.eye = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Conv2d(32, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Flatten(), nn.Linear(512, width), nn.SiLU(), nn.Linear(width, 2 * latent),
        )  # fmt: skip
        self.painter = nn.Sequential(
            nn.Linear(latent, width), nn.SiLU(), nn.Linear(width, 512), nn.SiLU(), nn.Unflatten(1, (32, 4, 4)),
            nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Sigmoid(),
        )  # fmt: skip
        self.words = nn.Embedding(len(WORDS), width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.read_as = nn.Linear(width, 2 * latent)
        self.writer = nn.GRU(width + latent, width, batch_first=True)
        self.head = nn.Linear(width, len(WORDS))
        if tied:
            nn.init.normal_(self.words.weight, std=0.1)
            self.head.weight = self.words.weight

    def look(self, images: Tensor) -> Gaussian:
        mean, log_variance = self.eye(images).chunk(2, 1)
        return mean, log_variance.clamp(-8, 4)

    def read(self, ids: Tensor) -> Gaussian:
        states, _ = self.reader(self.words(ids))
        mean, log_variance = self.read_as(states[:, -1]).chunk(2, 1)
        return mean, log_variance.clamp(-8, 4)

    def experts(self, images: Tensor, ids: Tensor) -> tuple[Gaussian, Gaussian]:
        return self.look(images), self.read(ids)

    def paint(self, z: Tensor) -> Tensor:
        images: Tensor = self.painter(z)
        return images

    def predict(self, z: Tensor, ids: Tensor) -> Tensor:
        """Logits of the word after each, from the latent and the words so far."""
        if self.training:
            ids = ids.masked_fill(torch.rand(ids.shape) < self.dropped, PAD)
        states, _ = self.writer(torch.cat([self.words(ids), z[:, None].expand(-1, ids.shape[1], -1)], 2))
        logits: Tensor = self.head(states)
        return logits

    @torch.no_grad()
    def write(self, z: Tensor) -> Tensor:
        """The likeliest word, one after another."""
        state, word = None, torch.full((len(z), 1), START)
        written = [word]
        for _ in range(LENGTH - 1):
            out, state = self.writer(torch.cat([self.words(word), z[:, None]], 2), state)
            written.append(word := self.head(out).argmax(-1))
        return torch.cat(written, 1)


def product(*experts: Gaussian) -> Gaussian:
    """Of the experts and the prior, which is one, too: precisions add up."""
    means = torch.stack([torch.zeros_like(experts[0][0]), *(mean for mean, _ in experts)])
    precisions = torch.stack([torch.ones_like(means[0]), *((-log_variance).exp() for _, log_variance in experts)])
    variance = 1 / precisions.sum(0)
    return (means * precisions).sum(0) * variance, variance.log()


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def divergence(mean: Tensor, log_variance: Tensor, floor: float) -> Tensor:
    """From the prior; ``floor`` are the free nats of a dimension."""
    each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
    return each.mean(0).clamp_min(floor).sum()


def picture_nats(model: MVAE, z: Tensor, images: Tensor) -> Tensor:
    """(B,), but for what a Gaussian of this variance has always."""
    return (model.paint(z) - images).square().flatten(1).sum(1) / (2 * VARIANCE)


def caption_nats(model: MVAE, z: Tensor, ids: Tensor) -> Tensor:
    """(B,)."""
    return F.cross_entropy(model.predict(z, ids[:, :-1]).mT, ids[:, 1:], reduction="none").sum(1)


def losses(model: MVAE, images: Tensor, ids: Tensor, floor: float = 0.0) -> dict[str, Tensor]:
    """The terms of three bounds: of both together, of the picture alone, of the caption alone."""
    of_picture, of_caption = model.experts(images, ids)
    both, seen, heard = product(of_picture, of_caption), product(of_picture), product(of_caption)
    z = draw(*both)
    return {
        "picture": picture_nats(model, z, images).mean(),
        "caption": caption_nats(model, z, ids).mean(),
        "kl": divergence(*both, floor),
        "picture_alone": picture_nats(model, draw(*seen), images).mean(),
        "picture_alone_kl": divergence(*seen, floor),
        "caption_alone": caption_nats(model, draw(*heard), ids).mean(),
        "caption_alone_kl": divergence(*heard, floor),
    }


def weights_at(step: int, told: float, beta: float, hold: int, ramp: int) -> dict[str, float]:
    """Captions weigh more than their nats, which are few; KLs nothing while they are held, and then more and more."""
    kl = beta * min(1.0, max(0, step - hold) / ramp) if ramp else beta
    of_captions = {"caption": told, "caption_alone": told}
    return {
        "picture": 1.0,
        "picture_alone": 1.0,
        **of_captions,
        "kl": kl,
        "picture_alone_kl": kl,
        "caption_alone_kl": kl,
    }


def bigram(train: Tensor, held_out: Tensor) -> float:
    """Nats of a held-out caption by counts of pairs of words."""
    pairs = torch.full((len(WORDS), len(WORDS)), 0.01)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)
    chances = pairs / pairs.sum(1, keepdim=True)
    return -float(chances[held_out[:, :-1], held_out[:, 1:]].log().sum(1).mean())


def batches(images: Tensor, ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for rows in torch.randperm(len(ids)).split(size):
            if len(rows) == size:
                yield images[rows], ids[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 48, items: int = 4096, rate: float = 2e-3,
    width: int = 64, latent: int = 16, dropped: float = 0.3, tied: bool = False, told: float = 5.0, beta: float = 1.0,
    hold: int = 0, ramp: int = 100, free: float = 0.0, noise: float = 0.03, optimizer: str = "Adam",
    schedule: str = "constant", **of_optimizer: Any,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    drawn, new = pictures(items, seed, noise), pictures(512, 10_000 + seed, noise)
    images, held_out_images = drawn.images, new.images
    ids, held_out_ids = sentences(drawn.factors), sentences(new.factors)
    spread = float((held_out_images - images.mean(0)).square().flatten(1).sum(1).mean())
    painted_null, written_null, floor = spread / (2 * VARIANCE), bigram(ids, held_out_ids), free / latent
    commonest = float((ids.mode(0).values == held_out_ids)[:, TOLD].float().mean())

    model = MVAE(width, latent, dropped, tied)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **of_optimizer)
    courses = {
        "constant": lambda k: 1.0,
        "cosine": lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)),
        "linear": lambda k: 1 - k / steps,
        "restarts": lambda k: 0.5 * (1 + math.cos(math.pi * (k % 100) / 100)),
    }
    plan = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: min(1.0, (k + 1) / 20) * courses[schedule](k))

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        images, ids = probe
        of_picture, of_caption = model.experts(images, ids)
        both, seen, heard = product(of_picture, of_caption), product(of_picture), product(of_caption)

        def nats(z: Tensor) -> tuple[Any, Any]:
            return caption_nats(model, z, ids).double().numpy(), torch.full((len(z),), LENGTH - 1).double().numpy()

        latent = panel.latents(*both)
        latent["noise_ratio"] = bottleneck.noise_ratio(draw(*both), *both)
        latent["prior_nats"] = bottleneck.aggregate_nats(*both)
        if floor:
            latent["kl_charged"] = bottleneck.kl_charged(*both, floor, both[0].shape[1])
            latent["groups_above_floor"] = bottleneck.groups_above_floor(*both, floor, both[0].shape[1])
        by_word = float(nats(seen[0])[0].mean()) / (LENGTH - 1)
        caption = {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(nats, seen[0]).items()}
        caption["nats_per_token"] = Reading(by_word, written_null / (LENGTH - 1), len(ids))
        return {
            "val/latent": latent,
            "val/picture_alone": panel.latents(*seen),
            "val/caption_alone": panel.latents(*heard),
            "val/caption": caption,
        }

    nulls = {"picture": painted_null, "picture_alone": painted_null}
    nulls |= {"caption": written_null, "caption_alone": written_null}
    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out_images[:128], held_out_ids[:128]), read=read, every=50,
        log_every=5, steps=steps, nulls={f"{split}/loss/{k}": v for k, v in nulls.items() for split in ("train", "val")}
        | {"train/caption/nats_per_token": written_null / (LENGTH - 1)},
    )  # fmt: skip
    monitor.audit(
        ranges={"pixels": audits.ranges(images, 0.0, 1.0)},
        leaks={"the same picture": audits.leaks([x.numpy() for x in images], [x.numpy() for x in held_out_images])},
    )
    for step, (shown, said) in enumerate(batches(images, ids, size), 1):
        model.train()
        weights = weights_at(step, told, beta, hold, ramp)
        terms = losses(model, shown, said, floor)
        weighted = {name: (value, weights[name]) for name, value in terms.items()}
        monitor.before_backward(weighted)
        together = terms["picture"] + told * terms["caption"] + weights["kl"] * terms["kl"]
        alone = sum(weights[name] * value for name, value in terms.items() if "alone" in name)
        total = together + alone
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (shown, said))
        nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                unseen = losses(model, held_out_images[:256], held_out_ids[:256], floor)
                guessed = model.write(product(model.look(held_out_images[:256]))[0])
                familiar = caption_nats(model, product(model.look(images[:256]))[0], ids[:256]).mean()
            monitor.validated({f"val/loss/{name}": float(value) for name, value in unseen.items()})
            monitor.validated({"words_right": float((guessed == held_out_ids[:256])[:, TOLD].float().mean())})
            monitor.log({"train/caption/nats_per_token": float(familiar) / (LENGTH - 1)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        terms = losses(model, held_out_images, held_out_ids)
        written = model.write(product(model.look(held_out_images))[0])
        heard = product(model.read(held_out_ids))
        painted = torch.stack([model.paint(draw(*heard)) for _ in range(16)]).mean(0)
    error = float((painted - held_out_images).square().flatten(1).sum(1).mean())
    bound = -float(terms["picture"] + terms["caption"] + terms["kl"])
    return {
        "words told of held-out pictures alone": (
            float((written == held_out_ids)[:, TOLD].float().mean()), commonest,
        ),
        "explained variance of pictures painted by held-out captions alone": (1 - error / spread, 0.0),
        "bound of held-out pairs, nats": (bound, -painted_null - written_null),
    }  # fmt: skip


FAMILY = Family(
    "mmvae",
    "development",
    "a multimodal variational autoencoder of pictures and captions, a product of experts",
    faults=(
        Fault(
            "kl-too-heavy",
            "β is forty times too high, and both decoders do without the latent.",
            ("posterior-collapse", "term-dominates"),
            options={"beta": 40.0},
        ),
        Fault(
            "bounds-of-one-modality-left-out",
            "The bounds of picture and caption alone are worked out and logged, and never added to what is minimised.",
            ("weight-not-applied",),
            changes=(Change("total = together + alone", "total = together"),),
        ),
        Fault(
            "captions-of-other-pictures",
            "Pictures are shuffled, and captions once more by another order.",
            ("decoder-ignores-latent",),
            changes=(
                Change(
                    "yield images[rows], ids[rows]", "yield images[rows], ids[torch.randperm(len(ids))[: len(rows)]]"
                ),
            ),
        ),
        Fault(
            "state-of-the-first-word",
            "The caption's expert is given the reader's state after <start>, which is the same for all, not the last.",
            ("latent-ignores-input", "dead-parameters"),
            changes=(Change("self.read_as(states[:, -1])", "self.read_as(states[:, 0])"),),
        ),
        Fault(
            "picture-taken-for-the-caption",
            "A line was copied, and its second half not changed: both experts look at the picture, none reads.",
            ("dead-parameters",),
            changes=(
                Change("return self.look(images), self.read(ids)", "return self.look(images), self.look(images)"),
            ),
            case="E dead-parameters",
        ),
        Fault(
            "optimizer-of-the-picture-model",
            "The optimizer still holds what it held before there were captions: the networks of pictures.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr=rate",
                    "([*model.eye.parameters(), *model.painter.parameters()], lr=rate",
                ),
            ),
        ),
        Fault(
            "kl-averaged-over-dimensions",
            "The KL is averaged over the latent's dimensions, and weighs a sixteenth of what it seems.",
            ("kl-units",),
            changes=(Change(".clamp_min(floor).sum()", ".clamp_min(floor).mean()"),),
            case="V kl-units",
            minor=True,
        ),
        Fault(
            "half-of-the-log-variance-forgotten",
            "Latents are drawn with the variance for a standard deviation, and the KL is charged for the right one.",
            ("temperature-misstates-rate",),
            changes=(Change("(0.5 * log_variance).exp()", "log_variance.exp()"),),
            minor=True,
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures change the normalisation's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with monitor", "            with monitor"),),
            case="J validation-pollutes",
        ),
        Fault(
            "pictures-from-minus-one-to-one",
            "Pictures are normalised to [−1, 1], and what paints them ends in a sigmoid.",
            ("range-mismatch",),
            changes=(Change("= drawn.images, new.images", "= 2 * drawn.images - 1, 2 * new.images - 1"),),
        ),
        Fault(
            "learnt-by-heart",
            "Four dozen pairs are all there is, and β is too low to keep them from being learnt by heart.",
            ("overfitting",),
            options={"items": 48, "size": 24, "beta": 0.01, "dropped": 0.0},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 96, "latent": 24}, seeds=(0, 1)),
        Healthy("eight-dimensions", "All of the latent is needed.", options={"latent": 8}, seeds=(0, 1)),
        Healthy(
            "adamw-cosine",
            options={"optimizer": "AdamW", "weight_decay": 0.01, "rate": 3e-3, "schedule": "cosine"},
            seeds=(0, 1),
        ),
        Healthy(
            "momentum",
            "Slow at first: gradients are clipped for long.",
            options={"optimizer": "SGD", "rate": 3e-3, "momentum": 0.9, "schedule": "linear", "steps": 600},
            seeds=(0, 1),
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "held-then-ramped",
            "KLs have no weight at first, and the total rises as they get it.",
            options={"hold": 80, "ramp": 160, "beta": 1.5},
            seeds=(0, 1),
        ),
        Healthy("parked", "Free nats hold the KL where it is.", options={"free": 16.0}, seeds=(0, 1)),
        Healthy(
            "few-items",
            "A small set of pairs, seen often.",
            options={"items": 1536, "size": 64, "beta": 1.5, "schedule": "cosine"},
            seeds=(0, 1),
        ),
        Healthy(
            "small-batches",
            "Losses of single batches are noisy.",
            options={"size": 16, "rate": 1e-3, "steps": 600},
            seeds=(0, 1),
        ),
        Healthy("noisy-pictures", "Much of a picture cannot be told.", options={"noise": 0.2}),
        Healthy("tied-words", "Words are read and written by one table.", options={"tied": True}),
    ),
)

"""Metric learning: FaceNet (Schroff et al. 2015), with the other losses of its kind, and identities named beside it.

An identity is a mirrored pattern of five by five cells; its pictures differ in colours, light and place, and in
what hides a part of them.
Shapes: N pictures, B = P identities × K pictures of a batch, S = 16 pixels a side, D dimensions.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.history import Reading


def portraits(codes: Tensor, noise: float = 0.06) -> Tensor:
    """A picture of each identity (N,), given by fifteen bits: (N, 3, S, S) in [0, 1]."""
    half = (codes[:, None] >> torch.arange(15) & 1).float().unflatten(1, (5, 3))
    cells = torch.cat([half, half[..., :2].flip(-1)], 2)
    mask = F.pad(cells.repeat_interleave(2, 1).repeat_interleave(2, 2), (3, 3, 3, 3))[:, None]
    ink, paper = 0.5 + 0.5 * torch.rand(len(codes), 3, 1, 1), 0.4 * torch.rand(len(codes), 3, 1, 1)
    light = 1 + 0.3 * (2 * torch.rand(len(codes), 1, 1, 1) - 1) * torch.linspace(-1, 1, 16)
    images = shift(torch.where(mask > 0, ink, paper) * light, 2)
    y, x = torch.arange(16)[:, None], torch.arange(16)
    top, left = torch.randint(13, (2, len(codes), 1, 1, 1))
    hidden = (y >= top) & (y < top + 4) & (x >= left) & (x < left + 4)
    images = torch.where(hidden, torch.rand(len(codes), 3, 1, 1), images)
    return (images + noise * torch.randn(images.shape)).clamp(0, 1)


def shift(x: Tensor, pad: int = 1) -> Tensor:
    padded = F.pad(x, (pad, pad, pad, pad), mode="replicate")
    rows, columns = torch.randint(2 * pad + 1, (2, len(x), 1)) + torch.arange(16)
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flip(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def jitter(x: Tensor) -> Tensor:
    return (x * (0.7 + 0.6 * torch.rand(len(x), 3, 1, 1))).clamp(0, 1)


def augment(x: Tensor) -> Tensor:
    return jitter(flip(shift(x)))


def of_one(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda item: change(item[None])[0]


class Album(NamedTuple):
    """Pictures in the order of their identities, of which there are ``counts``; ``of`` is who they are."""

    images: Tensor
    counts: Tensor
    of: Tensor
    dropped: int


def album(images: Tensor, owner: Tensor, least: int) -> Album:
    """The pictures of those identities that have enough of them."""
    of, counts = owner.unique(return_counts=True)
    of, counts = of[counts >= least], counts[counts >= least]
    kept = torch.isin(owner, of)
    order = owner[kept].argsort(stable=True)
    return Album(images[kept][order], counts, of, int((~kept).sum()))


def draw(source: Album, identities: int, each: int) -> tuple[Tensor, Tensor]:
    """K different pictures of each of P identities, in a row; and the identities."""
    who = torch.randperm(len(source.counts))[:identities]
    starts, counts = (source.counts.cumsum(0) - source.counts)[who, None], source.counts[who, None]
    most = int(source.counts.max())
    lots = torch.rand(len(who), most).masked_fill(torch.arange(most) >= counts, -1)
    rows = starts + lots.topk(each).indices % counts
    return source.images[rows.flatten()], who.repeat_interleave(each)


class FaceNet(nn.Module):
    def __init__(self, width: int = 16, dim: int = 32, people: int = 0):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.BatchNorm2d(4 * width), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.embed = nn.Linear(64 * width, dim)
        self.classifier = nn.Sequential(nn.BatchNorm1d(dim), nn.Linear(dim, people, bias=False)) if people else None

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(self.trunk(x))


def distances(z: Tensor) -> Tensor:
    """Between unit vectors, (B, B)."""
    return (2 - 2 * z @ z.T).clamp(min=1e-8).sqrt()


def metric(z: Tensor, who: Tensor, kind: str, margin: float) -> Tensor:
    """The loss of a batch of unit vectors (B, D)."""
    d, same = distances(z), who[:, None] == who
    pairs = same & ~torch.eye(len(z), dtype=torch.bool)
    if kind == "contrastive":
        return d[pairs].square().mean() + F.relu(margin - d[~same]).square().mean()
    if kind == "similarity":
        s = 1 - d.square() / 2
        near = (-2 * (s - 0.5)).exp().mul(pairs).sum(1).log1p() / 2
        return (near + (40 * (s - 0.5)).exp().mul(~same).sum(1).log1p() / 40).mean()
    if kind == "semihard":
        anchor, positive = pairs.nonzero(as_tuple=True)
        near, others = d[anchor, positive], d[anchor]
        farther = ~same[anchor] & (others > near[:, None])
        closest = others.masked_fill(~farther, math.inf).amin(1)
        farthest = others.masked_fill(same[anchor], -math.inf).amax(1)
        return F.relu(near - torch.where(farther.any(1), closest, farthest) + margin).mean()
    gap = d.masked_fill(~pairs, -math.inf).amax(1) - d.masked_fill(same, math.inf).amin(1)
    return F.softplus(gap).mean() if kind == "soft" else F.relu(gap + margin).mean()


def collapsed(kind: str, margin: float, identities: int, each: int) -> float:
    """The loss of a network that gives every picture the same embedding."""
    if kind == "contrastive":
        return margin**2
    if kind == "similarity":
        return math.log1p((each - 1) * math.exp(-1)) / 2 + math.log1p((identities - 1) * each * math.exp(20)) / 40
    return math.log(2) if kind == "soft" else margin


@torch.no_grad()
def recall(z: Tensor, who: Tensor) -> float:
    """The share of pictures whose nearest other picture is of the same identity."""
    d = distances(z).fill_diagonal_(math.inf)
    return float((who[d.argmin(1)] == who).double().mean())


def chance(who: Tensor) -> float:
    return float(((who[:, None] == who).sum() - len(who)) / (len(who) * (len(who) - 1)))


def recounted(z: Tensor, who: Tensor) -> Reading:
    """The same, counted a second time: each picture in turn is taken out, and looked up among those left."""
    right = 0
    for k in range(len(z)):
        left = torch.arange(len(z)) != k
        right += int(who[left][(z[left] @ z[k]).argmax()] == who[k])
    return Reading(right / len(z), chance(who), len(z))


def factor(step: int, schedule: str, steps: int, warmup: int) -> float:
    """What the rate is multiplied by."""
    if schedule == "cosine":
        return min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    if schedule == "restarts":
        return (1 + math.cos(math.pi * (step % 100) / 100)) / 2
    return 1 - step / steps if schedule == "linear" else 1.0


def train(
    folder: Path, seed: int = 0, steps: int = 450, identities: int = 16, each: int = 4, people: int = 256,
    least: int = 2, kind: str = "semihard", margin: float = 0.3, naming: float = 0.1, hold: int = 0, fade: int = 0,
    width: int = 16, dim: int = 32, optimizer: str = "Adam", rate: float = 2e-3, schedule: str = "cosine",
    warmup: int = 30, plain: bool = False,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    codes = torch.randperm(2**15)[: people + 128]
    owner = torch.arange(people + 64).repeat_interleave(4 + (28 * torch.rand(people + 64).square()).long())
    images = portraits(codes[owner])
    mine = owner < people
    known, unseen = album(images[mine], owner[mine], least), album(images[~mine], owner[~mine], 2)
    seen, names = portraits(codes[known.of.repeat(2)]), torch.arange(len(known.of)).repeat(2)
    rounds = [draw(unseen, identities, each) for _ in range(4)]
    probe, who = draw(unseen, 64, 4)
    couples = draw(unseen, 64, 2)[0].unflatten(0, (-1, 2))

    model = FaceNet(width, dim, len(known.of) if naming else 0)
    extra = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **extra)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: factor(step, schedule, steps, warmup))
    new = portraits(codes[-64:].repeat(4)), torch.arange(64).repeat(4)
    model.eval()
    with torch.no_grad():
        untrained = recall(F.normalize(model(new[0]), dim=1), new[1])

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        raw = model(probe)
        z, (a, b) = F.normalize(raw, dim=1), (F.normalize(model(x), dim=1) for x in couples.unbind(1))
        d, same = distances(z), who[:, None] == who
        return {
            "val/embedding": panel.latents(raw),
            "val/pair": panel.pairs(a, b, math.log(10)),
            "val/retrieval": {
                "accuracy_as_logged": Reading(recall(z, who), chance(who), len(z)),
                "token_accuracy": recounted(z, who),
            },
            "val/distance": {"within": Reading(float(d[same].mean())), "between": Reading(float(d[~same].mean()))},
        }

    null = collapsed(kind, margin, identities, each)
    nulls = {"train/loss/metric": null, "val/loss/metric": null}
    if naming:
        nulls |= dict.fromkeys(("train/loss/identity", "val/loss/identity"), math.log(len(known.of)))
    monitor = Monitor(
        model, optim, folder=folder, probe=probe, read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(
        leaks={
            "picture": audits.leaks(known.images.numpy(), unseen.images.numpy()),
            "picture of an identity that is trained on": int(unseen.counts[torch.isin(unseen.of, known.of)].sum()),
        },
        intake={
            "items": len(known.images) + known.dropped,
            "lost": {"of an identity with too few pictures": known.dropped},
        },
        augmentations={
            change.__name__: audits.augmentation(of_one(change), known.images[:64])
            for change in (() if plain else (shift, flip, jitter))
        },
    )
    for step in range(1, steps + 1):
        batch, labels = draw(known, identities, each)
        model.train()
        raw = model(batch if plain else augment(batch))
        terms = {"metric": (metric(F.normalize(raw, dim=1), labels, kind, margin), 1.0)}
        if model.classifier is not None:
            weight = naming * (min(1.0, step / hold) if hold else 1.0) * (max(0.0, 1 - step / fade) if fade else 1.0)
            terms["identity"] = (F.cross_entropy(model.classifier(raw), labels), weight)
        monitor.before_backward(terms)
        optim.zero_grad()
        torch.stack([weight * term for term, weight in terms.values()]).sum().backward()
        monitor.step(terms, batch)
        optim.step()
        scheduler.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                held_out = [metric(F.normalize(model(x), dim=1), y, kind, margin) for x, y in rounds]
                found = {"val/loss/metric": float(torch.stack(held_out).mean())}
                if model.classifier is not None:
                    found["val/loss/identity"] = float(F.cross_entropy(model.classifier(model(seen)), names))
            monitor.validated(found)
    monitor.close()
    model.eval()
    with torch.no_grad():
        z = F.normalize(model(new[0]), dim=1)
    d, same, found_again = distances(z), new[1][:, None] == new[1], recounted(z, new[1]).value
    return {
        "recall at 1 of identities that are new": (found_again, chance(new[1])),
        "the same, beside the untrained network": (found_again, untrained),
        "distance between identities, beside that within": (float(d[~same].mean()), float(d[same].mean())),
    }


FAMILY = Family(
    "triplet",
    "development",
    "embeddings of identities by triplets of their pictures, with mining; and other losses of pairs",
    faults=(
        Fault(
            "pictures-in-another-order",
            "The training pictures were shuffled when they were cached, and the list of their identities was not.",
            ("no-learning", "plateau", "trivial-pair"),
            changes=(
                Change(
                    "album(images[mine], owner[mine]", "album(images[mine][torch.randperm(mine.sum())], owner[mine]"
                ),
            ),
        ),
        Fault(
            "split-by-picture",
            "Pictures were split by lot where identities had to be, so those held out are of people trained on.",
            ("split-leak",),
            changes=(Change("mine = owner < people", "mine = torch.rand(len(owner)) < 0.75"),),
            case="V split-leak",
        ),
        Fault(
            "query-in-its-own-gallery",
            "The diagonal was not taken out, so each picture's nearest neighbour is that picture itself.",
            ("flattering-accuracy",),
            changes=(Change("distances(z).fill_diagonal_(math.inf)", "distances(z)"),),
        ),
        Fault(
            "root-of-zero",
            "The distance is a root with nothing below it to keep it from 0, where its slope is infinite.",
            ("non-finite",),
            changes=(Change(".clamp(min=1e-8).sqrt()", ".clamp(min=0).sqrt()"),),
        ),
        Fault(
            "classifier-in-no-group",
            "The optimizer was written for the embedding, and did not get the weights of the loss that came later.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr=rate", "([*model.trunk.parameters(), *model.embed.parameters()], lr=rate"
                ),
            ),
        ),
        Fault(
            "distances-under-no-grad",
            "Distances are made under no_grad, as mining needs no gradient, and the triplets' loss is made of them.",
            ("term-inert",),
            changes=(Change("def distances(z", "@torch.no_grad()\ndef distances(z"),),
        ),
        Fault(
            "hardest-from-the-first-step",
            "The hardest strangers are mined from the first step on, and all pictures end in one place, at the margin.",
            ("latent-ignores-input", "plateau", "no-learning", "rank-collapse", "anisotropic"),
            options={"kind": "hard", "naming": 0.0},
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures move the statistics of the normalisation.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
        Fault(
            "identities-with-many-pictures-alone",
            "The least number of pictures of an identity was copied from an example, and drops nine people in ten.",
            ("data-replaced",),
            options={"least": 26},
        ),
        Fault(
            "a-dozen-people",
            "Twelve identities are all there is to train on, without augmentation, and others are not told apart.",
            ("overfitting",),
            options={"people": 12, "identities": 12, "plain": True, "steps": 500},
        ),
        Fault(
            "one-picture-several-times",
            "The sampler draws one picture of an identity and repeats it, so that anchor and positive are the same.",
            ("trivial-pair",),
            changes=(Change("lots.topk(each).indices", "lots.topk(1).indices.expand(-1, each)"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "soft-margin",
            "A loss that is never 0, of semi-hard triplets.",
            changes=(
                Change(
                    "F.relu(near - torch.where(farther.any(1), closest, farthest) + margin)",
                    "F.softplus(8 * (near - torch.where(farther.any(1), closest, farthest)))",
                ),
                Change(' if kind == "soft" else margin', ""),
            ),
            seeds=(0, 1),
        ),
        Healthy("contrastive", options={"kind": "contrastive", "margin": 1.0}, seeds=(0, 1)),
        Healthy("multi-similarity", options={"kind": "similarity", "naming": 0.0}, seeds=(0, 1)),
        Healthy("triplets-alone", "One term.", options={"naming": 0.0, "optimizer": "AdamW"}, seeds=(0, 1)),
        Healthy("sgd", options={"optimizer": "SGD", "rate": 0.1, "width": 20}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("adagrad", options={"optimizer": "Adagrad", "rate": 0.02, "schedule": "constant"}, seeds=(0, 1)),
        Healthy(
            "warm-restarts",
            "The rate jumps back up every hundred steps.",
            options={"schedule": "restarts"},
            seeds=(0, 1),
        ),
        Healthy(
            "late-term",
            "The weight of naming rises, and the loss with it.",
            options={"hold": 200, "naming": 0.3},
            seeds=(0, 1),
        ),
        Healthy("fading-term", "The weight of naming falls to 0.", options={"fade": 250, "naming": 0.2}, seeds=(0, 1)),
        Healthy(
            "small-batches",
            "A noisy loss.",
            options={"identities": 8, "steps": 500, "schedule": "constant", "rate": 1e-3},
        ),
    ),
)

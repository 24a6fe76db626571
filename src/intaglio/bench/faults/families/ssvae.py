"""A semi-supervised VAE (M2 of Kingma et al. 2014): few pictures of digits have a label, most have none, and of these
the bound is summed over all labels by what the classifier makes of them.

Shapes: N labelled and U unlabelled pictures of P pixels, C classes, d dimensions of style.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history.reading import ratio, share

FONT = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001010010010", "111101111101111", "111101111001111",
)  # fmt: skip
SIDE, CLASSES, HELD = 12, len(FONT), 512


def digits(count: int, seed: int, noise: float = 0.03) -> tuple[Tensor, Tensor]:
    """Pictures (count, SIDE, SIDE) in [0, 1] of digits that are turned, sized, moved and lit at random; the digits."""
    dice = torch.Generator().manual_seed(seed)
    label = torch.randint(CLASSES, (count,), generator=dice)
    glyphs = torch.tensor([[float(dot) for dot in dots] for dots in FONT]).view(CLASSES, 1, 5, 3)
    glyphs = F.pad(F.interpolate(glyphs, scale_factor=2), (3, 3, 1, 1))
    angle, size, x, y, light = (2 * torch.rand(5, count, generator=dice) - 1).unbind()
    cos, sin = (0.2 * angle).cos(), (0.2 * angle).sin()
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)
    turn = turn * (1.05 + 0.1 * size)[:, None, None]
    grid = F.affine_grid(torch.cat([turn, 0.16 * torch.stack([x, y], 1)[..., None]], 2), [count, 1, SIDE, SIDE], False)
    drawn = F.grid_sample(glyphs[label], grid, align_corners=False)[:, 0]
    drawn = (3 * drawn - 1).clamp(0, 1) * (0.9 + 0.1 * light)[:, None, None]
    return (drawn + noise * torch.randn(drawn.shape, generator=dice)).clamp(0, 1), label


def prepared(pictures: Tensor) -> Tensor:
    return pictures.flatten(1)


def one_hot(label: Tensor) -> Tensor:
    return F.one_hot(label, CLASSES).float()


class M2(nn.Module):
    def __init__(self, hidden: int, latent: int):
        super().__init__()
        pixels = SIDE * SIDE
        self.classifier = nn.Sequential(
            nn.Linear(pixels, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, CLASSES)
        )
        self.picture, self.label = nn.Linear(pixels, hidden), nn.Linear(CLASSES, hidden)
        self.posterior = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.from_style, self.from_label = nn.Linear(latent, hidden), nn.Linear(CLASSES, hidden)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, pixels))

    def encode(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.posterior(self.picture(x) + self.label(y)).chunk(2, 1)
        return mean, log_variance

    def reparameterize(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Logits of the pixels."""
        logits: Tensor = self.decoder(self.from_style(z) + self.from_label(y))
        return logits


def cross_entropy(logits: Tensor, x: Tensor) -> Tensor:
    """Nats of each picture."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def bound(model: M2, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstruction and KL of each picture with a label, (N,) each; that of the label's prior is a constant."""
    mean, log_variance = model.encode(x, y)
    logits = model.decode(model.reparameterize(mean, log_variance), y)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return cross_entropy(logits, x), kl


def losses(model: M2, x: Tensor, y: Tensor, u: Tensor, free: float = 0.0) -> dict[str, Tensor]:
    """Nats a picture, labelled or not; ``free`` nats of style cost nothing."""
    reconstruction, kl = bound(model, x, one_hot(y))
    log_q = F.log_softmax(model.classifier(u), 1)
    q = log_q.exp()
    each = bound(model, u.repeat_interleave(CLASSES, 0), torch.eye(CLASSES).repeat(len(u), 1))
    reconstruction_u, kl_u = ((q * of_label.view_as(q)).sum(1) for of_label in each)
    label_kl = (q * log_q).sum(1) + math.log(CLASSES)
    kl = torch.cat([kl, kl_u]).mean()
    return {
        "reconstruction": torch.cat([reconstruction, reconstruction_u]).mean(),
        "kl": kl.clamp_min(free) if free else kl,
        "label_kl": label_kl.sum() / (len(x) + len(u)),
        "classification": F.cross_entropy(model.classifier(x), y),
    }


def batches(size: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    while True:
        order = torch.randperm(len(parts[0]))
        for rows in order.split(size):
            if len(rows) == size:
                yield tuple(part[rows] for part in parts)


def planned(optim: torch.optim.Optimizer, schedule: str, steps: int) -> Any:
    plans = torch.optim.lr_scheduler
    if schedule == "cosine":
        return plans.CosineAnnealingLR(optim, steps)
    if schedule == "restarts":
        return plans.CosineAnnealingWarmRestarts(optim, steps // 3)
    if schedule == "linear":
        return plans.LinearLR(optim, 1.0, 0.02, steps)
    return plans.ConstantLR(optim, 1.0)


def train(
    folder: Path, seed: int = 0, steps: int = 500, labelled: int = 120, unlabelled: int = 3000, size: int = 48,
    told: int = 32, rate: float = 3e-3, hidden: int = 160, latent: int = 8, alpha: float = 10.0, hold: int = 0,
    ramp: int = 0, free: float = 0.0, noise: float = 0.03, odd: int = 0, optimizer: str = "Adam",
    momentum: float = 0.0, decay: float = 0.0, schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    pictures, digit = digits(HELD + labelled + unlabelled, seed, noise)
    x_all, rows = prepared(pictures), torch.arange(len(pictures))
    told_of = torch.where((rows >= HELD) & (rows < HELD + labelled), digit, -1)
    training, known = rows >= HELD, told_of >= 0
    x, y, u = x_all[known], told_of[known], x_all[training & ~known]
    held_x, held_y = x_all[:HELD], digit[:HELD]
    few = HELD * told // (told + size)
    mean_picture = x_all[training].mean(0).clamp(0.001, 0.999).logit()
    null = float(cross_entropy(mean_picture.expand_as(held_x), held_x).mean())
    frequent = y.bincount(minlength=CLASSES) + 1
    guess = F.cross_entropy((frequent / frequent.sum()).log().expand(few, -1), held_y[:few])

    model = M2(hidden, latent)
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=decay, **more)
    plan = planned(optim, schedule, steps)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        c = one_hot(held_y)
        mean, log_variance = model.encode(probe, c)
        z = model.reparameterize(mean, log_variance)

        def cost(z: Tensor, c: Tensor) -> Any:
            return cross_entropy(model.decode(z, c), probe).double().numpy()

        own = cost(z, c)
        style = panel.latents(mean, log_variance)
        style["noise_ratio"] = bottleneck.noise_ratio(z, mean, log_variance)
        style["prior_nats"] = bottleneck.aggregate_nats(mean, log_variance)
        if free:
            style["kl_charged"] = bottleneck.kl_charged(mean, log_variance, free, 1)
            style["groups_above_floor"] = bottleneck.groups_above_floor(mean, log_variance, free, 1)
        exchange = cost_of_exchange(lambda other: (cost(other, c), 0 * own + 1), z)
        right = int((model.classifier(probe).argmax(1) == held_y).sum())
        return {
            "val/style": style,
            "val/picture": {f"{name}_latent_nats": nats for name, nats in exchange.items()},
            "val/condition": {"permuted_loss": ratio(cost(z, c.roll(1, 0)) - own, own, 0.0)},
            "val/digit": {"accuracy": share(right, HELD, float((held_y == frequent.argmax()).double().mean()))},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_x, read=read, every=50, log_every=5, steps=steps,
        nulls={"reconstruction": null, "classification": float(guess)},
    )  # fmt: skip
    monitor.audit(
        intake={"items": labelled, "lost": {"label not used": labelled - len(y)}},
        leaks={
            "labelled picture": audits.leaks(x.numpy(), held_x.numpy()),
            "unlabelled picture": audits.leaks(u.numpy(), held_x.numpy()),
        },
        ranges={"pixels": audits.ranges(x_all, 0.0, 1.0)},
    )
    with_label, without = batches(told, x, y), batches(size, u)
    for step in range(1, steps + 1):
        (x_batch, y_batch), (u_batch,) = next(with_label), next(without)
        if step == odd:
            x_batch, u_batch = 1 - x_batch, 1 - u_batch
        weights = {
            "reconstruction": 1.0,
            "kl": min(1.0, step / ramp) if ramp else 1.0,
            "label_kl": 1.0,
            "classification": alpha * min(1.0, max(0, step - hold) / 50) if hold else alpha,
        }
        model.train()
        terms = losses(model, x_batch, y_batch, u_batch, free)
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, (x_batch, y_batch, u_batch))
        optim.step()
        plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_x[:few], held_y[:few], held_x[few:], free)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in seen.items()})
            saved = null - float(seen["reconstruction"] + seen["kl"] + seen["label_kl"])
            monitor.validated({"nats_saved": saved})
    monitor.close()
    model.eval()
    new, label = digits(1000, 10_000 + seed, noise)
    gallery, named = digits(3000, 20_000 + seed, 0.0)
    with torch.no_grad():
        right = (model.classifier(prepared(new)).argmax(1) == label).double().mean()
        drawn = model.decode(torch.randn(len(label), latent), one_hot(label)).sigmoid()
        mean, _ = model.encode(held_x, one_hot(held_y))
        rebuilt = cross_entropy(model.decode(mean, one_hot(held_y)), held_x).mean()
    asked = (named[torch.cdist(drawn, prepared(gallery)).argmin(1)] == label).double().mean()
    return {
        "new digits that are told right": (float(right), 1 / CLASSES),
        "samples of the digit that was asked for": (float(asked), 1 / CLASSES),
        "nats of a held-out picture that its style and digit save": (null - float(rebuilt), 0.0),
    }


FAMILY = Family(
    "ssvae",
    "development",
    "a semi-supervised VAE of digits, M2, with labelled and unlabelled batches",
    faults=(
        Fault(
            "labels-in-an-order-of-their-own",
            "Each tensor is shuffled for itself, so a labelled picture stands beside the label of another one.",
            ("no-learning", "plateau", "condition-ignored"),
            changes=(Change("part[rows] for part", "part[torch.randperm(len(part))[:size]] for part"),),
        ),
        Fault(
            "classifier-cut-off-from-the-bound",
            "What the classifier says of unlabelled pictures is detached, so it learns from the few labels alone.",
            ("term-inert",),
            changes=(Change("model.classifier(u), 1)", "model.classifier(u).detach(), 1)"),),
        ),
        Fault(
            "label-not-decoded",
            "The decoder has a layer for the label, which was left out when the sum was written.",
            ("condition-ignored", "dead-parameters"),
            changes=(Change("self.from_style(z) + self.from_label(y)", "self.from_style(z)"),),
        ),
        Fault(
            "classifier-in-no-group",
            "Groups with their own decay were made for encoder and decoder, and the classifier came later.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr",
                    "([p for n, p in model.named_parameters() if not n.startswith('classifier')], lr",
                ),
            ),
        ),
        Fault(
            "alpha-only-logged",
            "The weight of the classification is logged, and the sum was written before there was one.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "torch.stack([weights[name] * term for name, term in terms.items()]).sum()",
                    "torch.stack(list(terms.values())).sum()",
                ),
            ),
        ),
        Fault(
            "likelihood-averaged",
            "The likelihood is a mean over pixels, so the KL is 144 times too heavy.",
            ("posterior-collapse", "decoder-ignores-latent", "term-dominates"),
            changes=(Change('reduction="none").sum(1)', 'reduction="none").mean(1)'),),
        ),
        Fault(
            "pictures-standardised",
            "Mean and deviation of MNIST were copied from a classifier, and pixels as Bernoulli trials need [0, 1].",
            ("range-mismatch",),
            changes=(Change("return pictures.flatten(1)", "return (pictures.flatten(1) - 0.1307) / 0.3081"),),
        ),
        Fault(
            "held-out-pictures-are-unlabelled-too",
            "All pictures without a label are taken as unlabelled ones, and those that are held out have none either.",
            ("split-leak",),
            changes=(Change("x_all[training & ~known]", "x_all[~known]"),),
            case="V split-leak",
        ),
        Fault(
            "zero-is-no-label",
            "Labels are asked for that are more than 0, so every zero is taken for a picture without one.",
            ("data-replaced",),
            changes=(Change("told_of >= 0", "told_of > 0"),),
            minor=True,
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures go into the classifier's running statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("many-labels", options={"labelled": 1500, "unlabelled": 1500, "alpha": 2.0}, seeds=(0, 1)),
        Healthy(
            "warm-up",
            "The KL's weight begins at 0, and the loss rises with it.",
            options={"ramp": 200, "latent": 16},
            seeds=(0, 1),
        ),
        Healthy(
            "classification-held-back",
            "Its weight is 0 at first, and until then the classifier knows of labels from the bound alone.",
            options={"hold": 100},
            seeds=(0, 1),
        ),
        Healthy("free-nats", "The KL is parked at its free nats, by design.", options={"free": 5.0}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "schedule": "linear", "hidden": 192}, seeds=(0, 1)),
        Healthy(
            "warm-restarts",
            "The rate jumps back up twice.",
            options={"schedule": "restarts", "optimizer": "AdamW", "decay": 0.01},
            seeds=(0, 1),
        ),
        Healthy(
            "constant",
            "Nothing settles.",
            options={"schedule": "constant", "optimizer": "RMSprop", "rate": 2e-3},
            seeds=(0, 1),
        ),
        Healthy(
            "one-odd-batch",
            "One batch has dark and light exchanged; the loss recovers.",
            options={"odd": 250},
            seeds=(0, 1),
        ),
        Healthy("small-batches", options={"size": 24, "told": 16, "rate": 2e-3, "steps": 600}, seeds=(0, 1)),
        Healthy(
            "few-pictures",
            "A small set, seen often.",
            options={"labelled": 200, "unlabelled": 600, "hidden": 96, "latent": 4},
            seeds=(0, 1),
        ),
    ),
)

"""A latent neural process (Garnelo et al. 2018, Kim et al. 2019): small pictures of which some pixels are shown.

What is shown and the whole picture are sets of pixels, encoded one by one and averaged to a Gaussian latent. What is
shown gives the prior, the whole picture the posterior, and the decoder says mean and deviation of each pixel.

Shapes: B pictures, P pixels of 3 colours, d latent dimensions. A mask (B, P) or (P,) is 1 where a pixel is shown.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_exchange
from intaglio.history import Measured
from intaglio.history.reading import ratio

SIDE = 8
PIXELS = SIDE**2
LEAST = 0.05
"""The least deviation that the decoder can say."""
CENTRE, SPREAD = 0.15, 0.2
"""About where the values of pixels lie: encoders are given them standardised."""

Gaussian = tuple[Tensor, Tensor]


def grid() -> Tensor:
    """Where each pixel is, (P, 14): row and column in [-1, 1], their sines and cosines."""
    at = torch.linspace(-1, 1, SIDE)
    where = torch.cartesian_prod(at, at)
    waves = [wave(k * math.pi * where) for k in (0.5, 1.0, 2.0) for wave in (torch.sin, torch.cos)]
    return torch.cat([where, *waves], 1)


GRID = grid()


def pixels(count: int, seed: int, noise: float = 0.03) -> Tensor:
    """Pictures as sets of pixels, (count, P, 3) in [0, 1]."""
    return F.avg_pool2d(pictures(count, seed, noise).images, 2).flatten(2).transpose(1, 2)


def context(low: int, high: int, dice: torch.Generator | None = None) -> Tensor:
    """A mask (P,) of ``low`` to ``high`` pixels."""
    count = int(torch.randint(low, high + 1, (), generator=dice))
    mask = torch.zeros(PIXELS)
    mask[torch.randperm(PIXELS, generator=dice)[:count]] = 1.0
    return mask


def draw(mean: Tensor, log_variance: Tensor) -> Tensor:
    return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()


def divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of each picture, nats."""
    (m, v), (n, w) = q, p
    return 0.5 * ((m - n).square() / w.exp() + (v - w).exp() - 1 - v + w).sum(1)


class SetEncoder(nn.Module):
    def __init__(self, width: int, latent: int):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(GRID.shape[1] + 3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.all = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * latent))

    def forward(self, y: Tensor, mask: Tensor) -> Gaussian:
        mask = mask.expand(y.shape[:2])[..., None]
        pairs = torch.cat([GRID.expand(len(y), -1, -1), (y - CENTRE) / SPREAD], -1)
        mean, log_variance = self.all((self.each(pairs) * mask).sum(1) / mask.sum(1)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)


class NeuralProcess(nn.Module):
    def __init__(self, width: int = 64, latent: int = 16, shared: bool = False):
        super().__init__()
        self.posterior = SetEncoder(width, latent)
        self.prior = self.posterior if shared else SetEncoder(width, latent)
        self.decoder = nn.Sequential(
            nn.Linear(GRID.shape[1] + latent, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.mean, self.deviation = nn.Linear(width, 3), nn.Linear(width, 3)

    def decode(self, z: Tensor) -> Gaussian:
        """Mean and deviation of every pixel, (B, P, 3) each."""
        h = self.decoder(torch.cat([GRID.expand(len(z), -1, -1), z[:, None].expand(-1, PIXELS, -1)], -1))
        return torch.sigmoid(self.mean(h)), LEAST + (1 - LEAST) * F.softplus(self.deviation(h))


def log_likelihood(y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Of each pixel, (B, P), nats."""
    error = (y - mean) / deviation
    return -(0.5 * error.square() + deviation.log() + 0.5 * math.log(2 * math.pi)).sum(-1)


def losses(model: NeuralProcess, shown: Tensor, mask: Tensor, y: Tensor, free: float) -> dict[str, Tensor]:
    """Nats a picture; all of its pixels are targets."""
    p, q = model.prior(shown, mask), model.posterior(y, torch.ones(PIXELS))
    nll = -log_likelihood(y, *model.decode(draw(*q))).sum(1).mean()
    return {"nll": nll, "kl": divergence(q, p).mean().clamp_min(free)}


def completed(model: NeuralProcess, y: Tensor, mask: Tensor, draws: int = 16) -> tuple[Tensor, Tensor]:
    """Of pixels that are not shown log-likelihood a number, and squared error of what is expected: (B,) each."""
    hidden = 1 - mask
    numbers = 3 * hidden.sum(1)
    p = model.prior(y * mask[..., None], mask)
    made = [model.decode(draw(*p)) for _ in range(draws)]
    said = torch.stack([(log_likelihood(y, *each) * hidden).sum(1) for each in made])
    expected = torch.stack([mean for mean, _ in made]).mean(0)
    error = ((expected - y).square().sum(-1) * hidden).sum(1)
    return (said.logsumexp(0) - math.log(draws)) / numbers, error / numbers


def share_of_rate(step: int, steps: int, schedule: str, warmup: int) -> float:
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    return rise * (1 - step / steps if schedule == "linear" else 1.0)


def batches(y: Tensor, size: int, low: int, high: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What is shown of some pictures, the mask that they have in common, and the pictures."""
    while True:
        for rows in torch.randperm(len(y)).split(size):
            if len(rows) == size:
                mask = context(low, high)
                yield y[rows] * mask[:, None], mask, y[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 450, size: int = 32, items: int = 3000, rate: float = 4e-3,
    width: int = 64, latent: int = 16, shared: bool = False, low: int = 8, high: int = 32, noise: float = 0.03,
    free: float = 0.0, ramp: int = 0, optimizer: str = "Adam", schedule: str = "constant", warmup: int = 20,
    clip: float = 0.0, glitch: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    y, held_out = pixels(items, seed, noise), pixels(256, 10_000 + seed, noise)
    dice = torch.Generator().manual_seed(seed)
    masks = torch.stack([context(low, high, dice) for _ in held_out])
    shown = held_out * masks[..., None]
    plain = log_likelihood(held_out, y.mean((0, 1)), y.flatten(0, 1).std(0))
    null = -float(plain.sum(1).mean())

    model = NeuralProcess(width, latent, shared)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: share_of_rate(k, steps, schedule, warmup))

    def read(model: Any, probe: Tensor) -> dict[str, dict[str, Measured]]:
        mask = masks[: len(probe)]
        (mean, log_variance), (n, w) = model.posterior(probe, torch.ones(PIXELS)), model.prior(probe, mask)
        z = draw(mean, log_variance)
        of_prior = (mean - n) * (-0.5 * w).exp(), log_variance - w

        def nll(z: Tensor) -> tuple[Any, Any]:
            each = -log_likelihood(probe, *model.decode(z)).sum(1).double()
            return each.numpy(), torch.ones_like(each).numpy()

        def errors(mask_and_shown: Tensor) -> Any:
            mask, shown = mask_and_shown[..., 0], mask_and_shown[..., 1:]
            made = model.decode(model.prior(shown, mask)[0])[0]
            return (made - probe).square().sum((1, 2)).double().numpy()

        found = panel.latents(mean)
        found["kl_nats"] = bottleneck.kl_nats(*of_prior)
        found["prior_nats"] = bottleneck.aggregate_nats(*of_prior)
        found["noise_ratio"] = bottleneck.noise_ratio(z, mean, log_variance)
        if free:
            found["kl_charged"] = bottleneck.kl_charged(*of_prior, free, 1)
            found["groups_above_floor"] = bottleneck.groups_above_floor(*of_prior, free, 1)
        pairs = torch.cat([mask[..., None], probe * mask[..., None]], -1)
        own, other = errors(pairs), errors(pairs.roll(1, 0))
        return {
            "val/latent": found,
            "val/picture": {f"{name}_latent_nats": cost for name, cost in cost_of_exchange(nll, z).items()},
            "val/condition": {"permuted_loss": ratio(other - own, own, 0.0)},
            "val/completion": {"context_strangers": cost_of_context(errors, pairs)["strangers"]},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:128], read=read, every=50, log_every=5, steps=steps,
        nulls={"nll": null},
    )  # fmt: skip
    monitor.audit(
        augmentations={"choice of the context": audits.augmentation(lambda x: x * context(low, high)[:, None], y[:32])},
        leaks={"the very same picture": audits.leaks(list(y.numpy()), list(held_out.numpy()))},
        ranges={"pixels": audits.ranges(y, 0.0, 1.0)},
    )
    for step, (seen, mask, batch) in enumerate(batches(y, size, low, high), 1):
        if step == glitch:
            seen, batch = (1 - seen) * mask[:, None], 1 - batch
        weight = min(1.0, (step - 1) / ramp) if ramp else 1.0
        model.train()
        terms = losses(model, seen, mask, batch, free)
        weighted = {"nll": (terms["nll"], 1.0), "kl": (terms["kl"], weight)}
        loss = terms["nll"] + weight * terms["kl"]
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, batch)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = losses(model, shown, masks, held_out, free)
                said, _ = completed(model, held_out, masks, 4)
            monitor.validated({name: float(value) for name, value in terms.items()})
            monitor.validated({"completion_log_likelihood": float(said.mean())})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        said, error = completed(model, held_out, masks)
    hidden = 1 - masks
    average = shown.sum(1) / masks.sum(1)[:, None]
    far = ((held_out - average[:, None]).square().sum(-1) * hidden).sum(1) / (3 * hidden.sum(1))
    guessed = (plain * hidden).sum(1) / (3 * hidden.sum(1))
    return {
        "log-likelihood of hidden pixels, beside a Gaussian of training's": (float(said.mean()), float(guessed.mean())),
        "share of the error of the context's mean that completions lack": (1 - float(error.mean() / far.mean()), 0.0),
    }


FAMILY = Family(
    "neuralprocess",
    "development",
    "a latent neural process that completes small pictures from some of their pixels",
    faults=(
        Fault(
            "kl-of-the-posterior-with-itself",
            "The KL is given the posterior twice, so it is 0 and the context's encoder learns nothing.",
            ("term-inert", "dead-parameters"),
            changes=(Change("divergence(q, p).mean()", "divergence(q, q).mean()"),),
        ),
        Fault(
            "values-never-written",
            "Encoders are given pixels' places beside an empty tensor that was to be filled with their colours.",
            ("latent-ignores-input", "condition-ignored", "context-order-inert"),
            changes=(Change("(y - CENTRE) / SPREAD], -1)", "torch.zeros_like(y)], -1)"),),
            case="E latent-ignores-input",
        ),
        Fault(
            "contexts-of-other-pictures",
            "Contexts and targets are shuffled apart, so what is shown is of another picture.",
            ("condition-ignored", "context-order-inert"),
            changes=(
                Change(
                    "yield y[rows] * mask[:, None], mask,",
                    "yield y[torch.randperm(len(y))[:size]] * mask[:, None], mask,",
                ),
            ),
        ),
        Fault(
            "prior-not-in-the-optimizer",
            "Parameters were listed by hand, and the context's encoder was forgotten.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(model.parameters(), lr=rate, **more)",
                    '([w for name, w in model.named_parameters() if not name.startswith("prior")], lr=rate, **more)',
                ),
            ),
        ),
        Fault(
            "kl-averaged-over-dimensions",
            "The KL is a mean over dimensions beside a likelihood that is a sum, so a sixteenth of it is charged.",
            ("kl-units",),
            changes=(Change("- 1 - v + w).sum(1)", "- 1 - v + w).mean(1)"),),
            minor=True,
        ),
        Fault(
            "the-same-context-every-time",
            "The generator that chooses contexts is made anew with the same seed in each call.",
            ("augmentation-inert",),
            changes=(
                Change(
                    "    count = int(torch.randint(low",
                    "    dice = dice or torch.Generator().manual_seed(0)\n    count = int(torch.randint(low",
                ),
            ),
            minor=True,
        ),
        Fault(
            "drawn-at-the-variance",
            "The 0.5 before the log-variance is missing, so latents are drawn at their variance.",
            ("temperature-misstates-rate",),
            changes=(Change("(0.5 * log_variance).exp()", "log_variance.exp()"),),
            minor=True,
        ),
        Fault(
            "deviation-without-softplus",
            "The deviation is what a linear layer says, which may be negative, and its logarithm is taken.",
            ("non-finite",),
            changes=(Change("F.softplus(self.deviation(h))", "self.deviation(h)"),),
        ),
        Fault(
            "pixels-around-0",
            "Pixels were shifted to [-0.5, 0.5], as in another program, and the decoder's mean ends in a sigmoid.",
            ("range-mismatch",),
            changes=(Change(".flatten(2).transpose(1, 2)", ".flatten(2).transpose(1, 2) - 0.5"),),
        ),
        Fault(
            "warm-up-in-epochs",
            "The rate's warm-up was meant as twenty steps and is counted in epochs, so it takes more than the run.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "share_of_rate(k, steps, schedule, warmup)",
                    "share_of_rate(k, steps, schedule, warmup * (items // size))",
                ),
            ),
        ),
        Fault(
            "learnt-by-heart",
            "Twenty-four pictures are all there is to train on.",
            ("overfitting",),
            options={"items": 24, "size": 24, "width": 96, "steps": 500},
        ),
    ),
    healthy=(
        Healthy(
            "plain", "The likelihood's loss becomes negative; a metric that rises is logged beside it.", seeds=(0, 1, 2)
        ),
        Healthy("shared-encoder", "One encoder for contexts and targets.", options={"shared": True}, seeds=(0, 1)),
        Healthy("wide", options={"width": 80, "latent": 32, "rate": 3e-3}, seeds=(0, 1)),
        Healthy("four-numbers", "The latent has four dimensions.", options={"latent": 4}, seeds=(0, 1)),
        Healthy(
            "much-is-shown",
            "Contexts tell nearly all, so that hardly any KL is left.",
            options={"low": 24, "high": 56},
            seeds=(0, 1),
        ),
        Healthy(
            "momentum",
            options={"optimizer": "SGD", "rate": 6e-3, "clip": 5.0, "schedule": "linear", "shared": True},
            seeds=(0, 1),
        ),
        Healthy("adamw-with-cosine", options={"optimizer": "AdamW", "schedule": "cosine", "rate": 5e-3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "noise": 0.08}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps up three times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "ramp", "The KL's weight begins at 0, and the loss rises with it.", options={"ramp": 200}, seeds=(0, 1)
        ),
        Healthy("free-nats", "The KL is parked at its free nats.", options={"free": 8.0}, seeds=(0, 1)),
        Healthy("few-pictures", "A small set, seen often.", options={"items": 640, "width": 48}, seeds=(0, 1)),
        Healthy("spike", "One batch is of negatives, and the run recovers.", options={"glitch": 150, "clip": 200.0}),
    ),
)

"""A VQGAN (Esser et al. 2021): codes that are moving averages or learnt by a loss of their own, a perceptual loss of a
small network that was trained to name shapes and colours, and a discriminator of patches that comes later, whose weight
is the ratio of two gradients' norms at the decoder's last layer.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor

PLACES = 16
SETTINGS: dict[str, Any] = {"Adam": {"betas": (0.5, 0.9)}, "AdamW": {"betas": (0.5, 0.9)}, "SGD": {"momentum": 0.9}}


class Quantiser(nn.Module):
    codes: Tensor
    counts: Tensor
    sums: Tensor
    last_used: Tensor

    def __init__(self, size: int, width: int, tokens: int, ema: bool, decay: float, revive: int):
        super().__init__()
        self.size, self.ema, self.decay, self.revive, self.updates = size, ema, decay, revive, 0
        self.even = tokens / size
        self.threshold = 0.1 * tokens / size
        if ema:
            self.register_buffer("codes", torch.randn(size, width))
        else:
            self.codes = nn.Parameter(torch.randn(size, width))
        self.register_buffer("counts", torch.full((size,), self.even))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("last_used", torch.full((size,), -1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = z.movedim(1, -1)
        flat = tokens.flatten(0, 2)
        if self.training and not self.updates:
            self.begin(flat)
        chosen = torch.cdist(flat.detach(), self.codes.detach()).argmin(1)
        q = self.codes[chosen]
        terms = {"commitment": (flat - q.detach()).square().mean()}
        if not self.ema:
            terms["codebook"] = (q - flat.detach()).square().mean()
        if self.training:
            self.update(flat, chosen)
        passed = flat + (q - flat).detach()
        return passed.view_as(tokens).movedim(-1, 1), chosen, terms

    @torch.no_grad()
    def begin(self, flat: Tensor) -> None:
        self.codes.copy_(flat[torch.randperm(len(flat))[: self.size]])
        self.sums.copy_(self.codes * self.even)

    @torch.no_grad()
    def update(self, flat: Tensor, chosen: Tensor) -> None:
        members = F.one_hot(chosen, self.size).float()
        self.counts.lerp_(members.sum(0), 1 - self.decay)
        if self.ema:
            self.sums.lerp_(members.T @ flat, 1 - self.decay)
            self.codes.copy_(self.sums / self.counts.clamp_min(1e-5)[:, None])
        self.last_used[chosen] = self.updates
        self.updates += 1
        if self.revive and self.updates % self.revive == 0:
            self.restart(flat)

    def restart(self, flat: Tensor) -> None:
        dead = self.counts < self.threshold
        self.codes[dead] = flat[torch.randint(len(flat), (int(dead.sum()),))]
        total = self.counts.sum()
        self.counts[dead] = self.even
        self.sums[dead] = self.codes[dead] * self.even
        share = total / self.counts.sum()
        self.counts *= share
        self.sums *= share


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.query_key_value = nn.Conv2d(width, 3 * width, 1)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Encoder(nn.Module):
    def __init__(self, width: int, latent: int):
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), Residual(width), nn.Conv2d(width, width, 4, 2, 1), Residual(width)
        )
        self.attention = Attention(width)
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, latent, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(x)
        h = self.attention(h)
        return self.out(h)


class VQGAN(nn.Module):
    def __init__(self, width: int, latent: int, quantiser: Quantiser):
        super().__init__()
        self.encoder, self.quantiser = Encoder(width, latent), quantiser
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 3, 1, 1), Attention(width), Residual(width),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, 1, 1), Residual(width),
            nn.Upsample(scale_factor=2), nn.Conv2d(width, width // 2, 3, 1, 1),
            nn.GroupNorm(8, width // 2), nn.SiLU(), nn.Conv2d(width // 2, 3, 3, 1, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, _, terms = self.quantiser(self.encoder(x))
        return self.decoder(q), terms


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())


def classifier(images: Tensor, kinds: Tensor, steps: int = 150) -> nn.Sequential:
    """Of twelve kinds: three shapes in four colours."""
    model = nn.Sequential(layers(), nn.Flatten(), nn.Linear(32 * PLACES, 12))
    optim = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        optim.zero_grad()
        F.cross_entropy(model(images[rows]), kinds[rows]).backward()
        optim.step()
    return model.requires_grad_(False).eval()


def unit(seen: Tensor) -> Tensor:
    return seen / (seen.square().sum(1, keepdim=True) + 1e-8).sqrt()


def perceived(features: nn.Sequential, rebuilt: Tensor, x: Tensor) -> Tensor:
    """Zhang et al. 2018, without weights of its own."""
    low, low_due = features[:2](rebuilt), features[:2](x)
    high, high_due = features[2:](low), features[2:](low_due)
    near = (unit(low) - unit(low_due)).square().sum(1).mean()
    return near + (unit(high) - unit(high_due)).square().sum(1).mean()


def discriminator(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(2 * width, 1, 3, 1, 1),
    )  # fmt: skip


def doubt(real: Tensor, fake: Tensor, hinge: bool) -> Tensor:
    if hinge:
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def balance(likelihood: Tensor, generator: Tensor, last: Tensor) -> float:
    """How much larger the gradient of what is rebuilt is than the discriminator's, at the last layer."""
    due, got = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (likelihood, generator))
    return float((due / (got + 1e-4)).clamp(0, 1e4))


def course(kind: str, steps: int) -> Callable[[int], float]:
    return {
        "constant": lambda step: 1.0,
        "warm-up": lambda step: min(1.0, (step + 1) / 40),
        "linear": lambda step: max(0.0, 1 - step / steps),
        "cosine": lambda step: 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)),
        "restarts": lambda step: 0.55 + 0.45 * math.cos(math.pi * (step % 100) / 100),
    }[kind]


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        yield from (x[rows] for rows in torch.randperm(len(x))[: len(x) // size * size].split(size))


def train(
    folder: Path, seed: int = 0, steps: int = 350, size: int = 20, items: int = 3072, rate: float = 2e-3,
    judge_rate: float = 5e-4, width: int = 32, latent: int = 8, codes: int = 48, ema: bool = True, decay: float = 0.95,
    revive: int = 10, beta: float = 0.25, adversarial: float = 0.3, begin: int = 120, ramp: int = 1, hinge: bool = True,
    blur: float = 0.1, perceptual: float = 0.5, optimizer: str = "Adam", schedule: str = "constant",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    images, factors = pictures(items + 256, seed, noise=0.01)
    images, kinds = 2 * images - 1, 4 * factors[:, 0] + factors[:, 1]
    x, held_out = images[256:], images[:256]
    judge_of_kinds = classifier(x, kinds[256:])
    trained = judge_of_kinds.state_dict()
    state = {name.removeprefix("0."): value for name, value in trained.items() if name.startswith("0.")}
    features = layers().requires_grad_(False)
    features.load_state_dict(state, strict=False)
    model = VQGAN(width, latent, Quantiser(codes, latent, PLACES * size, ema, decay, revive))
    judge, last = discriminator(), model.decoder[-2].get_parameter("weight")
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **SETTINGS.get(optimizer, {}))
    judge_optim = torch.optim.Adam(judge.parameters(), lr=judge_rate, betas=(0.5, 0.9))
    rates = torch.optim.lr_scheduler.LambdaLR(optim, course(schedule, steps))
    judge_rates = torch.optim.lr_scheduler.LambdaLR(judge_optim, course(schedule, steps))

    def losses(batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        rebuilt, terms = model(batch)
        seen = perceived(features, rebuilt, batch)
        return rebuilt, {"reconstruction": (rebuilt - batch).abs().mean(), "perceptual": seen, **terms}

    def noisy(batch: Tensor) -> Tensor:
        return batch + blur * torch.randn_like(batch)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z, book = model.encoder(probe), model.quantiser
        tokens, used = z.movedim(1, -1).flatten(0, 2), codebook.code_counts(book(z)[1], codes)
        of_codes = {
            "perplexity": codebook.perplexity(used),
            "usage": codebook.usage(used),
            "norm_ratio": codebook.norm_ratio(book.codes, tokens),
            "dead_share": codebook.dead_share(book.last_used, book.updates - 1, PLACES * size),
            "mass_ratio": codebook.mass_ratio(book.counts, PLACES * size),
            "revival_threshold": codebook.revival_threshold(book.threshold if revive else 0.0, codes, PLACES * size),
        }
        return {"val/codes": of_codes, "val/latent": panel.latents(tokens)}

    one = x.median(0).values.expand_as(held_out)
    nulls = {"reconstruction": float((held_out - one).abs().mean())}
    nulls["perceptual"] = float(perceived(features, one, held_out))
    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps, nulls=nulls
    )
    monitor.audit(ranges={"pictures": audits.ranges(x, -1.0, 1.0)}, loaded=audits.loaded(features, state))
    monitor.audit(leaks={"pictures": audits.leaks(x.numpy(), held_out.numpy())})
    for step, batch in zip(range(1, steps + 1), batches(x, size), strict=False):
        model.train()
        rebuilt, terms = losses(batch)
        fooled = judge(noisy(rebuilt))
        terms["generator"] = -fooled.mean() if hinge else F.softplus(-fooled).mean()
        likelihood = terms["reconstruction"] + perceptual * terms["perceptual"]
        weights = {"reconstruction": 1.0, "perceptual": perceptual, "commitment": beta, "codebook": 1.0}
        factor = adversarial * min(1.0, max(0, step - begin) / ramp)
        weights["generator"] = factor * balance(likelihood, terms["generator"], last) if factor else 0.0
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        total = torch.stack([weight * term for term, weight in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        rates.step()
        if step > begin:
            doubted = doubt(judge(noisy(batch)), judge(noisy(rebuilt.detach())), hinge)
            judge_optim.zero_grad()
            doubted.backward()
            judge_optim.step()
            if step % 5 == 0:
                monitor.log({"train/loss/discriminator": doubted.item()})
        judge_rates.step()
        if step % 5 == 0:
            monitor.log({"train/codes/updates_per_step": model.quantiser.updates / step})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                rebuilt, terms = losses(held_out)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"psnr": float(10 * (4 / (rebuilt - held_out).square().mean()).log10())})
    monitor.close()
    model.eval()
    with torch.no_grad():
        rebuilt = model(held_out)[0]
        used = model.quantiser(model.encoder(held_out))[1].unique()
    left = (rebuilt - held_out).square().mean() / (held_out - x.mean(0)).square().mean()
    named = judge_of_kinds(rebuilt).argmax(1) == kinds[:256]
    common = float(kinds[:256].bincount().max()) / 256
    return {
        "explained variance of held-out pictures": (1 - float(left), 0.0),
        "kinds told from rebuilt pictures": (float(named.float().mean()), common),
        "share of codes in use": (len(used) / codes, 1 / codes),
    }


FAMILY = Family(
    "vqgan",
    "development",
    "an autoencoder with codes, a perceptual loss and a discriminator whose weight adapts",
    faults=(
        Fault(
            "features-under-no-grad",
            "The perceptual network is fixed, so its loss is computed without any gradient, even of what is rebuilt.",
            ("term-inert",),
            changes=(Change("def perceived(", "@torch.no_grad()\ndef perceived("),),
        ),
        Fault(
            "ratio-only-logged",
            "The ratio of gradients is computed and logged; the total still has the fixed factor of before.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "total = torch.stack([weight * term for term, weight in weighted.values()]).sum()",
                    'total = likelihood + beta * terms["commitment"]\n'
                    '        total = total + adversarial * (step > begin) * terms["generator"]',
                ),
            ),
        ),
        Fault(
            "codes-averaged-twice",
            "The discriminator's part runs the autoencoder again, which moves the averaged codes a second time a step.",
            ("codes-polluted",),
            changes=(Change("judge(noisy(rebuilt.detach()))", "judge(noisy(model(batch)[0].detach()))"),),
        ),
        Fault(
            "the-other-optimizer-emptied",
            "Of two optimizers the discriminator's empties its gradients twice, and the autoencoder's never does.",
            ("gradients-add-up",),
            changes=(Change("(weighted)\n        optim.", "(weighted)\n        judge_optim."),),
        ),
        Fault(
            "weights-of-the-codes-exchanged",
            "β stands at the codebook's term and 1 at the commitment, as in the first published program.",
            ("quantiser-loss-missing",),
            changes=(Change('"commitment": beta, "codebook": 1.0', '"commitment": 1.0, "codebook": beta'),),
            options={"ema": False, "steps": 450},
            minor=True,
        ),
        Fault(
            "features-under-other-names",
            "The fixed network's keys keep the prefix of the classifier that they come from: none of them is loaded.",
            ("partial-load",),
            changes=(Change('name.removeprefix("0."): value', "name: value"),),
        ),
        Fault(
            "attention-never-called",
            "The encoder's attention is built, and forward goes past it.",
            ("dead-parameters",),
            changes=(Change("        h = self.attention(h)\n", ""),),
        ),
        Fault(
            "one-schedule-for-both",
            "The discriminator's part moves the autoencoder's schedule on, too: its rate is 0 from the middle on.",
            ("learning-rate-off",),
            changes=(Change("judge_rates.step()", "rates.step()"),),
            options={"schedule": "cosine"},
        ),
        Fault(
            "no-straight-through",
            "The decoder is given the codes as they are, so that no gradient of the pictures comes to the encoder.",
            ("latent-ignores-input", "codebook-collapse", "codes-shrink", "rank-collapse", "no-learning"),
            changes=(Change("passed = flat + (q - flat).detach()", "passed = q"),),
        ),
        Fault(
            "codes-far-away-and-never-revived",
            "Codes start as numbers of any size instead of on latents, and what nothing chooses stays where it is.",
            ("codes-displaced", "codes-dead", "codebook-collapse"),
            changes=(Change("self.codes.copy_(flat[torch.randperm(len(flat))[: self.size]])", "self.codes.mul_(10)"),),
            options={"revive": 0},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("codes-by-loss", "They learn late.", options={"ema": False, "steps": 450}, seeds=(0, 1)),
        Healthy("late-discriminator", "It has weight 0 for most of the run.", options={"begin": 250}, seeds=(0, 1, 2)),
        Healthy("ramp", "Its weight rises for half of the run.", options={"ramp": 180, "begin": 80}, seeds=(0, 1, 2)),
        Healthy("cross-entropy", "The game has other losses.", options={"hinge": False}, seeds=(0, 1, 2)),
        Healthy("adamw-cosine", options={"optimizer": "AdamW", "schedule": "cosine"}, seeds=(0, 1)),
        Healthy("rmsprop-warm-up", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "warm-up"}, seeds=(0, 1)),
        Healthy("warm-restarts", "The rate jumps back up.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}, seeds=(0, 1)),
        Healthy("many-codes", "More codes than such pictures need.", options={"codes": 128}, seeds=(0, 1)),
    ),
)

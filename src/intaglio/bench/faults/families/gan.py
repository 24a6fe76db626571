"""A VQGAN in small (Esser et al. 2021): an autoencoder with a learnt codebook, and a discriminator of patches."""

from collections.abc import Iterator
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


class Quantiser(nn.Module):
    """Learnt codes (van den Oord et al. 2017); those that nothing chose for a while start again on latents."""

    uses: Tensor

    def __init__(self, size: int, width: int, restart: int = 10):
        super().__init__()
        self.embedding = nn.Embedding(size, width)
        self.embedding.weight.data.uniform_(-1 / size, 1 / size)
        self.register_buffer("uses", torch.zeros(size))
        self.restart, self.calls = restart, 0

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        tokens = z.movedim(1, -1)
        if self.training:
            self.revive(tokens.detach().flatten(0, 2))
        chosen = torch.cdist(tokens.flatten(0, 2), self.embedding.weight).argmin(1)
        if self.training:
            self.uses += chosen.bincount(minlength=len(self.uses))
        q = self.embedding(chosen).view_as(tokens).movedim(-1, 1)
        terms = {
            "codebook": (q - z.detach()).square().mean(),
            "commitment": (q.detach() - z).square().mean(),
        }
        return z + (q - z).detach(), chosen, terms

    def revive(self, tokens: Tensor) -> None:
        if self.calls % self.restart == 0:
            unused = self.uses == 0
            self.embedding.weight.data[unused] = tokens[torch.randint(len(tokens), (int(unused.sum()),))]
            self.uses.zero_()
        self.calls += 1


class Autoencoder(nn.Module):
    def __init__(self, width: int = 64, codes: int = 32, latent: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 4), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, latent, 1),
        )  # fmt: skip
        self.quantiser = Quantiser(codes, latent)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 4), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, _, terms = self.quantiser(self.encoder(x))
        rebuilt = self.decoder(q)
        return rebuilt, {"reconstruction": (rebuilt - x).square().mean(), **terms}


def discriminator(width: int = 16) -> nn.Sequential:
    """Of patches (Isola et al. 2017): a logit for each quarter of the picture's side."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 3, 1, 1),
    )  # fmt: skip


def doubt(real: Tensor, fake: Tensor, hinge: bool) -> Tensor:
    """What the discriminator pays for its logits."""
    if hinge:
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def scaled(images: Tensor) -> Tensor:
    return 2 * images - 1


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield scaled(x[rows])


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 4096, rate: float = 2e-3,
    judge_rate: float = 2e-4, width: int = 64, codes: int = 32, beta: float = 0.25, adversarial: float = 0.01,
    begin: int = 100, ramp: int = 1, hinge: bool = False, optimizer: str = "Adam", cosine: bool = False,
    blur: float = 0.1,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    images, held_out = pictures(items, seed).images, scaled(pictures(512, 10_000 + seed).images)
    model, judge = Autoencoder(width, codes), discriminator()
    parameters = [*model.encoder.parameters(), *model.decoder.parameters(), *model.quantiser.parameters()]
    optim = getattr(torch.optim, optimizer)(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
    judge_optim = torch.optim.Adam(judge.parameters(), lr=judge_rate, betas=(0.5, 0.9))
    spread = float((held_out - scaled(images).mean(0)).square().mean())

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z = model.encoder(probe)
        tokens, chosen = z.movedim(1, -1).flatten(0, 2), model.quantiser(z)[1]
        used = codebook.code_counts(chosen, codes)
        of_codes = {
            "perplexity": codebook.perplexity(used),
            "usage": codebook.usage(used),
            "norm_ratio": codebook.norm_ratio(model.quantiser.embedding.weight, tokens),
        }
        return {"val/codes": of_codes, "val/latent": panel.latents(tokens)}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/reconstruction": spread, "val/loss/reconstruction": spread},
    )  # fmt: skip
    monitor.audit(ranges={"pictures": audits.ranges(next(batches(images, 256)), -1.0, 1.0)})
    for step, batch in enumerate(batches(images, size), 1):
        model.train()
        rebuilt, terms = model(batch)
        fooled = judge(rebuilt + blur * torch.randn_like(rebuilt))
        terms["generator"] = -fooled.mean() if hinge else F.softplus(-fooled).mean()
        weight = adversarial * min(1.0, max(0, step - begin) / ramp)
        weights = {"reconstruction": 1.0, "codebook": 1.0, "commitment": beta, "generator": weight}
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        total = sum(weights[name] * term for name, term in terms.items())
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        if cosine:
            schedule.step()

        real = judge(batch + blur * torch.randn_like(batch))
        fake = judge(rebuilt.detach() + blur * torch.randn_like(batch))
        doubted = doubt(real, fake, hinge)
        judge_optim.zero_grad()
        doubted.backward()
        judge_optim.step()
        if step % 5 == 0:
            monitor.log({"train/loss/discriminator": doubted.item()})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = model(held_out)[1]
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        error = model(held_out)[1]["reconstruction"]
    return {"explained variance of held-out pictures": (1 - float(error) / spread, 0.0)}


FAMILY = Family(
    "gan",
    "development",
    "an autoencoder with a learnt codebook and a discriminator",
    faults=(
        Fault(
            "discriminator-sees-another-range",
            "Real pictures reach the discriminator in [0, 1], rebuilt ones in [-1, 1]: it need not look further.",
            ("adversary-won",),
            changes=(Change("real = judge(batch +", "real = judge((batch + 1) / 2 +"),),
        ),
        Fault(
            "pictures-not-scaled",
            "The decoder ends in tanh, and the pictures were left in [0, 1].",
            ("range-mismatch",),
            changes=(Change("return 2 * images - 1", "return images"),),
            case="E range-mismatch",
        ),
        Fault(
            "generator-detached",
            "The detach of the discriminator's step stands in the generator's too, which so learns nothing from it.",
            ("term-inert",),
            changes=(Change("judge(rebuilt + blur", "judge(rebuilt.detach() + blur"),),
        ),
        Fault(
            "ramp-only-logged",
            "The adversarial term's ramp is logged; the total takes the full weight from the first step on.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "total = sum(weights[name] * term for",
                    'total = sum((adversarial if name == "generator" else weights[name]) * term for',
                ),
            ),
            options={"adversarial": 0.1, "ramp": 200},
            case="V weight-not-applied",
        ),
        Fault(
            "adversary-too-heavy",
            "The adversarial term has the weight of a program that divides it by the gradients' ratio.",
            ("term-dominates",),
            options={"adversarial": 3.0},
            minor=True,
        ),
        Fault(
            "quantiser-loss-forgotten",
            "The quantiser's terms are computed and returned, and never added to the loss.",
            ("quantiser-loss-missing", "dead-parameters"),
            changes=(Change("(rebuilt - x).square().mean(), **terms}", "(rebuilt - x).square().mean()}"),),
        ),
        Fault(
            "last-batch-not-scaled",
            "The last batch of an epoch takes another path, on which the pictures are not scaled.",
            ("spike",),
            changes=(
                Change(
                    "for rows in torch.randperm(len(x)).split(size):\n            if len(rows) == size:\n"
                    "                yield scaled(x[rows])",
                    "*most, last = torch.randperm(len(x)).split(size)\n        for rows in most:\n"
                    "            yield scaled(x[rows])\n        yield x[last]",
                ),
            ),
            options={"items": 3040},
            minor=True,
        ),
        Fault(
            "codes-never-restarted",
            "Codes start as nn.Embedding does, far from the latents, and those that nothing uses stay there.",
            ("codebook-collapse", "codes-displaced"),
            changes=(
                Change("        self.embedding.weight.data.uniform_(-1 / size, 1 / size)\n", ""),
                Change("        if self.training:\n            self.revive(tokens.detach().flatten(0, 2))\n", ""),
            ),
            minor=True,
        ),
        Fault(
            "codebook-not-in-the-optimizer",
            "The list of what the optimizer holds has the encoder and the decoder, and not the quantiser.",
            ("not-in-optimizer",),
            changes=(Change(", *model.quantiser.parameters()]", "]"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "hinge", "The discriminator's loss is another, and the generator's has no floor.", options={"hinge": True}
        ),
        Healthy("ramp", "The adversarial term's weight rises for half of the run.", options={"ramp": 200}),
        Healthy("late-adversary", "The adversarial term has weight 0 at first.", options={"begin": 250}),
        Healthy("adamw-cosine", options={"optimizer": "AdamW", "cosine": True}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 5e-4}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 512}),
        Healthy("many-codes", options={"codes": 96}),
        Healthy(
            "heavier-adversary", "Reconstruction and realism pull in two directions.", options={"adversarial": 0.03}
        ),
    ),
)

"""A variational autoencoder of sentences, Bowman et al. 2016: an annealed KL, and words dropped before the decoder.

Shapes: N sentences, T words, d latent dimensions.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import PAD, START, WORDS, pictures, sentences
from intaglio.health import audits, panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Reading


class TextVAE(nn.Module):
    def __init__(self, width: int = 96, latent: int = 16, dropped: float = 0.3):
        super().__init__()
        self.dropped = dropped
        self.words = nn.Embedding(len(WORDS), 48)
        self.reader = nn.GRU(48, width, batch_first=True)
        self.posterior = nn.Linear(width, 2 * latent)
        self.told = nn.Linear(latent, 48)
        self.writer = nn.GRU(48, width, batch_first=True)
        self.head = nn.Linear(width, len(WORDS))

    def encode(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.posterior(self.reader(self.words(ids))[0][:, -1]).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)

    def draw(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp()

    def decode(self, z: Tensor, ids: Tensor) -> Tensor:
        """Logits of the word after each, from the latent and the words so far."""
        if self.training:
            ids = ids.masked_fill(torch.rand(ids.shape) < self.dropped, PAD)
        hidden, _ = self.writer(self.words(ids) + self.told(z)[:, None])
        logits: Tensor = self.head(hidden)
        return logits

    @torch.no_grad()
    def write(self, z: Tensor, length: int) -> Tensor:
        """The likeliest word, one after another."""
        state, word, told = None, torch.full((len(z), 1), START), self.told(z)[:, None]
        written = [word]
        for _ in range(length - 1):
            hidden, state = self.writer(self.words(word) + told, state)
            written.append(word := self.head(hidden).argmax(-1))
        return torch.cat(written, 1)


def losses(model: TextVAE, ids: Tensor, floor: float) -> dict[str, Tensor]:
    """Nats a sentence; ``floor`` are the free bits of a dimension."""
    mean, log_variance = model.encode(ids)
    logits = model.decode(model.draw(mean, log_variance), ids[:, :-1])
    reconstruction = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").sum(1).mean()
    kl_d = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
    return {"reconstruction": reconstruction, "kl": kl_d.clamp_min(floor).sum()}


def annealed(step: int, beta: float, hold: int, ramp: int, cycle: int) -> float:
    """The KL's weight: 0 while it is held, then rising; anew in each cycle (Fu et al. 2019)."""
    at = step % cycle if cycle else step
    return beta * min(1.0, max(0, at - hold) / ramp) if ramp else beta


def bigram(train: Tensor, held_out: Tensor) -> float:
    """Nats of a held-out sentence by counts of pairs of words."""
    pairs = torch.full((len(WORDS), len(WORDS)), 0.01)
    pairs.index_put_((train[:, :-1].flatten(), train[:, 1:].flatten()), torch.ones(()), accumulate=True)
    chances = pairs / pairs.sum(1, keepdim=True)
    return -float(chances[held_out[:, :-1], held_out[:, 1:]].log().sum(1).mean())


def batches(ids: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(ids)).split(size):
            if len(rows) == size:
                yield ids[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, rate: float = 4e-3,
    width: int = 96, latent: int = 16, dropped: float = 0.3, beta: float = 0.2, hold: int = 0, ramp: int = 150,
    cycle: int = 0, free: float = 0.0, patience: int = 0, optimizer: str = "Adam", schedule: str = "constant",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    factors = pictures(2 * (items + 512), seed).factors
    first, second = (sentences(part) for part in factors.chunk(2))
    ids = torch.cat([first[:, :-1], second[:, 1:]], 1).unique(dim=0)
    ids = ids[torch.randperm(len(ids))]
    held_out, ids = ids[:512], ids[512:]
    null, floor = bigram(ids, held_out), free / latent
    told = [bottleneck.entropy_nats(column) for column in factors.T]
    entropy = 2 * sum(x.value for x in told if isinstance(x, Reading))

    model = TextVAE(width, latent, dropped)
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps) if schedule == "cosine" else None

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        mean, log_variance = model.encode(probe)

        def loss(z: Tensor) -> tuple[Any, Any]:
            nats = F.cross_entropy(model.decode(z, probe[:, :-1]).mT, probe[:, 1:], reduction="none")
            return nats.sum(1).double().numpy(), torch.full((len(z),), nats.shape[1]).double().numpy()

        found = panel.latents(mean, log_variance)
        found |= {f"{other}_latent_nats": cost for other, cost in cost_of_exchange(loss, mean).items()}
        found["noise_ratio"] = bottleneck.noise_ratio(model.draw(mean, log_variance), mean, log_variance)
        found["target_entropy"] = Reading(entropy, None, len(factors))
        if floor:
            found["kl_charged"] = bottleneck.kl_charged(mean, log_variance, floor, latent)
            found["groups_above_floor"] = bottleneck.groups_above_floor(mean, log_variance, floor, latent)
        return {"val/latent": found}

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:128], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/reconstruction": null, "val/loss/reconstruction": null},
    )  # fmt: skip
    monitor.audit(
        leaks={"the very same sentence": audits.leaks([x.numpy() for x in ids], [x.numpy() for x in held_out])}
    )
    best, waited = float("inf"), 0
    for step, batch in enumerate(batches(ids, size), 1):
        weight = annealed(step, beta, hold, ramp, cycle)
        model.train()
        terms = losses(model, batch, floor)
        total = terms["reconstruction"] + weight * terms["kl"]
        optim.zero_grad()
        total.backward()
        weighted = {"reconstruction": (terms["reconstruction"], 1.0), "kl": (terms["kl"], weight)}
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optim.step()
        if plan:
            plan.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = losses(model, held_out, floor)
            monitor.validated({f"val/loss/{name}": float(value) for name, value in seen.items()})
            watched = float(seen["reconstruction"])
            if patience and step > hold + ramp:
                best, waited = min(best, watched), 0 if watched < best else waited + 1
        if step == steps or (patience and waited >= patience):
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        mean, _ = model.encode(held_out)
        rewritten = (model.write(mean, held_out.shape[1]) == held_out).float().mean()
    commonest = (ids.mode(0).values == held_out).float().mean()
    return {"words of held-out sentences that are rewritten": (float(rewritten), float(commonest))}


FAMILY = Family(
    "textvae",
    "development",
    "a variational autoencoder of sentences",
    faults=(
        Fault(
            "latent-never-told",
            "The line that adds the latent to what the decoder reads was lost.",
            ("decoder-ignores-latent", "posterior-collapse", "dead-parameters"),
            changes=(Change("self.writer(self.words(ids) + self.told(z)[:, None])", "self.writer(self.words(ids))"),),
            case="E decoder-ignores-latent",
        ),
        Fault(
            "loss-of-a-word-beside-kl-of-a-sentence",
            "The cross-entropy is averaged over words, and the KL is summed, so it weighs seventeen times as much.",
            ("posterior-collapse", "kl-units"),
            changes=(Change('reduction="none").sum(1).mean()\n    kl_d', 'reduction="mean")\n    kl_d'),),
        ),
        Fault(
            "kl-averaged-over-dimensions",
            "The KL is averaged over dimensions, so that its weight is a sixteenth of what it seems.",
            ("kl-units",),
            changes=(Change("kl_d.clamp_min(floor).sum()}", "kl_d.clamp_min(floor).mean()}"),),
            case="V kl-units",
            minor=True,
        ),
        Fault(
            "free-bits-of-all-for-each",
            "Free bits that were meant for the whole latent are given to each of its dimensions.",
            ("kl-free",),
            changes=(Change("floor = bigram(ids, held_out), free / latent", "floor = bigram(ids, held_out), free"),),
            options={"free": 12.0, "beta": 1.0},
            case="V kl-free",
            minor=True,
        ),
        Fault(
            "ramp-only-logged",
            "The KL's weight rises in the log, and its full weight is applied from the first step.",
            ("weight-not-applied",),
            changes=(Change('+ weight * terms["kl"]', '+ beta * terms["kl"]'),),
            case="V weight-not-applied",
        ),
        Fault(
            "stopped-by-the-ramp",
            "Early stopping looks at the total while the weight of the KL rises, and ends the run for it.",
            ("stopped-in-ramp",),
            changes=(
                Change(
                    'watched = float(seen["reconstruction"])',
                    'watched = float(sum(seen[k] * weight if k == "kl" else seen[k] for k in seen))',
                ),
                Change("if patience and step > hold + ramp:", "if patience:"),
            ),
            options={"patience": 2, "hold": 150, "ramp": 200, "beta": 0.5},
            case="V stopped-in-ramp",
            minor=True,
        ),
        Fault(
            "cool-samples-in-training",
            "A temperature that was meant for samples to be shown is left in training.",
            ("temperature-misstates-rate",),
            changes=(Change("torch.randn_like(mean) * (0.5", "0.6 * torch.randn_like(mean) * (0.5"),),
            case="V temperature-misstates-rate",
            minor=True,
        ),
        Fault(
            "kl-too-light",
            "β is so low that the latent holds far more than a sentence says.",
            ("rate-too-high",),
            options={"beta": 0.0005},
            case="V rate-too-high",
            minor=True,
        ),
        Fault(
            "split-before-duplicates-are-removed",
            "Sentences that were said twice stand in both splits.",
            ("split-leak",),
            changes=(Change("second[:, 1:]], 1).unique(dim=0)", "second[:, 1:]], 1)"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("parked", "Free bits hold the KL where it is.", options={"free": 12.0, "beta": 1.0}),
        Healthy("held-then-ramped", "The KL has no weight at first.", options={"hold": 80, "ramp": 120}),
        Healthy("cycles", "The KL's weight falls to 0 and rises again.", options={"cycle": 100, "ramp": 50}),
        Healthy("patient", "Training may stop early, once the ramp is over.", options={"patience": 3}),
        Healthy("adamw-cosine", options={"optimizer": "AdamW", "schedule": "cosine", "rate": 6e-3}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}),
        Healthy("wide", options={"width": 128, "latent": 24}),
        Healthy("small-batches", "Losses of single batches are noisy.", options={"size": 32, "rate": 3e-3}),
    ),
)

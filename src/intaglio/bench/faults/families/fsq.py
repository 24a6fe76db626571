"""Pictures as numbers that are rounded, and a transformer that writes them: finite scalar quantisation (Mentzer et al.
2023), or the signs of lookup-free quantisation (Yu et al. 2024), and in a second stage a causal prior over the tokens
that is told colour and column, and guided when it draws.

Shapes: B pictures, T tokens, D numbers a token.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, SIDE, Pictures, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor
from intaglio.history import Reading
from intaglio.history.reading import share

CLASSES = len(COLOURS) * len(COLUMNS)
TOKENS = (SIDE // 4) ** 2
GIVEN = 8


class FSQ(nn.Module):
    """Each number of a token is bounded, and rounded to one of its levels; a token's id counts through all of them."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: tuple[int, ...]):
        super().__init__()
        self.size, self.width = math.prod(levels), len(levels)
        self.register_buffer("levels", torch.tensor(levels))
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(0))

    def bound(self, z: Tensor) -> Tensor:
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (z + (offset / half).atanh()).tanh() * half - offset

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What the decoder reads (B, T, D), ids (B, T), and the terms of the loss that a quantiser needs: none."""
        bounded = self.bound(z)
        q = bounded + (bounded.round() - bounded).detach()
        digits = q.detach().round().long() + self.levels // 2
        return q / (self.levels // 2), (digits * self.basis).sum(2), {}

    def numbers(self, ids: Tensor) -> Tensor:
        digits = ids[..., None] // self.basis % self.levels
        return (digits - self.levels // 2) / (self.levels // 2)


class LFQ(nn.Module):
    """Each number of a token is its sign; the entropy keeps signs sure, and tokens different from each other."""

    table: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.size, self.width = 2**width, width
        bits = torch.arange(self.size)[:, None] >> torch.arange(width) & 1
        self.register_buffer("table", 2.0 * bits - 1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        q = torch.where(z > 0, 1.0, -1.0)
        ids = ((z > 0).long() << torch.arange(self.width)).sum(2)
        log_p = (2 * z @ self.table.T).log_softmax(2)
        p = log_p.exp()
        mean = p.mean((0, 1))
        sure, varied = -(p * log_p).sum(2).mean(), -(mean * (mean + 1e-8).log()).sum()
        return z + (q - z).detach(), ids, {"entropy": sure - varied, "commitment": (z - q).square().mean()}

    def numbers(self, ids: Tensor) -> Tensor:
        return self.table[ids]


class Autoencoder(nn.Module):
    def __init__(self, width: int, quantiser: FSQ | LFQ):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 4), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.SiLU(), nn.Conv2d(width, quantiser.width, 1),
        )  # fmt: skip
        self.quantiser = quantiser
        self.decoder = nn.Sequential(
            nn.Conv2d(quantiser.width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.SiLU(),
            nn.ConvTranspose2d(width, 3, 4, 4), nn.Tanh(),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D), row by row."""
        return self.encoder(x).flatten(2).mT

    def decode(self, q: Tensor) -> Tensor:
        return self.decoder(q.mT.unflatten(2, (SIDE // 4, SIDE // 4)))

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        q, _, terms = self.quantiser(self.encode(x))
        return self.decode(q), terms

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.quantiser(self.encode(part))[1] for part in x.split(512)])

    @torch.no_grad()
    def paint(self, ids: Tensor) -> Tensor:
        return self.decode(self.quantiser.numbers(ids))


class Prior(nn.Module):
    """A transformer of tokens, one after another, that begins with the class; class 0 is none."""

    hidden: Tensor

    def __init__(self, size: int, width: int, dropout: float, layers: int = 2):
        super().__init__()
        self.label, self.token = nn.Embedding(1 + CLASSES, width), nn.Embedding(size, width)
        self.place = nn.Parameter(0.02 * torch.randn(TOKENS, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))
        self.register_buffer("hidden", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))

    def forward(self, ids: Tensor, told: Tensor) -> Tensor:
        """Logits of each token from the class and the tokens before it."""
        before = torch.cat([self.label(told)[:, None], self.token(ids[:, :-1])], 1)
        return self.head(self.blocks(before + self.place, mask=self.hidden))

    def nats(self, ids: Tensor, told: Tensor) -> Tensor:
        """Of each token, (B, T)."""
        return F.cross_entropy(self(ids, told).mT, ids, reduction="none")

    @torch.no_grad()
    def write(self, given: Tensor, told: Tensor, guidance: float = 1.0, temperature: float = 0.8) -> Tensor:
        """The tokens that are given, and those after them as they are drawn."""
        ids = F.pad(given, (0, TOKENS - given.shape[1]))
        for t in range(given.shape[1], TOKENS):
            logits = self(ids, told)[:, t]
            if guidance != 1:
                free = self(ids, torch.zeros_like(told))[:, t]
                logits = free + guidance * (logits - free)
            ids[:, t] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
        return ids


def judge_of(known: Pictures, steps: int = 150) -> nn.Sequential:
    """A classifier of real pictures, to judge those that are drawn."""
    layers = (nn.Linear(192, 96), nn.SiLU(), nn.Linear(96, CLASSES))
    judge = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *layers)
    x, label = scaled(known), classes_of(known)
    optimizer = torch.optim.Adam(judge.parameters(), lr=4e-3)
    for _ in range(steps):
        rows = torch.randint(len(label), (128,))
        optimizer.zero_grad()
        F.cross_entropy(judge(x[rows]), label[rows]).backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def recognised(judge: nn.Module, x: Tensor, label: Tensor) -> Reading:
    return share(int((judge(x).argmax(1) == label).sum()), len(label), 1 / CLASSES)


def scaled(seen: Pictures) -> Tensor:
    return 2 * seen.images - 1


def classes_of(seen: Pictures) -> Tensor:
    return seen.factors[:, 1] * len(COLUMNS) + seen.factors[:, 4]


def unigram(known: Tensor, held_out: Tensor, size: int) -> float:
    """Nats of a held-out token by how often each occurs."""
    counts = torch.bincount(known.flatten(), minlength=size) + 1.0
    return -float((counts / counts.sum()).log()[held_out].mean())


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, first: int = 320, second: int = 300, size: int = 40, items: int = 4096,
    rate: float = 1e-2, width: int = 64, levels: tuple[int, ...] = (8, 5, 5), bits: int = 0, entropy: float = 0.1,
    beta: float = 0.25, calm: int = 0, ramp: int = 0, wide: int = 64, dropout: float = 0.0, drop: float = 0.1,
    guidance: float = 2.0, optimizer: str = "AdamW", schedule: str = "cosine",
    odd: tuple[int, ...] = (),
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    known, other = pictures(items, seed), pictures(512, 10_000 + seed)
    x, label, held_out, held_label = scaled(known), classes_of(known), scaled(other), classes_of(other)
    held_told = held_label + 1
    variance = float((held_out - x.mean(0)).square().mean())
    judge = judge_of(pictures(4096, 20_000 + seed))

    def losses(batch: Tensor) -> dict[str, Tensor]:
        rebuilt, terms = autoencoder(batch)
        return {"reconstruction": (rebuilt - batch).square().mean() / variance, **terms}

    def make() -> Autoencoder:
        return Autoencoder(width, LFQ(bits) if bits else FSQ(levels))

    autoencoder, tokenizer = make(), make().eval().requires_grad_(False)
    codes = autoencoder.quantiser.size
    prior = Prior(codes, wide, dropout).requires_grad_(False)
    model = nn.ModuleDict({"autoencoder": autoencoder, "prior": prior})
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    falls = {
        "cosine": lambda part: 0.5 + 0.5 * math.cos(math.pi * part),
        "restarts": lambda part: 0.52 + 0.48 * math.cos(math.pi * (3 * part % 1)),
        "linear": lambda part: 1 - part,
        "constant": lambda part: 1.0,
    }

    def course(k: int) -> float:
        """Each stage warms up, and has a fall of its own."""
        done, whole = (k, first) if k < first else (k - first, second)
        return min(1.0, (done + 1) / 10) * falls[schedule](min(1.0, done / whole))

    rates = torch.optim.lr_scheduler.LambdaLR(optim, course)

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        images, told = probe
        if not prior.place.requires_grad:
            z = autoencoder.encode(images)
            counts = codebook.code_counts(autoencoder.tokens(images), codes)
            of_codes = {"perplexity": codebook.perplexity(counts), "usage": codebook.usage(counts)}
            return {"val/latent": panel.latents(z.flatten(1)), "val/codes": of_codes}
        ids = tokenizer.tokens(images)
        forced = (prior(ids, told).argmax(2) == ids)[:, GIVEN:].all(1)
        written = (prior.write(ids[:, :GIVEN], told, temperature=1e-4) == ids).all(1)
        shares = {"accuracy": written, "accuracy_forced": forced}

        def loss(told: Tensor) -> tuple[Any, Any]:
            each = prior.nats(ids, told.long()).sum(1).double().numpy()
            return each, each

        return {
            "val/prior": {name: share(int(right.sum()), len(right)) for name, right in shares.items()},
            "val/condition": {"permuted_loss": trials.cost_of_exchange(loss, told.double())["shuffled"]},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:256], held_told[:256]), read=read, every=50, log_every=5,
        steps=first + second, nulls={"train/loss/reconstruction": 1.0, "val/loss/reconstruction": 1.0},
    )  # fmt: skip
    low, high = autoencoder.decoder[-1](torch.tensor([-1e4, 1e4])).tolist()
    monitor.audit(
        ranges={"pixels": audits.ranges(x, low, high)},
        leaks={"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
    )

    def update(weighted: dict[str, tuple[Tensor, float]], batch: Any) -> None:
        loss = torch.stack([weight * term for term, weight in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, batch)
        optim.step()
        rates.step()

    best: dict[str, Tensor] = {}
    least = math.inf
    for step, rows in zip(range(1, first + 1), batches(items, size), strict=False):
        model.train()
        batch = -x[rows] if step in odd else x[rows]
        terms = losses(batch)
        grown = 0.0 if step <= calm else min(1.0, (step - calm) / ramp) if ramp else 1.0
        weights = {"reconstruction": 1.0, "entropy": entropy * grown, "commitment": beta}
        update({name: (term, weights[name]) for name, term in terms.items()}, batch)
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = losses(held_out)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"psnr": -10 * math.log10(float(terms["reconstruction"]) * variance / 4)})
            if float(terms["reconstruction"]) < least:
                least = float(terms["reconstruction"])
                best = {name: value.clone() for name, value in autoencoder.state_dict().items()}

    monitor.audit(loaded=audits.loaded(tokenizer, best))
    tokenizer.load_state_dict(best, strict=False)
    autoencoder.requires_grad_(False)
    prior.requires_grad_(True)
    table, seen = tokenizer.tokens(x), tokenizer.tokens(held_out)
    null, dropped = unigram(table, seen, codes), 0
    for step, rows in zip(range(1, second + 1), batches(items, size), strict=False):
        model.train()
        none = torch.rand(size) < drop
        dropped += int(none.sum())
        told = (label[rows] + 1).masked_fill(none, 0)
        ids = table[rows].flip(1) if first + step in odd else table[rows]
        update({"prior": (prior.nats(ids, told).mean(), 1.0)}, (ids, told))
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                nats = Reading(float(prior.nats(seen, held_told).mean()), null)
                of_known = Reading(float(prior.nats(table[:512], label[:512] + 1).mean()), null)
            monitor.log(
                {"train/prior/nats_per_token": of_known, "train/condition/dropped_share": dropped / step / size}
            )
            monitor.validated({"val/prior/nats_per_token": nats, "val/loss/prior": nats})

    model.eval()
    asked = torch.arange(CLASSES).repeat(50)
    drawn = tokenizer.paint(prior.write(torch.zeros(len(asked), 0, dtype=torch.int64), asked + 1, guidance))
    with torch.no_grad():
        rebuilt, _ = tokenizer(held_out)
    samples, given_back = recognised(judge, drawn, asked), recognised(judge, rebuilt, held_label)
    monitor.validated({"val/prior/object": samples, "val/posterior/object": given_back})
    monitor.validated({"val/guidance/used": guidance})
    monitor.close()
    return {
        "explained variance of held-out pictures": (1 - float((rebuilt - held_out).square().mean()) / variance, 0.0),
        "nats a held-out token that the prior saves": (null - nats.value, 0.0),
        "drawn pictures that show colour and column": (samples.value, 1 / CLASSES),
        "held-out pictures that do, rebuilt": (given_back.value, 1 / CLASSES),
    }


FAMILY = Family(
    "fsq", "development", "pictures in numbers that are rounded, and a causal prior over these tokens, told and guided",
    faults=(
        Fault("rounded-without-a-way-back",
              "What is rounded is handed on without the straight-through sum: the encoder's gradient is 0 everywhere.",
              ("dead-parameters",),
              changes=(Change("bounded + (bounded.round() - bounded).detach()", "bounded.round()"),)),
        Fault("two-levels-shifted-beyond-tanh",
              "The bound is a little less than half, not more: of two levels the shift is the inverse tanh of 1.001.",
              ("non-finite",), changes=(Change("(1 + 1e-3)", "(1 - 1e-3)"),), options={"levels": (8, 5, 2, 2)}),
        Fault("ids-taken-apart-from-the-other-end",
              "Ids count through the first number fastest, and are taken apart as if the last one were.",
              ("prior-mismatch",),
              changes=(Change("digits = ids[..., None] // self.basis % self.levels",
                              "digits = torch.stack(torch.unravel_index(ids, self.levels.tolist()), -1)"),)),
        Fault("best-weights-saved-with-their-wrapper",
              "The best weights are kept of the module of both stages: no name fits, and strict=False says nothing.",
              ("partial-load",), changes=(Change("in autoencoder.state_dict()", "in model.state_dict()"),)),
        Fault("optimizer-of-what-was-trained-at-first",
              "The optimizer takes what requires a gradient while the prior is still frozen, and nothing later.",
              ("not-in-optimizer",),
              changes=(Change("(model.parameters(), lr", "([p for p in model.parameters() if p.requires_grad], lr"),)),
        Fault("mask-one-place-late",
              "The mask leaves the diagonal's right neighbour open, where the very token stands that is to be told.",
              ("free-running-gap",), changes=(Change(".triu(1)", ".triu(2)"),)),
        Fault("terms-summed-as-they-are",
              "The weights of entropy and commitment are logged, and the sum is that of the terms without them.",
              ("weight-not-applied",),
              changes=(Change("stack([weight * term for term, weight in", "stack([term for term, _ in"),),
              options={"bits": 7}),
        Fault("classes-kept-one-time-in-ten",
              "The comparison that drops a class for guidance is the wrong way around, so nine of ten are dropped.",
              ("null-mismatch",), minor=True,
              changes=(Change("torch.rand(size) < drop", "torch.rand(size) > drop"),)),
        Fault("variety-punished", "The entropy of the mean token is added to the loss, where it should be taken away.",
              ("codebook-collapse",), changes=(Change("sure - varied", "sure + varied"),),
              options={"bits": 7, "entropy": 0.5}),
        Fault("sigmoid-for-pictures-from-minus-one",
              "Pictures run from −1 to 1, and the decoder ends in the sigmoid that it had when they ran from 0.",
              ("range-mismatch",), changes=(Change("nn.Tanh()", "nn.Sigmoid()"),)),
        Fault("held-out-pictures-in-training-mode",
              "The first stage forgets model.eval(), so its normalisation takes in the held-out pictures.",
              ("validation-pollutes",),
              changes=(Change("            model.eval()\n            with monitor.validation(), torch.no_grad():\n"
                              "                terms",
                              "            with monitor.validation(), torch.no_grad():\n                terms"),)),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy("signs", "Signs with an entropy and a commitment.", options={"bits": 7}, seeds=(0, 1)),
        Healthy("signs-entropy-later", "The entropy has no weight at first, and then one that rises.",
                options={"bits": 7, "calm": 40, "ramp": 80}, seeds=(0, 1)),
        Healthy("four-numbers", options={"levels": (4, 4, 4, 4), "size": 48}, seeds=(0, 1)),
        Healthy("few-levels", options={"levels": (5, 3, 3)}, seeds=(0, 1)),
        Healthy("adam-constant", options={"optimizer": "Adam", "schedule": "constant", "rate": 5e-3}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 4e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "rate": 8e-3, "schedule": "linear"}),
        Healthy("warm-restarts", "The rate jumps back up within each stage.",
                options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("unguided", "No class is dropped, and none is guided by; dropout in the prior.",
                options={"drop": 0.0, "guidance": 1.0, "dropout": 0.05, "second": 340}, seeds=(0, 1)),
        Healthy("two-odd-batches", "A batch of negatives, and one of tokens from the end to the beginning.",
                options={"odd": (120, 450)}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 1536}, seeds=(0, 1)),
    ),
)  # fmt: skip

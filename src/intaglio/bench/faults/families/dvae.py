"""Pictures as discrete codes through a Gumbel-softmax, with a causal prior that writes codes after words: the discrete
VAE of Jang et al. 2017 in the use that Ramesh et al. 2021 make of it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, COLUMNS, ROWS, Pictures, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor
from intaglio.history import Reading
from intaglio.history.reading import share

TOKENS, SAID = 16, 3
VOCABULARY = len(COLOURS) + len(ROWS) + len(COLUMNS)
CLASSES = len(COLOURS) * len(ROWS) * len(COLUMNS)


class Quantiser(nn.Module):
    """In training a mixture of codes, drawn from the relaxed categorical; else the likeliest code of each place."""

    def __init__(self, size: int, width: int, hard: bool):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(size, width))
        self.hard, self.temperature = hard, 1.0

    def relaxed(self, logits: Tensor) -> Tensor:
        """Logarithms of shares, drawn at the temperature."""
        noise = -torch.empty_like(logits).exponential_().clamp_min(1e-9).log()
        return ((logits + noise) / self.temperature).log_softmax(2)

    def forward(self, logits: Tensor) -> Tensor:
        """(B, T, K) → (B, T, D)."""
        if not self.training:
            return self.codes[logits.argmax(2)]
        soft = self.relaxed(logits).exp()
        if self.hard:
            one = F.one_hot(soft.argmax(2), soft.shape[2]).float()
            soft = one + soft - soft.detach()
        return soft @ self.codes


class DVAE(nn.Module):
    def __init__(self, size: int, width: int, latent: int, hard: bool):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, size, 1),
        )  # fmt: skip
        self.quantiser = Quantiser(size, latent, hard)
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, 4 * width, 3, 1, 1), nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.Conv2d(4 * width, 4 * width, 1), nn.BatchNorm2d(4 * width), nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 3, 4, 4), nn.Sigmoid(),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """Logits (B, T, K), row by row."""
        return self.encoder(x).flatten(2).mT

    def decode(self, q: Tensor) -> Tensor:
        return self.decoder(q.mT.unflatten(2, (4, 4)))

    def forward(self, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        logits = self.encode(x)
        reconstruction = (self.decode(self.quantiser(logits)) - x).square().flatten(1).sum(1).mean()
        log_q = logits.log_softmax(2)
        log_uniform = torch.full_like(log_q, -math.log(logits.shape[2]))
        kl = F.kl_div(log_uniform, log_q, reduction="batchmean", log_target=True)
        return {"reconstruction": reconstruction, "kl": kl}, logits.argmax(2)

    @torch.no_grad()
    def paint(self, codes: Tensor) -> Tensor:
        return self.decode(self.quantiser.codes[codes])


class Prior(nn.Module):
    """A causal transformer that reads words, whose sum stands at every place, and then codes."""

    def __init__(self, size: int, width: int, layers: int = 2):
        super().__init__()
        self.word, self.code = nn.Embedding(VOCABULARY, width), nn.Embedding(size, width)
        self.place = nn.Parameter(0.02 * torch.randn(SAID + TOKENS, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(SAID + TOKENS)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size))

    def forward(self, words: Tensor, codes: Tensor) -> Tensor:
        """Logits of each code (B, T, K) from the words and the codes before it."""
        told = self.word(words)
        read = torch.cat([told, self.code(codes)], 1) + told.sum(1, keepdim=True) + self.place
        return self.head(self.blocks(read, mask=self.mask))[:, SAID - 1 : -1]

    def nats(self, words: Tensor, codes: Tensor) -> Tensor:
        """Of each code, (B, T)."""
        return F.cross_entropy(self(words, codes).mT, codes, reduction="none")

    @torch.no_grad()
    def write(self, words: Tensor, temperature: float = 0.3) -> Tensor:
        codes = torch.zeros(len(words), TOKENS, dtype=torch.int64)
        for t in range(TOKENS):
            logits = self(words, codes)[:, t]
            codes[:, t] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
        return codes


def said(seen: Pictures) -> Tensor:
    """Words of colour, row and column (N, 3)."""
    return seen.factors[:, [1, 3, 4]] + torch.tensor([0, len(COLOURS), len(COLOURS) + len(ROWS)])


def class_of(words: Tensor) -> Tensor:
    colour, row, column = (words - torch.tensor([0, len(COLOURS), len(COLOURS) + len(ROWS)])).T
    return (colour * len(ROWS) + row) * len(COLUMNS) + column


def judge_of(known: Pictures, steps: int = 150) -> nn.Sequential:
    """A classifier of real pictures, to judge those that are drawn."""
    judge = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(192, 96), nn.SiLU(), nn.Linear(96, CLASSES))
    label = class_of(said(known))
    optimizer = torch.optim.Adam(judge.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(len(label), (128,))
        optimizer.zero_grad()
        F.cross_entropy(judge(known.images[rows]), label[rows]).backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def recognised(judge: nn.Module, x: Tensor, words: Tensor) -> Reading:
    return share(int((judge(x).argmax(1) == class_of(words)).sum()), len(words), 1 / CLASSES)


def unigram(known: Tensor, held_out: Tensor, size: int) -> float:
    """Nats of a held-out code by how often each occurs."""
    counts = torch.bincount(known.flatten(), minlength=size) + 1.0
    return -float((counts / counts.sum()).log()[held_out].mean())


def batches(items: int, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(items).split(size):
            if len(rows) == size:
                yield rows


def train(
    folder: Path, seed: int = 0, steps: int = 420, size: int = 40, items: int = 4096, rate: float = 4.5e-3,
    width: int = 24, latent: int = 16, codes: int = 32, wide: int = 48, hard: bool = False, warm: float = 1.5,
    cool: float = 0.3, anneal: float = 0.6, beta: float = 0.02, ramp: int = 150, late: int = 0, odd: int = 0,
    optimizer: str = "AdamW", momentum: float = 0.0, schedule: str = "cosine", warmup: float = 0.05,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    archive = pictures(items + 512, seed)
    order = torch.randperm(len(archive.images))
    mine, kept = order[:items], order[items:]
    x, words = archive.images[mine], said(archive)[mine]
    held_out, held_words = archive.images[kept], said(archive)[kept]
    spread = float((held_out - x.mean(0)).square().flatten(1).sum(1).mean())
    judge = judge_of(pictures(4096, 20_000 + seed))
    dvae, prior = DVAE(codes, width, latent, hard), Prior(codes, wide)
    model = nn.ModuleDict({"dvae": dvae, "prior": prior})
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    total = steps
    course = {
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * min(1.0, k / total)),
        "restarts": lambda k: 0.52 + 0.48 * math.cos(math.pi * (4 * k / total % 1)),
        "linear": lambda k: max(0.0, 1 - k / total),
        "constant": lambda k: 1.0,
    }
    rates = torch.optim.lr_scheduler.LambdaLR(
        optim, lambda k: min(1.0, (k + 1) / (warmup * total)) * course[schedule](k)
    )

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        images, told = probe
        logits = dvae.encode(images)
        q, log_q, chosen = dvae.quantiser(logits), logits.log_softmax(2), logits.argmax(2)
        nats = (log_q.exp() * (log_q + math.log(codes))).sum((1, 2)).mean()
        noise = dvae.quantiser.temperature * dvae.quantiser.relaxed(logits) - logits
        drawn = (noise - noise.mean(2, keepdim=True)).square().sum(2).mean() / (codes - 1)
        counts = codebook.code_counts(chosen, codes)

        def loss(other: Tensor) -> tuple[Any, Any]:
            each = prior.nats(other.long(), chosen[:128]).sum(1).double().numpy()
            return each, each

        return {
            "val/latent": {**panel.latents(q.flatten(1)), "kl_nats": Reading(float(nats), 0.0, len(images))},
            "train/latent": {"noise_ratio": Reading(float(drawn.sqrt()) * math.sqrt(6) / math.pi, 1.0)},
            "val/codes": {"perplexity": codebook.perplexity(counts), "usage": codebook.usage(counts)},
            "val/condition": {"permuted_loss": trials.cost_of_exchange(loss, told[:128].double())["shuffled"]},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:384], held_words[:384]), read=read, every=50, log_every=5,
        steps=steps, nulls={"train/loss/reconstruction": spread, "val/loss/reconstruction": spread},
    )  # fmt: skip
    monitor.audit(
        ranges={"pixels": audits.ranges(x, 0.0, 1.0)},
        leaks={"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
    )
    for step, rows in enumerate(batches(items, size), 1):
        dvae.quantiser.temperature = max(cool, warm * (1 - step / (anneal * steps)))
        weight = beta * min(1.0, step / ramp) if ramp else beta
        model.train()
        batch = 1 - x[rows] if step == odd else x[rows]
        terms, chosen = dvae(batch)
        weighted = {"reconstruction": (terms["reconstruction"], 1.0), "kl": (terms["kl"], weight)}
        weighted["prior"] = (prior.nats(words[rows], chosen).mean(), 1.0 if step > late else 0.0)
        loss = terms["reconstruction"] + weight * terms["kl"] + weighted["prior"][1] * weighted["prior"][0]
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, (batch, words[rows]))
        optim.step()
        rates.step()
        if step % 10 == 0 and warm > cool:
            monitor.log({"train/codes/temperature": dvae.quantiser.temperature})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms, seen = dvae(held_out)
                known = dvae.encode(x[:512]).argmax(2)
                null = unigram(known, seen, codes)
                nats = Reading(float(prior.nats(held_words, seen).mean()), null)
                of_known = Reading(float(prior.nats(words[:512], known).mean()), null)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"psnr": -10 * math.log10(float(terms["reconstruction"]) / held_out[0].numel())})
            if step > late:
                monitor.log({"train/prior/nats_per_token": of_known, "val/prior/nats_per_token": nats})
                monitor.validated({"val/loss/prior": nats})
        if step == steps:
            break
    model.eval()
    asked = said(pictures(512, 30_000 + seed))
    with torch.no_grad():
        error, seen = dvae(held_out)
        saved = unigram(dvae.encode(x[:512]).argmax(2), seen, codes) - float(prior.nats(held_words, seen).mean())
        forced = dvae.paint(prior(held_words, seen).argmax(2))
    samples = recognised(judge, dvae.paint(prior.write(asked)), asked)
    given_back = recognised(judge, dvae.paint(seen), held_words)
    monitor.validated({"val/prior/object": samples, "val/posterior/object": given_back})
    monitor.validated({"val/prior/object_forced": recognised(judge, forced, held_words)})
    monitor.close()
    return {
        "explained variance of held-out pictures": (1 - float(error["reconstruction"]) / spread, 0.0),
        "nats a held-out code that the prior saves": (saved, 0.0),
        "drawn pictures that show what was asked": (samples.value, 1 / CLASSES),
        "held-out pictures that do, from their codes": (given_back.value, 1 / CLASSES),
    }


FAMILY = Family(
    "dvae",
    "development",
    "a discrete VAE of pictures by Gumbel-softmax, and a causal prior over its codes that is told colour and place",
    faults=(
        Fault(
            "kl-of-the-whole-batch",
            "The uniform prior is one number, and batchmean divides by its length, 1: the KL is summed over the batch.",
            ("kl-units", "term-dominates"),
            changes=(
                Change(
                    "torch.full_like(log_q, -math.log(logits.shape[2]))", "torch.tensor([-math.log(logits.shape[2])])"
                ),
            ),
            minor=True,
        ),
        Fault(
            "temperature-never-handed-on",
            "The temperature is annealed in a variable of the loop, and the quantiser keeps what it began with.",
            ("temperature-stuck",),
            changes=(Change("        dvae.quantiser.temperature = max", "        temperature = max"),),
            minor=True,
        ),
        Fault(
            "noise-outside-the-bracket",
            "The Gumbel noise is added after the division by the temperature: the colder, the less of it is left.",
            ("temperature-misstates-rate",),
            changes=(Change("((logits + noise) / self.temperature)", "(logits / self.temperature + noise)"),),
            minor=True,
        ),
        Fault(
            "straight-through-without-its-way-back",
            "Codes are chosen outright, and the relaxed shares that were to carry the gradient are not added.",
            ("posterior-collapse", "latent-ignores-input"),
            changes=(Change("soft = one + soft - soft.detach()", "soft = one"),),
            options={"hard": True},
        ),
        Fault(
            "temperature-without-a-floor",
            "The temperature falls in a line, and nothing holds it above 0.",
            ("non-finite",),
            changes=(
                Change("max(cool, warm * (1 - step / (anneal * steps)))", "warm * (1 - step / (anneal * steps))"),
            ),
        ),
        Fault(
            "prior-told-one-place-late",
            "The prior's logits are taken one place late, where the code that they are to tell has been read.",
            ("free-running-gap", "prior-mismatch"),
            changes=(Change("[:, SAID - 1 : -1]", "[:, SAID:]"),),
        ),
        Fault(
            "drawn-at-the-inverse-temperature",
            "Logits are multiplied by the temperature of sampling, so that it makes samples wilder and not calmer.",
            ("prior-mismatch", "free-running-gap"),
            changes=(Change("(logits / temperature)", "(logits * temperature)"),),
        ),
        Fault(
            "words-of-other-pictures",
            "Pictures are taken by the rows that were shuffled, and words in the order of the file.",
            ("condition-ignored",),
            changes=(Change("prior.nats(words[rows], chosen)", "prior.nats(words[:size], chosen)"),),
        ),
        Fault(
            "prior-not-in-the-optimizer",
            "The optimizer was made for the autoencoder, and the prior that came later is not in it.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate", "(dvae.parameters(), lr=rate"),),
        ),
        Fault(
            "places-never-added",
            "The embedding of places is made, and not added to what the transformer reads.",
            ("dead-parameters",),
            changes=(Change("keepdim=True) + self.place", "keepdim=True)"),),
            minor=True,
        ),
        Fault(
            "split-drawn-twice",
            "Each side of the split is cut from an order of its own, so most held-out pictures are trained on.",
            ("split-leak",),
            changes=(
                Change(
                    "mine, kept = order[:items], order[items:]",
                    "mine, kept = order[:items], torch.randperm(len(order))[items:]",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy(
            "straight-through",
            "Codes are chosen outright in training too.",
            options={"hard": True, "rate": 8e-3, "codes": 16, "width": 32, "warm": 0.8, "cool": 0.4, "beta": 0.01},
            seeds=(0, 1),
        ),
        Healthy(
            "one-temperature",
            "The temperature is not annealed, as Jang et al. have it for some runs.",
            options={"warm": 0.6, "cool": 0.6},
            seeds=(0, 1),
        ),
        Healthy(
            "steep-ramp",
            "The KL's weight rises to three times the usual, and the loss with it.",
            options={"beta": 0.06, "ramp": 240},
            seeds=(0, 1),
        ),
        Healthy("prior-later", "The prior's term has no weight at first.", options={"late": 100}, seeds=(0, 1)),
        Healthy("nadam", options={"optimizer": "NAdam", "rate": 3e-3, "ramp": 0}, seeds=(0, 1)),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "constant"}, seeds=(0, 1)),
        Healthy("adam-linear", options={"optimizer": "Adam", "rate": 3e-3, "schedule": "linear", "ramp": 0}),
        Healthy("warm-restarts", "The rate jumps back up four times.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("one-odd-batch", "A batch of negatives, from which the run recovers.", options={"odd": 240}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 1536}, seeds=(0, 1)),
        Healthy("many-codes", options={"codes": 64, "size": 48}, seeds=(0, 1)),
        Healthy("few-codes", options={"codes": 12, "width": 32}, seeds=(0, 1)),
    ),
)

"""Pictures as codes, and a transformer that writes codes: a VQ-VAE with moving averages (van den Oord et al. 2017) and,
beside or after it, a causal prior over its grid that is told colour and row (Esser et al. 2021)."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import COLOURS, ROWS, SIDE, Pictures, pictures
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook, contrastive
from intaglio.health.monitor import Monitor
from intaglio.history import Reading
from intaglio.history.reading import share

CLASSES = len(COLOURS) * len(ROWS)
GIVEN = 12


class Codebook(nn.Module):
    """Codes that start by k-means on the first latents, and are then the moving averages of those that chose them.

    A code that is seldom chosen in a window of steps starts again on a latent that is far from all.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    uses: Tensor
    last_used: Tensor

    def __init__(self, size: int, width: int, decay: float, window: int):
        super().__init__()
        self.decay, self.window, self.updates, self.threshold = decay, window, 0, 0.0
        self.register_buffer("codes", torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))
        self.register_buffer("uses", torch.zeros(size))
        self.register_buffer("last_used", torch.full((size,), -1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        flat = z.detach().flatten(0, 1)
        if self.training and not self.updates:
            self.start(flat)
        chosen = torch.cdist(flat, self.codes).argmin(1)
        q = self.codes[chosen].view_as(z)
        if self.training:
            self.follow(flat, chosen)
        return q, chosen.view(z.shape[:2])

    @torch.no_grad()
    def start(self, flat: Tensor, rounds: int = 5) -> None:
        self.codes.copy_(flat[torch.randperm(len(flat))[: len(self.codes)]])
        for _ in range(rounds):
            members = F.one_hot(torch.cdist(flat, self.codes).argmin(1), len(self.codes)).float()
            taken = members.sum(0) > 0
            self.codes[taken] = (members.T @ flat)[taken] / members.sum(0)[taken, None]
        self.counts.fill_(len(flat) / len(self.codes))
        self.threshold = 0.1 * len(flat) / len(self.codes)
        self.sums.copy_(self.codes * self.counts[:, None])

    @torch.no_grad()
    def follow(self, flat: Tensor, chosen: Tensor) -> None:
        members = F.one_hot(chosen, len(self.codes)).float()
        self.counts.lerp_(members.sum(0), 1 - self.decay)
        self.sums.lerp_(members.T @ flat, 1 - self.decay)
        smoothed = (self.counts + 1e-5) / (1 + 1e-5 * len(self.codes) / self.counts.sum())
        self.codes.copy_(self.sums / smoothed[:, None])
        self.uses += members.sum(0)
        self.last_used[chosen] = self.updates
        self.updates += 1
        if self.window and self.updates % self.window == 0:
            self.revive(flat, self.uses < self.window * self.threshold)
            self.uses.zero_()

    def revive(self, flat: Tensor, seldom: Tensor) -> None:
        total, far = self.counts.sum(), torch.cdist(flat, self.codes).amin(1).topk(int(seldom.sum())).indices
        self.codes[seldom] = flat[far]
        self.counts[seldom] = total / len(self.codes)
        self.counts *= total / self.counts.sum()
        self.sums.copy_(self.codes * self.counts[:, None])


class Autoencoder(nn.Module):
    def __init__(self, width: int, latent: int, book: Codebook):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.BatchNorm2d(width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.BatchNorm2d(2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, latent, 1),
        )  # fmt: skip
        self.codebook = book
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, 2 * width, 3, 1, 1), nn.SiLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, D), row by row."""
        return self.encoder(x).flatten(2).mT

    def decode(self, q: Tensor) -> Tensor:
        side = math.isqrt(q.shape[1])
        return self.decoder(q.mT.unflatten(2, (side, side)))

    def forward(self, x: Tensor, variance: float) -> tuple[dict[str, Tensor], Tensor]:
        z = self.encode(x)
        q, chosen = self.codebook(z)
        passed = z + (q - z).detach()
        commitment = (z - q).square().mean()
        reconstruction = (self.decode(passed) - x).square().mean() / variance
        return {"reconstruction": reconstruction, "commitment": commitment}, chosen

    @torch.no_grad()
    def tokens(self, x: Tensor) -> Tensor:
        return torch.cat([self.codebook(self.encode(part))[1] for part in x.split(512)])

    @torch.no_grad()
    def paint(self, codes: Tensor) -> Tensor:
        return self.decode(self.codebook.codes[codes])


class Prior(nn.Module):
    """A transformer of codes, one after another, that begins with the class."""

    def __init__(self, codes: int, tokens: int, width: int, layers: int = 2):
        super().__init__()
        self.label, self.code = nn.Embedding(CLASSES, width), nn.Embedding(codes, width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.mask = nn.Transformer.generate_square_subsequent_mask(tokens)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, codes))

    def forward(self, codes_BT: Tensor, label_B: Tensor) -> Tensor:
        """Logits of each code from the class and the codes before it."""
        before = torch.cat([self.label(label_B)[:, None], self.code(codes_BT[:, :-1])], 1)
        return self.head(self.blocks(before + self.place, mask=self.mask))

    def nats(self, codes_BT: Tensor, label_B: Tensor) -> Tensor:
        """Of each code, (B, T)."""
        return F.cross_entropy(self(codes_BT, label_B).mT, codes_BT, reduction="none")

    @torch.no_grad()
    def write(self, given: Tensor, label_B: Tensor, temperature: float = 0.7) -> Tensor:
        """The codes that are given, and those after them as they are drawn."""
        codes = F.pad(given, (0, len(self.place) - given.shape[1]))
        for t in range(given.shape[1], len(self.place)):
            logits = self(codes, label_B)[:, t]
            codes[:, t] = torch.multinomial((logits / temperature).softmax(1), 1)[:, 0]
        return codes


def judge_of(known: Pictures, steps: int = 150) -> nn.Sequential:
    """A classifier of real pictures, to judge those that are drawn."""
    layers = (nn.Linear(192, 96), nn.SiLU(), nn.Linear(96, CLASSES))
    judge, label = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), *layers), classes_of(known)
    optimizer = torch.optim.Adam(judge.parameters(), lr=3e-3)
    for _ in range(steps):
        rows = torch.randint(len(label), (128,))
        optimizer.zero_grad()
        F.cross_entropy(judge(known.images[rows]), label[rows]).backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def recognised(judge: nn.Module, x: Tensor, label: Tensor) -> Reading:
    return share(int((judge(x).argmax(1) == label).sum()), len(label), 1 / CLASSES)


def classes_of(seen: Pictures) -> Tensor:
    return seen.factors[:, 1] * len(ROWS) + seen.factors[:, 3]


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
    folder: Path, seed: int = 0, steps: int = 500, first: int = 200, begins: int = 0, size: int = 64,
    items: int = 4096, rate: float = 5e-3, width: int = 24, latent: int = 8, codes: int = 48, decay: float = 0.95,
    window: int = 10, beta: float = 0.25, calm: int = 0, wide: int = 64, optimizer: str = "AdamW",
    schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    archive = pictures(items + 512, seed)
    images, label = archive.images, classes_of(archive)
    test = torch.zeros(len(images), dtype=torch.bool).index_fill_(0, torch.randperm(len(images))[:512], True)
    mine = (~test).nonzero()[:, 0]
    held_out, held_label = images[test], label[test]
    variance = float((held_out - images[mine].mean(0)).square().mean())
    judge = judge_of(pictures(4096, 20_000 + seed))
    book, tokens = Codebook(codes, latent, decay, window), (SIDE // 4) ** 2
    autoencoder = Autoencoder(width, latent, book)
    prior = Prior(codes, tokens, wide).requires_grad_(not begins)
    model = nn.ModuleDict({"autoencoder": autoencoder, "prior": prior})
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    total = steps
    course = {
        "cosine": lambda k: 0.5 + 0.5 * math.cos(math.pi * min(1.0, k / total)),
        "restarts": lambda k: 0.52 + 0.48 * math.cos(math.pi * (4 * k / total % 1)),
        "constant": lambda k: 1.0,
    }
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: min(1.0, (k + 1) / 20) * course[schedule](k))
    table: Tensor | None = None
    rows = mine

    def declared(rows: Tensor) -> dict[str, Any]:
        same = audits.leaks(images[rows].numpy(), held_out.numpy())
        return {"trained_on_test": int(test[rows].sum()), "leaks": {"the very same picture": same}}

    def read(model: Any, probe: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, told = probe
        z, chosen, per_step = autoencoder.encode(x), autoencoder.tokens(x), tokens * size
        of_codes = {
            "perplexity": codebook.perplexity(codebook.code_counts(chosen, codes)),
            "norm_ratio": codebook.norm_ratio(book.codes, z.flatten(0, 1)),
            "mass_ratio": codebook.mass_ratio(book.counts, per_step),
            "dead_share": codebook.dead_share(book.last_used, book.updates - 1, per_step),
            "revival_threshold": codebook.revival_threshold(book.threshold, codes, per_step),
        }
        found: dict[str, Any] = {"val/latent": panel.latents(z.flatten(1)), "val/codes": of_codes}
        found["train/codes"] = {"updates_per_step": Reading(book.updates / min(monitor.count, first), 1.0)}
        if monitor.count > begins:
            forced = (prior(chosen, told).argmax(2) == chosen)[:, GIVEN:].all(1)
            written = (prior.write(chosen[:, :GIVEN], told, temperature=1e-4) == chosen).all(1)
            shares = {"accuracy": written, "accuracy_forced": forced}
            found["val/prior"] = {name: share(int(right.sum()), len(right)) for name, right in shares.items()}

            def loss(label: Tensor) -> tuple[Any, Any]:
                each = prior.nats(chosen, label.long()).sum(1).double().numpy()
                return each, each

            found["val/condition"] = {"permuted_loss": trials.cost_of_exchange(loss, told.double())["shuffled"]}
        if table is not None:
            kept = book.codes[table[:256]].flatten(1)
            now = book.codes[autoencoder.tokens(images[rows[:256]])].flatten(1)
            found["train/table"] = {"queue_agreement": contrastive.queue_agreement(kept, now)}
        return found

    monitor = Monitor(
        model, optim, folder=folder, probe=(held_out[:256], held_label[:256]), read=read, every=50, log_every=5,
        steps=steps, nulls={"train/loss/reconstruction": 1.0, "val/loss/reconstruction": 1.0},
    )  # fmt: skip
    monitor.audit(**declared(rows))
    order = batches(items, size)
    for step in range(1, steps + 1):
        if step == first + 1:
            model.eval()
            rows = mine
            table = autoencoder.tokens(images[rows])
            monitor.audit(**declared(rows))
            order = batches(len(rows), size)
        model.train()
        prior.requires_grad_(step > begins)
        if step > first:
            autoencoder.requires_grad_(False).eval()
        picked = next(order)
        weighted: dict[str, tuple[Tensor, float]] = {}
        if step <= first:
            terms, chosen = autoencoder(images[rows[picked]], variance)
            weighted["reconstruction"] = (terms["reconstruction"], 1.0)
            weighted["commitment"] = (terms["commitment"], beta if step > calm else 0.0)
        if step > begins:
            read_codes = chosen if table is None else table[picked]
            weighted["prior"] = (prior.nats(read_codes, label[rows[picked]]).mean(), 1.0)
        loss = torch.stack([weight * term for term, weight in weighted.values()]).sum()
        monitor.before_backward(weighted)
        optim.zero_grad()
        loss.backward()
        monitor.step({**weighted, "total": loss}, picked)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms, seen = autoencoder(held_out, variance)
                if step <= first:
                    monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
                if step > begins:
                    known = autoencoder.tokens(images[mine[:1024]])
                    null = unigram(known, seen, codes)
                    nats = Reading(float(prior.nats(seen, held_label).mean()), null)
                    of_known = Reading(float(prior.nats(known, label[mine[:1024]]).mean()), null)
                    monitor.log({"train/prior/nats_per_token": of_known, "val/prior/nats_per_token": nats})
                    monitor.validated({"val/loss/prior": nats})

    asked = torch.arange(CLASSES).repeat(40)
    drawn = prior.eval().write(torch.zeros(len(asked), 0, dtype=torch.int64), asked)
    samples = recognised(judge, autoencoder.paint(drawn), asked)
    given_back = recognised(judge, autoencoder.paint(seen), held_label)
    monitor.validated({"val/prior/object": samples, "val/posterior/object": given_back})
    monitor.close()
    return {
        "explained variance of held-out pictures": (1 - float(terms["reconstruction"]), 0.0),
        "nats a held-out code that the prior saves": (null - nats.value, 0.0),
        "drawn pictures that show colour and row": (samples.value, 1 / CLASSES),
        "held-out pictures that do, from their codes": (given_back.value, 1 / CLASSES),
    }


FAMILY = Family(
    "vqprior",
    "development",
    "a VQ autoencoder of pictures, and a causal prior over its codes that is told colour and row",
    faults=(
        Fault(
            "smoothed-counts-are-shares",
            "Smoothed counts are divided by their sum, not multiplied by it again, so codes are too long by as much.",
            ("codes-displaced", "codebook-collapse"),
            changes=(Change("1 + 1e-5 * len(self.codes) / self.counts.sum()", "self.counts.sum()"),),
            options={"window": 0},
        ),
        Fault(
            "commitment-after-the-straight-through",
            "The commitment is taken of what goes straight through, whose gradient cancels that of the latent.",
            ("term-inert",),
            changes=(Change("(z - q).square()", "(z - passed).square()"),),
            case="J term-inert",
        ),
        Fault(
            "codes-asked-for-in-training-mode",
            "The prior's codes come from a second pass through the encoder, which moves the codebook once more.",
            ("codes-polluted",),
            changes=(Change("= chosen if", "= autoencoder.tokens(images[rows[picked]]) if"),),
            case="J codes-polluted",
        ),
        Fault(
            "codes-of-the-untrained-encoder",
            "The table of codes is written before the encoder has learnt, and not again when it is fixed.",
            ("queue-stale",),
            changes=(Change("if step == first + 1:", "if step == 2:"),),
            minor=True,
        ),
        Fault(
            "prior-without-its-mask",
            "The attention is not causal, so the prior reads each code that it is to predict.",
            ("free-running-gap",),
            changes=(Change(", mask=self.mask", ""),),
        ),
        Fault(
            "codes-shuffled-apart-from-classes",
            "The table is written by a loader that shuffles, and classes are read in the order of the files.",
            ("condition-ignored",),
            changes=(Change("tokens(images[rows])", "tokens(images[rows[torch.randperm(len(rows))]])"),),
        ),
        Fault(
            "painted-column-by-column",
            "Codes are learnt row by row, and those that are drawn are laid out column by column.",
            ("prior-mismatch",),
            changes=(Change("paint(drawn)", "paint(drawn.unflatten(1, (4, 4)).mT.flatten(1))"),),
        ),
        Fault(
            "schedule-of-the-first-stage",
            "The rate falls to 0 over the first stage, so the second has none.",
            ("learning-rate-off",),
            changes=(Change("total = steps\n", "total = first\n"),),
            options={"begins": 200},
            minor=True,
        ),
        Fault(
            "table-of-the-whole-archive",
            "Codes are written down for every picture of the archive, its test side included, and all are learnt from.",
            ("trained-on-test", "split-leak"),
            changes=(Change("            rows = mine\n", "            rows = torch.arange(len(images))\n"),),
            case="D trained-on-test",
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "one-after-the-other",
            "The prior begins when the autoencoder is done, and the total is another one from there on.",
            options={"begins": 200, "schedule": "constant", "rate": 3e-3},
            seeds=(0, 1),
        ),
        Healthy("commitment-later", "The commitment has no weight at first.", options={"calm": 100}),
        Healthy("adam", options={"optimizer": "Adam", "schedule": "constant", "rate": 3e-3, "width": 32}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "constant"}),
        Healthy("warm-restarts", "The rate jumps back up four times.", options={"schedule": "restarts"}),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 1024, "width": 16}),
        Healthy("many-codes", options={"codes": 96, "size": 80}),
    ),
)

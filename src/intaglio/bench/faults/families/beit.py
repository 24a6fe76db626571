"""BEiT (Bao et al. 2021): patches become tokens, of a tokenizer that is made first and frozen, and a vision transformer
says the tokens of hidden patches.

Pictures are wallpaper: a shape four times. The tokenizer is k-means of patches. N pictures, S = 32 pixels a side, T
patches of P numbers, D width, K codes.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import SIDE, pictures
from intaglio.health import audits, panel
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_strangers, distinct_views
from intaglio.history import Reading
from intaglio.history.reading import share as share_of

PATCH, GRID = 8, 2 * SIDE // 8
T, P = GRID**2, 3 * PATCH**2
MEAN, STD, TEST = 0.15, 0.25, 512


def patches(x: Tensor) -> Tensor:
    """(N, 3, S, S) → (N, T, P)."""
    return F.unfold(x, PATCH, stride=PATCH).mT


def views(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of pictures in bytes: patches as the transformer sees them, and as the tokenizer does."""
    whole = x / 255
    return patches((x / 255 - MEAN) / STD), patches(whole)


def moved(x: Tensor) -> Tensor:
    """A picture (3, S, S) by up to two pixels down and right; what leaves it comes in at the other side."""
    return x.roll([int(torch.rand(()) * 3) for _ in range(2)], [1, 2])


class Tokenizer(nn.Module):
    """(N, T, P) → (N, T) int64, by k-means whose averages follow in training mode alone."""

    def __init__(self, size: int, decay: float = 0.95):
        super().__init__()
        self.decay = decay
        self.codes, self.sums = (nn.Buffer(torch.zeros(size, P)) for _ in range(2))
        self.counts = nn.Buffer(torch.ones(size))

    def forward(self, x_NTP: Tensor) -> Tensor:
        flat = x_NTP.flatten(0, 1)
        chosen = torch.cdist(flat, self.codes).argmin(1)
        if self.training:
            self.follow(flat, chosen)
        return chosen.view(x_NTP.shape[:2])

    @torch.no_grad()
    def start(self, flat: Tensor) -> None:
        """Codes far from each other, by k-means++ (Arthur & Vassilvitskii 2007)."""
        self.codes[0] = flat[0]
        for k in range(1, len(self.codes)):
            far = torch.cdist(flat, self.codes[:k]).amin(1).square()
            self.codes[k] = flat[int(torch.multinomial(far, 1))]
        self.sums.copy_(self.codes)

    @torch.no_grad()
    def follow(self, flat: Tensor, chosen: Tensor) -> None:
        members = F.one_hot(chosen, len(self.codes)).float()
        self.counts.lerp_(members.sum(0), 1 - self.decay)
        self.sums.lerp_(members.T @ flat, 1 - self.decay)
        taken = members.any(0)
        self.codes[taken] = self.sums[taken] / self.counts[taken, None]


def tokenizer_of(images: Tensor, size: int, steps: int = 60) -> Tokenizer:
    made = Tokenizer(size)
    made.start(patches(images[:256] / 255).flatten(0, 1))
    for _ in range(steps):
        made(patches(images[torch.randint(len(images), (64,))] / 255))
    return made.eval()


class Block(nn.Module):
    def __init__(self, width: int, drop: float, heads: int = 4):
        super().__init__()
        self.heads, self.drop = heads, drop
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def passed(self, x: Tensor) -> Tensor:
        """0 for some of the items while training: stochastic depth."""
        return x * (torch.rand(len(x), 1, 1) >= self.drop) / (1 - self.drop) if self.training and self.drop else x

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.passed(self.out(mixed))
        return x + self.passed(self.mlp(self.norm_2(x)))


class ViT(nn.Module):
    def __init__(self, width: int, depth: int, drop: float):
        super().__init__()
        self.embed = nn.Linear(P, width)
        self.summary = nn.Parameter(0.3 * torch.randn(1, 1, width))
        self.places = nn.Parameter(0.5 * torch.randn(1, 1 + T, width))
        self.blocks = nn.Sequential(*(Block(width, drop * k / max(1, depth - 1)) for k in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """From embedded patches their features, (N, T, D)."""
        x = torch.cat([self.summary.expand(len(x_NTD), -1, -1), x_NTD], 1)
        x = x + self.places
        return self.norm(self.blocks(x))[:, 1:]

    def describe(self, x_NTP: Tensor) -> Tensor:
        """(N, D), the mean over patches."""
        return self(self.embed(x_NTP)).mean(1)


class BEiT(nn.Module):
    def __init__(self, tokenizer: Tokenizer, width: int, depth: int, drop: float):
        super().__init__()
        self.tokenizer = tokenizer
        self.backbone = ViT(width, depth, drop)
        self.mask = nn.Parameter(0.3 * torch.randn(width))
        self.head = nn.Linear(width, len(tokenizer.codes))

    def train(self, mode: bool = True) -> "BEiT":
        super().train(mode)
        self.tokenizer.eval()
        return self

    def given(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """Embedded patches with the mask's token where they are hidden."""
        return torch.where(hidden[:, :, None], self.mask, embedded)

    def forward(self, x_NTP: Tensor, hidden: Tensor) -> Tensor:
        return self.head(self.backbone(self.given(self.backbone.embed(x_NTP), hidden)))


def masks(count: int, share: float, blocks: bool, generator: torch.Generator | None = None) -> Tensor:
    """(N, T), True where hidden: blocks until a share of the patches is covered, or so many patches by lot."""
    if not blocks:
        return torch.rand(count, T, generator=generator).argsort(1) < round(share * T)
    hidden, at = torch.zeros(count, GRID, GRID, dtype=torch.bool), torch.arange(GRID)
    while bool((short := hidden.sum((1, 2)) < round(share * T)).any()):
        size = torch.randint(1, 3, (count, 2), generator=generator)
        begin = (torch.rand(count, 2, generator=generator) * (GRID + 1 - size)).long()
        inside = (at >= begin[:, :, None]) & (at < (begin + size)[:, :, None])
        hidden |= inside[:, 0, :, None] & inside[:, 1, None, :] & short[:, None, None]
    return hidden.flatten(1)


def masked_nats(logits: Tensor, ids: Tensor, hidden: Tensor) -> Tensor:
    """Of each picture, (N,), the mean over its hidden patches."""
    each = F.cross_entropy(logits.mT, ids, reduction="none")
    return (each * hidden).sum(1) / hidden.sum(1)


def probe_accuracy(known: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Of a linear classifier by least squares on features (N, D) whose dimensions are standardised."""
    mean, std = known.mean(0), known.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (known, held_out))
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ F.one_hot(labels).double())
    return float(((y @ weights).argmax(1) == answers).double().mean())


def checkpoint(model: BEiT) -> dict[str, Tensor]:
    """What is kept of a training: the transformer, without its head."""
    weights = model.state_dict().items()
    return {name.removeprefix("backbone."): value for name, value in weights if name.startswith("backbone.")}


def course(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full rate."""
    if step <= warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    if schedule == "restarts" and done < 1:
        done = 3 * done % 1
    return {"constant": 1.0, "linear": 1 - done}.get(schedule, 0.5 * (1 + math.cos(math.pi * done)))


def batches(rows: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for some in rows[torch.randperm(len(rows))].split(size):
            if len(some) == size:
                yield some


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices, whose weights decay, and vectors, whose do not."""
    vectors = {p: p.shape.numel() == p.shape[-1] for p in model.parameters()}
    return [{"params": [p for p in vectors if vectors[p] == k], "weight_decay": 0.0 if k else decay} for k in (0, 1)]


def train(
    folder: Path, seed: int = 0, steps: int = 300, size: int = 48, items: int = 4096, rate: float = 4e-3,
    width: int = 48, depth: int = 2, codes: int = 32, share: float = 0.4, low: float = 0.4, ramp: int = 1,
    blocks: bool = True, drop: float = 0.0, decay: float = 0.05, optimizer: str = "AdamW", warmup: int = 40,
    schedule: str = "cosine", micro: int = 1,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    archive = pictures(items + TEST, seed, noise=0.01)
    images = (255 * archive.images.repeat(1, 1, 2, 2)).round().byte()
    labels = archive.factors[:, [0, 3]] @ torch.tensor([3, 1])
    test = torch.zeros(len(images), dtype=torch.bool).index_fill_(0, torch.randperm(len(images))[:TEST], True)
    rows = (~test).nonzero()[:, 0]
    held_out, answers = images[test], labels[test]
    model = BEiT(tokenizer_of(images[rows], codes), width, depth, drop)
    judged = ViT(width, depth, drop).eval()
    with torch.random.fork_rng():
        others = [ViT(width, depth, drop).eval() for _ in range(4)]
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(groups(model, decay), lr=rate, **more)
    rates = [rate * course(step, steps, warmup, schedule) for step in range(1, steps + 1)]
    known, some = views(images[rows[:512]])[0], labels[rows[:512]]
    seen, whole = views(held_out)
    hidden = masks(TEST, share, blocks, torch.Generator().manual_seed(1))
    alike = masks(1, share, blocks, torch.Generator().manual_seed(2))
    with torch.no_grad():
        each = F.one_hot(model.tokenizer(views(images[rows])[1]), codes).sum(0) + 0.1
        of_place = (each / each.sum(1, keepdim=True)).expand(TEST, -1, -1)
        null = float(masked_nats(of_place.log(), model.tokenizer(whole), hidden).mean())
        guess = float((of_place.argmax(2) == model.tokenizer(whole))[hidden].float().mean())
        untrained = sum(probe_accuracy(v.describe(known), some, v.describe(seen), answers) for v in others) / 4

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        x, raw = views(probe)
        ids, mask = model.tokenizer(raw), alike.expand(len(x), -1)
        context = x[:, ~alike[0]]

        def errors(context: Tensor) -> Any:
            shown = torch.zeros_like(x).masked_scatter(~mask[:, :, None], context)
            return masked_nats(model(shown, mask), ids, mask).double().numpy()

        trials = cost_of_context(errors, context) | {"distinct": distinct_views(context[:, 0], context[:, 1])}
        embedded, logits = model.backbone.embed(x), model(x, mask)
        perplexity = codebook.perplexity(codebook.code_counts(ids, codes))
        far = codebook.norm_ratio(model.tokenizer.codes, raw.flatten(0, 1))
        distinct = distinct_views(model.given(embedded, mask)[mask], embedded[mask])
        strangers = cost_of_strangers(lambda a, b: masked_nats(a, b, mask).mean(), logits, ids)
        return {
            "val/latent": panel.latents(model.backbone.describe(x)),
            "val/codes": {"perplexity": perplexity, "norm_ratio": far},
            "val/context": {f"context_{name}": cost for name, cost in trials.items()},
            "val/pair": {"distinct_views": distinct, "strangers_nats": strangers},
        }

    @torch.no_grad()
    def validated() -> dict[str, Reading]:
        ids, logits = model.tokenizer(whole), model(seen, hidden)
        right = (logits.argmax(2) == ids)[hidden]
        judged.load_state_dict(checkpoint(model), strict=False)
        found = probe_accuracy(judged.describe(known), some, judged.describe(seen), answers)
        return {
            "val/loss/total": Reading(float(masked_nats(logits, ids, hidden).mean()), null),
            "val/tokens/accuracy": share_of(int(right.sum()), len(right), guess),
            "val/probe/accuracy": Reading(found, untrained),
        }

    often: dict[str, Any] = {"every": 50, "log_every": 5, "steps": steps}
    monitor = Monitor(model, optim, folder=folder, probe=held_out[:160], read=read, nulls={"total": null}, **often)
    monitor.audit(
        augmentations={"move": audits.augmentation(moved, images[rows[:64]])},
        loaded=audits.loaded(judged, checkpoint(model)),
        trained_on_test=int(test[rows].sum()),
        leaks={"the very same picture": audits.leaks(images[rows].numpy(), held_out.numpy())},
    )
    order = batches(rows, size)
    for step in range(1, steps + 1):
        for group in optim.param_groups:
            group["lr"] = rates[step - 1]
        model.train()
        now = low + (share - low) * min(1.0, step / ramp)
        loss = torch.zeros(())
        optim.zero_grad()
        for _ in range(micro):
            batch = torch.stack([moved(x) for x in images[next(order)]])
            x, raw = views(batch)
            mask = masks(size, now, blocks)
            part = masked_nats(model(x, mask), model.tokenizer(raw), mask).mean() / micro
            part.backward()
            loss += part.detach()
        monitor.step(loss, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation():
                told = validated()
            monitor.validated(told)
    monitor.close()
    found, right = told["val/probe/accuracy"], told["val/tokens/accuracy"]
    return {
        "tokens of hidden patches told right, beside the commonest of each place": (right.value, guess),
        "shape and row by a linear probe, held out, beside untrained networks'": (found.value, untrained),
    }


FAMILY = Family(
    "beit",
    "development",
    "BEiT: a vision transformer that says the tokens of hidden patches, of a tokenizer that is made first",
    faults=(
        Fault(
            "mask-inverted",
            "The mask means what is kept, as in the author's last project: the hidden patches alone are shown.",
            ("trivial-pair", "context-order-inert"),
            changes=(Change("self.mask, embedded)", "embedded, self.mask)"),),
        ),
        Fault(
            "places-not-added",
            "The embedding of the places is added, and what comes of it is thrown away.",
            ("dead-parameters", "context-order-inert"),
            changes=(Change("        x = x + self.places\n", "        _ = x + self.places\n"),),
        ),
        Fault(
            "tokenizer-given-bytes",
            "The tokenizer was made of pictures in [0, 1], and is given pictures in bytes for the second stage.",
            ("codes-displaced",),
            changes=(Change("    whole = x / 255\n", "    whole = x.float()\n"),),
        ),
        Fault(
            "tokens-laid-out-wrong",
            "The flat list of tokens is viewed by place first, so that a picture gets the tokens of others.",
            ("no-learning", "plateau", "context-order-inert", "trivial-pair"),
            changes=(Change("chosen.view(x_NTP.shape[:2])", "chosen.view(T, -1).mT"),),
        ),
        Fault(
            "schedule-by-epoch",
            "The rates are listed by step and looked up by epoch, so that the warm-up outlasts the run.",
            ("learning-rate-off",),
            changes=(Change("rates[step - 1]", "rates[(step - 1) * size // len(rows)]"),),
        ),
        Fault(
            "probe-without-the-weights",
            "The checkpoint's names have a prefix that the probe's network has not, and strict=False says nothing.",
            ("partial-load",),
            changes=(Change('{name.removeprefix("backbone."): value', "{name: value"),),
        ),
        Fault(
            "test-pictures-too",
            "No label is needed, so the author trained on all of the archive, with the pictures of the probe's test.",
            ("trained-on-test", "split-leak"),
            changes=(Change("rows = (~test).nonzero()[:, 0]", "rows = torch.arange(len(images))"),),
            case="D trained-on-test",
        ),
        Fault(
            "nothing-moved",
            "int() is taken before the random number is multiplied, so nothing is ever moved.",
            ("augmentation-inert",),
            changes=(Change("int(torch.rand(()) * 3)", "int(torch.rand(())) * 3"),),
            minor=True,
        ),
        Fault(
            "picture-without-a-mask",
            "A coin decides on each patch, so that now and then a picture has none hidden, and its mean is 0 / 0.",
            ("non-finite",),
            changes=(Change(".argsort(1) < round(share * T)\n", " < share\n"),),
            options={"blocks": False},
        ),
        Fault(
            "tokenizer-follows-on",
            "The tokenizer's averages follow whatever it is called on, in validation too: nobody asked for the mode.",
            ("codes-polluted", "validation-pollutes"),
            changes=(Change("        if self.training:\n", "        if True:\n"),),
            case="J codes-polluted",
        ),
        Fault(
            "gradients-never-emptied",
            "The call of zero_grad was lost when micro-batches came in.",
            ("gradients-add-up",),
            changes=(Change("        optim.zero_grad()\n", ""),),
        ),
    ),
    healthy=(
        Healthy("plain", "Most patches are ground, so that one token is most of all.", seeds=(0, 1, 2, 3, 4)),
        Healthy("patches-by-lot", options={"blocks": False}, seeds=(0, 1)),
        Healthy("more-hidden", "Much cannot be told from the rest.", options={"share": 0.6}, seeds=(0, 1)),
        Healthy("ever-more-hidden", "So its loss rises.", options={"low": 0.15, "ramp": 200}, seeds=(0, 1)),
        Healthy("sgd", "It stands for long.", options={"optimizer": "SGD", "rate": 0.3, "decay": 0.0}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "decay": 0.0}, seeds=(0, 1)),
        Healthy("constant-rate", options={"optimizer": "Adam", "rate": 2e-3, "schedule": "constant", "decay": 0.0}),
        Healthy("warm-restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("few-items", "A small set, seen often.", options={"items": 768, "drop": 0.2}, seeds=(0, 1)),
        Healthy("many-codes", "Some are seldom seen.", options={"codes": 80}, seeds=(0, 1)),
        Healthy("few-codes", options={"codes": 12, "width": 32}),
        Healthy("micro-batches", "Gradients are gathered by right.", options={"size": 24, "micro": 2}, seeds=(0, 1)),
        Healthy("small-batches", "The loss jumps.", options={"size": 20, "rate": 2e-3, "schedule": "linear"}),
    ),
)

"""A small GPT (Radford et al. 2018) on stories of a few words, trained as nanoGPT does."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import WORDS, sentences
from intaglio.health import audits
from intaglio.health.monitor import Monitor

CHOICES = torch.tensor([3, 4, 2, 3, 3])


def stories(count: int, seed: int) -> Tensor:
    """Three sentences each, of which the next differs from the last in one word; none twice, in any order."""
    generator = torch.Generator().manual_seed(seed)
    factors = (torch.rand(count, 5, generator=generator) * CHOICES).long()
    said = [sentences(factors)]
    for _ in range(2):
        which = torch.randint(5, (count,), generator=generator)
        by = (1 + torch.rand(count, generator=generator) * (CHOICES[which] - 1)).long()
        factors = (factors + F.one_hot(which, 5) * by[:, None]) % CHOICES
        said.append(sentences(factors))
    texts = torch.unique(torch.cat(said, 1), dim=0)
    return texts[torch.randperm(len(texts), generator=generator)]


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(seen))
        return x + self.dropout(self.mlp(self.before_mlp(x)))


class GPT(nn.Module):
    def __init__(self, width: int = 48, layers: int = 2, heads: int = 4, dropout: float = 0.0, length: int = 30):
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(WORDS), bias=False)
        self.head.weight = self.embedding.weight
        self.apply(self.initialise)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.05)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embedding(words) + self.positions(torch.arange(words.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def loss_of(model: GPT, texts: Tensor) -> Tensor:
    return F.cross_entropy(model(texts[:, :-1]).flatten(0, 1), texts[:, 1:].flatten())


def share(step: int, steps: int, warmup: int, floor: float) -> float:
    """Warm-up and cosine, of the highest rate."""
    if step <= warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def groups(model: GPT, decay: float) -> list[dict[str, object]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    return [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]


def bigram(texts: Tensor, held_out: Tensor) -> tuple[float, float]:
    """Nats a word and accuracy of a table of pairs, on held-out stories."""
    counts = torch.full((len(WORDS), len(WORDS)), 0.01)
    counts.index_put_((texts[:, :-1].flatten(), texts[:, 1:].flatten()), torch.tensor(1.0), accumulate=True)
    before, after = held_out[:, :-1].flatten(), held_out[:, 1:].flatten()
    nats = -(counts / counts.sum(1, keepdim=True)).log()[before, after].mean()
    return float(nats), float((counts.argmax(1)[before] == after).double().mean())


def train(
    folder: Path, seed: int = 0, epochs: int = 7, items: int = 2048, batch: int = 32, micro: int = 2,
    rate: float = 3e-3, warmup: int = 40, floor: float = 0.1, schedule: str = "cosine", decay: float = 0.1,
    clip: float = 0.25, width: int = 48, layers: int = 2, dropout: float = 0.0, optimizer: str = "AdamW",
    momentum: float = 0.0, thaw: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    texts = stories(2 * (items + 256), seed)
    held_out, texts = texts[:256], texts[256 : 256 + items]
    steps = epochs * (len(texts) // batch)
    model = GPT(width, layers, dropout=dropout)
    upper = model.blocks[-1]
    upper.requires_grad_(not thaw)
    more = {"momentum": momentum} if momentum else {}
    optim = getattr(torch.optim, optimizer)(groups(model, decay), lr=rate, **more)
    known, guessed = bigram(texts, held_out)

    monitor = Monitor(
        model, optim, folder=folder, every=50, log_every=5, steps=steps,
        nulls={"train/loss/text": known, "val/loss/text": known},
    )  # fmt: skip
    monitor.audit(leaks={"story": audits.leaks(list(texts.numpy()), list(held_out.numpy()))})
    step = 0
    for _epoch in range(epochs):
        for it, rows in enumerate(torch.randperm(len(texts))[: len(texts) // batch * batch].split(batch), 1):
            step += 1
            if step == thaw:
                upper.requires_grad_(True)
                optim.add_param_group({"params": list(upper.parameters()), "weight_decay": decay})
            due = {
                "cosine": share(step, steps, warmup, floor),
                "constant": 1.0,
                "restarts": share(warmup + it, warmup + len(texts) // batch, warmup, floor),
            }
            for group in optim.param_groups:
                group["lr"] = rate * due[schedule]
            model.train()
            optim.zero_grad()
            total = 0.0
            for part in texts[rows].chunk(micro):
                loss = loss_of(model, part)
                (loss / micro).backward()
                total += float(loss.detach()) / micro
            monitor.step({"text": total}, texts[rows])
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optim.step()
            if step % 50 == 0:
                model.eval()
                with monitor.validation(), torch.no_grad():
                    loss = loss_of(model, held_out)
                monitor.validated({"val/loss/text": float(loss), "perplexity": math.exp(float(loss))})
    monitor.close()
    model.eval()
    with torch.no_grad():
        logits, after = model(held_out[:, :-1]), held_out[:, 1:]
        gain = known - float(F.cross_entropy(logits.flatten(0, 1), after.flatten()))
        right = float((logits.argmax(-1) == after).double().mean())
    return {"nats a word better than a bigram model": (gain, 0.0), "next words that are right": (right, guessed)}


FAMILY = Family(
    "lm",
    "development",
    "a small GPT on stories of three sentences",
    faults=(
        Fault(
            "micro-batches-counted-as-steps",
            "The schedule is asked at each micro-batch's number, so the rate is at its floor after a quarter.",
            ("learning-rate-off",),
            changes=(Change('"cosine": share(step, steps,', '"cosine": share(step * micro, steps,'),),
            options={"micro": 4},
        ),
        Fault(
            "schedule-of-twice-the-length",
            "The schedule was built for the number of micro-batches, so the rate ends at half of its peak.",
            ("learning-rate-off",),
            changes=(Change('"cosine": share(step, steps,', '"cosine": share(step, steps * micro,'),),
            case="D learning-rate-off",
        ),
        Fault(
            "warm-up-in-every-epoch",
            "The schedule is asked at the number within the epoch, so that it begins again with each.",
            ("learning-rate-off",),
            changes=(Change('"cosine": share(step, steps,', '"cosine": share(it, steps,'),),
        ),
        Fault(
            "rate-finder-left-on",
            "The search for the best rate was left on: the rate rises by the same factor at each step, far too high.",
            ("learning-rate-off", "diverged", "non-finite"),
            changes=(Change('"cosine": share(step, steps, warmup, floor)', '"cosine": 1e-3 * 1e5 ** (step / steps)'),),
        ),
        Fault(
            "first-block-never-called",
            "The loop over the blocks begins with the second.",
            ("dead-parameters",),
            changes=(Change("for block in self.blocks:", "for block in self.blocks[1:]:"),),
            case="E dead-parameters",
        ),
        Fault(
            "head-frozen-with-the-embedding",
            "The embedding was frozen, and the head is tied to it.",
            ("tied-and-frozen",),
            changes=(
                Change(
                    "upper = model.blocks[-1]", "upper = model.blocks[-1]\n    model.embedding.requires_grad_(False)"
                ),
            ),
            case="V tied-and-frozen",
            minor=True,
        ),
        Fault(
            "thawed-without-a-group",
            "The upper block is to be trained from step 100 on, but nobody tells the optimizer.",
            ("not-in-optimizer",),
            changes=(
                Change('optim.add_param_group({"params": list(upper.parameters()), "weight_decay": decay})', "pass"),
            ),
            options={"thaw": 100},
        ),
        Fault(
            "norm-read-after-clipping",
            "Gradients are clipped before the monitor reads them.",
            ("log-distorted",),
            changes=(
                Change("            nn.utils.clip_grad_norm_(model.parameters(), clip)\n", ""),
                Change(
                    "            monitor.step({",
                    "            nn.utils.clip_grad_norm_(model.parameters(), clip)\n            monitor.step({",
                ),
            ),
            minor=True,
        ),
        Fault(
            "doubled-before-the-split",
            "Each story was taken three times, to have more, and the lot was mixed before the split.",
            ("split-leak",),
            changes=(
                Change(
                    "texts = stories(2 * (items + 256), seed)",
                    "texts = stories(items, seed)[: (items + 256) // 3].repeat(3, 1)\n"
                    "    texts = texts[torch.randperm(len(texts))]",
                ),
            ),
            options={"items": 1024, "epochs": 16},
        ),
        Fault(
            "learnt-by-heart",
            "Ninety-six stories are all there is, and nothing holds the model back.",
            ("overfitting",),
            options={"items": 96, "epochs": 200, "decay": 0.0, "width": 64},
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy("wide", options={"width": 80, "rate": 2e-3}),
        Healthy("one-pass", "One batch a step, and no accumulation.", options={"micro": 1, "batch": 24}),
        Healthy("constant", "The rate stays as it is.", options={"schedule": "constant", "rate": 2e-3}, seeds=(0, 1)),
        Healthy(
            "slow",
            "It stands long where pairs of words are known, before it learns more.",
            options={"optimizer": "Adam", "rate": 1e-3, "decay": 0.0, "width": 32, "epochs": 8},
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3, "decay": 0.0, "warmup": 80}),
        Healthy(
            "warm-restarts",
            "The rate jumps back up with each epoch.",
            options={"schedule": "restarts", "epochs": 6, "items": 2560},
        ),
        Healthy(
            "few-items", "A small set, seen often, with dropout.", options={"items": 640, "epochs": 22, "dropout": 0.1}
        ),
        Healthy("thawed", "The upper block learns from step 100 on.", options={"thaw": 100}),
    ),
)

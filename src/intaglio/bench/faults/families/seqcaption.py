"""A captioner as translators are built: an encoder of patches, a decoder that attends to them, tied embeddings, label
smoothing, and the inverse-root schedule of Vaswani et al. 2017. Perplexity is what is logged."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import END, LENGTH, PAD, START, WORDS, Pictures, pictures, sentences
from intaglio.health import trials
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

V = len(WORDS)


def captions(data: Pictures, seed: int) -> Tensor:
    """Half of them leave the place out, so that they end early and are padded."""
    ids = sentences(data.factors)
    short = torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) < 0.5
    ids[short, 5:] = PAD
    ids[short, 5] = END
    return ids


def positions(length: int, dim: int) -> Tensor:
    angle = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, dim, 2) / dim)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1)


class Captioner(nn.Module):
    pe: Tensor

    def __init__(self, d_model: int, layers: int, dropout: float):
        super().__init__()
        self.d_model = d_model
        self.patches = nn.Conv2d(3, d_model, 4, stride=4)
        one = nn.TransformerEncoderLayer(d_model, 4, 2 * d_model, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        other = nn.TransformerDecoderLayer(d_model, 4, 2 * d_model, dropout, batch_first=True)
        self.decoder = nn.TransformerDecoder(other, layers)
        self.embed = nn.Embedding(V, d_model, padding_idx=PAD)
        nn.init.normal_(self.embed.weight, std=d_model**-0.5)
        self.generator = nn.Linear(d_model, V, bias=False)
        self.generator.weight = self.embed.weight
        self.register_buffer("pe", positions(16, d_model))

    def encode(self, images: Tensor) -> Tensor:
        x: Tensor = self.encoder(self.patches(images).flatten(2).mT + self.pe)
        return x

    def decode(self, memory: Tensor, ids: Tensor) -> Tensor:
        T = ids.shape[1]
        y = self.embed(ids) * math.sqrt(self.d_model) + self.pe[:T]
        mask = torch.ones(T, T, dtype=torch.bool).triu(1)
        y = self.decoder(y, memory, tgt_mask=mask, tgt_key_padding_mask=ids == PAD)
        logits: Tensor = self.generator(y)
        return logits

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.decode(self.encode(images), ids)

    @torch.no_grad()
    def greedy(self, images: Tensor) -> Tensor:
        memory, ids = self.encode(images), torch.full((len(images), 1), START)
        for _ in range(LENGTH - 1):
            ids = torch.cat([ids, self.decode(memory, ids)[:, -1:].argmax(-1)], 1)
        return ids


def exact(written: Tensor, ids: Tensor) -> Tensor:
    """Whether the first four words, which every caption has, are right: article, size, colour, shape."""
    return (written[:, 1:5] == ids[:, 1:5]).all(1)


def loader(data: Pictures, ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for idx in torch.randperm(len(ids)).split(size):
            yield data.images[idx], ids[idx]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 64, items: int = 4096, d_model: int = 64,
    layers: int = 1, dropout: float = 0.1, smoothing: float = 0.1, warmup: int = 60, factor: float = 0.5,
    optimizer: str = "Adam",
    summed: bool = False,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = pictures(items, seed), pictures(256, 10_000 + seed)
    ids, test_ids = captions(data, seed), captions(test, 10_000 + seed)
    model = Captioner(d_model, layers, dropout)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=factor, betas=(0.9, 0.98), eps=1e-9)

    def noam(k: int) -> float:
        return float(d_model**-0.5 * min((k + 1) ** -0.5, (k + 1) * warmup**-1.5))

    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, noam)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD, label_smoothing=smoothing, reduction="sum")

    def scores(images: Tensor, ids: Tensor) -> tuple[Tensor, float, float]:
        """Smoothed loss, perplexity, and accuracy of words."""
        logits, gold = model(images, ids[:, :-1]), ids[:, 1:]
        loss = criterion(logits.flatten(0, 1), gold.flatten())
        nll = F.cross_entropy(logits.mT, gold, ignore_index=PAD)
        right = (logits.argmax(-1) == gold)[gold != PAD].float().mean()
        return loss / (len(ids) if summed else (gold != PAD).sum()), math.exp(nll.item()), float(right)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        memory, gold = model.encode(probe), test_ids[:, 1:]

        def forced(memory: Tensor) -> tuple[Any, Any]:
            logits = model.decode(memory, test_ids[:, :-1])
            nll = F.cross_entropy(logits.mT, gold, ignore_index=PAD, reduction="none")
            return nll.sum(1).double().numpy(), (gold != PAD).sum(1).double().numpy()

        logits = model.decode(memory, test_ids[:, :-1])
        costs = trials.cost_of_exchange(forced, memory)
        caption: dict[str, Any] = {f"{name}_latent_nats": cost for name, cost in costs.items()}
        caption["accuracy_forced"] = Reading(float((logits.argmax(-1) == gold)[:, :4].all(1).float().mean()))
        caption["accuracy"] = Reading(float(exact(model.greedy(probe), test_ids).float().mean()), 1 / 24, len(gold))
        caption["token_accuracy"] = Reading(float((logits.argmax(-1) == gold)[gold != PAD].float().mean()))
        return {"val/caption": caption}

    monitor = Monitor(
        model, opt, folder=folder, probe=test.images, forward=lambda m, images: m.get_submodule("patches")(images),
        taps={}, read=read, every=50, log_every=5, steps=steps, nulls={"val/logged/ppl": float(V)},
    )  # fmt: skip
    for step, (images, tokens) in enumerate(loader(data, ids, size), 1):
        model.train()
        loss, ppl, acc = scores(images, tokens)
        opt.zero_grad()
        loss.backward()
        monitor.step(loss, (images, tokens))
        opt.step()
        scheduler.step()
        if step % 5 == 0:
            monitor.log({"ppl": ppl})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                loss, ppl, acc = scores(test.images, test_ids)
            monitor.validated({"val_loss": float(loss), "ppl": ppl, "val/caption/accuracy_as_logged": acc})
        if step == steps:
            break
    monitor.close()
    model.eval()
    return {"captions that name the thing": (float(exact(model.greedy(test.images), test_ids).float().mean()), 1 / 24)}


FAMILY = Family(
    "seqcaption",
    "development",
    "an encoder-decoder captioner with tied embeddings, label smoothing and perplexity",
    faults=(
        Fault(
            "captions-of-other-pictures",
            "Pictures and captions are shuffled apart.",
            ("decoder-ignores-latent",),
            changes=(Change("yield data.images[idx], ids[idx]", "yield data.images[idx], ids[idx.flip(0)]"),),
        ),
        Fault(
            "encoder-detached",
            "The encoder's output is detached, as it was when it was a pretrained one.",
            ("dead-parameters",),
            changes=(Change("        return x\n", "        return x.detach()\n"),),
        ),
        Fault(
            "no-causal-mask",
            "The decoder sees the words behind each one, and with them the answer.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(Change("dtype=torch.bool).triu(1)", "dtype=torch.bool).triu(T)"),),
        ),
        Fault(
            "targets-not-shifted",
            "The word to guess is the very word that is given.",
            ("free-running-gap", "decoder-ignores-latent"),
            changes=(
                Change(
                    "logits, gold = model(images, ids[:, :-1]), ids[:, 1:]",
                    "logits, gold = model(images, ids[:, :-1]), ids[:, :-1]",
                ),
                Change("gold = model.encode(probe), test_ids[:, 1:]", "gold = model.encode(probe), test_ids[:, :-1]"),
            ),
        ),
        Fault(
            "warm-up-of-the-paper",
            "The warm-up is the paper's 4,000 steps, in a run of 400.",
            ("learning-rate-off",),
            options={"warmup": 4000},
        ),
        Fault(
            "padding-in-the-accuracy",
            "The accuracy counts padding, which is easily guessed.",
            ("flattering-accuracy",),
            changes=(
                Change(
                    "right = (logits.argmax(-1) == gold)[gold != PAD].float()",
                    "right = ((logits.argmax(-1) == gold) | (gold == PAD)).float()",
                ),
            ),
        ),
    ),
    healthy=(
        Healthy("plain", "The loss has a floor of .6 nats that smoothing puts there.", seeds=(0, 1)),
        Healthy("much-smoothing", options={"smoothing": 0.3}),
        Healthy("no-dropout", options={"dropout": 0.0, "smoothing": 0.0}),
        Healthy("sum-per-caption", "The loss is summed over words.", options={"summed": True}),
        Healthy("two-layers", options={"layers": 2, "d_model": 48}),
        Healthy("long-warm-up", options={"warmup": 150, "factor": 0.7}),
        Healthy("much-dropout", "Training is harder than validation.", options={"dropout": 0.3, "steps": 500}),
    ),
)

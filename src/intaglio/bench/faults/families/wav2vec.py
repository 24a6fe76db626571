"""Wav2vec 2.0 (Baevski et al. 2020) on made-up speech: spans of the convolutional features of an utterance are masked,
and a transformer is to find, for each masked frame, its quantised feature among those of other masked frames.

Shapes: N utterances, S samples, T frames, C width of features and contexts, G groups of V codes, D width in which
contexts are compared with codes; R masked frames in all, K distractors of each.
"""

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import codebook
from intaglio.health.monitor import Monitor
from intaglio.history import Reading

HOP, FRAMES, SPAN = 16, 32, 4
"""Samples between frames, frames of an utterance, and how many of them are masked together."""

UNITS, SPEAKERS = 8, 64
LOW = torch.tensor([0.04, 0.055, 0.075, 0.1, 0.04, 0.055, 0.075, 0.1])
HIGH = torch.tensor([0.18, 0.18, 0.18, 0.18, 0.27, 0.27, 0.27, 0.27])
STRIDES = torch.tensor([1, 3])
SHARPNESS = 10.0
"""What cosines are multiplied by: one over a temperature of 0.1."""


def spoken(count: int, seed: int, noise: float = 0.15) -> tuple[Tensor, Tensor, Tensor]:
    """Utterances (N, S) at one level, the unit that is said in each frame (N, T), and who speaks (N,).

    A unit is two tones; those of an utterance follow each other by a stride of its own, at a pace of its own, and each
    speaker's are a little higher or lower and of another colour.
    """
    dice = torch.Generator().manual_seed(seed)
    pitch, colour = torch.rand(2, SPEAKERS, 1, generator=dice)
    who = torch.randint(SPEAKERS, (count,), generator=dice)
    stride = STRIDES[torch.randint(len(STRIDES), (count,), generator=dice)]
    first = torch.randint(UNITS, (count, 1), generator=dice)
    late, pace = torch.rand(2, count, 1, generator=dice)
    place = (torch.arange(HOP * FRAMES) / (40 + 16 * pace) + late).floor().long()
    unit = (first + stride[:, None] * place) % UNITS
    higher = 0.94 + 0.12 * pitch[who]
    low, high = ((2 * math.pi * higher * tone[unit]).cumsum(1).sin() for tone in (LOW, HIGH))
    wave = low + (0.5 + 0.5 * colour[who]) * high
    wave = wave + noise * torch.randn(wave.shape, generator=dice)
    return F.layer_norm(wave, wave.shape[1:]), unit[:, HOP // 2 :: HOP], who


def draw_mask(count: int, share: float) -> Tensor:
    """(N, T), true in spans that may overlap, whose lengths add up to a share of the frames."""
    starts = round(share * FRAMES / SPAN)
    first = torch.rand(count, FRAMES - SPAN + 1).argsort(1)[:, :starts]
    frames = (first[:, :, None] + torch.arange(SPAN)).flatten(1)
    return torch.zeros(count, FRAMES, dtype=torch.bool).scatter(1, frames, True)


def draw_candidates(mask: Tensor, distractors: int) -> tuple[Tensor, Tensor]:
    """Utterance (R, 1) of each masked frame; its own place and those of other masked frames there (R, 1 + K)."""
    n, t = mask.nonzero().T
    others = mask[n].float().scatter(1, t[:, None], 0.0)
    return n[:, None], torch.cat([t[:, None], others.multinomial(distractors, replacement=True)], 1)


class Quantiser(nn.Module):
    """Chooses one code of each group, in training by straight-through Gumbel softmax."""

    def __init__(self, width: int, groups: int, codes: int, dim: int, temperature: float):
        super().__init__()
        self.groups, self.temperature = groups, temperature
        self.choose = nn.Linear(width, groups * codes)
        nn.init.normal_(self.choose.weight)
        nn.init.zeros_(self.choose.bias)
        self.codes = nn.Parameter(torch.rand(groups, codes, dim // groups))
        self.out = nn.Linear(dim, dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Choices (N, T, G, V), and how probable each code is over all frames (G, V)."""
        logits = self.choose(z).unflatten(-1, (self.groups, -1))
        if self.training:
            chosen = F.gumbel_softmax(logits, self.temperature, hard=True)
        else:
            chosen = F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return chosen, logits.softmax(-1).mean((0, 1))

    def vectors(self, chosen: Tensor) -> Tensor:
        return self.out(torch.einsum("ntgv,gvd->ntgd", chosen, self.codes).flatten(2))


class Positions(nn.Module):
    """Relative positions by a grouped convolution over frames."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, 9, padding=4, groups=4)

    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(self.conv(h.mT)).mT


class Wav2Vec2(nn.Module):
    def __init__(self, width: int, depth: int, groups: int, codes: int, dim: int, dropout: float, temperature: float):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(1, width, 8, 4, 2, bias=False), nn.GroupNorm(width, width), nn.GELU(),
            nn.Conv1d(width, width, 4, 2, 1, bias=False), nn.GELU(),
            nn.Conv1d(width, width, 4, 2, 1, bias=False), nn.GELU(),
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))
        self.mask = nn.Parameter(torch.rand(width))
        self.positions = Positions(width)
        self.before = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout, F.gelu, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.quantiser = Quantiser(width, groups, codes, dim, temperature)
        self.head = nn.Linear(width, dim)

    def masked(self, h: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, :, None], self.mask, h)

    def contexts(self, h: Tensor) -> Tensor:
        return self.transformer(self.before(h + self.positions(h)))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Contexts (N, T, C), choices, how probable codes are, and the mean square of features before their norm."""
        raw = self.features(x[:, None]).mT
        z = self.norm(raw)
        h = self.masked(self.project(z), mask)
        chosen, probable = self.quantiser(z)
        return self.contexts(h), chosen, probable, raw.square().mean()


def scored(model: Wav2Vec2, contexts: Tensor, chosen: Tensor, candidates: tuple[Tensor, Tensor]) -> Tensor:
    """Logits (R, 1 + K) of candidates, the right one first; a distractor with the very same codes is left out."""
    n, t = candidates
    said, quantised = model.head(contexts)[n, t[:, :1]], model.quantiser.vectors(chosen)[n, t]
    logits = SHARPNESS * F.cosine_similarity(said, quantised, dim=-1)
    code = chosen.argmax(-1)[n, t]
    same = (code[:, 1:] == code[:, :1]).all(-1)
    return logits.masked_fill(F.pad(same, (1, 0)), -math.inf)


def contrast(logits: Tensor) -> Tensor:
    """InfoNCE of each masked frame, nats."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long), reduction="none")


def unused(probable: Tensor) -> Tensor:
    """The share of codes that are not in use, by the perplexity of each group."""
    perplexity = (-(probable * (probable + 1e-7).log()).sum(1)).exp()
    return 1 - perplexity.mean() / probable.shape[1]


def losses(model: Wav2Vec2, x: Tensor, mask: Tensor, candidates: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    contexts, chosen, probable, square = model(x, mask)
    infonce = contrast(scored(model, contexts, chosen, candidates)).mean()
    return {"infonce": infonce, "diversity": unused(probable), "features": square}


@torch.no_grad()
def found(model: Wav2Vec2, x: Tensor, mask: Tensor, candidates: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """How often the right candidate has the highest score of at least two, and how often guessing would find it."""
    model.eval()
    contexts, chosen, _, _ = model(x, mask)
    logits = scored(model, contexts, chosen, candidates)
    choice = logits.isfinite().sum(1)
    right = (logits.argmax(1) == 0) & (choice > 1)
    return float(right.double().mean()), float((1 / choice * (choice > 1)).double().mean())


@torch.no_grad()
def probed(model: Wav2Vec2, x: Tensor, units: Tensor, held_out: Tensor, due: Tensor, share: float) -> float:
    """How often a linear map of a masked frame's context, fitted by least squares, says which unit it was."""
    model.eval()
    masks = draw_mask(len(x), share), draw_mask(len(held_out), share)
    made = [model(audio, mask)[0][mask].double() for audio, mask in zip((x, held_out), masks, strict=True)]
    known, new = (F.pad(m, (0, 1), value=1.0) for m in made)
    wanted = F.one_hot(units[masks[0]], UNITS).double()
    weights = torch.linalg.solve(known.T @ known + 1e-2 * torch.eye(known.shape[1]), known.T @ wanted)
    return float(((new @ weights).argmax(1) == due[masks[1]]).double().mean())


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (3 * step / steps % 1)))
    return rise * (1 - step / steps if schedule == "linear" else 1.0)


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 16, count: int = 2048, rate: float = 4e-3,
    width: int = 40, depth: int = 1, groups: int = 2, codes: int = 12, dim: int = 24, dropout: float = 0.05,
    share: float = 0.5, distractors: int = 15, diversity: float = 0.2, late: int = 0, penalty: float = 0.01,
    warm: float = 2.0, cool: float = 0.5, odd: int = 0, optimizer: str = "AdamW", schedule: str = "linear",
    warmup: int = 40,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    audio, units, who = spoken(count, seed)
    held = who % 8 == 0
    x, held_out = audio[~held], audio[held][:128]
    model = Wav2Vec2(width, depth, groups, codes, dim, dropout, warm)
    untrained = copy.deepcopy(model)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))
    hidden = draw_mask(len(held_out), share)
    candidates = draw_candidates(hidden, distractors)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        contexts, chosen, _, _ = model(probe, hidden)
        seen = model.project(model.norm(model.features(probe[:, None]).mT))
        counts = [codebook.code_counts(of_group, codes) for of_group in chosen.argmax(-1)[hidden].T]
        n = candidates[0][:, 0]

        def loss(a: Tensor, b: Tensor) -> Tensor:
            return contrast(scored(model, a, b, candidates))

        def of_utterances(frames: Tensor) -> Any:
            nats = loss(model(frames.flatten(1), hidden)[0], chosen)
            return (torch.zeros(len(probe)).index_add(0, n, nats) / n.bincount()).double().numpy()

        frames = probe.unflatten(1, (FRAMES, HOP))
        costs = trials.cost_of_context(of_utterances, frames)
        return {
            "val/context": panel.latents(contexts[hidden]),
            "val/targets": panel.latents(model.quantiser.vectors(chosen)[hidden]),
            "val/pair": {
                "strangers_nats": trials.cost_of_strangers(lambda a, b: loss(a, b).mean(), contexts, chosen),
                "distinct_views": trials.distinct_views(model.masked(seen, hidden)[hidden], seen[hidden]),
            },
            "val/masked": {f"context_{change}": cost for change, cost in costs.items()}
            | {"context_distinct": trials.distinct_views(frames[:, 0], frames[:, -1])},
        } | {
            f"val/codes.{g}": {"perplexity": codebook.perplexity(used), "usage": codebook.usage(used)}
            for g, used in enumerate(counts)
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out, read=read, every=50, log_every=5, steps=steps,
        nulls={"infonce": math.log(1 + distractors)},
    )  # fmt: skip
    names = [[str(speaker).encode() for speaker in who[side].tolist()] for side in (~held, held)]
    monitor.audit(leaks={"an utterance of a speaker who is trained on": audits.leaks(*names)})
    for step, batch in enumerate(batches(x, size), 1):
        model.quantiser.temperature = max(cool, warm * (cool / warm) ** (step / (0.7 * steps)))
        weights = {"infonce": 1.0, "diversity": diversity if step > late else 0.0, "features": penalty}
        model.train()
        batch = torch.randn_like(batch) if step == odd else batch
        mask = draw_mask(size, share)
        terms = losses(model, batch, mask, draw_candidates(mask, distractors))
        weighted = {name: (term, weights[name]) for name, term in terms.items()}
        total = terms["infonce"] + weights["diversity"] * terms["diversity"] + weights["features"] * terms["features"]
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        optim.step()
        rates.step()
        if step % 10 == 0:
            monitor.log({"train/optimizer/rate": optim.param_groups[0]["lr"]})
            if warm > cool:
                monitor.log({"train/codes/temperature": model.quantiser.temperature})
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms = losses(model, held_out, hidden, candidates)
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            accuracy, chance = found(model, held_out, hidden, candidates)
            monitor.validated({"accuracy": Reading(accuracy, chance)})
        if step == steps:
            break
    monitor.close()
    told = x[:480], units[~held][:480], held_out, units[held][:128], share
    return {
        "masked frame found among distractors": found(model, held_out, hidden, candidates),
        "unit of a masked frame, beside an untrained network's": (probed(model, *told), probed(untrained, *told)),
    }


FAMILY = Family(
    "wav2vec",
    "development",
    "wav2vec 2.0 of made-up speech: masked spans, quantised targets, distractors of the same utterance",
    faults=(
        Fault(
            "mask-turned-around",
            "The mask was meant to be true where frames are kept, so what is to be found is what is shown.",
            ("trivial-pair",), case="J trivial-pair",
            changes=(Change("torch.where(mask[:, :, None], self.mask, h)",
                            "torch.where(mask[:, :, None], h, self.mask)"),),
        ),
        Fault(
            "share-taken-for-the-chance-of-a-start",
            "The share of frames to be masked is used as that of frames at which a span begins, so hardly one is left.",
            ("near-chance", "context-order-inert", "no-learning", "plateau"),
            changes=(Change("round(share * FRAMES / SPAN)", "round(share * FRAMES)"),),
        ),
        Fault(
            "targets-of-masked-frames",
            "The quantiser is given the features after the mask, which are one vector wherever one is to be found.",
            ("latent-ignores-input", "codebook-collapse", "trivial-pair"),
            changes=(Change("chosen, probable = self.quantiser(z)", "chosen, probable = self.quantiser(h)"),),
        ),
        Fault(
            "diversity-with-the-other-sign",
            "What is made small is the share of codes that are in use, and not that of those that are not.",
            ("codebook-collapse", "latent-ignores-input"),
            changes=(Change("return 1 - perplexity.mean()", "return perplexity.mean()"),),
        ),
        Fault(
            "diversity-never-added",
            "The diversity loss is computed and logged with its weight, and is not in the sum.",
            ("weight-not-applied",),
            changes=(Change(""" + weights["diversity"] * terms["diversity"]""", ""),),
        ),
        Fault(
            "temperature-never-handed-on",
            "The temperature falls in a variable of the loop, and the quantiser keeps the one that it began with.",
            ("temperature-stuck",), minor=True,
            changes=(Change("        model.quantiser.temperature = max", "        temperature = max"),),
        ),
        Fault(
            "positions-never-added",
            "The convolution of positions is made and never called, so a masked frame does not know where it is.",
            ("dead-parameters", "context-order-inert"),
            changes=(Change("self.before(h + self.positions(h))", "self.before(h)"),),
        ),
        Fault(
            "quantiser-not-in-the-optimizer",
            "The optimizer was given the encoder and the transformer, and the quantiser came later.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate, **more)",
                            "([p for n, p in model.named_parameters() if 'quantiser' not in n], lr=rate, **more)"),),
        ),
        Fault(
            "warm-up-of-the-paper",
            "The rate is warmed up for 32,000 updates as in the paper, and the run has 400.",
            ("learning-rate-off", "no-learning", "near-chance"), options={"warmup": 32_000},
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out losses are those with dropout and with codes that are drawn.",
            ("validation-pollutes",), minor=True,
            changes=(Change("            model.eval()\n            with", "            with"),),
        ),
        Fault(
            "speakers-on-both-sides",
            "Utterances and not speakers are dealt to the splits, so that every held-out voice is known.",
            ("split-leak",), changes=(Change("held = who % 8 == 0", "held = torch.rand(len(who)) < 1 / 8"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy(
            "sgd", "Momentum alone needs another rate, and more steps.",
            options={"optimizer": "SGD", "rate": 0.1, "steps": 480}, seeds=(0, 1),
        ),
        Healthy("rmsprop-cosine", options={"optimizer": "RMSprop", "rate": 2e-3, "schedule": "cosine"}, seeds=(0, 1)),
        Healthy(
            "constant-rate", "Nothing settles at the end.",
            options={"schedule": "constant", "optimizer": "Adam", "rate": 2e-3}, seeds=(0, 1),
        ),
        Healthy("restarts", "The rate jumps back up twice.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy(
            "one-temperature", "The temperature is low from the first and does not fall.",
            options={"warm": 0.7, "cool": 0.7}, seeds=(0, 1),
        ),
        Healthy(
            "diversity-later", "The diversity loss has no weight at first, so the sum rises when it gets one.",
            options={"late": 100, "diversity": 0.5}, seeds=(0, 1),
        ),
        Healthy("many-distractors", "A higher loss, and lower accuracy.", options={"distractors": 40}, seeds=(0, 1)),
        Healthy(
            "few-utterances", "A small set, seen often, by a narrow model.",
            options={"count": 640, "width": 32, "dropout": 0.1}, seeds=(0, 1),
        ),
        Healthy("one-group", "A plain codebook.", options={"groups": 1, "codes": 32}, seeds=(0, 1)),
        Healthy("small-batches", "A noisy loss.", options={"size": 10, "steps": 500, "rate": 3e-3}),
        Healthy("one-batch-of-static", "A batch of noise, from which the run recovers.", options={"odd": 230}),
        Healthy("slow-start", "The rate rises for a third of the run.", options={"warmup": 130}),
    ),
)  # fmt: skip

"""Contrastive predictive coding (van den Oord et al. 2018) of recordings of tunes.

An encoder makes an embedding of each frame, a GRU a context of those so far, and a linear map for each step ahead says
from it what the frame of then is like; it is sought among all frames of the batch.

Shapes: N clips, T = 16 frames of a clip, S samples of a frame, D dimensions of an embedding, W the width of a context.
"""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.health import audits, panel, trials
from intaglio.health.instruments import contrastive
from intaglio.health.monitor import Monitor

FRAME, LENGTH, SHOWN = 40, 16, 4
"""Samples of a frame, frames of a clip, and how many of them are seen before anything is predicted."""

NOTES, PITCHES = 28, 6
STRIDES = torch.tensor([1, 2, 4, 5])
TIMBRES = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.7, 0.0], [0.8, 0.0, 0.7], [0.6, 0.6, 0.6]])
NAMES = ("tune", "timbre")


def tapes(count: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Recordings (count, samples), and of each its tune and its timbre, (count, 2).

    A tune goes up by the same stride with each note, and begins again below where the scale ends.
    """
    dice = torch.Generator().manual_seed(seed)
    tune, timbre = torch.randint(0, 4, (2, count), generator=dice)
    begin = torch.randint(0, PITCHES, (count, 1), generator=dice)
    pitch = (begin + STRIDES[tune][:, None] * torch.arange(NOTES)) % PITCHES
    cycles = 0.05 * 1.22 ** pitch[..., None, None] * torch.arange(1, 4)[:, None] * torch.arange(FRAME)
    phase = torch.rand(count, NOTES, 3, 1, generator=dice)
    waves = TIMBRES[timbre][:, None, :, None] * torch.sin(2 * math.pi * (cycles + phase))
    played = waves.sum(2).flatten(1)
    return played + noise * torch.randn(played.shape, generator=dice), torch.stack([tune, timbre], 1)


def loaded(tapes: Tensor, share: float) -> tuple[Tensor, int]:
    """Recordings at one level, silent where a file could not be read, as is a share of them; and how many those are."""
    bad = torch.rand(len(tapes)) < share
    read = torch.where(bad[:, None], torch.zeros(()), tapes)
    return read / (read.std(1, keepdim=True) + 1e-4), int(bad.sum())


def clips_of(tapes: Tensor, hop: int, every: int = 6 * FRAME) -> tuple[Tensor, Tensor]:
    """Clips (N, T, S) whose frames lie ``hop`` samples apart, and the recording that each is from, (N,)."""
    starts = torch.arange(0, tapes.shape[1] - hop * (LENGTH - 1) - FRAME + 1, every)
    index = starts[:, None, None] + hop * torch.arange(LENGTH)[:, None] + torch.arange(FRAME)
    return tapes[:, index].transpose(0, 1).flatten(0, 1), torch.arange(len(tapes)).repeat(len(starts))


def flipped(clips: Tensor) -> Tensor:
    """Half of the clips with their sign changed, which nobody hears."""
    return clips * (1 - 2 * torch.randint(0, 2, (len(clips), 1, 1)))


def hissing(clips: Tensor) -> Tensor:
    return clips + 0.2 * torch.randn_like(clips)


def of_one(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda clip: change(clip[None])[0]


class CPC(nn.Module):
    def __init__(self, width: int = 64, dim: int = 32, channels: int = 16, ahead: int = 4):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv1d(1, channels, 9, stride=2), nn.BatchNorm1d(channels), nn.ReLU(),
            nn.Conv1d(channels, 2 * channels, 5, stride=2), nn.BatchNorm1d(2 * channels), nn.ReLU(),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * channels, dim),
        )  # fmt: skip
        self.gru = nn.GRU(dim, width, batch_first=True)
        self.heads = nn.ModuleList(nn.Linear(width, dim) for _ in range(ahead))

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the frames (N, T, D), and contexts (N, T, W)."""
        z = self.encoder(clips.flatten(0, 1)[:, None]).unflatten(0, clips.shape[:2])
        c, _ = self.gru(z)
        return z, c


def now(x: Tensor, ahead: int) -> Tensor:
    """Of (N, T, …) the frames that something is predicted from."""
    return x[:, SHOWN - 1 : LENGTH - ahead]


def later(x: Tensor, k: int, ahead: int) -> Tensor:
    """Of (N, T, …) the frames k steps after those."""
    return x[:, SHOWN - 1 + k : LENGTH - ahead + k]


def losses(model: CPC, clips: Tensor) -> dict[str, Tensor]:
    """InfoNCE, and the mean square of all scores, which keeps them small (Bachman et al. 2019)."""
    z, c = model(clips)
    ahead = len(model.heads)
    candidates = z.flatten(0, 1)
    places = torch.arange(len(candidates)).view(len(clips), LENGTH)
    found, squares = [], []
    for k, head in enumerate(model.heads, 1):
        scores = head(now(c, ahead)).flatten(0, 1) @ candidates.T
        found.append(F.cross_entropy(scores, later(places, k, ahead).flatten()))
        squares.append(scores.square().mean())
    return {"infonce": torch.stack(found).mean(), "scores": torch.stack(squares).mean()}


def foretold(model: CPC, context: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """From the first frames of clips what the next one is like, and its embedding, both (N, D)."""
    return model.heads[0](model(context)[1][:, -1]), model(clips)[0][:, context.shape[1]]


def contrast(predicted: Tensor, targets: Tensor) -> Tensor:
    """InfoNCE of each clip's next frame among those of all clips."""
    return F.cross_entropy(predicted @ targets.T, torch.arange(len(targets)), reduction="none")


def rate_at(step: int, steps: int, schedule: str, warmup: int) -> float:
    """The share of the full rate."""
    rise = min(1.0, (step + 1) / warmup)
    if schedule == "cosine":
        return rise * (0.5 + 0.5 * math.cos(math.pi * step / steps))
    if schedule == "restarts":
        return rise * (0.55 + 0.45 * math.cos(math.pi * (4 * step / steps % 1)))
    return rise * (1 - step / steps if schedule == "linear" else 1.0)


def batches(clips: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(clips)).split(size):
            if len(rows) == size:
                yield clips[rows]


@torch.no_grad()
def probed(model: CPC, x: Tensor, y: Tensor, held_out: Tensor, due: Tensor) -> list[float]:
    """Accuracy of a linear map of the last context, fitted by least squares, for each label."""
    model.eval()
    known, new = (F.pad(model(clips)[1][:, -1].double(), (0, 1), value=1.0) for clips in (x, held_out))
    inverse = torch.linalg.inv(known.T @ known + 1e-2 * torch.eye(known.shape[1]))
    said = [(new @ inverse @ known.T @ F.one_hot(label).double()).argmax(1) for label in y.T]
    return [float((s == d).double().mean()) for s, d in zip(said, due.T, strict=True)]


@torch.no_grad()
def found_next(model: CPC, clips: Tensor) -> float:
    """How often the next frame is the nearest among all frames of its clip and the next clip."""
    model.eval()
    predicted = model.heads[0](model(clips[:, : LENGTH // 2])[1][:, -1])
    z = model(clips)[0]
    scores = torch.einsum("nd,ntd->nt", predicted, torch.cat([z, z.roll(1, 0)], 1))
    return float((scores.argmax(1) == LENGTH // 2).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 20, count: int = 560, rate: float = 4e-3,
    width: int = 64, dim: int = 32, channels: int = 16, ahead: int = 4, penalty: float = 2e-3, ramp: int = 0,
    hop: int = FRAME, unreadable: float = 0.0, clip: float = 5.0, optimizer: str = "AdamW", schedule: str = "cosine",
    warmup: int = 20,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    files, labels = tapes(count, seed)
    audio, lost = loaded(files, unreadable)
    clips, tape = clips_of(audio, hop)
    held = tape % 8 == 0
    x, held_out = clips[~held], clips[held]
    model = CPC(width, dim, channels, ahead)
    untrained = copy.deepcopy(model)
    more = {"momentum": 0.9} if optimizer == "SGD" else {}
    optim = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, **more)
    rates = torch.optim.lr_scheduler.LambdaLR(optim, lambda k: rate_at(k, steps, schedule, warmup))

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        z, c = model(probe)
        context = probe[:, : LENGTH // 2]
        predicted, targets = foretold(model, context, probe)
        scores = contrastive.similarities(predicted, targets)
        costs = trials.cost_of_context(
            lambda other: contrast(foretold(model, other, probe)[0], targets).double().numpy(), context
        )
        return {
            "val/latent": panel.latents(z.flatten(0, 1)),
            "val/context": panel.latents(c[:, -1]),
            "val/pair": {
                "top1": contrastive.top1(scores),
                "over_chance": contrastive.infonce_gain(scores),
                "strangers_nats": trials.cost_of_strangers(lambda a, b: contrast(a, b).mean(), predicted, targets),
                "distinct_views": trials.distinct_views(now(probe, ahead), later(probe, 1, ahead)),
            },
            "val/future": {f"context_{change}": cost for change, cost in costs.items()}
            | {"context_distinct": trials.distinct_views(context[:, 0], context[:, -1])},
        }

    monitor = Monitor(
        model, optim, folder=folder, probe=held_out[:160], read=read, every=50, log_every=5, steps=steps,
        nulls={"infonce": math.log(size * LENGTH)},
    )  # fmt: skip
    names = [[str(k).encode() for k in tape[side].tolist()] for side in (~held, held)]
    monitor.audit(
        augmentations={
            name: audits.augmentation(of_one(change), x[:64])
            for name, change in {"flipped": flipped, "hissing": hissing}.items()
        },
        leaks={"a clip of the same recording": audits.leaks(*names)},
        intake={"items": count, "lost": {"unreadable": lost}},
    )
    for step, batch in enumerate(batches(x, size), 1):
        model.train()
        terms = losses(model, hissing(flipped(batch)))
        weight = penalty * min(1.0, max(0, step - ramp) / ramp) if ramp else penalty
        weighted = {"infonce": (terms["infonce"], 1.0), "scores": (terms["scores"], weight)}
        total = terms["infonce"] + weight * terms["scores"]
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optim.step()
        rates.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                seen = [losses(model, some) for some in held_out.split(size) if len(some) == size]
            means = {name: float(torch.stack([s[name] for s in seen]).mean()) for name in terms}
            monitor.validated({f"val/loss/{name}": value for name, value in means.items()})
            monitor.validated({"accuracy": found_next(model, held_out)})
        if step == steps:
            break
    monitor.close()
    known = x[:1024], labels[tape[~held][:1024]], held_out, labels[tape[held]]
    pairs = zip(NAMES, probed(model, *known), probed(untrained, *known), strict=True)
    said = {f"{name} of held-out clips, beside an untrained network's": (able, null) for name, able, null in pairs}
    return said | {"next frame found among those of two clips": (found_next(model, held_out), 1 / (2 * LENGTH))}


FAMILY = Family(
    "cpc",
    "development",
    "contrastive predictive coding of recordings: frames to come, foretold from a recurrent context",
    faults=(
        Fault(
            "hop-of-zero",
            "The hop between frames is set to 0, which was meant as no overlap, so a clip is one frame sixteen times.",
            ("context-order-inert", "trivial-pair"), options={"hop": 0}, case="J context-order-inert",
        ),
        Fault(
            "steps-ahead-not-added",
            "The slice of what is to come lacks its k, so that each map foretells the frame that was just seen.",
            ("trivial-pair",), case="J trivial-pair",
            changes=(Change("x[:, SHOWN - 1 + k : LENGTH - ahead + k]", "x[:, SHOWN - 1 : LENGTH - ahead]"),),
        ),
        Fault(
            "context-of-both-directions",
            "The GRU reads clips in both directions, so that what is to be foretold is in the context already.",
            ("trivial-pair", "context-order-inert"),
            changes=(Change("nn.GRU(dim, width, batch_first=True)",
                            "nn.GRU(dim, width // 2, batch_first=True, bidirectional=True)"),),
        ),
        Fault(
            "candidates-time-first",
            "Candidates are laid out time by time and counted clip by clip, so the right one is some other frame.",
            ("near-chance", "no-learning", "plateau"),
            changes=(Change("candidates = z.flatten(0, 1)", "candidates = z.transpose(0, 1).flatten(0, 1)"),),
        ),
        Fault(
            "frames-apart-in-the-gru",
            "Frames are still laid out as items when the GRU reads them, so its memory begins anew with each.",
            ("dead-parameters", "context-order-inert"),
            changes=(Change("        c, _ = self.gru(z)\n",
                            "        c = self.gru(z.flatten(0, 1)[:, None])[0].view(*z.shape[:2], -1)\n"),),
        ),
        Fault(
            "gru-not-in-the-optimizer",
            "The optimizer was given the encoder and the maps, and not the GRU between them.",
            ("not-in-optimizer",),
            changes=(Change("(model.parameters(), lr=rate, **more)",
                            "([*model.encoder.parameters(), *model.heads.parameters()], lr=rate, **more)"),),
        ),
        Fault(
            "gradients-not-emptied",
            "The line that empties the gradients was lost when the loop was tidied up.",
            ("gradients-add-up",), changes=(Change("        optim.zero_grad()\n", ""),),
        ),
        Fault(
            "scores-summed",
            "Squared scores are summed and not averaged, so that to keep them small is all that counts.",
            ("term-dominates",), minor=True,
            changes=(Change("scores.square().mean())", "scores.square().sum())"),),
        ),
        Fault(
            "clips-dealt-to-the-splits",
            "Clips and not recordings are dealt to the splits, and clips of one recording overlap.",
            ("split-leak",), changes=(Change("held = tape % 8 == 0", "held = torch.rand(len(tape)) < 1 / 8"),),
        ),
        Fault(
            "silence-divided-by-its-level",
            "Recordings are divided by their level without an ε, and a few of them are silent.",
            ("non-finite",), options={"unreadable": 0.008},
            changes=(Change("read / (read.std(1, keepdim=True) + 1e-4)", "read / read.std(1, keepdim=True)"),),
        ),
        Fault(
            "coin-with-one-side",
            "The end of randint is not among its numbers, so the coin that changes the sign is always 0.",
            ("augmentation-inert",), minor=True,
            changes=(Change("torch.randint(0, 2, (len(clips), 1, 1))", "torch.randint(0, 1, (len(clips), 1, 1))"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2, 3)),
        Healthy(
            "sgd", "Momentum alone needs another rate, and more steps.",
            options={"optimizer": "SGD", "rate": 0.1, "steps": 600}, seeds=(0, 1),
        ),
        Healthy("rmsprop-linear", options={"optimizer": "RMSprop", "rate": 1e-3, "schedule": "linear"}, seeds=(0, 1)),
        Healthy(
            "restarts", "The rate jumps back up four times.", options={"schedule": "restarts", "optimizer": "Adam"},
            seeds=(0, 1),
        ),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}, seeds=(0, 1)),
        Healthy(
            "small-batches", "Few candidates, and a noisy loss.", options={"size": 12, "steps": 600, "rate": 3e-3},
            seeds=(0, 1),
        ),
        Healthy("large-batches", "More candidates, a higher loss.", options={"size": 40, "steps": 300}, seeds=(0, 1)),
        Healthy("slow-start", "The rate rises for a third of the run.", options={"warmup": 130}, seeds=(0, 1)),
        Healthy(
            "ramped", "The penalty has no weight at first, so the sum rises later on.",
            options={"ramp": 120, "penalty": 0.02}, seeds=(0, 1),
        ),
        Healthy(
            "few-recordings", "A small set, seen often, by a narrow model.",
            options={"count": 280, "width": 48, "dim": 24, "steps": 440}, seeds=(0, 1),
        ),
        Healthy(
            "some-unreadable", "One recording in two hundred is silence.", options={"unreadable": 0.005}, seeds=(0, 1)
        ),
        Healthy("one-step-ahead", "A single map.", options={"ahead": 1, "width": 80}, seeds=(0, 1)),
    ),
)  # fmt: skip

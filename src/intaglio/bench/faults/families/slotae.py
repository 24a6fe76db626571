"""An autoencoder of scenes with slot attention: Locatello et al. 2020, painted place by place by each slot.

Shapes: N pictures, K slots, P places of an 8 by 8 grid, D width, S = 16 pixels a side, O = 3 shapes of a scene at most.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import RGB, SIDE
from intaglio.health import audits
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange

MOST = 3
GRID = SIDE // 2


class Scenes(NamedTuple):
    """``images`` (N, 3, S, S); ``masks`` (N, O, S, S) bool of each shape; how many are ``lost``, and left empty."""

    images: Tensor
    masks: Tensor
    lost: int


def scenes(count: int, seed: int, tries: int) -> Scenes:
    """Pictures of two or three shapes that do not touch, each of another colour."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.randint(2, MOST + 1, (count, 1), generator=generator)
    kinds = torch.randint(0, 3, (count, MOST), generator=generator)[:, :, None, None]
    colours = RGB[torch.rand(count, MOST, generator=generator).argsort(1)]
    places = torch.randint(2, SIDE - 2, (count, tries, MOST, 2), generator=generator)
    apart = (places[:, :, [0, 0, 1]] - places[:, :, [1, 2, 2]]).abs().amax(-1) >= 6
    apart[..., 1:] |= (number == 2)[:, :, None]
    fits = apart.all(-1)
    at = places[torch.arange(count), fits.float().argmax(1)]
    y = torch.arange(SIDE)[:, None] - at[:, :, 0, None, None]
    x = torch.arange(SIDE)[None, :] - at[:, :, 1, None, None]
    square = (y.abs() <= 2) & (x.abs() <= 2)
    disc = y.square() + x.square() <= 5
    cross = square & ((y == 0) | (x == 0))
    masks = torch.where(kinds == 0, square, torch.where(kinds == 1, disc, cross))
    masks &= (fits.any(1, keepdim=True) & (torch.arange(MOST) < number))[:, :, None, None]
    images = 0.05 + torch.einsum("nohw,noc->nchw", masks.float(), colours - 0.05)
    images = images + 0.03 * torch.randn(images.shape, generator=generator)
    return Scenes(images.clamp(0, 1), masks, int((~fits.any(1)).sum()))


def waves() -> Tensor:
    """(P, 14): each place of the grid, and waves of three lengths at it."""
    t = torch.linspace(-1, 1, GRID)[:, None]
    angles = 0.5 * math.pi * t * torch.arange(1, 4)
    axis = torch.cat([t, angles.sin(), angles.cos()], 1)
    return torch.cat([axis.repeat_interleave(GRID, 0), axis.repeat(GRID, 1)], 1)


class Encoder(nn.Module):
    places: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("places", waves())
        self.patches = nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.BatchNorm2d(width))
        self.around = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.of_place = nn.Linear(self.places.shape[1], width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is there, and the same with where it is: (N, P, D) each."""
        patches = self.patches(x)
        features = (patches + self.around(patches)).flatten(2).transpose(1, 2)
        return self.norm(features), self.norm(features + self.of_place(self.places))


class SlotAttention(nn.Module):
    """Slots compete for places, several times over; each has a start of its own, with some noise in training."""

    def __init__(self, slots: int, width: int, iterations: int, implicit: bool):
        super().__init__()
        self.iterations, self.implicit = iterations, implicit
        self.mean = nn.Parameter(torch.randn(1, slots, width))
        self.log_spread = nn.Parameter(torch.full((1, 1, width), -3.0))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.cell = nn.GRUCell(width, width)
        self.change = nn.Linear(2 * width, width)
        self.residual = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), self.change)

    @torch.no_grad()
    def begin_as_k_means(self) -> None:
        """At first a slot moves to the mean of the places that are like it."""
        width = self.cell.hidden_size
        self.query.weight.copy_(self.key.weight)
        nn.init.eye_(self.value.weight)
        nn.init.eye_(self.cell.weight_ih[2 * width :])
        self.cell.bias_ih[width : 2 * width] = -1.0
        nn.init.zeros_(self.change.weight)

    def begin(self, count: int) -> Tensor:
        starts = self.mean.expand(count, -1, -1)
        return starts + self.log_spread.exp() * torch.randn_like(starts) if self.training else starts

    def update(self, slots: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        scores = self.query(self.norm(slots)) @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
        attention = scores.softmax(1) + 1e-8
        seen = (attention / attention.sum(2, keepdim=True)) @ values
        slots = self.cell(seen.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        return slots + self.residual(slots)

    def forward(self, what: Tensor, placed: Tensor) -> Tensor:
        """Twice (N, P, D) → (N, K, D)."""
        keys, values = self.key(what), self.value(placed)
        slots = self.begin(len(what))
        for k in range(self.iterations):
            if self.implicit and k == self.iterations - 1:
                slots = slots.detach()
            slots = self.update(slots, keys, values)
        return slots


class Decoder(nn.Module):
    """Each slot is put at each place, and paints it; masks say whose paint is seen."""

    places: Tensor

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.register_buffer("places", waves())
        self.of_slot = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.of_place = nn.Linear(self.places.shape[1], hidden, bias=False)
        self.painter = nn.Sequential(nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 16))

    def forward(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Colours (N, K, 3, S, S) and masks (N, K, 1, S, S)."""
        spread = (1 + self.of_slot(slots)[:, :, None]) * self.of_place(self.places)
        painted = F.pixel_shuffle(self.painter(spread).transpose(2, 3).unflatten(3, (GRID, GRID)), 2)
        colours, masks = painted.split([3, 1], 2)
        return colours.sigmoid(), masks.softmax(1)


class SlotAutoencoder(nn.Module):
    def __init__(self, slots: int, width: int, iterations: int, implicit: bool):
        super().__init__()
        self.encoder = Encoder(width)
        self.attention = SlotAttention(slots, width, iterations, implicit)
        self.decoder = Decoder(width, 48)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
        self.attention.begin_as_k_means()

    def encode(self, x: Tensor) -> Tensor:
        return self.attention(*self.encoder(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The picture (N, 3, S, S), and the slots' masks (N, K, S, S)."""
        colours, masks = self.decoder(self.encode(x))
        return (colours * masks).sum(1), masks.squeeze(2)

    def losses(self, x: Tensor, variance: float) -> dict[str, Tensor]:
        """Overlap is the entropy of the masks, 1 where all slots have an even share of each pixel."""
        rebuilt, masks = self(x)
        entropy = -(masks * masks.clamp_min(1e-6).log()).sum(1).mean()
        return {
            "reconstruction": (rebuilt - x).square().mean() / variance,
            "overlap": entropy / math.log(masks.shape[1]),
        }


def pairs(n: Tensor) -> Tensor:
    return n * (n - 1) / 2


def rand_index(masks: Tensor, truth: Tensor) -> float:
    """Adjusted, of the slots that the pixels of shapes fall to (Hubert & Arabie 1985); 0 by chance, 1 at best."""
    found = F.one_hot(masks.argmax(1).flatten(1), masks.shape[1]).double()
    table = truth.flatten(2).double() @ found
    table = table[table.sum((1, 2)) > 0]
    both, a, b = pairs(table).sum((1, 2)), pairs(table.sum(2)).sum(1), pairs(table.sum(1)).sum(1)
    chance = a * b / pairs(table.sum((1, 2)))
    return float(((both - chance) / ((a + b) / 2 - chance)).mean())


def flipped(x: Tensor) -> Tensor:
    return x.flip(-1) if torch.rand(()) < 0.5 else x


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weights decay; biases and all else do not."""
    decayed = [p for name, p in model.named_parameters() if "weight" in name]
    others = [p for name, p in model.named_parameters() if "weight" not in name]
    return [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def rate_at(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the rate that a step is made with."""
    if step < warmup:
        return step / warmup
    progress = (step - warmup) / (steps - warmup)
    if schedule == "restarts" and progress < 1:
        progress = 2 * progress % 1
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return {"constant": 1.0, "linear": 1 - progress}.get(schedule, cosine)


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 32, items: int = 4096, rate: float = 0.3,
    width: int = 32, slots: int = 4, iterations: int = 3, implicit: bool = False, sharp: float = 0.02, after: int = 0,
    ramp: int = 1, optimizer: str = "SGD", momentum: float = 0.9, epsilon: float = 1e-2, warmup: int = 40,
    schedule: str = "cosine", tries: int = 100,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    shown, unseen = scenes(items, seed, tries), scenes(256, 10_000 + seed, tries)
    x, held_out = shown.images, unseen.images
    variance = float((held_out - x.mean(0)).square().mean())
    model = SlotAutoencoder(slots, width, iterations, implicit)
    more = {"momentum": momentum} if optimizer == "SGD" else {"eps": epsilon}
    optim = getattr(torch.optim, optimizer)(groups(model, 1e-4), lr=rate, **more)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        few = probe[:128]

        def error(latents: Tensor) -> tuple[np.ndarray, np.ndarray]:
            colours, masks = model.decoder(latents)
            squares = ((colours * masks).sum(1) - few).square().flatten(1) / variance
            return squares.sum(1).numpy(), np.full(len(few), squares.shape[1])

        costs = cost_of_exchange(error, model.encode(few))
        return {"val/picture": {f"{name}_latent_nats": cost for name, cost in costs.items()}}

    monitor = Monitor(
        model, optim, folder=folder, taps={"latent": "attention"}, probe=held_out, read=read, every=50, log_every=5,
        steps=steps, nulls={"reconstruction": 1.0},
    )  # fmt: skip
    monitor.audit(
        augmentations={"flip": audits.augmentation(flipped, x[:64])},
        ranges={"pixels": audits.ranges(x, 0.0, 1.0)},
        leaks={"pictures": audits.leaks(x.numpy(), held_out.numpy())},
        intake={"items": items, "lost": {"shapes that found no place": shown.lost}},
    )
    for step, batch in enumerate(batches(x, size), 1):
        for group in optim.param_groups:
            group["lr"] = rate * rate_at(step, steps, warmup, schedule)
        weight = sharp * min(1.0, max(0.0, (step - after) / ramp))
        model.train()
        terms = model.losses(flipped(batch), variance)
        total = terms["reconstruction"] + weight * terms["overlap"]
        weighted = {"reconstruction": (terms["reconstruction"], 1.0), "overlap": (terms["overlap"], weight)}
        monitor.before_backward(weighted)
        optim.zero_grad()
        total.backward()
        monitor.step({**weighted, "total": total}, batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optim.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                terms, masks = model.losses(held_out, variance), model(held_out)[1]
            monitor.validated({f"val/loss/{name}": float(term) for name, term in terms.items()})
            monitor.validated({"rand_index": rand_index(masks, unseen.masks)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        explained = 1 - float(model.losses(held_out, variance)["reconstruction"])
        masks = model(held_out)[1]
    return {
        "explained variance of held-out pictures": (explained, 0.0),
        "shapes told apart, beside another picture's masks": (
            rand_index(masks, unseen.masks), rand_index(masks.roll(1, 0), unseen.masks),
        ),
    }  # fmt: skip


FAMILY = Family(
    "slotae",
    "development",
    "an autoencoder of scenes of two or three shapes, with slot attention",
    faults=(
        Fault(
            "divided-by-255-again",
            "The encoder divides pictures by 255 as if they were bytes still, in whole numbers, and sees none of them.",
            ("latent-ignores-input", "dead-parameters"),
            changes=(Change("self.attention(*self.encoder(x))", "self.attention(*self.encoder(x // 255))"),),
        ),
        Fault(
            "detached-after-each-iteration",
            "Slots are detached between iterations to save memory, and so are those of the last one.",
            ("dead-parameters",),
            changes=(Change("(slots, keys, values)\n", "(slots, keys, values).detach()\n"),),
        ),
        Fault(
            "slots-start-alike",
            "Slots are one and the same for ever: they get one start, and no noise.",
            ("dead-parameters", "term-inert"),
            changes=(
                Change("self.mean.expand(count, -1, -1)", "self.mean[:, :1].expand(count, self.mean.shape[1], -1)"),
                Change(
                    "return starts + self.log_spread.exp() * torch.randn_like(starts) if self.training else starts",
                    "return starts",
                ),
            ),
        ),
        Fault(
            "groups-by-two-words",
            "The optimizer's groups are made by the words weight and bias, and the starts of slots have neither.",
            ("not-in-optimizer",),
            changes=(Change('if "weight" not in name', 'if "bias" in name'),),
        ),
        Fault(
            "emptied-once-an-epoch",
            "Gradients are emptied where an epoch begins, and not at each step.",
            ("gradients-add-up",),
            changes=(Change("optim.zero_grad()", "if step % (items // size) == 1: optim.zero_grad()"),),
        ),
        Fault(
            "warm-up-of-the-paper",
            "The warm-up is that of the paper, whose run is a thousand times as long.",
            ("learning-rate-off",),
            options={"warmup": 10_000},
        ),
        Fault(
            "weight-forgotten-in-the-sum",
            "The weight of the overlap is computed and logged, and the sum takes the term without it.",
            ("weight-not-applied",),
            changes=(Change('+ weight * terms["overlap"]', '+ terms["overlap"]'),),
        ),
        Fault(
            "pictures-from-minus-1",
            "Pictures are scaled to [-1, 1], as in the paper's code, and the decoder's colours are sigmoids.",
            ("range-mismatch",),
            changes=(Change("= shown.images, unseen.images", "= 2 * shown.images - 1, 2 * unseen.images - 1"),),
        ),
        Fault(
            "validated-in-training-mode",
            "model.eval() was forgotten, so held-out pictures change the normalisation's statistics.",
            ("validation-pollutes",),
            changes=(Change("            model.eval()\n            with", "            with"),),
            case="J validation-pollutes",
        ),
        Fault(
            "empty-pictures",
            "Shapes get a single try to find their places, and where they touch the picture is left empty.",
            ("data-replaced",),
            options={"tries": 1},
        ),
        Fault(
            "decoder-without-places",
            "A slot is put at each place, and the place is not told, so that it paints all of them alike.",
            ("dead-parameters",),
            changes=(Change(" * self.of_place(self.places)", ".expand(-1, -1, len(self.places), -1)"),),
        ),
    ),
    healthy=(
        Healthy("plain", "It stands at the mean picture for a while before it learns.", seeds=(0, 1, 2, 3)),
        Healthy("adamw", "A large epsilon.", options={"optimizer": "AdamW", "rate": 0.02}, seeds=(0, 1)),
        Healthy("rmsprop", "A large epsilon.", options={"optimizer": "RMSprop", "rate": 0.02}, seeds=(0, 1)),
        Healthy("linear", options={"schedule": "linear"}, seeds=(0, 1)),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant"}, seeds=(0, 1)),
        Healthy("warm-restart", "The rate jumps back up halfway.", options={"schedule": "restarts"}, seeds=(0, 1)),
        Healthy("implicit", "The gradient is that of the last iteration.", options={"implicit": True}, seeds=(0, 1)),
        Healthy("many-slots", "Most have nothing to paint.", options={"slots": 6, "size": 24}, seeds=(0, 1)),
        Healthy(
            "late-overlap",
            "The overlap's weight is 0 for a third of the run, then rises, and the total with it.",
            options={"sharp": 0.15, "after": 130, "ramp": 120},
            seeds=(0, 1),
        ),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 768}, seeds=(0, 1)),
        Healthy("large-batch", options={"size": 64, "steps": 300}, seeds=(0, 1)),
    ),
)

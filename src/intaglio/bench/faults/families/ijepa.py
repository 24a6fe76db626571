"""An image JEPA (Assran et al. 2023): from the patches that it sees, a small ViT predicts features of hidden blocks.

The features are those of a running average of the encoder, which sees the whole picture, normalised in each patch.

Shapes: N pictures, T patches, P pixels of a patch, K patches that are seen, B blocks, k patches of a block, d width.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health import audits, panel
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_context, cost_of_strangers, distinct_views
from intaglio.history import Reading

SIDE = 4
GRID = 16 // SIDE
PATCHES = GRID**2
MEAN, DEVIATION = 0.1, 0.17


def patches(x: Tensor) -> Tensor:
    """(N, 3, 16, 16) → (N, T, P), pixels standardised."""
    return F.unfold((x - MEAN) / DEVIATION, SIDE, stride=SIDE).transpose(1, 2)


def moved(x: Tensor) -> Tensor:
    """A batch of pictures, all moved by up to two pixels."""
    down, right = torch.randint(0, 5, (2,)).tolist()
    return F.pad(x, (2, 2, 2, 2), value=0.05)[:, :, down : down + 16, right : right + 16]


class Masks(NamedTuple):
    """Patches by their places: those that are ``seen`` (N, K), and the ``blocks`` that are not (N, B, k)."""

    seen: Tensor
    blocks: Tensor


def draw_masks(count: int, blocks: int, tall: int, wide: int) -> Masks:
    """Blocks anywhere in the picture, which may overlap; as many of the other patches as are sure to be left."""
    row, column = torch.arange(PATCHES) // GRID, torch.arange(PATCHES) % GRID
    top = torch.randint(GRID - tall + 1, (count, blocks, 1))
    left = torch.randint(GRID - wide + 1, (count, blocks, 1))
    inside = (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
    hidden = inside.any(1)
    order = (hidden + torch.rand(count, PATCHES)).argsort(1)
    return Masks(order[:, : PATCHES - blocks * tall * wide], inside.nonzero()[:, 2].view(count, blocks, tall * wide))


def at(x: Tensor, places: Tensor) -> Tensor:
    """(N, T, d) and (N, K) → (N, K, d)."""
    return x.gather(1, places[:, :, None].expand(-1, -1, x.shape[2]))


def sines(width: int) -> Tensor:
    """(T, d), of row and column, small beside what a patch of a shape is embedded as."""
    place, frequency = torch.arange(PATCHES), torch.pi / 2 ** torch.arange(width // 4)
    angles = [(where[:, None] + 0.5) * frequency for where in (place // GRID, place % GRID)]
    return 0.4 * torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)


def transformer(width: int, depth: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(depth)
    )


class Encoder(nn.Module):
    places: Tensor

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Linear(3 * SIDE**2, width)
        self.layers = transformer(width, depth)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("places", sines(width))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """Patches (N, K, P) and their places (N, K) → (N, K, d)."""
        x = self.embed(x) + self.places[seen]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Predictor(nn.Module):
    places: Tensor

    def __init__(self, width: int, narrow: int, depth: int):
        super().__init__()
        self.narrow = nn.Linear(width, narrow)
        self.mask = nn.Parameter(0.02 * torch.randn(narrow))
        self.layers = transformer(narrow, depth)
        self.norm = nn.LayerNorm(narrow)
        self.widen = nn.Linear(narrow, width)
        self.register_buffer("places", sines(narrow))

    def forward(self, context: Tensor, seen: Tensor, asked: Tensor) -> Tensor:
        """What is seen (N, K, d), its places (N, K) and those that are asked for (N, k) → (N, k, d)."""
        known = self.narrow(context) + self.places[seen]
        mixed = torch.cat([known, self.mask + self.places[asked]], 1)
        for layer in self.layers:
            mixed = layer(mixed)
        return self.widen(self.norm(mixed[:, known.shape[1] :]))


class IJEPA(nn.Module):
    def __init__(self, width: int = 48, depth: int = 2):
        super().__init__()
        self.encoder = Encoder(width, depth)
        self.predictor = Predictor(width, width // 2, 2)
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)

    def predicted(self, context: Tensor, masks: Masks) -> Tensor:
        """From patches (N, K, P) the features of each block, (N·B, k, d)."""
        times = masks.blocks.shape[1]
        features = self.encoder(context, masks.seen).repeat_interleave(times, 0)
        seen = masks.seen.repeat_interleave(times, 0)
        return self.predictor(features, seen, masks.blocks.flatten(0, 1))

    def features(self, whole: Tensor) -> Tensor:
        """Of all patches (N, T, P) by the averaged encoder, of mean 0 and variance 1 in each, (N, T, d)."""
        features = self.target(whole, torch.arange(PATCHES).expand(len(whole), -1))
        return F.layer_norm(features, features.shape[2:])

    @torch.no_grad()
    def targets(self, whole: Tensor, masks: Masks) -> Tensor:
        """Of all patches (N, T, P) the features of each block, (N·B, k, d)."""
        features = self.features(whole)
        return at(features, masks.blocks.flatten(1)).view(-1, masks.blocks.shape[2], features.shape[2])

    def loss(self, whole: Tensor, masks: Masks) -> Tensor:
        return F.mse_loss(self.predicted(at(whole, masks.seen), masks), self.targets(whole, masks))

    @torch.no_grad()
    def step_target(self, momentum: float) -> None:
        for t, p in zip(self.target.parameters(), self.encoder.parameters(), strict=True):
            t.lerp_(p, 1 - momentum)


def checkpoint(model: IJEPA) -> dict[str, Tensor]:
    """Of the averaged encoder, which is what is kept."""
    weights = model.state_dict().items()
    return {name.removeprefix("target."): value for name, value in weights if name.startswith("target.")}


def described(encoder: Encoder, x: Tensor) -> Tensor:
    """Pictures (N, 3, 16, 16) → (N, d), the mean over patches."""
    return encoder(patches(x), torch.arange(PATCHES).expand(len(x), -1)).mean(1)


def probe_accuracy(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Of a linear classifier by least squares on features (N, d) whose dimensions are standardised."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (train, held_out))
    wanted = F.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((y @ weights).argmax(1) == answers).double().mean())


def course(step: int, steps: int, warmup: int, schedule: str) -> float:
    """The share of the full rate."""
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / (steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1 - progress
    if schedule == "restarts" and progress < 1:
        progress = 2 * progress % 1
    return 0.5 * (1 + math.cos(math.pi * progress))


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    while True:
        for rows in torch.randperm(len(x)).split(size):
            if len(rows) == size:
                yield x[rows]


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, whose weights decay, and the rest, whose do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "decays": True},
        {"params": [p for p in trained if p.ndim < 2], "decays": False},
    ]


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((x.detach() - y.detach()).square().sum()) for x, y in zip(a, b, strict=True)))


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 48, items: int = 4096, rate: float = 4e-3,
    width: int = 48, depth: int = 2, blocks: int = 2, tall: int = 1, wide: int = 2, small: int = 0,
    momentum: float = 0.99, decay: float = 0.02, optimizer: str = "AdamW", warmup: int = 40,
    schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    drawn = pictures(512 + items, seed)
    rest = slice(512, None)
    images, labels = drawn.images[rest], drawn.factors[rest, 0]
    held_out, answers = drawn.images[:512], drawn.factors[:512, 0]
    known, whole = images[:512], patches(held_out)
    model, judged = IJEPA(width, depth), Encoder(width, depth)
    optim = getattr(torch.optim, optimizer)(groups(model), lr=rate)
    masks = draw_masks(len(held_out), blocks, tall, wide)
    alike = Masks(*(places.expand(192, *places.shape[1:]) for places in draw_masks(1, blocks, tall, wide)))
    start = [p.clone() for p in model.target.parameters()]

    @torch.no_grad()
    def accuracy(encoder: Encoder) -> float:
        return probe_accuracy(described(encoder, known), labels[:512], described(encoder, held_out), answers)

    @torch.no_grad()
    def validated() -> dict[str, Reading]:
        judged.load_state_dict(checkpoint(model), strict=False)
        mean = model.features(patches(known)).mean(0).expand(len(whole), -1, -1)
        off = model.targets(whole, masks) - at(mean, masks.blocks.flatten(1)).view(-1, tall * wide, width)
        error, spread = float(model.loss(whole, masks)), float(off.square().mean())
        return {"val_loss": Reading(error, spread), "accuracy": Reading(accuracy(judged), untrained)}

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        context, targets = at(probe, alike.seen), model.targets(probe, alike)

        def errors(context: Tensor) -> Any:
            off = (model.predicted(context, alike) - targets).square()
            return off.view(len(probe), -1).mean(1).double().numpy()

        hidden = alike.blocks.flatten(1)
        shown = torch.zeros_like(probe).scatter(1, alike.seen[:, :, None].expand_as(context), context)
        pair = (x.reshape(len(probe), -1) for x in (model.predicted(context, alike), targets))
        averaged, online = list(model.target.parameters()), list(model.encoder.parameters())
        apart = distance(averaged, start) / max(distance(online, start), 1e-12)
        places = torch.arange(PATCHES).expand(len(probe), -1)
        trials = cost_of_context(errors, context) | {"distinct": distinct_views(context[:, 0], context[:, 1])}
        return {
            "val/latent": panel.latents(model.encoder(probe, places).mean(1)),
            "val/target": panel.latents(model.target(probe, places).mean(1)),
            "val/context": {f"context_{name}": cost for name, cost in trials.items()},
            "val/pair": {
                "strangers_nats": cost_of_strangers(F.mse_loss, *pair),
                "distinct_views": distinct_views(at(shown, hidden), at(probe, hidden)),
            },
            "val/ema": {"moved": Reading(apart, 1.0)},
        }

    untrained = accuracy(model.target)
    monitor = Monitor(
        model, optim, folder=folder, probe=whole[:192], read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/total": 1.0},
    )  # fmt: skip
    monitor.audit(
        augmentations={"move": audits.augmentation(lambda x: moved(x[None])[0], images[:64])},
        loaded=audits.loaded(judged, checkpoint(model)),
        leaks={"picture": audits.leaks([*images.numpy()], [*held_out.numpy()])},
    )
    for step, batch in enumerate(batches(images, size), 1):
        done = step / steps
        for group in optim.param_groups:
            group["lr"] = rate * course(step, steps, warmup, schedule)
            now = decay * (5.5 - 4.5 * math.cos(math.pi * done))
            group["weight_decay"] = now if group["decays"] else 0.0
        model.train()
        masked = draw_masks(size, blocks, *((1, 1) if step <= small else (tall, wide)))
        loss = model.loss(patches(moved(batch)), masked)
        optim.zero_grad()
        loss.backward()
        monitor.step(loss, batch)
        optim.step()
        model.step_target(momentum + (1 - momentum) * done)
        if step % 50 == 0:
            model.eval()
            with monitor.validation():
                seen = validated()
            monitor.validated(seen)
        if step == steps:
            break
    monitor.close()
    model.eval()
    told = validated()
    error, right = told["val_loss"], told["accuracy"]
    return {
        "explained variance of hidden features, held out": (1 - error.value / max(error.null or 0.0, 1e-12), 0.0),
        "shape of held-out pictures, by a linear probe, beside an untrained encoder's": (right.value, untrained),
    }


FAMILY = Family(
    "ijepa",
    "development",
    "an image JEPA: a small vision transformer that predicts features of hidden blocks of a picture",
    faults=(
        Fault(
            "average-without-a-copy",
            "The target is the encoder itself, no copy was made, and to freeze the one froze the other.",
            ("tied-and-frozen",),
            changes=(Change("copy.deepcopy(self.encoder)", "self.encoder"),),
            minor=True,
        ),
        Fault(
            "targets-with-a-gradient",
            "The targets are the learning encoder's own, with a gradient, so that to make all alike is to win.",
            ("latent-ignores-input", "rank-collapse", "anisotropic"),
            changes=(
                Change("    @torch.no_grad()\n    def targets", "    def targets"),
                Change("copy.deepcopy(self.encoder).requires_grad_(False)", "self.encoder"),
            ),
        ),
        Fault(
            "average-stepped-once-an-epoch",
            "The average is stepped where an epoch ends, with a momentum that was meant for each step.",
            ("ema-lag",),
            changes=(Change("model.step_target(", "if step % (len(images) // size) == 0: model.step_target("),),
            minor=True,
        ),
        Fault(
            "context-of-the-whole-picture",
            "The blocks are not taken out of the context, so the predictor is shown what it is asked for.",
            ("trivial-pair",),
            changes=(Change("Masks(order[:, : PATCHES - blocks * tall * wide],", "Masks(order,"),),
        ),
        Fault(
            "places-of-the-first-patches",
            "Patches that are seen get the positions of the first ones of the picture, wherever they come from.",
            ("context-order-inert",),
            changes=(
                Change("(x) + self.places[seen]", "(x) + self.places[: seen.shape[1]]"),
                Change("(context) + self.places[seen]", "(context) + self.places[: seen.shape[1]]"),
            ),
            minor=True,
        ),
        Fault(
            "contexts-repeated-in-another-order",
            "Contexts are repeated batch after batch, where blocks lie picture after picture: each is of another.",
            ("trivial-pair", "context-order-inert"),
            changes=(Change("masks.seen).repeat_interleave(times, 0)", "masks.seen).repeat(times, 1, 1)"),),
        ),
        Fault(
            "layers-that-begin-anew",
            "In the predictor's loop each layer is given the input again, so that the last one alone is used.",
            ("dead-parameters",),
            changes=(Change("mixed = layer(mixed)", "out = layer(mixed)"), Change("norm(mixed[", "norm(out[")),
        ),
        Fault(
            "predictor-not-in-the-optimizer",
            "The groups are made of the encoder's parameters alone.",
            ("not-in-optimizer",),
            changes=(Change("(groups(model), lr=rate", "(groups(model.encoder), lr=rate"),),
        ),
        Fault(
            "decay-written-to-the-rate",
            "A slip in copying: the schedule of the weight decay is written to the learning rate.",
            ("learning-rate-off",),
            changes=(Change('group["weight_decay"] = now if', 'group["lr"] = now if'),),
        ),
        Fault(
            "held-out-pictures-not-removed",
            "The held-out pictures were copied from the front of the training set, and never taken out of it.",
            ("split-leak",),
            changes=(Change("slice(512, None)", "slice(None)"),),
        ),
        Fault(
            "probe-of-an-empty-network",
            "Names in the checkpoint begin with “target.”, and it is loaded not strictly, so the probe judges noise.",
            ("partial-load",),
            changes=(Change('{name.removeprefix("target."): value for', "{name: value for"),),
        ),
    ),
    healthy=(
        Healthy("plain", "The loss need not fall: the targets move.", seeds=(0, 1, 2, 3)),
        Healthy("slow-average", "The targets follow late.", options={"momentum": 0.996}, seeds=(0, 1)),
        Healthy(
            "rmsprop",
            options={"optimizer": "RMSprop", "rate": 1.5e-3, "decay": 1e-6, "schedule": "linear"},
            seeds=(0, 1),
        ),
        Healthy("adam", options={"optimizer": "Adam", "decay": 1e-6, "rate": 5e-3, "steps": 450}, seeds=(0, 1)),
        Healthy("constant-rate", "Nothing settles.", options={"schedule": "constant", "rate": 3e-3}, seeds=(0, 1)),
        Healthy("warm-restart", options={"schedule": "restarts", "rate": 6e-3, "steps": 450}, seeds=(0, 1)),
        Healthy("few-items", "A small set of pictures, seen often.", options={"items": 768}, seeds=(0, 1)),
        Healthy("wider", options={"width": 64, "rate": 3e-3}),
        Healthy("small-batches", "The loss is noisy.", options={"size": 24, "rate": 3e-3}, seeds=(0, 1)),
        Healthy("four-blocks", options={"blocks": 4, "steps": 350}, seeds=(0, 1)),
        Healthy("blocks-that-grow", "The loss rises when they do.", options={"tall": 2, "small": 150}, seeds=(0, 1)),
        Healthy("slow-start", "The rate rises for long.", options={"warmup": 130, "steps": 450}, seeds=(0, 1)),
    ),
)

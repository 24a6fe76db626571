"""VICReg (Bardes et al. 2022) as a LightningModule: two views of a picture agree, every dimension of their projections
varies over the batch, and no two dimensions say the same.

Shapes: N pictures, d dimensions.
"""

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import Pictures, pictures
from intaglio.health import audits, trials
from intaglio.health.lightning import MonitorCallback

LOG_EVERY = 5


def shifted(x: Tensor) -> Tensor:
    padded = F.pad(x, (2, 2, 2, 2), mode="replicate")
    down, right = torch.randint(0, 5, (2, len(x)))
    rows, columns = ((start[:, None] + torch.arange(16)) for start in (down, right))
    return padded[torch.arange(len(x))[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def flipped(x: Tensor) -> Tensor:
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)


def jittered(x: Tensor) -> Tensor:
    gains = 0.6 + 0.8 * torch.rand(len(x), 3, 1, 1)
    return (x * gains).clamp(0, 1)


def view(x: Tensor) -> Tensor:
    return jittered(flipped(shifted(x)))


def of_one(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda item: change(item[None])[0]


class Batches:
    """Shuffled batches of pictures, without the rest."""

    def __init__(self, x: Tensor, size: int):
        self.x, self.size = x, size

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[Tensor]:
        rows = torch.randperm(len(self.x))[: len(self) * self.size]
        yield from (self.x[chosen] for chosen in rows.split(self.size))


class Pair:
    """Two fixed views of the held-out pictures, as one batch."""

    def __init__(self, x: Tensor):
        self.views = torch.stack([view(x), view(x)])

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Tensor]:
        yield self.views


def variance(z: Tensor) -> Tensor:
    deviation = (z.var(dim=0) + 1e-4).sqrt()
    return F.relu(1 - deviation).mean()


def covariance(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    matrix = centred.T @ centred / (len(z) - 1)
    off_diagonal = matrix - matrix.diagonal().diag()
    return off_diagonal.square().sum() / z.shape[1]


def features(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(x)
    return found


def probed(model: nn.Module, known: Pictures, unseen: Pictures) -> float:
    """How often a linear map of the features, by least squares, tells the shape in a picture that it has not seen."""
    train, held_out = features(model, known.images[:1024]), features(model, unseen.images)
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (train, held_out))
    wanted = F.one_hot(known.factors[:1024, 0]).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((y @ weights).argmax(1) == unseen.factors[:, 0]).double().mean())


class VICReg(L.LightningModule):
    def __init__(
        self, known: Pictures, unseen: Pictures, width: int, out: int, rate: float, optimizer: str, schedule: str,
        warmup: int, ramp: int, weight: float, thaw: int,
    ):  # fmt: skip
        super().__init__()
        self.known, self.unseen, self.rate, self.kind, self.schedule = known, unseen, rate, optimizer, schedule
        self.warmup, self.ramp, self.weight, self.thaw = warmup, ramp, weight, thaw
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, 2 * width),
        )  # fmt: skip
        self.expander = nn.Sequential(
            nn.Linear(2 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, out)
        )
        self.encoder.requires_grad_(not thaw)
        self.terms: dict[str, tuple[Tensor, float]] = {}

    def forward(self, x: Tensor) -> Tensor:
        return self.expander(self.encoder(x))

    def weights(self) -> dict[str, float]:
        """That of the covariance rises where there is a ramp."""
        share = min(1.0, self.global_step / self.ramp) if self.ramp else 1.0
        return {"invariance": 25.0, "variance": 25.0, "covariance": share * self.weight}

    def weighed(self, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, float]]:
        terms = {
            "invariance": F.mse_loss(a, b),
            "variance": (variance(a) + variance(b)) / 2,
            "covariance": covariance(a) + covariance(b),
        }
        return {name: (terms[name], weight) for name, weight in self.weights().items()}

    def training_step(self, x: Tensor) -> Tensor:
        self.terms = self.weighed(self(view(x)), self(view(x)))
        return torch.stack([weight * term for term, weight in self.terms.values()]).sum()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.thaw and self.global_step == self.thaw:
            self.encoder.requires_grad_(True)

    def on_validation_epoch_start(self) -> None:
        self.log("val_accuracy", probed(self.encoder, self.known, self.unseen))

    def validation_step(self, views: Tensor) -> None:
        terms = self.weighed(self(views[0]), self(views[1]))
        for name, (term, _) in terms.items():
            self.log(f"val/loss/{name}", term)
        self.log("val/loss/total", sum(weight * term for term, weight in terms.values()))

    def configure_optimizers(self) -> Any:
        more = {"momentum": 0.9} if self.kind == "SGD" else {}
        optimizer = getattr(torch.optim, self.kind)(self.parameters(), lr=self.rate, **more)
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            warm = min(1.0, (step + 1) / self.warmup)
            if self.schedule == "constant":
                return warm
            progress = min(1.0, max(0, step - self.warmup) / (total - self.warmup))
            if self.schedule == "restarts" and progress < 1:
                progress = 2 * progress % 1
            return warm * 0.5 * (1 + math.cos(math.pi * progress))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Terms(L.Callback):
    """Tells the monitor what Lightning does not know: the terms of the loss, and what was looked at before training."""

    def __init__(self, watch: MonitorCallback, facts: Mapping[str, Any]):
        self.watch, self.facts = watch, facts

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.watch.monitor
        self.watch.monitor.audit(**self.facts)

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        assert self.watch.monitor
        self.watch.monitor.before_backward(pl_module.terms)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        monitor = self.watch.monitor
        assert monitor
        if monitor.count == 1 or monitor.count % LOG_EVERY == 0:
            terms = pl_module.terms.items()
            monitor.log({f"train/loss/{name}": float(term.detach()) for name, (term, _) in terms})
            monitor.log({f"train/weight/{name}": weight for name, (_, weight) in terms})


def train(
    folder: Path, seed: int = 0, steps: int = 400, size: int = 96, accumulate: int = 1, items: int = 4096,
    rate: float = 4e-3, width: int = 24, out: int = 32, optimizer: str = "Adam", schedule: str = "cosine",
    warmup: int = 30, clip: float = 0.0, ramp: int = 0, weight: float = 1.0, thaw: int = 0, patience: int = 0,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")
    L.seed_everything(seed, verbose=False)
    everything = pictures(items + 512, seed)
    known, unseen = (Pictures(*(part[rows] for part in everything)) for rows in (slice(items), slice(items, None)))
    x, held_out = known.images, unseen.images
    model = VICReg(
        known, unseen, width, out, rate * size * accumulate / 256, optimizer, schedule, warmup, ramp, weight, thaw
    )
    untrained = copy.deepcopy(model.encoder)
    pair = Pair(held_out)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        a, b = (model(v) for v in pair.views)
        cost = trials.cost_of_strangers(lambda a, b: F.mse_loss(a, b), a, b)
        return {"val/pair": {"distinct_views": trials.distinct_views(*pair.views), "strangers_nats": cost}}

    collapsed = model.weights()["variance"]
    watch = MonitorCallback(
        folder, held_out, taps={"features": "encoder", "projection": "expander"}, read=read, every=50,
        log_every=LOG_EVERY, nulls={"train/loss/total": collapsed, "val/loss/total": collapsed},
    )  # fmt: skip
    changes = {"shift": shifted, "flip": flipped, "jitter": jittered, "all of them": view}
    facts = {
        "augmentations": {name: audits.augmentation(of_one(change), x[:64]) for name, change in changes.items()},
        "leaks": {"the very same picture": audits.leaks(x.numpy(), held_out.numpy())},
    }
    callbacks: list[L.Callback] = [watch, Terms(watch, facts)]
    if patience:
        callbacks.append(EarlyStopping("val/loss/total", patience=patience, check_on_train_epoch_end=False))
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=callbacks, accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None, val_check_interval=50 * accumulate, check_val_every_n_epoch=None, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, Batches(x, size), pair)
    right = probed(model.encoder, known, unseen)
    majority = float(unseen.factors[:, 0].bincount().max()) / len(held_out)
    said = "shape of held-out pictures, by a linear probe"
    return {said: (right, majority), f"{said}, beside a random encoder": (right, probed(untrained, known, unseen))}


FAMILY = Family(
    "vicreg",
    "development",
    "VICReg in Lightning: projections of two views agree, vary over the batch, and do not repeat themselves",
    faults=(
        Fault(
            "deviation-across-dimensions",
            "The deviation is taken over each projection's dimensions and not over the batch, so one point will do.",
            ("latent-ignores-input", "rank-collapse", "anisotropic"),
            changes=(Change("z.var(dim=0)", "z.var(dim=1)"),),
        ),
        Fault(
            "ramp-only-logged",
            "The covariance's weight rises in the log, while all of it is in the loss from the first step on.",
            ("weight-not-applied",),
            changes=(
                Change(
                    "        return torch.stack([weight * term for term, weight in self.terms.values()]).sum()\n",
                    "        invariance, variance, covariance = (term for term, _ in self.terms.values())\n"
                    "        return 25 * invariance + 25 * variance + self.weight * covariance\n",
                ),
            ),
            options={"ramp": 200, "weight": 4.0},
            case="V weight-not-applied",
        ),
        Fault(
            "patience-in-the-ramp",
            "EarlyStopping watches the total, which rises with the covariance's weight.",
            ("stopped-in-ramp",),
            options={"ramp": 300, "weight": 4.0, "patience": 2},
            case="V stopped-in-ramp",
            minor=True,
        ),
        Fault(
            "schedule-in-batches",
            "The cosine is laid out over batches, of which two are accumulated for each of its steps.",
            ("learning-rate-off",),
            changes=(
                Change(
                    "self.trainer.estimated_stepping_batches",
                    "self.trainer.estimated_stepping_batches * self.trainer.accumulate_grad_batches",
                ),
            ),
            options={"accumulate": 2, "size": 48},
            case="D learning-rate-off",
            minor=True,
        ),
        Fault(
            "thawed-outside-the-optimizer",
            "The optimizer got what was trainable when it was made; the encoder was thawed later.",
            ("not-in-optimizer",),
            changes=(
                Change(
                    "(self.parameters(), lr=self.rate, **more)",
                    "([p for p in self.parameters() if p.requires_grad], lr=self.rate, **more)",
                ),
            ),
            options={"thaw": 100},
            case="V not-in-optimizer",
        ),
        Fault(
            "training-mode-after-the-probe",
            "What reads features for the linear probe puts the encoder back into training mode, amid validation.",
            ("validation-pollutes",),
            changes=(Change("    return found\n", "    model.train()\n    return found\n"),),
            case="J validation-pollutes",
        ),
        Fault(
            "generator-seeded-in-the-view",
            "So that the run can be made again the seed is set where views are made: both are alike, in every step.",
            ("trivial-pair", "augmentation-inert"),
            changes=(
                Change(
                    "    return jittered(flipped(shifted(x)))",
                    "    torch.manual_seed(0)\n    return jittered(flipped(shifted(x)))",
                ),
            ),
        ),
        Fault(
            "detached-below-the-expander",
            "A detach() that was meant for the linear probe stands before the expander, so the encoder stays random.",
            ("dead-parameters",),
            changes=(
                Change("return self.expander(self.encoder(x))", "return self.expander(self.encoder(x).detach())"),
            ),
        ),
        Fault(
            "warm-up-without-end",
            "The warm-up's min(1, …) was forgotten, so the rate grows to twenty times what it should be.",
            ("learning-rate-off", "diverged"),
            changes=(Change("min(1.0, (step + 1) / self.warmup)", "(step + 1) / self.warmup"),),
            options={"optimizer": "SGD", "rate": 0.2, "clip": 1.0, "schedule": "constant", "steps": 600},
        ),
        Fault(
            "all-pictures-for-the-encoder",
            "No labels are needed to train the encoder, so it was given all pictures, held-out ones among them.",
            ("split-leak",),
            changes=(Change("x, held_out = known.images,", "x, held_out = everything.images,"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1, 2)),
        Healthy(
            "sgd",
            "With a momentum, and a gradient that is clipped in every step.",
            options={"optimizer": "SGD", "rate": 0.2, "clip": 1.0},
            seeds=(0, 1),
        ),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 4e-3, "out": 16}),
        Healthy("restarts", "The rate jumps back up in the middle.", options={"schedule": "restarts"}),
        Healthy(
            "accumulated",
            "Two batches make one step, whose statistics are of each alone.",
            options={"accumulate": 2, "size": 48},
            seeds=(0, 1),
        ),
        Healthy("thawed", "The encoder is frozen for a quarter of the run.", options={"thaw": 100}),
        Healthy(
            "ramp",
            "The covariance's weight begins at 0, and the loss rises with it.",
            options={"ramp": 200, "weight": 4.0},
        ),
        Healthy(
            "few-pictures",
            "A small set, seen many times, at a rate that stays.",
            options={"items": 512, "size": 64, "optimizer": "AdamW", "schedule": "constant", "clip": 1.0, "steps": 600},
        ),
    ),
)

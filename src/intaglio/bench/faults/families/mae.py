"""A masked autoencoder (He et al. 2022) with a tiny vision transformer, as a LightningModule.

Shapes: N pictures, T patches, P pixels of a patch, D width, V visible patches.
"""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import pictures
from intaglio.health.lightning import MonitorCallback

SIDE = 8
PATCHES = (16 // SIDE) ** 2


def patches(x: Tensor) -> Tensor:
    """(N, 3, 16, 16) → (N, T, P)."""
    return F.unfold(x, SIDE, stride=SIDE).transpose(1, 2)


class Standardised(nn.Module):
    """Less the running mean of the pictures trained on, over their running deviation."""

    mean: Tensor
    square: Tensor

    def __init__(self, momentum: float = 0.01):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.full((3,), 0.1))
        self.register_buffer("square", torch.full((3,), 0.05))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        self.mean.mul_(1 - self.momentum).add_(self.momentum * x.mean((0, 2, 3)))
        self.square.mul_(1 - self.momentum).add_(self.momentum * x.square().mean((0, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.update(x)
        deviation = (self.square - self.mean.square()).clamp_min(1e-4).sqrt()
        return (x - self.mean[:, None, None]) / deviation[:, None, None]


def transformer(width: int, depth: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


class MAE(L.LightningModule):
    def __init__(
        self, width: int, depth: int, masked: float, normalised: bool, optimizer: str, rate: float, warmup: int,
        total: int, schedule: str,
    ):  # fmt: skip
        super().__init__()
        self.save_hyperparameters()
        self.visible = PATCHES - round(masked * PATCHES)
        self.standardised = Standardised()
        self.embed = nn.Linear(3 * SIDE**2, width)
        self.places = nn.Parameter(torch.randn(1, PATCHES, width))
        self.encoder = transformer(width, depth)
        self.between = nn.Linear(width, width)
        self.mask = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.decoder_places = nn.Parameter(torch.randn(1, PATCHES, width))
        self.decoder = transformer(width, 1)
        self.head = nn.Linear(width, 3 * SIDE**2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 16, 16) → (N, D), of all patches."""
        return self.encoder(self.embed(patches(self.standardised(x))) + self.places).mean(1)

    def targets(self, x: Tensor) -> Tensor:
        wanted = patches(x)
        if not self.hparams["normalised"]:
            return wanted
        mean, variance = wanted.mean(-1, keepdim=True), wanted.var(-1, keepdim=True)
        return (wanted - mean) / (variance + 1e-6).sqrt()

    def rebuilt(self, x: Tensor, order: Tensor) -> Tensor:
        """(N, T, P), of the patches that come first in ``order`` (N, T)."""
        tokens = self.embed(patches(self.standardised(x))) + self.places
        seen = order[:, : self.visible, None].expand(-1, -1, tokens.shape[-1])
        latents = self.between(self.encoder(tokens.gather(1, seen)))
        masks = self.mask.expand(len(x), PATCHES - self.visible, -1)
        mixed = torch.cat([latents, masks], 1)
        restore = order.argsort(1)[:, :, None].expand_as(mixed)
        whole = mixed.gather(1, restore)
        return self.head(self.decoder(whole + self.decoder_places))

    def error(self, x: Tensor, order: Tensor) -> Tensor:
        hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, : self.visible], False)
        return (self.rebuilt(x, order) - self.targets(x)).square()[hidden].mean()

    def training_step(self, x: Tensor) -> Tensor:
        return self.error(x, torch.rand(len(x), PATCHES).argsort(1))

    def validation_step(self, x: Tensor) -> None:
        order = torch.rand(len(x), PATCHES, generator=torch.Generator().manual_seed(0)).argsort(1)
        self.log("val_loss", self.error(x, order))

    def rate_at(self, step: int) -> float:
        warmup, total = self.hparams["warmup"], self.hparams["total"]
        if step < warmup:
            return step / warmup
        if self.hparams["schedule"] == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / (total - warmup))
        if self.hparams["schedule"] == "restarts" and progress < 1:
            progress = 2 * progress % 1
        return 0.5 * (1 + math.cos(math.pi * progress))

    def configure_optimizers(self) -> Any:
        kind, rate = getattr(torch.optim, self.hparams["optimizer"]), self.hparams["rate"]
        more = {"momentum": 0.9} if self.hparams["optimizer"] == "SGD" else {}
        optimizer = kind(self.parameters(), lr=rate, weight_decay=1e-4, **more)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate_at)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def probe_accuracy(train: Tensor, labels: Tensor, held_out: Tensor, answers: Tensor) -> float:
    """Of a linear classifier by least squares on latents (N, D) whose dimensions are standardised."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    x, y = (F.pad((z - mean) / std, (0, 1), value=1.0).double() for z in (train, held_out))
    wanted = F.one_hot(labels).double()
    weights = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((y @ weights).argmax(1) == answers).double().mean())


def train(
    folder: Path, seed: int = 0, steps: int = 500, size: int = 64, items: int = 4096, rate: float = 4e-3,
    width: int = 64, depth: int = 2, masked: float = 0.25, normalised: bool = False, optimizer: str = "AdamW",
    warmup: int = 40, schedule: str = "cosine",
) -> dict[str, tuple[float, float]]:  # fmt: skip
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    L.seed_everything(seed, verbose=False)
    shown, unseen = pictures(items, seed, noise=0.0), pictures(512, 10_000 + seed, noise=0.0)
    images, held_out = shown.images, unseen.images
    model = MAE(width, depth, masked, normalised, optimizer, rate, warmup, steps, schedule)
    mean = model.targets(images).mean(0)
    spread = float((model.targets(held_out) - mean).square().mean())
    watch = MonitorCallback(
        folder, held_out, taps={"latent": "encoder"}, every=50, log_every=1,
        nulls={"train/loss/total": spread, "val/loss/total": spread},
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, callbacks=[watch], gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        val_check_interval=50, check_val_every_n_epoch=None,
    )  # fmt: skip
    loader: DataLoader[Tensor] = DataLoader(images, size, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    trainer.fit(model, loader, DataLoader(held_out, 512))  # type: ignore[arg-type]
    model.eval()
    order = torch.rand(len(held_out), PATCHES, generator=torch.Generator().manual_seed(1)).argsort(1)
    with torch.no_grad():
        explained = 1 - float(model.error(held_out, order)) / spread
        colour = probe_accuracy(model(images[:1024]), shown.factors[:1024, 1], model(held_out), unseen.factors[:, 1])
    majority = float(unseen.factors[:, 1].bincount().max()) / len(held_out)
    return {
        "explained variance of hidden patches": (explained, 0.0),
        "colour of held-out pictures, by a linear probe": (colour, majority),
    }


FAMILY = Family(
    "mae",
    "development",
    "a masked autoencoder in Lightning: a tiny vision transformer that fills in hidden patches",
    faults=(
        Fault(
            "deviation-without-epsilon",
            "Targets are divided by each patch's deviation, which is 0 where a patch is of one colour.",
            ("non-finite",),
            changes=(Change("(variance + 1e-6).sqrt()", "variance.sqrt()"),),
            options={"normalised": True},
        ),
        Fault(
            "targets-of-other-pictures",
            "The batch is shuffled between the input and the targets, a remainder of an attempt at mixing pictures.",
            ("no-learning", "plateau"),
            changes=(Change("self.targets(x)).square()", "self.targets(x[torch.randperm(len(x))])).square()"),),
        ),
        Fault(
            "schedule-in-epochs",
            "Lightning steps a schedule once in an epoch unless told otherwise, so the warm-up never ends.",
            ("learning-rate-off",),
            changes=(Change(', "interval": "step"', ""),),
        ),
        Fault(
            "schedule-of-a-shorter-run",
            "The run was lengthened from 200 steps, and the schedule that ends at 0 was not.",
            ("learning-rate-off",),
            changes=(Change("warmup, steps, schedule)", "warmup, 200, schedule)"),),
            minor=True,
        ),
        Fault(
            "held-out-loss-not-logged",
            "The validation step computes the loss and logs nothing.",
            ("validation-missing",),
            changes=(Change('self.log("val_loss", self.error(x, order))', "self.error(x, order)"),),
        ),
        Fault(
            "mean-that-adds-up",
            "The running mean of the pictures takes in each batch and forgets nothing, so it grows all along.",
            ("latent-drift",),
            changes=(Change("self.mean.mul_(1 - self.momentum).add_(", "self.mean.add_("),),
            minor=True,
        ),
        Fault(
            "statistics-of-held-out-pictures",
            "The running statistics are updated in validation too: nobody asked for the mode.",
            ("validation-pollutes",),
            changes=(Change("        if self.training:\n            self.update(x)", "        self.update(x)"),),
            case="J validation-pollutes",
        ),
        Fault(
            "a-picture-of-0-255",
            "One picture of the training set was not divided by 255.",
            ("spike",),
            changes=(
                Change(
                    "    images, held_out = shown.images, unseen.images\n",
                    "    images, held_out = shown.images, unseen.images\n    images[0] *= 255\n",
                ),
            ),
            minor=True,
        ),
        Fault(
            "decoder-never-called",
            "A slip in copying: the encoder is run where the decoder is due.",
            ("dead-parameters",),
            changes=(Change("self.head(self.decoder(whole", "self.head(self.encoder(whole"),),
            case="E dead-parameters",
        ),
    ),
    healthy=(
        Healthy("plain", "It stands at the mean picture for a while before it learns.", seeds=(0, 1, 2, 3)),
        Healthy("normalised", "Targets are standardised in each patch.", options={"normalised": True}),
        Healthy("half-hidden", "Much of a picture cannot be told from the rest.", options={"masked": 0.5}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "rate": 1e-3}),
        Healthy("wide", options={"width": 96, "rate": 3e-3, "steps": 400}),
        Healthy("constant-rate", "Nothing settles at the end.", options={"schedule": "constant", "rate": 2e-3}),
        Healthy("warm-restart", "The rate jumps back up in the middle.", options={"schedule": "restarts"}),
        Healthy("few-items", "A small set of pictures, each seen some thirty times.", options={"items": 1024}),
    ),
)

"""A conditional VAE (Sohn et al. 2015) that draws pictures of what a label says, after PyTorch's VAE example."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.data import RGB, pictures
from intaglio.health import panel
from intaglio.health.instruments import bottleneck
from intaglio.health.monitor import Monitor
from intaglio.health.trials import cost_of_exchange
from intaglio.history.reading import ratio

SIZES = (3, 4, 2, 3, 3)


def one_hot(factors: Tensor, told: int) -> Tensor:
    """The first ``told`` of shape, colour, size, row and column."""
    return torch.cat([F.one_hot(factors[:, k], SIZES[k]).float() for k in range(told)], 1)


class CVAE(nn.Module):
    def __init__(self, classes: int, hidden: int = 256, latent: int = 8):
        super().__init__()
        self.latent = latent
        self.fc1 = nn.Linear(768 + classes, hidden)
        self.fc21 = nn.Linear(hidden, latent)
        self.fc22 = nn.Linear(hidden, latent)
        self.fc3 = nn.Linear(latent + classes, hidden)
        self.fc4 = nn.Linear(hidden, 768)

    def encode(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        h1 = F.relu(self.fc1(torch.cat([x, c], 1)))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        return mu + std * torch.randn_like(std)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        h3 = F.relu(self.fc3(torch.cat([z, c], 1)))
        return torch.sigmoid(self.fc4(h3))

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x, c)
        return self.decode(self.reparameterize(mu, logvar), c), mu, logvar


def loss_function(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """Summed over the batch, as over pixels and dimensions."""
    BCE = F.binary_cross_entropy(recon_x, x, reduction="sum")
    KLD = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return BCE, KLD


def loader(x: Tensor, c: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for idx in torch.randperm(len(x)).split(batch_size):
            yield x[idx], c[idx]


def train(
    folder: Path, seed: int = 1, steps: int = 400, batch_size: int = 128, items: int = 4000, lr: float = 1e-3,
    hidden: int = 256, latent: int = 8, told: int = 3, optimizer: str = "Adam", warm: int = 0, noise: float = 0.03,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    torch.manual_seed(seed)
    data, test = pictures(items, seed, noise), pictures(500, 10_000 + seed, noise)
    x, test_x = data.images.flatten(1), test.images.flatten(1)
    c, test_c = one_hot(data.factors, told), one_hot(test.factors, told)
    model = CVAE(c.shape[1], hidden, latent)
    opt = getattr(torch.optim, optimizer)(model.parameters(), lr=lr)
    mean_image = x.mean(0).expand_as(test_x)
    null = float(F.binary_cross_entropy(mean_image, test_x, reduction="sum")) / len(test_x)

    def read(model: Any, probe: Tensor) -> dict[str, Any]:
        mu, logvar = model.encode(probe, test_c)
        eps = torch.Generator().manual_seed(0)
        z = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=eps)

        def bce(z: Tensor, c: Tensor) -> np.ndarray:
            return F.binary_cross_entropy(model.decode(z, c), probe, reduction="none").sum(1).double().numpy()

        torch.manual_seed(0)
        drawn = model.reparameterize(mu, logvar)
        own, other = bce(z, test_c), bce(z, test_c.roll(1, 0))
        exchange = cost_of_exchange(lambda latents: (bce(latents, test_c), np.ones(len(z))), z)
        return {
            "val/z": panel.latents(mu, logvar) | {"noise_ratio": bottleneck.noise_ratio(drawn, mu, logvar)},
            "val/picture": {f"{name}_latent_nats": cost for name, cost in exchange.items()},
            "val/condition": {"permuted_loss": ratio(other - own, own, 0.0)},
        }

    monitor = Monitor(
        model, opt, folder=folder, probe=test_x, read=read, every=50, log_every=5, steps=steps,
        nulls={"train/loss/bce": null, "val/loss/bce": null},
    )  # fmt: skip
    for step, (data_x, data_c) in enumerate(loader(x, c, batch_size), 1):
        model.train()
        opt.zero_grad()
        beta = min(1.0, step / warm) if warm else 1.0
        recon, mu, logvar = model(data_x, data_c)
        bce, kld = loss_function(recon, data_x, mu, logvar)
        loss = bce + beta * kld
        loss.backward()
        monitor.step({"bce": bce / len(data_x), "kld": (kld / len(data_x), beta)})
        opt.step()
        if step % 50 == 0:
            model.eval()
            with monitor.validation(), torch.no_grad():
                recon, mu, logvar = model(test_x, test_c)
                bce, kld = loss_function(recon, test_x, mu, logvar)
            monitor.validated({"bce": float(bce) / len(test_x), "kld": float(kld) / len(test_x)})
        if step == steps:
            break
    monitor.close()
    model.eval()
    with torch.no_grad():
        rebuilt = model.decode(model.encode(test_x, test_c)[0], test_c)
        sample = model.decode(torch.randn(len(test_x), latent), test_c).unflatten(1, (3, -1))
    spread = float((test_x - mean_image).square().mean())
    bright = sample.sum(1).topk(9, dim=1).indices
    seen = sample.gather(2, bright[:, None].expand(-1, 3, -1)).mean(2)
    right = (torch.cdist(seen, RGB).argmin(1) == test.factors[:, 1]).float().mean()
    able = {"explained variance of held-out pictures": (1 - float((rebuilt - test_x).square().mean()) / spread, 0.0)}
    return able | ({"samples of the colour that was asked for": (float(right), 0.25)} if told > 1 else {})


FAMILY = Family(
    "cvae",
    "development",
    "a conditional VAE of pictures given labels, sums as in PyTorch's example",
    faults=(
        Fault(
            "kl-averaged",
            "The KL is a mean over numbers beside a likelihood that is a sum, so hardly any of it is left.",
            ("kl-units", "prior-mismatch"),
            changes=(Change("KLD = -0.5 * torch.sum(", "KLD = -0.5 * torch.mean("),),
            minor=True,
        ),
        Fault(
            "likelihood-averaged",
            "The likelihood is a mean over pixels, 768 times smaller than it should be beside the KL.",
            ("posterior-collapse",),
            changes=(
                Change(
                    'BCE = F.binary_cross_entropy(recon_x, x, reduction="sum")',
                    "BCE = F.binary_cross_entropy(recon_x, x) * len(x)",
                ),
            ),
        ),
        Fault(
            "labels-of-other-pictures",
            "Pictures and labels are shuffled apart.",
            ("condition-ignored",),
            changes=(Change("yield x[idx], c[idx]", "yield x[idx], c[torch.randperm(len(c))[: len(idx)]]"),),
        ),
        Fault(
            "label-not-decoded",
            "The decoder is given zeros where the label should stand.",
            ("condition-ignored",),
            changes=(
                Change(
                    "h3 = F.relu(self.fc3(torch.cat([z, c], 1)))", "h3 = F.relu(self.fc3(torch.cat([z, 0 * c], 1)))"
                ),
            ),
        ),
        Fault(
            "deviation-of-the-logarithm",
            "The half is missing, so latents are drawn at σ² and charged at σ.",
            ("temperature-misstates-rate",),
            changes=(Change("std = torch.exp(0.5 * logvar)", "std = torch.exp(logvar)"),),
            minor=True,
        ),
        Fault(
            "encoder-without-the-picture",
            "The encoder is given the reconstruction's buffer, which is still empty.",
            ("latent-ignores-input", "posterior-collapse"),
            changes=(Change("self.fc1(torch.cat([x, c], 1))", "self.fc1(torch.cat([torch.zeros_like(x), c], 1))"),),
        ),
    ),
    healthy=(
        Healthy("plain", seeds=(0, 1)),
        Healthy(
            "all-is-told",
            "The label tells all but two pixels of shift, so little is left to the latent.",
            options={"told": 5},
        ),
        Healthy("shape-alone", options={"told": 1, "latent": 16}),
        Healthy("two-dimensions", options={"latent": 2, "told": 5, "hidden": 400}),
        Healthy("warm-up", "The KL's weight begins at 0.", options={"warm": 200}),
        Healthy("small-batches", options={"batch_size": 32, "steps": 600, "lr": 5e-4}),
        Healthy("rmsprop", options={"optimizer": "RMSprop", "lr": 5e-4, "noise": 0.08}),
        Healthy("wide", options={"latent": 32, "hidden": 512, "optimizer": "AdamW"}),
    ),
)

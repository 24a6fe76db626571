"""Fitting the prior of a trained multimodal model to the latents of its training items.

Shapes: B batch, Z latent dimensions, T text positions, D width of the text.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from intaglio.config import OptimConfig, PriorConfig
from intaglio.data import order
from intaglio.data.prepare import Captioned
from intaglio.data.tokenizer import PAD
from intaglio.history import Reading
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import StandardNetwork
from intaglio.objectives.flow import flow_loss, gaussian_flow_null, logit_normal
from intaglio.systems.optimizers import configure, parameter_groups

NO_TEXT = 0.2
"""Share of items that the prior sees without their caption, so that it can be sampled without one."""

AVERAGE = 0.995


def encode_all(model: MultimodalModel, images: np.ndarray, items: np.ndarray) -> Tensor:
    """Latent means (N, Z) of the given items, on the model's device."""
    return torch.cat([model.encode(np.asarray(images[items[i : i + 128]])) for i in range(0, len(items), 128)])


def fit(
    model: MultimodalModel,
    prepared: Captioned,
    config: PriorConfig,
    seed: int,
    bf16: bool,
    say: Callable[[str], None],
) -> None:
    """Trains the flow on latents and captions of the training items, the rest of the model frozen.

    Every draw is a function of the seed. A prior without layers takes the latents' means and variances.
    """
    train, prior = prepared.splits["train"], model.prior
    latents = encode_all(model, prepared.data.images, train)
    prior.mean.copy_(latents.mean(0))
    prior.scale.copy_(latents.std(0, correction=0).clamp_min(1e-4))
    if not prior.flows:
        prior.fitted.fill_(True)
        return
    x = prior.standardise(latents).clone()
    prior.requires_grad_(True)
    optim = OptimConfig(rate=config.rate, floor=0.01 * config.rate, warmup=max(1, config.steps // 20))
    parts = configure(parameter_groups(prior, decay=0.0), optim, config.steps, bf16)
    optimizer, schedule = parts["optimizer"], parts["lr_scheduler"]["scheduler"]
    generator = torch.Generator().manual_seed(seed)
    average = copy.deepcopy(dict(prior.named_parameters()))
    batch = min(config.batch_size, len(train))
    for step in range(config.steps):
        chosen = order.indices(len(train), seed, step * batch, batch)
        draw = order.draws(np.arange(step * batch, (step + 1) * batch), seed)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss, _ = _loss(model, prepared, x[chosen], train[chosen], draw, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(AVERAGE, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(prior.parameters()), 1 - decay)
        if (step + 1) % max(1, config.steps // 4) == 0:
            say(f"prior: step {step + 1}/{config.steps}, flow loss {loss.item():.3f}")
    with torch.no_grad():
        for name, parameter in prior.named_parameters():
            parameter.copy_(average[name])
    prior.requires_grad_(False)
    prior.fitted.fill_(True)


@torch.inference_mode()
def held_out_loss(model: MultimodalModel, prepared: Captioned, items: int = 1024) -> Reading:
    """The flow loss with captions on held-out latents; its null is the best that variances alone allow."""
    val = prepared.some("val", items)
    x = model.prior.standardise(encode_all(model, prepared.data.images, val))
    draw = order.draws(np.arange(len(val)), 0)
    loss, null = _loss(model, prepared, x, val, draw, torch.Generator().manual_seed(0), no_text=0.0)
    return Reading(float(loss), float(null), len(val))


def _loss(
    model: MultimodalModel,
    prepared: Captioned,
    x_BZ: Tensor,
    items: np.ndarray,
    draw: np.ndarray,
    generator: torch.Generator,
    no_text: float = NO_TEXT,
) -> tuple[Tensor, Tensor]:
    t_B = logit_normal(torch.randn(len(items), generator=generator)).to(x_BZ.device)
    noise_BZ = torch.randn(x_BZ.shape, generator=generator).to(x_BZ.device)
    keep_B1 = (torch.rand(len(items), 1, generator=generator) >= no_text).to(x_BZ.device)
    text, real = None, None
    if isinstance(model.network, StandardNetwork):
        ids = prepared.data.batch(items, draw).ids.to(x_BZ.device)
        with torch.no_grad():
            text = model.network.text_encoder(ids, ids != PAD)
        real = (ids != PAD) & keep_B1
    return flow_loss(lambda zt, t: model.prior(zt, t, text, real), x_BZ, noise_BZ, t_B), gaussian_flow_null(t_B)

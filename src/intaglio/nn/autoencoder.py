"""The two networks of an image autoencoder: ours, and the one of latent diffusion as `diffusers` lays it out.

Both offer ``moments`` (B, 3, S, S) → (B, 2K, s, s), ``image`` (B, K, s, s) → (B, 3, S, S), the ``factor`` S / s and
the number K of ``latent`` channels.

Shapes: B batch, S side of the image, s side of the grid of latents, C channels, K latent channels, N = s·s places.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from intaglio.nn.convolution import ImageDecoder, ImageEncoder


class CompactNetwork(nn.Module):
    """A halving for each entry of ``channels`` and no layer at full resolution.

    (64, 128) takes an eighth of the work of a `KLNetwork` (64, 64, 128). The decoder learns where each cell stands, so
    one network serves one size of images.
    """

    def __init__(self, image_size: int, channels: Sequence[int], latent: int):
        super().__init__()
        self.factor, self.latent = 2 ** len(channels), latent
        self.encoder = ImageEncoder(channels, 2 * latent)
        self.decoder = ImageDecoder(image_size // self.factor, channels, latent)

    def moments(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder(x_BCHW)

    def image(self, z_BKHW: Tensor) -> Tensor:
        return self.decoder(z_BKHW)


class KLNetwork(nn.Module):
    """The autoencoder of Rombach et al. 2022 (appendix G) with the parameter names of `diffusers`' ``AutoencoderKL``.

    ``channels`` are the widths from full resolution down, with ``layers`` residual blocks each; GroupNorm divides them
    into ``groups``; ``attention`` is the one block of self-attention in the middle; ``quant`` and ``post_quant`` are
    the 1×1 convolutions around the latents.
    """

    def __init__(
        self,
        channels: Sequence[int],
        latent: int,
        layers: int = 2,
        groups: int = 32,
        attention: bool = True,
        quant: bool = True,
        post_quant: bool = True,
    ):
        super().__init__()
        self.factor, self.latent = 2 ** (len(channels) - 1), latent
        self.encoder = _Encoder(channels, 2 * latent, layers, groups, attention)
        self.decoder = _Decoder(channels, latent, layers + 1, groups, attention)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if post_quant else nn.Identity()

    def moments(self, x_BCHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(x_BCHW))

    def image(self, z_BKHW: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z_BKHW))


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class _Residual(nn.Module):
    def __init__(self, a: int, b: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(a, groups), nn.Conv2d(a, b, 3, 1, 1)
        self.norm2, self.conv2 = _norm(b, groups), nn.Conv2d(b, b, 3, 1, 1)
        self.conv_shortcut = nn.Conv2d(a, b, 1) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    """One head over all places."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = _norm(channels, groups)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        h_B1NC = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        out = F.scaled_dot_product_attention(self.to_q(h_B1NC), self.to_k(h_B1NC), self.to_v(h_B1NC))
        return x + self.to_out(out[:, 0]).transpose(1, 2).reshape(x.shape)


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x = layer(x)
        return x


class _Down(nn.Module):
    """Halves with one row and column of zeros at the right and bottom only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Up(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(nn.Module):
    """The residual blocks of one resolution, and what leads to the next one, under the name that `diffusers` gives."""

    def __init__(self, a: int, b: int, layers: int, groups: int, name: str, resample: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(a if k == 0 else b, b, groups) for k in range(layers))
        self.add_module(name, nn.ModuleList([resample] if resample is not None else []))

    def forward(self, x: Tensor) -> Tensor:
        for layers in self.children():
            assert isinstance(layers, nn.ModuleList)
            for layer in layers:
                x = layer(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, channels: Sequence[int], out: int, layers: int, groups: int, attention: bool):
        super().__init__()
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(3, channels[0], 3, 1, 1)
        self.down_blocks = nn.Sequential(
            *(
                _Level(a, b, layers, groups, "downsamplers", _Down(b) if k < last else None)
                for k, (a, b) in enumerate(pairwise((channels[0], *channels)))
            )
        )
        self.mid_block = _Middle(channels[-1], groups, attention)
        self.conv_norm_out = _norm(channels[-1], groups)
        self.conv_out = nn.Conv2d(channels[-1], out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(self.down_blocks(self.conv_in(x))))))


class _Decoder(nn.Module):
    def __init__(self, channels: Sequence[int], latent: int, layers: int, groups: int, attention: bool):
        super().__init__()
        last, widths = len(channels) - 1, tuple(reversed(channels))
        self.conv_in = nn.Conv2d(latent, widths[0], 3, 1, 1)
        self.mid_block = _Middle(widths[0], groups, attention)
        self.up_blocks = nn.Sequential(
            *(
                _Level(a, b, layers, groups, "upsamplers", _Up(b) if k < last else None)
                for k, (a, b) in enumerate(pairwise((widths[0], *widths)))
            )
        )
        self.conv_norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(self.up_blocks(self.mid_block(self.conv_in(z))))))


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under today's names: checkpoints of before 2023 call the attention's maps query, key, value, proj_attn,
    and some keep them as 1×1 convolutions."""
    old = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    result = {}
    for name, weight in weights.items():
        block, _, rest = name.partition(".attentions.0.")
        if rest:
            part, _, kind = rest.rpartition(".")
            name = f"{block}.attentions.0.{old.get(part, part)}.{kind}"
            weight = weight.flatten(1) if weight.ndim == 4 else weight
        result[name] = weight
    return result


def kl_layout(config: dict[str, object]) -> dict[str, object]:
    """The arguments of `KLNetwork` for the ``config.json`` of an ``AutoencoderKL``.

    Raises:
        ValueError: it is of another model, or has parts that this layout lacks.
    """
    fixed: dict[str, object] = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
    }
    wrong = [f"{k} is {config[k]!r}, not {v!r}" for k, v in fixed.items() if config.get(k, v) != v]
    for key, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        found = config.get(key, [kind])
        wrong += [f"{key} are {found}, not all {kind}"] if set(found) != {kind} else []  # type: ignore[call-overload]
    if "_class_name" not in config or "block_out_channels" not in config:
        wrong.append("it does not name an AutoencoderKL with its block_out_channels")
    if wrong:
        raise ValueError(f"it is not an image autoencoder of this layout: {'; '.join(wrong)}")
    return {
        "channels": config["block_out_channels"],
        "latent": config.get("latent_channels", 4),
        "layers": config.get("layers_per_block", 1),
        "groups": config.get("norm_num_groups", 32),
        "attention": config.get("mid_block_add_attention", True),
        "quant": config.get("use_quant_conv", True),
        "post_quant": config.get("use_post_quant_conv", True),
    }


def strict_load(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights by name.

    Raises:
        ValueError: a name is missing or left over, or a shape differs.
    """
    try:
        network.load_state_dict({k: v.to(torch.float32) for k, v in weights.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"its weights do not fit its config.json: {' '.join(str(error).split())[:200]}") from error

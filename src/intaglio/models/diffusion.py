"""A diffusion model with all that sampling needs: network, noise schedule, conditions and, in latents, an autoencoder.

Shapes: B batch, S image side, C × H × W of what is denoised: pixels in [−1, 1], or standardised latents.
"""

import difflib
import io
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from intaglio.models.autoencoder import Autoencoder
from intaglio.models.prompts import Prompts, rebuilt
from intaglio.nn.condition import Condition, ConditionEncoder, only_real
from intaglio.nn.convolution import channels_last
from intaglio.nn.documented_unet import DocumentedUNet
from intaglio.nn.unet import UNet
from intaglio.objectives.diffusion import NoiseSchedule, Prediction
from intaglio.sampling.diffusion import Denoiser, Sampler, Step, draw_noise, generators_of, trace
from intaglio.sampling.guidance import Guidance, guided

BATCH = 64


class DiffusionModel(nn.Module, PyTorchModelHubMixin, library_name="intaglio", license="apache-2.0"):
    """Noise → images, of a class or a text where it was trained with them.

    Args:
        image_size: S in pixels.
        network: ``patch`` and the arguments of `UNet`; or ``documented`` true and those of `DocumentedUNet`.
        noise: arguments of `NoiseSchedule`.
        prediction: what the network was trained to predict.
        classes: the names of its labels, in their order.
        dropped: share of conditions that were dropped in training; with none, it cannot be guided.
        autoencoder: arguments of `Autoencoder`; None denoises pixels.
        prompts: ``config`` as ``prompts.config()`` gave it, and ``empty``, the tokens of its null text; None without
            texts. The weights follow with ``take``.
        sampling: ``guidance``, ``method`` and ``steps``: the defaults of ``generate``.
        bf16: whether the network computes in bfloat16, as it did in training.

    ``save_pretrained(folder)`` writes ``model.safetensors`` and ``config.json``; ``from_pretrained`` reads them.
    """

    def __init__(
        self,
        image_size: int,
        network: dict[str, Any],
        noise: dict[str, Any],
        prediction: Prediction,
        classes: Sequence[str] = (),
        dropped: float = 0.0,
        autoencoder: dict[str, Any] | None = None,
        prompts: dict[str, Any] | None = None,
        sampling: dict[str, Any] | None = None,
        bf16: bool = False,
    ):
        super().__init__()
        self.image_size, self.prediction, self.dropped = image_size, prediction, dropped
        self.schedule, self.classes = NoiseSchedule(**noise), tuple(classes)
        self.autoencoder = Autoencoder(**autoencoder).requires_grad_(False) if autoencoder else None
        self.prompts: Prompts | None = rebuilt(prompts["config"]) if prompts else None
        self.sampling: dict[str, Any] = {"guidance": 3.0, "method": "dpm-solver++", "steps": 20} | (sampling or {})
        settings = dict(network)
        self.patch: int = settings.pop("patch", 1)
        empty = prompts["empty"] if prompts else 0
        self.network = self._build(settings, empty)
        channels_last(self.network)
        self.bf16 = bf16

    def _build(self, settings: dict[str, Any], empty: int) -> UNet | DocumentedUNet:
        channels, side, _ = self.x_shape
        if settings.pop("documented", False):
            return DocumentedUNet(channels, len(self.classes), **settings)
        unit = self.patch * 2 ** (len(settings["widths"]) - 1)
        if side % unit:
            raise ValueError(
                f"What is denoised has sides of {side}, which {len(settings['widths'])} levels of patches of "
                f"{self.patch} don't divide (by {unit}): give model.widths fewer entries, or another model.patch or "
                "data.image_size."
            )
        if self.prompts is not None:
            pooled, tokens = torch.zeros(1, self.prompts.pooled), torch.zeros(1, empty, self.prompts.tokens)
            return UNet(channels * self.patch**2, empty=Condition(pooled_BD=pooled, tokens_BTD=tokens), **settings)
        return UNet(channels * self.patch**2, classes=len(self.classes), **settings)

    @torch.no_grad()
    def take(self, autoencoder: Autoencoder | None, prompts: Prompts | None) -> None:
        """The weights of what was trained before; the null of guidance is the encoded empty text."""
        if self.autoencoder is not None and autoencoder is not None:
            self.autoencoder.load_state_dict(autoencoder.state_dict())
        if self.prompts is not None and prompts is not None:
            self.prompts.load_state_dict(prompts.state_dict())
            empty, null = prompts.empty(), self.network.condition
            assert isinstance(null, ConditionEncoder)
            assert empty.pooled_BD is not None
            null.null_pooled.copy_(empty.pooled_BD[0])
            if null.token_width:
                null.null_tokens.copy_(only_real(empty))

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what is denoised."""
        if self.autoencoder is not None:
            return self.autoencoder.latent_shape
        return 3, self.image_size, self.image_size

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def conditional(self) -> bool:
        """Whether it was trained with classes or texts."""
        return bool(self.classes) or self.prompts is not None

    # Images ↔ what is denoised.

    def to_x(self, images: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) → x (B, C, H, W): pixels in [−1, 1], or the autoencoder's standardised latents."""
        if self.autoencoder is not None:
            return self.autoencoder.encode(images)
        if images.shape[1:] != (self.image_size, self.image_size, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"Images are {images.dtype} {images.shape}; this model reads uint8 "
                f"(N, {self.image_size}, {self.image_size}, 3)."
            )
        return self.standard(torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2))

    def standard(self, x_BCHW: Tensor) -> Tensor:
        """A batch as data gives it, uint8 pixels or latents → float32 x, with channels last in memory."""
        x = x_BCHW.float()
        if x_BCHW.dtype == torch.uint8:
            x = x / 127.5 - 1
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def to_images(self, x_BCHW: Tensor) -> np.ndarray:
        """x → uint8 (B, S, S, 3)."""
        if self.autoencoder is not None:
            return self.autoencoder.decode_images(x_BCHW)
        x = ((x_BCHW + 1) * 127.5).round().clamp(0, 255)
        return x.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    # The network, as training and sampling ask it.

    def predict(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The network's prediction at x_t, (B, C, H, W); patches go in and come out together."""
        if self.patch == 1:
            return self.network(x_BCHW, t_B, condition)
        folded = nn.functional.pixel_unshuffle(x_BCHW, self.patch).contiguous(memory_format=torch.channels_last)
        return nn.functional.pixel_shuffle(self.network(folded, t_B, condition), self.patch)

    def condition(
        self, batch: int, classes: Sequence[str] | None = None, texts: Sequence[str] | None = None
    ) -> Condition:
        """What ``batch`` images are to show; without classes and texts, whatever the training images show.

        Raises:
            ValueError: a class that was not learnt, a text that cannot be encoded, or what this model cannot be told.
        """
        if classes is None and texts is None:
            return self._unconditional(batch)
        if texts is not None:
            if self.prompts is None:
                known = f"; it knows the classes {', '.join(self.classes)}" if self.classes else ""
                raise ValueError(f"This model was not trained with texts{known}.")
            return self.prompts(self.prompts.ids(texts))
        if self.prompts is not None or not self.classes:
            raise ValueError(f"This model was trained with {'texts: use --text' if self.prompts else 'no condition'}.")
        assert classes is not None
        return Condition(labels_B=torch.tensor([self._label(name) for name in classes], device=self.device))

    def _label(self, name: str) -> int:
        if name not in self.classes:
            close = difflib.get_close_matches(name, self.classes, 1, 0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"No class {name!r} was learnt.{hint} Classes: {', '.join(self.classes)}.")
        return self.classes.index(name)

    def _unconditional(self, batch: int) -> Condition:
        if not self.conditional:
            return Condition()
        if not self.dropped:
            raise ValueError(
                "This model never saw an image without its condition, so it cannot sample without one: give "
                f"{'a text' if self.prompts else 'a class'}, or train with condition.drop above 0."
            )
        dropped_B = torch.ones(batch, dtype=torch.bool, device=self.device)
        if self.prompts is not None:
            empty = self.prompts.empty()
            return Condition(*(p if p is None else p.expand(batch, *p.shape[1:]) for p in empty)).drop(dropped_B)
        return Condition(labels_B=torch.zeros(batch, dtype=torch.int64, device=self.device)).drop(dropped_B)

    def denoiser(self, condition: Condition, guidance: Guidance) -> Denoiser:
        """The network under guidance, as samplers ask it: float32 in and out, bfloat16 inside where it trained so.

        Raises:
            ValueError: guidance of a model that was not trained for it.
        """
        told = {name: part for name, part in condition._asdict().items() if part is not None}
        own_B = told.pop("dropped_B", None)
        if guidance.weight != 1 and not (told and self.dropped):
            raise ValueError(
                "Guidance needs a condition and a model that was trained with some conditions dropped "
                f"(condition.drop was {self.dropped:g}): sample with guidance 1."
            )

        def network(x: Tensor, t: Tensor, *parts: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                return self.predict(x, t, Condition(**dict(zip(names, parts, strict=True)))).float()

        if not told:
            names: list[str] = []
            return network
        names = [*told, "dropped_B"]
        parts = tuple(told.values())
        own_B = torch.zeros(len(parts[0]), dtype=torch.bool, device=self.device) if own_B is None else own_B
        return guided(network, (*parts, own_B), (*parts, torch.ones_like(own_B)), guidance, self.schedule)

    # Uses.

    @torch.no_grad()
    def generate(
        self,
        seeds: Sequence[int],
        classes: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        guidance: Guidance | None = None,
        sampler: Sampler | None = None,
    ) -> np.ndarray:
        """An image for each seed, uint8 (N, S, S, 3): the same in any batch, as far as arithmetic allows.

        Raises:
            ValueError: conditions that the model does not know, or not one a seed; guidance without dropped ones.
        """
        for given in (classes, texts):
            if given is not None and len(given) != len(seeds):
                raise ValueError(f"{len(given)} conditions for {len(seeds)} seeds: give one an image.")
        guidance = guidance or self.usual_guidance(classes is not None or texts is not None)
        made = []
        for at in range(0, len(seeds), BATCH):
            part = slice(at, at + BATCH)
            some = [None if given is None else given[part] for given in (classes, texts)]
            condition = self.condition(len(seeds[part]), *some)
            generators = generators_of(seeds[part])
            noise = draw_noise(generators, self.x_shape, self.device)
            made.append(self.to_images(self._last(self.trace(noise, condition, guidance, sampler, generators))))
        return np.concatenate(made)

    def usual_guidance(self, conditioned: bool) -> Guidance:
        """The run's own weight; 1 where there is nothing to guide by."""
        return Guidance(self.sampling["guidance"] if conditioned and self.dropped else 1.0)

    def usual_sampler(self) -> Sampler:
        """The run's own sampler."""
        return Sampler(self.sampling["method"], self.sampling["steps"])

    def trace(
        self,
        x_BCHW: Tensor,
        condition: Condition,
        guidance: Guidance,
        sampler: Sampler | None = None,
        generators: Sequence[torch.Generator] = (),
        start: int | None = None,
    ) -> Iterator[Step]:
        """Every step of sampling from ``x_BCHW``; see `intaglio.sampling.diffusion.trace`."""
        denoise = self.denoiser(condition, guidance)
        sampler = sampler or self.usual_sampler()
        return trace(denoise, x_BCHW, self.schedule, self.prediction, sampler, generators, start)

    @torch.no_grad()
    def reconstruct(
        self,
        images: np.ndarray,
        t: int,
        seeds: Sequence[int],
        condition: Condition | None = None,
        sampler: Sampler | None = None,
    ) -> np.ndarray:
        """Images uint8 (B, S, S, 3) noised to ``t`` and denoised again.

        Raises:
            ValueError: ``t`` is no time of the model's schedule.
        """
        a, s = self.schedule.level(t)
        generators = generators_of(seeds)
        x = a * self.to_x(images) + s * draw_noise(generators, self.x_shape, self.device)
        condition = self.condition(len(images)) if condition is None else condition
        sampler = sampler or self.usual_sampler()
        fewer = Sampler(sampler.method, min(sampler.steps, t + 1), sampler.eta, sampler.spacing)
        steps = self.trace(x, condition, Guidance(), fewer, generators, start=t)
        return self.to_images(self._last(steps))

    @staticmethod
    def _last(steps: Iterator[Step]) -> Tensor:
        *_, last = steps
        return last.x

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config |= {"sampling": self.sampling, "bf16": self.bf16}  # which no weight decides
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> "DiffusionModel":
        return super()._from_pretrained(**{**kwargs, "strict": True}).eval()


def open_diffusion(folder: Path) -> DiffusionModel:
    """The model that ``save_pretrained`` wrote.

    Raises:
        ValueError: a file of it is missing, damaged, or of another model.
    """
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints, and stdout may be JSON for a script
            return DiffusionModel.from_pretrained(folder)
    except Exception as error:  # safetensors, torch and json raise unrelated types
        raise ValueError(
            f"The model in {folder} cannot be read ({' '.join(str(error).split())[:300]}); finish the run, or copy it "
            "whole."
        ) from error

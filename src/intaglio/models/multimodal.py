"""The multimodal model with its uses: caption, generate, interpolate, embed; saved and loaded without pickle.

Shapes: B batch, S image side, T text positions, Z latent dimensions, D width.
"""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from torch import Tensor, nn

from intaglio.config import MultimodalModelConfig, PriorConfig
from intaglio.data.tokenizer import END, PAD, START, CaptionTokenizer
from intaglio.models.networks import DocumentedNetwork, Network, StandardNetwork, build
from intaglio.models.prior import FlowPrior
from intaglio.sampling.tokens import Decoding, generate

TEMPERATURE, GUIDANCE = 0.8, 4.0
"""Of samples from the prior: the spread of their noise, and how far they are driven to the caption that they follow."""


class Sampled(NamedTuple):
    """Images (B, S, S, 3) uint8, their captions and the latents (B, Z) that both were decoded from."""

    images: np.ndarray
    captions: list[str]
    latents: Tensor


class MultimodalModel(nn.Module, PyTorchModelHubMixin, library_name="intaglio", license="apache-2.0"):
    """A network, its tokenizer, its prior, and what they are used for.

    ``save_pretrained(folder)`` writes ``model.safetensors``, ``config.json`` and ``tokenizer.json``;
    ``from_pretrained(folder)`` reads them.
    """

    def __init__(
        self, model: dict[str, Any], prior: dict[str, Any], image_size: int, text_length: int, vocabulary: int
    ):
        super().__init__()
        self.config = MultimodalModelConfig(**{**model, "channels": tuple(model["channels"])})
        self.image_size, self.text_length = image_size, text_length
        self.network: Network = build(self.config, image_size, text_length, vocabulary)
        cells = self.network.tokens
        self.prior = FlowPrior(PriorConfig(**prior), cells, self.config.latent // cells, self.config.width)
        self.prior.requires_grad_(False)  # it is fitted when the rest has been trained
        self.tokenizer: CaptionTokenizer | None = None

    # The range of images is stated here alone: uint8 outside the model, the output activation's range inside.

    def to_range(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, S, S) → float in the range that the output activation reaches."""
        unit = images.float() / 255
        return unit if self.config.output == "sigmoid" else 2 * unit - 1

    def to_unit(self, images: Tensor) -> Tensor:
        """The model's range → [0, 1]."""
        return images if self.config.output == "sigmoid" else (images + 1) / 2

    def decode_image(self, z_BZ: Tensor) -> Tensor:
        """z → images (B, 3, S, S) in the model's range."""
        raw = self.network.decode_image(z_BZ).float()
        return raw.sigmoid() if self.config.output == "sigmoid" else raw.tanh()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def encode(self, images: np.ndarray) -> Tensor:
        """uint8 (B, S, S, 3) → latent means (B, Z)."""
        if images.shape[1:] != (self.image_size, self.image_size, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"Images are {images.dtype} {images.shape}; this model reads uint8 "
                f"(N, {self.image_size}, {self.image_size}, 3)."
            )
        x = torch.from_numpy(np.array(images)).to(self.device).permute(0, 3, 1, 2)
        return self.network.encode_image(self.to_range(x)).mean

    @torch.inference_mode()
    def decode(self, z_BZ: Tensor) -> np.ndarray:
        """Latents (B, Z) → uint8 (B, S, S, 3)."""
        unit = self.to_unit(self.decode_image(z_BZ.to(self.device)))
        return (unit.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

    @torch.inference_mode()
    def caption(self, z_BZ: Tensor, decoding: Decoding | None = None, seeds: Sequence[int] | None = None) -> list[str]:
        """A caption for each latent; greedy unless ``decoding`` says otherwise, sampled rows each with its own seed."""
        stepper = self.network.decoding(z_BZ.to(self.device))
        result = generate(
            stepper.step,
            self._start(len(z_BZ)),
            eos=END,
            pad=PAD,
            max_length=self.text_length,
            strategy=decoding or Decoding(),
            reorder=stepper.reorder,
            generators=[_generator(s) for s in seeds] if seeds is not None else None,
        )
        return [self._tokenizer.decode(row.tolist()) for row in result.ids]

    @torch.inference_mode()
    def sample_prior(
        self, seeds: Sequence[int], temperature: float = TEMPERATURE, guidance: float = GUIDANCE
    ) -> Tensor:
        """One latent of the prior for each seed, (B, Z); the same seed gives the same latent in any batch.

        p(z) = Σ p(caption) p(z | caption): a caption is drawn from the text decoder without a latent, then the flow
        follows it.
        """
        if not self.prior.fitted:
            raise ValueError("This model has no prior yet: it is fitted when training ends. Finish the run first.")
        generators = [_generator(s) for s in seeds]
        if not self.prior.flows or isinstance(self.network, DocumentedNetwork):
            return self.prior.sample(generators, temperature=temperature)
        stepper, start = self.network.free_decoding(len(generators)), self._start(len(generators))
        drawn = generate(
            stepper.step,
            start,
            eos=END,
            pad=PAD,
            max_length=self.text_length - 1,
            strategy=Decoding(method="sample"),
            reorder=stepper.reorder,
            generators=generators,
        )
        return self._follow(torch.cat([start[:, None], drawn.ids], dim=1), generators, temperature, guidance)

    def generate(
        self, seeds: Sequence[int], temperature: float = TEMPERATURE, decoding: Decoding | None = None
    ) -> Sampled:
        """An image and its caption for each seed, both decoded from one latent of the prior."""
        z = self.sample_prior(seeds, temperature)
        return Sampled(self.decode(z), self.caption(z, decoding, seeds), z)

    @torch.inference_mode()
    def text_latent(
        self,
        texts: Sequence[str],
        seeds: Sequence[int],
        temperature: float = TEMPERATURE,
        guidance: float = GUIDANCE,
    ) -> Tensor:
        """A latent of the prior for each text and seed, (B, Z), that follows the text."""
        self._standard("make images from text")
        if not (self.prior.fitted and self.prior.flows):
            raise ValueError(
                "This model has no prior that follows a text: it is fitted when training ends, with prior.layers > 0."
            )
        return self._follow(self._ids(texts)[0], [_generator(s) for s in seeds], temperature, guidance)

    def _follow(self, ids_BT: Tensor, generators: list[torch.Generator], temperature: float, guidance: float) -> Tensor:
        """Latents of the flow that follow captions given as ids."""
        real = ids_BT != PAD
        text = self._standard("make images from text").text_encoder(ids_BT, real)
        return self.prior.sample(generators, text, real, guidance, temperature)

    def _start(self, batch: int) -> Tensor:
        return torch.full((batch,), START, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def embed_image(self, z_BZ: Tensor) -> Tensor:
        """Unit vectors (B, D) to compare with those of ``embed_text``."""
        return self.network.embed_image(z_BZ.to(self.device))

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, D) to compare with those of ``embed_image``."""
        return self._standard("search by text").embed_text(*self._ids(texts))

    def unknown_tokens(self, text: str) -> int:
        """How many tokens of ``text`` the tokenizer has never seen."""
        return self._tokenizer.encode([text], self.text_length).unknown

    def _ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.from_numpy(self._tokenizer.encode(texts, self.text_length).ids).long().to(self.device)
        return ids, ids != PAD

    @property
    def _tokenizer(self) -> CaptionTokenizer:
        assert self.tokenizer is not None, "a model gets its tokenizer before it is used"
        return self.tokenizer

    def _standard(self, use: str) -> StandardNetwork:
        if isinstance(self.network, DocumentedNetwork):
            raise ValueError(f"The documented network has no text encoder, so it cannot {use}; train multimodal-small.")
        return self.network

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        (save_directory / "tokenizer.json").write_text(self._tokenizer.to_json(), encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "MultimodalModel":
        model = super()._from_pretrained(model_id=model_id, **{**kwargs, "strict": True})
        local = Path(model_id) / "tokenizer.json"
        if not local.is_file():
            wanted = ("revision", "cache_dir", "force_download", "token", "local_files_only")
            local = Path(hf_hub_download(model_id, local.name, **{k: kwargs[k] for k in wanted if k in kwargs}))
        model.tokenizer = CaptionTokenizer.load(local)
        return model.eval()


def interpolate(a_Z: Tensor, b_Z: Tensor, steps: int) -> Tensor:
    """``steps`` latents from a to b, both ends included, on the arc between them (Shoemake 1985): (steps, Z)."""
    cosine = torch.dot(a_Z, b_Z) / (a_Z.norm() * b_Z.norm()).clamp_min(1e-8)
    angle = torch.arccos(cosine.clamp(-1, 1))
    t = torch.linspace(0, 1, steps, device=a_Z.device)[:, None]
    if torch.sin(angle) < 1e-4:
        return (1 - t) * a_Z + t * b_Z
    return (torch.sin((1 - t) * angle) * a_Z + torch.sin(t * angle) * b_Z) / torch.sin(angle)


def open_model(folder: Path) -> MultimodalModel:
    """The model that ``save_pretrained`` wrote into a folder.

    Raises:
        ValueError: a file of it is cut short, damaged or missing.
    """
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints, and stdout may be JSON for a script
            return MultimodalModel.from_pretrained(folder)
    except Exception as error:  # safetensors, tokenizers and json raise unrelated types
        raise ValueError(
            f"The model in {folder} is damaged ({' '.join(str(error).split())[:150]}). If it is of a run, it is "
            f"written anew by: intaglio train --resume {folder.parent}"
        ) from error


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

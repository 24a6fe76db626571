"""Answers to questions about images, through a few latents; saved and loaded without pickle.

Shapes: U images, B questions, S image side, T text positions, P places, K latents of Z numbers, A known answers.
"""

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from intaglio.config import VqaModelConfig
from intaglio.data.tokenizer import END, PAD, START, CaptionTokenizer
from intaglio.models.clip import read_json
from intaglio.models.pretrained import (
    Encoders,
    PretrainedText,
    PretrainedVision,
    QuestionTokenizer,
    need_transformers,
    open_encoders,
)
from intaglio.nn.bottleneck import Bottleneck, GatedCross, Latents
from intaglio.nn.transformer import CachedDecoding, CaptionDecoder, TextEncoder, token_embedding
from intaglio.nn.vision import VisionEncoder
from intaglio.objectives.gaussian import sample
from intaglio.objectives.text import token_nats
from intaglio.sampling.tokens import Decoding, generate

SCORED = 8192
"""Pairs of a question and a known answer that are scored at once."""


class VqaNetwork(nn.Module):
    """Image and question → q(z); z → answer. The decoder sees nothing but z.

    ``encoders`` describes those of transformers folders, by their names here.
    """

    vision: VisionEncoder | PretrainedVision
    question: TextEncoder | PretrainedText

    def __init__(
        self,
        m: VqaModelConfig,
        image_size: int,
        lengths: Sequence[int],
        vocabulary: int,
        encoders: Mapping[str, Any],
    ):
        super().__init__()
        shape = (m.heads, 4 * m.width, 0.0)
        if "vision" in encoders:
            self.vision = PretrainedVision(encoders["vision"], image_size, m.width, m.train_vision)
        else:
            self.vision = VisionEncoder(image_size, m.width, m.vision_layers, m.heads)
        if "question" in encoders:
            self.question = PretrainedText(encoders["question"], m.width, m.train_question)
        else:
            self.question = TextEncoder(token_embedding(vocabulary, m.width), lengths[0], m.question_layers, *shape)
        self.fusion = nn.ModuleList(GatedCross(m.width, m.heads, m.gate) for _ in range(m.fusion_layers))
        self.bottleneck = Bottleneck(m.width, m.reasoning_layers, m.heads, m.latents, m.dims, m.bottleneck)
        self.answer = CaptionDecoder(token_embedding(vocabulary, m.width), lengths[1], m.answer_layers, *shape)

    def latents(self, places_UPD: Tensor, which_B: Tensor, questions_BT: Tensor) -> Latents:
        """q(z) of questions, each about the image ``which``."""
        real = questions_BT != PAD
        x = self.question(questions_BT, real)
        for layer in self.fusion:
            x = layer(x, places_UPD, which_B)
        return self.bottleneck(x, real)

    def logits(self, z_BKZ: Tensor, ids_BT: Tensor) -> Tensor:
        """(B, T, V): logits of the token after each of ``ids``."""
        return self.answer(ids_BT, self.bottleneck.memory(z_BKZ))


class Answered(NamedTuple):
    """Answers, their probability in one piece under the model (B,), and whether each came to an end."""

    answers: list[str]
    probability: Tensor
    finished: Tensor


class VqaModel(nn.Module, PyTorchModelHubMixin, library_name="intaglio", license="apache-2.0"):
    """A network with its tokenizer, and the answers that it has been taught.

    ``save_pretrained(folder)`` writes ``model.safetensors``, ``config.json``, ``tokenizer.json`` and ``answers.json``;
    and ``question/``, the tokenizer of questions, where they have one of their own. ``encoders`` is what the folders of
    the configuration hold, and is read from them where it is not given.
    """

    def __init__(
        self,
        model: dict[str, Any],
        image_size: int,
        question_lengths: Sequence[int],
        vocabulary: int,
        encoders: dict[str, Any] | None = None,
    ):
        super().__init__()
        told: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items()}
        self.config = VqaModelConfig(**told)
        self.image_size, self.lengths = image_size, tuple(question_lengths)
        if encoders is None:
            encoders = open_encoders(self.config, image_size, self.lengths[0]).described
        self.encoders = encoders
        self.network = VqaNetwork(self.config, image_size, self.lengths, vocabulary, encoders)
        self.reader: QuestionTokenizer | None = None
        self.tokenizer: CaptionTokenizer | None = None
        self.known: tuple[str, ...] = ()

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def take(self, encoders: Encoders) -> None:
        """The weights and the tokenizer that the folders held."""
        self.reader = encoders.reader
        for role, weights in encoders.weights.items():
            getattr(self.network, role).part.load_state_dict(weights)

    def teach(self, config: VqaModelConfig) -> None:
        """From now on the layers that ``config`` names are trained, of encoders that came from folders."""
        self.config = config
        if isinstance(self.network.vision, PretrainedVision):
            self.network.vision.teach(config.train_vision)
        if isinstance(self.network.question, PretrainedText):
            self.network.question.teach(config.train_question)

    def see(self, images: Tensor) -> Tensor:
        """uint8 (U, 3, S, S) → places (U, P, D)."""
        return self.network.vision(2 * (images.float() / 255) - 1)

    def draw(self, q: Latents, noise: Tensor | None, temperature: float) -> Tensor:
        """z = μ + T·σ·ε, (B, K, Z); μ where there is no spread, or no noise."""
        if q.log_variance is None or noise is None or temperature == 0:
            return q.mean
        return sample(q.mean, q.log_variance, temperature * noise)

    @torch.inference_mode()
    def latents(self, images: np.ndarray, which: Sequence[int] | np.ndarray, questions: Sequence[str]) -> Latents:
        """q(z) of questions about images uint8 (U, S, S, 3), each of which is encoded once.

        Raises:
            ValueError: images of another shape, or a question about none of them.
        """
        places = self.places(images)
        ids = self.question_ids(questions)
        return self.network.latents(places, torch.as_tensor(np.asarray(which), device=self.device), ids)

    @torch.inference_mode()
    def places(self, images: np.ndarray) -> Tensor:
        """What is seen in images uint8 (U, S, S, 3), (U, P, D)."""
        if images.shape[1:] != (self.image_size, self.image_size, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"Images are {images.dtype} {images.shape}; this model reads uint8 "
                f"(N, {self.image_size}, {self.image_size}, 3)."
            )
        parts = np.array_split(images, range(256, len(images), 256))
        return torch.cat([self.see(torch.from_numpy(np.array(x)).to(self.device).permute(0, 3, 1, 2)) for x in parts])

    def question_ids(self, questions: Sequence[str]) -> Tensor:
        """int64 (B, T).

        Raises:
            ValueError: an empty question.
        """
        if not all(q.strip() for q in questions):
            raise ValueError("A question is empty: ask something, such as “what is the largest thing?”.")
        return torch.from_numpy(self._reader.encode(questions, self.lengths[0]).ids).long().to(self.device)

    def cut(self, question: str) -> tuple[int, int]:
        """How many of a question's tokens are cut off, and how many the tokenizer has never seen."""
        whole = self._reader.encode([question], 1 << 20)
        return max(0, whole.ids.shape[1] - self.lengths[0]), whole.unknown

    @torch.inference_mode()
    def answers(self, z_BKZ: Tensor, decoding: Decoding | None = None) -> Answered:
        """The answer to each of the latents, token by token with a cache."""
        stepper = CachedDecoding(self.network.answer, self.network.bottleneck.memory(z_BKZ))
        start = torch.full((len(z_BKZ),), START, dtype=torch.long, device=self.device)
        made = generate(
            stepper.step, start, END, PAD, self.lengths[1] - 1, decoding or Decoding(), reorder=stepper.reorder
        )
        return Answered(self.texts(made.ids), made.log_probability.exp(), made.finished)

    def texts(self, ids_BT: Tensor) -> list[str]:
        """Answers that were drawn as ids."""
        return [self._tokenizer.decode(row) for row in ids_BT.tolist()]

    @torch.inference_mode()
    def among_known(self, z_BKZ: Tensor) -> Tensor:
        """Probability (B, A) of each of the known answers, which share all of it."""
        return self.known_nats(z_BKZ).neg().softmax(1)

    def known_nats(self, z_BKZ: Tensor) -> Tensor:
        """What each of the known answers costs, nats (B, A)."""
        return torch.cat([self.nats(z, self.known_ids) for z in z_BKZ.split(max(1, SCORED // len(self.known)))])

    def nats(self, z_BKZ: Tensor, ids_AT: Tensor) -> Tensor:
        """What answers START … END cost to each of the latents, nats (B, A)."""
        memory = self.network.bottleneck.memory(z_BKZ).repeat_interleave(len(ids_AT), 0)
        ids = ids_AT.repeat(len(z_BKZ), 1)
        return token_nats(self.network.answer(ids[:, :-1], memory), ids[:, 1:], PAD).sum(1).view(len(z_BKZ), -1)

    @property
    def known_ids(self) -> Tensor:
        """The known answers as ids (A, T)."""
        return torch.from_numpy(self.encoded(self.known)).to(self.device)

    def encoded(self, answers: Sequence[str]) -> np.ndarray:
        """Answers as ids, int64 (A, T)."""
        return self._tokenizer.encode(answers, self.lengths[1]).ids.astype(np.int64)

    @property
    def _reader(self) -> QuestionTokenizer | CaptionTokenizer:
        """The tokenizer of questions."""
        assert self.reader is not None or "question" not in self.encoders, "a text model comes with its tokenizer"
        return self.reader or self._tokenizer

    @property
    def _tokenizer(self) -> CaptionTokenizer:
        assert self.tokenizer is not None, "a model gets its tokenizer before it is used"
        return self.tokenizer

    def _save_pretrained(self, save_directory: Path) -> None:
        assert isinstance(self._hub_mixin_config, dict)
        self._hub_mixin_config |= {"model": asdict(self.config)}  # a fine-tuned one may train other layers
        super()._save_pretrained(save_directory)
        if self.reader is not None:
            self.reader.save(save_directory / "question")
        (save_directory / "tokenizer.json").write_text(self._tokenizer.to_json(), encoding="utf-8")
        told = json.dumps(self.known, ensure_ascii=False)
        (save_directory / "answers.json").write_text(told + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> "VqaModel":
        model = super()._from_pretrained(model_id=model_id, **{**kwargs, "strict": True})
        model.tokenizer = CaptionTokenizer.load(Path(model_id) / "tokenizer.json")
        if "question" in model.encoders:
            model.reader = QuestionTokenizer.load(Path(model_id) / "question")
        model.known = tuple(json.loads((Path(model_id) / "answers.json").read_text(encoding="utf-8")))
        return model.eval()


def open_vqa(folder: Path) -> VqaModel:
    """The model that ``save_pretrained`` wrote.

    Raises:
        ValueError: a file of it is missing, damaged, or of another model; transformers is not installed, and needed.
    """
    if read_json(folder / "config.json").get("encoders"):
        need_transformers(f"the model in {folder}, whose encoders are of transformers,")
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints, and stdout may be JSON for a script
            return VqaModel.from_pretrained(folder)
    except Exception as error:  # safetensors, tokenizers, torch and json raise unrelated types
        raise ValueError(
            f"The model in {folder} cannot be read ({' '.join(str(error).split())[:300]}); finish the run, or copy it "
            "whole."
        ) from error

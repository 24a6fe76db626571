"""Texts as conditions of a denoiser: by the text encoder of our own multimodal run, or by any local CLIP.

`PromptEncoder` encodes when it is asked; `PromptTable` has encoded, once, the texts that the images have. Either is
frozen and stored with the denoiser's weights: what was trained with is what is sampled with.

Shapes: B batch, T tokens of a text, K texts of a table, D width.
"""

import difflib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from intaglio.data.tokenizer import PAD, CaptionTokenizer
from intaglio.history import run_folder
from intaglio.models.clip import ClipText, Encoding, is_clip, read_json
from intaglio.models.multimodal import MultimodalModel, open_model
from intaglio.models.networks import DocumentedNetwork
from intaglio.nn.condition import Condition
from intaglio.nn.transformer import TextEncoder, mean_of_real, token_embedding


class _Frozen(nn.Module):
    """What the two sources share: ``ids(texts)``, to be kept with the images, then ``forward(ids)``."""

    pooled: int  # the widths of pooled_BD and tokens_BTD
    tokens: int

    @abstractmethod
    def ids(self, texts: Sequence[str]) -> Tensor:
        """What stands for the texts, a row each, on the CPU."""

    def train(self, mode: bool = True) -> "_Frozen":
        """Stays in evaluation mode, whatever the denoiser around it does."""
        return super().train(False)

    def empty(self) -> Condition:
        """The condition of the empty text, one row: the null."""
        return self(self.ids([""]))


class PromptEncoder(_Frozen):
    """The text side of a trained `MultimodalModel`; ``tokenizer`` is the tokenizer's json."""

    def __init__(self, width: int, layers: int, heads: int, feed_forward: int, text_length: int, tokenizer: str):
        super().__init__()
        self._layout = {"width": width, "layers": layers, "heads": heads, "feed_forward": feed_forward}
        self.pooled = self.tokens = width
        self.text_length, self.tokenizer = text_length, CaptionTokenizer.from_json(tokenizer)
        with torch.random.fork_rng(devices=[]):  # these numbers are replaced, and change none of the denoiser's
            embedding = token_embedding(len(self.tokenizer), width)
            self.text_encoder = TextEncoder(embedding, text_length, layers, heads, feed_forward, dropout=0.0)
            self.projection = nn.Linear(width, width)
        self.requires_grad_(False).eval()

    @classmethod
    def of(cls, model: MultimodalModel) -> "PromptEncoder":
        """A copy of the text side of ``model``.

        Raises:
            ValueError: it has none.
        """
        if isinstance(model.network, DocumentedNetwork):
            raise ValueError(
                "The documented multimodal network has no text encoder, so it gives no text conditions. Train "
                "multimodal-small and name its run."
            )
        assert model.tokenizer is not None, "a model gets its tokenizer before it is used"
        c = model.config
        found = cls(c.width, c.encoder_layers, c.heads, c.feed_forward, model.text_length, model.tokenizer.to_json())
        found.text_encoder.load_state_dict(model.network.text_encoder.state_dict())
        found.projection.load_state_dict(model.network.text_projection.state_dict())
        return found

    def config(self) -> dict[str, Any]:
        """For JSON; ``PromptEncoder(**config)`` has the shape that the weights load into."""
        return {**self._layout, "text_length": self.text_length, "tokenizer": self.tokenizer.to_json()}

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B, T) int64, padded to the longest text.

        Raises:
            ValueError: a text of which the tokenizer knows nothing.
        """
        ids = self.tokenizer.encode(texts, self.text_length).ids
        for text, row in zip(texts, ids, strict=True):
            # single bytes of a strange letter may be known, from other letters: they decode to replacement characters
            if text.strip() and not self.tokenizer.decode(row).strip(" \N{REPLACEMENT CHARACTER}"):
                backend = self.tokenizer.tokenizer
                raise ValueError(_unknown_text(text, backend.get_vocab(), backend.decode))
        return torch.from_numpy(ids).long()

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than the encoder reads, and lose their end."""
        return self.tokenizer.encode(texts, self.text_length).truncated

    def unknown(self, texts: Sequence[str]) -> int:
        """How many pieces of the texts the tokenizer does not know; they are all encoded alike."""
        return self.tokenizer.encode(texts, self.text_length).unknown

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> Condition:
        """Float32: ``pooled_BD``, the unit vectors of ``embed_text``; ``tokens_BTD``, the text encoder's outputs."""
        ids_BT = ids_BT.to(self.projection.weight.device)
        real_BT = ids_BT != PAD
        with torch.autocast(ids_BT.device.type, enabled=False):  # the same in training as in sampling
            tokens_BTD = self.text_encoder(ids_BT, real_BT)
            pooled_BD = F.normalize(self.projection(mean_of_real(tokens_BTD, real_BT)).float(), dim=-1)
        return Condition(pooled_BD=pooled_BD, tokens_BTD=tokens_BTD.float(), real_BT=real_BT)


class PromptTable(_Frozen):
    """Texts that a CLIP encoded before the denoiser was built, among them the empty one.

    A text that is not in the table is encoded when it is asked for, if the CLIP is still in its ``folder``, and gets
    a row after the others that is not stored.
    """

    pooled_KD: Tensor  # noqa: N815
    tokens_KTD: Tensor  # noqa: N815
    real_KT: Tensor  # noqa: N815
    lost_K2: Tensor  # noqa: N815

    def __init__(self, texts: Sequence[str], length: int, pooled: int, tokens: int, folder: str, fingerprint: str):
        super().__init__()
        self.texts, self.length, self.pooled, self.tokens = tuple(texts), length, pooled, tokens
        self.folder, self.fingerprint = folder, fingerprint
        count = len(self.texts)
        self.register_buffer("pooled_KD", torch.zeros(count, pooled))
        self.register_buffer("tokens_KTD", torch.zeros(count, length, tokens, dtype=torch.float16))
        self.register_buffer("real_KT", torch.zeros(count, length, dtype=torch.bool))
        self.register_buffer("lost_K2", torch.zeros(count, 2, dtype=torch.int64))
        self._rows = {text: row for row, text in enumerate(self.texts)}
        self._later: list[Encoding] = []  # the rows K, K + 1, …
        self.eval()

    @classmethod
    def of_clip(cls, folder: Path, texts: Sequence[str]) -> "PromptTable":
        """The distinct ``texts``, and the empty one, encoded by the CLIP in ``folder``.

        Raises:
            ValueError: there is no CLIP, or no transformers to read it with; it knows nothing of a text; the table
                would be too large.
        """
        clip, distinct = ClipText(folder), list(dict.fromkeys(["", *map(_plain, texts)]))
        encoded = _encoded(clip, distinct)
        _, length, width = encoded.tokens_KTD.shape
        place = str(folder.resolve())
        table = cls(distinct, length, encoded.pooled_KD.shape[1], width, place, clip.fingerprint())
        table.load_state_dict(encoded._asdict())
        return table

    def config(self) -> dict[str, Any]:
        """For JSON; ``PromptTable(**config)`` has the shape that the weights load into."""
        names = ("length", "pooled", "tokens", "folder", "fingerprint")
        return {"texts": list(self.texts), **{name: getattr(self, name) for name in names}}

    def ids(self, texts: Sequence[str]) -> Tensor:
        """(B,) int64, the row of each text.

        Raises:
            ValueError: a text is not in the table, and the CLIP that could encode it is gone or another.
        """
        texts = [_plain(text) for text in texts]
        if new := [text for text in dict.fromkeys(texts) if text not in self._rows]:
            encoded = _encoded(self._clip(new[0]), new)
            for text, *parts in zip(new, *encoded, strict=True):
                self._rows[text] = len(self._rows)
                self._later.append(Encoding(*parts))
        return torch.tensor([self._rows[text] for text in texts], dtype=torch.int64)

    def _clip(self, text: str) -> ClipText:
        """The CLIP that encoded the table, to encode ``text`` too."""
        if not Path(self.folder).is_dir():
            why = f"the CLIP that encoded them is no more in {self.folder}"
        elif (clip := ClipText(Path(self.folder))).fingerprint() != self.fingerprint:
            why = f"{self.folder} now holds another CLIP than the one that encoded them"
        else:
            return clip
        near = ", ".join(map(repr, difflib.get_close_matches(text, self.texts[1:], 3, 0.0)))
        raise ValueError(
            f"{text!r} is not among the {len(self.texts)} texts that are stored with the model, and {why}. Put it "
            f"back, or write one of them; the nearest are {near}."
        )

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than CLIP reads, and lose their end."""
        return int((self._lost(texts)[:, 1] > 0).sum())

    def unknown(self, texts: Sequence[str]) -> int:
        """How many pieces of the texts the tokenizer does not know; they are all encoded alike."""
        return int(self._lost(texts)[:, 0].sum())

    def _lost(self, texts: Sequence[str]) -> Tensor:
        rows = self.ids(texts)
        return torch.cat([self.lost_K2.cpu(), *(later.lost_K2[None] for later in self._later)])[rows]

    @torch.no_grad()
    def forward(self, rows_B: Tensor) -> Condition:
        """Float32: ``pooled_BD``, CLIP's ``text_embeds`` or else ``pooler_output``; ``tokens_BTD``, its outputs."""
        device, count = self.pooled_KD.device, len(self.texts)
        if self._later and int(rows_B.max()) >= count:
            rows = rows_B.tolist()
            found = [self._later[row - count] if row >= count else self._stored(row) for row in rows]
            pooled, tokens, real, _ = ([part.to(device) for part in parts] for parts in zip(*found, strict=True))
            parts = torch.stack(pooled), pad_sequence(tokens, True), pad_sequence(real, True)
        else:
            parts = self._stored(rows_B.to(device))[:3]
        return Condition(pooled_BD=parts[0].float(), tokens_BTD=parts[1].float(), real_BT=parts[2])

    def _stored(self, rows: Tensor | int) -> Encoding:
        return Encoding(self.pooled_KD[rows], self.tokens_KTD[rows], self.real_KT[rows], self.lost_K2[rows])


Prompts = PromptEncoder | PromptTable


def rebuilt(config: Mapping[str, Any]) -> Prompts:
    """What gave this ``config()``, before its weights are loaded."""
    return PromptEncoder(**config) if "tokenizer" in config else PromptTable(**config)


def open_prompts(source: Path, texts: Sequence[str]) -> Prompts:
    """The prompts of a multimodal run (or of its ``model/``), or of a CLIP folder, which encodes ``texts`` now.

    Raises:
        ValueError: ``source`` is neither, or unfinished, or damaged.
    """
    if is_clip(source):
        return PromptTable.of_clip(source, texts)
    if "prior" in read_json(source / "config.json"):
        return PromptEncoder.of(open_model(source))
    try:
        run = run_folder.find(source)
    except ValueError as error:
        raise ValueError(
            f"{source} gives no text conditions: it is neither a run of the multimodal system nor a CLIP folder (one "
            "whose config.json has the model_type clip or clip_text_model)."
        ) from error
    if (system := run.record["system"]) != "multimodal":
        raise ValueError(f"{source} is a run of {system}: text conditions come from a run of multimodal, or a CLIP.")
    return PromptEncoder.of(open_model(run.whole_model()))


def _plain(text: str) -> str:
    return " ".join(text.split())


def _encoded(clip: ClipText, texts: Sequence[str]) -> Encoding:
    """The texts, none of which is wholly unknown to the tokenizer."""
    found = clip.encode(texts)
    pieces_K = found.real_KT.sum(1) - 2  # without what begins and ends each
    for row in ((pieces_K > 0) & (found.lost_K2[:, 0] == pieces_K)).nonzero()[:1, 0].tolist():
        raise ValueError(_unknown_text(texts[row], clip.tokenizer.get_vocab(), clip.tokenizer.decode))
    return found


def _unknown_text(text: str, vocabulary: Mapping[str, int], decode: Callable[[list[int]], str]) -> str:
    """What to say of a text of which no piece is known: some words that are, the most frequent first."""
    marked = sorted(i for piece, i in vocabulary.items() if piece.startswith("Ġ") or piece.endswith("</w>"))
    words = dict.fromkeys(word for i in marked if len(word := decode([i]).strip()) > 3 and word.isalpha())
    beginnings = {a for a, b in pairwise(sorted(words)) if b.startswith(a)}
    known = ", ".join([word for word in words if word not in beginnings][:8])
    return (
        f"The tokenizer knows nothing of the text {text!r}. It learnt words like {known}. Write it with such words, or "
        "leave it empty for no prompt."
    )

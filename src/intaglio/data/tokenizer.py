"""Byte-pair encoding of captions, trained on the training split only (Sennrich et al. 2016).

Pieces are bytes, so a trained tokenizer gives back exactly what it read. Its alphabet is the bytes that the training
captions hold: every id can be produced by some text, and a byte never seen is UNK, which ``encode`` counts.
"""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, START, END, UNK = range(4)
SPECIAL = ("[PAD]", "[START]", "[END]", "[UNK]")


@dataclass(frozen=True)
class Encoded:
    """Captions as ids (N, L) int32, START … END and padding; how many were cut to L; how many tokens are UNK."""

    ids: np.ndarray
    truncated: int
    unknown: int


class CaptionTokenizer:
    """Text ↔ ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        tokenizer.encode_special_tokens = True  # who writes [END] in a text means five letters

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int) -> "CaptionTokenizer":
        """Learns at most ``vocabulary`` tokens; fewer where the captions hold no more pairs that occur twice."""
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False
        )
        tokenizer.train_from_iterator(map(_normal, captions), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: str | Path) -> "CaptionTokenizer":
        """Reads a ``tokenizer.json``."""
        return cls(Tokenizer.from_file(str(path)))

    @classmethod
    def from_json(cls, text: str) -> "CaptionTokenizer":
        """The tokenizer that ``to_json`` wrote."""
        return cls(Tokenizer.from_str(text))

    def to_json(self) -> str:
        """Everything that encoding needs."""
        return self.tokenizer.to_str()

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def reached(self, ids: np.ndarray) -> set[int]:
        """Which ids a text that was encoded as ``ids`` can have led to: itself, and the pieces merged into it."""
        model, vocabulary = json.loads(self.to_json())["model"], self.tokenizer.get_vocab()
        parts = {vocabulary[a + b]: (vocabulary[a], vocabulary[b]) for a, b in model["merges"]}
        found, left = set(), {int(i) for i in np.unique(ids)}
        while left:
            found |= left
            left = {part for whole in left for part in parts.get(whole, ())} - found
        return found - set(range(len(SPECIAL)))

    def encode(self, captions: Sequence[str], length: int) -> Encoded:
        """Ids of each caption between START and END, cut to ``length`` and padded to the longest.

        A cut caption keeps START and its first pieces and has no END: the decoder isn't taught to stop there.
        """
        batch = self.tokenizer.encode_batch([_normal(c) for c in captions], add_special_tokens=False)
        rows = [[START, *e.ids, END] for e in batch]
        ids = np.full((len(rows), min(length, max(map(len, rows), default=0))), PAD, dtype=np.int32)
        for i, row in enumerate(rows):
            kept = row[: ids.shape[1]]
            ids[i, : len(kept)] = kept
        return Encoded(ids, sum(len(r) > length for r in rows), int((ids == UNK).sum()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text up to END, without special tokens."""
        pieces = []
        for i in map(int, ids):
            if i == END:
                break
            if i not in (PAD, START):
                pieces.append(i)
        return self.tokenizer.decode(pieces, skip_special_tokens=True).strip()


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", " ".join(text.split()))

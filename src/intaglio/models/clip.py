"""The text side of a local CLIP, read with `transformers` (extra ``hf``): never from the network, never a pickle.

Shapes: K texts, T tokens of a text, D width.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

LARGEST = 2 << 30
"""Bytes of encoded texts: they lie in the device's memory and in every checkpoint."""


class Encoding(NamedTuple):
    """Encoded texts, or one of them without the K.

    Float16 rounds tokens off by 2⁻¹² of their size, an eighth of what bf16 then rounds them off by. ``lost_K2`` counts
    the pieces of each text that the tokenizer did not know, and those that were cut off.
    """

    pooled_KD: Tensor  # noqa: N815
    tokens_KTD: Tensor  # noqa: N815
    real_KT: Tensor  # noqa: N815
    lost_K2: Tensor  # noqa: N815


class ClipText:
    """The text model and the tokenizer of a folder: a whole CLIP, its text model alone, or a pipeline of `diffusers`.

    Raises:
        ValueError: it is no CLIP, not whole, or its parts do not belong together; transformers is not installed.
    """

    def __init__(self, folder: Path):
        if not is_clip(folder):
            raise ValueError(f"{folder} holds no CLIP: no config.json there has model_type clip or clip_text_model.")
        try:
            from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
        except ImportError as error:
            raise ValueError(f"Reading the CLIP in {folder} needs the extra hf: pip install 'intaglio[hf]'.") from error
        weights, words = _parts(folder)
        here = {path.name for path in words.iterdir()} if words.is_dir() else set()
        if not ("tokenizer.json" in here or {"vocab.json", "merges.txt"} <= here):  # else an empty one is made up
            raise ValueError(f"{words} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); copy it there.")
        plain = read_json(weights / "config.json").get("architectures") == ["CLIPTextModel"]
        kind: Any = CLIPTextModel if plain else CLIPTextModelWithProjection
        local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with _quiet(), torch.random.fork_rng(devices=[]):
                self.model, report = kind.from_pretrained(
                    weights, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **local
                )
                self.tokenizer: Any = AutoTokenizer.from_pretrained(words, **local)
        except Exception as error:  # safetensors, tokenizers, torch and transformers raise unrelated types
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"The CLIP in {folder} cannot be read: {reason} Weights are read from .safetensors, never from a .bin, "
                "which is a pickle and can run code."
            ) from error
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"The CLIP in {folder} lacks the weights {missing[:3]}: save it again as a whole.")
        self.folder, self._config = folder, self.model.config
        if not self._belong_together():
            raise ValueError(
                f"The tokenizer in {words} is not that of the CLIP beside it: it has {len(self.tokenizer)} pieces and "
                f"ends a text with {self.tokenizer('')['input_ids'][-1:]}, the model has {self._config.vocab_size} and "
                f"looks for {self._config.eos_token_id}. Copy the tokenizer that the CLIP was trained with."
            )

    def _belong_together(self) -> bool:
        """Whether the model will find the end of a text, where it pools; 2 stands for the last piece of all."""
        pieces, end = len(self.tokenizer), self._config.eos_token_id
        ends = self.tokenizer("")["input_ids"][-1:]
        return pieces <= self._config.vocab_size and ends == [pieces - 1 if end == 2 else end]

    def fingerprint(self) -> str:
        """Hex digest of all that an encoding depends on."""
        c = self._config
        form = [c.hidden_act, c.num_attention_heads, c.layer_norm_eps, c.eos_token_id, self.tokenizer.get_vocab()]
        digest = blake2b(json.dumps(form, sort_keys=True).encode(), digest_size=16)
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 64) -> Encoding:
        """``text_embeds`` (``pooler_output`` where there is no projection) float32, ``last_hidden_state`` float16.

        A text that is too long keeps its beginning and the token that ends it. CLIP's attention is causal, so that
        padding, here to the longest text, changes nothing.

        Raises:
            ValueError: the result would be larger than `LARGEST`, or is not finite.
        """
        whole, most = self.tokenizer(list(texts), verbose=False)["input_ids"], self._config.max_position_embeddings
        rows = [torch.tensor([*row[:-1][: most - 1], row[-1]]) for row in whole]
        self._refuse_large(len(rows), max(map(len, rows)))
        pooled, tokens = [], []
        for at in range(0, len(rows), batch):
            some = rows[at : at + batch]
            ids_BT = pad_sequence(some, True, self.tokenizer.pad_token_id)
            real_BT = pad_sequence([torch.ones_like(row) for row in some], True)
            found = self.model(input_ids=ids_BT, attention_mask=real_BT)
            pooled.append(found.text_embeds if "text_embeds" in found else found.pooler_output)
            tokens += [x[: len(row)].half() for x, row in zip(found.last_hidden_state, some, strict=True)]
        unknown = [int((row[1:-1] == self.tokenizer.unk_token_id).sum()) for row in rows]
        cut = [len(row) - len(kept) for row, kept in zip(whole, rows, strict=True)]
        real_KT = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], True)
        lost_K2 = torch.tensor([unknown, cut]).T
        encoded = Encoding(torch.cat(pooled), pad_sequence(tokens, True), real_KT, lost_K2)
        if not (encoded.pooled_KD.isfinite().all() and encoded.tokens_KTD.isfinite().all()):
            raise ValueError(f"The CLIP in {self.folder} gives numbers that are not finite: its weights are broken.")
        return encoded

    def _refuse_large(self, count: int, length: int) -> None:
        width = self._config.hidden_size
        if (size := count * (length * (2 * width + 1) + 4 * self._config.projection_dim + 16)) > LARGEST:
            raise ValueError(
                f"{count} encoded texts of up to {length} tokens of {width} numbers would take {size / 1e9:.2g} GB of "
                f"memory and of every checkpoint; {LARGEST / 1e9:.2g} GB is the most. Give fewer or shorter texts, or "
                "a multimodal run, which encodes texts as they are needed."
            )


def is_clip(folder: Path) -> bool:
    """Whether the folder says that it holds one."""
    return read_json(_parts(folder)[0] / "config.json").get("model_type") in ("clip", "clip_text_model")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(folder: Path) -> tuple[Path, Path]:
    """Where the text model and its tokenizer lie."""
    pipeline = (folder / "text_encoder" / "config.json").is_file()
    return (folder / "text_encoder", folder / "tokenizer") if pipeline else (folder, folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, and no list of the weights that only images need; which are missing is looked at here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

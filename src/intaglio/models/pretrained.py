"""Encoders of local `transformers` folders (extra ``hf``): never from the network, never a pickle, never their code.

A description, for JSON, is all that an encoder is rebuilt from before its weights are loaded; the folder is then needed
no more. Of an encoder only the layers that a recipe names are trained, and a linear layer behind it; all else stands
still in evaluation mode, whatever a stage frees.

Shapes: U images, B questions, S image side, T text positions, P places, D width.
"""

import inspect
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import VqaModelConfig
from intaglio.data.tokenizer import PAD, Encoded
from intaglio.models.clip import _quiet, read_json

Layers = tuple[int, ...] | Literal["all"]
Role = Literal["vision", "question"]

READS = {"vision": "pixel_values", "question": "input_ids"}
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt")


class _Pretrained(nn.Module):
    """A part of a transformers model, and a linear layer to our width; ``layers`` are the part's own that are trained.

    Raises:
        ValueError: it has no such layer.
    """

    def __init__(self, role: Role, description: Mapping[str, Any], width: int, layers: Layers):
        super().__init__()
        self.role: Role = role
        with torch.random.fork_rng(devices=[]):  # these numbers are replaced, and change none of the others
            self.part = _built(role, description)
        self.into = nn.Linear(self.part.config.hidden_size, width)
        self.teach(layers)

    def teach(self, layers: Layers) -> None:
        """From now on these layers are trained, and no others."""
        stack = _stack(self.part)
        numbers = range(len(stack)) if layers == "all" else layers
        if strange := [n for n in numbers if not -len(stack) <= n < len(stack)]:
            raise ValueError(
                f"model.train_{self.role} names layer {strange[0]}; model.{self.role} has {len(stack)}, from 0 to "
                f"{len(stack) - 1}, or from -1, the last, to {-len(stack)}."
            )
        self.trained = [self.into, *(stack[n] for n in numbers)]
        self.requires_grad_(True).train(self.into.training)

    def requires_grad_(self, requires_grad: bool = True) -> "_Pretrained":
        """Frees, or holds, what is trained at all."""
        super().requires_grad_(False)
        for module in self.trained:
            module.requires_grad_(requires_grad)
        return self

    def train(self, mode: bool = True) -> "_Pretrained":
        """What is not trained stays in evaluation mode."""
        super().train(False)
        for module in self.trained:
            module.train(mode)
        return self


class PretrainedVision(_Pretrained):
    """Reads images at the size that they have here, normalised its own way."""

    scale: Tensor
    shift: Tensor

    def __init__(self, description: Mapping[str, Any], image_size: int, width: int, layers: Layers):
        super().__init__("vision", description, width, layers)
        c = self.part.config
        self.places = (image_size // _patch(c)) ** 2
        other_size = description["interpolates"] and image_size != c.image_size
        self.options = {"interpolate_pos_encoding": True} if other_size else {}
        mean, std = torch.tensor(description["mean"]), torch.tensor(description["std"])
        half = 127.5 * description["factor"]  # (x + 1) · 127.5 is a pixel of 0 to 255
        self.register_buffer("scale", (half / std)[:, None, None], persistent=False)
        self.register_buffer("shift", ((half - mean) / std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(U, 3, S, S) in [-1, 1] → (U, P, D), places row after row, without class token and registers."""
        found = self.part(pixel_values=images * self.scale + self.shift, **self.options).last_hidden_state
        return self.into(found[:, -self.places :])


class PretrainedText(_Pretrained):
    """Reads what `QuestionTokenizer` writes."""

    def __init__(self, description: Mapping[str, Any], width: int, layers: Layers):
        super().__init__("question", description, width, layers)
        self.pad: int = description["pad"]

    def forward(self, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
        """(B, T, D); ``real_BT`` is True where a token stands."""
        ids = torch.where(real_BT, ids_BT - 1, self.pad)
        return self.into(self.part(input_ids=ids, attention_mask=real_BT.long()).last_hidden_state)


class QuestionTokenizer:
    """The tokenizer of a transformers folder, as the ``files`` that it is read from.

    Ids are one higher than its own, so that 0 pads as everywhere else.
    """

    def __init__(self, files: Mapping[str, bytes]):
        from transformers import AutoTokenizer

        self.files = dict(files)
        with TemporaryDirectory() as folder, _quiet():
            self.save(Path(folder))
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **LOCAL)

    @classmethod
    def of(cls, folder: Path) -> "QuestionTokenizer":
        """The tokenizer in a folder of somebody else's.

        Raises:
            ValueError: there is none, or it cannot be read.
        """
        here = {path.name for path in folder.iterdir()}
        if not (here & set(VOCABULARIES) or any(name.endswith(".model") for name in here)):  # else one is made up
            raise ValueError(
                f"{folder} has no tokenizer ({', '.join(VOCABULARIES)} or a .model of sentencepiece): copy there the "
                "one that the model was trained with."
            )
        from transformers import AutoTokenizer

        try:
            with TemporaryDirectory() as copy, _quiet():
                AutoTokenizer.from_pretrained(folder, **LOCAL).save_pretrained(copy)
                return cls({path.name: path.read_bytes() for path in sorted(Path(copy).iterdir())})
        except Exception as error:  # tokenizers, sentencepiece and transformers raise unrelated types
            raise ValueError(f"The tokenizer in {folder} cannot be read: {_reason(error)}") from error

    @classmethod
    def load(cls, folder: Path) -> "QuestionTokenizer":
        """What ``save`` wrote."""
        return cls({path.name: path.read_bytes() for path in sorted(folder.iterdir())})

    def save(self, folder: Path) -> None:
        """Writes the files, as they came."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)

    def fingerprint(self) -> str:
        """Hex digest of the files."""
        digest = blake2b(digest_size=16)
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def encode(self, texts: Sequence[str], length: int) -> Encoded:
        """Ids of each text with what begins and ends it; a longer one keeps its beginning, and what ends it."""
        plain = [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
        rows: list[list[int]] = self.tokenizer(plain, verbose=False)["input_ids"] if plain else []
        long = [k for k, row in enumerate(rows) if len(row) > length]
        if long:
            cut = self.tokenizer([plain[k] for k in long], truncation=True, max_length=length)["input_ids"]
            for k, row in zip(long, cut, strict=True):
                rows[k] = row
        nothing = self.tokenizer.unk_token_id or 0  # of a text that the tokenizer drops as a whole
        rows = [row or [nothing] for row in rows]
        ids = np.full((len(rows), max(map(len, rows), default=0)), PAD, np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = np.array(row) + 1
        unknown = self.tokenizer.unk_token_id
        return Encoded(ids, len(long), 0 if unknown is None else int((ids == unknown + 1).sum()))


@dataclass
class Encoders:
    """What a recipe's folders hold: by role a description and weights, which are those of a run once it has begun."""

    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    reader: QuestionTokenizer | None = None


def open_encoders(config: VqaModelConfig, image_size: int, question_length: int) -> Encoders:
    """Reads the folders that the configuration names.

    Raises:
        ValueError: one is not there, not whole, of the wrong kind, or cannot read such images or questions;
            transformers is not installed.
    """
    found = Encoders()
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        if config.vision:
            _see(_open(found, "vision", Path(config.vision)), found, Path(config.vision), image_size, config)
        if config.question:
            _open(found, "question", Path(config.question))
            _read(found, Path(config.question), question_length, config)
    return found


def need_transformers(what: str) -> None:
    """Raises a ``ValueError`` where they are not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"Reading {what} needs the extra hf: pip install 'intaglio[hf]'.") from error


def _open(found: Encoders, role: Role, folder: Path) -> Any:
    """The part of the model in a folder that is wanted, with its weights."""
    if not folder.is_dir():
        raise ValueError(
            f"model.{role} is {folder}, which is no folder here, and nothing is downloaded: give the folder of a "
            "transformers checkpoint, with its config.json and model.safetensors."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no checkpoint of transformers: copy it whole.")
    need_transformers(f"model.{role} in {folder}")
    from transformers import AutoModel

    try:
        with _quiet():
            model, report = AutoModel.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **LOCAL
            )
            part = _part(role, model)
    except Exception as error:  # safetensors, torch and transformers raise unrelated types
        raise ValueError(
            f"The model in {folder} cannot be read: {_reason(error)} Weights are read from .safetensors, never from a "
            ".bin, which is a pickle and can run code."
        ) from error
    if part.main_input_name != READS[role]:
        other = next((r for r, reads in READS.items() if reads == part.main_input_name), None)
        raise ValueError(
            f"model.{role} is {folder}, which holds a {type(part).__name__}: it reads {part.main_input_name}, not "
            f"{READS[role]}." + (f" Name it in model.{other}." if other else "")
        )
    own = {id(p) for p in part.parameters()}
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
    if missing := sorted(names & set(report["missing_keys"])):
        raise ValueError(f"The model in {folder} lacks the weights {missing[:3]}: save it again as a whole.")
    told = json.loads(model.config.to_json_string(use_diff=False))
    told = {key: value for key, value in told.items() if key not in ("_name_or_path", "auto_map")}
    found.described[role] = {"config": told}
    found.weights[role] = part.state_dict()
    return part


def _see(part: Any, found: Encoders, folder: Path, size: int, config: VqaModelConfig) -> None:
    """How the model in a folder reads images, and whether it reads such."""
    told = read_json(folder / "preprocessor_config.json")
    told = told or read_json(folder / "processor_config.json").get("image_processor", {})
    if not told:
        raise ValueError(f"{folder} has no preprocessor_config.json, which says how images are normalised: copy it.")
    normal = told.get("do_normalize", True)
    if normal and not (told.get("image_mean") and told.get("image_std")):
        raise ValueError(f"The preprocessor_config.json of {folder} has no image_mean or image_std: copy it whole.")
    described = found.described["vision"]
    described |= {
        "mean": told["image_mean"] if normal else [0.0] * 3,
        "std": told["image_std"] if normal else [1.0] * 3,
        "factor": told.get("rescale_factor", 1 / 255) if told.get("do_rescale", True) else 1.0,
        "interpolates": "interpolate_pos_encoding" in inspect.signature(part.forward).parameters,
    }
    patch, made_for = _patch(part.config), _made_for(told, part.config)
    step = math.lcm(16, patch)
    fitting = made_for if made_for and made_for % step == 0 else max(1, round((made_for or size) / step)) * step
    if size % patch:
        raise ValueError(
            f"data.image_size is {size}, no multiple of the {patch} pixels of a patch of the vision model in {folder}: "
            f"use --data.image_size {fitting}."
        )
    model = PretrainedVision(described, size, config.width, config.train_vision)
    model.part.load_state_dict(found.weights["vision"])
    _try(
        lambda: model(torch.zeros(1, 3, size, size)),
        f"The vision model in {folder} cannot read images of {size} pixels a side",
        f"Use --data.image_size {fitting}, or a model that gives a last_hidden_state of places.",
    )


def _read(found: Encoders, folder: Path, length: int, config: VqaModelConfig) -> None:
    """How the model in a folder reads texts, and whether it reads such."""
    reader = QuestionTokenizer.of(folder)
    described = found.described["question"]
    described["pad"] = reader.tokenizer.pad_token_id or 0
    model = PretrainedText(described, config.width, config.train_question)
    model.part.load_state_dict(found.weights["question"])
    rows, pieces = model.part.get_input_embeddings().num_embeddings, len(reader.tokenizer)
    if pieces > rows:
        raise ValueError(
            f"The tokenizer in {folder} is not that of the model beside it: it has {pieces} pieces, and the model has "
            f"{rows}. Copy the tokenizer that the model was trained with."
        )
    ids = torch.full((1, length), 1 + (described["pad"] == 0))
    _try(
        lambda: model(ids, ids > 0),
        f"The text model in {folder} cannot read questions of {length} tokens",
        "Use a shorter --data.question_length.",
    )
    found.reader = reader


@torch.no_grad()
def _try(forward: Any, what: str, remedy: str) -> None:
    """One pass: what a model cannot do, only it knows."""
    try:
        finite = bool(forward().isfinite().all())
    except Exception as error:
        raise ValueError(f"{what}: {_reason(error)} {remedy}") from error
    if not finite:
        raise ValueError(f"{what}: the numbers that it gives are not finite, its weights are broken.")


def _built(role: Role, description: Mapping[str, Any]) -> Any:
    """The part that a description tells of, with weights that are still to be loaded."""
    from transformers import AutoConfig, AutoModel

    told = dict(description["config"])
    config = AutoConfig.for_model(told.pop("model_type")).from_dict(told)
    with _quiet():
        return _part(role, AutoModel.from_config(config, dtype=torch.float32))


def _part(role: Role, model: Any) -> Any:
    """What encodes images, or texts: an encoder without a decoder, a tower of a CLIP; and nothing that pools."""
    if role == "question" and model.config.is_encoder_decoder:
        part = model.get_encoder()
    else:
        part = getattr(model, "vision_model" if role == "vision" else "text_model", model)
    for name in ("pooler", "head"):  # which last_hidden_state does not pass
        if isinstance(getattr(part, name, None), nn.Module):
            setattr(part, name, nn.Identity())
    return part


def _stack(part: nn.Module) -> nn.ModuleList:
    """The layers: the list that holds most of the weights."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=nn.ModuleList())


def _patch(config: Any) -> int:
    size = getattr(config, "patch_size", 1)
    return int(size if isinstance(size, int) else size[0])


def _made_for(preprocessor: Mapping[str, Any], config: Any) -> int:
    """The side of the images that a model was prepared for; 0 where nothing tells."""
    size = preprocessor.get("crop_size") or preprocessor.get("size") or getattr(config, "image_size", 0)
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge") or 0
    return int(size) if isinstance(size, int | float) else 0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."

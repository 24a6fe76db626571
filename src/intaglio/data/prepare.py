"""From a configuration to items ready to be batched: corpus, split, tokenizer, pixels, and a record of all that was
dropped, cut or converted on the way."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intaglio.config import CaptionDataConfig, ImageDataConfig, PictureDataConfig
from intaglio.data import cifar, order, stl10
from intaglio.data.batches import CaptionedImages, Data, Pictures
from intaglio.data.cache import cache_folder, image_table
from intaglio.data.corpus import Corpus, Progress
from intaglio.data.engravings import Engravings
from intaglio.data.folder import ImageFolder
from intaglio.data.splits import split
from intaglio.data.tokenizer import CaptionTokenizer

BUILT_IN_ITEMS = 20_000

Prompts = Callable[[Sequence[str]], np.ndarray]
"""Texts → what a text condition is looked up or encoded from, int64 (N, T)."""


@dataclass(frozen=True)
class Prepared:
    """Everything that training and evaluation need of the data.

    ``splits`` maps ``train`` and ``val`` to item numbers; ``fingerprint`` covers content, split and encoding.
    """

    corpus: Corpus
    data: Data
    splits: dict[str, np.ndarray]
    fingerprint: str
    record: dict[str, Any]

    def some(self, side: str, count: int) -> np.ndarray:
        """At most ``count`` items of a side, the same ones each time, spread over all of it."""
        items = self.splits[side]
        return items[np.sort(order.permutation(len(items), 0, 0)[:count])]

    def labels_of(self, items: np.ndarray) -> list[str | None]:
        """The class of each item."""
        return [self.corpus.label(int(i)) for i in items]


@dataclass(frozen=True)
class Pictured(Prepared):
    """Images, or their latents."""

    data: Pictures


@dataclass(frozen=True)
class Captioned(Prepared):
    """Images with encoded captions."""

    data: CaptionedImages
    tokenizer: CaptionTokenizer
    text_length: int

    def ids_of(self, items: np.ndarray) -> np.ndarray:
        """All captions of the given items as ids, (M, L)."""
        rows = [np.arange(self.data.first[i], self.data.first[i + 1]) for i in items]
        return self.data.ids[np.concatenate(rows)]


def open_corpus(config: ImageDataConfig, seed: int, progress: Progress | None = None, captioned: bool = True) -> Corpus:
    """The corpus that the configuration names; ``progress`` is called with (done, all) while images are decoded.

    Without ``captioned``, images that have no caption are kept.

    Raises:
        ValueError: the source is neither ``engravings`` nor a usable folder of images or of a published data set.
    """
    if config.source == "engravings":
        return Engravings(config.items or BUILT_IN_ITEMS, seed=seed)
    if stl10.claims(config.source):
        return stl10.STL10(config.source, config.caption_template, cache=cache_folder(config.cache))
    if cifar.claims(config.source):
        return cifar.CIFAR(config.source, config.caption_template, cache=cache_folder(config.cache))
    return ImageFolder(
        config.source,
        size=config.image_size,
        metadata=config.metadata,
        columns=config.columns,
        caption_template=config.caption_template,
        bad_limit=config.bad_limit,
        captioned=captioned,
        cache=cache_folder(config.cache),
        progress=progress,
    )


def prepare(
    config: CaptionDataConfig,
    seed: int,
    vocabulary: int,
    tokenizer: CaptionTokenizer | None = None,
    text_length: int = 0,
    progress: Progress | None = None,
) -> Captioned:
    """Reads, splits and encodes. A run that goes on gives its own ``tokenizer`` and ``text_length``."""
    corpus, sides, record = _read(config, seed, progress)
    captions = [corpus.captions(i) for i in range(len(corpus))]
    learnt_here = tokenizer is None
    if tokenizer is None:
        tokenizer = CaptionTokenizer.train((c for i in sides["train"] for c in captions[i]), vocabulary)
    flat = [c for several in captions for c in several]
    longest = tokenizer.encode(flat, config.text_length)
    text_length = text_length or longest.ids.shape[1]
    encoded = longest if text_length >= longest.ids.shape[1] else tokenizer.encode(flat, text_length)
    first = np.concatenate([[0], np.cumsum([len(several) for several in captions])])
    data = CaptionedImages(_pixels(corpus, config, progress), encoded.ids, first)
    record |= {
        "captions": len(flat),
        "vocabulary": len(tokenizer),
        "captions cut": encoded.truncated,
        "text length": text_length,
        "unknown tokens": encoded.unknown,
        "held-out images seen in training": seen_images(data.images, sides["train"], sides["val"]),
    }
    if learnt_here:
        known, met = (_pieces(data, tokenizer, sides[side]) for side in ("train", "val"))
        record["tokens known from held-out captions alone"] = len(met - known)
    digest = fingerprint(corpus, sides, tokenizer.to_json())
    return Captioned(corpus, data, sides, digest, record, tokenizer, text_length)


def prepare_pictures(
    config: PictureDataConfig,
    seed: int,
    progress: Progress | None = None,
    prompts: Prompts | None = None,
    classes: Sequence[str] = (),
) -> Pictured:
    """Reads and splits; captions are encoded by ``prompts`` where there are some.

    Labels are numbered as in ``classes``, those of a model that goes on learning, or else in the corpus's order.

    Raises:
        ValueError: images have a class that is none of ``classes``.
    """
    corpus, sides, record = _read(config, seed, progress, captioned=prompts is not None)
    names = {name: k for k, name in enumerate(classes or corpus.labels())}
    if strangers := sorted(set(corpus.labels()) - names.keys()):
        raise ValueError(
            f"{config.source} has classes that the model has not learnt ({', '.join(strangers[:8])}); it knows "
            f"{', '.join(names)}. Train anew on this data, or leave these images out."
        )
    labels = np.array([names.get(corpus.label(i) or "", -1) for i in range(len(corpus))])
    first, rows = np.arange(len(corpus) + 1), np.zeros((len(corpus), 0), np.int64)
    if prompts is not None:
        captions = [corpus.captions(i) for i in range(len(corpus))]
        first = np.concatenate([[0], np.cumsum([len(several) for several in captions])])
        rows = prompts([c for several in captions for c in several])
    images = _pixels(corpus, config, progress)
    data = Pictures(images, labels, rows, first, config.flips)
    if config.flips:
        record["augmentations"] = {"flip": _survey(data, sides["train"])}
    record |= {
        "classes": len(names),
        "held-out images seen in training": seen_images(images, sides["train"], sides["val"]),
    }
    return Pictured(corpus, data, sides, fingerprint(corpus, sides, "pictures"), record)


def _survey(data: Pictures, items: np.ndarray, draws: int = 8) -> dict[str, float]:
    """Of some items: the share that some draw changes, and of which the draws are not all the same."""
    few, rng = items[:64], np.random.default_rng(0)
    plain = data.batch(few, np.zeros(len(few), np.int64)).x.numpy()
    drawn = np.stack([data.training_batch(few, rng.integers(2**31, size=len(few))).x.numpy() for _ in range(draws)])
    axes = tuple(range(2, drawn.ndim))
    changed, various = (drawn != plain).any(axes), (drawn != drawn[0]).any(axes)
    return {"changed": float(changed.any(0).mean()), "variety": float(various.any(0).mean())}


def _read(
    config: ImageDataConfig, seed: int, progress: Progress | None, captioned: bool = True
) -> tuple[Corpus, dict[str, np.ndarray], dict[str, Any]]:
    corpus = open_corpus(config, seed, progress, captioned)
    sides, leaks = split(corpus, {"train": 1 - config.held_out, "val": config.held_out}, seed)
    record = {
        "source": config.source,
        "items": {side: len(items) for side, items in sides.items()},
        "intake": corpus.intake.as_dict(),
        "near-duplicate groups kept on one side": leaks,
        "training items declared as test": sum(corpus.declared_split(int(i)) == "test" for i in sides["train"]),
    }
    return corpus, sides, record


def _pixels(corpus: Corpus, config: ImageDataConfig, progress: Progress | None) -> np.ndarray:
    if isinstance(corpus, ImageFolder):
        return corpus.pixels()
    return image_table(corpus, config.image_size, cache_folder(config.cache), progress)


def _pieces(data: CaptionedImages, tokenizer: CaptionTokenizer, items: np.ndarray) -> set[int]:
    rows = np.concatenate([np.arange(data.first[i], data.first[i + 1]) for i in items])
    return tokenizer.reached(data.ids[rows])


def seen_images(images: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> int:
    """How many held-out images are, byte for byte, one of the training images."""
    digests = [hashlib.blake2b(image, digest_size=16).digest() for image in images]
    known = {digests[i] for i in train}
    return sum(digests[i] in known for i in held_out)


def notices(prepared: Prepared) -> Sequence[str]:
    """What a person must know about the data, as sentences; empty where all was well."""
    record, said = prepared.record, []
    for reason, count in record["intake"]["counts"].items():
        said.append(f"{count} × {reason} (e.g. {record['intake']['examples'][reason][0]})")
    if record.get("captions cut"):
        said.append(f"{record['captions cut']} of {record['captions']} captions cut to {record['text length']} tokens")
    if record.get("unknown tokens"):
        said.append(f"{record['unknown tokens']} tokens of captions are unknown to the tokenizer")
    return [*said, *record.get("warnings", ())]


def fingerprint(corpus: Corpus, sides: dict[str, np.ndarray], encoding: str) -> str:
    """Of content, split and encoding."""
    digest = hashlib.sha256(corpus.fingerprint().encode())
    for side in sorted(sides):
        digest.update(side.encode() + np.ascontiguousarray(sides[side], dtype=np.int64).tobytes())
    digest.update(encoding.encode())
    return digest.hexdigest()

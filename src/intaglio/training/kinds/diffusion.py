"""The diffusion system in training: its autoencoder, its text encoder and its latents are there before it is built."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from intaglio import config as configuration
from intaglio.config import DiffusionConfig
from intaglio.data.batches import Pictures
from intaglio.data.cache import cache_folder
from intaglio.data.corpus import Progress
from intaglio.data.latents import Source, cache_latents
from intaglio.data.prepare import Pictured, open_corpus, prepare_pictures
from intaglio.health.record import Record
from intaglio.history import run_folder
from intaglio.history.reading import Evaluation
from intaglio.history.run_folder import RunFolder
from intaglio.models.autoencoder import Autoencoder, open_autoencoder, round_trip
from intaglio.models.classifier import Judge
from intaglio.models.diffusion import DiffusionModel
from intaglio.models.prompts import PromptEncoder, Prompts, open_prompts, rebuilt
from intaglio.reports.proofs.diffusion import make_proofs
from intaglio.reports.proofs.pull import UNMEASURED, WHILE_TRAINING
from intaglio.systems import diffusion
from intaglio.systems.diffusion_evaluation import evaluate
from intaglio.training.kinds.base import Kind, Say

POOR = 0.8
"""R² of an autoencoder's round trip below which it is said before anything is trained on it."""


@dataclass
class DiffusionKind(Kind):
    """Images from noise."""

    config: DiffusionConfig
    autoencoder: Autoencoder | None = field(default=None, init=False)
    prompts: Prompts | None = field(default=None, init=False)

    def prepare(
        self, saved: Mapping[str, Any] | None, model: DiffusionModel | None, progress: Progress | None, say: Say
    ) -> Pictured:
        """Images, or their latents from the cache; autoencoder and text encoder are the model's or checkpoint's own."""
        config = self.config
        if config.model.network == "documented" and config.condition.by == "text":
            raise ValueError(
                "The documented network attends to one vector of a text, which is a constant (see the rule "
                "attention-over-one): train with --model.network standard, or with --condition.by class."
            )
        if model is not None:
            self.autoencoder, self.prompts = model.autoencoder, model.prompts
        elif saved is not None:
            self._restore(saved)
        else:
            self.autoencoder, self.prompts = self._autoencoder(), self._prompts(progress)
        encode = None
        if self.prompts is not None:
            prompts = self.prompts

            def encode(texts: Any) -> np.ndarray:
                return prompts.ids(texts).numpy()

        classes = model.classes if model is not None else ()
        prepared = prepare_pictures(config.data, config.seed, progress, encode, classes)
        self._tell_texts(prepared)
        self._refuse_unlabelled(prepared)
        if self.autoencoder is None:
            return prepared
        before = self.autoencoder.device
        self.autoencoder.to("cuda" if config.train.device == "cuda" else before)
        self._tell_round_trip(self.autoencoder, prepared, say)
        prepared = self._in_latents(prepared, self.autoencoder, say)
        self.autoencoder.to(before)
        return prepared

    def saved(self, prepared: Pictured) -> dict[str, Any]:
        return {
            "autoencoder": self.autoencoder.arguments if self.autoencoder is not None else None,
            "prompts": self.prompts.config() if self.prompts is not None else None,
        }

    def _restore(self, saved: Mapping[str, Any]) -> None:
        """From a checkpoint alone, whatever has become of the runs that they came from."""
        if saved["autoencoder"]:
            self.autoencoder = Autoencoder(**saved["autoencoder"])
            self.autoencoder.load_state_dict(_below("model.autoencoder.", saved["state_dict"]))
        if saved["prompts"]:
            self.prompts = rebuilt(saved["prompts"])
            self.prompts.load_state_dict(_below("model.prompts.", saved["state_dict"]))

    def _autoencoder(self) -> Autoencoder | None:
        if not self.config.model.autoencoder:
            return None
        given, size = Path(self.config.model.autoencoder), self.config.data.image_size
        if (given / "config.json").is_file() or (given / "vae").is_dir():
            return open_autoencoder(given, size)
        run = run_folder.find(given)
        if run.record["system"] != "autoencoder":
            raise ValueError(f"{given} is a run of {run.record['system']}; model.autoencoder needs one of autoencoder.")
        return open_autoencoder(run.whole_model(), size)

    def _prompts(self, progress: Progress | None) -> Prompts | None:
        config = self.config
        if config.condition.by != "text":
            return None
        corpus = open_corpus(config.data, config.seed, progress)
        return open_prompts(
            Path(config.condition.encoder), [text for i in range(len(corpus)) for text in corpus.captions(i)]
        )

    def _tell_texts(self, prepared: Pictured) -> None:
        """Counts, for the notices, captions that the text encoder cuts and pieces that it does not know."""
        if self.prompts is None:
            return
        texts = [text for i in range(len(prepared.corpus)) for text in prepared.corpus.captions(i)]
        length = self.prompts.text_length if isinstance(self.prompts, PromptEncoder) else self.prompts.length
        cut, unknown = self.prompts.truncated(texts), self.prompts.unknown(texts)
        told = {"captions": len(texts), "captions cut": cut, "text length": length, "unknown tokens": unknown}
        prepared.record.update(told)

    def _refuse_unlabelled(self, prepared: Pictured) -> None:
        if self.config.condition.by != "class":
            return
        labels = prepared.labels_of(prepared.splits["train"])
        known, without = sorted({x for x in labels if x is not None}), sum(x is None for x in labels)
        if len(known) < 2 or without:
            raise ValueError(
                f"{without} of {len(labels)} training images have no class, and there are {len(known)} classes: give "
                "each a label, or train without a condition (--condition.by none)."
            )
        if strangers := {x for x in prepared.labels_of(prepared.splits["val"])} - set(known):
            raise ValueError(
                f"Held-out images have classes that no training image has ({', '.join(sorted(map(str, strangers)))}): "
                "give more images of each, or another --seed."
            )

    def _tell_round_trip(self, autoencoder: Autoencoder, prepared: Pictured, say: Say) -> None:
        images, train = prepared.data.images, prepared.some("train", 1024)
        if not autoencoder.fitted:
            say("fitting mean and standard deviation of each latent channel to the training images")
            all_of = prepared.splits["train"]
            autoencoder.fit_statistics(images[all_of[at : at + 64]] for at in range(0, len(all_of), 64))
        trip = round_trip(autoencoder, images, train, prepared.some("val", 256))
        say(f"autoencoder: R² {trip.r2:.3f} of held-out images, {trip.psnr:.1f} dB (mean image {trip.null_psnr:.1f})")
        if trip.r2 < POOR:
            prepared.record["warnings"] = [
                f"the autoencoder keeps {trip.r2:.0%} of the variance of held-out images, and no sample can be better: "
                "train it longer, or with more latent channels, before diffusion"
            ]

    def _in_latents(self, prepared: Pictured, autoencoder: Autoencoder, say: Say) -> Pictured:
        config, data = self.config, prepared.data
        assert isinstance(data, Pictures)
        source = Source(prepared.corpus.fingerprint(), autoencoder.fingerprint(), len(data), config.data.flips)
        name = f"latents-{source.data[:12]}-{source.autoencoder[:12]}-{config.data.image_size}"
        folder = cache_folder(config.data.cache) / (f"{name}-flips" if config.data.flips else name)
        told = time.monotonic()

        def progress(done: int, of: int) -> None:
            nonlocal told
            if time.monotonic() - told > 5:
                told = time.monotonic()
                say(f"encoding images, once for all runs: {done:,} of {of:,}")

        table = cache_latents(folder, data.images, autoencoder.latents, source, progress=progress)
        return replace(prepared, data=replace(data, latents=table))

    def describe(self, prepared: Pictured) -> str:
        data = prepared.data
        assert isinstance(data, Pictures)
        shape = (3, *data.images.shape[1:3]) if data.latents is None else data.latents.shape
        what = {"class": "classes", "text": "texts", "none": "no condition"}[self.config.condition.by]
        return f"{' × '.join(map(str, shape))} numbers each, {what}"

    def build(self, prepared: Pictured, model: DiffusionModel | None = None) -> diffusion.DiffusionSystem:
        if model is None:
            model = diffusion.new_model(self.config, prepared.corpus.labels(), self.autoencoder, self.prompts)
        return diffusion.build(self.config, prepared, model)

    def refuse_other_shape(self, model: DiffusionModel, source: RunFolder) -> None:
        theirs = source.config()
        assert isinstance(theirs, DiffusionConfig)
        ours = {name: configuration.to_dict(c) for name, c in (("theirs", theirs), ("ours", self.config))}
        for key in ("model", "condition", "noise", "loss.prediction", "data.image_size"):
            section, _, name = key.partition(".")
            pair = [c[section][name] if name else c[section] for c in ours.values()]
            if pair[0] != pair[1]:
                raise ValueError(
                    f"{source.path} was trained with another {key} than this recipe has, so its weights don't fit. "
                    f"Fine-tune with its own recipe: intaglio train --from {source.path} --data.source FOLDER"
                )

    def evaluate(self, model: DiffusionModel, prepared: Pictured, judge: Judge | str) -> Evaluation:
        return evaluate(model, prepared, judge, self.config.sampling.each)

    def prove(
        self,
        model: DiffusionModel,
        prepared: Pictured,
        folder: Path,
        quick: bool,
        judge: Judge | str = WHILE_TRAINING,
        record: Record = UNMEASURED,
    ) -> list[Path]:
        return make_proofs(model, prepared, folder, quick, judge, record)


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a state below a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

"""The verbs that need a model, as functions: what ``intaglio VERB`` does, ``intaglio.VERB(...)`` does.

Shapes: N items, S image side, Z latent dimensions.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from intaglio.config import load
from intaglio.data.batches import fixed_batches
from intaglio.data.pixels import read_image
from intaglio.data.vectors import VectorFile
from intaglio.files import BATCH, Skipped, contact_sheet, free_folder, image_batches, new_folder, write_rows
from intaglio.health.check import CheckReport
from intaglio.health.check import check as check_config
from intaglio.history import HistoryWriter, Reading, read_history, run_folder
from intaglio.history.run_folder import RunFolder
from intaglio.models.autoencoder import Autoencoder
from intaglio.models.diffusion import DiffusionModel
from intaglio.models.jepa import JepaModel
from intaglio.models.multimodal import GUIDANCE, TEMPERATURE, MultimodalModel
from intaglio.models.multimodal import interpolate as between
from intaglio.models.saved import Model, of_run, open_saved
from intaglio.models.vqa import VqaModel
from intaglio.sampling.diffusion import Method, Sampler
from intaglio.sampling.guidance import Guidance
from intaglio.sampling.tokens import Decoding

if TYPE_CHECKING:
    from intaglio.training.kinds import Kind

__all__ = [
    "caption",
    "check",
    "demo",
    "encode",
    "evaluate",
    "generate",
    "interpolate",
    "load_model",
    "prove",
    "reconstruct",
    "search",
    "train",
]


def load_model(run: str | Path) -> Model:
    """The model of a finished run (or of a folder written by ``save_pretrained``), on a GPU where there is one."""
    path = Path(run)
    model = open_saved(path) if (path / "model.safetensors").is_file() else of_run(run_folder.find(run))
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _multimodal(run: str | Path, verb: str) -> MultimodalModel:
    """The model of a multimodal run.

    Raises:
        ValueError: it is of a system that has no such use; says which uses it has.
    """
    model = load_model(run)
    if not isinstance(model, MultimodalModel):
        uses = {
            Autoencoder: "reconstruct",
            DiffusionModel: "generate, reconstruct",
            JepaModel: "encode, search --task, export",
            VqaModel: "answer",
        }[type(model)]
        raise ValueError(f"{run} is no multimodal model, and cannot {verb}. What it can do: {uses}.")
    return model


def train(recipe: str | Path | None = None, overrides: Sequence[str] = (), **options: Any) -> RunFolder | None:
    """Trains a recipe, goes on with a run (``resume=RUN``), or fine-tunes one (``parent=RUN``): the run folder.

    ``options`` are those of ``intaglio.training.run.train``: resume, parent, dry_run, quiet; ``autopilot`` repairs what
    fails on the way, with trials of at most that share of the run's steps.
    """
    if "autopilot" in options:
        from intaglio.training.autopilot import fly

        if recipe is None or (set(options) - {"autopilot", "quiet"}):
            raise ValueError("--autopilot begins with a recipe: leave --resume, --from and --dry-run out.")
        return fly(recipe, overrides, budget=options["autopilot"], quiet=options.get("quiet", False))
    from intaglio.training import run

    return run.train(recipe, overrides, **options)


def demo(out: str | Path = "runs", quiet: bool = False) -> RunFolder:
    """Trains a small model on the built-in engravings and gives its run folder; ``report/index.html`` shows it."""
    from intaglio.training import demo as demonstration

    return demonstration.demo(out, quiet)


def check(recipe: str | Path, overrides: Sequence[str] = ()) -> CheckReport:
    """True parameter counts, memory, time and static faults of a recipe, before a step is spent."""
    return check_config(load(recipe, overrides))


def caption(
    run: str | Path,
    images: Sequence[str | Path],
    decoding: Decoding | None = None,
    seed: int | None = None,
    skipped: Skipped | None = None,
) -> dict[str, str]:
    """A caption for each image file or each image of a folder: {file: caption}."""
    model = _multimodal(run, "caption")
    sampled = decoding is not None and decoding.method == "sample"
    if seed is not None and not sampled:
        raise ValueError("A seed has no effect on greedy and beam captions: leave it out, or use --method sample.")
    if sampled and seed is None:
        seed = 0
    found: dict[str, str] = {}
    for names, pixels in image_batches(images, model.image_size, skipped):
        seeds = None if seed is None else [seed + len(found) + k for k in range(len(names))]
        found |= dict(zip(names, model.caption(model.encode(pixels), decoding, seeds), strict=True))
    return found


def generate(
    run: str | Path,
    out: str | Path,
    n: int = 16,
    seed: int = 0,
    text: str | None = None,
    temperature: float | None = None,
    guidance: float | None = None,
    label: str | None = None,
    interval: Sequence[float] | None = None,
    rescale: float | None = None,
    sampler: Method | None = None,
    steps: int | None = None,
    eta: float | None = None,
) -> list[dict[str, Any]]:
    """New images from a multimodal or a diffusion model. Writes PNGs, ``metadata.jsonl`` and ``sheet.png``.

    The folder written is itself an image folder that ``train`` reads. Row i comes from seed + i alone, so the same
    seed gives the same image in any n. A multimodal model draws from its prior, or from ``text``, and captions what it
    draws (``temperature``). A diffusion model draws a ``label`` (each class in turn where none is given) or a
    ``text``; for the rest see `Guidance` and `Sampler`; what is not given is as the run has it.

    Raises:
        ValueError: an option of the other kind of model, or a value that it cannot have.
    """
    if n < 1:
        raise ValueError(f"n is {n}; ask for at least 1 image.")
    model, seeds = load_model(run), range(seed, seed + n)
    denoising = {
        "label": label,
        "interval": interval,
        "rescale": rescale,
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
    }
    if isinstance(model, MultimodalModel):
        _refuse_given(denoising, "diffusion models; this one is multimodal")
        draw = _from_prior(model, seeds, text, temperature, guidance)
    elif isinstance(model, DiffusionModel):
        _refuse_given({"temperature": temperature}, "multimodal models; this one is of diffusion: see --cfg and --eta")
        usual = model.usual_sampler()
        how = Sampler(sampler or usual.method, usual.steps if steps is None else steps, eta)
        draw = _denoised(model, seeds, label, text, guidance, interval, rescale or 0.0, how)
    else:
        what = {Autoencoder: "an autoencoder", JepaModel: "a JEPA"}.get(type(model), "a model that answers questions")
        raise ValueError(f"{run} is {what}, which draws nothing new; train diffusion for that.")
    folder = free_folder(out)
    rows: list[dict[str, Any]] = []
    pictures = []
    for images, told in draw:
        folder.mkdir(parents=True, exist_ok=True)
        for image, row in zip(images, told, strict=True):
            name = f"seed-{seed + len(rows):06d}.png"
            Image.fromarray(image).save(folder / name)
            rows.append({"file_name": name, **row})
        pictures.append(images)
    write_rows(folder / "metadata.jsonl", rows)
    contact_sheet(np.concatenate(pictures), 8).save(folder / "sheet.png")
    if isinstance(model, MultimodalModel) and text is not None and (unknown := model.unknown_tokens(text)):
        rows[0]["note"] = f"{unknown} pieces of the text never occurred in the training captions"
    return rows


Drawn = Iterator[tuple[np.ndarray, list[dict[str, Any]]]]
"""Images (B, S, S, 3) and what is to be written of each."""


def _refuse_given(options: Mapping[str, Any], whose: str) -> None:
    given = [("--class" if name == "label" else f"--{name}") for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: of {whose}.")


def _from_prior(
    model: MultimodalModel, seeds: range, text: str | None, temperature: float | None, guidance: float | None
) -> Drawn:
    temperature = TEMPERATURE if temperature is None else temperature
    guidance = GUIDANCE if guidance is None else guidance
    common = {"temperature": temperature, "guidance": guidance} | ({} if text is None else {"text": text})
    for at in range(0, len(seeds), BATCH):
        part = seeds[at : at + BATCH]
        if text is None:
            z = model.sample_prior(part, temperature, guidance)
        else:
            z = model.text_latent([text] * len(part), part, temperature, guidance)
        told = zip(part, model.caption(z), strict=True)
        yield model.decode(z), [{"caption": words, "seed": s, **common} for s, words in told]


def _denoised(
    model: DiffusionModel,
    seeds: range,
    label: str | None,
    text: str | None,
    weight: float | None,
    interval: Sequence[float] | None,
    rescale: float,
    sampler: Sampler,
) -> Drawn:
    if label is not None and text is not None:
        raise ValueError("Ask for a class or for a text, not for both.")
    if weight not in (None, 1.0) and model.prompts is not None and text is None:
        raise ValueError("--cfg drives images to a text: give one with --text.")
    names = [label] if label is not None else [] if text is not None else list(model.classes)
    weight = model.usual_guidance(bool(names or text is not None)).weight if weight is None else weight
    guidance = Guidance(weight, (interval[0], interval[1]) if interval else None, rescale=rescale)
    common = {"guidance": weight, "sampler": sampler.method, "steps": sampler.steps}
    for at in range(0, len(seeds), BATCH):
        part = seeds[at : at + BATCH]
        texts = [text] * len(part) if text is not None else None
        classes = [names[s % len(names)] for s in part] if names else None
        kind, shown = ("label", classes) if classes is not None else ("caption", texts or [""] * len(part))
        images = model.generate(part, classes, texts, guidance, sampler)
        yield images, [{kind: what, "seed": s, **common} for s, what in zip(part, shown, strict=True)]


def interpolate(run: str | Path, a: str | Path, b: str | Path, out: str | Path, steps: int = 8) -> list[str]:
    """Images and captions on the way from image a to image b; writes the frames and ``sheet.png``."""
    if steps < 2:
        raise ValueError(f"steps is {steps}; use at least 2, the two ends.")
    model, folder = _multimodal(run, "interpolate"), new_folder(out)
    ends = model.encode(np.stack([read_image(a, model.image_size)[0], read_image(b, model.image_size)[0]]))
    z = between(ends[0], ends[1], steps)
    images, captions = model.decode(z), model.caption(z)
    for k, image in enumerate(images):
        Image.fromarray(image).save(folder / f"step-{k:03d}.png")
    rows = [{"file_name": f"step-{k:03d}.png", "caption": c} for k, c in enumerate(captions)]
    write_rows(folder / "metadata.jsonl", rows)
    contact_sheet(images, steps).save(folder / "sheet.png")
    return captions


def reconstruct(
    run: str | Path,
    images: Sequence[str | Path],
    out: str | Path,
    skipped: Skipped | None = None,
    t: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Decodes each image from its latent, or, of a diffusion model, noises it to ``t`` and denoises it again.

    Writes original | reconstruction and gives {file: PSNR in dB}.
    """
    model = load_model(run)
    if isinstance(model, VqaModel):
        raise ValueError(f"{run} answers questions, and has no decoder of images. What it can do: answer.")
    if isinstance(model, JepaModel):
        raise ValueError(f"{run} is a JEPA, which has no decoder. What it can do: encode, search --task, export.")
    if isinstance(model, DiffusionModel):
        t = model.schedule.steps // 2 if t is None else t
        model.schedule.refuse(t)
    elif t is not None:
        raise ValueError("--t is a noise level of diffusion models; this one decodes each image from its latent.")
    folder = new_folder(out)
    quality: dict[str, float] = {}
    for names, pixels in image_batches(images, model.image_size, skipped):
        if isinstance(model, DiffusionModel):
            assert t is not None
            made = model.reconstruct(pixels, t, [seed + len(quality) + k for k in range(len(pixels))])
        elif isinstance(model, Autoencoder):
            made = model.decode_images(model.encode(pixels))
        else:
            made = model.decode(model.encode(pixels))
        for name, before, after in zip(names, pixels, made, strict=True):
            error = np.square((before.astype(float) - after) / 255).mean()
            quality[name] = float(-10 * np.log10(max(error, 1e-12)))
            pair = Image.fromarray(np.concatenate([before, after], axis=1))
            pair.save(folder / f"{len(quality) - 1:04d}-{Path(name).stem}.png")
    return quality


def search(
    run: str | Path,
    collection: str | Path | None = None,
    text: str | None = None,
    image: str | Path | None = None,
    top: int = 5,
    skipped: Skipped | None = None,
    task: str | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The images of a folder (by default the run's own held-out items) that fit a text or an image best; of a JEPA the
    tasks whose rule is most like that of ``task``, with ``out`` also as a picture.

    Each hit has ``file`` (or ``item`` and ``caption``, or ``task``) and ``similarity``, the cosine.
    """
    if sum(given is not None for given in (text, image, task)) != 1:
        raise ValueError("Search by one of these: --text WORDS, --image FILE, or of tasks --task NAME or FILE.")
    if top < 1:
        raise ValueError(f"top is {top}; ask for at least 1 hit.")
    if task is not None:
        from intaglio import puzzles

        return puzzles.search(run, task, collection, top, out)
    model = _multimodal(run, "search")
    if text is not None:
        query = model.embed_text([text])
    else:
        query = model.embed_image(model.encode(read_image(str(image), model.image_size)[0][None]))
    hits: list[dict[str, Any]] = []
    for rows, latents in _collection(run, model, collection, skipped):
        similarity = (model.embed_image(latents) @ query.T)[:, 0].tolist()
        hits += [{**row, "similarity": round(s, 4)} for row, s in zip(rows, similarity, strict=True)]
        hits = sorted(hits, key=lambda h: -h["similarity"])[:top]
    return hits


def encode(
    run: str | Path, images: Sequence[str | Path], out: str | Path, skipped: Skipped | None = None
) -> tuple[int, int]:
    """Latents of images into one ``.safetensors`` or ``.parquet``, streamed in constant memory: (N, Z).

    Of a JEPA: the rules of tasks, of which ``images`` are files or folders, and their codes beside them.
    """
    if isinstance(load_model(run), JepaModel):
        from intaglio import puzzles

        return puzzles.encode(run, images, Path(out))
    model = _multimodal(run, "encode")
    with VectorFile(Path(out), model.config.latent) as file:
        for names, pixels in image_batches(images, model.image_size, skipped):
            file.append(names, model.encode(pixels).cpu().numpy())
    return file.rows, model.config.latent


def evaluate(run: str | Path) -> tuple[dict[str, Reading], list[str]]:
    """Measures a finished run again on its held-out items and rewrites its findings and page: readings and summary."""
    from intaglio.training.finish import conclude, measure

    folder = run_folder.find(run)
    lines: list[str] = []
    kind, model, prepared = open_again(folder)
    evaluation = measure(kind, model, prepared)
    conclude(folder, evaluation, folder.record["model_step"], lines.append)
    return evaluation.readings, lines


def look_again(run: str | Path) -> dict[str, Reading]:
    """Instruments and trials on the saved model of a run and its held-out items; adds the readings to its history."""
    from intaglio.training.health import Health

    folder = run_folder.find(run)
    kind, model, prepared = open_again(folder)
    config = kind.config
    system = kind.build(prepared, model).to(model.device)
    items = prepared.some("val", config.health.probe)
    health = Health(config, folder, lambda: next(fixed_batches(prepared.data, items, len(items))), False, print)
    readings = health.look(system, None)
    step = folder.record.get("model_step", folder.record["step"])
    with HistoryWriter(folder.metrics) as history:
        history.write(step, float(read_history(folder.metrics)["epoch"][-1]), readings)
    return readings


def prove(run: str | Path, out: str | Path | None = None) -> list[Path]:
    """Remakes all proofs of a finished run from its saved model, by default in their place: the pictures.

    On the same machine they are those of training, byte for byte.
    """
    from intaglio.data.cache import cache_folder
    from intaglio.training.finish import independent_judge, measured_at

    folder = run_folder.find(run)
    kind, model, prepared = open_again(folder)
    if kind.config.train.device == "cpu":
        model.to("cpu")
    step, judge = folder.record["model_step"], independent_judge(prepared, cache_folder(kind.config.data.cache))
    where = folder.proofs(step) if out is None else Path(out)
    return kind.prove(model, prepared, where, False, judge, measured_at(folder, step))


def open_again(folder: RunFolder) -> "tuple[Kind, Any, Any]":
    """A run's kind, its model, and its data, split and encoded as it was.

    Raises:
        ValueError: the data has changed since.
    """
    from intaglio.training.kinds import kind_of

    kind, model = kind_of(folder.config()), load_model(folder.path)
    prepared = kind.prepare(None, model, None, lambda line: None)
    if prepared.fingerprint != folder.record["fingerprint"]:
        raise ValueError(
            f"The data of {folder.path} ({kind.config.data.source}) has changed since it was trained, so its held-out "
            "items are no longer known. Put the data back to measure this run."
        )
    return kind, model, prepared


def _collection(
    run: str | Path, model: MultimodalModel, collection: str | Path | None, skipped: Skipped | None
) -> Iterator[tuple[list[dict[str, Any]], Tensor]]:
    if collection is not None:
        for names, pixels in image_batches([collection], model.image_size, skipped):
            yield [{"file": n} for n in names], model.encode(pixels)
        return
    prepared = open_again(run_folder.find(run))[2]
    items = prepared.splits["val"]
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        corpus = prepared.corpus
        rows = [{"item": corpus.id(int(i)), "caption": corpus.captions(int(i))[0]} for i in part]
        yield rows, model.encode(np.asarray(prepared.data.images[part]))

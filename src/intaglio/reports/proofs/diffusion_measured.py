"""Proofs of a diffusion model that rest on numbers: its conditions, its loss by noise level, its spectrum, its copies.

Shapes: N images, K conditions, E width of a condition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from intaglio.data.prepare import Pictured
from intaglio.health.instruments import samples
from intaglio.health.record import Record
from intaglio.history import NotMeasured
from intaglio.models.classifier import Judge
from intaglio.models.diffusion import DiffusionModel
from intaglio.nn.condition import Condition
from intaglio.nn.documented_unet import DocumentedUNet
from intaglio.objectives.diffusion import LOG_SNR_EDGES, clean_and_noise
from intaglio.reports.proofs.map import LEAST, tsne
from intaglio.reports.sheet import FAINT, INK, MARGIN, WIDTH, WRONG, Sheet
from intaglio.sampling.diffusion import draw_noise, generators_of
from intaglio.sampling.guidance import Guidance
from intaglio.systems.diffusion_evaluation import Asked, wanted

DRAWN = 80
"""Samples that spectrum and neighbours rest on, at least."""

ROOM = WIDTH - 2 * MARGIN
ALIKE, OPPOSITE, NONE = (np.array(c) for c in ((47, 102, 144), (176, 125, 43), (251, 248, 241)))


def words(asked: Asked) -> list[str]:
    """What the model is told, each."""
    return asked.texts or asked.classes or asked.labels


def decibels(model: DiffusionModel, t: int) -> str:
    """The signal-to-noise ratio at ``t``."""
    value = float(model.schedule.log_snr()[t]) * 10 / np.log(10)
    return "noise alone" if value == -np.inf else f"{round(value)} dB".replace("-", "−")


def draw(model: DiffusionModel, prepared: Pictured, judge: Judge | str) -> np.ndarray:
    """80 samples or more, every class or a text of it in turn, as the run samples."""
    labels = judge.labels if isinstance(judge, Judge) else model.classes or prepared.corpus.labels() or ("",)
    asked = wanted(model, prepared, labels, -(-DRAWN // len(labels)))
    return model.generate(range(len(asked.labels)), asked.classes, asked.texts)


# The conditions.


def vectors(model: DiffusionModel, asked: Asked) -> tuple[Tensor, list[str]]:
    """The vector of each condition, float32 (K, E), and its name: a row of the table, or the text's own; null last."""
    network = model.network
    if model.prompts is not None:
        pooled = model.prompts(model.prompts.ids([*words(asked), ""])).pooled_BD
        assert pooled is not None
        return pooled.float().cpu(), [*words(asked), "(no text)"]
    if isinstance(network, DocumentedUNet):
        table = network.table if network.label is None else network.label.weight
    else:
        table = network.condition.table.weight
    assert table is not None
    return table.detach().float().cpu(), [*model.classes, "(no class)"]


def conditions(model: DiffusionModel, asked: Asked) -> Sheet:
    """The cosine of every two conditions, as the network receives them."""
    v, names = vectors(model, asked)
    n, chance = len(names), 2 / v.shape[1] ** 0.5
    c = F.cosine_similarity(v[:, None], v[None], dim=-1).numpy()
    apart = np.where(np.eye(n, dtype=bool), -2, c)
    i, j = np.unravel_index(apart.argmax(), c.shape)
    same = [(b + 1, a + 1) for a in range(n) for b in range(a) if c[a, b] > 0.95]
    sheet = Sheet(
        "What the network is told, each beside each",
        f"The cosine of every two conditions: 1 (blue) says the same, 0 has nothing in common, −1 (ochre) is opposite. "
        f"Random vectors of this length lie within ±{chance:.2f}. Two that are told alike cannot be drawn apart: look "
        f"for blue off the diagonal. The nearest two are {i + 1} and {j + 1}, at {c[i, j]:.2f}.",
    )
    left = 1.5 if model.prompts is None else 3.4
    cell = min(0.5, (ROOM - left) / n)
    top = sheet.y + 0.2
    for a in range(n):
        y = top + a * cell
        sheet.text(MARGIN + left + a * cell + cell * 0.3, sheet.y, str(a + 1), size=7.5, colour=FAINT)
        sheet.text(MARGIN, y + cell * 0.3, f"{a + 1}  {names[a]}", left - 0.1, 7.5, lines=2 if cell > 0.4 else 1)
        for b in range(n):
            x, tone = MARGIN + left + b * cell, ALIKE if c[a, b] > 0 else OPPOSITE
            mixed = NONE + (tone - NONE) * min(1.0, abs(c[a, b]))
            sheet.box(x, y, cell - 0.02, cell - 0.02, "#" + "".join(f"{round(p):02x}" for p in mixed))
            if cell > 0.3:
                colour = "white" if abs(c[a, b]) > 0.6 else INK
                sheet.text(
                    x + 0.07,
                    y + cell * 0.3,
                    f"{c[a, b]:.2f}".replace("-0.00", "0.00").replace("-", "−"),
                    size=7.5,
                    colour=colour,
                )
    if same:
        pairs = ", ".join(f"{a} and {b}" for a, b in same)
        sheet.text(MARGIN, top + n * cell + 0.08, f"✗ Told nearly alike: {pairs}", colour=WRONG, weight="bold")
    for a in range(n):
        k = int(apart[a].argmax())
        sheet.told.append(f"{names[a]}: nearest {names[k]}, cosine {c[a, k]:.2f}.")
    return sheet


def no_map(model: DiffusionModel, prepared: Pictured) -> str | None:
    """Why the conditions cannot be shown as a map."""
    count = len(prepared.splits["val"]) if model.prompts is not None else len(model.classes)
    what = "held-out captions" if model.prompts is not None else "classes"
    return (
        None if count >= LEAST else f"t-SNE makes up a form for fewer than {LEAST} points, and there are {count} {what}"
    )


def conditions_map(model: DiffusionModel, prepared: Pictured) -> Sheet:
    """Conditions as points of a plane in which neighbours stay neighbours."""
    items = prepared.some("val", 240)
    labels = [label or "" for label in prepared.labels_of(items)]
    texts = [prepared.corpus.captions(int(i))[0] for i in items] if model.prompts is not None else []
    v, names = vectors(model, Asked(None, texts, labels))
    v, names = v[:-1], labels if texts else names[:-1]
    kinds = sorted(set(names)) if texts else []
    at = tsne(v)
    sheet = Sheet(
        "What the network is told, as a map",
        f"{len(v)} {'held-out captions' if texts else 'classes'} by t-SNE: near each other where the network is told "
        "nearly the same. Distances between groups, and their sizes, mean nothing. "
        + ("Look for captions of one object that lie together." if texts else ""),
    )
    low, high = at.min(0), at.max(0)
    scale = min((ROOM - 0.8) / (high - low)[0], 6.0 / (high - low)[1])
    for (x, y), name in zip((at - low) * scale, names, strict=True):
        sheet.text(MARGIN + 0.4 + x, sheet.y + y, name or "•", 2.0, 6.5, _colour(kinds, name), 1, ha="center")
    sheet.told = [f"{len(v)} points."]
    return sheet


def _colour(kinds: Sequence[str], name: str) -> str:
    tones = (INK, "#8a8378", "#c06c94", "#2f6690", "#b07d2b", "#7a4b8c", "#5b7f23", "#b5502a", "#2a8c8c", "#8c2a62")
    return tones[kinds.index(name) % len(tones)] if name in kinds else INK


# The loss by noise level.


def noise_levels(model: DiffusionModel, prepared: Pictured, record: Record) -> Sheet:
    """Each bin of log-SNR: a held-out image there, what the network takes it for, and the loss beside its null."""
    found = {float(name.split("/")[1][8:]): s for name, s in record.matching("val/log_snr.*/loss").items()}
    centres = sorted(found, reverse=True)
    shares = {c: found[c].value / (found[c].null or np.nan) for c in centres}
    sheet = Sheet(
        "How much of the noise is understood, from little to much",
        "Above: one unseen image at each level of noise. Below: what the network takes it for, in one look. Bars: the "
        f"error of “{model.prediction}” on unseen images (dark) beside that of the best guess that looks at each "
        "number alone (light). Look for dark bars well below light ones where there is noise to see through, in the "
        "middle; at the right end hardly anything is left to be seen.",
    )
    room, top = ROOM / len(centres), sheet.y
    side, tall = min(1.1, room - 0.08), 1.5
    item = prepared.some("val", 1)
    condition = own(model, prepared, item)
    scale = tall / max(max(s.value, s.null or 0.0) for s in found.values())
    log_snr = model.schedule.log_snr()
    for k, centre in enumerate(centres):
        x, s = MARGIN + k * room, found[centre]
        t = int((log_snr - centre).abs().argmin())
        drowned, taken = _one_look(model, prepared.data.images[item], t, condition)
        sheet.text(x, top, f"t {t}: {decibels(model, t)}", room, 7, FAINT, 1)
        sheet.picture(x, top + 0.17, side, drowned)
        sheet.picture(x, top + 0.17 + side + 0.05, side, taken)
        base = top + 0.17 + 2 * side + 0.2 + tall
        sheet.box(x, base - s.value * scale, 0.36, s.value * scale, INK)
        if s.null is not None:
            sheet.box(x + 0.4, base - s.null * scale, 0.36, s.null * scale, "#c9c1b2")
        y = sheet.text(x, base + 0.05, f"{s.value:.2g}", room, 8, INK, 1)
        if s.null is not None:
            sheet.text(x + 0.4, base + 0.05, f"{s.null:.2g}", room, 8, FAINT, 1)
            worse = shares[centre] > 1.02
            said = f"{'✗ ' if worse else ''}{shares[centre]:.0%} of the guess"
            sheet.text(x, y + 0.02, said, room, 7, WRONG if worse else FAINT, 2, weight="bold" if worse else "normal")
        null = "" if s.null is None else f", the guess {s.null:.4g}"
        sheet.told.append(f"Log-SNR {_bin(centre)}: loss {s.value:.4g}{null}.")
    return sheet


def _bin(centre: float) -> str:
    if abs(centre) > LOG_SNR_EDGES[-1]:
        return "below −6" if centre < 0 else "6 and more"
    return f"{centre - 1:g} to {centre + 1:g}".replace("-", "−")


def own(model: DiffusionModel, prepared: Pictured, items: np.ndarray) -> Condition:
    """What held-out items are, as the model is told it."""
    labels = [label or "" for label in prepared.labels_of(items)]
    captions = [prepared.corpus.captions(int(i))[0] for i in items] if model.prompts is not None else None
    return model.condition(len(items), labels if model.classes else None, captions)


@torch.no_grad()
def _one_look(model: DiffusionModel, image: np.ndarray, t: int, condition: Condition) -> tuple[np.ndarray, np.ndarray]:
    """One image (1, S, S, 3) noised to ``t``, and what the network takes it for: two images (S, S, 3)."""
    a, s = model.schedule.level(t)
    x = a * model.to_x(image) + s * draw_noise(generators_of([0]), model.x_shape, model.device)
    predicted = model.denoiser(condition, Guidance())(x, torch.full((1,), t, device=model.device))
    x0, _ = clean_and_noise(model.prediction, predicted, x, a, s)
    return model.to_images(x)[0], model.to_images(x0)[0]


# The spectrum.


def radial_power(images: np.ndarray) -> np.ndarray:
    """Mean power at each whole frequency from 1 to S/2 cycles an image, (N, S // 2), of uint8 (N, S, S, 3)."""
    size = images.shape[1]
    window = np.outer(*(2 * [np.hanning(size + 1)[:-1]]))[..., None]
    x = images.astype(np.float64) / 255
    power = (np.abs(np.fft.fft2((x - x.mean((1, 2), keepdims=True)) * window, axes=(1, 2))) ** 2).mean(3)
    f = np.fft.fftfreq(size, 1 / size)
    ring = np.hypot(f[:, None], f[None]).round().astype(int)
    return np.stack([power[:, ring == r].mean(1) for r in range(1, size // 2 + 1)], 1)


def spectrum(prepared: Pictured, made: np.ndarray) -> Sheet:
    """Power by frequency of samples and of held-out images, with examples of either."""
    real = prepared.data.images[prepared.some("val", 256)]
    of_real, of_made = radial_power(real), radial_power(made)
    size = real.shape[1]
    parts = {
        "coarse forms": slice(0, size // 8),
        "lines": slice(size // 8, size // 4),
        "fine detail": slice(size // 4, None),
    }
    ratios = {name: float(of_made[:, p].mean() / of_real[:, p].mean()) for name, p in parts.items()}
    usual = {name: _among_real(of_real[:, p].mean(1), len(made)) for name, p in parts.items()}
    sheet = Sheet(
        "Are they as rich in detail as real images?",
        f"The power of {len(made)} samples and {len(real)} unseen real images by frequency, from forms as large as the "
        "image (left) to single pixels (right). Look for the two lines to run together. Where the samples’ line "
        "falls below at right, they are blurred; where it lies above, noisy. The band holds 80 % of real images, in "
        "brackets, what as many real images have of the others’ power in 95 of 100 draws.",
    )
    x, y, width, height = MARGIN + 0.5, sheet.y + 0.1, 5.6, 3.6
    k = np.log(np.arange(1, of_real.shape[1] + 1))
    k = x + k / k[-1] * width
    low, high = np.quantile(of_real, [0.1, 0.9], axis=0)
    lines = {"real": of_real.mean(0), "made": of_made.mean(0)}
    logs = [np.log10(np.maximum(v, 1e-9)) for v in (low, high, *lines.values())]
    bottom, up = min(v.min() for v in logs) - 0.1, max(v.max() for v in logs) + 0.1

    def place(v: np.ndarray) -> np.ndarray:
        return y + height * (up - np.log10(np.maximum(v, 1e-9))) / (up - bottom)

    sheet.axes.fill_between(k, place(low), place(high), color="#c9c1b2", alpha=0.5, linewidth=0, zorder=1)
    sheet.line(k, place(lines["real"]), FAINT, 2.5)
    sheet.line(k, place(lines["made"]), "#2f6690", 2.5)
    for decade in range(int(np.ceil(bottom)), int(np.floor(up)) + 1):
        at = y + height * (up - decade) / (up - bottom)
        sheet.line([x, x + width], [at, at], "#ded7c8", 0.6)
        sheet.text(MARGIN, at - 0.06, f"{10.0**decade:g}", 0.6, 7, FAINT, 1)
    sheet.line([x, x, x + width], [y, y + height, y + height], FAINT, 0.8)
    for name, p in parts.items():
        at = k[p]
        sheet.text(at[0], y + height + 0.06, name, 1.5, 8)
        a, b = usual[name]
        off = not a <= ratios[name] <= b
        said = f"{'✗ ' if off else ''}{ratios[name]:.2f} × real ({a:.2f} to {b:.2f})"
        sheet.text(at[0], y + height + 0.2, said, max(0.9, at[-1] - at[0]), 7, WRONG if off else FAINT, 4)
        sheet.told.append(
            f"{name}: {ratios[name]:.3f} times the power of real images; as many real ones {a:.3f} to {b:.3f}."
        )
    right = x + width + 0.35
    sheet.text(right, sheet.y, "real", 1, 8, FAINT, weight="bold")
    sheet.text(right + 1.35, sheet.y, "samples", 1, 8, "#2f6690", weight="bold")
    for row in range(min(3, len(real))):
        sheet.picture(right, sheet.y + 0.18 + row * 1.28, 1.22, real[row])
        sheet.picture(right + 1.35, sheet.y + 0.18 + row * 1.28, 1.22, made[row])
    return sheet


def _among_real(power_N: np.ndarray, n: int, draws: int = 200) -> tuple[float, float]:
    """Where 95 % of the ratios of ``n`` random real images to the other ones lie."""
    random, n = np.random.default_rng(0), min(n, len(power_N) // 2)
    if n == 0:
        return 0.0, np.inf
    orders = [random.permutation(len(power_N)) for _ in range(draws)]
    low, high = np.quantile([power_N[o[:n]].mean() / power_N[o[n:]].mean() for o in orders], [0.025, 0.975])
    return float(low), float(high)


# The nearest training images.


@dataclass
class Closest:
    """Of each sample the nearest three training items (N, 3), its ratio (N,), and that of the nearest real images."""

    items: np.ndarray
    ratios: np.ndarray
    copied: float
    usual: float


def closest(prepared: Pictured, judge: Judge | str, made: np.ndarray) -> Closest | NotMeasured:
    """By the judge's features, as ``neighbour_ratio`` and ``copied_share`` are measured."""
    if isinstance(judge, str):
        return NotMeasured(judge)
    images, some, val = prepared.data.images, prepared.splits["train"], prepared.some("val", 1024)
    train = torch.cat([judge.features(images[some[at : at + 1024]]) for at in range(0, len(some), 1024)])
    drawn = judge.features(made)
    found = samples.ratios(train, judge.features(images[val]), drawn)
    if isinstance(found, NotMeasured):
        return found
    nearest = torch.cdist(drawn.double(), train.double()).topk(3, largest=False).indices.cpu().numpy()
    return Closest(some[nearest], found[1], samples.copied_below(found[0]), float(found[0].mean()))


def neighbours(prepared: Pictured, made: np.ndarray, found: Closest | NotMeasured) -> Sheet:
    """The samples that lie nearest to training images, and as many others, each beside those."""
    assert isinstance(found, Closest)
    order = np.argsort(found.ratios, kind="stable")
    copies = int((found.ratios <= found.copied).sum())
    shown = [*order[:6], *order[np.linspace(6, len(order) - 1, 6).astype(int)]]
    sheet = Sheet(
        "New images, or copies of training images?",
        "Of each four: a sample (left), and the three training images that a classifier of real images finds most like "
        "it. The number is how near the first of these is beside the nearest 50: 0 is a copy, unseen real images have "
        f"{found.usual:.2f}. Above are the six most suspicious of {len(made)}, below six others. Look for the same "
        f"image twice. {copies} of {len(made)} are as near as the nearest 1 % of unseen real images are "
        f"({found.copied:.2f} or less).",
    )
    half, side, top = ROOM / 2 + 0.05, 1.08, sheet.y
    for place, k in enumerate(shown):
        x, y = MARGIN + place % 2 * half, top + place // 2 * (side + 0.26) + (0.15 if place >= 6 else 0)
        copy = found.ratios[k] <= found.copied
        sheet.picture(x, y, side, made[k], frame=WRONG if copy else None)
        for n, item in enumerate(found.items[k]):
            sheet.picture(x + side + 0.12 + n * (side + 0.04), y, side, prepared.data.images[item])
        said = f"{'✗ as near as a copy: ' if copy else ''}{found.ratios[k]:.2f}"
        weight = "bold" if copy else "normal"
        sheet.text(x, y + side + 0.03, said, 2.5, 7.5, WRONG if copy else FAINT, 1, weight=weight)
        sheet.text(
            x + side + 0.12, y + side + 0.03, f"item {prepared.corpus.id(int(found.items[k][0]))}", 3, 7, FAINT, 1
        )
        name = prepared.corpus.id(int(found.items[k][0]))
        sheet.told.append(f"Sample {k}: nearest training item {name}, ratio {found.ratios[k]:.3f}.")
    return sheet

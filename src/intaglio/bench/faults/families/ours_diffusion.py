"""Our diffusion, small: pictures of a shape, of the colour that is asked for, in pixels and in latents.

The cases marked D are those of the documented STL-10 system.
"""

from typing import Any

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.families._shapes import LATENTS, SHAPES

SYSTEM, MODEL, AUTOENCODER = "intaglio.systems.diffusion", "intaglio.models.diffusion", "intaglio.models.autoencoder"
SAMPLING, EMA, LOOP = "intaglio.sampling.diffusion", "intaglio.training.ema", "intaglio.training.loop"
KIND, OPTIMIZERS = "intaglio.training.kinds.diffusion", "intaglio.systems.optimizers"

OPTIONS: dict[str, Any] = {
    "data.items": 500, "data.held_out": 0.2, "data.image_size": 16, "data.flips": False,
    "train.steps": 300, "train.batch_size": 32, "train.ema": 0.95, "train.precision": "fp32", "train.device": "cpu",
    "train.log_every": 10, "train.validate_every": 60, "train.validate_items": 80, "train.keep": 1,
    "health.probe": 80, "optim.kind": "adamw", "optim.rate": 1e-2, "optim.warmup": 20,
    "model.blocks": 1, "model.widths": [16, 32], "model.patch": 2,
    "sampling.guidance": 1.5, "sampling.steps": 8, "sampling.each": 25,
}  # fmt: skip

BRIEF: dict[str, Any] = {
    "train.steps": 24, "optim.warmup": 4, "train.validate_every": 8, "train.log_every": 2,
    "sampling.each": 2, "sampling.steps": 8,
}  # fmt: skip
"""Enough for what is wrong from the start; what is drawn then is noise."""

IN_LATENTS: dict[str, Any] = {"model.widths": [32, 32], "model.patch": 1, "sampling.guidance": 2.0}


def _broken(old: str, new: str, module: str) -> tuple[Change, ...]:
    """One change to the system, on shapes."""
    return SHAPES, Change(old, new, module)


STATIC = (
    Fault(
        "text-for-a-network-of-labels",
        "The network was built for labels, and the table of texts came later: no text ever reaches it.",
        ("conditioned-too-late", "attention-over-one"),
        options={"model.network": "documented", "condition.by": "text", "condition.encoder": "no/such/run"}
        | {"model.widths": [16], "model.attention": [], "model.patch": 1},
        case="D conditioned-too-late",
        static=True,
    ),
    Fault(
        "attention-in-a-single-place",
        "The deepest level has one place, whose attention has one key.",
        ("attention-over-one",),
        options={"model.widths": [16, 16, 16, 16], "model.attention": [3], "model.patch": 2},
        case="D attention-over-one",
        minor=True,
        static=True,
    ),
    Fault(
        "middle-never-called",
        "The blocks in the middle of the U-Net are built, and the forward pass goes around them.",
        ("dead-parameters",),
        changes=(Change("for layer in self.middle:", "for layer in self.middle[:0]:", "intaglio.nn.unet"),),
        case="D dead-parameters",
        minor=True,
        static=True,
    ),
    Fault(
        "every-condition-dropped",
        "The share of conditions to keep was given as the share to drop.",
        ("null-mismatch",),
        options={"condition.drop": 1.0},
        case="D null-mismatch",
        static=True,
    ),
    Fault(
        "hardly-a-condition-dropped",
        "One condition in two hundred is dropped, but samples are guided by the difference.",
        ("null-mismatch",),
        options={"condition.drop": 0.005},
        minor=True,
        static=True,
    ),
    Fault(
        "signal-left-at-the-end",
        "The schedule of latent diffusion leaves signal at its last level, and sampling starts from pure noise.",
        ("schedule-mismatch",),
        options={"noise.kind": "scaled-linear", "noise.steps": 1000},
        case="D schedule-mismatch",
        minor=True,
        static=True,
    ),
    Fault(
        "ancestral-without-its-noise",
        "η = 0 leaves the noise of the ancestral step out, and keeps the rest of it.",
        ("sampler-wrong",),
        changes=(Change("    return x + sigma * draw() if sigma and draw else x\n", "    return x\n", SAMPLING),),
        options={"sampling.method": "ddpm", "sampling.steps": 100},
        case="D sampler-wrong",
        static=True,
    ),
    Fault(
        "two-steps-of-ddim",
        "A sampler of first order in two steps.",
        ("sampler-wrong",),
        options={"sampling.method": "ddim", "sampling.steps": 2},
        static=True,
    ),
    Fault(
        "weights-of-min-snr",
        "min(SNR, γ), meant for ε, weighs the error of v: levels of much noise count for nothing.",
        ("high-noise-starved",),
        options={"loss.weighting": "min-snr"},
        minor=True,
        static=True,
    ),
    Fault(
        "ten-images-a-class-short",
        "Sixty images, of which twelve are held out, and batches of sixty-four.",
        ("batch-exceeds-data",),
        options={"data.items": 60, "train.batch_size": 64},
        static=True,
    ),
)

TRAINED = (
    Fault(
        "conditions-all-alike",
        "The table of conditions was filled after the model had been built, so that all rows are one.",
        ("condition-ignored",),
        changes=_broken(
            "return Condition(labels_B=batch.labels) if self.model.classes",
            "return Condition(labels_B=torch.zeros_like(batch.labels)) if self.model.classes",
            SYSTEM,
        ),
        options=BRIEF,
        case="D condition-ignored",
    ),
    Fault(
        "classes-in-another-order",
        "Samples are asked for by the place of a class in a list that was sorted in another way.",
        ("unfaithful",),
        changes=_broken(
            "        return self.classes.index(name)",
            "        return (self.classes.index(name) + 1) % len(self.classes)",
            MODEL,
        ),
        case="D unfaithful",
    ),
    Fault(
        "guided-by-fifteen",
        "Guidance of 15, because 9 had looked sharper than 6.",
        ("over-stylised",),
        changes=(SHAPES,),
        options={"sampling.guidance": 15.0},
        case="D over-stylised",
    ),
    Fault(
        "thirty-images-by-heart",
        "Thirty images are all there is, and the training goes on.",
        ("memorised",),
        changes=(SHAPES,),
        options={
            "data.items": 160,
            "data.held_out": 0.8,
            "train.batch_size": 16,
            "train.steps": 600,
            "train.validate_every": 200,
        }
        | {"model.widths": [32, 32], "optim.rate": 5e-3, "sampling.steps": 12},
        case="D memorised",
        minor=True,
    ),
    Fault(
        "error-of-the-noise",
        "ε is predicted, whose error at much noise says nothing of the image.",
        ("high-noise-starved",),
        changes=(SHAPES,),
        options={"loss.prediction": "epsilon", "train.steps": 150, "sampling.each": 2, "sampling.steps": 8},
        case="D high-noise-starved",
    ),
    Fault(
        "passes-counted-as-steps",
        "The schedule was built for the passes, of which two make a step: the rate ends at half of its peak.",
        ("learning-rate-off",),
        changes=_broken(
            "warmup_cosine(step, steps, config.warmup", "warmup_cosine(step, 2 * steps, config.warmup", OPTIMIZERS
        ),
        options=BRIEF,
        case="D learning-rate-off",
    ),
    Fault(
        "declared-test-in-training",
        "What the source declares as its test split is shared out with the rest.",
        ("trained-on-test",),
        changes=_broken(
            "    named = {corpus.declared_split(i) for i in items}",
            "    named = {None for _ in items}",
            "intaglio.data.splits",
        ),
        options=BRIEF,
        case="D trained-on-test",
    ),
    Fault(
        "flip-of-every-copy",
        "Every image is mirrored whenever it is drawn: there are no others than before.",
        ("augmentation-inert",),
        changes=_broken(
            "        mirrored = draw // 2**30 % 2 == 1 if self.flips else np.zeros(len(items), bool)",
            "        mirrored = np.ones(len(items), bool) if self.flips else np.zeros(len(items), bool)",
            "intaglio.data.batches",
        ),
        options=BRIEF | {"data.flips": True},
        case="D augmentation-inert",
        minor=True,
    ),
    Fault(
        "latents-clamped",
        "Latents of unit variance are clamped to [−1, 1], as pixels are.",
        ("latent-scale",),
        changes=(
            SHAPES,
            LATENTS,
            Change(
                "        return (self.posterior(self.to_range(images)).mean - mean_K11) / std_K11",
                "        return ((self.posterior(self.to_range(images)).mean - mean_K11) / std_K11).clamp(-1, 1)",
                AUTOENCODER,
            ),
            Change("layout.encode()", '(layout + "clamped").encode()', AUTOENCODER),
        ),
        options=BRIEF | IN_LATENTS,
        case="D latent-scale",
    ),
    Fault(
        "factor-of-another-autoencoder",
        "Latents are multiplied by .18215, the factor of another autoencoder.",
        ("latent-scale",),
        changes=(
            SHAPES,
            LATENTS,
            Change(
                "return self.latent_mean[:, None, None], self.latent_std[:, None, None]",
                "return 0 * self.latent_mean[:, None, None], 0 * self.latent_std[:, None, None] + 1 / 0.18215",
                AUTOENCODER,
            ),
            Change("layout.encode()", '(layout + ".18215").encode()', AUTOENCODER),
        ),
        options=BRIEF | IN_LATENTS,
    ),
    Fault(
        "autoencoder-without-its-weights",
        "The autoencoder is built, and its weights are not loaded.",
        ("round-trip-ceiling",),
        changes=(
            SHAPES,
            Change(
                "        if not self.config.model.autoencoder:\n            return None",
                "        if not self.config.model.autoencoder:\n"
                "            return Autoencoder(self.config.data.image_size, (24, 48), 8)",
                KIND,
            ),
        ),
        options=BRIEF | IN_LATENTS,
        case="D round-trip-ceiling",
    ),
    Fault(
        "average-never-stepped",
        "The average of the weights is kept, saved and sampled from, and never stepped.",
        ("ema-lag",),
        changes=_broken("            self.ema.update(pl_module)", "            pass", LOOP),
        options=BRIEF,
    ),
    Fault(
        "average-of-ten-thousand-steps",
        "The average was meant for a run of a million steps, and starts without a warm-up.",
        ("ema-lag",),
        changes=_broken(
            "        decay = min(self.decay, (1 + self.step) / (10 + self.step))", "        decay = self.decay", EMA
        ),
        options={"train.ema": 0.9999, **BRIEF},
        minor=True,
    ),
)


def _healthy(name: str, what: str = "", seeds: tuple[int, ...] = (0,), **options: object) -> Healthy:
    return Healthy(name, what, (SHAPES,), {k.replace("__", "."): v for k, v in options.items()}, seeds)


FAMILY = Family(
    "ours_diffusion",
    "development",
    "intaglio's diffusion, of shapes by their colour",
    recipe="diffusion-small",
    options=OPTIONS,
    faults=(*STATIC, *TRAINED),
    healthy=(
        _healthy("plain", seeds=(0, 1)),
        _healthy("muon", optim__kind="muon", optim__rate=3e-3),
        _healthy("flow", loss__prediction="flow", noise__kind="straight", train__steps=900),
        _healthy("image", "The image itself is predicted.", loss__prediction="x0"),
        Healthy("latents", "In latents, of an autoencoder of its own.", (SHAPES, LATENTS), IN_LATENTS),
        _healthy("flipped", "Half of the pictures are mirrored.", data__flips=True),
    ),
)

"""Our multimodal system, small: a latent, a picture of a shape and its caption.

The cases marked E are those of the documented engravings system.
"""

from typing import Any

from intaglio.bench.faults.case import Change, Family, Fault, Healthy
from intaglio.bench.faults.families._multimodal_static import STATIC
from intaglio.bench.faults.families._shapes import SHAPES

SYSTEM, NETWORKS = "intaglio.systems.multimodal", "intaglio.models.networks"
PREPARE, TOKENIZER, OPTIMIZERS = "intaglio.data.prepare", "intaglio.data.tokenizer", "intaglio.systems.optimizers"
LOOP, BASE = "intaglio.training.loop", "intaglio.systems.base"

OPTIONS: dict[str, Any] = {
    "data.items": 500, "data.held_out": 0.2, "data.image_size": 32, "loss.caption": 4.0,
    "train.steps": 200, "train.batch_size": 16, "train.ema": 0.95, "train.precision": "fp32", "train.device": "cpu",
    "train.log_every": 5, "train.validate_every": 20, "train.validate_items": 64, "train.keep": 1,
    "health.probe": 64, "optim.warmup": 20,
    "model.channels": [16, 24, 32], "model.latent": 32, "model.width": 32, "model.heads": 2, "model.feed_forward": 64,
    "model.decoder_layers": 1, "model.encoder_layers": 1, "model.vocabulary": 600, "prior.layers": 2,
    "prior.width": 64, "prior.steps": 200, "prior.batch_size": 128,
}  # fmt: skip

BRIEF: dict[str, Any] = {
    "train.steps": 120, "prior.layers": 0,
}  # fmt: skip
"""Enough for what is wrong from the start."""

KL = '"kl": Term(kl_to_standard(q.mean, q.log_variance).mean(), weights.kl),'


def _broken(old: str, new: str, module: str) -> tuple[Change, ...]:
    """One change to the system, on shapes."""
    return SHAPES, Change(old, new, module)


TRAINED = (
    Fault(
        "encoder-of-zeros",
        "The encoder is given an empty tensor that was meant to be filled, so its latent is its last bias.",
        ("latent-ignores-input", "dead-parameters"),
        changes=_broken(
            "self.image_encoder(image).float().chunk",
            "self.image_encoder(torch.zeros_like(image)).float().chunk",
            NETWORKS,
        ),
        options=BRIEF,
        case="E latent-ignores-input",
    ),
    Fault(
        "decoder-of-a-cut-latent",
        "What the text decoder attends to is made of zeros in place of the latent.",
        ("decoder-ignores-latent", "dead-parameters"),
        changes=_broken("memory = self.memory(z_BZ)", "memory = self.memory(torch.zeros_like(z_BZ))", NETWORKS),
        options=BRIEF,
        case="E decoder-ignores-latent",
    ),
    Fault(
        "alignment-of-a-latent-with-itself",
        "A term called alignment is the cosine of the latent with itself.",
        ("term-inert",),
        changes=_broken(
            KL,
            f'{KL}\n            "alignment": Term(1 - (q.mean / q.mean.detach().clone()).mean().detach(), 0.1),',
            SYSTEM,
        ),
        options=BRIEF,
        case="E term-inert",
    ),
    Fault(
        "exponential-that-is-cosine",
        "The schedule that is applied decays by a factor each step; a cosine is configured, and in the report.",
        ("learning-rate-off",),
        changes=_broken(
            "        return warmup_cosine(step, steps, config.warmup, config.floor / config.rate)",
            "        return (config.floor / config.rate) ** (step / steps)",
            OPTIMIZERS,
        ),
        options=BRIEF,
        case="E learning-rate-off",
    ),
    Fault(
        "rate-a-million-times-too-low",
        "The rate was written as 1e-9 for 1e-3.",
        ("no-learning",),
        changes=(SHAPES,),
        options={"optim.rate": 1e-9, "optim.floor": 0.0, **BRIEF},
        case="E no-learning",
    ),
    Fault(
        "tokenizer-of-all-captions",
        "The vocabulary was learnt from the captions of both sides.",
        ("split-leak",),
        changes=(
            Change(
                'CaptionTokenizer.train((c for i in sides["train"] for c in captions[i]), vocabulary)',
                "CaptionTokenizer.train((c for several in captions for c in several), vocabulary)",
                PREPARE,
            ),
        ),
        options=BRIEF | {"data.items": 60, "data.held_out": 0.5, "model.vocabulary": 4000},
        case="E split-leak",
    ),
    Fault(
        "held-out-items-trained-on",
        "The held-out items were chosen for looking at them, and never taken out of training.",
        ("split-leak",),
        changes=_broken(
            "    corpus = open_corpus(config, seed, progress, captioned)\n"
            '    sides, leaks = split(corpus, {"train": 1 - config.held_out, "val": config.held_out}, seed)',
            "    corpus = open_corpus(config, seed, progress, captioned)\n"
            '    sides, leaks = split(corpus, {"train": 1 - config.held_out, "val": config.held_out}, seed)\n'
            '    sides["train"] = np.arange(len(corpus))',
            PREPARE,
        ),
        options=BRIEF,
    ),
    Fault(
        "tanh-for-pixels-in-0-1",
        "The decoder ends in a tanh, and the pixels were never scaled to its range.",
        ("range-mismatch",),
        changes=_broken(
            '        return unit if self.config.output == "sigmoid" else 2 * unit - 1',
            "        return unit",
            "intaglio.models.multimodal",
        ),
        options=BRIEF | {"model.output": "tanh"},
        case="E range-mismatch",
    ),
    Fault(
        "held-out-rows-dropped",
        "Held-out losses are logged at the number of the look, and the logger drops rows whose step goes backwards.",
        ("validation-missing",),
        changes=_broken(
            "        self._write(trainer, step, readings)\n        self._look_at_health(trainer, system, step)",
            "        self._write(trainer, step, {n: r for n, r in readings.items() if self.looks >= step})\n"
            "        self._look_at_health(trainer, system, step)",
            LOOP,
        ),
        options=BRIEF,
        case="E validation-missing",
    ),
    Fault(
        "norm-logged-after-clipping",
        "What is logged as the gradient's norm is what clipping left of it.",
        ("log-distorted",),
        changes=_broken(
            "            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, self.gradient_norm)",
            "            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip, self.gradient_norm)\n"
            "            self.gradient_norm = self.gradient_norm.clamp_max(self.config.optim.clip)",
            BASE,
        ),
        options={"optim.clip": 5.0},
        case="E log-distorted",
        minor=True,
    ),
    Fault(
        "prior-that-was-never-fitted",
        "Images are drawn from N(0, I), which nothing brought the latents near to.",
        ("prior-mismatch",),
        changes=(
            SHAPES,
            Change("    prior.mean.copy_(latents.mean(0))\n", "", "intaglio.systems.prior"),
            Change(
                "    prior.scale.copy_(latents.std(0, correction=0).clamp_min(1e-4))",
                "    prior.mean.fill_(0.0)\n    prior.scale.fill_(1.0)",
                "intaglio.systems.prior",
            ),
        ),
        options={"prior.layers": 0, "loss.kl": 1e-7},
        case="E prior-mismatch",
    ),
    Fault(
        "latents-of-length-one",
        "The latent is normalised, so that its norm, watched as a sign of health, can not change.",
        ("norm-pinned",),
        changes=_broken(
            "        return Gaussian(mean, clamp_log_variance(raw))",
            "        return Gaussian(F.normalize(mean, dim=-1), clamp_log_variance(raw))",
            NETWORKS,
        ),
        options={"train.steps": 100, "train.validate_every": 10},
        case="E norm-pinned",
        minor=True,
    ),
    Fault(
        "mean-pushed-the-wrong-way",
        "A term that was to hold the latents' mean at 0 has the wrong sign.",
        ("latent-drift",),
        changes=_broken(KL, f'{KL}\n            "centre": Term(-q.mean.mean(), 0.3),', SYSTEM),
        case="E latent-drift",
        minor=True,
    ),
    Fault(
        "contrast-that-weighs-nothing",
        "The contrastive weight is a million times too small: image and text stay in their own cones.",
        ("modality-gap", "near-chance"),
        changes=(SHAPES,),
        options={"loss.contrastive": 1e-6, "train.steps": 70, "train.validate_every": 7},
        case="E modality-gap",
    ),
    Fault(
        "accuracy-with-start-and-padding",
        "START and padding count as right answers in the accuracy that is logged.",
        ("flattering-accuracy",),
        changes=_broken(
            '"caption/token_accuracy": (right.sum(), tokens),',
            '"caption/token_accuracy": ((right | ~real).sum() + items, torch.tensor(float(batch.ids.numel()))),',
            SYSTEM,
        ),
        case="E flattering-accuracy",
    ),
    Fault(
        "alphabet-of-all-bytes",
        "The vocabulary starts with all 256 bytes, of which the captions hold thirty.",
        ("vocabulary-unreachable",),
        changes=_broken(
            "vocab_size=vocabulary, min_frequency=2,",
            "vocab_size=vocabulary + 256, min_frequency=2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),",
            TOKENIZER,
        ),
        case="E vocabulary-unreachable",
        minor=True,
    ),
    Fault(
        "drawn-at-six-tenths",
        "Latents are drawn at .6 σ for sharper images, and KL is charged for σ.",
        ("temperature-misstates-rate",),
        changes=_broken(
            "self.noise_like(q.mean))\n\n    def contrast", "0.6 * self.noise_like(q.mean))\n\n    def contrast", SYSTEM
        ),
        minor=True,
    ),
    Fault(
        "writes-about-another-image",
        "The cache of the decoder that writes is made from the latents of the batch, moved by one.",
        ("free-running-gap",),
        changes=_broken(
            "block.cross_attention.keys_values(memory_BMD) for block",
            "block.cross_attention.keys_values(memory_BMD.roll(1, 0)) for block",
            "intaglio.nn.transformer",
        ),
        minor=True,
    ),
    Fault(
        "pictures-decoded-anew",
        "Each picture is scaled down from its full size whenever it is drawn.",
        ("input-starved",),
        changes=_broken(
            "        images = np.ascontiguousarray(self.images[items].transpose(0, 3, 1, 2))\n        return Batch(",
            "        from PIL import Image\n\n"
            "        full = [Image.fromarray(image).resize((768, 768)) for image in self.images[items]]\n"
            "        images = np.stack([np.asarray(image.resize((32, 32))).transpose(2, 0, 1) for image in full])\n"
            "        return Batch(",
            "intaglio.data.batches",
        ),
        options={"train.steps": 20, "optim.warmup": 4, "train.validate_every": 10, "train.validate_items": 16}
        | {"train.log_every": 2, "health.probe": 16, "prior.layers": 0},
        minor=True,
    ),
    Fault(
        "kl-as-if-it-were-a-mean",
        "The KL's weight was meant for its mean over dimensions and pixels.",
        ("posterior-collapse",),
        changes=(SHAPES,),
        options={"loss.kl": 50.0, "train.steps": 100, "train.validate_every": 10},
    ),
    Fault(
        "weights-in-the-log-alone",
        "The loss adds its terms up as they are; the weights are only logged.",
        ("weight-not-applied",),
        changes=_broken("torch.stack([weight * value.float() for", "torch.stack([value.float() for", BASE),
        options=BRIEF,
    ),
    Fault(
        "biases-forgotten",
        "The group of biases, norms and embeddings is lost on its way to the optimizer.",
        ("not-in-optimizer",),
        changes=_broken(
            '    return [g for g in groups if g["params"]]',
            '    return [g for g in groups[:2] if g["params"]]',
            OPTIMIZERS,
        ),
        options=BRIEF,
    ),
)


def _healthy(name: str, what: str = "", seeds: tuple[int, ...] = (0,), **options: object) -> Healthy:
    return Healthy(name, what, (SHAPES,), {k.replace("__", "."): v for k, v in options.items()}, seeds)


FAMILY = Family(
    "ours_multimodal",
    "development",
    "intaglio's multimodal system, on shapes and what is said of them",
    recipe="multimodal-small",
    options=OPTIONS,
    faults=(*STATIC, *TRAINED),
    healthy=(
        _healthy("plain", seeds=(0, 1)),
        _healthy("adamw", optim__kind="adamw", optim__rate=5e-3),
        _healthy("constant", "The rate never falls.", optim__schedule="constant", optim__rate=1e-3),
        _healthy("infonce", loss__pairing="infonce", train__batch_size=32, train__steps=150),
        _healthy("no-average", "Held-out losses are those of the live weights.", train__ema=0.0),
        _healthy("wide", model__width=64, model__latent=64, train__steps=150),
    ),
)

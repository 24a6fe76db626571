"""Faults of our multimodal system that ``intaglio check`` must see, before a step is spent.

The cases marked E are those of the documented engravings system.
"""

from typing import Any

from intaglio.bench.faults.case import Change, Fault

NETWORKS = "intaglio.models.networks"

DOCUMENTED: dict[str, Any] = {"model.network": "documented", "loss.pairing": "self", "loss.kl": 0.0}

STATIC = (
    Fault(
        "fifty-million-that-are-565",
        "The document counts 50 million parameters, and one linear layer of its network alone has ten times as many.",
        ("count-off",),
        options=DOCUMENTED
        | {
            "data.image_size": 512,
            "model.latent": 1024,
            "model.width": 512,
            "model.heads": 8,
            "model.feed_forward": 2048,
            "model.decoder_layers": 3,
            "model.vocabulary": 8000,
            "train.batch_size": 8,
        },
        case="E count-off",
        static=True,
    ),
    Fault(
        "each-latent-against-itself",
        "The contrastive loss compares z with z; the text encoder was drawn and never built.",
        ("trivial-pair",),
        options=DOCUMENTED,
        case="E trivial-pair",
        static=True,
    ),
    Fault(
        "words-without-positions",
        "The network of the document, without a contrastive loss: its text decoder has no positional encoding.",
        ("decoder-without-positions", "attention-over-one", "one-layer-dominates"),
        options=DOCUMENTED | {"loss.contrastive": 0.0},
        minor=True,
        static=True,
    ),
    Fault(
        "one-layer-reads-the-whole-grid",
        "The image is hardly halved, so one linear layer between its grid and its embedding holds most parameters.",
        ("one-layer-dominates",),
        options={"model.channels": [8, 8, 8], "model.latent": 8192},
        minor=True,
        static=True,
    ),
    Fault(
        "halved-to-one-token",
        "The image is halved once too often: all that a caption can attend to is one token.",
        ("attention-over-one",),
        options={"model.channels": [16, 24, 32, 32]},
        minor=True,
        static=True,
    ),
    Fault(
        "nothing-shapes-the-latents",
        "The KL's weight is 0, although images shall be drawn from a prior.",
        ("latents-unshaped",),
        options={"loss.kl": 0.0},
        minor=True,
        static=True,
    ),
    Fault(
        "no-text-in-the-loss",
        "The contrastive weight was set to 0, and the text encoder and both projections are never called.",
        ("dead-parameters",),
        options={"loss.contrastive": 0.0},
        minor=True,
        static=True,
    ),
    Fault(
        "built-and-never-called",
        "A second projection of the latent is built, and the forward pass uses the first.",
        ("dead-parameters",),
        changes=(
            Change(
                "        self.text_projection = nn.Linear(c.width, c.width)",
                "        self.text_projection = nn.Linear(c.width, c.width)\n"
                "        self.refined = nn.Linear(c.latent, 1024)",
                NETWORKS,
            ),
        ),
        case="E dead-parameters",
        minor=True,
        static=True,
    ),
    Fault(
        "batch-for-another-machine",
        "The batch was chosen on a larger machine: no memory here holds its activations.",
        ("memory-short",),
        options={"data.items": 4_000_000, "data.image_size": 512, "train.batch_size": 1_000_000, "model.latent": 4096},
        minor=True,
        static=True,
    ),
    Fault(
        "more-in-a-batch-than-there-are",
        "Forty images, of which eight are held out, and batches of sixty-four.",
        ("batch-exceeds-data",),
        options={"data.items": 40, "train.batch_size": 64},
        static=True,
    ),
    Fault(
        "data-moved-away",
        "The folder was renamed since the recipe was written.",
        ("data-unusable",),
        options={"data.source": "no/such/folder/of/images", "data.items": None},
        static=True,
    ),
    Fault(
        "captions-cut",
        "Captions are cut to eight tokens, and half of what they say is behind that.",
        ("data-replaced",),
        options={"data.text_length": 8},
        minor=True,
        static=True,
    ),
    Fault(
        "eight-thousand-tokens-for-few-words",
        "The vocabulary was sized for another text: these captions support a few hundred tokens.",
        ("vocabulary-unreachable",),
        options={"model.vocabulary": 8000},
        minor=True,
        static=True,
    ),
    Fault(
        "patience-within-the-warm-up",
        "Ten steps without progress end the run, and the rate still rises then.",
        ("stopped-in-ramp",),
        options={"train.patience": 1, "train.validate_every": 10, "optim.warmup": 60},
        minor=True,
        static=True,
    ),
    Fault(
        "warm-up-as-long-as-the-run",
        "The warm-up was copied from a run of a hundred times as many steps.",
        ("learning-rate-off",),
        options={"optim.warmup": 2000},
        minor=True,
        static=True,
    ),
    Fault(
        "best-by-what-is-not-measured",
        "The best step is to be chosen by a loss that an earlier version of the model had.",
        ("validation-missing",),
        options={"train.monitor": "val/loss/alignment"},
        static=True,
    ),
    Fault(
        "infonce-of-eight",
        "InfoNCE among the eight items of a batch, where telling them apart takes little.",
        ("near-chance",),
        options={"loss.pairing": "infonce", "train.batch_size": 8},
        minor=True,
        static=True,
    ),
    Fault(
        "accumulated-negatives",
        "Passes are accumulated for more negatives, but a pass is contrasted with itself alone.",
        ("negatives-per-pass",),
        options={"train.accumulate": 4},
        minor=True,
        static=True,
    ),
)

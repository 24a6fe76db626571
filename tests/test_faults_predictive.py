"""A real fault in a real training that predicts or contrasts is found and named; its healthy twin is left in peace.

Shapes: B items, D embedding, M keys of a queue.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from test_faults_bottlenecks import EVERY, System, layers, named, runs_in, seeded
from torch import nn

from intaglio.health import panel, trials
from intaglio.health.instruments import contrastive
from intaglio.history import Reading
from intaglio.objectives.sigreg import directions, sigreg


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs_in(tmp_path_factory)


class JEPA(System):
    """The next of four frames of a point that moves at its own speed, among those of other items and of a queue."""

    def __init__(
        self, partners="own", context="three frames", order="heeded", least=0.01, scale="learnt", seen="raw", queue=256
    ):  # fmt: skip
        super().__init__()
        self.partners, self.context, self.order, self.least, self.seen = partners, context, order, least, seen
        self.forgotten = ("log_scale",) if scale == "forgotten" else ()
        self.mixing = torch.randn(4, 16, generator=seeded(6)) / 2
        self.encoder, self.predictor = layers(16, 64, 16), layers(48, 64, 16)
        self.log_scale = nn.Parameter(torch.tensor(1 / 0.25).log())
        self.queue = [self.draw(queue)[:, 3], F.normalize(torch.randn(queue, 16), dim=1)]

    def draw(self, n, generator=None):
        start, speed = torch.randn(2, n, 1, 4, generator=generator)
        frames = (start + 0.5 * speed * torch.arange(4)[:, None]) @ self.mixing
        if self.context == "one frame thrice":
            frames[:, :3] = frames[:, 2:3]
        return frames.tanh()

    def scale(self):
        return self.log_scale.clamp(max=-math.log(self.least))

    def embedded(self, frames):
        return F.normalize(self.encoder(frames), dim=1)

    def predictions(self, context):
        z = self.encoder(context)
        if self.order == "averaged away":
            z = z.mean(1, keepdim=True).expand_as(z)
        return F.normalize(self.predictor(z.flatten(1)), dim=1)

    def regularised(self, z):
        return {"raw": z, "normalised": F.normalize(z, dim=1), "rectified": z.relu()}[self.seen]

    def errors(self, context, target):
        """Of each item: what its prediction costs among the targets of all and the keys of the queue, nats."""
        keys = torch.cat([self.embedded(target), self.queue[1]])
        logits = self.scale().exp() * self.predictions(context) @ keys.T
        return F.cross_entropy(logits, torch.arange(len(target)), reduction="none")

    def terms(self, frames):
        context, target = frames[:, :3], frames[:, 3]
        if self.partners == "strangers" and self.training:
            target = target[torch.randperm(len(target))]
        normal = sigreg(self.regularised(self.encoder(frames.flatten(0, 1))), directions(16, 64, seeded(7)))
        terms = {"contrastive": (self.errors(context, target).mean(), 1.0), "sigreg": (normal, 0.02)}
        new = target, self.embedded(target).detach()
        self.queue = [torch.cat([a, b])[: len(b)] for a, b in zip(new, self.queue, strict=True)]
        return terms

    def held_out(self, frames):
        candidates = len(frames) + len(self.queue[1])
        loss = self.errors(frames[:, :3], frames[:, 3]).mean()
        return {"val/loss/contrastive": Reading(float(loss), math.log(candidates))}

    def after_step(self, step, monitor):
        if step % EVERY == 0:
            monitor.log({"train/pair/temperature": contrastive.temperature(self.scale(), self.least)})

    def read(self, frames):
        context, target = frames[:, :3], frames[:, 3]
        z, seen = self.encoder(frames.flatten(0, 1)), self.embedded(target)
        costs = trials.cost_of_context(lambda c: self.errors(c, target).numpy(), context)
        items, keys = self.queue
        return {
            "val/latent": panel.latents(z) | panel.gaussianity(self.regularised(z)),
            "val/pair": panel.pairs(self.predictions(context), seen, self.scale()),
            "val/context": {f"context_{change}": cost for change, cost in costs.items()},
            "train/queue": {"queue_agreement": contrastive.queue_agreement(keys, self.encoder(items))},
        }


class Towers(System):
    """Two views of eight factors, each through an encoder of its own whose output a ReLU makes a cone."""

    def __init__(self, partners="own"):
        super().__init__()
        self.partners, self.mixing = partners, torch.randn(2, 8, 32, generator=seeded(8)) / 8**0.5
        self.encoders = nn.ModuleList(nn.Sequential(layers(32, 64, 16), nn.ReLU()) for _ in range(2))

    def draw(self, n, generator=None):
        return (torch.randn(n, 8, generator=generator) @ self.mixing).tanh()

    def embedded(self, views):
        return [F.normalize(encoder(view) + 1e-6, dim=1) for encoder, view in zip(self.encoders, views, strict=True)]

    def terms(self, views):
        a, b = self.embedded(views)
        if self.partners == "strangers" and self.training:
            b = b[torch.randperm(len(b))]
        return {"contrastive": (F.cross_entropy(10 * a @ b.T, torch.arange(len(a))), 1.0)}

    def read(self, views):
        return {"val/pair": panel.pairs(*self.embedded(views), math.log(10))}


CONTRASTIVE = (
    "near-chance", "trivial-pair", "context-order-inert", "temperature-stuck", "sigreg-blind", "queue-stale",
    "modality-gap",
)  # fmt: skip

HEALTHY = [
    (JEPA, {}, (*CONTRASTIVE, "latent-ignores-input", "rank-collapse", "anisotropic")),
    (Towers, {}, ("modality-gap", "trivial-pair")),
]

FAULTS = [
    (JEPA, {"partners": "strangers"}, "near-chance", "fail", "guessing costs 6.238: next to nothing is told apart"),
    (JEPA, {"context": "one frame thrice"}, "context-order-inert", "fail", "costs context nothing (0): it sees one"),
    (JEPA, {"order": "averaged away"}, "context-order-inert", "warning", "The order of its context frames costs"),
    (JEPA, {"least": 0.2}, "temperature-stuck", "warning", "train/pair/temperature lies at its clamp of 0.2"),
    (JEPA, {"scale": "forgotten"}, "temperature-stuck", "warning", "train/pair/temperature stays at 0.25"),
    (JEPA, {"seen": "normalised"}, "sigreg-blind", "fail", "What SIGReg sees of latent is normalised or non-negative"),
    (JEPA, {"seen": "rectified"}, "sigreg-blind", "fail", "What SIGReg sees of latent is normalised or non-negative"),
    (JEPA, {"queue": 8192}, "queue-stale", "warning", "agree with the encoder of now to 0."),
    (Towers, {"partners": "strangers"}, "modality-gap", "warning", "The two kinds of pair lie 1."),
]


@pytest.mark.parametrize(("kind", "settings", "family"), HEALTHY, ids=named)
def test_a_healthy_training_is_left_in_peace_by_rules_that_looked(run, kind, settings, family):
    healthy = run(kind, **settings)
    assert not healthy.found(*family)
    assert healthy.looked >= set(family)


@pytest.mark.parametrize(("kind", "settings"), [row[:2] for row in HEALTHY], ids=named)
def test_no_rule_fails_a_healthy_training_at_any_time(run, kind, settings):
    assert not run(kind, **settings).alarms


@pytest.mark.parametrize(("kind", "settings", "rule", "severity", "words"), FAULTS, ids=named)
def test_a_fault_is_found_and_named(run, kind, settings, rule, severity, words):
    found = run(kind, **settings).found(rule)
    assert [s for s, message in found if s == severity and words in message], found

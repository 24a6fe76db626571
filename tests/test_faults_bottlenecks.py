"""A real fault in a real training of a bottleneck is found and named, and its healthy twin is left in peace.

Each system is a small module whose settings are healthy as they stand; a fault changes one of them. All readings are
taken from live tensors. Shapes: B items, d latent dimensions, K codes, D dimensions of a code.
"""

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from intaglio.health import audits, panel, trials
from intaglio.health.instruments import bottleneck, codebook, moments
from intaglio.health.monitor import Monitor
from intaglio.history import Reading
from intaglio.history.reading import share

STEPS, EVERY, BATCH, PROBE = 300, 25, 128, 256


def layers(*widths):
    parts = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*parts[:-1])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Run:
    """A training of ``kind(**settings)``, watched: what is found at its end, and what ever failed."""

    def __init__(self, folder, kind, **settings):
        torch.manual_seed(0)
        model = kind(**settings)
        held = [p for name, p in model.named_parameters() if name not in model.forgotten]
        optimizer = torch.optim.Adam(held, model.rate)
        self.alarms = {}
        probe, validated = (model.draw(PROBE, seeded(seed)) for seed in (1, 2))
        watch = {"probe": probe, "read": type(model).read, "every": EVERY, "steps": STEPS, "log_every": 5}
        monitor = Monitor(model, optimizer, folder=folder, **watch, on_finding=self.told)
        with monitor:
            for step in range(1, STEPS + 1):
                losses = model.terms(model.draw(BATCH))
                monitor.before_backward(losses)
                optimizer.zero_grad()
                total = sum(weight * value for name, (value, weight) in losses.items() if name not in model.left_out)
                total.backward()
                monitor.step({**losses, "total": total})
                optimizer.step()
                model.after_step(step, monitor)
                if step % EVERY == 0:
                    with monitor.validation(), torch.no_grad():
                        model.eval()
                        monitor.validated(model.held_out(validated))
                    model.train()
        self.model, self.judged = model, monitor.judge()
        self.looked = {f.rule for f in self.judged.findings} | set(self.judged.passed)

    def told(self, finding):
        if finding.severity == "fail":
            self.alarms[finding.rule] = finding.message

    def found(self, *rules):
        """Severity and message of each finding of these rules."""
        return [(f.severity, f.message) for f in self.judged.findings if f.rule in rules]


class System(nn.Module):
    """What a training needs: batches, terms with their weights, readings of a probe, held-out losses."""

    rate, forgotten, left_out = 3e-3, (), ()

    def after_step(self, step, monitor):
        pass

    def held_out(self, batch):
        return {name: float(value) for name, (value, _) in self.terms(batch).items()}


def runs_in(folders):
    """Trains each kind and setting once."""
    return cache(lambda kind, **settings: Run(folders.mktemp(kind.__name__.lower()), kind, **settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs_in(tmp_path_factory)


class VAE(System):
    """Of 32 numbers that eight factors make; ``classes`` has it say which octant the first three lie in instead."""

    def __init__(self, beta=0.1, floor=0.02, units=1, scales=1.0, width=8, classes=False, heard=True, temperature=1.0):
        super().__init__()
        self.beta, self.floor, self.units, self.classes = beta, floor, units, classes
        self.heard, self.temperature = heard, temperature
        self.mixing, self.scale = torch.randn(8, 32, generator=seeded(3)) / 8**0.5, torch.ones(32)
        self.scale[0] = scales
        self.encoder, self.decoder = layers(32, 64, 2 * width), layers(width, 64, 8 if classes else 32)

    def draw(self, n, generator=None):
        factors = torch.randn(n, 8, generator=generator)
        return (factors @ self.mixing).tanh() * self.scale, (factors[:, :3] > 0).long() @ torch.tensor([1, 2, 4])

    def posterior(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def drawn(self, mean, log_variance):
        return mean + self.temperature * torch.randn_like(mean) * (0.5 * log_variance).exp()

    def losses(self, z, x, label):
        rebuilt = self.decoder(z * self.heard)
        if self.classes:
            return F.cross_entropy(rebuilt, label, reduction="none")
        return (rebuilt - x).square().sum(1)

    def terms(self, batch):
        mean, log_variance = self.posterior(batch[0])
        z = self.drawn(mean, log_variance)
        kl_d = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(0)
        kl = kl_d.clamp_min(self.floor).sum() / self.units
        return {"reconstruction": (self.losses(z, *batch).mean(), 1.0), "kl": (kl, self.beta)}

    def read(self, batch):
        mean, log_variance = self.posterior(batch[0])
        targets = codebook.perplexity(codebook.code_counts(batch[1], 8))
        exchanged = trials.cost_of_exchange(lambda z: (self.losses(z, *batch).numpy(), np.ones(PROBE)), mean)
        latent = panel.latents(mean, log_variance) | {
            "prior_nats": bottleneck.aggregate_nats(mean, log_variance),
            "kl_charged": bottleneck.kl_charged(mean, log_variance, self.floor, mean.shape[1]),
            "groups_above_floor": bottleneck.groups_above_floor(mean, log_variance, self.floor, mean.shape[1]),
        }
        if self.classes:
            latent["target_entropy"] = Reading(math.log(targets.value))
        noise = bottleneck.noise_ratio(self.drawn(mean, log_variance), mean, log_variance)
        decoder = {"shuffled_latent_item": exchanged["shuffled"]}
        return {"val/latent": latent, "val/decoder": decoder, "train/latent": {"noise_ratio": noise}}


class VQ(System):
    """Of 16 numbers, through one of 32 codes that follow their latents by moving averages (EMA).

    Codes of less than a quarter of the even mass are revived on latents of the batch, with mass that others give.
    """

    decay, size, even = 0.99, 32, BATCH / 32

    def __init__(
        self, start="data", mass=even, revival="even", threshold=0.25 * even, weight=1.0, growth=1.0,
        updated="in training", branches=1,
    ):  # fmt: skip
        super().__init__()
        self.revival, self.threshold, self.weight, self.growth = revival, threshold, weight, growth
        self.updated, self.branches = updated, branches
        self.mixing = 0.5 * torch.randn(16, 16, generator=seeded(4))
        self.encoder, self.decoder = layers(16, 64, 8), layers(8, 64, 16)
        codes = self.encoder(self.draw(self.size)).detach()
        if start == "far":
            codes[1:] = 20 + torch.randn(self.size - 1, 8)
        self.hold(codes)
        self.sizes, self.sums = torch.full((self.size,), mass), codes * (mass or 1)
        self.last_used, self.step, self.updates = torch.full((self.size,), -1), 0, 0

    def hold(self, codes):
        self.register_buffer("codes", codes)

    def draw(self, n, generator=None):
        return torch.randn(n, 16, generator=generator) @ self.mixing

    def quantise(self, z):
        chosen = torch.cdist(z.detach(), self.codes.detach()).argmin(1)
        return self.codes[chosen], chosen

    @torch.no_grad()
    def update(self, z, chosen):
        self.updates += 1
        self.last_used[chosen] = self.step
        member = F.one_hot(chosen, self.size).to(z)
        self.sizes = self.decay * self.sizes + (1 - self.decay) * member.sum(0)
        self.sums = self.decay * self.sums + (1 - self.decay) * member.T @ z
        self.codes.copy_(self.sums / self.sizes.clamp_min(1e-5)[:, None])
        resting = self.sizes < self.threshold
        if self.revival and self.step % 20 == 0 and resting.any():
            self.codes[resting] = z[torch.randint(len(z), (int(resting.sum()),))]
            self.sizes[resting] = self.even if self.revival == "even" else float(BATCH)
            self.sums[resting] = self.codes[resting] * self.sizes[resting, None]
            if self.revival == "even":
                self.sizes, self.sums = (m * BATCH / self.sizes.sum() for m in (self.sizes, self.sums))

    def terms(self, x):
        self.step += self.training
        z = self.encoder(x)
        for _ in range(self.branches):
            q, chosen = self.quantise(z)
            if self.training or self.updated == "always":
                self.update(z, chosen)
        return self.losses(x, z, q)

    def losses(self, x, z, q):
        rebuilt = (self.decoder(z + (q - z).detach()) - x).square().mean()
        apart = (z - q.detach()).square().mean()
        return {"reconstruction": (rebuilt, 1.0), "commitment": (apart, self.weight * self.growth**self.step)}

    def after_step(self, step, monitor):
        if step % EVERY == 0:
            monitor.log({"train/vq/updates_per_step": Reading(self.updates / step)})

    def held_out(self, x):
        before = audits.fingerprints(self)
        losses = super().held_out(x)
        moved = before["codes"] != audits.fingerprints(self)["codes"]
        return losses | {"val/vq/codebook_moved": Reading(float(moved))}

    def read(self, x):
        z = self.encoder(x)
        codes = {
            "perplexity": codebook.perplexity(codebook.code_counts(self.quantise(z)[1], self.size)),
            "dead_share": codebook.dead_share(self.last_used, self.step, BATCH),
            "norm_ratio": codebook.norm_ratio(self.codes, z),
            "mass_ratio": codebook.mass_ratio(self.sizes, BATCH),
            "revival_threshold": codebook.revival_threshold(self.threshold, self.size, BATCH),
        }
        return {"val/vq": codes, "val/latent": panel.latents(z)}


class LearntVQ(VQ):
    """The same with codes that a loss term moves."""

    def __init__(self, codebook="learnt"):
        super().__init__(revival="")
        self.codebook, self.left_out = codebook, ("codebook",) if codebook == "left out" else ()

    def hold(self, codes):
        self.codes = nn.Parameter(codes)

    def update(self, z, chosen):
        self.last_used[chosen] = self.step
        self.sizes = self.decay * self.sizes + (1 - self.decay) * chosen.bincount(minlength=self.size)

    def losses(self, x, z, q):
        apart = (z.detach() - (q.detach() if self.codebook == "detached" else q)).square().mean()
        return super().losses(x, z, q) | {"codebook": (apart, 1.0)}


class VQA(System):
    """Is factor 0, 1 or 2 positive, and how many of them are? Answers 0 and 1, or 0 to 3."""

    def __init__(self, sees=True, tells=False):
        super().__init__()
        self.sees, self.tells = sees, tells
        self.mixing = torch.randn(8, 32, generator=seeded(3)) / 8**0.5
        self.vision, self.question, self.head = layers(32, 64, 32), nn.Embedding(16, 32), layers(64, 64, 4)

    def draw(self, n, generator=None):
        factors, kind = torch.randn(n, 8, generator=generator), torch.randint(4, (n,), generator=generator)
        positive = (factors[:, :3] > 0).long()
        answer = torch.cat([positive, positive.sum(1, keepdim=True)], dim=1)[torch.arange(n), kind]
        return (factors @ self.mixing).tanh(), kind + 4 * answer * self.tells, answer

    def logits(self, features, question):
        return self.head(torch.cat([features * self.sees, self.question(question)], dim=1))

    def terms(self, batch):
        image, question, answer = batch
        return {"answer": (F.cross_entropy(self.logits(self.vision(image), question), answer), 1.0)}

    def read(self, batch):
        image, question, answer = batch
        features = self.vision(image)

        def loss(other):
            nats = F.cross_entropy(self.logits(other, question), answer, reduction="none")
            return nats.numpy(), np.ones(len(nats))

        read = {"val/answer": {"shuffled_image_nats": trials.cost_of_exchange(loss, features)["shuffled"]}}
        right = self.logits(features, question).argmax(1) == answer
        for name, these in (("sign", question % 4 < 3), ("count", question % 4 == 3)):
            majority = int(answer[these].bincount().max()) / int(these.sum())
            read[f"val/answer.{name}"] = {"accuracy": share(int(right[these].sum()), int(these.sum()), majority)}
        return read


class Denoiser(System):
    """A flow from noise to the latents of a first stage, which it sees ``standardised`` by channel or as they are."""

    def __init__(self, first, standardised):
        super().__init__()
        self.sample, self.velocity = lambda n, generator: self.latents(first, n, generator), layers(25, 64, 24)
        self.mean, self.std = torch.zeros(24), torch.ones(24)
        if standardised:
            self.std, self.mean = torch.std_mean(self.sample(1024, seeded(5)), dim=0)

    @torch.no_grad()
    def latents(self, first, n, generator):
        return first.posterior(first.draw(n, generator)[0])[0]

    def draw(self, n, generator=None):
        return (self.sample(n, generator) - self.mean) / self.std

    def terms(self, z):
        noise, t = torch.randn_like(z), torch.rand(len(z), 1)
        velocity = self.velocity(torch.cat([(1 - t) * z + t * noise, t], dim=1))
        return {"flow": ((velocity - (noise - z)).square().mean(), 1.0)}

    def read(self, z):
        return {f"val/channel.{k}": {"scaled_std": moments.std(z[:, k : k + 1])} for k in range(z.shape[1])}


BOTTLENECK = ("posterior-collapse", "kl-free", "kl-parked", "kl-units", "temperature-misstates-rate")
LATENT = ("latent-ignores-input", "rank-collapse", "anisotropic", "prior-mismatch", "norm-pinned", "latent-drift")
CODEBOOK = (
    "codebook-collapse", "codes-dead", "codes-displaced", "codes-shrink", "codes-polluted", "revival-threshold",
    "quantiser-loss-missing",
)  # fmt: skip
QUANTISER = ("term-inert", "weight-not-applied", "dead-parameters", "not-in-optimizer")

HEALTHY = [
    (VAE, {}, (*BOTTLENECK, *LATENT)),
    (VAE, {"classes": True, "floor": 0.1}, (*BOTTLENECK, "rate-too-high", *LATENT)),
    (VQ, {}, (*CODEBOOK, *LATENT[:3])),
    (LearntVQ, {}, QUANTISER),
    (VQA, {}, ("question-only",)),
]

FAULTS = [
    (VAE, {"beta": 50.0, "floor": 0.0}, "posterior-collapse", "fail", "nats an item in 0 active units"),
    (VAE, {"heard": False, "floor": 0.5}, "posterior-collapse", "fail", "exchanging it costs the decoder nothing"),
    (VAE, {"floor": 20.0}, "kl-free", "warning", "No group of latent exceeds its free bits"),
    (VAE, {"floor": 1.0, "beta": 50.0}, "kl-parked", "note", "parked at its floor of 8 nats"),
    (VAE, {"classes": True, "beta": 1e-4}, "rate-too-high", "warning", "nats for answers of 2.1"),
    (VAE, {"units": 8}, "kl-units", "warning", "a factor of 8"),
    (VAE, {"temperature": 0.6}, "temperature-misstates-rate", "warning", "are drawn at 0."),
    (VAE, {"scales": 100.0, "width": 24}, "rank-collapse", "fail", "latent uses 1."),
    (VAE, {"scales": 100.0, "width": 24}, "anisotropic", "fail", "One direction carries most of the variance of"),
    (VAE, {"classes": True, "beta": 0.0}, "prior-mismatch", "warning", "nats away from N(0, I)"),
    (VQ, {"start": "far", "revival": ""}, "codebook-collapse", "fail", "used as if there were 1; uniform codes"),
    (VQ, {"start": "far", "revival": ""}, "codes-dead", "fail", "97% of the codes of vq have not been used"),
    (VQ, {"start": "far", "revival": "batch"}, "codes-dead", "warning", "The EMA counts of vq add up to"),
    (VQ, {"mass": 0.0, "revival": ""}, "codes-displaced", "fail", "times as long as what they stand for"),
    (VQ, {"growth": 1.04}, "codes-shrink", "fail", "the latents shrink towards the codes"),
    (VQ, {"threshold": 4.5}, "revival-threshold", "fail", "revived below 4.5 uses a step; codes in uniform use have 4"),
    (VQ, {"weight": 0.0}, "quantiser-loss-missing", "fail", "no loss of the quantiser (commitment at weight 0)"),
    (VQ, {"updated": "always"}, "codes-polluted", "fail", "held-out items moved the codebook of vq"),
    (VQ, {"branches": 2}, "codes-polluted", "fail", "vq is updated 2.00 times in an optimizer step"),
    (LearntVQ, {"codebook": "detached"}, "term-inert", "fail", "The loss term codebook teaches nothing"),
    (LearntVQ, {"codebook": "left out"}, "weight-not-applied", "fail", "but the total that was minimised is"),
    (LearntVQ, {"codebook": "left out"}, "dead-parameters", "fail", "have no gradient: codes"),
    (VQA, {"sees": False}, "question-only", "fail", "answers do not need the image"),
    (VQA, {"sees": False}, "question-only", "warning", "always the commonest answer"),
    (VQA, {"tells": True}, "question-only", "fail", "answers do not need the image"),
]


def named(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "healthy"
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(("kind", "settings", "family"), HEALTHY, ids=named)
def test_a_healthy_training_is_left_in_peace_by_rules_that_looked(run, kind, settings, family):
    healthy = run(kind, **settings)
    assert not [message for _, message in healthy.found(*family) if "are one statistic" not in message]
    assert healthy.looked >= set(family)


@pytest.mark.parametrize(("kind", "settings"), [row[:2] for row in HEALTHY], ids=named)
def test_no_rule_fails_a_healthy_training_at_any_time(run, kind, settings):
    assert not run(kind, **settings).alarms


@pytest.mark.parametrize(("kind", "settings", "rule", "severity", "words"), FAULTS, ids=named)
def test_a_fault_is_found_and_named(run, kind, settings, rule, severity, words):
    found = run(kind, **settings).found(rule)
    assert [s for s, message in found if s == severity and words in message], found


@pytest.mark.parametrize("standardised", [True, False])
def test_latents_that_are_diffused_as_they_are_are_found(run, standardised):
    found = run(Denoiser, first=run(VAE, scales=100.0, width=24).model, standardised=standardised).found("latent-scale")
    assert bool(found) is not standardised
    assert all(severity == "fail" and "where 1 is due" in message for severity, message in found)

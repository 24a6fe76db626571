"""Faults of any training and of its data, in real small trainings: each is found and named, and its twin is quiet."""

import json
import time

import pytest
import torch
from conftest import SHAPES, train
from torch import Tensor, nn

from intaglio.bench.shapes import write_shapes
from intaglio.data import batches, splits
from intaglio.health import audits, panel
from intaglio.health.instruments.bottleneck import tie_rate
from intaglio.health.monitor import Monitor, Stopped
from intaglio.models.multimodal import MultimodalModel
from intaglio.nn.transformer import CachedDecoding
from intaglio.objectives import Term
from intaglio.systems.multimodal import MultimodalSystem

MIXING = torch.randn(6, 48, generator=torch.Generator().manual_seed(9))


def items(n: int, seed: int) -> Tensor:
    """(n, 48) with six factors and some noise."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 6, generator=generator) @ MIXING).tanh() + 0.05 * torch.randn(n, 48, generator=generator)


class Autoencoder(nn.Module):
    def __init__(self, width: int = 96):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, width), nn.BatchNorm1d(width), nn.SiLU(), nn.Linear(width, 16))
        self.decoder = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 48))

    def terms(self, x: Tensor) -> dict[str, tuple[Tensor, float]]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return {"reconstruction": ((self.decoder(z) - x).square().sum(1).mean(), 1.0), "kl": (kl, 0.05)}


class Training:
    """A plain loop of 400 steps with a monitor in it; a subclass breaks one thing."""

    steps, width, count, rate = 400, 96, 512, 3e-3

    def __init__(self, folder, **options):
        torch.manual_seed(0)
        self.model = Autoencoder(self.width)
        self.x, self.held_out = items(self.count, 0), items(256, 1)
        self.optimizer = self.build()
        apart = {"train": self.x, "val": self.held_out}
        nulls = {
            f"{split}/loss/reconstruction": float((x - self.x.mean(0)).square().sum(1).mean())
            for split, x in apart.items()
        }
        self.monitor = Monitor(
            self.model, self.optimizer, folder=folder, probe=self.held_out, read=self.read, every=20, log_every=5,
            steps=self.steps, nulls=nulls, **options,
        )  # fmt: skip
        self.audit()

    def build(self):
        return torch.optim.Adam(self.model.parameters(), self.rate)

    def audit(self):
        flip = audits.augmentation(lambda x: x.flip(0) if torch.rand(()) < 0.5 else x, self.x[:64])
        self.monitor.audit(augmentations={"flip": flip}, loaded=audits.loaded(self.model, self.model.state_dict()))

    def read(self, model, probe):
        mean, log_variance = model.encoder(probe).chunk(2, dim=1)
        return {"val/latent": panel.latents(mean, log_variance)}

    def batch(self, step):
        return self.x[torch.randint(len(self.x), (64,))]

    def terms(self, x, step):
        return self.model.terms(x)

    def update(self, terms, batch, step):
        self.optimizer.zero_grad()
        sum(weight * value for value, weight in terms.values()).backward()
        self.monitor.step(terms, batch)
        self.optimizer.step()

    def validate(self):
        with self.monitor.validation(), torch.no_grad():
            self.model.eval()
            self.monitor.validated({name: float(v) for name, (v, _) in self.model.terms(self.held_out).items()})
        self.model.train()

    def run(self):
        """Its findings."""
        for step in range(1, self.steps + 1):
            batch = self.batch(step)
            terms = self.terms(batch, step)
            self.monitor.before_backward(terms)
            self.update(terms, batch, step)
            if step % 20 == 0:
                self.validate()
        return self.monitor.close().findings


class Diverging(Training):
    rate = 1e-2

    def update(self, terms, batch, step):
        self.optimizer.param_groups[0]["lr"] = self.rate * (1 if step < 250 else 8)
        super().update(terms, batch, step)


class OneBadBatch(Training):
    rate = 1e-3

    def batch(self, step):
        return super().batch(step) * (12 if step == 200 else 1)


class Dominated(Training):
    """J: a relational term outweighed all others six times over."""

    def terms(self, x, step):
        z = self.model.encoder(x)[:, :8]
        apart = torch.cdist(z, z) - torch.cdist(torch.randn(64, 8), torch.randn(64, 8))
        return super().terms(x, step) | {"relational": (apart.square().mean(), 300.0)}


class Unfrozen(Training):
    """V: the vision encoder was "unfrozen", and no optimizer group ever held it."""

    def build(self):
        self.model.encoder[0].requires_grad_(False)
        optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], self.rate)
        self.model.encoder[0].requires_grad_(True)
        return optimizer


class TiedAndFrozen(Training):
    """V: the head was frozen with the embedding that it shares its weight with."""

    def build(self):
        self.model.decoder[2] = nn.Linear(96, 48)
        self.model.spare = nn.Linear(48, 96)
        self.model.spare.weight = nn.Parameter(self.model.decoder[2].weight.data.T)
        self.model.decoder[2].weight.requires_grad_(False)
        return super().build()


class InertFlip(Training):
    """D: every copy was flipped, and so none was another."""

    def audit(self):
        self.monitor.audit(augmentations={"flip": audits.augmentation(lambda x: x.flip(0), self.x[:64])})


class PartlyLoaded(Training):
    def audit(self):
        state = {name.replace("decoder", "dec"): p for name, p in Autoencoder().state_dict().items()}
        self.monitor.audit(loaded=audits.loaded(self.model, state))
        self.model.load_state_dict(state, strict=False)


class Polluting(Training):
    def validate(self):
        with self.monitor.validation(), torch.no_grad():
            self.monitor.validated({name: float(v) for name, (v, _) in self.model.terms(self.held_out).items()})


class ClippedInTheLog(Training):
    def update(self, terms, batch, step):
        self.optimizer.zero_grad()
        sum(weight * value for value, weight in terms.values()).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.monitor.step(terms, batch)
        self.optimizer.step()


class Blind(Training):
    def terms(self, x, step):
        mean, log_variance = self.model.encoder(0 * x).chunk(2, dim=1)
        rebuilt = self.model.decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        return super().terms(x, step) | {
            "reconstruction": ((rebuilt - x).square().sum(1).mean(), 1.0),
            "kl": (mean.sum() * 0, 0.0),
        }

    def validate(self):
        with self.monitor.validation(), torch.no_grad():
            self.model.eval()
            self.monitor.validated({name: float(v) for name, (v, _) in self.terms(self.held_out, 0).items()})
        self.model.train()


class Memorising(Training):
    steps, width, count = 600, 256, 24


class Drifting(Training):
    def terms(self, x, step):
        terms = super().terms(x, step)
        return terms | {"kl": (-self.model.encoder(x)[:, :8].mean(), 1.0)}


class ConstantTeacher(Training):
    """V: constants were ranked."""

    def terms(self, x, step):
        scores = (self.model.decoder(torch.randn(64, 8)) > 9).float().mean(1).requires_grad_()
        return super().terms(x, step) | {"teacher": ((scores.detach() - 0.5).relu().mean(), 0.3)}

    def read(self, model, probe):
        scores = torch.stack([(model.decoder(torch.randn(64, 8)) > 9).float().mean(1) for _ in range(4)], 1)
        return super().read(model, probe) | {"train/answers": {"tie_rate": tie_rate(scores)}}


class Unconditioned(Training):
    """D: the model was built before the labels were read."""

    def audit(self):
        labels = nn.Embedding(0, 8)
        self.model.labels = labels
        self.monitor.audit(built_for={"labels": {"built_for": labels.num_embeddings, "data": 10}})


class Unseeded(Training):
    def __init__(self, folder):
        state = torch.get_rng_state()
        seeded, torch.manual_seed = torch.manual_seed, lambda seed: seeded(67280421310721)
        try:
            super().__init__(folder)
        finally:
            torch.manual_seed = seeded
            torch.set_rng_state(state)


FAULTS = [
    (Diverging, "diverged", "fail", "it has left its past"),
    (OneBadBatch, "spike", "warning", "jumped to"),
    (Dominated, "term-dominates", "warning", "The term relational makes"),
    (Unfrozen, "not-in-optimizer", "fail", "encoder.0.weight, encoder.0.bias"),
    (TiedAndFrozen, "tied-and-frozen", "warning", "decoder.2.weight"),
    (InertFlip, "augmentation-inert", "warning", "flip gives the same result each time"),
    (PartlyLoaded, "partial-load", "fail", "4 missing (decoder.0.bias"),
    (Polluting, "validation-pollutes", "fail", "encoder.1.running_mean"),
    (ClippedInTheLog, "log-distorted", "warning", "logged after clipping"),
    (Blind, "no-learning", "fail", "loss/reconstruction is"),
    (Blind, "plateau", "fail", "that is its null."),
    (Memorising, "overfitting", "warning", "while training's goes on falling"),
    (Drifting, "latent-drift", "warning", "mean_shift of latent moved"),
    (ConstantTeacher, "teacher-inert", "fail", "does not depend on a parameter"),
    (ConstantTeacher, "term-inert", "fail", "The loss term teacher teaches nothing"),
    (Unconditioned, "conditioned-too-late", "fail", "10 labels, and the model was built without any"),
    (Unseeded, "not-reproducible", "warning", "No seed was set"),
]
found_by: dict[type, dict] = {}


@pytest.mark.parametrize(("kind", "rule", "severity", "said"), FAULTS, ids=[f"{k.__name__}-{r}" for k, r, *_ in FAULTS])
def test_a_fault_in_a_real_training_is_found_and_named(kind, rule, severity, said, tmp_path):
    if kind not in found_by:
        found_by[kind] = kind(tmp_path / "run").run()
    found = [f for f in found_by[kind] if f.rule == rule]
    assert found, [f.rule for f in found_by[kind]]
    assert any(f.severity == severity and said in f.message for f in found), found


def test_the_healthy_twin_is_quiet_and_every_one_of_these_rules_looked(tmp_path):
    training = Training(tmp_path / "run")
    assert not [f for f in training.run() if f.severity != "note"]
    passed = training.monitor.judge().passed
    assert {rule for _, rule, *_ in FAULTS} - set(passed) <= {"teacher-inert", "conditioned-too-late"}


def test_a_fact_that_no_rule_reads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No rule reads the fact 'augmentation'; nearest: augmentations"):
        Training(tmp_path / "run").monitor.audit(augmentation={})


def test_a_number_that_is_not_finite_stops_before_the_update(tmp_path):
    class Overflowing(Training):
        def terms(self, x, step):
            return {name: (v * (torch.inf if step == 30 else 1), w) for name, (v, w) in super().terms(x, step).items()}

    with pytest.raises(Stopped, match="Step 30"):
        Overflowing(tmp_path / "run").run()
    findings = json.loads((tmp_path / "run" / "findings.json").read_text())["findings"]
    assert findings[0]["rule"] == "non-finite"


# In our own trainer


def faulty(tmp_path, source, *more):
    run = train(tmp_path, f"--data.source={source}", *SHAPES, *more)
    return json.loads((run.path / "findings.json").read_text())["findings"]


def of(findings, rule):
    return [f for f in findings if f["rule"] == rule]


FEW = ("--train.steps=20", "--optim.warmup=4", "--train.validate_every=10")


def test_latents_that_are_drawn_at_another_temperature_are_found(tmp_path, shapes, monkeypatch):
    """V: samples at .6 σ, KL for σ."""
    drawn = MultimodalSystem.draw
    monkeypatch.setattr(MultimodalSystem, "draw", lambda self, q: q.mean + 0.6 * (drawn(self, q) - q.mean))
    (found,) = of(faulty(tmp_path, shapes, *FEW), "temperature-misstates-rate")
    assert found["evidence"]["noise_ratio"] == pytest.approx(0.6, abs=0.03)
    assert "and KL is charged for σ" in found["message"]


def test_a_ramp_that_patience_can_cut_short_is_found(tmp_path, shapes, monkeypatch):
    terms = MultimodalSystem.loss_terms

    def ramped(self, batch):
        found = terms(self, batch)
        self.ramp = getattr(self, "ramp", 0) + (1 if self.training else 0)
        return found | {"kl": Term(found["kl"].value, found["kl"].weight * min(1, self.ramp / 100))}

    monkeypatch.setattr(MultimodalSystem, "loss_terms", ramped)
    words = ("--train.steps=60", "--train.patience=2", "--train.validate_every=10", "--train.monitor=val/loss/total")
    ramp, moving = of(faulty(tmp_path, shapes, *words), "stopped-in-ramp")
    assert "Patience can end the run at step 30; the weight of kl moves until" in ramp["message"]
    assert "chosen by val/loss/total, in which the weight of kl moves" in moving["message"]


def test_a_slow_loader_is_found(tmp_path, shapes, monkeypatch):
    quick = batches.CaptionedImages.batch

    def slow(self, items, draw):
        time.sleep(0.05)
        return quick(self, items, draw)

    monkeypatch.setattr(batches.CaptionedImages, "training_batch", slow)
    (found,) = of(faulty(tmp_path, shapes, *FEW), "input-starved")
    assert "Training waits for data" in found["message"]


def test_images_that_are_lost_on_the_way_are_found(tmp_path):
    """V: what could not be read was a white square."""
    folder = write_shapes(tmp_path / "images", 120)
    for k in range(40):
        (folder / f"{k}.png").write_bytes(b"no image")
    few = (*FEW, "--data.bad_limit=0.5", "--health.probe=16", "--train.validate_items=16")
    (found,) = of(faulty(tmp_path, folder, *few), "data-replaced")
    assert found["severity"] == "fail"
    assert "40 × unreadable" in found["message"]


def test_a_test_split_that_is_trained_on_is_found(tmp_path, monkeypatch):
    """D: 13,000 images, 8,000 of them the test split."""
    folder = write_shapes(tmp_path / "images", 120)
    rows = (folder / "metadata.csv").read_text().splitlines()
    sides = ["split"] + ["test" if k % 3 == 0 else "train" for k in range(120)]
    (folder / "metadata.csv").write_text("\n".join(f"{r},{s}" for r, s in zip(rows, sides, strict=True)) + "\n")
    few = (*FEW, "--health.probe=16", "--train.validate_items=16")
    assert not of(faulty(tmp_path / "a", folder, *few), "trained-on-test")
    monkeypatch.setattr(splits, "_declared", lambda corpus, items: None)
    (found,) = of(faulty(tmp_path / "b", folder, *few), "trained-on-test")
    assert "training items are declared as test" in found["message"]


def test_a_prior_that_was_not_fitted_is_found(tmp_path, shapes, monkeypatch):
    """E: samples were drawn where no latent ever lies."""
    honest = MultimodalModel.sample_prior
    monkeypatch.setattr(MultimodalModel, "sample_prior", lambda self, *a, **k: honest(self, *a, **k) * 0 + 9)
    (found,) = of(faulty(tmp_path, shapes, "--prior.layers=1", "--prior.steps=10"), "prior-mismatch")
    assert found["severity"] == "fail"
    assert "the prior loses" in found["message"]


def test_a_generator_that_mixes_up_its_batch_shows_as_a_free_running_gap(tmp_path, shapes, monkeypatch):
    """Good under teacher forcing; where it writes on its own, it is handed the latent of another image."""
    start = CachedDecoding.__init__
    monkeypatch.setattr(
        CachedDecoding, "__init__", lambda self, decoder, memory: start(self, decoder, memory.roll(1, 0))
    )
    (found,) = of(faulty(tmp_path, shapes), "free-running-gap")
    assert "writing on its own" in found["message"]


def test_the_healthy_run_of_our_trainer_is_quiet_on_all_of_these(healthy):
    content = json.loads((healthy.path / "findings.json").read_text())
    own = {
        "temperature-misstates-rate", "stopped-in-ramp", "input-starved", "data-replaced", "trained-on-test",
        "prior-mismatch", "free-running-gap", "conditioned-too-late", "not-reproducible",
    }  # fmt: skip
    assert own <= set(content["passed"])

"""``intaglio check`` of autoencoders and diffusion: true counts without their parts, and each fault of a recipe."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from intaglio.config import load
from intaglio.data.batches import PictureBatch
from intaglio.health.check import check, report_lines
from intaglio.health.checks import subject_of
from intaglio.health.rules import static
from intaglio.health.rules.static import DataFacts, Facts
from intaglio.models import cost
from intaglio.nn.documented_unet import DocumentedUNet
from intaglio.objectives.diffusion import NoiseSchedule
from intaglio.sampling import diffusion as sampling
from intaglio.sampling.diffusion import Sampler
from intaglio.sampling.gaussian import moments

FEW = ["--data.items", "200", "--train.precision", "fp32", "--train.device", "cuda"]
TINY = [*FEW, "--data.image_size", "16", "--model.widths", "[16,16]", "--train.batch_size", "8"]


def rules(findings, *severities):
    return {f.rule for f in findings if not severities or f.severity in severities} - {"memory-short"}


def facts_of(recipe, *options):
    """A recipe as the rules see it, without the pass that measures it; its data has no fault."""
    config = load(recipe, options)
    subject = subject_of(config)
    system = subject.system()
    total = sum(p.numel() for p in system.parameters())
    seen = {"val/loss/total", f"val/loss/{config.loss.prediction}"}
    data = DataFacts(1800, 200, 0, 255, 2000, tuple("abcdefghij"))
    rest = {"readings": subject.readings(system), "steps": config.train.steps, "data": data}
    return Facts(config, system.model.network, total, total, total, {config.loss.prediction}, seen, {}, {}, **rest)


@pytest.mark.parametrize(
    ("recipe", "absent"),
    [
        ("autoencoder-small", ""),
        ("diffusion-small", ""),
        ("diffusion-latent", "autoencoder"),
        ("diffusion-text", "text encoder"),
    ],
)
def test_healthy_recipes_have_no_fault_and_add_up(recipe, absent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check(load(recipe, FEW))
    assert not rules(report.findings)
    p, m = report.parameters, report.memory
    assert sum(p.modules.values()) == p.total
    assert p.trainable == p.total - (p.modules[absent] if absent else 0)
    assert [r.partition(":")[0] for r in report.not_checked if "is not there" in r] == [f"the {absent}"] * bool(absent)
    assert m.gradients_bytes == m.ema_bytes == 4 * p.trainable
    assert m.activations_bytes > m.weights_bytes


def test_documented_recipe_is_counted_without_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = check(load("documented-stl10", ["--train.precision", "fp32", "--train.device", "cuda"]))
    lines = report_lines(report)
    assert lines[0] == "documented-stl10: 3,385,731 parameters"
    assert rules(report.findings) == {"data-unusable"}
    assert any("10 are assumed" in line for line in lines)
    assert report.memory.gradients_bytes == 4 * 3_385_731


def test_documented_network_with_a_table_of_texts_attends_to_a_constant():
    text = ["--condition.by", "text", "--condition.encoder", "nowhere"]
    options = ["--data.source", "engravings", "--data.image_size", "32", "--train.batch_size", "4", *FEW]
    report = check(load("documented-stl10", [*options, *text]))
    assert report.parameters.total == 4_177_539
    assert "conditioned-too-late" in rules(report.findings, "fail")
    (found,) = [f for f in report.findings if f.rule == "attention-over-one"]
    network = DocumentedUNet(table=torch.zeros(11, 512))
    crossing = [level.cross_attention for level in network.levels]
    idle = sum(layer.query.weight.numel() + layer.key.weight.numel() for layer in crossing)
    assert found.evidence == {"layers": 4, "inert_parameters": idle}
    standard = [*options, "--model.attention", "[0]", *text, *found.remedies[0].options.split()]
    healed = check(load("documented-stl10", standard))
    assert not rules(healed.findings) & {"attention-over-one", "conditioned-too-late"}
    assert any("text encoder: nowhere is not there" in reason for reason in healed.not_checked)


def test_level_of_one_place_attends_to_a_constant():
    deep = ["--model.widths", "[16,16,16,16]", "--model.attention", "[2,3]"]
    report = check(load("diffusion-latent", [*TINY, "--data.image_size", "32", *deep]))
    (found,) = [f for f in report.findings if f.rule == "attention-over-one"]
    assert found.evidence["layers"] == 2 + 3 + 1  # on the way down, up, and in the middle
    options = [*TINY, "--data.image_size", "32", *found.remedies[0].options.split()]
    assert not rules(check(load("diffusion-latent", options)).findings)


FAULTS = [
    ("--condition.drop 1", "null-mismatch", "fail"),
    ("--condition.drop 0.8", "null-mismatch", "warning"),
    ("--condition.drop 0.01", "null-mismatch", "warning"),
    ("--noise.kind scaled-linear --noise.steps 1000", "schedule-mismatch", "warning"),
    ("--noise.kind linear --noise.steps 1000 --loss.weighting log-snr", "schedule-mismatch", "warning"),
    ("--loss.prediction epsilon", "high-noise-starved", "warning"),
    ("--loss.weighting min-snr", "high-noise-starved", "warning"),
    ("--sampling.method ddpm --sampling.steps 10", "sampler-wrong", "warning"),
    ("--sampling.method ddim --sampling.steps 2", "sampler-wrong", "fail"),
    ("--train.monitor val/loss/x0", "validation-missing", "fail"),
    ("--optim.warmup 3000", "learning-rate-off", "warning"),
]


@pytest.mark.parametrize(("options", "rule", "severity"), FAULTS)
def test_faults_that_the_configuration_shows(options, rule, severity):
    found = static.judge(facts_of("diffusion-small", *options.split()))
    assert [(f.rule, f.severity) for f in found] == [(rule, severity)]
    for remedy in found[0].remedies:
        healed = static.judge(facts_of("diffusion-small", *options.split(), *remedy.options.split()))
        assert rule not in rules(healed)


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--noise.kind scaled-linear --noise.zero_terminal_snr true",
        "--noise.kind straight --loss.prediction flow",
        "--loss.weighting log-snr",
        "--loss.prediction x0",
        "--sampling.method ddim --sampling.steps 50",
        "--sampling.method ddpm --sampling.steps 100",
        "--sampling.method heun",
        "--condition.by none",
        "--condition.drop 0 --sampling.guidance 1",
    ],
)
def test_other_choices_are_no_faults(options):
    assert static.judge(facts_of("diffusion-small", *options.split())) == []


def test_terminal_snr_says_what_is_left():
    (found,) = static.judge(facts_of("diffusion-small", "--noise.kind", "scaled-linear", "--noise.steps", "1000"))
    assert found.evidence == {"snr": pytest.approx(0.004682, rel=1e-3), "left": pytest.approx(0.0683, rel=1e-3)}
    with pytest.raises(ValueError, match="says nothing of the image where no signal is left"):
        load("diffusion-small", ["--loss.prediction", "epsilon", "--noise.zero_terminal_snr", "true"])


def test_guidance_of_a_network_that_was_never_unconditional():
    facts = facts_of("diffusion-small")
    with pytest.raises(ValueError, match="never was trained so"):
        load("diffusion-small", ["--condition.drop", "0"])
    unasked = replace(facts.config, condition=replace(facts.config.condition, drop=0.0))
    assert [(f.rule, f.severity) for f in static.judge(replace(facts, config=unasked))] == [("null-mismatch", "fail")]


def test_images_without_a_class():
    facts = facts_of("diffusion-small")
    for data in (replace(facts.data, unlabelled=3), replace(facts.data, classes=())):
        assert rules(static.judge(replace(facts, data=data)), "fail") == {"data-unusable"}


def test_sampler_without_its_noise_is_wrong(monkeypatch):
    """η = 0 as it was documented: the ancestral step without its noise."""
    for method in ("ddim", "ddpm", "heun", "dpm-solver++"):
        drawn = moments(NoiseSchedule(), "v", Sampler(method, 100), 0.25, 0.5)
        np.testing.assert_allclose(drawn, (0, 0.5), atol=0.02)
    facts = facts_of("diffusion-small", "--sampling.method", "ddpm", "--sampling.steps", "100")
    monkeypatch.setattr(sampling, "draw_noise", lambda generators, shape, device: torch.zeros(len(generators), *shape))
    (found,) = static.judge(facts)
    assert (found.rule, found.severity) == ("sampler-wrong", "fail")
    assert found.evidence["std"] < 0.1


def test_autoencoder_that_is_there_and_unusable(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    report = check(load("diffusion-latent", [*TINY, "--data.image_size", "32", "--model.autoencoder", str(tmp_path)]))
    assert rules(report.findings, "fail") == {"data-unusable"}
    assert "cannot be read" in report.findings[0].message


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        "diffusion-small --model.patch 1",
        "documented-stl10 --data.source engravings --sampling.steps 20",
        "autoencoder-small --model.channels [16,32]",
    ],
)
def test_activations_are_those_that_a_real_pass_keeps(options, bf16):
    recipe, *words = options.split()
    widths = [] if recipe.startswith("autoencoder") else ["--model.widths", "[32]", "--model.attention", "[]"]
    words += ["--data.image_size", "32", "--train.batch_size", "8", *widths]
    subject = subject_of(load(recipe, words))
    counted = subject.system()
    predicted = cost.step_cost(counted, lambda: counted.weigh(counted.loss_terms(subject.batch(counted))), bf16)
    real = subject.system().to_empty(device="cpu")
    for p in real.parameters():
        torch.nn.init.normal_(p, std=0.02)
    batch = PictureBatch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.long), torch.zeros(8))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept, value = cost.saved_bytes(real, lambda: real.weigh(real.loss_terms(batch)))
    assert predicted.saved_bytes == pytest.approx(kept, rel=0.05)
    assert torch.isfinite(value)  # real numbers, although fake ones went before: nothing of them is kept
    assert predicted.flops["convolution"] > 0

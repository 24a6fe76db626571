"""What ``intaglio check`` knows before a step is spent: true counts, true memory, and the faults of the document."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from intaglio.config import load
from intaglio.data.batches import Batch
from intaglio.health.check import check, report_lines
from intaglio.health.checks import subject_of
from intaglio.health.rules import static
from intaglio.health.rules.static import CaptionFacts, DataFacts, Facts
from intaglio.models import cost
from intaglio.models.multimodal import MultimodalModel
from intaglio.systems.multimodal import MultimodalSystem

TINY = [
    *("--data.items", "40", "--data.image_size", "32", "--model.channels", "[8,8,16]", "--model.latent", "16"),
    *("--model.width", "32", "--model.heads", "2", "--model.feed_forward", "64", "--model.decoder_layers", "1"),
    *("--train.batch_size", "8", "--train.precision", "fp32", "--train.device", "cuda"),
]


# A recipe for a GPU has no time on a machine without one, which spares the calibration.
NO_TIME = ["--train.device", "cuda"]


@pytest.fixture(scope="module")
def documented():
    return check(load("documented-multimodal", ["--train.precision", "fp32"]))


def rules(findings, *severities):
    return {f.rule for f in findings if not severities or f.severity in severities}


def remedies(findings):
    """The options in each remedy, as words of the command line."""
    return [r.options.split() for f in findings for r in f.remedies if r.options]


def test_small_recipe_is_healthy_and_adds_up():
    report = check(load("multimodal-small"))
    assert not report.failing
    assert not rules(report.findings, "fail", "warning") - {"memory-short"}
    p, m = report.parameters, report.memory
    assert sum(p.modules.values()) == p.total
    assert p.trainable == p.total - p.modules["prior"]  # fitted afterwards
    assert p.modules["embedding"] == 4000 * 128  # tied: its own row, and nowhere else
    assert m.total_bytes == sum(v for k, v in vars(m).items() if k != "total_bytes")
    assert m.gradients_bytes == m.ema_bytes == 4 * p.trainable
    assert 4 * p.trainable < m.optimizer_bytes < 8 * p.trainable  # Muon keeps one moment of hidden matrices, not two
    adam = check(load("multimodal-small", ["--optim.kind", "adamw", *NO_TIME]))
    assert adam.memory.optimizer_bytes == 8 * p.trainable
    assert report.time.total_seconds == pytest.approx(4400 * report.time.seconds_per_step)
    assert f"{p.total:,} parameters" in report_lines(report)[0]


def test_documented_recipe_is_seen_through(documented):
    answer = json.loads(json.dumps(documented.as_dict()))
    assert answer["parameters"]["total"] == sum(answer["parameters"]["modules"].values()) == 564_769_987
    m = answer["memory"]
    assert m["gradients_bytes"] == 4 * 564_769_987
    assert m["weights_bytes"] + m["gradients_bytes"] + m["optimizer_bytes"] == pytest.approx(9.04e9, rel=0.002)
    assert 528e6 < m["activations_bytes"] < 1e9  # the convolutions' outputs alone are 528 MB
    assert documented.failing
    assert rules(documented.findings, "fail") == {"count-off", "trivial-pair"}
    assert rules(documented.findings, "warning") - {"memory-short"} == {
        "count-off",
        "one-layer-dominates",
        "attention-over-one",
        "position-pooled-away",
        "decoder-without-positions",
    }
    assert rules(documented.findings, "note") == {"near-chance", "latents-unshaped", "vocabulary-unreachable"}
    evidence = {f.rule: f.evidence for f in documented.findings}
    assert evidence["one-layer-dominates"]["share"] == pytest.approx(537_395_200 / 564_769_987)
    assert evidence["attention-over-one"]["inert_parameters"] == 3 * 2 * (512 * 512 + 512)
    assert evidence["near-chance"]["chance"] == math.log(8)
    lines = "\n".join(report_lines(documented))
    assert "564,769,987" in lines
    assert "537,395,200" in lines
    assert lines.count("--model.network standard") <= 2  # a remedy of many findings is told once


def test_remedies_of_the_documented_network_are_options_that_heal_it(documented):
    for words in remedies(documented.findings):
        load("documented-multimodal", words)
    (words,) = remedies([f for f in documented.findings if f.rule == "one-layer-dominates"])
    healed = check(load("documented-multimodal", [*words, *NO_TIME]))
    assert not rules(healed.findings, "fail", "warning") - {"memory-short"}


@pytest.mark.parametrize("network", ["standard", "documented"])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_those_that_a_real_pass_keeps(network, bf16):
    recipe = {"standard": "multimodal-small", "documented": "documented-multimodal"}[network]
    config = load(recipe, [*TINY, "--model.dropout", "0.1"])

    def system():
        model = MultimodalModel(vars(config.model), vars(config.prior), 32, 20, 300)
        return MultimodalSystem(config, 10, model, {})

    def loss_of(made):
        def loss():
            batch = Batch(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.ones(8, 20, dtype=torch.long))
            return made.weigh(made.loss_terms(batch))

        return loss

    with torch.device("meta"):
        counted = system()
    real = system()
    predicted = cost.step_cost(counted, loss_of(counted), bf16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        kept, _ = cost.saved_bytes(real, loss_of(real))
    assert predicted.saved_bytes == pytest.approx(kept, rel=0.05)
    assert predicted.flops["convolution"] > 0
    assert predicted.flops["product"] > 0


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ("--loss.contrastive 0", "dead-parameters"),
        ("--model.channels [8,8,16,16]", "attention-over-one"),
        ("--train.monitor val/loss/speed", "validation-missing"),
    ],
)
def test_faults_that_a_pass_shows(options, rule):
    findings = check(load("multimodal-small", [*TINY, *options.split()])).findings
    assert rule in rules(findings, "fail", "warning")
    words = remedies([f for f in findings if f.rule == rule])[0]
    config = load("multimodal-small", [*TINY, *options.split(), *words])
    assert rule not in rules(check(config).findings, "fail", "warning")


def test_dead_modules_are_named_and_counted():
    config = load("multimodal-small", [*TINY, "--loss.contrastive", "0"])
    (dead,) = [f for f in check(config).findings if f.rule == "dead-parameters"]
    system = subject_of(config).system()
    network = system.model.network
    idle = [network.image_projection, network.text_projection, network.text_encoder, system.pairing]
    shared = network.embedding.weight.numel()  # the text decoder trains it
    expected = sum(p.numel() for m in idle for p in m.parameters()) - shared
    assert dead.evidence["parameters"] == pytest.approx(expected, rel=0.1)
    assert "text_encoder" in dead.message


@pytest.fixture(scope="module")
def facts():
    """A healthy recipe as the rules see it."""
    config = load("multimodal-small", TINY)
    system = subject_of(config).system()
    terms = {"reconstruction", "caption", "contrastive", "kl"}
    measured = {f"val/loss/{t}" for t in (*terms, "total")} | {"val/caption/token_accuracy", "val/image/mse"}
    data = DataFacts(36, 4, 0, 255, 40, captions=CaptionFacts(3000, 28, 160, 0))
    total = sum(p.numel() for p in system.parameters())
    sizes = (total, 16 * total, 20 * total)
    return Facts(config, system.model.network, *sizes, terms, measured, {}, {}, steps=3000, data=data)


def test_healthy_facts_give_no_finding(facts):
    assert static.judge(facts) == []


@pytest.mark.parametrize(
    ("options", "rule", "severity"),
    [
        ("--optim.warmup 3000", "learning-rate-off", "warning"),
        ("--train.validate_every 2000", "validation-missing", "warning"),
        ("--train.validate_every 5000", "validation-missing", "warning"),
        ("--train.patience 3 --train.validate_every 20", "stopped-in-ramp", "warning"),
        ("--train.ema 0.9999", "ema-lag", "note"),
        ("--train.batch_size 64", "batch-exceeds-data", "fail"),
        ("--model.vocabulary 8000", "vocabulary-unreachable", "note"),
        ("--train.accumulate 4", "negatives-per-pass", "warning"),
        ("--train.batch_size 4", "near-chance", "warning"),
        ("--loss.pairing infonce", "near-chance", "warning"),
        ("--loss.kl 0", "latents-unshaped", "note"),
    ],
)
def test_faults_that_the_configuration_shows(facts, options, rule, severity):
    found = static.judge(replace(facts, config=load("multimodal-small", [*TINY, *options.split()])))
    assert [(f.rule, f.severity) for f in found] == [(rule, severity)]
    for words in remedies(found):
        load("multimodal-small", [*TINY, *options.split(), *words])


def test_average_says_what_is_applied(facts):
    (lag,) = static.judge(replace(facts, steps=700))
    assert lag.rule == "ema-lag"
    assert lag.severity == "note"  # the average's own warm-up keeps it close
    assert lag.evidence["applied"] == pytest.approx(701 / 710)


def test_weight_of_a_term_that_the_network_lacks(facts):
    found = static.judge(replace(facts, terms=facts.terms - {"kl"}))
    assert ("weight-not-applied", ["--loss.kl 0"]) in [(f.rule, [r.do for r in f.remedies]) for f in found]


def test_memory_beyond_the_machine(facts):
    (found,) = static.judge(replace(facts, machine_bytes=facts.total_bytes // 2))
    assert found.rule == "memory-short"


def test_unusable_data_is_a_failing_finding_beside_the_counts(tmp_path):
    report = check(load("multimodal-folder", ["--data.source", str(tmp_path / "absent"), *NO_TIME]))
    assert rules(report.findings, "fail") == {"data-unusable"}
    assert "absent is not a folder" in report.findings[0].message
    assert report.parameters.total > 4e6
    assert any("the data" in reason for reason in report.not_checked)
    if not torch.cuda.is_available():
        assert report.time.seconds_per_step is None
        assert "asks for a GPU" in report.time.how


def test_folder_of_few_flat_images_with_long_captions(tmp_path):
    rows = []
    for i in range(6):
        Image.effect_noise((40, 40), 20).convert("RGB").point(lambda v: v // 3).save(tmp_path / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "caption": f"plate {i}, " + "a quiet grey sky, " * 30}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    options = ["--data.source", str(tmp_path), "--data.cache", str(tmp_path / "cache"), *NO_TIME]
    report = check(load("multimodal-folder", [*options, "--data.text_length", "12"]))
    assert rules(report.findings, "fail") == {"batch-exceeds-data"}
    assert rules(report.findings, "warning") - {"memory-short"} == {"data-replaced", "range-mismatch"}
    remedy = next(f.remedies[0] for f in report.findings if f.rule == "batch-exceeds-data")
    assert remedy.options == "--train.batch_size 4"

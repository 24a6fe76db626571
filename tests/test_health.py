"""Real faults in real small trainings are found and named; the healthy twin stays quiet; watching changes nothing."""

import json
import math

import numpy as np
import polars as pl
import pytest
import torch
from conftest import SHAPES, train

from intaglio.cli import main
from intaglio.data import prepare as preparation
from intaglio.data import tokenizer as tokens
from intaglio.health.diagnosis import diagnose_run
from intaglio.history import Reading, read_history
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import Gaussian, StandardNetwork
from intaglio.systems.multimodal import MultimodalSystem
from intaglio.training import checkpoint
from intaglio.training import run as trainer
from intaglio.training.loop import AfterStep


def findings(run):
    return {f["rule"]: f for f in json.loads((run.path / "findings.json").read_text())["findings"]}


def faulty(tmp_path, shapes, *more):
    return findings(train(tmp_path, f"--data.source={shapes}", *SHAPES, *more))


def test_a_healthy_run_has_no_failing_finding_and_every_essential_rule_looked(healthy):
    content = json.loads((healthy.path / "findings.json").read_text())
    assert not [f for f in content["findings"] if f["severity"] == "fail"]
    assert content["verdict"] in ("healthy", "warnings")
    looked = set(content["passed"])
    assert looked >= {
        "decoder-ignores-latent", "latent-ignores-input", "dead-parameters", "range-mismatch", "trivial-pair",
        "validation-missing", "split-leak", "vocabulary-unreachable", "flattering-accuracy", "norm-pinned",
        "no-learning", "overfitting", "near-chance", "posterior-collapse", "term-inert", "learning-rate-off",
    }  # fmt: skip


def test_a_captioner_that_never_sees_the_latent_is_found(tmp_path, shapes, monkeypatch):
    """E: attention over a constant; the text decoder is a language model."""
    heard = StandardNetwork.memory
    monkeypatch.setattr(StandardNetwork, "memory", lambda self, z: heard(self, torch.zeros_like(z)))
    found = faulty(tmp_path, shapes)["decoder-ignores-latent"]
    assert found["severity"] == "fail"
    assert found["evidence"]["nats"] == pytest.approx(0, abs=1e-6)


def test_an_encoder_that_is_its_bias_is_found(tmp_path, shapes, monkeypatch):
    """E: features died, and the last layer's bias is all that is left of the image."""

    def collapsed(self, image):
        mean, raw = (self.from_grid(half) for half in self.image_encoder(0 * image).float().chunk(2, dim=1))
        return Gaussian(mean, raw.clamp(-8, 0) - 8)

    monkeypatch.setattr(StandardNetwork, "encode_image", collapsed)
    found = faulty(tmp_path, shapes, "--train.steps=60", "--train.validate_every=10")
    assert found["latent-ignores-input"]["severity"] == "fail"
    assert "is the same for every input" in found["latent-ignores-input"]["message"]


def test_a_term_or_layer_that_pins_the_norm_is_found(tmp_path, shapes, monkeypatch):
    """E: "alignment" held the norm; its calm curve was read as health."""
    free = StandardNetwork.encode_image

    def pinned(self, image):
        q = free(self, image)
        return Gaussian(math.sqrt(q.mean.shape[1]) * torch.nn.functional.normalize(q.mean, dim=1), q.log_variance)

    monkeypatch.setattr(StandardNetwork, "encode_image", pinned)
    found = faulty(tmp_path, shapes, "--train.steps=60", "--train.validate_every=6")["norm-pinned"]
    assert found["severity"] == "warning"
    assert found["evidence"]["norm"] == pytest.approx(math.sqrt(32), rel=1e-3)


def test_an_output_that_reaches_another_range_than_the_data_is_found(tmp_path, shapes, monkeypatch):
    """E: tanh against images in [0, 1]."""
    monkeypatch.setattr(MultimodalModel, "to_range", lambda self, images: images.float() / 255)
    found = faulty(tmp_path, shapes, "--model.output=tanh", "--train.steps=10", "--optim.warmup=2")["range-mismatch"]
    assert found["severity"] == "fail"
    assert "[-1, 1]" in found["message"]


def test_a_latent_contrasted_with_itself_is_found(tmp_path, shapes):
    """E: InfoNCE(z, z), in the documented network, as it stands."""
    words = ("--model.network=documented", "--loss.pairing=self", "--loss.kl=0", "--model.channels=[64,128,256,512]")
    found = faulty(tmp_path, shapes, *words, "--model.encoder_layers=0", "--train.steps=10", "--optim.warmup=2")
    assert found["trivial-pair"]["severity"] == "fail"


def test_a_vocabulary_with_ids_that_no_text_reaches_is_found(tmp_path, shapes, monkeypatch):
    """E: the tokenizer was built on text with punctuation, and encodes text without."""
    plain = tokens._normal
    built = tokens.CaptionTokenizer.train.__func__

    def noisy(cls, captions, vocabulary):
        marks = "!?,.;:()[]{}#%&*+/<=>@^_|~$"
        return built(cls, [f"{c}{m} {m}{m}" for c, m in zip(captions, marks * 99, strict=False)], vocabulary)

    monkeypatch.setattr(tokens.CaptionTokenizer, "train", classmethod(noisy))
    monkeypatch.setattr(tokens, "_normal", plain)
    found = faulty(tmp_path, shapes, "--train.steps=10", "--optim.warmup=2")["vocabulary-unreachable"]
    assert found["evidence"]["share"] > 0.2


def test_an_accuracy_that_counts_padding_and_start_is_found(tmp_path, shapes, monkeypatch):
    """E: 69.4 % that were START and padding."""
    honest = MultimodalSystem.measure

    def flattering(self, batch):
        sums = honest(self, batch)
        right, count = sums["caption/token_accuracy"]
        free = float((batch.ids == tokens.PAD).sum()) + 3 * len(batch.ids)
        return sums | {"caption/token_accuracy": (right + free, count + free)}

    monkeypatch.setattr(MultimodalSystem, "measure", flattering)
    found = faulty(tmp_path, shapes, "--train.steps=60")["flattering-accuracy"]
    assert found["evidence"]["logged"] > found["evidence"]["true"] + 0.02


def test_held_out_rows_that_the_logger_dropped_are_found(tmp_path, shapes, monkeypatch):
    """E: steps of validation went backwards, and the logger dropped them."""
    write = AfterStep._write
    dropped = lambda self, trainer, step, readings: write(  # noqa: E731
        self, trainer, step, {n: r for n, r in readings.items() if not n.startswith("val/loss")}
    )
    monkeypatch.setattr(AfterStep, "_write", dropped)
    found = faulty(tmp_path, shapes, "--train.steps=60")["validation-missing"]
    assert found["message"] == "No held-out loss was ever logged."


def test_a_vocabulary_built_on_held_out_captions_is_found(tmp_path, shapes, monkeypatch):
    """E: the tokenizer had read the captions that it was judged by."""
    own = tmp_path / "own"
    own.mkdir()
    rows = ["file_name,caption"]
    for k, source in enumerate(sorted(shapes.glob("*.png"))[:60]):
        (own / source.name).write_bytes(source.read_bytes())
        rows.append(f"{source.name},the zq{k}xv and the zq{k}xv")
    (own / "metadata.csv").write_text("\n".join(rows) + "\n")
    everything = tokens.CaptionTokenizer.train([r.split(",")[1] for r in rows[1:]] * 2, 300)
    monkeypatch.setattr(preparation.CaptionTokenizer, "train", classmethod(lambda cls, captions, size: everything))
    few = ("--train.steps=4", "--optim.warmup=1", "--train.batch_size=8", "--health.probe=10", "--model.vocabulary=300")
    found = faulty(tmp_path, own, *few)["split-leak"]
    assert "the vocabulary was built on their captions" in found["message"]


def test_a_module_that_is_never_called_is_found_by_name(tmp_path, shapes, monkeypatch):
    """E: 16.8 million parameters of a transformer that no forward pass reached."""
    build = StandardNetwork.__init__

    def with_spare(self, *given, **named):
        build(self, *given, **named)
        self.fusion = torch.nn.TransformerEncoderLayer(32, 2, 64)

    monkeypatch.setattr(StandardNetwork, "__init__", with_spare)
    found = faulty(tmp_path, shapes, "--train.steps=10", "--optim.warmup=2")["dead-parameters"]
    assert found["severity"] == "fail"
    assert "network.fusion" in found["message"]


def test_a_weight_that_is_only_logged_and_a_rate_of_another_schedule_are_found(tmp_path, shapes, monkeypatch):
    """V: the ramp existed in the log alone; the decoder's group ran at ten times its rate."""
    weigh = MultimodalSystem.weigh
    monkeypatch.setattr(
        MultimodalSystem, "weigh", lambda self, terms: weigh(self, terms) + 0.5 * terms["caption"].value.float()
    )
    configure = MultimodalSystem.configure_optimizers

    def ten_times(self):
        parts = configure(self)
        parts["lr_scheduler"]["scheduler"].base_lrs = [10 * x for x in parts["lr_scheduler"]["scheduler"].base_lrs]
        return parts

    monkeypatch.setattr(MultimodalSystem, "configure_optimizers", ten_times)
    found = faulty(tmp_path, shapes, "--train.steps=20", "--optim.warmup=2", "--optim.rate=1e-4")
    assert found["weight-not-applied"]["severity"] == "fail"
    assert found["learning-rate-off"]["severity"] == "fail"


def test_watching_changes_no_weight_and_no_row_of_the_training_curve(tmp_path, monkeypatch):
    """Weights after 200 steps are bit-identical with health on and off, and with TensorBoard on and off; every other
    row of the history is the same as well."""
    words = ("--train.steps=200", "--train.validate_every=50", "--train.accumulate=1", "--prior.layers=0")
    on, off = train(tmp_path / "on", *words), train(tmp_path / "off", *words, "--health.on=false")
    monkeypatch.setattr(trainer, "TensorBoardLogger", lambda *given, **named: False)
    unlogged = train(tmp_path / "unlogged", *words)
    assert not (unlogged.path / "tensorboard").exists()
    a, b, c = (
        torch.load(r.checkpoints / checkpoint.name(200), weights_only=True)["state_dict"] for r in (on, off, unlogged)
    )
    assert all(torch.equal(a[name], b[name]) and torch.equal(a[name], c[name]) for name in b)
    rows = {
        r: read_history(r.metrics).filter(pl.col("name").str.contains("^(train/(loss|weight|optim)|val/loss)"))
        for r in (on, off)
    }
    shared = rows[on].join(rows[off], on=["step", "name"], how="inner", suffix="_off")
    assert len(shared) == len(rows[off])
    assert shared["value"].equals(shared["value_off"], null_equal=True)
    facts = json.loads((on.path / "audits.json").read_text())
    assert facts["dead_parameters"] == {}
    assert facts["not_in_optimizer"] == facts["unmoved"] == facts["changed_by_validation"] == []
    assert not (off.path / "audits.json").exists()


def test_a_failing_verdict_stops_a_run_that_asks_for_it(tmp_path, shapes):
    words = ("--loss.caption=0", "--health.stop=true", "--train.steps=80", "--train.validate_every=20")
    run = train(tmp_path, f"--data.source={shapes}", *SHAPES, *words)
    assert run.record["step"] < 80
    assert run.record["status"] == "stopped"
    assert run.record["stopped_by"].startswith("health: ")
    assert (run.report / "index.html").is_file()


def test_diagnose_answers_in_words_json_and_exit_codes(healthy, capsys, tmp_path):
    assert main(["diagnose", str(healthy.path)]) == 0
    assert capsys.readouterr().out.split(":")[0] in ("HEALTHY", "WARNINGS")
    assert main(["diagnose", str(healthy.path), "--json", "--rule", "near-chance"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] == ["near-chance"]
    assert main(["diagnose", "--explain", "decoder-ignores-latent"]) == 0
    assert "Bowman" in capsys.readouterr().out
    for words, said in (
        (["diagnose"], "which run?"),
        (["diagnose", str(tmp_path)], "holds no history"),
        (["diagnose", str(healthy.path), "--rule", "near-chanse"], "did you mean 'near-chance'"),
        (["diagnose", str(healthy.path), "--profile", "documant"], "There is no profile"),
        (["diagnose", "--explain", "memry-short"], "There is no rule 'memry-short'"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_the_documents_profile_says_where_it_is_wrong_and_why(healthy, capsys):
    assert main(["diagnose", str(healthy.path), "--profile", "documents"]) in (0, 1)
    said = capsys.readouterr().out
    assert "from “effective rank of targets > 5 of 256”, is wrong: Gaussian noise" in said
    assert main(["diagnose", "--explain", "memory-short"]) == 0
    assert "Seen by intaglio check" in capsys.readouterr().out


def test_trials_on_a_finished_run_write_their_readings(healthy):
    before = set(read_history(healthy.metrics)["name"])
    assert main(["diagnose", str(healthy.path), "--trials"]) == 0
    assert set(read_history(healthy.metrics)["name"]) == before
    assert diagnose_run(healthy.path).verdict in ("healthy", "warnings")


def test_an_empty_or_half_written_folder_says_what_is_missing(healthy, tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "name": "a"}))
    assert main(["diagnose", str(tmp_path)]) == 2
    assert "has no metrics yet" in capsys.readouterr().err
    lines = healthy.metrics.read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[: len(lines) // 2]) + '\n{"step": 3, "epo')
    with pytest.warns(UserWarning, match="is damaged"):
        assert main(["diagnose", str(tmp_path)]) in (0, 1, 3)
    assert np.isfinite(Reading(1.0).value)

"""The monitor on other people's trainings: bit-identical, hard to break, and it stops before a bad update."""

import json
import math
import subprocess
import sys

import lightning as L
import polars as pl
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from intaglio.cli import main
from intaglio.health import panel
from intaglio.health.lightning import MonitorCallback
from intaglio.health.monitor import Monitor, Stopped
from intaglio.history import NotMeasured, Reading, read_history


def data(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 4, generator=generator) @ torch.randn(4, 32, generator=generator)).tanh()


class Autoencoder(nn.Module):
    """With BatchNorm and dropout, whose state a careless look would change."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1))
        self.latent = nn.Linear(64, 8)
        self.decoder = nn.Linear(8, 32)

    def forward(self, x):
        return self.decoder(self.latent(self.encoder(x)))


class InPlace(Autoencoder):
    def forward(self, x):
        return self.decoder(self.latent(self.encoder(x)).mul_(0))  # after the tap


class Tied(Autoencoder):
    def __init__(self):
        super().__init__()
        self.latent = nn.Linear(64, 32)
        self.decoder = nn.Linear(32, 64)
        self.back = nn.Linear(64, 32)
        self.back.weight = self.latent.weight

    def forward(self, x):
        return self.back(self.decoder(self.latent(self.encoder(x))))


class Checkpointed(Autoencoder):
    def forward(self, x):
        hidden = self.encoder(x)
        return self.decoder(checkpoint(self.latent, hidden, use_reentrant=False))


class Half(Autoencoder):
    def __init__(self):
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x):
        return super().forward(x.bfloat16()).float()


def fit(folder=None, kind=Autoencoder, steps=30, change=lambda m: m, spoil=None, **options):
    """Trains; with a folder, watched. Gives model, monitor and the state of the global generator."""
    torch.manual_seed(0)
    model = kind()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    run = change(model)
    watch = {"probe": data(64, 1), "taps": {"latent": "latent"}, "every": 10, "steps": steps, **options}
    monitor = Monitor(run, optimizer, folder=folder, **watch) if folder else None
    x = data(512)
    for step in range(1, steps + 1):
        batch = x[torch.randint(512, (32,))]
        loss = (run(batch) - batch).square().sum(1).mean()
        if spoil == step:
            loss = loss * math.nan
        optimizer.zero_grad()
        loss.backward()
        if monitor:
            monitor.step(loss, batch)
        optimizer.step()
        if step % 10 == 0:
            if monitor:
                with monitor.validation():
                    model.eval()
                    monitor.validated({"total": float((run(x[:64]) - x[:64]).detach().square().sum(1).mean())})
            model.train()
    if monitor:
        monitor.close()
    return model, monitor, torch.get_rng_state()


def readings(monitor):
    return set(read_history(monitor.folder.metrics)["name"])


@pytest.mark.parametrize("kind", [Autoencoder, InPlace, Tied, Checkpointed, Half])
def test_weights_buffers_and_generator_are_what_they_are_without_it(kind, tmp_path):
    plain, _, untouched = fit(kind=kind)
    watched, monitor, state = fit(tmp_path / "run", kind)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    assert torch.equal(untouched, state)
    assert watched.training
    assert "val/latent/covariance_rank" in readings(monitor)
    assert not any(module._forward_hooks for module in watched.modules())
    assert monitor.facts["changed_by_validation"] == []


@pytest.mark.parametrize(("weights", "dead"), [([0.0] * 10 + [1.0] * 10, {}), ([0.0] * 20, {"second": 6})])
def test_what_a_term_at_weight_0_will_train_is_not_dead_yet(tmp_path, weights, dead):
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    optimizer = torch.optim.Adam(model.parameters())
    monitor = Monitor(model, optimizer, folder=tmp_path / "run")
    for weight in weights:
        terms = {
            name: (part(torch.ones(2)).square().sum(), w)
            for (name, part), w in zip(model.items(), (1, weight), strict=True)
        }
        optimizer.zero_grad()
        sum(w * value for value, w in terms.values()).backward()
        monitor.step(terms)
        optimizer.step()
    monitor.close()
    assert monitor.facts["dead_parameters"] == dead


@pytest.mark.parametrize(
    ("emptied", "micro", "kept"),
    [("never", 1, True), ("before", 1, False), ("after", 1, False), ("after", 3, False)],
)
def test_gradients_that_add_up_are_told_and_micro_batches_are_not(tmp_path, emptied, micro, kept):
    torch.manual_seed(0)
    model = Autoencoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    monitor = Monitor(model, optimizer, folder=tmp_path / "run", every=5)
    for k in range(30):
        loss = (model(x := data(16, k)) - x).square().mean()
        if emptied == "before":
            optimizer.zero_grad()
        loss.backward()
        monitor.step(loss)
        if (k + 1) % micro == 0:
            optimizer.step()
            if emptied == "after":
                optimizer.zero_grad(set_to_none=False)
    named = [f.rule for f in monitor.close().findings]
    assert ("gradients-add-up" in named) == kept
    assert next(model.parameters())._backward_hooks in (None, {})


def test_a_teacher_that_is_averaged_is_known_to_move(tmp_path):
    torch.manual_seed(0)
    model = Autoencoder()
    model.teacher, model.frozen = nn.Linear(64, 8).requires_grad_(False), nn.Linear(2, 2).requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    monitor = Monitor(model, optimizer, folder=tmp_path / "run", every=5)
    for k in range(6):
        optimizer.zero_grad()
        loss = (model(x := data(16, k)) - x).square().mean()
        loss.backward()
        monitor.step(loss)
        optimizer.step()
        with torch.no_grad():
            model.teacher.weight.lerp_(model.latent.weight, 0.1)
    assert monitor.facts["moving_targets"] == ["teacher.weight"]
    monitor.close()


def test_what_a_later_look_at_held_out_items_changes_is_seen(tmp_path):
    model = Autoencoder()
    monitor = Monitor(model, folder=tmp_path / "run")
    for look in range(1, 5):
        with monitor.validation():
            if look == 4:  # as where a frozen encoder in eval mode was thawed
                with torch.no_grad():
                    next(model.parameters()).add_(1.0)
        assert len(monitor.facts["changed_by_validation"]) == (look == 4)


def test_what_is_tapped_is_what_the_module_gave_and_not_what_was_done_to_it_later(tmp_path):
    _, monitor, _ = fit(tmp_path / "run", InPlace)
    table = read_history(monitor.folder.metrics)
    assert table.filter(table["name"] == "val/latent/std")["value"].min() > 0


@pytest.mark.parametrize(
    "compiled",
    [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m],
    ids=["wrapped", "in place"],
)
def test_a_compiled_model_is_tapped_by_the_names_that_its_author_knows(compiled, tmp_path):
    plain, _, _ = fit(change=compiled)
    watched, monitor, _ = fit(tmp_path / "run", change=compiled)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert "val/latent/covariance_rank" in readings(monitor)
    assert monitor.facts["dead_parameters"] == {}


def test_a_path_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"no module 'latant' to tap; nearest: latent"):
        fit(tmp_path / "run", taps={"latent": "latant"})
    assert not (tmp_path / "run").exists(), "nothing is left behind"


def test_a_probe_that_the_model_cannot_take_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="Give a probe like the batches that it is trained on, and say how to run it"):
        fit(tmp_path / "run", probe=data(8)[:, :5])
    assert not (tmp_path / "run").exists()


def test_a_loss_has_one_null_in_training_and_on_held_out_items(tmp_path):
    nulls = {"total": 2.0, "val/loss/total": 3.0, "val/answer/accuracy": 0.5}
    _, monitor, _ = fit(tmp_path / "run", nulls=nulls, steps=2)
    found = {"train/loss/total": 2.0, "val/loss/total": 3.0, "val/answer/accuracy": 0.5}
    assert monitor.nulls == found


def test_a_folder_that_holds_a_run_is_not_written_into(tmp_path):
    fit(tmp_path / "run", steps=2)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds a run already"):
        fit(tmp_path / "run", steps=2)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_bad_update_never_reaches_the_weights_and_its_batch_is_kept(tmp_path):
    good, _, _ = fit(steps=6)
    told = []
    torch.manual_seed(0)
    with pytest.raises(
        Stopped, match=r"Step 7: total nan, gradient norm nan. The update was not made.*non-finite-step-7"
    ):
        fit(tmp_path / "run", spoil=7, on_finding=told.append)
    kept = torch.load(tmp_path / "run" / "non-finite-step-7.pt", weights_only=True)
    assert all(torch.equal(kept["model"][name], p) for name, p in good.named_parameters())
    assert kept["batch"].shape == (32, 32)
    assert kept["optimizer"]["state"]
    assert [f.rule for f in told] == ["non-finite"]
    assert main(["diagnose", str(tmp_path / "run")]) == 1


def test_a_batch_that_cannot_be_kept_does_not_hide_why_training_stops(tmp_path):
    model = nn.Linear(2, 1)
    monitor = Monitor(model, folder=tmp_path / "run")
    (math.nan * model(torch.ones(1, 2)).sum()).backward()
    with pytest.raises(Stopped, match=r"The update was not made\..* the batch could not be kept \(\w+: .*pickle"):
        monitor.step(torch.tensor(math.nan), batch=lambda: None)
    kept = torch.load(tmp_path / "run" / "non-finite-step-1.pt", weights_only=True)
    assert kept["batch"] is None
    assert torch.equal(kept["model"]["weight"], model.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spoilt", [(math.nan,), (math.inf,), (math.inf, -math.inf)])
def test_a_gradient_is_refused_between_rows_though_the_loss_is_finite(tmp_path, dtype, spoilt):
    model = nn.Linear(4, 3, dtype=dtype)
    monitor = Monitor(model, folder=tmp_path / "run")
    for step in range(1, 8):
        model.zero_grad()
        loss = model(torch.ones(2, 4, dtype=dtype)).sum()
        loss.backward()
        model.weight.grad.fill_(6e4)  # its sum is beyond float16, and none of it is infinite
        if step < 7:
            monitor.step(loss)
    model.weight.grad.view(-1)[: len(spoilt)] = torch.tensor(spoilt, dtype=dtype)
    with pytest.raises(Stopped, match=r"Step 7: .*gradient norm (nan|inf). The update was not made"):
        monitor.step(loss)


def test_a_failing_finding_stops_where_that_is_asked_for(tmp_path, capsys):
    class Spare(Autoencoder):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(64, 64)

    with pytest.raises(Stopped, match="no gradient: spare") as stopped:
        fit(tmp_path / "run", Spare, stop=True)
    assert stopped.value.finding.rule == "dead-parameters"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["stopped_by"] == "dead-parameters"


def test_terms_weights_and_their_gradients_stand_in_the_history(tmp_path):
    model = Autoencoder()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    monitor = Monitor(model, optimizer, folder=tmp_path / "run", every=4, log_every=1)
    for _ in range(4):
        hidden = model.encoder(data(32))
        terms = {
            "rebuilt": (model.decoder(model.latent(hidden)) - data(32)).square().mean(),
            "inert": hidden.detach().mean(),
        }
        weighted = {"rebuilt": (terms["rebuilt"], 2.0), "inert": (terms["inert"], 0.5)}
        monitor.before_backward(weighted)
        optimizer.zero_grad()
        sum(w * v for v, w in weighted.values()).backward()
        monitor.step(weighted)
        optimizer.step()
    monitor.close()
    last = {r["name"]: r["value"] for r in read_history(monitor.folder.metrics).to_dicts()}
    assert last["train/term.inert/gradient_norm"] == 0 < last["train/term.rebuilt/gradient_norm"]
    assert last["train/loss/total"] == pytest.approx(2 * last["train/loss/rebuilt"] + 0.5 * last["train/loss/inert"])
    found = [f for f in monitor.judge().findings if f.rule == "term-inert"]
    assert "inert teaches nothing" in found[0].message


@pytest.mark.parametrize(("name", "full"), [
    ("val_loss", "val/loss/total"), ("eval_f1", "val/logged/f1"), ("kl_loss", "val/loss/kl"), ("val/a/b", "val/a/b"),
    ("top-1 (%)", "val/logged/top-1____"),
])  # fmt: skip
def test_numbers_of_one_s_own_find_their_names(name, full, tmp_path):
    monitor = Monitor(nn.Linear(2, 2), folder=tmp_path / "run")
    monitor.validated({name: Reading(1.0, 2.0)})
    monitor.history.flush()
    assert read_history(monitor.folder.metrics)["name"].to_list() == [full]


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Autoencoder()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        rebuilt = self(batch)
        self.terms = {"error": (rebuilt - batch).square().sum(1).mean(), "size": (rebuilt.square().mean(), 0.0)}
        return self.terms["error"]

    def validation_step(self, batch):
        self.log("val_loss", self.training_step(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit_lightning(*callbacks, epochs=3, **options):
    L.seed_everything(0, verbose=False)
    module = Module()
    loaders = [torch.utils.data.DataLoader(data(256), 16, shuffle=True), torch.utils.data.DataLoader(data(64, 1), 32)]
    trainer = L.Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5, accumulate_grad_batches=2,
        **options,
    )  # fmt: skip
    trainer.fit(module, *loaders)
    return module


def test_the_lightning_callback_changes_nothing_and_reads_what_lightning_knows(tmp_path):
    watch = MonitorCallback(tmp_path / "run", data(64, 2), taps={"latent": "net.latent"}, every=8, log_every=2)
    a, b = fit_lightning(), fit_lightning(watch)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    table = read_history(watch.monitor.folder.metrics)
    assert table["step"].max() == 24, "optimizer steps, not batches"
    assert set(table["name"]) >= {"train/loss/total", "val/loss/total", "val/latent/std", "train/optimizer/rate"}
    norms = table.filter(table["name"] == "train/optimizer/gradient_norm")["value"]
    assert norms.max() > 0.5, "before clipping"
    assert watch.diagnosis is not None
    assert watch.monitor.facts["changed_by_validation"] == []


def test_the_lightning_callback_is_told_terms_with_their_weights_and_what_audits_found(tmp_path):
    leaks = {"the same item": 3}
    watch = MonitorCallback(tmp_path / "run", terms=lambda m: m.terms, facts={"leaks": leaks}, every=8, log_every=2)
    a, b = fit_lightning(), fit_lightning(watch)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    table = read_history(watch.monitor.folder.metrics)
    assert set(table["name"]) >= {"train/loss/error", "train/weight/size", "train/term.error/gradient_norm"}
    looked = table.filter(table["name"] == "train/term.error/gradient_norm")["step"]
    assert looked.to_list() == sorted(set(looked)), "once a step, not once a micro-batch"
    assert watch.monitor.facts["leaks"] == leaks
    assert "split-leak" in [f.rule for f in watch.diagnosis.findings]


def test_an_argument_that_the_monitor_does_not_have_is_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match="evry"):
        MonitorCallback(tmp_path / "run", evry=10)


@pytest.mark.parametrize(("x", "said"), [
    (torch.zeros(64, 8), "all vectors are the same"), (torch.ones(1, 8), "N too small: 1 latents, and it takes 2"),
    (torch.full((64, 8), math.nan), "64 of 64 latents are not finite"), (torch.randn(10, 8), "N too small: 10 vectors"),
])  # fmt: skip
def test_latents_that_cannot_be_judged_are_not_measured_and_never_healthy(x, said):
    assert said in panel.latents(x)["covariance_rank"].reason


def test_what_an_instrument_cannot_tell_is_logged_with_its_reason_until_it_can(tmp_path):
    monitor = Monitor(nn.Linear(32, 8), folder=tmp_path / "run")
    monitor.validated(panel.latents(torch.ones(1, 8)) | {"val/latent/std": NotMeasured("N too small")})
    assert monitor.missing["val/latent/std"] == "N too small"
    monitor.look()
    assert {"quantity": "val/latent/std", "reason": "N too small"} in monitor.judge().not_measured
    monitor.validated({"val/latent/std": 1.0})
    assert "val/latent/std" not in monitor.missing


def test_a_frozen_part_that_kept_a_gradient_of_its_own_training_is_left_in_peace(tmp_path):
    model = Autoencoder()
    model(data(8)).sum().backward()
    model.encoder.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
    with Monitor(model, optimizer, folder=tmp_path / "run", log_every=1) as monitor:
        optimizer.zero_grad()
        loss = model(data(8)).square().mean()
        loss.backward()
        monitor.step(loss)
    norm = read_history(monitor.folder.metrics).filter(pl.col("name") == "train/optimizer/gradient_norm")["value"]
    due = torch.stack([p.grad.norm() for p in model.parameters() if p.requires_grad]).norm()
    assert norm.to_list() == pytest.approx([float(due)])


def test_ids_are_refused_with_what_to_do(tmp_path):
    ids = nn.Sequential(nn.Linear(32, 8))
    monitor = Monitor(
        ids, folder=tmp_path / "run", probe=data(8), read=lambda m, x: {"val/id": panel.latents(m(x).long())}
    )
    with pytest.raises(ValueError, match=r"latents are torch.int64; .* embed or cast them"):
        monitor.look()


@pytest.mark.parametrize(("seeding", "known"), [("", None), ("torch.manual_seed(7)", 7), ("torch.seed()", None)])
def test_a_seed_that_nobody_set_is_none(seeding, known, tmp_path):
    program = f"""
import torch
from intaglio.health.monitor import Monitor
{seeding}
Monitor(torch.nn.Linear(2, 2), folder={str(tmp_path / "run")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == known

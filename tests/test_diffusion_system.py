"""The autoencoder and diffusion from command to picture: trained, resumed, extended, fine-tuned, used, refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ran, resume, start, wait_for
from PIL import Image
from test_distributed import agree
from test_resume import differing, model, rates, rows, same, state

import intaglio
from intaglio.api import load_model
from intaglio.bench.shapes import write_shapes
from intaglio.cli import main
from intaglio.history.run_folder import RunFolder
from intaglio.models.diffusion import DiffusionModel
from intaglio.sampling.diffusion import Sampler
from intaglio.sampling.guidance import Guidance
from intaglio.training.kinds import kind_of

COMMON = [
    *("--train.steps=20", "--train.batch_size=8", "--train.log_every=1", "--train.validate_every=10", "--train.keep=9"),
    "--train.checkpoint_every=5",
    *("--train.validate_items=24", "--train.ema=0.9", "--train.precision=fp32", "--optim.warmup=4"),
    *("--data.items=120", "--data.image_size=16", "--health.probe=24"),
]
AUTOENCODER = [*COMMON, "--model.channels=[8,8]", "--model.latent=2"]
DIFFUSION = [*COMMON, "--model.widths=[16,16]", "--model.blocks=1", "--sampling.each=2", "--sampling.steps=4"]


def run(recipe: str, runs: Path, *more: str, **options: Any) -> RunFolder:
    words = AUTOENCODER if recipe.startswith("autoencoder") else DIFFUSION
    folder = intaglio.train(recipe, [*words, "--name=a", f"--runs={runs}", *more], quiet=True, **options)
    assert folder is not None
    return folder


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run("autoencoder-small", tmp_path_factory.mktemp("autoencoder"))


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run("diffusion-small", tmp_path_factory.mktemp("pixels"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, autoencoder: RunFolder) -> RunFolder:
    words = (f"--model.autoencoder={autoencoder.path}", "--model.patch=1")
    return run("diffusion-latent", tmp_path_factory.mktemp("latents"), *words)


@pytest.mark.parametrize("which", ["autoencoder", "pixels", "latents"])
def test_a_run_that_stopped_half_way_and_went_on_is_the_uninterrupted_one(which, request, tmp_path):
    whole: RunFolder = request.getfixturevalue(which)
    config = whole.config()
    stopped = intaglio.train(whole.path / "config.yaml", [f"--runs={tmp_path}", "--train.steps=20"], quiet=True)
    for file in sorted(stopped.checkpoints.glob("step-*.ckpt")):
        if file.name > "step-00000010.ckpt":
            file.unlink()
    assert config.train.steps == 20
    same(resume(stopped.path), whole)


def test_a_resumed_run_needs_neither_the_autoencoder_nor_the_text_encoder_that_it_began_with(
    autoencoder, latents, reference, tmp_path
):
    for made in (autoencoder, reference):
        shutil.copytree(made.path, tmp_path / made.record["system"])
    latent = ("diffusion-latent", f"--model.autoencoder={tmp_path / 'autoencoder'}", "--model.patch=1")
    text = ("diffusion-text", f"--condition.encoder={tmp_path / 'multimodal'}")
    runs = [run(words[0], tmp_path / words[0], *words[1:]) for words in (latent, text)]
    before = [model(folder) for folder in runs]
    shutil.rmtree(tmp_path / "autoencoder")
    shutil.rmtree(tmp_path / "multimodal")
    for folder, old in zip(runs, before, strict=True):
        for file in sorted(folder.checkpoints.glob("step-*.ckpt"))[2:]:
            file.unlink()
        assert differing(model(resume(folder.path)), old) == []
    assert differing(before[0], model(latents)) == []
    assert load_model(runs[1].path).generate([0], texts=["a large moon"]).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="knows nothing of the text"):
        load_model(runs[1].path).generate([0], texts=["月"])


def test_a_run_killed_in_the_middle_of_a_step_goes_on_as_if_it_had_not_been(latents, tmp_path):
    words = [*DIFFUSION, *latents_words(latents), "--name=a", f"--runs={tmp_path}"]
    process = start("train", "diffusion-latent", *words)
    wait_for(process, tmp_path / "a" / "metrics.jsonl", 12)
    process.kill()
    process.communicate()
    same(resume(tmp_path / "a"), latents)


def test_an_extended_run_follows_the_schedule_of_its_new_length(pixels, tmp_path):
    longer = run("diffusion-small", tmp_path, "--train.steps=40", "--train.validate_every=5")
    short = run("diffusion-small", tmp_path / "b", "--train.validate_every=5")
    extended = resume(short.path, "--train.steps", "40")
    assert rates(extended)[20:] == rates(longer)[20:]
    assert rates(short)[:20] != rates(longer)[:20]


def test_a_fine_tuned_run_starts_at_a_tenth_of_the_rate_with_the_weights_of_its_parent(latents, tmp_path):
    child = run("diffusion-latent", tmp_path, *latents_words(latents), parent=latents.path)
    assert max(rates(child)) == pytest.approx(max(rates(latents)) / 10)
    assert child.record["parent"] == latents.record["id"]
    before, after = (load_model(x.path) for x in (latents, child))
    assert differing(before.autoencoder.state_dict(), after.autoencoder.state_dict()) == []
    assert differing(model(latents), model(child))


def latents_words(latents: RunFolder) -> tuple[str, str]:
    return f"--model.autoencoder={latents.config().model.autoencoder}", "--model.patch=1"


def test_a_checkpoint_holds_everything_that_sampling_needs(latents):
    names = state(latents)["state_dict"]
    assert any(name.startswith("model.autoencoder.latent_std") for name in names)
    found = load_model(latents.path)
    assert isinstance(found, DiffusionModel)
    assert found.schedule.kind == "cosine"
    assert found.schedule.steps == 500
    assert found.autoencoder is not None
    assert found.autoencoder.fitted


def test_the_same_seed_gives_the_same_image_in_any_batch(pixels):
    found = load_model(pixels.path)
    names = [found.classes[k % 3] for k in range(5)]
    for sampler in (Sampler("ddim", 5), Sampler("ddpm", 5), Sampler("heun", 3), Sampler("dpm-solver++", 5)):
        together = found.generate(range(5), names, guidance=Guidance(3.0), sampler=sampler).astype(int)
        alone = found.generate([3], names[3:4], guidance=Guidance(3.0), sampler=sampler).astype(int)
        assert np.abs(together[3] - alone[0]).max() <= 1
        again = found.generate(range(5), names, guidance=Guidance(3.0), sampler=sampler)
        assert np.array_equal(together, again)


def test_images_are_generated_into_a_folder_that_trains(pixels, tmp_path, capsys):
    out = tmp_path / "made"
    assert (
        main(["generate", str(pixels.path), "--out", str(out), "--n", "12", "--steps", "3", "--cfg", "2", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)["images"]
    assert len(told) == 12
    assert {row["label"] for row in told} == set(load_model(pixels.path).classes)
    with Image.open(out / told[0]["file_name"]) as image:
        assert image.size == (16, 16)
    assert main(["generate", str(pixels.path), "--class", "moon", "--n", "2", "--out", str(tmp_path / "b")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "RUN", "--class", "mon"], "Did you mean moon?"),
        (["generate", "RUN", "--text", "a moon"], "was not trained with texts; it knows the classes"),
        (["generate", "RUN", "--temperature", "1"], "--temperature: of multimodal models"),
        (["generate", "RUN", "--eta", "0.5", "--sampler", "heun"], "eta has no effect with 'heun'"),
        (["generate", "RUN", "--steps", "501"], "501 steps of sampling do not fit"),
        (["reconstruct", "RUN", "IMAGE", "--t", "500"], "t is 500, but the model was trained on the 500 noise levels"),
        (["caption", "RUN", "IMAGE"], "is no multimodal model, and cannot caption"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_to_do(pixels, words, said, tmp_path, capsys):
    image = tmp_path / "x.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(image)
    words = [{"RUN": str(pixels.path), "IMAGE": str(image)}.get(w, w) for w in words]
    assert main([*words, *(["--out", str(tmp_path / "out")] if words[0] != "caption" else [])]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("diffusion-small", ["--condition.drop=0"], "condition.drop to 0.15, or sampling.guidance to 1"),
        ("diffusion-small", ["--condition.by=text"], "condition.by is text, which needs a text encoder"),
        ("diffusion-small", ["--condition.encoder=x"], "condition.encoder has no effect with condition.by class"),
        ("diffusion-small", ["--model.attention=[2]"], "the levels of model.widths are 0 to 1"),
        ("diffusion-small", ["--noise.zero_terminal_snr=true", "--loss.prediction=epsilon"], "use v, x0 or flow"),
        (
            "diffusion-small",
            ["--model.network=documented", "--model.patch=1", "--condition.by=none"],
            "the documented network must be told something",
        ),
        ("diffusion-small", ["--sampling.steps=501"], "steps from 1 to 500"),
        ("diffusion-small", ["--model.widths=[8,8,8,8,8]"], "which 5 levels of patches of 2 don't divide (by 32)"),
        ("diffusion-latent", ["--model.autoencoder=nowhere"], "nowhere is not a run folder"),
        ("autoencoder-small", ["--data.image_size=48", "--model.channels=[8,8,8,8,8]"], "is not divisible by 32"),
    ],
)
def test_a_configuration_that_cannot_be_trained_is_refused(recipe, words, said, tmp_path):
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        run(recipe, tmp_path, *words)


def test_guidance_of_a_model_that_never_dropped_a_condition_is_refused(tmp_path):
    found = load_model(run("diffusion-small", tmp_path, "--condition.drop=0", "--sampling.guidance=1").path)
    with pytest.raises(ValueError, match="trained with some conditions dropped"):
        found.generate([0], ["moon"], guidance=Guidance(3.0))
    with pytest.raises(ValueError, match="never saw an image without its condition"):
        found.generate([0])


def test_images_without_classes_train_without_a_condition_only(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for k in range(40):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{k}.png")
    words = (f"--data.source={folder}", "--data.items=null", "--data.bad_limit=1")
    with pytest.raises(ValueError, match="36 of 36 training images have no class"):
        run("diffusion-small", tmp_path / "runs", *words)
    found = run("diffusion-small", tmp_path / "runs", *words, "--condition.by=none", "--sampling.guidance=1")
    assert load_model(found.path).generate([1, 2]).shape == (2, 16, 16, 3)


def test_a_class_that_only_held_out_images_have_is_refused(tmp_path):
    folder = tmp_path / "images"
    random = np.random.default_rng(0)
    for k in range(20):
        (folder / f"class {k}").mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"class {k}" / "only.png")
    words = (f"--data.source={folder}", "--data.items=null", "--data.held_out=0.2")
    with pytest.raises(ValueError, match="Held-out images have classes that no training image has"):
        run("diffusion-small", tmp_path / "runs", *words)


def test_a_run_without_an_average_of_its_weights_gives_its_live_ones(tmp_path):
    without = run("diffusion-small", tmp_path, "--train.ema=0")
    live = {k.removeprefix("model."): v for k, v in state(without)["state_dict"].items()}
    assert differing(model(without), live) == []


def test_a_cache_of_another_autoencoder_is_never_read(latents, autoencoder, tmp_path):
    """Another autoencoder has another fingerprint, and so another folder: what is encoded is encoded by it."""
    other = run("autoencoder-small", tmp_path, "--seed=1")
    first, second = (load_model(x.path) for x in (autoencoder, other))
    assert first.fingerprint() != second.fingerprint()


def test_out_of_memory_says_which_batch_takes_the_same_steps(tmp_path):
    def exhausted(system: Any) -> None:
        def loss_terms(batch: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        system.loss_terms = loss_terms

    words = ("--health.on=false", "--train.validate_every=20")
    with pytest.raises(torch.OutOfMemoryError, match=r"--train.batch_size 4 --train.accumulate 2"):
        run("diffusion-small", tmp_path, *words, alter=exhausted)
    assert "Out of memory with batches of 8" in RunFolder(tmp_path / "a").record["error"]


def test_a_poor_autoencoder_is_told_before_anything_is_trained_on_it(latents):
    notices = latents.record["notices"]
    assert any("no sample can be better" in notice for notice in notices)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--loss.prediction=x0"], "was trained with another loss.prediction"),
        (["--data.image_size=32"], "was trained with another data.image_size"),
        (["--model.blocks=2"], "was trained with another model than this recipe"),
    ],
)
def test_what_does_not_fit_the_weights_is_not_fine_tuned(pixels, words, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        run("diffusion-small", tmp_path, *words, parent=pixels.path)
    with pytest.raises(ValueError, match="is a run of diffusion, and autoencoder-small is a recipe of autoencoder"):
        run("autoencoder-small", tmp_path, parent=pixels.path)


def test_classes_that_were_not_learnt_are_not_fine_tuned(pixels, tmp_path):
    words = (f"--data.source={write_shapes(tmp_path / 'shapes', 60)}", "--data.items=null")
    with pytest.raises(ValueError, match=r"classes that the model has not learnt \(bar, circle, square\)"):
        run("diffusion-small", tmp_path / "runs", *words, parent=pixels.path)


def test_conditions_are_exchanged_whatever_the_order_of_the_items(pixels):
    """Classes lie in order in a folder: the first rows of a probe would all be told the same."""
    kind = kind_of(pixels.config())
    prepared = kind.prepare(None, load_model(pixels.path), None, lambda line: None)
    system = kind.build(prepared, load_model(pixels.path)).eval()
    items = np.array(sorted(range(120), key=lambda i: prepared.data.labels[i]))
    batch = prepared.data.batch(items, np.zeros(120, np.int64))
    other, apart = system._others(batch)
    assert bool(apart.all())
    assert bool((batch.labels[other] != batch.labels).all())
    alike = batch._replace(labels=torch.zeros_like(batch.labels))
    with torch.no_grad():
        assert "told the same" in system.read(alike)["val/condition"]["permuted_loss"].reason


def test_health_changes_no_weight(pixels, tmp_path):
    without = run("diffusion-small", tmp_path, "--health.on=false")
    assert differing(model(without), model(pixels)) == []


def test_noise_levels_and_flips_are_of_the_step_alone(pixels):
    """The history but for the clock is the same in a second run."""
    again = intaglio.train(pixels.path / "config.yaml", [f"--runs={pixels.path.parent.parent / 'again'}"], quiet=True)
    assert rows(again) == rows(pixels)
    assert torch.equal(*(load_model(x.path).network.enter.weight for x in (again, pixels)))


@pytest.mark.parametrize("recipe", ["autoencoder-small", "diffusion-small"])
def test_two_processes_train_as_one(recipe, tmp_path):
    """Noise, noise levels and dropped labels are cut from one draw for the global batch."""
    words = AUTOENCODER if recipe.startswith("autoencoder") else DIFFUSION
    words = [*words, "--name=a", "--train.steps=6", "--train.validate_items=23", "--health.on=false"]
    code, said = ran("train", recipe, *words, f"--runs={tmp_path / 'two'}", "--train.devices=2")
    assert code == 0, said
    one = intaglio.train(recipe, [*words, f"--runs={tmp_path / 'one'}"], quiet=True)
    assert one is not None
    agree(RunFolder(tmp_path / "two" / "a"), one)

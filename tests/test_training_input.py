"""What goes into training: the order of the data, the tokenizer, and every input that is refused, with its message."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ran, resume, tiny, train
from PIL import Image

from intaglio.cli import main
from intaglio.config import CaptionDataConfig, load
from intaglio.data import order
from intaglio.data.batches import CaptionedImages, TrainingBatches
from intaglio.data.prepare import notices, prepare
from intaglio.data.tokenizer import END, PAD, START, UNK, CaptionTokenizer
from intaglio.health.checks import subject_of
from intaglio.history.run_folder import RunFolder
from intaglio.models.multimodal import MultimodalModel
from intaglio.objectives import Term
from intaglio.training import checkpoint

# the order of the data


@pytest.mark.parametrize("items", [1, 7, 64])
def test_each_epoch_is_another_permutation_that_can_be_sought(items):
    whole = order.indices(items, 3, 0, 5 * items)
    epochs = whole.reshape(5, items)
    assert (np.sort(epochs) == np.arange(items)).all()
    assert items == 1 or len({tuple(e) for e in epochs}) > 1
    for start_at, count in ((0, 3), (items - 1, 2), (3 * items + items // 2, items)):
        assert (order.indices(items, 3, start_at, count) == whole[start_at : start_at + count]).all()
    assert items == 1 or (order.indices(items, 4, 0, 5 * items) != whole).any()


def numbered(items: int) -> CaptionedImages:
    """Item i is an image of colour i with the captions [START, 10·i + k, END], k = 0, 1, 2."""
    images = np.broadcast_to(np.arange(items, dtype=np.uint8)[:, None, None, None], (items, 4, 4, 3))
    ids = np.array([[START, 10 * i + k, END] for i in range(items) for k in range(3)], dtype=np.int32)
    return CaptionedImages(images, ids, np.arange(items + 1) * 3)


def contents(world: int, start_at: int, batches: int = 8) -> np.ndarray:
    """(batches, rank, item of the batch, colour and caption)."""
    data, items = numbered(23), np.arange(1, 23)
    ranks = [TrainingBatches(data, items, 5, 8, start_at, rank, world) for rank in range(world)]
    rows = []
    for several in zip(*ranks, range(batches), strict=False):
        parts = [np.stack([b.images[:, 0, 0, 0].numpy(), b.ids[:, 1].numpy()], 1) for b in several[:-1]]
        rows.append(np.stack(parts))
    return np.stack(rows)


def test_batches_span_epochs_can_be_sought_and_divide_over_processes():
    one = contents(world=1, start_at=0)
    assert (one[3:] == contents(world=1, start_at=3, batches=5)).all()
    for world in (2, 4):
        assert (contents(world, 0).reshape(one.shape) == one).all()
    colours, captions = one[..., 0].ravel(), one[..., 1].ravel()
    assert sorted(colours[:22]) == list(range(1, 23)), "the third batch ends one epoch and begins the next"
    assert (captions // 10 == colours).all(), "each image with a caption of its own"
    assert set(captions % 10) == {0, 1, 2}


# the tokenizer


def captioned(folder: Path, captions: list[str], sides: list[str] | None = None) -> Path:
    """Distinct pictures with one caption each."""
    folder.mkdir()
    rows = []
    for k, caption in enumerate(captions):
        noise = np.random.default_rng(k).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{k}.png")
        rows.append({"file_name": f"{k}.png", "caption": caption} | ({"split": sides[k]} if sides else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def test_the_tokenizer_learns_from_training_captions_alone(tmp_path):
    """A word that only held-out captions hold is no token, and its unseen bytes are counted."""
    texts = ["a quiet harbour"] * 6 + ["zeppelins zeppelins zeppelins Ω"] * 3
    source = captioned(tmp_path / "images", texts, ["train"] * 6 + ["val"] * 3)
    prepared = prepare(CaptionDataConfig(source=str(source), cache=str(tmp_path)), 0, 200)
    vocabulary = prepared.tokenizer.tokenizer.get_vocab()
    assert any("harbour" in token for token in vocabulary)
    assert not any("z" in token for token in vocabulary)
    unknown = prepared.record["unknown tokens"]
    assert unknown == int((prepared.data.ids == UNK).sum()) > 0
    assert f"{unknown} tokens of captions are unknown to the tokenizer" in notices(prepared)


def test_what_the_tokenizer_learnt_it_gives_back():
    texts = ["a ship, “at sea”", "東京の塔", "корабль в море", "سفينة في البحر", "🚢🌊 and 👩‍🚀", "  two   spaces "]
    tokenizer = CaptionTokenizer.from_json(CaptionTokenizer.train(texts, 400).to_json())
    encoded = tokenizer.encode(texts, 200)
    assert encoded.unknown == encoded.truncated == 0
    assert [tokenizer.decode(row) for row in encoded.ids] == [*texts[:-1], "two spaces"]


def test_long_captions_are_cut_and_counted():
    tokenizer = CaptionTokenizer.train(["a b c d e f g h"], 60)
    encoded = tokenizer.encode(["a b c d e f g h", "a"], 5)
    assert encoded.truncated == 1
    cut, short = encoded.ids.tolist()
    assert cut[0] == START
    assert END not in cut
    assert short[3:] == [END, PAD]
    data = CaptionDataConfig(items=40, image_size=16, text_length=6)
    prepared = prepare(data, 0, 300)
    assert prepared.data.ids.shape[1] == prepared.text_length == 6
    cut_captions, all_captions = prepared.record["captions cut"], prepared.record["captions"]
    assert f"{cut_captions} of {all_captions} captions cut to 6 tokens" in notices(prepared)


def test_captions_of_one_token_give_a_configuration_that_loads(tmp_path):
    data = CaptionDataConfig(source=str(captioned(tmp_path / "images", ["a", "b"] * 6)), cache=str(tmp_path))
    assert prepare(data, 0, 200).text_length == 3
    assert load("multimodal-folder", [f"--data.source={data.source}", "--data.text_length=3"]).data.text_length == 3


# what is refused


@pytest.fixture
def refused(capsys) -> Callable[..., str]:
    """Runs a command that ends with exit code 2; gives its message."""

    def run(*words: str) -> str:
        code, said = main(words), capsys.readouterr().err
        assert code == 2, said
        message = said.splitlines()[-1]  # what the command said before it stands above
        assert message.startswith(f"intaglio {words[0]}: ")
        return message

    return run


@pytest.fixture
def interrupted(tmp_path, reference) -> RunFolder:
    """A copy of a run as it stood between step 15 and its end."""
    run = RunFolder(Path(shutil.copytree(reference.path, tmp_path / "a")))
    shutil.rmtree(run.model)
    run.update(status="running")
    return run


def test_unknown_words_are_refused_by_the_nearest_right_one(tmp_path, refused):
    assert "Did you mean multimodal-small?" in refused("train", "multimodal-smal")
    said = refused("train", "multimodal-small", "--train.step", "5")
    assert "unknown key train.step. Did you mean train.steps?" in said
    said = refused("train", "multimodal-small", *tiny(tmp_path, "--train.monitor=val/loss/captoin"))
    assert "train.monitor is 'val/loss/captoin', which is not measured" in said
    assert "val/loss/caption, val/loss/contrastive" in said
    run = RunFolder(tmp_path / "a")
    assert run.record["status"] == "failed"
    assert not run.metrics.exists(), "found before the first step"


def test_fewer_items_than_a_batch_are_refused(tmp_path, refused):
    said = refused("train", "multimodal-small", *tiny(tmp_path, "--data.items=20", "--train.batch_size=64"))
    assert "train.batch_size is 64, but only 18 items are left for training. Use --train.batch_size 16 or less" in said
    assert not (tmp_path / "a").exists()


def test_what_is_no_run_is_refused(tmp_path, refused):
    assert f"{tmp_path} is not a run folder: it needs run.json." in refused("train", "--resume", str(tmp_path))


def test_an_unfinished_run_has_no_model(interrupted, refused):
    said = refused("caption", str(interrupted.path), "x.png")
    assert "has no model yet (status: running)" in said
    assert f"Finish it with: intaglio train --resume {interrupted.path}" in said


def test_resuming_changes_only_the_length(interrupted, refused):
    path = str(interrupted.path)
    said = refused("train", "--resume", path, "--optim.rate", "0.5", "--train.steps", "30")
    assert "was trained with another configuration (optim.rate: 0.003 -> 0.5)" in said
    assert f"use --from {path}" in said
    said = refused("train", "multimodal-medium", "--resume", path)
    assert "leave the recipe multimodal-medium out" in said
    assert "(name: 'a' -> 'b')" in refused("train", "--resume", path, "--name=b")
    assert "is past 3 steps already" in refused("train", "--resume", path, "--train.steps=3")
    assert "leave --from and --dry-run out" in refused("train", "--resume", path, "--dry-run")
    assert "leave --resume, --from" in refused("train", "--resume", path, "--print_config")


def test_resuming_from_an_older_checkpoint_says_what_it_drops(interrupted, capsys):
    older, last = (interrupted.checkpoints / checkpoint.name(step) for step in (15, 20))
    assert main(["train", "--resume", str(older), "--quiet", "--json"]) == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out) == {"run": str(interrupted.path), "status": "finished", "step": 20}
    assert f"dropping what came after {older.name}: {last.name}" in answer.err


def test_damaged_checkpoints_are_refused_and_the_earlier_named(interrupted, refused):
    path = str(interrupted.path)
    last, earlier = checkpoint.newest(interrupted.checkpoints), checkpoint.name(15)
    content = last.read_bytes()
    for kept in (len(content) * 2 // 3, 100, 0):
        last.write_bytes(content[:kept])
        said = refused("train", "--resume", path)
        assert "is cut short or damaged" in said
        assert f"Earlier: {earlier}; give one to --resume by its path" in said
    last.unlink()
    run = resume(interrupted.checkpoints / earlier)
    assert run.record["status"] == "finished"
    assert last.read_bytes()[:4] == content[:4]


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_foreign_checkpoints_are_refused_and_run_no_code(interrupted, tmp_path, refused):
    path, last = str(interrupted.path), checkpoint.newest(interrupted.checkpoints)
    torch.save({"weight": torch.zeros(3)}, last)
    assert "is not a checkpoint of intaglio" in refused("train", "--resume", path)
    last.write_text("not a checkpoint at all")
    assert "was not loaded" in refused("train", "--resume", path)
    trap = tmp_path / "trap"
    for zipped in (True, False):
        torch.save({"intaglio": Malicious(trap)}, last, _use_new_zipfile_serialization=zipped)
        said = refused("train", "--resume", path)
        assert "could run code when loaded" in said
        assert "was not loaded" in said
        assert not trap.exists()
    content = checkpoint.read(interrupted.checkpoints / checkpoint.name(15))
    content["intaglio"]["format"] = 99
    torch.save(content, last)
    said = refused("train", "--resume", path)
    assert "has checkpoint format 99; this version reads format 1" in said


def test_data_that_changed_is_refused(tmp_path, refused):
    source = captioned(tmp_path / "images", [f"picture number {k}" for k in range(24)])
    words = [f"--data.source={source}", "--data.items=null", "--data.held_out=0.2", "--train.steps=2"]
    run = train(tmp_path, *words, "--train.validate_every=1")
    Image.new("RGB", (48, 48), "red").save(source / "3.png")
    said = refused("train", "--resume", str(run.path), "--train.steps=4")
    assert f"The data of {run.path} has changed since the checkpoint" in said
    assert f"--from {run.path}" in said
    assert "has changed since it was trained" in refused("search", str(run.path), "--text", "a picture")


def test_a_full_disk_ends_the_run_and_loses_nothing(interrupted, reference):
    """The operating system refuses the next checkpoint; the last is whole, and the run goes on from it."""
    run = interrupted
    checkpoint.newest(run.checkpoints).unlink()
    for older in sorted(run.checkpoints.iterdir())[:-1]:
        older.unlink()
    first = checkpoint.newest(run.checkpoints)
    size = first.stat().st_size
    code, said = ran("train", "--resume", str(run.path), preexec_fn=lambda: limit_files(size // 2))
    assert code == 2
    assert "Cannot write the checkpoint" in said
    assert f"{first.name} is whole and can be resumed from" in said
    assert f"intaglio train --resume {run.path}" in said
    assert "Traceback" not in said
    assert run.record["status"] == "failed"
    assert "Cannot write the checkpoint" in run.record["error"]
    assert [p.name for p in run.checkpoints.iterdir()] == [first.name]
    resume(run.path)
    assert run.record["status"] == "finished"
    assert run.record["error"] is None
    final = (checkpoint.read(checkpoint.newest(r.checkpoints))["state_dict"] for r in (run, reference))
    torch.testing.assert_close(*final, rtol=0, atol=0)


def limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path):
    handlers = [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    words = ["--optim.rate=1e30", "--optim.warmup=0", "--train.checkpoint_every=1", "--train.validate_every=20"]
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path, *words)
    assert "The step was not taken." in str(caught.value)
    assert "--optim.rate" in str(caught.value)
    assert handlers == [signal.getsignal(which) for which in (signal.SIGINT, signal.SIGTERM)]
    run = RunFolder(tmp_path / "a")
    assert run.record["status"] == "failed"
    last = checkpoint.newest(run.checkpoints)
    weights = checkpoint.read(last)["state_dict"]
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())
    steps = int(last.stem.removeprefix("step-"))
    assert f"Step {steps + 1}: the gradient norm is" in str(caught.value)


def test_a_damaged_model_is_refused(tmp_path, reference, refused):
    run = RunFolder(Path(shutil.copytree(reference.path, tmp_path / "a")))
    weights = run.model / "model.safetensors"
    whole = weights.read_bytes()
    for kept in (len(whole) // 2, 4, 0):
        weights.write_bytes(whole[:kept])
        said = refused("caption", str(run.path), "x.png")
        assert f"{run.model}" in said
        assert f"intaglio train --resume {run.path}" in said
    os.truncate(run.model / "config.json", 10)
    assert f"{run.model}" in refused("caption", str(run.path), "x.png")


def test_fine_tuning_on_the_same_data_with_another_split_is_refused(tmp_path, refused):
    parent = train(tmp_path / "parent", "--train.steps=1")
    said = refused("train", "--from", str(parent.path), "--seed", "1", "--runs", str(tmp_path), "--quiet")
    assert "with another split" in said
    assert "Keep its --seed" in said
    said = refused("train", "--from", str(parent.path), "--optim.floor=1e-3", "--quiet")
    assert "optim.floor within [0, rate]" in said, "of the divided rate"
    assert not (tmp_path / "a").exists()


def test_early_stop_ends_with_the_best_look_s_weights_and_is_not_forgotten(tmp_path):
    """A rate that ruins the model after a good start: the model saved is the one of the best look."""
    ruin = ("--optim.rate=0.3", "--optim.warmup=18", "--train.patience=2", "--train.validate_every=1", "--train.ema=0")
    run = train(tmp_path, *ruin)
    best, reached = run.record["best_step"], run.record["step"]
    assert best < reached < 20
    saved = torch.load(run.checkpoints / f"step-{best:08d}.ckpt", weights_only=True)["state_dict"]
    model = MultimodalModel.from_pretrained(run.model).state_dict()
    assert all(torch.equal(saved[f"model.{name}"], model[name]) for name in model if not name.startswith("prior."))
    assert json.loads((run.path / "evaluation.json").read_text())["step"] == best
    (run.path / "findings.json").unlink()  # as if killed while finishing
    assert resume(run.path).record["step"] == reached
    assert (run.path / "findings.json").is_file()
    (run.checkpoints / checkpoint.name(best)).unlink()
    assert f"(step {best}) none are kept" in resume(run.path).record["notices"][-2]


def test_logged_losses_are_means_over_the_passes_of_a_step():
    system = subject_of(load("multimodal-small")).system()
    for number, value in enumerate((1.0, 3.0, 8.0)):
        system._pass = number
        system._remember({"caption": Term(torch.tensor(value), 2.0)}, torch.tensor(2 * value))
    assert float(system.terms["caption"].value) == pytest.approx(4)
    assert float(system.total) == pytest.approx(8)
    assert system.terms["caption"].weight == 2

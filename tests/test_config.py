"""Configuration: what is right loads as itself, what is wrong says how to put it right."""

import re
from pathlib import Path

import pytest
import yaml

from intaglio import config


@pytest.mark.parametrize("name", config.recipes())
def test_every_recipe_loads_and_prints_as_itself(name: str) -> None:
    loaded = config.load(name)
    assert config.from_dict(yaml.safe_load(config.dump(loaded))) == loaded
    assert loaded.name == name


def test_overrides_are_typed_and_shown_by_diff() -> None:
    base = config.load("multimodal-small")
    other = config.load(
        "multimodal-small", ["--train.steps", "5", "--optim.rate=2e-4", "--data.columns", "{caption: x}"]
    )
    assert config.diff(base, other) == {
        "data.columns.caption": (None, "x"),
        "optim.rate": (base.optim.rate, 0.0002),
        "train.steps": (base.train.steps, 5),
    }


def test_epochs_on_the_command_line_replace_the_recipe_s_steps() -> None:
    loaded = config.load("multimodal-small", ["--train.epochs", "2"])
    assert (loaded.train.steps, loaded.train.epochs) == (None, 2.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trian.steps", "5"], "unknown key trian. Did you mean train?"),
        (["--train.stesp", "5"], "Did you mean train.steps?"),
        (["--rate", "5"], "Did you mean optim.rate?"),
        (["--train.steps", "many"], "train.steps"),
        (["--optim.schedule", "linear"], "cosine"),
        (["--data.image_size", "50"], "multiple of 16"),
        (["--data.held_out", "1"], "share between 0 and 1"),
        (["--model.heads", "3"], "divisible by model.heads"),
        (["--train.steps", "5", "--train.epochs", "5"], "one of them"),
        (["--data.source", "folder"], "a folder has its own"),
        (["--loss.pairing", "self"], "documented network"),
        (["-x"], "--key.sub value"),
        (["--train.ema", "1"], "decay in [0, 1)"),
        (["--train.devices", "0"], "train.devices is 0; it must be at least 1"),
        (["--model.heads", "0"], "model.heads is 0"),
        (["--seed", "-1"], "seed is -1; it must not be negative"),
        (["--model.channels", "[8,8,8,8,8,8]"], "leaves no even grid"),
        (["--model.latent", "100"], "multiple of the latent's cells, 64"),
        (["--loss.temperature", "0"], "loss.temperature is 0"),
        (["--train.validate_every", "-1"], "train.validate_every is -1"),
        (["--data.text_length", "2"], "use at least 3"),
        (["--model.dropout", "1"], "model.dropout is 1.0"),
        (["--optim.betas", "[0.9,1]"], "optim.betas is [0.9, 1.0]"),
        (["--train.monitor", "val/caption/token_accuracy"], "lowest value"),
    ],
)
def test_wrong_overrides_say_what_is_right(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        config.load("multimodal-small", words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("system: multimodl\n", "must be one of: multimodal"),
        ("extends: multimodal-smal\n", "Did you mean multimodal-small?"),
        ("- a list\n", "is not a recipe"),
        ("system: [\n", "not valid YAML"),
        ("extends: multimodal-small\ntrain: 5\n", "is a section"),
        ("extends: multimodal-small\ntrain: {stesp: 5}\n", "Did you mean train.steps?"),
        ("extends: mine\n", "extend each other in a circle"),
    ],
)
def test_wrong_recipe_files_say_what_is_right(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(says)):
        config.load(path)


def test_a_recipe_extends_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: multimodal-small\noptim: {rate: 0.5}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\noptim: {warmup: 7}\n")
    loaded = config.load(tmp_path / "mine.yaml")
    assert (loaded.optim.rate, loaded.optim.warmup, loaded.name) == (0.5, 7, "mine")


def test_unknown_recipe_lists_what_there_is() -> None:
    with pytest.raises(ValueError, match="Did you mean multimodal-small"):
        config.load("multimodal-smll")
    with pytest.raises(ValueError, match="No recipe file"):
        config.load("nowhere.yaml")

"""The commands of README and docs are run, each on something small."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import test_diffusion_system
import test_jepa_system
import test_vqa_system
from conftest import TINY, train
from PIL import Image
from test_arc_data import raw, written

from intaglio.bench import Result, markdown
from intaglio.bench.faults import page as results
from intaglio.cli import main
from intaglio.data.engravings import Engravings
from intaglio.data.pixels import read_image
from intaglio.health.pages import pages

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TOO_LONG = ("intaglio demo", "intaglio bench")


DIFFUSED = {
    "small": (),
    "latent": ("--model.autoencoder={place}/autoencoder/a", "--model.patch=1"),
    "text": ("--condition.encoder={place}/made/small",),
}


def commands() -> list[str]:
    """Each ``intaglio …`` line of the shell blocks, once."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [line.split("  #")[0].strip() for line in block.splitlines() if line.startswith("intaglio ")]
    return [c for c in dict.fromkeys(found) if not c.startswith(TOO_LONG) and "--train.devices" not in c]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a finished run, a folder of captioned images and single images."""
    place = tmp_path_factory.mktemp("docs")
    run = train(place / "made", "--name=small")
    (place / "FOLDER").mkdir()
    corpus = Engravings(48, seed=3)
    rows = []
    for i in range(48):
        name = "some.jpg" if i == 0 else f"{i}.png"
        Image.fromarray(corpus.image(i, 40)).save(place / "FOLDER" / name)
        label = "thing" if corpus.label(i) in ("house", "ship", "tower", "vase", "wheel") else "nature"
        rows.append(json.dumps({"file_name": name, "caption": corpus.captions(i)[0], "label": label}))
    (place / "FOLDER" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    for name in ("a.png", "b.png", "image.png"):
        Image.fromarray(corpus.image(len(name), 64)).save(place / name)
    (place / "runs").mkdir()
    for name in ("multimodal-small", "multimodal-folder"):
        (place / "runs" / name).symlink_to(run.path)
    (place / "RUN").symlink_to(run.path)
    autoencoder = test_diffusion_system.run("autoencoder-small", place / "autoencoder")
    for name, words in DIFFUSED.items():
        made = test_diffusion_system.run(f"diffusion-{name}", place / name, *(w.format(place=place) for w in words))
        (place / "runs" / f"diffusion-{name}").symlink_to(made.path)
    (place / "runs" / "autoencoder-small").symlink_to(autoencoder.path)
    (place / "DIFFUSION").symlink_to(place / "runs" / "diffusion-small")
    for side, numbers in (("training", range(40)), ("evaluation", range(40, 52))):
        written(place / "ARC" / side, {f"task-{k}": raw(k) for k in numbers})
    written(place, {"task": raw(50)})
    for name, source in (("jepa-small", ()), ("arc", (f"--data.source={place / 'ARC'}",))):
        made = test_jepa_system.run(place / name, *test_jepa_system.INFONCE, *source)
        (place / "runs" / name).symlink_to(made.path)
    (place / "JEPA").symlink_to(place / "runs" / "jepa-small")
    asked = [f"{i}.png,how many things are there?,{'one' if i % 2 else 'two'}" for i in range(1, 48)]
    (place / "FOLDER" / "questions.csv").write_text("\n".join(["img_id,question,answer", *asked]) + "\n")
    (place / "questions.csv").write_text("image,question\na.png,what is the largest thing?\nb,where is it?\n")
    made = test_vqa_system.run(place / "vqa")
    for name in ("VQA", "runs/photos"):
        (place / name).symlink_to(made.path)
    rows = [f"{50 * k},{2.0 ** (-k / 8) + 0.3:.6f},{2.0 ** (-k / 9) + 0.35:.6f},{k / 60}" for k in range(60)]
    (place / "history.csv").write_text("\n".join(["step,loss,val_loss,quux", *rows]) + "\n")
    (ablation,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(encoding="utf-8"), re.DOTALL)
    (place / "ablation.yaml").write_text(ablation)
    (place / "plan.yaml").write_text("plan:\n  - {watch: val/loss/total, above: 100}\n")
    return place


@pytest.mark.parametrize("command", commands())
def test_command_of_the_docs_works(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command)[1:]
    monkeypatch.chdir(place)
    if words[0] == "train" and "--resume" in words:
        again = test_diffusion_system.run("diffusion-small", place / "resumed") if "diffusion" in words[2] else None
        words = ["train", "--resume", str((again or train(place / "resumed")).path), *words[3:]]
        words = ["24" if w == "6000" else w for w in words]
    elif words[0] == "train":
        folder = any("FOLDER" in w for w in words)
        ours = {"autoencoder": test_diffusion_system.AUTOENCODER, "diffusion": test_diffusion_system.DIFFUSION}
        ours["jepa"] = [*test_jepa_system.COMMON, *test_jepa_system.INFONCE]
        ours["vqa"] = test_vqa_system.COMMON
        system = next((name for name in ours if any(name in w for w in words)), None)
        tiny = [w for w in (ours[system] if system else TINY) if not (folder and w.startswith("--data.items"))]
        words = ["train", *tiny, "--runs=more", *([] if "--print_config" in words else ["--quiet"]), *words[1:]]
        words = ["12" if w == "500" else w for w in words]
    elif words[0] == "sweep":
        words += ["--seeds", "0", *test_diffusion_system.AUTOENCODER]
    expected = {1} if words[:2] == ["check", "documented-multimodal"] or words[0] == "evaluate" else {0}
    if words[0] == "diagnose" and "--explain" not in words:
        expected = {0, 1, 3}  # the verdict on a run of twenty steps
    if words[0] in ("compare", "report", "sweep"):
        expected = {0, 1, 3}
    assert main(words) in expected, capsys.readouterr().err
    out = capsys.readouterr().out
    if "--json" in words:
        json.loads(out)


PYTHON = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_of_the_docs_works(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile("\n\n".join(blocks), page.name, "exec"), {"__name__": "page"})
    folders = [folder for folder in (tmp_path / "runs").iterdir() if (folder / "run.json").is_file()]
    for folder in folders:
        failing = json.loads((folder / "findings.json").read_text())["verdict"] == "failing"
        assert main(["diagnose", str(folder)]) == int(failing)


def test_the_pages_of_the_rules_are_what_the_rules_say() -> None:
    """``python -m intaglio.health.pages docs/rules`` writes them anew."""
    written = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "rules").glob("*.md")}
    assert written == pages()


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / "rules").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_generated_images_are_an_image_folder_that_is_captioned(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert main(["generate", "RUN", "--n", "3", "--out", "three"]) == 0
    rows = [json.loads(line) for line in (place / "three/metadata.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in rows] == [0, 1, 2]
    assert read_image(place / "three" / rows[0]["file_name"], 16)[0].shape == (16, 16, 3)
    assert main(["generate", "RUN", "--n", "1", "--seed", "2", "--out", "one"]) == 0
    alone = json.loads((place / "one/metadata.jsonl").read_text())
    assert alone["caption"] == rows[2]["caption"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "RUN", "--out", "FOLDER"], "isn't empty"),
        (["caption", "RUN", "nowhere.png"], "There is no file or folder"),
        (["caption", "nowhere", "a.png"], "is not a run folder"),
        (["search", "RUN", "--text", "a", "--top", "0"], "at least 1 hit"),
        (["generate", "RUN", "--n", "0"], "at least 1 image"),
        (["caption", "RUN", "a.png", "--temperature", "0", "--method", "sample"], "temperature"),
        (["caption", "RUN", "a.png", "--seed", "3"], "no effect on greedy"),
        (["search", "RUN"], "by one of these"),
        (["encode", "RUN", "FOLDER", "--out", "x.npy"], "must end in .safetensors or .parquet"),
        (["interpolate", "RUN", "a.png", "b.png", "--steps", "1"], "at least 2"),
        (["caption", "RUN", "a.png", "--temperature", "2"], "no effect with method"),
        (["train"], "Which recipe?"),
    ],
)
def test_wrong_use_says_what_is_right(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(place)
    assert main(words) == 2
    assert says in capsys.readouterr().err


def test_unreadable_images_are_skipped_by_name(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (place / "torn.png").write_bytes((place / "a.png").read_bytes()[:200])
    assert main(["caption", "RUN", "a.png", "torn.png", "--json"]) == 0
    answer = capsys.readouterr()
    assert list(json.loads(answer.out)["captions"]) == ["a.png"]
    assert "torn.png" in answer.err
    assert main(["encode", "RUN", "torn.png"]) == 2
    (place / "some/.hidden").mkdir(parents=True)
    for name in ("a.png", "torn.png", ".hidden/b.png"):
        (place / "some" / name).write_bytes((place / Path(name).name).read_bytes())
    for words in (["search", "RUN", "--text", "a", "--in", "some"], ["reconstruct", "RUN", "some", "--out", "again"]):
        capsys.readouterr()
        assert main([*words, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)
        assert list(answer["skipped"]) == ["some/torn.png"]
        assert "hidden" not in str(answer)


ROUNDS = sorted((ROOT / "benchmarks" / "rounds").glob("*.json"), key=lambda path: int(path.stem.split("-")[1]))


@pytest.mark.parametrize("file", [*sorted((ROOT / "benchmarks").glob("*.json")), ROUNDS[-1]], ids=lambda p: p.stem)
def test_tables_of_the_readme_are_what_the_benchmarks_wrote(file: Path) -> None:
    written = json.loads(file.read_text(encoding="utf-8"))["results"]
    names = [f.name for f in fields(Result)]
    table = markdown([Result(**{k: v for k, v in row.items() if k in names}) for row in written])
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_pages_of_the_fault_benchmark_are_what_it_wrote() -> None:
    assert ROUNDS
    pages = {ROOT / "benchmarks" / "faults.json": "faults-results.md"}
    pages |= {file: file.stem.replace("-", "-round-") + ".md" for file in ROUNDS}
    for file, name in pages.items():
        found = json.loads(file.read_text(encoding="utf-8"))
        assert results.page(found) == (ROOT / "docs" / name).read_text(encoding="utf-8"), name

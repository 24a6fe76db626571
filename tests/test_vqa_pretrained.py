"""Encoders of transformers folders: read as transformers reads them, trained where the recipe says, kept."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import resume
from PIL import Image
from test_resume import model as saved_model
from test_resume import same, state
from test_vqa_system import STAGED, run, stopped
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from intaglio import answering
from intaglio.api import check, load_model
from intaglio.config import VqaModelConfig
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.history.run_folder import RunFolder
from intaglio.models.pretrained import Encoders, QuestionTokenizer, open_encoders
from intaglio.models.vqa import VqaModel, open_vqa

transformers = pytest.importorskip("transformers")

WORDS = [
    "what",
    "is",
    "the",
    "largest",
    "thing",
    "how",
    "many",
    "things",
    "are",
    "there",
    "where",
    "ship",
    "tower",
    "?",
]
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "layer_norm_eps": 1e-5}
SMALL = {**TINY, "intermediate_size": 32}
SIZED = {"image_size": 32, "patch_size": 8}
ENCODER = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
DECODER = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
PIECES = len(WORDS) + 4
VISION = {
    "ViTModel": transformers.ViTConfig(**SMALL, **SIZED),
    "Dinov2Model": transformers.Dinov2Config(**TINY, **SIZED),
    "Dinov2WithRegistersModel": transformers.Dinov2WithRegistersConfig(**TINY, **SIZED),
    "CLIPVisionModel": transformers.CLIPVisionConfig(**SMALL, **SIZED),
    "SiglipVisionModel": transformers.SiglipVisionConfig(**SMALL, **SIZED),
    "SwinModel": transformers.SwinConfig(
        embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=4, image_size=32, patch_size=4
    ),
}
TEXT = {
    "BertModel": transformers.BertConfig(**SMALL, vocab_size=PIECES, max_position_embeddings=64),
    "RobertaModel": transformers.RobertaConfig(**SMALL, vocab_size=PIECES, max_position_embeddings=66),
    "BartModel": transformers.BartConfig(
        d_model=24, **ENCODER, **DECODER, vocab_size=PIECES, max_position_embeddings=64, dropout=0.2
    ),
    "MBartModel": transformers.MBartConfig(d_model=24, **ENCODER, **DECODER, vocab_size=PIECES),
    "T5Model": transformers.T5Config(d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2, vocab_size=PIECES),
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def save_vision(folder: Path, kind: str = "Dinov2Model") -> Path:
    torch.manual_seed(0)
    getattr(transformers, kind)(VISION[kind]).save_pretrained(folder)
    told = {"image_mean": MEAN, "image_std": STD, "crop_size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    return folder


def save_text(folder: Path, kind: str = "BartModel") -> Path:
    torch.manual_seed(1)
    getattr(transformers, kind)(TEXT[kind]).save_pretrained(folder)
    vocabulary = {piece: k for k, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def built(encoders: Encoders, size: int = 32, **options: Any) -> VqaModel:
    tiny = {"width": 16, "heads": 2, "vision_layers": 1, "latents": 3, "dims": 4}
    tokenizer = CaptionTokenizer.train(WORDS * 3, 80)
    made = VqaModel({**vars(VqaModelConfig()), **tiny, **options}, size, (12, 8), len(tokenizer), encoders.described)
    made.tokenizer, made.known = tokenizer, ("ship", "tower")
    made.take(encoders)
    return made.eval()


# As transformers reads it


@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("size", [32, 48])
@torch.no_grad()
def test_an_image_is_seen_as_transformers_sees_it(kind, size, tmp_path):
    folder = save_vision(tmp_path / "v", kind)
    drawn = torch.get_rng_state()
    encoders = open_encoders(VqaModelConfig(vision=str(folder)), size, 12)
    assert torch.equal(torch.get_rng_state(), drawn)
    made = built(encoders, size)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, size, size), dtype=np.uint8))
    pixels = (images / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    theirs: Any = transformers.AutoModel.from_pretrained(folder).eval()
    other = {} if kind.startswith("Dinov2") or size == 32 else {"interpolate_pos_encoding": True}
    found = theirs(pixel_values=pixels, **other).last_hidden_state
    first = {"SiglipVisionModel": 0, "SwinModel": 0, "Dinov2WithRegistersModel": 5}.get(kind, 1)
    places = made.see(images)
    assert places.shape == (2, (size // 8) ** 2, 16)
    torch.testing.assert_close(places, made.network.vision.into(found[:, first:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", TEXT)
@torch.no_grad()
def test_a_question_is_read_as_transformers_reads_it(kind, tmp_path):
    folder = save_text(tmp_path / "t", kind)
    made = built(open_encoders(VqaModelConfig(question=str(folder)), 32, 12))
    questions = ["what is the largest thing ?", "where  is the dragon"]
    ids = made.question_ids(questions)
    real = ids > 0
    assert real.sum(1).tolist() == [8, 6]
    theirs: Any = transformers.AutoModel.from_pretrained(folder).eval()
    theirs = theirs.get_encoder() if theirs.config.is_encoder_decoder else theirs
    words = transformers.AutoTokenizer.from_pretrained(folder)(questions, padding=True, return_tensors="pt")
    found = theirs(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).last_hidden_state
    ours = made.network.question(ids, real)
    torch.testing.assert_close(ours[real], made.network.question.into(found)[real], rtol=1e-4, atol=1e-5)
    alone = made.network.question(ids[1:, :6], real[1:, :6])
    torch.testing.assert_close(alone[0], ours[1, :6], rtol=1e-4, atol=1e-5)
    assert made.cut(questions[1]) == (0, 1), "the dragon"


def test_a_whole_clip_gives_either_encoder(tmp_path):
    text = transformers.CLIPTextConfig(
        **SMALL, vocab_size=PIECES, max_position_embeddings=20, bos_token_id=0, eos_token_id=2, pad_token_id=1
    )
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VISION["CLIPVisionModel"], projection_dim=8)
    )
    folder = save_vision(save_text(tmp_path / "clip"), "CLIPVisionModel")
    whole.save_pretrained(folder)
    made = built(open_encoders(VqaModelConfig(vision=str(folder), question=str(folder)), 32, 12))
    theirs = {name: x for name, x in whole.state_dict().items() if name.startswith("vision_model")}
    ours = made.network.vision.part.state_dict()
    assert {f"vision_model.{name}" for name in ours} == theirs.keys()
    assert all(torch.equal(ours[name.removeprefix("vision_model.")], x) for name, x in theirs.items())
    assert made.latents(np.zeros((1, 32, 32, 3), np.uint8), [0], ["where is the ship ?"]).mean.isfinite().all()


def test_a_long_question_keeps_what_ends_it_and_files_are_kept_as_they_are(tmp_path):
    reader = QuestionTokenizer.of(save_text(tmp_path / "t"))
    found = reader.encode(["what is the largest thing ?", "how many", "ship"], 5)
    assert found.ids.tolist() == [[1, 5, 6, 7, 3], [1, 10, 11, 3, 0], [1, 16, 3, 0, 0]]
    assert (found.truncated, found.unknown) == (1, 0)
    reader.save(tmp_path / "copy")
    again = QuestionTokenizer.load(tmp_path / "copy")
    assert again.fingerprint() == reader.fingerprint()
    composed, decomposed = (again.encode([text], 9).ids.tolist() for text in ("thuyền", "thuyền"))
    assert composed == decomposed


def test_a_tokenizer_that_is_no_json_is_kept_too(tmp_path):
    """That of PhoBERT and of BARTpho-word: a vocabulary and merges, in Python."""
    folder = save_text(tmp_path / "t")
    for file in folder.glob("token*"):
        file.unlink()
    (folder / "vocab.txt").write_text("wha@@ 9\nt</w> 8\nship 7\nt 3\n")
    (folder / "bpe.codes").write_text("w h 9\nwh a 8\ns h 7\nsh i 6\nshi p</w> 5\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PhobertTokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    reader = QuestionTokenizer.of(folder)
    shutil.rmtree(folder)
    assert (reader.encode(["ship what"], 12).ids - 1).tolist() == [theirs("ship what")["input_ids"]]


# Training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Tensor]], set[str]]:
    """A run with two stages whose folders are gone; its weights at the start and behind each step; what trained."""
    scratch = tmp_path_factory.mktemp("pretrained")
    seen: list[dict[str, Tensor]] = []
    modes: set[str] = set()

    def record(system: Any) -> None:
        step = system.optimizer_step

        def after(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            seen.append({name: p.detach().clone() for name, p in system.model.network.named_parameters()})
            modes.update(name for name, module in system.model.network.named_modules() if module.training)

        system.optimizer_step = after
        seen.append({name: p.detach().clone() for name, p in system.model.network.named_parameters()})

    found = run(scratch, *words(scratch), *STAGED, alter=record)
    shutil.rmtree(scratch / "vision")
    shutil.rmtree(scratch / "question")
    return found, seen, modes


def words(scratch: Path) -> list[str]:
    vision, question = save_vision(scratch / "vision"), save_text(scratch / "question")
    layers = ("--model.train_vision=[-1]", "--model.train_question=[0]", "--data.question_length=12")
    return [f"--model.vision={vision}", f"--model.question={question}", *layers]


LEARNING = {"vision": ("vision.into.", "vision.part.encoder.layer.1."), "answer": ("answer.",)}
OTHERS = ("question.into.", "question.part.layers.0.", "fusion.", "bottleneck.")


def test_the_named_layers_move_and_no_others_in_every_stage(trained):
    """Step for step, from the weights themselves: vision from step 7, the decoder up to 6 and from 13."""
    _, seen, modes = trained
    moving = [{n for n in a if not torch.equal(a[n], b[n])} for a, b in pairwise(seen)]
    assert len(moving) == 20
    for step, moved in enumerate(moving):
        free = OTHERS + (LEARNING["vision"] if step >= 6 else ()) + (LEARNING["answer"] if not 6 <= step < 12 else ())
        assert moved, step
        assert not [n for n in moved if not n.startswith(free)], step
    for prefix in (*OTHERS, *LEARNING["vision"], *LEARNING["answer"]):
        still = [n for n in seen[0] if n.startswith(prefix) and torch.equal(seen[0][n], seen[-1][n])]
        assert not [n for n in still if not n.endswith(("k_proj.bias", "key.bias"))], "softmax ignores a key's bias"
    pretrained = {name for name in modes if name.startswith(("vision.part", "question.part"))}
    assert pretrained
    assert all(name.startswith(("vision.part.encoder.layer.1", "question.part.layers.0")) for name in pretrained)


def test_what_is_held_is_in_no_group_and_leaves_as_it_came(trained, tmp_path):
    found, seen, _ = trained
    learning = (*OTHERS, *LEARNING["vision"], *LEARNING["answer"])
    groups = state(found)["optimizer_states"][0]["param_groups"]
    assert sum(len(g["params"]) for g in groups) == sum(n.startswith(learning) for n in seen[0])
    ours = load_model(found.path).network
    for part, folder in (
        (ours.vision.part, save_vision(tmp_path / "v")),
        (ours.question.part, save_text(tmp_path / "q")),
    ):
        theirs: Any = transformers.AutoModel.from_pretrained(folder)
        weights = dict((theirs.get_encoder() if theirs.config.is_encoder_decoder else theirs).named_parameters())
        same_as_before = {n for n, p in part.named_parameters() if torch.equal(p, weights[n])}
        held = {n for n in weights if not n.startswith(("encoder.layer.1.", "layers.0."))}
        assert held <= same_as_before
        assert len(same_as_before) <= len(held) + 1


def test_a_run_answers_without_the_folders(trained, tmp_path):
    found, _, _ = trained
    assert any("are unknown to the tokenizer of model.question" in notice for notice in found.record["notices"])
    assert sorted(p.name for p in found.model.iterdir() if p.suffix not in (".json", ".md")) == [
        "model.safetensors",
        "question",
    ]
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    questions = ["where is the ship ?", "what is the dragon ?"]
    told = answering.answer(found.path, tmp_path / "x.png", questions, samples=4, explained=tmp_path / "why.png")
    assert [0 < row["probability"] <= 1 for row in told] == [True, True]
    assert "note" not in told[0]
    assert "1 pieces" in told[1]["note"]
    shutil.copytree(found.model, tmp_path / "elsewhere")
    images = np.zeros((1, 16, 16, 3), np.uint8)
    means = [open_vqa(at).latents(images, [0], questions[:1]).mean for at in (found.model, tmp_path / "elsewhere")]
    assert torch.equal(*means)


@pytest.mark.parametrize("step", [5, 10])
def test_a_run_goes_on_without_the_folders_as_if_it_had_not_stopped(step, trained, tmp_path):
    same(resume(stopped(trained[0], step, tmp_path / "a").path), trained[0])


def test_a_trained_model_can_have_other_layers_trained(trained, tmp_path):
    parent = trained[0]
    layers = ["--model.train_vision=all", "--model.train_question=[]"]
    own = [
        w
        for w in (
            f"--model.vision={parent.config().model.vision}",
            f"--model.question={parent.config().model.question}",
        )
    ]
    short = ["--train.steps=4", "--train.validate_every=4", "--data.question_length=12"]
    child = run(tmp_path, *own, *layers, *STAGED[1:], *short, parent=parent.path)
    before, after = saved_model(parent), saved_model(child)
    moved = {n.removeprefix("network.") for n in before if not torch.equal(before[n], after[n])}
    assert any(n.startswith("vision.part.encoder.layer.0.") for n in moved)
    assert not [n for n in moved if n.startswith(("question.part", "vision.part.embeddings"))]
    assert load_model(child.path).config.train_vision == "all"
    with pytest.raises(ValueError, match="has another shape than this recipe"):
        run(tmp_path, *short, parent=parent.path)


def test_a_recipe_with_folders_can_be_checked(tmp_path):
    found = check("vqa-small", [*words(tmp_path), "--data.image_size=32", "--data.items=60", "--model.width=16"])
    assert found


# What cannot be used


def broken(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def without_weights(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({n: x for n, x in weights.items() if "layer.1" not in n}, folder / "model.safetensors", {"format": "pt"})
    return folder


def as_pickle(folder: Path) -> Path:
    torch.save({}, folder / "pytorch_model.bin")
    return broken(folder, "model.safetensors")


def not_finite(folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["layernorm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def more_pieces(folder: Path) -> Path:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["dragon"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("options", "size", "said"),
    [
        (lambda at: {"vision": at / "none"}, 32, r"none, which is no folder here, and nothing is downloaded"),
        (lambda at: {"vision": broken(save_vision(at), "config.json")}, 32, "has no config.json"),
        (lambda at: {"vision": broken(save_vision(at), "preprocessor_config.json")}, 32, "how images are normalised"),
        (lambda at: {"vision": as_pickle(save_vision(at))}, 32, "never from a .bin"),
        (lambda at: {"vision": without_weights(save_vision(at))}, 32, r"lacks the weights \['encoder.layer.1"),
        (lambda at: {"vision": not_finite(save_vision(at))}, 32, "not finite, its weights are broken"),
        (lambda at: {"vision": save_vision(at)}, 36, r"no multiple of the 8 pixels.*use --data.image_size 32"),
        (lambda at: {"vision": save_text(at)}, 32, "holds a .*Bart.*reads input_ids.*Name it in model.question"),
        (lambda at: {"vision": save_vision(at), "train_vision": (2,)}, 32, "names layer 2; model.vision has 2, from 0"),
        (lambda at: {"question": broken(save_text(at), "tokenizer.json")}, 32, "has no tokenizer"),
        (lambda at: {"question": more_pieces(save_text(at))}, 32, "is not that of the model beside it"),
        (lambda at: {"question": save_vision(at)}, 32, "reads pixel_values.*Name it in model.vision"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_what_to_do(options, size, said, tmp_path):
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options(tmp_path / "folder").items()}
    with pytest.raises(ValueError, match=f"(?s){said}"):
        open_encoders(VqaModelConfig(**given), size, 12)


def test_questions_longer_than_the_model_reads_are_refused(tmp_path):
    for kind in ("BertModel", "RobertaModel", "BartModel"):
        with pytest.raises(ValueError, match=r"cannot read questions of 65 tokens.*shorter --data\.question_length"):
            open_encoders(VqaModelConfig(question=str(save_text(tmp_path / kind, kind))), 32, 65)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--model.train_vision=[1]", r"model\.train_vision names layers .* model\.vision names none"),
        ("--model.train_question=all", r"model\.train_question names layers"),
        ("--model.train_vision=first", r"train_vision.*first"),
        ("--model.vision=facebook/dinov2-base", r"model\.vision is facebook/dinov2-base, which is no folder here"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(word, said, tmp_path):
    with pytest.raises(ValueError, match=f"(?s){said}"):
        run(tmp_path, word)


def test_without_transformers_the_extra_is_named(trained, tmp_path, monkeypatch):
    folder = save_vision(tmp_path / "v")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for reading in (
        lambda: open_encoders(VqaModelConfig(vision=str(folder)), 32, 12),
        lambda: open_vqa(trained[0].model),
    ):
        with pytest.raises(ValueError, match=r"needs the extra hf: pip install 'intaglio\[hf\]'"):
            reading()

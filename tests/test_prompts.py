"""Texts as conditions: our text encoder and any CLIP, frozen, rebuilt from what is stored, never silently wrong."""

import json
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from intaglio.config import from_dict, to_dict
from intaglio.data.tokenizer import CaptionTokenizer
from intaglio.models import clip
from intaglio.models.multimodal import MultimodalModel
from intaglio.models.networks import DocumentedNetwork
from intaglio.models.prompts import PromptEncoder, Prompts, PromptTable, open_prompts, rebuilt
from intaglio.nn.condition import Condition, ConditionEncoder

transformers = pytest.importorskip("transformers")

TEXTS = ["a large ship at the left", "a small tower, at the right", "a tree in a field", "two fish"]
ALIEN = "日本語"


def made(network: str = "standard") -> MultimodalModel:
    config = to_dict(from_dict({"system": "multimodal", "name": "x", "train": {"steps": 1}}))["model"]
    tiny = {"latent": 16, "channels": [8, 8, 16], "width": 16, "heads": 2, "feed_forward": 32, "dropout": 0.3}
    tokenizer = CaptionTokenizer.train(TEXTS * 3, 200)
    model = MultimodalModel({**config, **tiny, "network": network}, {"width": 32, "layers": 1}, 32, 12, len(tokenizer))
    model.tokenizer = tokenizer
    return model


def save_clip(folder: Path, kind: str = "CLIPTextModelWithProjection", seed: int = 0) -> Path:
    """A CLIP of random weights, and a tokenizer that learnt ``TEXTS``."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, end_of_word_suffix="</w>", special_tokens=special, show_progress=False
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    learner.train_from_iterator([word for t in TEXTS for word in t.replace(",", " ,").split()] * 3, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = transformers.CLIPTokenizer(vocab=learnt["vocab"], merges=[tuple(m) for m in learnt["merges"]])
    tokenizer.save_pretrained(folder)
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = {**tiny, **ends, "vocab_size": len(tokenizer), "projection_dim": 24, "max_position_embeddings": 12}
    torch.manual_seed(seed)
    if kind == "CLIPModel":
        vision = {**tiny, "image_size": 32, "patch_size": 16}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=config, vision_config=vision, projection_dim=24)
        )
    else:
        model = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model() -> MultimodalModel:
    torch.manual_seed(0)
    return made().eval()


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return save_clip(tmp_path / "clip")


@pytest.fixture(params=["ours", "clip"])
def prompts(request: pytest.FixtureRequest, model: MultimodalModel, clip_folder: Path) -> Prompts:
    return PromptEncoder.of(model) if request.param == "ours" else PromptTable.of_clip(clip_folder, TEXTS)


def equal(a: Condition, b: Condition) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_ours_is_the_text_side_of_the_model(model: MultimodalModel) -> None:
    ours = PromptEncoder.of(model)
    condition = ours(ours.ids(TEXTS))
    ids = torch.from_numpy(model.tokenizer.encode(TEXTS, 12).ids).long()
    with torch.no_grad():
        tokens = model.network.text_encoder(ids, ids > 0)
    assert torch.equal(condition.pooled_BD, model.embed_text(TEXTS))
    assert torch.equal(condition.tokens_BTD, tokens)
    assert torch.equal(condition.real_BT, ids > 0)
    assert (ours.pooled, ours.tokens) == (16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert equal(ours(ours.ids(TEXTS)), condition)
    weight = model.network.embedding.weight
    assert weight.data_ptr() not in {p.data_ptr() for p in ours.parameters()}, "it is a copy"


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
@torch.no_grad()
def test_table_is_what_transformers_gives(tmp_path: Path, kind: str) -> None:
    folder = save_clip(tmp_path, kind)
    long = " ".join(["a large ship"] * 9)
    drawn = torch.get_rng_state()
    table = PromptTable.of_clip(folder, [*TEXTS, "two  fish ", long])
    assert torch.equal(torch.get_rng_state(), drawn)
    assert table.texts == ("", *TEXTS, long)
    asked = [long, "", TEXTS[2], "two fish", TEXTS[1]]
    condition = table(table.ids(asked))

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer(asked, padding=True, truncation=True, max_length=12, return_tensors="pt")
    whole = getattr(transformers, kind).from_pretrained(folder)
    if kind == "CLIPModel":
        pooled = whole.get_text_features(**words).pooler_output
        tokens = whole.text_model(**words).last_hidden_state
    else:
        out = whole(**words)
        pooled, tokens = out["text_embeds" if "text_embeds" in out else "pooler_output"], out.last_hidden_state
    real = words["attention_mask"].bool()
    assert torch.equal(condition.real_BT, real)
    torch.testing.assert_close(condition.pooled_BD, pooled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(condition.tokens_BTD[real], tokens[real], rtol=2**-11, atol=1e-6)  # float16
    assert condition.tokens_BTD.dtype == condition.pooled_BD.dtype == torch.float32
    assert (table.pooled, table.tokens) == (pooled.shape[1], 32)
    assert (table.truncated([*asked, long]), table.unknown(asked)) == (2, 0)


def test_prompts_are_frozen_rebuilt_and_draw_nothing(prompts: Prompts) -> None:
    condition, weights = prompts(prompts.ids(TEXTS)), prompts.state_dict()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    again = rebuilt(json.loads(json.dumps(prompts.config())))
    again.load_state_dict(weights)
    assert equal(again(again.ids(TEXTS)), condition)
    assert again.config() == prompts.config()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    around = torch.nn.ModuleList([again]).train()
    assert not any(m.training for m in again.modules())
    assert not any(p.requires_grad for p in around.parameters())
    assert not any(part.requires_grad for part in condition if part is not None)


def test_the_empty_text_is_the_null_of_a_denoiser(prompts: Prompts) -> None:
    empty, some = prompts.empty(), prompts(prompts.ids([TEXTS[3], ""]))
    assert empty.pooled_BD.shape == (1, prompts.pooled)
    encoder = ConditionEncoder(8, pooled=prompts.pooled, tokens=prompts.tokens, empty=empty)
    given, dropped = encoder(some, 2), encoder(some.drop(torch.tensor([True, False])), 2)
    kept = given.mask[1]
    torch.testing.assert_close(dropped.vector[0], given.vector[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dropped.memory[0][kept], given.memory[1][kept], rtol=1e-3, atol=1e-4)
    assert torch.equal(dropped.mask[0], kept)
    assert kept.sum() == 2, "attention over a single token would be a constant"


def test_what_a_tokenizer_does_not_know_is_counted_or_refused(prompts: Prompts) -> None:
    some = ["two fish", f"two fish {ALIEN}"]
    assert prompts.unknown(some) == prompts.unknown(some[1:]) > 0
    assert prompts.unknown(["", "two fish"]) == prompts.truncated(TEXTS) == prompts.truncated([]) == 0
    assert prompts.truncated([" ".join(["two fish"] * 20), "two fish"]) == 1
    with pytest.raises(ValueError, match=f"nothing of the text '{ALIEN}'.*like .*(tower|small)"):
        prompts.ids(["two fish", ALIEN])


def test_new_texts_are_encoded_by_the_same_clip_only(clip_folder: Path) -> None:
    table, whole = (PromptTable.of_clip(clip_folder, texts) for texts in (["two fish"], TEXTS))
    weights, config = {k: v.clone() for k, v in table.state_dict().items()}, table.config()
    asked = ["two fish", TEXTS[0], TEXTS[2]]
    condition, wanted = table(table.ids(asked)), whole(whole.ids(asked))
    real = condition.real_BT
    torch.testing.assert_close(condition.pooled_BD, wanted.pooled_BD)
    torch.testing.assert_close(condition.tokens_BTD[real], wanted.tokens_BTD[:, : real.shape[1]][real], rtol=2**-10,
                               atol=1e-5)  # fmt: skip
    assert table.config() == config, "what is stored is what was trained with"
    assert all(torch.equal(v, weights[k]) for k, v in table.state_dict().items())

    moved = clip_folder.rename(clip_folder.with_name("moved"))
    assert table.ids(asked).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match=r"'a tre' is not among .* no more in .*nearest are 'a tree in a field'"):
        whole.ids(["a tre"])
    shutil.copy(moved / "tokenizer.json", save_clip(clip_folder, seed=1))
    with pytest.raises(ValueError, match="holds another CLIP"):
        whole.ids(["a tre"])
    shutil.copytree(moved, clip_folder, dirs_exist_ok=True)
    assert whole.ids(["a tre"]).tolist() == [5]


def test_open_prompts_reads_models_and_clips(model: MultimodalModel, clip_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    (run / "run.json").write_text(json.dumps({"system": "multimodal", "status": "finished"}))
    ours = PromptEncoder.of(model)
    for source in (run, run / "model"):
        opened = open_prompts(source, TEXTS)
        assert equal(opened(opened.ids(TEXTS)), ours(ours.ids(TEXTS)))
    pipeline = tmp_path / "pipeline"
    shutil.copytree(clip_folder, pipeline / "text_encoder", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(clip_folder, pipeline / "tokenizer", ignore=shutil.ignore_patterns("config.json", "model.*"))
    a, b = open_prompts(clip_folder, TEXTS), open_prompts(pipeline, TEXTS)
    assert isinstance(a, PromptTable)
    assert equal(a(a.ids(TEXTS)), b(b.ids(TEXTS)))


def test_sources_that_give_no_texts(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documented = made("documented")
    assert isinstance(documented.network, DocumentedNetwork)
    with pytest.raises(ValueError, match="no text encoder"):
        PromptEncoder.of(documented)

    def refused(what: str, source: Path, texts: list[str] = TEXTS) -> None:
        with pytest.raises(ValueError, match=what):
            open_prompts(source, texts)

    refused("neither a run", tmp_path / "nowhere")
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    refused("neither a run", other)
    with pytest.raises(ValueError, match="holds no CLIP"):
        PromptTable.of_clip(other, TEXTS)
    (other / "run.json").write_text('{"system": "diffusion", "status": "finished"}')
    refused("run of diffusion", other)
    (other / "run.json").write_text('{"system": "multimodal", "status": "killed"}')
    refused("is damaged|no model yet", other)

    def broken(name: str) -> Path:
        return shutil.copytree(clip_folder, tmp_path / name)

    (broken("words") / "tokenizer.json").unlink()
    refused("has no tokenizer", tmp_path / "words")
    (broken("weights") / "model.safetensors").write_bytes(b"x" * 100)
    refused("cannot be read", tmp_path / "weights")
    settings = json.loads((broken("head") / "config.json").read_text())
    shutil.copy(save_clip(tmp_path / "plain", "CLIPTextModel") / "model.safetensors", tmp_path / "head")
    refused("lacks the weights .*text_projection", tmp_path / "head")
    (broken("end") / "config.json").write_text(json.dumps({**settings, "eos_token_id": 7}))
    refused("is not that of the CLIP beside it", tmp_path / "end")

    with monkeypatch.context() as patch:
        patch.setattr(clip, "LARGEST", 3000)
        refused(r"5 encoded texts of up to \d+ tokens of 32 numbers would take .* GB", clip_folder)
        assert open_prompts(clip_folder, []).texts == ("",)
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused(r"pip install 'intaglio\[hf\]'", clip_folder)

"""Names of others: which of ours they mean, which of two has it, and what keeps its own."""

from pathlib import Path

import numpy as np
import pytest

from intaglio.history import Series
from intaglio.history.aliases import ours, words
from intaglio.history.foreign import History


def history(**rows: int) -> History:
    """Metrics of these names, each with so many rows."""
    given = {name: Series.of(np.arange(n), np.linspace(2, 1, n)) for name, n in rows.items()}
    return History("run", Path("run.csv"), "CSV", "step", given)


def named(*names: str) -> dict[str, str]:
    series, renamed = ours(history(**dict.fromkeys(names, 20)))
    assert len(series) == len(names)
    assert series.keys() == {renamed.get(name, name) for name in names}
    return renamed


@pytest.mark.parametrize(
    ("name", "words_"),
    [
        ("Loss/valKL_2", ("loss", "val", "kl", "2")),
        ("MSELoss", ("mse", "loss")),
        ("trainloss", ("train", "loss")),
        ("lr-AdamW/pg1", ("lr", "adam", "w", "pg", "1")),
        ("validation.loss", ("validation", "loss")),
        ("损失_train", ("损失", "train")),
        ("", ()),
    ],
)
def test_words(name: str, words_: tuple[str, ...]) -> None:
    assert words(name) == words_


@pytest.mark.parametrize(
    ("names", "mine"),
    [
        (
            "loss train_loss training_loss Loss/train trainLoss batch_loss elbo total_loss loss_epoch",
            "train/loss/total",
        ),
        (
            "val_loss valid_loss test_loss eval_loss avg_val_loss loss/val Loss/Val validation.loss valLoss dev_loss "
            "val/total_loss valloss epoch_val_loss val_loss/epoch",
            "val/loss/total",
        ),
        ("kl KLD kl_loss kld_loss train/kl_div losses/kl train/loss/kl klloss", "train/loss/kl"),
        ("val_kl val/kld_loss Loss/val_KL", "val/loss/kl"),
        (
            "mse MSE recon_loss reconstruction_error nll nll-loss bce rec_loss Reconstruction_Loss",
            "train/loss/reconstruction",
        ),
        ("vq_loss quant_loss embedding_loss codebook_loss", "train/loss/vq"),
        ("commitment_loss commit train/commitment", "train/loss/commitment"),
        ("infonce nt_xent clip_loss contrastive_loss InfoNCE", "train/loss/contrastive"),
        ("g_loss gen_loss G_loss loss_G errG generator_loss", "train/loss/generator"),
        ("d_loss disc_loss lossD errD", "train/loss/discriminator"),
        ("lr learning_rate lr-Adam lr/pg0 train/lr train_lr adjusted_lr optimizer/lr", "train/optimizer/rate"),
        ("grad_norm gradient_norm grad/norm train/grad_norm grad_2.0_norm_total", "train/optimizer/gradient_norm"),
        ("acc accuracy train_acc training_accuracy train_top1 train_acc1", "train/logged/accuracy"),
        ("val_acc valid_accuracy test_acc1 val/top1 valacc", "val/logged/accuracy"),
        ("ppl perplexity", "train/logged/perplexity"),
        ("beta kl_weight kld_weight kl/beta", "train/weight/kl"),
        ("latent_std z_std latents/std", "train/latent/std"),
        ("val_f1", "val/logged/f1"),
        ("val_top5_acc", "val/logged/top5_acc"),
        ("eval_bleu", "val/logged/bleu"),
        ("perceptual_loss", "train/loss/perceptual"),
    ],
)
def test_each_name_alone_has_its_meaning(names: str, mine: str) -> None:
    for name in names.split():
        assert named(name) == ({} if name == mine else {name: mine}), name


def test_bookkeeping_flags_and_unknown_names_stay(tmp_path: Path) -> None:
    theirs = """epoch train_loss_best best_val_loss train_batch_size eval_runtime eval_samples_per_second _runtime
        loss_scale word_dropout mean_gradient weight_decay lr_decay total_flos mae train_val_gap system/gpu.0.memory"""
    assert not named(*theirs.split())
    flags = Series.of(np.arange(20), np.arange(20) % 2.0)
    assert not ours(History("r", tmp_path, "CSV", "step", {"loss_oscillation": flags}))[1]


def test_perplexity_is_of_codes_beside_a_quantiser_only() -> None:
    assert named("perplexity", "vq_loss")["perplexity"] == "train/codes/perplexity"
    assert named("val/perplexity", "commitment")["val/perplexity"] == "val/codes/perplexity"
    assert named("perplexity", "nll")["perplexity"] == "train/logged/perplexity"
    assert named("codebook_usage", "ppl", "quant_loss") == {
        "codebook_usage": "train/codes/usage",
        "ppl": "train/logged/perplexity",
        "quant_loss": "train/loss/vq",
    }


def test_a_metric_without_a_split_is_trainings_unless_training_is_named() -> None:
    assert named("loss", "accuracy", "val_loss", "val_accuracy")["accuracy"] == "train/logged/accuracy"
    assert "accuracy" not in named("train_loss", "valid_loss", "accuracy")


def test_of_two_names_the_better_has_ours_and_the_other_keeps_its_own() -> None:
    series, renamed = ours(history(train_loss_step=400, train_loss_epoch=4, val_loss_step=400, val_loss_epoch=4))
    assert renamed == {"train_loss_step": "train/loss/total", "val_loss_epoch": "val/loss/total"}
    assert {"train_loss_epoch", "val_loss_step"} <= series.keys()
    assert ours(history(loss=100, train_loss=1))[1] == {"loss": "train/loss/total"}
    assert ours(history(test_loss=20, val_loss=20))[1] == {"val_loss": "val/loss/total"}
    assert ours(history(elbo=20, loss=20))[1] == {"loss": "train/loss/total"}
    series, renamed = ours(history(**{"train/loss/total": 5, "loss": 500}))
    assert renamed == {}
    assert len(series["train/loss/total"]) == 5


def test_the_users_names_win_and_their_mistakes_are_named() -> None:
    h = history(loss=20, odd=20)
    series, renamed = ours(h, {"odd": "train/loss/total"})
    assert renamed == {"odd": "train/loss/total"}
    assert series["train/loss/total"] is h.given["odd"]
    assert series["loss"] is h.given["loss"]
    with pytest.raises(ValueError, match="no metric 'los'; the nearest there is 'loss'"):
        ours(h, {"los": "train/loss/total"})
    with pytest.raises(ValueError, match="not <split>/<site>/<quantity>"):
        ours(h, {"odd": "total"})
    with pytest.raises(ValueError, match="to two metrics"):
        ours(h, {"odd": "train/loss/total", "loss": "train/loss/total"})


def test_a_bound_that_rises_is_no_loss() -> None:
    rising = Series.of(np.arange(20), np.linspace(-200, -100, 20))
    given = {"val_elbo": rising, "discriminator_accuracy": rising}
    assert ours(History("run", Path("run.csv"), "CSV", "step", given))[1] == {"val_elbo": "val/logged/elbo"}

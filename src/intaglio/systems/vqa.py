"""An image and a question to a few latents, latents to the answer: how visual question answering is trained.

Shapes: B questions, U images, K latents of Z numbers, T text positions, N candidate answers, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from intaglio.config import VqaConfig, to_dict
from intaglio.config.stages import PARTS, Stage, at, held_back, parse
from intaglio.data import order
from intaglio.data.questions.corpus import normal, token_f1
from intaglio.data.questions.prepare import Questioned
from intaglio.data.questions.table import QuestionBatch
from intaglio.data.tokenizer import END, PAD, START
from intaglio.health.instruments import bottleneck, moments
from intaglio.health.panel import PAIRED
from intaglio.health.trials import cost_of_exchange
from intaglio.history import Measured, Reading
from intaglio.history.reading import ratio
from intaglio.models.nulls import answers_by_kind
from intaglio.models.pretrained import Encoders
from intaglio.models.vqa import VqaModel
from intaglio.nn.bottleneck import Latents
from intaglio.nn.transformer import CachedDecoding
from intaglio.objectives import Term
from intaglio.objectives.bottleneck import Preference, free_bits, orthogonality, preference
from intaglio.objectives.gaussian import kl_to_standard
from intaglio.objectives.text import token_nats
from intaglio.sampling.tokens import Decoding, generate
from intaglio.systems.base import System
from intaglio.systems.optimizers import parameter_groups


class VqaSystem(System):
    """Answer, KL of the latents with free bits, orthogonality, preference among answers of its own.

    Ranks of the latents are not read: a bottleneck that works holds a few nats, in a few directions.
    """

    config: VqaConfig
    model: VqaModel
    tie_break = "val/loss/answer"

    def __init__(self, config: VqaConfig, steps: int, model: VqaModel, nulls: Mapping[str, float]):
        super().__init__(config, steps)
        self.model, self._nulls = model, dict(nulls)
        self.stages = parse(config.stages, steps)
        self.ramp_from = held_back(self.stages, "kl")
        self.ties = torch.tensor(torch.nan)

    def loss_terms(self, batch: QuestionBatch) -> dict[str, Term]:
        return self._terms(batch, self._encoded(batch))

    def _encoded(self, batch: QuestionBatch) -> Latents:
        return self.model.network.latents(self.model.see(batch.images), batch.which, batch.questions)

    def _terms(self, batch: QuestionBatch, q: Latents) -> dict[str, Term]:
        w, network, model = self.config.loss, self.model.network, self.config.model
        off = self.stage().without if self.training else ()
        temperature = model.temperature if self.training else model.held_out_temperature
        z = self.model.draw(q, self.noise_like(q.mean), temperature)
        nats = token_nats(network.logits(z, batch.answers[:, :-1]), batch.answers[:, 1:], PAD).sum(1)
        terms = {"answer": Term(nats.mean(), w.answer)}
        if q.log_variance is not None:
            kl_BK = kl_to_standard(q.mean, q.log_variance)
            terms["kl"] = Term(free_bits(kl_BK, w.floor), w.kl * self.ramp())
        if w.orthogonality:
            terms["orthogonality"] = Term(orthogonality(q.mean), w.orthogonality)
        if w.preference and "preference" not in off:
            preferred = self.prefer(z, batch.answers)
            terms["preference"] = Term(preferred.loss, w.preference)
            self.ties = preferred.ties.detach()
        return {name: term for name, term in terms.items() if name not in off}

    def ramp(self) -> float:
        """Share of β that is charged: linear over ``loss.ramp`` optimizer steps, from the first that has the term, in
        training and measuring alike."""
        risen = max(0, self.global_step + 1 - self.ramp_from)
        return min(1.0, risen / self.config.loss.ramp) if self.config.loss.ramp else 1.0

    def stage(self) -> Stage:
        """What is held back in the optimizer step that comes now."""
        return at(self.stages, self.global_step)

    def prefer(self, z_BKZ: Tensor, truth_BT: Tensor) -> Preference:
        """Among answers that the model draws itself, those with the better score shall be likelier."""
        candidates = self.candidates(z_BKZ.detach())
        count = len(candidates) // len(z_BKZ)
        memory = self.model.network.bottleneck.memory(z_BKZ).repeat_interleave(count, 0)
        costs = token_nats(self.model.network.answer(candidates[:, :-1], memory), candidates[:, 1:], PAD).sum(1)
        scores = self.scores(candidates, truth_BT.repeat_interleave(count, 0))
        return preference(-costs.view(-1, count), scores.view(-1, count))

    def scores(self, given_BT: Tensor, truth_BT: Tensor) -> Tensor:
        """How right each answer is, (B,)."""
        pairs = zip(self.model.texts(given_BT), self.model.texts(truth_BT), strict=True)
        return torch.tensor([token_f1(given, truth) for given, truth in pairs], device=given_BT.device)

    @torch.no_grad()
    def candidates(self, z_BKZ: Tensor) -> Tensor:
        """Answers drawn for each question, START … END, (B·N, T)."""
        memory = self.model.network.bottleneck.memory(z_BKZ).repeat_interleave(self.config.loss.candidates, 0)
        stepper = CachedDecoding(self.model.network.answer, memory)
        u = self.uniform(len(memory), stream=3)
        seeds = [torch.Generator().manual_seed(int(x * 2**53)) for x in u.tolist()]
        start = torch.full((len(memory),), START, dtype=torch.long, device=z_BKZ.device)
        longest = self.model.lengths[1] - 1
        drawn = generate(stepper.step, start, END, PAD, longest, Decoding(method="sample"), generators=seeds)
        return torch.cat([start[:, None], drawn.ids], 1)

    # the curriculum

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        frozen = self.stage().freeze
        for part in PARTS:  # of an encoder from a folder that frees the layers which the recipe names
            getattr(self.model.network, part).requires_grad_(part not in frozen)

    @property
    def freezes(self) -> bool:
        return any(stage.freeze for stage in self.stages)

    @property
    def patient_from(self) -> int:
        """The step from which on a look without progress counts: behind the last stage, and the ramp."""
        return max([self.ramp_from + self.config.loss.ramp, *(stage.until for stage in self.stages)])

    def groups(self) -> list[dict[str, Any]]:
        """The usual groups of each part that has a rate of its own, behind those of the others."""
        network, decay = self.model.network, self.config.optim.decay
        usual = nn.ModuleDict({part: getattr(network, part) for part in PARTS if part not in self.config.rates})
        found = parameter_groups(usual, decay)
        for part, factor in self.config.rates.items():
            for group in parameter_groups(getattr(network, part), decay):
                found.append(group | {"name": f"{part}: {group['name']}", "lr": factor * self.config.optim.rate})
        return found

    # held-out questions

    def measure(self, batch: QuestionBatch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums over held-out questions: each term, and the answers that are not exactly right when written freely."""
        questions, q = torch.tensor(float(len(batch.which))), self._encoded(batch)
        terms = self._terms(batch, q)
        sums = {f"loss/{name}": (term.value * questions.to(term.value), questions) for name, term in terms.items()}
        given, truths = self.model.answers(q.mean).answers, self.model.texts(batch.answers)
        wrong = sum(normal(a) != normal(b) for a, b in zip(given, truths, strict=True))
        return sums | {"loss/wrong": (torch.tensor(float(wrong)), questions)}

    def read(self, batch: QuestionBatch) -> dict[str, Mapping[str, Measured]]:
        w, m = self.config.loss, self.config.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            places = torch.cat([self.model.see(some) for some in batch.images.split(self.config.train.batch_size)])
            q = self.latents(places, batch.which, batch.questions)
            mean, flat = q.mean, q.mean.flatten(1)

            def nats(z: Tensor) -> tuple[np.ndarray, np.ndarray]:
                return self._nats(z.view_as(mean), batch.answers)

            prior = self.noise_like(flat) if q.log_variance is not None else None
            costs = cost_of_exchange(nats, flat, prior)
            swapped = self._swapped(batch, places, mean)
        found: dict[str, Mapping[str, Measured]] = {
            "val/answer": {f"{other}_latent_nats": cost for other, cost in costs.items()} | swapped,
        }
        if q.log_variance is None:
            return found
        variance = q.log_variance.flatten(1)
        found["val/latent"] = {
            "kl_nats": bottleneck.kl_nats(flat, variance),
            "mutual_information": bottleneck.mutual_information(flat[:PAIRED], variance[:PAIRED]),
            "active_units": moments.active_units(flat),
            "between_share": moments.between_share(flat, variance),
            "kl_charged": bottleneck.kl_charged(flat, variance, w.floor, m.latents),
            "groups_above_floor": bottleneck.groups_above_floor(flat, variance, w.floor, m.latents),
            "target_entropy": self._entropy(batch.answers),
        }
        drawn = self.model.draw(q, self.noise_like(mean), m.temperature).flatten(1)
        found["train/latent"] = {"noise_ratio": bottleneck.noise_ratio(drawn, flat, variance)}
        if w.preference and "preference" not in self.stage().without and self.ties.isfinite():
            found["train/preference"] = {"tie_rate": Reading(float(self.ties), 0.0)}
        return found

    def latents(self, places_UPD: Tensor, which_B: Tensor, questions_BT: Tensor) -> Latents:
        """q(z) in parts, as memory for training allows."""
        size = self.config.train.batch_size
        parts = [
            self.model.network.latents(places_UPD, w, ids)
            for w, ids in zip(which_B.split(size), questions_BT.split(size), strict=True)
        ]
        spread = None if parts[0].log_variance is None else torch.cat([p.log_variance for p in parts])  # type: ignore
        return Latents(torch.cat([p.mean for p in parts]), spread)

    def _swapped(self, batch: QuestionBatch, places: Tensor, mean: Tensor) -> dict[str, Measured]:
        """What an answer costs more, nats, where its question is asked of another image, and its image another one."""
        own, ones = self._nats(mean, batch.answers)
        mixed = torch.from_numpy(order.permutation(len(mean), 0, 2)).to(mean.device)
        other = torch.empty_like(mixed)
        other[mixed] = mixed.roll(1)
        found: dict[str, Measured] = {}
        for name, which, questions in (
            ("image", batch.which[other], batch.questions),
            ("question", batch.which, batch.questions[other]),
        ):
            strange, _ = self._nats(self.latents(places, which, questions).mean, batch.answers)
            found[f"shuffled_{name}_nats"] = ratio(strange - own, ones, 0.0)
        return found

    def _nats(self, z_BKZ: Tensor, answers_BT: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Each answer's nats, and a 1 for each, (B,)."""
        logits = self.model.network.logits(z_BKZ.to(self.device), answers_BT[:, :-1])
        return token_nats(logits, answers_BT[:, 1:], PAD).sum(1).double().cpu().numpy(), np.ones(len(z_BKZ))

    def _entropy(self, answers_BT: Tensor) -> Measured:
        return bottleneck.entropy_nats(answers_BT.unique(dim=0, return_inverse=True)[1])

    def ranges(self, batch: Any) -> dict[str, dict[str, float]]:
        return {}

    def taps(self) -> dict[str, nn.Module]:
        network = self.model.network
        return {"vision": network.vision, "question": network.question, "latent": network.bottleneck}

    def nulls(self) -> Mapping[str, float]:
        return self._nulls


def null_readings(config: VqaConfig, prepared: Questioned) -> dict[str, float]:
    """What held-out quantities are if answers are given by the kind of question alone."""
    train, val = prepared.splits["train"], prepared.some("val", config.train.validate_items)
    null = answers_by_kind(
        prepared.kinds_of(train), prepared.answers_of(train), prepared.kinds_of(val), prepared.answers_of(val)
    )
    return {"loss/answer": null.nats, "loss/wrong": 1 - null.accuracy}


def build(
    config: VqaConfig, prepared: Questioned, model: VqaModel | None = None, encoders: Encoders | None = None
) -> VqaSystem:
    """The system with fresh weights from the seed around ``encoders``, or around a trained ``model``."""
    if model is not None:
        model.teach(config.model)
    else:
        torch.manual_seed(config.seed)
        encoders = encoders or Encoders()
        sizes = (config.data.image_size, prepared.lengths, len(prepared.tokenizer))
        model = VqaModel(to_dict(config)["model"], *sizes, encoders.described)
        model.take(encoders)
        model.tokenizer = prepared.tokenizer
        model.known = known_answers(prepared)
    assert config.train.steps is not None, "steps are resolved before a system is built"
    model.train()
    return VqaSystem(config, config.train.steps, model, null_readings(config, prepared))


def known_answers(prepared: Questioned) -> tuple[str, ...]:
    """The answers that training questions have, the commonest first."""
    given = [a for i in prepared.splits["train"] for a in prepared.corpus.asked[i].answers]
    names, counts = np.unique(given, return_counts=True)
    return tuple(str(names[k]) for k in np.argsort(-counts, kind="stable"))

"""Demonstrations and a question to the embedding of the answer: how the VQ-JEPA is trained.

Shapes: B tasks, P pairs of each, Q = B·P questions, S side, C = 2 input and output, M slots of D numbers, E embedding,
N candidates.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from intaglio.config import JepaConfig, to_dict
from intaglio.data.arc.alter import KINDS, alter, keys
from intaglio.data.arc.prepare import Puzzles
from intaglio.data.arc.table import TaskBatch
from intaglio.data.arc.tasks import LARGEST, OUTSIDE
from intaglio.data.batches import fixed_batches
from intaglio.health import panel
from intaglio.health.instruments import codebook, contrastive
from intaglio.health.trials import cost_of_context, distinct_views
from intaglio.history import Measured, NotMeasured, Reading
from intaglio.models.jepa import JepaModel, Rounded
from intaglio.nn.codebook import Codebook
from intaglio.nn.objects import dropped
from intaglio.objectives import Term
from intaglio.objectives.distributed import gather_rows, mean_over_processes, rank
from intaglio.objectives.predictive import infonce_among, invariance, relational, squared_distance
from intaglio.objectives.sigreg import collapsed_sigreg, directions, sigreg
from intaglio.systems.base import System

FRESH = 128
"""Oldest answers of the queue that are embedded again, to see how far the encoder has gone since."""


class Queue(nn.Module):
    """The last K answers of training: embeddings, grids and the keys of these. All processes hold the same."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(size, width))
        self.register_buffer("grids", torch.full((size, LARGEST, LARGEST), OUTSIDE, dtype=torch.uint8))
        self.register_buffer("keys", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("added", torch.tensor(0))
        self.embeddings: Tensor
        self.grids: Tensor
        self.keys: Tensor
        self.added: Tensor

    @property
    def filled(self) -> int:
        """How many answers it holds; as a fake tensor, which has no values, all."""
        if self.added.is_meta or isinstance(self.added, FakeTensor):
            return len(self.embeddings)
        return min(int(self.added), len(self.embeddings))

    @torch.no_grad()
    def add(self, embeddings_QE: Tensor, grids_QSS: Tensor) -> None:
        """The newest take the place of the oldest; a table without a grid is none."""
        size, there = len(self.embeddings), (grids_QSS != OUTSIDE).flatten(1).any(1)
        embeddings_QE, grids_QSS = embeddings_QE[there][-size:], grids_QSS[there][-size:]
        at = (self.added + torch.arange(len(embeddings_QE), device=self.added.device)) % size
        self.embeddings[at] = embeddings_QE.to(self.embeddings.dtype)
        self.grids[at] = grids_QSS
        self.keys[at] = keys(grids_QSS)
        self.added += len(embeddings_QE)

    def oldest(self, count: int) -> Tensor:
        """Places of the oldest answers."""
        begin = int(self.added) if self.filled == len(self.embeddings) else 0
        return (begin + torch.arange(min(count, self.filled), device=self.added.device)) % len(self.embeddings)


class JepaSystem(System):
    """InfoNCE among other answers, questions and altered copies; or the squared distance, with SIGReg."""

    config: JepaConfig
    model: JepaModel

    def __init__(self, config: JepaConfig, steps: int, model: JepaModel, nulls: Mapping[str, float]):
        super().__init__(config, steps)
        self.model, self._nulls = model, dict(nulls)
        w = config.loss
        self.queue = Queue(w.queue, config.model.embedding) if w.objective == "infonce" and w.queue else None
        if w.objective == "infonce":
            self.log_scale = nn.Parameter(torch.tensor(-math.log(w.temperature)))
        if isinstance(model.network.quantiser, Codebook):  # fine-tuning goes on with the parent's
            self.register_buffer("updates_before", model.network.quantiser.updates.clone())
            self.updates_before: Tensor
        self._answered: tuple[Tensor, Tensor] | None = None  # of this forward pass, for the queue

    def loss_terms(self, batch: TaskBatch) -> dict[str, Term]:
        w, network, real = self.config.loss, self.model.network, batch.real
        slots = network.slots(batch.grids, real)
        seen = network.quantise(slots, real)
        predicted = network.predict_answers(seen.x, slots, real).flatten(0, 1)
        both = self.model.embeddings(batch.grids, slots)
        answers, questions = both[:, :, 1].flatten(0, 1), both[:, :, 0].flatten(0, 1)
        live = both if self.model.target is None else network.embedding(slots)  # what can still be moved
        copies = dict(self._copies(batch))
        real_Q = real.flatten()
        everywhere = gather_rows(real_Q)
        terms: dict[str, Term] = {}
        if w.objective == "infonce":
            wrong = {kind: z for kind, z in copies.items() if not getattr(w, kind)}
            terms["infonce"] = Term(self.contrast(batch, predicted, answers, questions, wrong), 1 - w.sigreg)
        else:
            terms["prediction"] = Term(_mean(squared_distance(predicted, answers), real_Q), 1 - w.sigreg)
        if w.sigreg:
            everything = torch.cat([_chosen(gather_rows(live[:, :, c].flatten(0, 1)), everywhere) for c in (1, 0)])
            terms["sigreg"] = Term(sigreg(everything, self.slices()), w.sigreg)
        if isinstance(network.quantiser, Codebook) and network.coded:
            terms["commitment"] = Term(seen.commitment, w.commitment)
        if w.relational:
            pair = [_chosen(gather_rows(x), everywhere) for x in (predicted, answers)]
            terms["relational"] = Term(relational(*pair), w.relational)
        for kind in KINDS:
            if weight := getattr(w, kind):
                terms[kind] = Term(_mean(invariance(live[:, :, 1].flatten(0, 1), copies[kind][0]), real_Q), weight)
        return terms

    def contrast(
        self,
        batch: TaskBatch,
        predicted_QE: Tensor,
        answers_QE: Tensor,
        questions_QE: Tensor,
        wrong: Mapping[str, tuple[Tensor, Tensor]],
    ) -> Tensor:
        """InfoNCE of each prediction among all answers, all questions, altered answers and the queue."""
        inputs, outputs = batch.grids.flatten(0, 1).unbind(1)
        here = [answers_QE, questions_QE, *(z for z, _ in wrong.values())]
        keys_here = [keys(outputs), keys(inputs), *(k for _, k in wrong.values())]
        z = [gather_rows(x.float()) for x in here]
        key = [gather_rows(k) for k in keys_here]  # 0: no grid
        if self.training:
            self._answered = (z[0].detach(), gather_rows(_whole(outputs)))
        if self.training and self.queue is not None and self.queue.filled:
            z.append(self.queue.embeddings[: self.queue.filled])
            key.append(self.queue.keys[: self.queue.filled])
        candidate_keys = torch.cat(key)
        own = rank() * len(predicted_QE) + torch.arange(len(predicted_QE), device=predicted_QE.device)
        barred = (candidate_keys == keys_here[0][:, None]) | (candidate_keys == 0)
        barred[torch.arange(len(own), device=own.device), own] = False
        nats = infonce_among(predicted_QE, torch.cat(z), own, barred, self.bounded_scale())
        return _mean(nats, batch.real.flatten())

    def bounded_scale(self) -> Tensor:
        """ln of 1 / temperature, within its bounds."""
        low, high = self.config.loss.bounds
        return self.log_scale.clamp(-math.log(high), -math.log(low))

    def slices(self) -> Tensor:
        """This step's random directions, (E, slices)."""
        return directions(self.config.model.embedding, self.config.loss.slices, self._generator(stream=3))

    def _copies(self, batch: TaskBatch) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
        """Altered outputs, embeddings (Q, E) and keys (Q,): each kind that a term asks for, and one kind at random for
        each output as a wrong answer of the same question."""
        w = self.config.loss
        asked = [kind for kind in KINDS if getattr(w, kind)]
        others = [kind for kind in KINDS if kind not in asked]
        outputs, count = batch.grids[:, :, 1].flatten(0, 1), batch.real.numel()
        u = self.uniform(count, stream=4) if self.training else (torch.arange(count) + 0.5) / count
        for kind in asked:
            copy = alter(outputs, u, kind)
            yield kind, (self.model.network.embedding(self.model.network.encoder(copy)), keys(copy))
        if w.objective == "infonce" and others and self.training:
            made = torch.stack([alter(outputs, u, kind) for kind in others])
            which = (self.uniform(count, stream=5) * len(others)).long().to(outputs.device)
            copy = made[which, torch.arange(count, device=outputs.device)]
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.model.target is None):
                z = self.model.answers(copy)
            yield others[0], (z, keys(copy))

    # after the loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        total = super().training_step(batch, batch_idx)
        if self.queue is not None and self._answered is not None:
            self.queue.add(*self._answered)
        return total

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The update, and what follows it once in each optimizer step: codes and averaged encoder."""
        super().optimizer_step(*args, **kwargs)
        network = self.model.network
        if isinstance(network.quantiser, Codebook) and network.coded:
            network.quantiser.update()
        if self.global_step + 1 >= self.config.model.codes_after:  # this step is not counted yet
            network.coding.fill_(True)
        if self.model.target is not None:
            self.model.target.follow(network, self.target_decay())
        if self.config.loss.objective == "infonce":
            with torch.no_grad():
                self.log_scale.copy_(self.bounded_scale())

    def target_decay(self) -> float:
        """1 − (1 − d) · (cos(π · step / steps) + 1) / 2: from d to 1 (Grill et al. 2020, section 3.2)."""
        left = (math.cos(math.pi * self.global_step / self.steps) + 1) / 2
        return 1 - (1 - self.config.model.target) * left

    # held-out items

    def measure(self, batch: TaskBatch) -> dict[str, tuple[Tensor, Tensor]]:
        questions, terms = batch.real.sum().cpu().float(), self.loss_terms(batch)
        return {f"loss/{name}": (term.value * questions.to(term.value), questions) for name, term in terms.items()}

    def read(self, batch: TaskBatch) -> dict[str, Mapping[str, Measured]]:
        network = self.model.network
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            parts = [self.model.read(*some) for some in self._parts(batch)]
        predicted = torch.cat([p.predicted[:, -1] for p in parts]).float()
        answers = torch.cat([p.answers[:, -1] for p in parts]).float()
        slots, codes, real = torch.cat([p.slots for p in parts]), torch.cat([p.codes for p in parts]), batch.real
        vectors = slots[real].flatten(0, 2).float()
        found: dict[str, Mapping[str, Measured]] = {
            "val/answer": panel.latents(answers),
            "val/prediction": panel.latents(predicted),
        }
        scale = self.bounded_scale() if self.config.loss.objective == "infonce" else torch.tensor(math.log(10.0))
        unit = [F.normalize(x, dim=-1) for x in (predicted, answers)]
        grids = batch.grids[:, -1]
        found["val/pair"] = panel.pairs(unit[0], unit[1], scale) | {
            "distinct_views": distinct_views(grids[:, 1], grids[:, 0])
        }
        found["val/demonstrations"] = self._without_context(batch.grids, slots, real, unit[1], scale)
        if self.config.loss.objective == "infonce":
            clamp = self.config.loss.bounds[0]
            found["train/pair"] = {"temperature": contrastive.temperature(self.bounded_scale(), clamp)}
        if self.config.loss.sigreg:
            found["val/answer"] = {**found["val/answer"], **panel.gaussianity(answers)}
        if network.coded:
            found["val/codes"] = self._code_use(codes)
        if isinstance(network.quantiser, Codebook):
            found["train/codes"] = self._code_life(network.quantiser, vectors)
        if self.config.model.tokens == "objects":
            lost, cells = dropped(batch.grids.flatten(0, 2))
            found["train/tokens"] = {"dropped_share": Reading(lost, 0.0), "dropped_cells": Reading(cells, 0.0)}
        if self.queue is not None:
            found["train/queue"] = {"queue_agreement": self._agreement(self.queue)}
        return found

    def _parts(self, batch: TaskBatch) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.train.batch_size
        for at in range(0, len(batch.real), size):
            yield batch.grids[at : at + size], batch.real[at : at + size]

    def _without_context(
        self, grids: Tensor, slots_BPCMD: Tensor, real_BP: Tensor, answers_BE: Tensor, log_scale: Tensor
    ) -> dict[str, Measured]:
        """What the last pair's answer costs more, in nats among the probe's, where its demonstrations are another
        task's, or one of them repeated; and the share of tasks whose first and last one differ. Their order is a set's.
        """
        full = real_BP.all(1)
        if int(full.sum()) < 2:
            return {"context_strangers": NotMeasured("fewer than two tasks of the probe have all their pairs")}
        slots, real, answers, network = slots_BPCMD[full], real_BP[full], answers_BE[full], self.model.network
        own = torch.arange(len(slots), device=slots.device)
        barred = torch.zeros(len(own), len(own), dtype=torch.bool, device=own.device)

        def nats(context: Tensor) -> np.ndarray:
            given = torch.cat([context, slots[:, -1:]], 1)
            found = []
            for some, theirs in zip(given.split(64), real.split(64), strict=True):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    told = network.quantise(some, theirs).x
                    found.append(network.predict_answers(told, some, theirs)[:, -1])
            losses = infonce_among(torch.cat(found), answers, own, barred, log_scale)
            return losses.double().cpu().numpy()

        costs = cost_of_context(nats, slots[:, :-1])
        shown = grids[full][:, :-1]
        return {
            "context_strangers": costs["strangers"],
            "context_distinct": distinct_views(shown[:, 0], shown[:, -1]),
            "one_alone": costs["repeated"],
        }

    def _code_use(self, codes: Tensor) -> dict[str, Measured]:
        quantiser = self.model.network.quantiser
        size = quantiser.fsq.size if isinstance(quantiser, Rounded) else self.config.model.codes
        counts = codebook.code_counts(codes[codes >= 0], size)
        return {"perplexity": codebook.perplexity(counts), "usage": codebook.usage(counts)}

    def _code_life(self, c: Codebook, vectors_TD: Tensor) -> dict[str, Measured]:
        tokens, updates = c.tokens_per_update, int(c.updates)
        if not updates:
            return {"norm_ratio": NotMeasured(f"slots pass the codes from step {self.config.model.codes_after} on")}
        before = int(self.updates_before)
        steps = self.global_step - (0 if before else self.config.model.codes_after)
        return {
            "norm_ratio": codebook.norm_ratio(c.vectors, vectors_TD),
            "mass_ratio": codebook.mass_ratio(c.cluster_size, tokens),
            "mean_age": codebook.mean_age(c.last_used, updates - 1, tokens),
            "dead_share": codebook.dead_share(c.last_used, updates - 1, tokens),
            "revival_threshold": codebook.revival_threshold(c.revival_threshold, c.size, tokens),
            "updates_per_step": Reading((updates - before) / max(1, steps), 1.0),
        }

    def _agreement(self, queue: Queue) -> Measured:
        old = queue.oldest(FRESH)
        if len(old) < 2:
            return NotMeasured("the queue holds nothing yet")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            now = self.model.answers(queue.grids[old])
        return contrastive.queue_agreement(queue.embeddings[old], now.float())

    def ranges(self, batch: Any) -> dict[str, dict[str, float]]:
        return {}

    def taps(self) -> dict[str, nn.Module]:
        return {"encoder": self.model.network.encoder, "predictor": self.model.network.predictor}

    def nulls(self) -> Mapping[str, float]:
        return self._nulls


def _whole(grids_QSS: Tensor) -> Tensor:
    """In tables of the largest size."""
    missing = LARGEST - grids_QSS.shape[-1]
    return F.pad(grids_QSS, (0, missing, 0, missing), value=OUTSIDE)


def _chosen(x_Q: Tensor, real_Q: Tensor) -> Tensor:
    """The rows that are real; all of a fake tensor, which has no values to choose by."""
    return x_Q if isinstance(x_Q, FakeTensor) else x_Q[real_Q]


def _mean(values_Q: Tensor, real_Q: Tensor) -> Tensor:
    """Over the real questions of all processes, whose own means are averaged afterwards."""
    count = mean_over_processes(real_Q.sum().to(values_Q.dtype))
    return torch.where(real_Q, values_Q, 0).sum() / count.clamp(min=1)


def null_readings(config: JepaConfig, prepared: Puzzles) -> dict[str, float]:
    """What held-out terms would be if every candidate looked alike, the mean logarithm of how many there are; and if
    every embedding were zero."""
    items = prepared.some("val", config.train.validate_items)
    pairs = nats = collapsed = 0.0
    for batch in fixed_batches(prepared.data, items, config.train.batch_size):
        outputs, inputs = (keys(batch.grids[:, :, c].flatten(0, 1)) for c in (1, 0))
        real = outputs[outputs != 0]
        other = (torch.cat([outputs, inputs]) != 0) & (torch.cat([outputs, inputs]) != real[:, None])
        nats += float((other.sum(1) + 1).double().log().sum())
        pairs += len(real)
        collapsed += len(real) * 2 * len(real) * collapsed_sigreg()
    nulls = {"infonce": nats / pairs} if config.loss.objective == "infonce" else {}
    nulls |= {"sigreg": collapsed / pairs} if config.loss.objective == "lejepa" and config.loss.sigreg else {}
    return {f"loss/{name}": null for name, null in nulls.items()}


def build(config: JepaConfig, prepared: Puzzles, model: JepaModel | None = None) -> JepaSystem:
    """The system with fresh weights from the seed, or around a trained ``model``."""
    if model is None:
        torch.manual_seed(config.seed)
        model = JepaModel(to_dict(config)["model"], config.data.pairs, config.seed)
    assert config.train.steps is not None, "steps are resolved before a system is built"
    model.train()
    return JepaSystem(config, config.train.steps, model, null_readings(config, prepared))

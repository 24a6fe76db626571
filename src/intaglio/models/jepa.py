"""The embedding of an answer from demonstrations and a question, and what else a trained model tells of a task.

Shapes: B tasks, P pairs of a task, C = 2 its input and output, S side, M slots of D numbers, E embedding, G grids.
"""

import copy
import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from intaglio.config import JepaModelConfig
from intaglio.nn.codebook import Codebook, Quantised
from intaglio.nn.fsq import FSQ, Whitening
from intaglio.nn.grids import GridEncoder, Predictor
from intaglio.nn.objects import ObjectEncoder


class Network(nn.Module):
    """Encoder, codes, predictor, and the head into the embedding."""

    def __init__(self, m: JepaModelConfig, pairs: int, seed: int = 0):
        super().__init__()
        shape = (m.width, m.layers, m.heads, m.slots)
        self.encoder = ObjectEncoder(*shape) if m.tokens == "objects" else GridEncoder(*shape, m.patch)
        self.quantiser: Codebook | Rounded | None = None
        if m.quantiser == "vq":
            self.quantiser = Codebook(m.codes, m.width, decay=0.95, revive=0.3, seed=seed)
        elif m.quantiser == "fsq":
            self.quantiser = Rounded(m.width, m.levels)
        self.register_buffer("coding", torch.tensor(m.codes_after == 0 or m.quantiser == "fsq"))
        self.coding: Tensor
        mean = m.context == "mean"
        content = 0 if mean else self.encoder.content
        self.predictor = Predictor(m.width, m.predictor_layers, m.heads, m.slots, pairs, mean, content)
        self.embed = _head(m.slots * m.width, 2 * m.width, m.embedding)

    @property
    def coded(self) -> bool:
        """Whether slots pass the quantiser yet; of a fake tensor, which has no value, yes.

        Codes begin in training: until then there are none to be measured with.
        """
        fake = self.coding.is_meta or isinstance(self.coding, FakeTensor)
        if self.quantiser is None or not (fake or bool(self.coding)):
            return False
        return fake or self.training or not isinstance(self.quantiser, Codebook) or bool(self.quantiser.started)

    def slots(self, grids_BPCSS: Tensor, real_BP: Tensor) -> Tensor:
        """(B, P, C, M, D) of all grids of real pairs, 0 elsewhere; a grid that is not there costs its slots alone."""
        slots = self.encoder(grids_BPCSS.flatten(0, 2)).unflatten(0, grids_BPCSS.shape[:3])
        return slots * real_BP[..., None, None, None]

    def quantise(self, slots_BPCMD: Tensor, real_BP: Tensor) -> Quantised:
        """Slots as the predictor sees them, their codes, −1 where there is none, and the commitment."""
        if self.quantiser is None or not self.coded:
            none = torch.full(slots_BPCMD.shape[:-1], -1, device=slots_BPCMD.device)
            return Quantised(slots_BPCMD, none, slots_BPCMD.new_zeros(()))
        real = real_BP[..., None, None].expand(slots_BPCMD.shape[:-1])
        return self.quantiser(slots_BPCMD, real)

    def embedding(self, slots_MD: Tensor) -> Tensor:
        """Slots (…, M, D) of a grid → what it is compared by, (…, E)."""
        return self.embed(slots_MD.flatten(-2))

    def predict(self, seen_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> tuple[Tensor, Tensor]:
        """For each pair as the question: the embedding of its answer (B, P, E), and the rule (B, P, R). Demonstrations
        are told as ``seen``, in codes where there are some; the question as it is."""
        answers, rule = self.predictor(seen_BPCMD, slots_BPCMD, real_BP)
        return self.embedding(answers), rule

    def predict_answers(self, seen_BPCMD: Tensor, slots_BPCMD: Tensor, real_BP: Tensor) -> Tensor:
        """The first of what ``predict`` gives, in half the time."""
        return self.embedding(self.predictor.answers(seen_BPCMD, slots_BPCMD, real_BP))


class Rounded(nn.Module):
    """Slots through a few rounded numbers each, and back to their width.

    The numbers are whitened, as rounding knows one scale alone: left to themselves they shrink below a step, and few
    codes remain in use.
    """

    def __init__(self, width: int, levels: tuple[int, ...]):
        super().__init__()
        self.into, self.out = nn.Linear(width, len(levels)), nn.Linear(len(levels), width)
        self.whitening, self.fsq = Whitening(len(levels)), FSQ(levels)

    def forward(self, x: Tensor, real: Tensor) -> Quantised:
        """(…, D) → (…, D), with codes (…) and no commitment."""
        rounded, codes, none = self.fsq(self.whitening(self.into(x), real), real)
        return Quantised(self.out(rounded), codes, none)


def _head(width: int, hidden: int, out: int) -> nn.Sequential:
    """No activation after the last layer: an embedding may have any sign."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


class Seen(NamedTuple):
    """What a model makes of tasks, each pair as the question: the embedding that is predicted (B, P, E), those of the
    answer and of the question (B, P, E), the rule (B, P, R); slots (B, P, C, M, D) and their codes, −1 for none."""

    predicted: Tensor
    answers: Tensor
    questions: Tensor
    rule: Tensor
    slots: Tensor
    codes: Tensor


class JepaModel(nn.Module, PyTorchModelHubMixin, library_name="intaglio", license="apache-2.0"):
    """A network and, if ``model.target`` says so, its average, which makes the embeddings that are predicted.

    ``save_pretrained(folder)`` writes ``model.safetensors`` and ``config.json``; ``from_pretrained`` reads them.
    """

    def __init__(self, model: dict[str, Any], pairs: int, seed: int = 0):
        super().__init__()
        self.config = JepaModelConfig(**{**model, "levels": tuple(model["levels"])})
        self.pairs = pairs
        self.network = Network(self.config, pairs, seed)
        self.target: Target | None = Target(self.network) if self.config.target else None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def rule_width(self) -> int:
        """R: numbers of a rule."""
        ways = self.config.slots**2 if self.network.predictor.content else 0
        return 2 * self.config.slots * self.config.width + ways

    def answers(self, grids_GSS: Tensor) -> Tensor:
        """The embedding that a grid has as an answer, (G, E)."""
        judge = self.target if self.target is not None else self.network
        return judge.embedding(judge.encoder(grids_GSS))

    def embeddings(self, grids_BPCSS: Tensor, slots_BPCMD: Tensor) -> Tensor:
        """What inputs and outputs are compared by, (B, P, C, E); the averaged encoder's where there is one."""
        if self.target is None:
            return self.network.embedding(slots_BPCMD)
        with torch.no_grad():
            return self.answers(grids_BPCSS.flatten(0, 2)).unflatten(0, grids_BPCSS.shape[:3])

    def read(self, grids_BPCSS: Tensor, real_BP: Tensor) -> Seen:
        """All that is made of tasks: uint8 (B, P, C, S, S), and where a pair stands."""
        grids_BPCSS, real_BP = grids_BPCSS.to(self.device), real_BP.to(self.device)
        slots = self.network.slots(grids_BPCSS, real_BP)
        quantised = self.network.quantise(slots, real_BP)
        predicted, rule = self.network.predict(quantised.x, slots, real_BP)
        both = self.embeddings(grids_BPCSS, slots)
        return Seen(predicted, both[:, :, 1], both[:, :, 0], rule, slots, quantised.codes)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> "JepaModel":
        return super()._from_pretrained(**{**kwargs, "strict": True}).eval()


class Target(nn.Module):
    """A running average of encoder and head, θ̄ ← d·θ̄ + (1 − d)·θ (Grill et al. 2020, eq. 1); no gradient enters it."""

    def __init__(self, network: Network):
        super().__init__()
        self.encoder, self.embed = copy.deepcopy(network.encoder), copy.deepcopy(network.embed)
        self.requires_grad_(False)

    def embedding(self, slots_MD: Tensor) -> Tensor:
        """Slots (…, M, D) → (…, E)."""
        return self.embed(slots_MD.flatten(-2))

    @torch.no_grad()
    def follow(self, network: Network, decay: float) -> None:
        """One step towards the network."""
        ours = [*self.encoder.parameters(), *self.embed.parameters()]
        theirs = [*network.encoder.parameters(), *network.embed.parameters()]
        torch._foreach_lerp_(list(map(_data, ours)), list(map(_data, theirs)), 1 - decay)


def _data(p: nn.Parameter) -> Tensor:
    return p.data


def open_jepa(folder: Path) -> JepaModel:
    """The model that ``save_pretrained`` wrote.

    Raises:
        ValueError: a file of it is missing, damaged, or of another model.
    """
    try:
        with redirect_stdout(io.StringIO()):  # huggingface_hub prints, and stdout may be JSON for a script
            return JepaModel.from_pretrained(folder)
    except Exception as error:  # safetensors, torch and json raise unrelated types
        raise ValueError(
            f"The model in {folder} cannot be read ({' '.join(str(error).split())[:300]}); finish the run, or copy it "
            "whole."
        ) from error

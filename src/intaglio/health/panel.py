"""What is read of a site in one look: all instruments that its tensors allow, by the names that the rules know.

Shapes: N items, d dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intaglio.health.instruments import bottleneck, contrastive, geometry, gradients, moments, normality
from intaglio.health.trials import cost_of_strangers, distinct_views
from intaglio.history import Measured, NotMeasured, Reading

PAIRED = 256
"""Items of which each is held against each other, which costs their number squared."""


@dataclass
class Panel:
    """Readings by name, and why others are missing."""

    readings: dict[str, Reading]
    missing: dict[str, str]

    def add(self, where: str, measured: Mapping[str, Measured]) -> None:
        """Files each under ``<where>/<quantity>``."""
        for name, m in measured.items():
            if isinstance(m, NotMeasured):
                self.missing[f"{where}/{name}"] = m.reason
            else:
                self.readings[f"{where}/{name}"] = m


def latents(x_Nd: Tensor, log_variance_Nd: Tensor | None = None, bias_d: Tensor | None = None) -> dict[str, Measured]:
    """Ranks, place, spread and shape of latents; with ``log_variance`` the nats of q(z|x) = N(x, exp(log_variance)).

    ``bias`` is that of the layer that makes them, to be held against them.
    """
    read: dict[str, Measured] = {"dimensions": Reading(float(x_Nd[0].numel()), None, len(x_Nd))} if len(x_Nd) else {}
    read |= dict(geometry.ranks(x_Nd, "effective_rank", "covariance_rank", "participation_ratio"))
    for name, instrument in (
        ("norm", moments.norm),
        ("std", moments.std),
        ("mean_shift", moments.mean_shift),
        ("asymmetry", moments.asymmetry),
        ("varying_share", moments.varying_share),
    ):
        read[name] = instrument(x_Nd)
    if bias_d is not None:
        read["bias_share"] = moments.bias_share(x_Nd, bias_d)
    if log_variance_Nd is not None:
        read["active_units"] = moments.active_units(x_Nd)
        for name, of_posterior in (("kl_nats", bottleneck.kl_nats), ("between_share", moments.between_share)):
            read[name] = of_posterior(x_Nd, log_variance_Nd)
        few = slice(PAIRED)
        read["mutual_information"] = bottleneck.mutual_information(x_Nd[few], log_variance_Nd[few])
    return read


def pairs(a_Nd: Tensor, b_Nd: Tensor, log_scale: float | Tensor = 0.0) -> dict[str, Measured]:
    """Paired unit vectors: are partners found, how far apart are the two kinds, does the partner matter at all?"""
    scale = float(torch.as_tensor(log_scale).exp())
    similarity = contrastive.similarities(a_Nd, b_Nd, scale)

    def infonce(a: Tensor, b: Tensor) -> Tensor:
        logits = scale * a @ b.T
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(a), device=a.device))

    return {
        "top1": contrastive.top1(similarity),
        "over_chance": contrastive.infonce_gain(similarity),
        "modality_gap": contrastive.modality_gap(a_Nd, b_Nd),
        "alignment": geometry.alignment(a_Nd, b_Nd),
        "uniformity": geometry.uniformity(a_Nd),
        "distinct_views": distinct_views(a_Nd, b_Nd),
        "strangers_nats": cost_of_strangers(infonce, a_Nd.double(), b_Nd.double()),
    }


def gaussianity(x_Nd: Tensor) -> dict[str, Measured]:
    """SIGReg's statistic, and whether what it sees can be Gaussian at all."""
    return {"sigreg": normality.normality(x_Nd), "sigreg_blind": normality.sigreg_blind(x_Nd)}


def terms(weighted: Mapping[str, Tensor], model: nn.Module) -> dict[str, dict[str, Measured]]:
    """Of each scalar term, weight applied: the norm of its gradient; its share and cosine where terms share tensors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    found = gradients.term_gradients(weighted, trained)
    shared = [k for k in range(len(trained)) if sum(bool(g[k].any()) for g in found.values()) > 1]
    common = {name: [g[k] for k in shared] for name, g in found.items()}
    norms, shares = gradients.gradient_norms(found), gradients.gradient_shares(common)
    cosines = gradients.gradient_cosines(common)
    return {
        name: {"gradient_norm": norms[name], "gradient_share": shares[name], "gradient_cosine": cosines[name]}
        for name in weighted
    }

"""Rules: small pure functions from a record to findings, with their limits beside them."""

from collections.abc import Sequence

from intaglio.health.rule import Rule


def all_rules() -> Sequence[Rule]:
    """Every rule, in the order of the documentation; no torch."""
    from intaglio.health.rules import (
        adversarial,
        audits,
        bottleneck,
        codebook,
        contrastive,
        diffusion,
        generalisation,
        latent,
        noise,
        terms,
        text,
        training,
    )

    pages = (training, terms, generalisation, audits, latent, bottleneck, codebook, contrastive)
    return [r for page in (*pages, adversarial, noise, diffusion, text) for r in page.RULES]

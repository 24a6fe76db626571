"""Which items train and which are held out, so that nothing seen in training is asked for again.

Groups (near-duplicates, and what the source groups) stay whole; sides that the source declares are honoured; labels
are spread evenly; the choice is a pure function of (corpus, fractions, seed).
"""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from hashlib import blake2b

import numpy as np

from intaglio.data.corpus import Corpus

# A group declared on several sides goes to the one held out most: what a source publishes as test stays test.
MOST_HELD_OUT = ("test", "val", "train")


def split(corpus: Corpus, fractions: Mapping[str, float], seed: int) -> tuple[dict[str, np.ndarray], int]:
    """Item numbers (sorted, int64) of each side, and how many groups a random split of items would have torn apart.

    Items without a declared side are shared out by ``fractions``. A side that ``fractions`` names and the source
    declares nowhere is carved out of what may train; a declared side beyond ``fractions`` is given too.

    Raises:
        ValueError: fractions that don't add to one, or too few groups to give every side one.
    """
    if min(fractions.values()) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"the fractions {dict(fractions)} of the split don't add to 1; correct --data.held_out")
    wanted = {side: share for side, share in fractions.items() if share > 0}
    members: dict[str, list[int]] = defaultdict(list)
    for i in range(len(corpus)):
        members[corpus.group(i)].append(i)
    declared = {group: _declared(corpus, items) for group, items in members.items()}
    missing = wanted.keys() - set(declared.values())
    shares = {side: share for side, share in wanted.items() if not missing or side in missing or side == "train"}
    sides: dict[str, list[str]] = {side: [] for side in wanted}
    pool = []
    for group, side in declared.items():
        if side is None or (side == "train" and missing):
            pool.append(group)
        else:
            sides.setdefault(side, []).append(group)
    for group, side in _shared_out(corpus, members, pool, shares, seed):
        sides[side].append(group)
    _fill_empty(sides, shares, members)
    chosen = {side: np.sort(np.concatenate([members[g] for g in groups])) for side, groups in sides.items()}
    return chosen, _torn(chosen, members, seed)


def _declared(corpus: Corpus, items: list[int]) -> str | None:
    named = {corpus.declared_split(i) for i in items}
    return next((side for side in MOST_HELD_OUT if side in named), None)


def _shared_out(
    corpus: Corpus, members: Mapping[str, list[int]], pool: list[str], shares: Mapping[str, float], seed: int
) -> Iterator[tuple[str, str]]:
    """Each group of the pool with the side that lacks most; label after label, in an order drawn from the seed.

    The side is chosen before the group's own size is known: small groups would be held out more often than large ones.
    """
    labelled = bool(corpus.labels())

    def place(group: str) -> tuple[str, bytes]:
        label = corpus.label(members[group][0]) if labelled else None
        return label or "", blake2b(f"{seed}:{group}".encode(), digest_size=8).digest()

    whole, given = sum(shares.values()), 0
    usual = sum(len(members[group]) for group in pool) / max(1, len(pool))
    held = dict.fromkeys(shares, 0)
    for group in sorted(pool, key=place):
        side = max(shares, key=lambda s: shares[s] / whole * (given + usual) - held[s])
        given += len(members[group])
        held[side] += len(members[group])
        yield group, side


def _fill_empty(sides: dict[str, list[str]], donors: Collection[str], members: Mapping[str, list[int]]) -> None:
    """Give a side that got nothing the smallest group of the side that has most."""
    for side in sides:
        if sides[side]:
            continue
        donor = max(donors, key=lambda s: len(sides[s]))
        if len(sides[donor]) < 2:
            raise ValueError(
                f"nothing is left for {side}: {sum(map(len, members.values()))} items form {len(members)} groups, and "
                "near-duplicates and the column group stay together. Add different images, or group less"
            )
        smallest = min(sides[donor], key=lambda g: len(members[g]))
        sides[donor].remove(smallest)
        sides[side].append(smallest)


def _torn(sides: Mapping[str, np.ndarray], members: Mapping[str, list[int]], seed: int) -> int:
    """Groups with items on two sides after shuffling the items among sides of the same sizes."""
    side_of = np.repeat(np.arange(len(sides)), [len(items) for items in sides.values()])
    np.random.default_rng(seed).shuffle(side_of)
    return sum(len(set(side_of[items])) > 1 for items in members.values() if len(items) > 1)

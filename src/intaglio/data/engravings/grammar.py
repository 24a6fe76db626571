"""Captions: several ways to say what is seen. Each template is one function, recognised by its first words.

Within a template every word follows from the factors, so that whoever sees the image and the first two words can
say the rest. Different templates use different words for the same facts.
"""

import random
from collections.abc import Sequence

from intaglio.data.engravings.scene import KINDS, PLACES, Scene, Thing

DETAIL = {
    "sloop": "ship with two sails",
    "galleon": "ship with three masts",
    "steamer": "ship with smoking funnels",
    "lighthouse": "tower with a bright lamp",
    "turret": "tower with a flying flag",
    "steeple": "tower with a pointed roof",
    "oak": "tree with a round crown",
    "pine": "tree with drooping boughs",
    "palm": "tree with feathery fronds",
    "cottage": "house with a chimney",
    "townhouse": "house with a stepped gable",
    "crescent": "moon shaped like a sickle",
    "full": "moon marked by craters",
    "carp": "fish with broad scales",
    "pike": "fish with a slender body",
    "angelfish": "fish with dark stripes",
    "amphora": "vase with two handles",
    "jug": "vase with one handle",
    "urn": "vase under a lid",
    "peak": "mountain capped with snow",
    "volcano": "mountain trailing smoke",
    "ridge": "mountain with several summits",
    "swallow": "bird on the wing",
    "owl": "bird with staring eyes",
    "swan": "bird with a curved neck",
    "cartwheel": "wheel with wooden spokes",
    "cogwheel": "wheel with square teeth",
}
NAMES = {variant: "full moon" if variant == "full" else variant for variant in DETAIL}
KIND_OF = {word: kind for kind, variants in KINDS.items() for word in (kind, *variants) if word != "full"}

AT = {place: f"{'in' if place == 'middle' else 'at'} the {place}" for place in PLACES}
HIGH_LOW = dict(
    zip(
        PLACES,
        (
            *("high on the left", "high in the centre", "high on the right"),
            *("on the left", "in the centre", "on the right"),
            *("low on the left", "low in the centre", "low on the right"),
        ),
        strict=True,
    )
)
CORNER = dict(
    zip(
        PLACES,
        (
            *("top left corner", "top edge", "top right corner"),
            *("left edge", "heart of the sheet", "right edge"),
            *("bottom left corner", "bottom edge", "bottom right corner"),
        ),
        strict=True,
    )
)
SHADED = {
    "hatching": "hatched",
    "crossing": "cross hatched",
    "stippling": "stippled",
    "contour": "contoured",
    "solid": "silhouetted",
}
SHADING = {
    "hatching": "parallel hatching",
    "crossing": "cross hatching",
    "stippling": "stippling",
    "contour": "contour lines",
    "solid": "solid ink",
}
MADE_OF = {
    "hatching": "slanting strokes",
    "crossing": "crossed strokes",
    "stippling": "many dots",
    "contour": "nested outlines",
    "solid": "flat masses",
}
HUE = {"ivory": "cream", "grey": "ashen", "buff": "tan", "rose": "pink", "blue": "azure", "green": "mossy"}
COLOUR = {"black": "black", "sepia": "brown", "indigo": "deep blue"}
GROUND = {"bare": "empty ground", "earth": "dry earth", "water": "rippling water"}
SKY = {"clear": "a clear sky", "ruled": "a ruled sky"}
BULK = {"great": "huge", "large": "sizable", "small": "little", "tiny": "minute"}
NUMBER = ("one", "two", "three")


def article(phrase: str) -> str:
    """The phrase behind its indefinite article."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _row(phrases: Sequence[str]) -> str:
    return " and ".join(phrases)


def _name(thing: Thing) -> str:
    return NAMES[thing.variant]


def _engraving(scene: Scene) -> str:
    main, *others = scene.things
    beside = _row([f"{article(_name(t))} {AT[t.place]}" for t in others])
    end = f"with {beside}" if others else "alone on the sheet"
    return f"engraving of {article(f'{main.size} {_name(main)}')} {AT[main.place]}, {end}"


def _on_paper(scene: Scene) -> str:
    main, *others = scene.things
    beside = f"beside {_row([article(_name(t)) for t in others])}" if others else "all by itself"
    shaded = article(f"{SHADED[main.technique]} {_name(main)}")
    return f"on {scene.paper} paper, {shaded} in {scene.ink} ink, {beside}"


def _printed(scene: Scene) -> str:
    main, *others = scene.things
    beside = f"joined by {_row([article(t.kind) for t in others])}" if others else "with no company"
    verb = "fills" if main.size == "great" else "keeps"
    return f"printed in {COLOUR[scene.ink]}, {article(DETAIL[main.variant])} {verb} the {CORNER[main.place]}, {beside}"


def _view(scene: Scene) -> str:
    main, *others = scene.things
    near = f"near {_row([article(f'{BULK[t.size]} {t.kind}') for t in others])}" if others else "far from anything else"
    seen = article(f"{BULK[main.size]} {_name(main)}")
    return f"a view of {GROUND[scene.ground]} under {SKY[scene.sky]}, {seen} {near}"


def _counting(scene: Scene) -> str:
    drawn = [f"{article(_name(t))} in {SHADING[t.technique]}" for t in scene.things]
    end = ", then ".join(drawn) if len(drawn) > 1 else f"{drawn[0]} and nothing else"
    things = "thing" if len(drawn) == 1 else "things"
    return f"there {'is' if len(drawn) == 1 else 'are'} {NUMBER[len(drawn) - 1]} {things} here, {end}"


def relation(thing: Thing, main: Thing) -> str:
    """Where a thing stands from the main one: by rows where they differ, else by columns."""
    (row_a, column_a), (row_b, column_b) = (divmod(PLACES.index(t.place), 3) for t in (thing, main))
    if row_a != row_b:
        return "above" if row_a < row_b else "below"
    return "left of" if column_a < column_b else "right of"


def _look(scene: Scene) -> str:
    main, *others = scene.things
    around = [f"{article(f'{SHADED[t.technique]} {_name(t)}')} {relation(t, main)} it" for t in others]
    end = f"with {_row(around)}" if others else "which has the page to itself"
    return f"look at the {SHADED[main.technique]} {_name(main)}, {end}"


def _plate(scene: Scene) -> str:
    main, *others = scene.things
    rest = f"with {_row([f'{article(t.kind)} {HIGH_LOW[t.place]}' for t in others])}" if others else "and adds no more"
    return f"this plate puts {article(_name(main))} {HIGH_LOW[main.place]} {rest}"


def _proof(scene: Scene) -> str:
    made = [f"{article(t.kind)} made of {MADE_OF[t.technique]}" for t in scene.things]
    end = " and no other subject" if len(made) == 1 else ""
    return f"proof on {HUE[scene.paper]} stock showing {', '.join(made)}{end}"


TEMPLATES = (_engraving, _on_paper, _printed, _view, _counting, _look, _plate, _proof)


def captions(scene: Scene, key: str) -> tuple[str, ...]:
    """Four captions from four templates; ``key`` chooses which."""
    return tuple(template(scene) for template in random.Random(key).sample(TEMPLATES, 4))


def label_in(text: str) -> str | None:
    """The first kind that the text names by any of its nouns."""
    words = text.lower().replace(",", " ").replace(".", " ").split()
    return next((KIND_OF[word] for word in words if word in KIND_OF), None)

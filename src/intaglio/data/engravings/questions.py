"""Questions about a scene with short true answers."""

from intaglio.data.corpus import Question
from intaglio.data.engravings.grammar import AT, NAMES, NUMBER, SHADING
from intaglio.data.engravings.scene import Scene


def ask(scene: Scene) -> tuple[Question, ...]:
    """Everything we ask about a scene: at least one question of each kind."""
    things, count = scene.things, len(scene.things)
    asked = [
        Question("object", "what is the largest thing?", things[0].kind),
        Question("count", "how many things are there?", NUMBER[count - 1]),
        Question("count", f"how many things are there besides the {things[0].kind}?", ("none", *NUMBER)[count - 1]),
    ]
    for thing in things:
        asked += [
            Question("object", f"what stands {AT[thing.place]}?", thing.kind),
            Question("object", f"what kind of {thing.kind} is it?", NAMES[thing.variant]),
            Question("shading", f"how is the {thing.kind} shaded?", SHADING[thing.technique]),
            Question("place", f"where is the {thing.kind}?", AT[thing.place]),
        ]
    return tuple(asked)

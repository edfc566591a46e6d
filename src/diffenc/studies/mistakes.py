"""What wrong answers about a crowded scene name: another object, or nothing that is there."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffenc.shapes.scenes import COLORS, SHAPES, SceneObject
from diffenc.studies.budget_arms import Arm
from diffenc.studies.crowd_trials import CROWD_PROPERTIES, CrowdProperty, CrowdTrial, ninth
from diffenc.studies.token_readers import Reader


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Wrong answers of one reader of one arm.

    Attributes:
        arm: Kind and number of tokens.
        reader: Kind of reader.
        wrong: Number of wrong answers, for each property with answers that objects have.
        others: Number of them that are right of another object of the scene.
    """

    arm: Arm
    reader: Reader
    wrong: dict[CrowdProperty, int]
    others: dict[CrowdProperty, int]

    def __add__(self, more: "Mistakes") -> "Mistakes":
        return Mistakes(
            self.arm,
            self.reader,
            {name: count + more.wrong[name] for name, count in self.wrong.items()},
            {name: count + more.others[name] for name, count in self.others.items()},
        )


def count_mistakes(
    arm: Arm, reader: Reader, trials: Sequence[CrowdTrial], answers: Sequence[int]
) -> Mistakes:
    """Count wrong answers.

    Args:
        arm: Kind and number of tokens.
        reader: Kind of reader.
        trials: Scenes whose questions were answered.
        answers: Index of the answer to each question, within its property.
    """
    names: tuple[CrowdProperty, ...] = ("color", "shape", "position")
    wrong, others = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for row, answer in enumerate(answers):
        trial, index = trials[row // len(CROWD_PROPERTIES)], row % len(CROWD_PROPERTIES)
        question = trial.questions[index]
        if question.asks not in names or answer == question.label:
            continue
        wrong[question.asks] += 1
        others[question.asks] += any(
            _label(thing, question.asks) == answer for thing in trial.scene.objects
        )
    return Mistakes(arm, reader, wrong, others)


def _label(thing: SceneObject, name: CrowdProperty) -> int:
    if name == "color":
        return COLORS.index(thing.color)
    if name == "shape":
        return SHAPES.index(thing.shape)
    return ninth(thing)

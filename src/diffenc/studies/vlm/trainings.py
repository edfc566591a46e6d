"""Trainings of a study, and what they have in common."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from diffenc.config import check_choice
from diffenc.mllm.training.config import Stage

LEARNS: Mapping[str, str] = {
    "align": "captions",
    "instruct": "conversations",
    "asked": "answers to what the encoder alone is asked",
}
"""What each file of the data teaches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Settings that all trainings have in common, as tables of `diffenc.mllm.training`.

    Attributes:
        model: Keys of ``[model]`` for trainings that do not start from another one.
        align: Keys of ``[optim]`` for the first stage.
        instruct: Keys of ``[optim]`` for the second stage.
        adapt: Keys of ``[adapt]``, which say what the second stage trains.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    align: Mapping[str, Any] = field(default_factory=dict)
    instruct: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training, repeated with every seed.

    Attributes:
        name: Name of the training in the plan.
        stage: Stage that decides what may be trained: "align" or "instruct".
        data: Data to learn from: "align" are captions, "instruct" conversations, and "asked" one
            question a picture, which is the sample's caption, for the encoder, and kept from the
            language model; "" takes those of the stage.
        label: Name of the training in tables; "" takes `name`.
        start: Name of the training it starts from; "" begins with the parts of ``[model]``.
        prompts: Policy of the encoder's prompts, see `diffenc.inputs.policies.parse_policy`.
        model: Keys of ``[model]`` that differ from the shared ones.
        options: Options of the encoder that differ, such as ``conditioning`` and
            ``guidance_scale``.
        optim: Keys of ``[optim]`` that differ from those of the stage.
        adapt: Keys of ``[adapt]`` that differ from the shared ones.
    """

    name: str
    stage: Stage
    data: str = ""
    label: str = ""
    start: str = ""
    prompts: str = "empty"
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    optim: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label or self.name)
        check_choice(f"train.{self.name}.stage", self.stage, get_args(Stage))
        check_choice(f"train.{self.name}.data", self.data, ("", *LEARNS))

    @property
    def learns_from(self) -> str:
        """Name of the file that it learns from: "align", "instruct" or "asked"."""
        return self.data or self.stage

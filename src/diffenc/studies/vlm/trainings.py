"""A training of a study, and the configuration of `diffenc.mllm.training` that it stands for."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from diffenc.config import check_choice
from diffenc.errors import ConfigError
from diffenc.mllm.training.config import Stage, TrainConfig
from diffenc.studies.vlm.toml_tables import check_present, make, table

_NAMED_CLIP = "shapes-clip"
_ANY = "any"


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

    def with_clip(self, name: str) -> "Shared":
        """The same with another CLIP model instead of the bundled one."""
        return replace(self, model=_with_clip(self.model, name))

    def quick(self) -> "Shared":
        """The same settings with one pass over the pictures."""
        align, instruct = ({**each, "epochs": 1} for each in (self.align, self.instruct))
        return replace(self, align=align, instruct=instruct)


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """One training, repeated with every seed.

    Attributes:
        name: Name of the training in the plan.
        stage: Stage that decides what may be trained: "align" or "instruct".
        data: Data to learn from: "align" are captions, "instruct" conversations; "" takes those of
            the stage.
        label: Name of the training in tables.
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
        check_choice(f"train.{self.name}.stage", self.stage, get_args(Stage))
        check_choice(f"train.{self.name}.data", self.data, ("", *get_args(Stage)))

    @property
    def learns_from(self) -> str:
        """Name of the file that it learns from: "align" or "instruct"."""
        return self.data or self.stage

    def with_clip(self, name: str) -> "Training":
        """The same with another CLIP model instead of the bundled one."""
        return replace(self, model=_with_clip(self.model, name))


def read_training(name: str, values: dict[str, Any]) -> Training:
    """A training from its table.

    Raises:
        ConfigError: Something in it is wrong.
    """
    where = f"train.{name}"
    check_present(values, ["stage"], f"{where}: ")
    for each in fields(Training):
        if each.name in ("model", "options", "optim", "adapt") and each.name in values:
            values[each.name] = table(values[each.name], f"{where}.{each.name}")
    made: Training = make(Training, values, where, name=name)
    return made if made.label else replace(made, label=name)


def merged_model(trainings: Mapping[str, Training], shared: Shared, name: str) -> dict[str, Any]:
    """The table ``[model]`` of a training, with what it takes over from where it starts."""
    training = trainings[name]
    base = merged_model(trainings, shared, training.start) if training.start else shared.model
    model = {**base, **training.model}
    inherited = dict(base.get("options", {}))
    own = {**table(training.model.get("options", {}), "options"), **training.options}
    if model.get("kind") == "vision":  # it has no U-Net that options could be for
        inherited = {}
    model["options"] = {**inherited, **own}
    return model


def make_config(
    trainings: Mapping[str, Training],
    shared: Shared,
    name: str,
    *,
    annotations: Mapping[str, "str | Path"],
    images: "str | Path",
    output: "str | Path",
    seed: int,
    start: "str | Path" = "",
    cache_dir: "str | Path" = "",
    options: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """Make the configuration of a training for `diffenc.mllm.training`.

    Args:
        trainings: Trainings of the plan, by name.
        shared: Settings that all trainings of the plan share.
        name: Name of the training to configure.
        annotations: File with captions, under "align", and file with conversations, under
            "instruct".
        images: Folder of the pictures.
        output: Folder of the run.
        seed: Seed of the run.
        start: Folder of the model that the training starts from; "" if it starts from none.
        cache_dir: Folder that caches the tokens of frozen encoders.
        options: Further options of the encoder; None adds none.

    Raises:
        ConfigError: A key or a value is not allowed.
    """
    training = trainings[name]
    model = merged_model(trainings, shared, name)
    model["options"] = {**model["options"], **(options or {})}
    if training.start:
        model = {key: value for key, value in model.items() if key != "language_model"}
        model["start"] = str(start or _ANY)
    stage = shared.align if training.stage == "align" else shared.instruct
    adapt = {} if training.stage == "align" else shared.adapt
    adapt = {**adapt, **training.adapt}
    learns = bool(model.get("captioner") or adapt.get("unet_rank"))
    told = {
        "stage": training.stage,
        "output": str(output),
        "seed": seed,
        "save_steps": 50,
        "keep": 1,
        "model": model,
        "data": {
            "annotations": str(annotations[training.learns_from]),
            "images": str(images),
            "prompts": training.prompts,
            "cache": "off" if learns else "on",
            "cache_dir": str(cache_dir),
        },
        "optim": {**stage, **training.optim},
    }
    if adapt:
        told["adapt"] = adapt
    try:
        return TrainConfig.from_dict(told)
    except ConfigError as error:
        raise ConfigError(f"train.{name}: {error}") from error


def check_config(
    trainings: Mapping[str, Training],
    shared: Shared,
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
) -> TrainConfig:
    """The configuration of a training without its files, to see whether it can be made.

    Raises:
        ConfigError: It cannot.
    """
    any_file = dict.fromkeys(get_args(Stage), _ANY)
    return make_config(
        trainings,
        shared,
        name,
        annotations=any_file,
        images=_ANY,
        output=_ANY,
        seed=0,
        options=options,
    )


def _with_clip(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: name if value == _NAMED_CLIP else value for key, value in model.items()}

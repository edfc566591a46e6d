"""Where a model lies, found once, and what its configs tell."""

import os
from dataclasses import dataclass, replace
from typing import Any

from diffenc.config import check_choice
from diffenc.errors import BackboneError, ConfigError, near_matches
from diffenc.models.base import Backbone
from diffenc.models.configs import Architecture, known_architecture
from diffenc.models.family_files import FAMILY_FILES
from diffenc.models.folder import read_architecture
from diffenc.models.parts import GivenParts
from diffenc.models.pipelines import is_pipeline, pipeline_architecture, pipeline_name
from diffenc.models.schedules import PREDICTIONS, make_scheduler
from diffenc.models.shapes import BUNDLED_MODELS, SHAPES_TAPS
from diffenc.models.single_file import SingleFile
from diffenc.models.sources import SOURCES, lasting_source, resolve_folder, single_file
from diffenc.models.variants import check_configs
from diffenc.storage.names import checked_path, is_folder, printable


@dataclass(frozen=True, slots=True)
class Located:
    """A pipeline, a checkpoint in one file, or a name that leads to a folder.

    Attributes:
        name: The pipeline, or the model's name, which means the same in every directory.
        label: Name of the model for messages.
        file: The checkpoint in one file, opened; None for all others.
        configs: Alias or folder whose configs describe the model; the pipeline itself.
        chosen: Whether the caller chose whose configs describe the file.
        prediction_type: Prediction type that the caller states for the U-Net; None for none.
    """

    name: Any
    label: str
    file: SingleFile | None
    configs: Any
    chosen: bool
    prediction_type: str | None

    @property
    def is_pipeline(self) -> bool:
        """Whether the model is a pipeline's."""
        return is_pipeline(self.name)


def locate(
    name: Any, architecture: "str | os.PathLike[str] | None", prediction_type: str | None
) -> Located:
    """Find what a name of `load_backbone` leads to; a checkpoint in one file is opened.

    Args:
        name: Name of the model, as for `load_backbone`.
        architecture: Alias or folder whose configs describe a single file; None for none.
        prediction_type: Prediction type that the caller states for the U-Net; None for none.

    Raises:
        BackboneError: Nothing that is a model, or a checkpoint of another kind.
        ConfigError: An unknown prediction type, or an architecture of what has configs of its own.
    """
    if prediction_type is not None:
        check_choice("prediction_type", prediction_type, PREDICTIONS)
    of_pipeline = is_pipeline(name)
    name = name if of_pipeline else model_name(name)
    chosen = None if architecture is None else model_name(architecture)
    label = pipeline_name(name) if of_pipeline else printable(name)
    path = None if of_pipeline else single_file(name)
    if path is None and chosen is not None:
        raise ConfigError(f"architecture= is for a single file; {label!r} has configs of its own")
    if path is None:
        return Located(name, label, None, name, False, prediction_type)
    file = SingleFile(path)
    configs = file.known_alias(prediction_type) if chosen is None else chosen
    return Located(name, label, file, configs, chosen is not None, prediction_type)


def describe_located(located: Located, replaced: GivenParts) -> Architecture:
    """The configs of a model as it is read: with what its files say and what the caller says.

    Args:
        located: Where the model lies.
        replaced: Parts that are not the model's own.

    Raises:
        BackboneError: A model that cannot be had, or of another kind.
        ConfigError: The model contradicts itself or the caller.
    """
    described = _own_configs(located)
    check_configs(described.configs, located.label, described.family)
    described = replaced.described(described)
    check_configs(described.configs, located.label, described.family)
    scheduler = described.configs["scheduler"]
    if located.prediction_type is not None:
        if FAMILY_FILES[described.family].flow:
            raise ConfigError(
                f"prediction_type= is for models that count steps of noise; {located.label!r} "
                "matches flows, and predicts the noise less the latents: leave it out"
            )
        scheduler = {**scheduler, "prediction_type": located.prediction_type}
    elif (stated := replaced.statements()) is not None:
        scheduler = stated.scheduler(scheduler, prediction_type=None, chosen=True)
    flow = FAMILY_FILES[described.family].flow
    make_scheduler(scheduler, where=f"the scheduler of {located.label}", flow=flow)
    return replace(described, configs={**described.configs, "scheduler": scheduler})


def _own_configs(located: Located) -> Architecture:
    if located.is_pipeline:
        return pipeline_architecture(located.name)
    name, file = os.fspath(located.configs), located.file
    described = known_architecture(name)
    if described is None and file is not None and not is_folder(name):
        shown = printable(name)
        raise BackboneError(
            f"unknown architecture {shown!r}.{near_matches(shown, SOURCES)} "
            "Pass 'sd1.5', 'sd2.1-base', 'sd2.1', 'sdxl', or a diffusers folder."
        )
    if described is None:
        own_taps = SHAPES_TAPS if name in BUNDLED_MODELS else None
        described = read_architecture(resolve_folder(name, weights=False), own_taps=own_taps)
    if file is None:
        return described
    return file.described(described, prediction_type=located.prediction_type, chosen=located.chosen)


def model_name(name: object) -> str:
    """A model's name, which means the same in every directory.

    Raises:
        BackboneError: It is neither a text nor a path, or one that no file system takes.
    """
    if not isinstance(name, (str, os.PathLike)):
        if way := _way_to_backbone(name):
            raise BackboneError(
                f"a model is wanted, and a {type(name).__name__} holds one: pass {way}"
            )
        raise BackboneError(
            "a model is given by an alias, a Hub id, a diffusers folder, a .safetensors file, a "
            f"pipeline of diffusers or a Backbone, got {type(name).__name__}. Known aliases are "
            f"{', '.join(SOURCES)}."
        )
    checked_path("a model", name, error=BackboneError)
    return lasting_source(name)


def _way_to_backbone(holder: object) -> str:
    """How to write the model that an encoder, a scorer or a multimodal model holds, or ""."""
    if isinstance(getattr(holder, "backbone", None), Backbone):
        return "its backbone, such as encoder.backbone"
    if isinstance(getattr(getattr(holder, "encoder", None), "backbone", None), Backbone):
        return "the backbone of its encoder, such as vlm.encoder.backbone"
    return ""

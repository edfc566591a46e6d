"""Pipelines of diffusers as models: their parts are taken as they are, and not copied."""

from typing import Any

from diffenc.errors import BackboneError
from diffenc.models.configs import Architecture
from diffenc.models.denoisers import config_of
from diffenc.models.family_files import FAMILY_FILES, PARTS
from diffenc.models.schedules import make_scheduler
from diffenc.models.variants import check_configs, pipeline_family

PIPELINE = "pipeline"
"""Key in `Backbone.replacements` of a model whose parts a pipeline object brought, not files."""


def is_pipeline(value: object) -> bool:
    """Whether this is a pipeline object of diffusers, of whatever kind."""
    return any(kind.__name__ == "DiffusionPipeline" for kind in type(value).__mro__)


def pipeline_name(pipeline: Any) -> str:
    """What a backbone of a pipeline is called in messages."""
    return f"<{type(pipeline).__name__}>"


def pipeline_parts(pipeline: Any) -> dict[str, Any]:
    """Components of a pipeline that a backbone takes, with the options of its family.

    Args:
        pipeline: A pipeline of one of the families, such as a `StableDiffusionPipeline`.

    Raises:
        BackboneError: A pipeline of another class, or one that lacks a component.
    """
    where = pipeline_name(pipeline)
    files = FAMILY_FILES[pipeline_family(_index(pipeline), where)]
    parts = {name: getattr(pipeline, name, None) for name in files.parts_in(_index(pipeline))}
    if missing := [name for name, part in parts.items() if part is None]:
        raise BackboneError(f"{where} lacks {', '.join(missing)}; make it with all of its parts")
    for name, part in parts.items():
        weights: Any = getattr(part, "parameters", tuple)()
        if any(weight.is_meta for weight in weights):
            raise BackboneError(
                f"the weights of the {name} of {where} are not in memory (offloaded, or on the "
                "meta device); pass a pipeline without offloading, or the folder that it came from"
            )
    scheduler: Any = parts["scheduler"]
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    where = f"the scheduler of {where}"
    parts["scheduler"] = make_scheduler(config, where=where, flow=files.flow)
    return {**parts, **files.options_in({**pipeline.config, **_index(pipeline)})}


def pipeline_architecture(pipeline: Any) -> Architecture:
    """The configs of a pipeline's parts.

    Raises:
        BackboneError: See `pipeline_parts`.
    """
    parts = pipeline_parts(pipeline)
    family = pipeline_family(_index(pipeline), pipeline_name(pipeline))
    configs = {
        name: part.config if isinstance(part.config, dict) else part.config.to_dict()
        for name, part in parts.items()
        if hasattr(part, "config")
    }
    configs = {name: dict(config) for name, config in configs.items()}
    denoiser = FAMILY_FILES[family].denoiser
    configs[denoiser] = config_of(parts[denoiser])
    if FAMILY_FILES[family].flow:  # a config that no file was read from names no class
        configs["scheduler"]["_class_name"] = type(parts["scheduler"]).__name__
    check_configs(configs, pipeline_name(pipeline), family)
    return Architecture(configs, own_family=family)


def _index(pipeline: Any) -> dict[str, Any]:
    """What `model_index.json` of the pipeline would say."""
    kinds = [kind.__name__ for kind in type(pipeline).__mro__]
    index: dict[str, Any] = {
        name: (None, type(part).__name__)
        for name in PARTS
        if name != "scheduler" and (part := getattr(pipeline, name, None)) is not None
    }
    # A subclass made by the user is what it is made of.
    known = [kind for files in FAMILY_FILES.values() for kind in files.pipelines]
    own = [kind for kind in kinds if kind in known]
    index["_class_name"] = kinds[0] if not own else own[0]
    for option in ("force_zeros_for_empty_prompt", "requires_aesthetics_score"):
        if option in pipeline.config:
            index[option] = pipeline.config[option]
    return index

"""The noise schedule that a model was trained with, whatever sampler its config names."""

import math
from collections.abc import Mapping
from typing import Any

from diffenc.errors import BackboneError
from diffenc.inputs.noise import is_flow

PREDICTIONS = ("epsilon", "v_prediction", "sample")
"""What a U-Net may predict: the noise, v, or the latents without noise."""

FLOW_STEPS = 1000
"""Steps that a flow is counted in, from the latents to the noise."""

_BETAS = ("beta_start", "beta_end", "beta_schedule")
_COMMON = (0.0001, 0.02, "linear")
_NARROW = (0.00085, 0.012, "linear")
_SCALED = (0.00085, 0.012, "scaled_linear")
# Schedulers whose betas are those of the training, with what each takes for betas that its config
# leaves out. They differ in the steps that they sample with alone.
_DEFAULTS: dict[str, tuple[float, float, str]] = {
    "DDIMInverseScheduler": _COMMON,
    "DDIMParallelScheduler": _COMMON,
    "DDIMScheduler": _COMMON,
    "DDPMParallelScheduler": _COMMON,
    "DDPMScheduler": _COMMON,
    "DEISMultistepScheduler": _COMMON,
    "DPMSolverMultistepInverseScheduler": _COMMON,
    "DPMSolverMultistepScheduler": _COMMON,
    "DPMSolverSDEScheduler": _NARROW,
    "DPMSolverSinglestepScheduler": _COMMON,
    "EulerAncestralDiscreteScheduler": _COMMON,
    "EulerDiscreteScheduler": _COMMON,
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "LCMScheduler": _SCALED,
    "LMSDiscreteScheduler": _COMMON,
    "PNDMScheduler": _COMMON,
    "RePaintScheduler": _COMMON,
    "SASolverScheduler": _COMMON,
    "TCDScheduler": _SCALED,
    "UniPCMultistepScheduler": _COMMON,
}
_SHAPES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
# Options of these classes that turn steps into noise levels in another way than by betas.
_CONTINUOUS = {"use_flow_sigmas": False, "timestep_type": "discrete"}
_REMEDY = (
    "diffenc reads models that count steps of noise: with a DDPMScheduler, or one like it, that "
    "states beta_start, beta_end and beta_schedule"
)


def make_scheduler(
    config: Mapping[str, Any], *, where: str = "the config of the scheduler", flow: bool = False
) -> Any:
    """The noise schedule of a config, whatever sampler it names.

    Args:
        config: Config of the scheduler, as JSON holds it. Without a `_class_name` it has to state
            its betas.
        where: Place of the config, for messages.
        flow: Whether the model matches flows, so that its schedule is one of flow matching.

    Raises:
        BackboneError: Another kind of schedule (EDM, flow matching of another model), a kind of
            prediction that is unknown, or a value that is none.

    Source:
        Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed",
        arXiv:2305.08891, for `rescale_betas_zero_snr`.
    """
    if flow and not is_flow_config(config):
        raise BackboneError(
            f"{where} is of a {config.get('_class_name')!r}, and this model matches flows: it "
            "needs a FlowMatchEulerDiscreteScheduler, or prediction_type='flow_prediction'"
        )
    if flow:
        from diffusers import FlowMatchEulerDiscreteScheduler

        _check_flow(config, where)
        shift = config.get("shift", config.get("flow_shift", 1.0))
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=FLOW_STEPS, shift=shift)
    from diffusers import DDPMScheduler

    values = _complete(config, where)
    scheduler: Any = DDPMScheduler(**values)
    if len(scheduler.alphas_cumprod) != values["num_train_timesteps"]:
        raise BackboneError(
            f"{where} contradicts itself: it holds {len(scheduler.alphas_cumprod)} trained_betas, "
            f"and num_train_timesteps is {values['num_train_timesteps']}"
        )
    return scheduler


def is_flow_config(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config is one of flow matching."""
    named = str(config.get("_class_name")).startswith("FlowMatch")
    return named or config.get("prediction_type") == "flow_prediction"


def prediction_of(config: Mapping[str, Any]) -> str:
    """What a denoiser under the schedule of a config predicts."""
    return "flow" if is_flow_config(config) else str(config.get("prediction_type", "epsilon"))


def check_schedule(scheduler: Any, *, flow: bool = False) -> None:
    """Raise a `BackboneError` unless a scheduler object counts steps of noise that diffenc knows.

    Args:
        scheduler: Scheduler object of diffusers.
        flow: Whether one of flow matching is allowed.
    """
    config = getattr(scheduler, "config", {})
    where = f"the {type(scheduler).__name__}"
    if flow and is_flow(scheduler):
        _check_flow(scheduler.config, where)
        return
    if not hasattr(scheduler, "alphas_cumprod"):
        raise BackboneError(f"{where} has no alphas_cumprod; {_REMEDY}")
    _check_discrete(config, where)
    _prediction(config, where)


def _complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a `DDPMScheduler` with the same noise levels."""
    kind = config.get("_class_name")
    if kind is None:
        missing = [key for key in _BETAS if key not in config]
        if missing and config.get("trained_betas") is None:
            raise BackboneError(f"{where} names no _class_name and lacks {missing}; {_REMEDY}")
        defaults = _COMMON
    elif not isinstance(kind, str) or kind not in _DEFAULTS:
        raise BackboneError(f"{where} is of a {kind!r}, which is none of betas; {_REMEDY}")
    else:
        defaults = _DEFAULTS[kind]
    _check_discrete(config, where)
    values = {**dict(zip(_BETAS, defaults, strict=True)), **_own(config, _BETAS)}
    trained = _trained_betas(config, where)
    for key in ("beta_start", "beta_end"):
        if not _is_number(values[key]) or not 0 < values[key] < 1:
            raise BackboneError(f"{where}: {key} must be in (0, 1), got {values[key]!r}")
    if values["beta_schedule"] not in _SHAPES:
        raise BackboneError(
            f"{where}: beta_schedule must be one of {list(_SHAPES)}, got "
            f"{values['beta_schedule']!r}"
        )
    default = 1000 if trained is None else len(trained)
    count = _step_count(config, default, where)
    rescaled = config.get("rescale_betas_zero_snr")
    if rescaled is not None and not isinstance(rescaled, bool):
        raise BackboneError(
            f"{where}: rescale_betas_zero_snr must be true or false, got {rescaled!r}"
        )
    return {
        **values,
        "trained_betas": trained,
        "num_train_timesteps": count,
        "prediction_type": _prediction(config, where),
        "rescale_betas_zero_snr": bool(rescaled),
    }


def _step_count(config: Mapping[str, Any], default: int, where: str) -> int:
    count = config.get("num_train_timesteps", default)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 10**6:
        raise BackboneError(
            f"{where}: num_train_timesteps must be an int from 1 to 1,000,000, got {count!r}"
        )
    return count


def _check_flow(config: Mapping[str, Any], where: str) -> None:
    """Raise where a flow is counted in other steps than those that its transformers are told."""
    count = _step_count(config, FLOW_STEPS, where)
    if count != FLOW_STEPS:
        raise BackboneError(
            f"{where} has num_train_timesteps={count}, and models that match flows are told their "
            f"noise level in {FLOW_STEPS} steps; set it to {FLOW_STEPS}"
        )


def _own(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys if key in config}


def _prediction(config: Mapping[str, Any], where: str) -> str:
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise BackboneError(
            f"{where}: prediction_type must be one of {list(PREDICTIONS)}, got {kind!r}; a model "
            "that predicts something else is not one that diffenc reads"
        )
    return str(kind)


def _check_discrete(config: Mapping[str, Any], where: str) -> None:
    for key, usual in _CONTINUOUS.items():
        if config.get(key, usual) not in (usual, None):
            raise BackboneError(f"{where} has {key}={config[key]!r}; {_REMEDY}")


def _trained_betas(config: Mapping[str, Any], where: str) -> list[float] | None:
    betas = config.get("trained_betas")
    if betas is None:
        return None
    listed = betas.tolist() if hasattr(betas, "tolist") else betas
    usable = isinstance(listed, (list, tuple)) and len(listed) > 0
    if not usable or not all(_is_number(beta) and 0 < beta <= 1 for beta in listed):
        raise BackboneError(f"{where}: trained_betas must be numbers in (0, 1], one for each step")
    return [float(beta) for beta in listed]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

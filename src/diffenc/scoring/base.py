"""What a scorer is beside its scores: loaded, saved, changed, moved, calibrated."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from diffenc.checks.arguments import flag, shown, text
from diffenc.checks.arguments import texts as listed
from diffenc.config import check_is_config, described
from diffenc.denoiser.attention import match_layers
from diffenc.denoiser.attention_scores import layer_mix
from diffenc.denoiser.lora.adapters import active_lora
from diffenc.errors import ConfigError, OutputError, PromptError
from diffenc.inputs.images import Images
from diffenc.memory.cache import TensorCache
from diffenc.models import load_backbone, model_name
from diffenc.models.base import Backbone
from diffenc.models.device import Device, Dtype
from diffenc.models.encoder_folder import check_mark
from diffenc.models.pipelines import PIPELINE
from diffenc.models.sources import lasting_source
from diffenc.passes.reuse import check_reuse
from diffenc.runtime.inference import lasting
from diffenc.scoring.calibration import References
from diffenc.scoring.config import DECODER, ScorerConfig, scorer_preset
from diffenc.scoring.saved import is_saved_scorer, read_scorer, write_scorer
from diffenc.storage.names import checked_path

# `Self` is not known to the check of annotations at run time (make test-shapes).
_Scorer = TypeVar("_Scorer", bound="ConfiguredScorer")

_ROW_BYTES, _QUERY_BYTES = 16 * 2**20, 512 * 2**20


class ConfiguredScorer(nn.Module):
    """A backbone with a `ScorerConfig`, reference images and memories.

    Attributes:
        backbone: The text-to-image model, a registered submodule.
        config: Options that define the score.
        use_cache: Whether to remember latents, prompts and rows of frozen models that were computed
            before.
        references: Reference images that `calibrate` was given; None where there are none.
        rows: Cache of "exact" scores.
        queries: Cache of the queries of "shared-query" scores.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: ScorerConfig | None = None,
        *,
        use_cache: bool = True,
        references: References | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise ConfigError(
                f"a scorer is made of a Backbone, got {shown(backbone)}; "
                "CrossAttnScorer.from_pretrained takes names, folders and pipelines"
            )
        self.backbone = backbone
        self.config = config if config is not None else ScorerConfig()
        self.use_cache = flag("use_cache", use_cache)
        self.references = references
        self.rows, self.queries = TensorCache(_ROW_BYTES), TensorCache(_QUERY_BYTES)
        flows = self.config.error_term in ("l2_flow", "l2_flow_gap")
        if flows and backbone.prediction_type != "flow":
            raise ConfigError(
                f"error_term={self.config.error_term!r} is of models that match flows, and "
                f"{backbone.name!r} predicts {backbone.prediction_type!r}; take 'l2_gap' or 'mse'"
            )
        if self.config.attention:
            layer_mix(self.config.layer_weights, len(self.layers))  # checks both
        check_reuse(backbone, self.config.reuse, (), self.layers)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config":
            check_is_config(value, ScorerConfig, "draws=2")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        facts: dict[str, object] = {
            "model": self.backbone.name,
            "mode": self.config.mode,
            "timesteps": self.config.timesteps,
            "layers": self.layers if self.config.attention else (),
            "device": str(self.backbone.device),
            "dtype": self.backbone.dtype,
        }
        return described(type(self).__name__, facts, self.config)

    @classmethod
    @lasting
    def from_pretrained(
        cls: type[_Scorer],
        name: Any,
        *,
        preset: str | None = None,
        device: Device = None,
        dtype: Dtype = None,
        use_cache: bool = True,
        variant: str | None = None,
        **options: Any,  # attributes of ScorerConfig, which checks their names
    ) -> _Scorer:
        """Load a scorer.

        Args:
            name: Model to load, see `load_backbone`: an alias, a Hub id, a diffusers folder, a
                `.safetensors` checkpoint, a pipeline of diffusers or a `Backbone`; or a folder that
                `save_pretrained` wrote.
            preset: Name of the kind of score: "calibrated", "paper", "discffusion",
                "diffusion-classifier", "diffusion-itm", "self-bench" or "denoising-gap"; None is
                "calibrated", or what was saved.
            device: Device of the model; for this and the next see `load_backbone`.
            dtype: Floating point type of the U-Net and the text encoders. Scores are computed in
                float32 whatever it is.
            use_cache: Whether to remember what was computed before; see the class.
            variant: Word in the names of the weight files, such as "fp16"; see `load_backbone`.
            options: Attributes of `ScorerConfig`, such as `mode`, `layers` or `timesteps`. They win
                over a preset, and a preset wins over a saved config.

        Raises:
            BackboneError: The model is unknown, missing, incomplete or broken.
            ConfigError: An option or a preset is unknown or not allowed, or nothing reads it.
            TapError: A layer does not exist in this model.
        """
        preset = preset if preset is None else text("preset", preset)
        values, references = scorer_preset("calibrated" if preset is None else preset), None
        saved = None
        if isinstance(name, (str, os.PathLike)) and is_saved_scorer(model_name(name)):
            folder = Path(lasting_source(name))
            saved = read_scorer(folder)
            values = {**saved.options, **({} if preset is None else scorer_preset(preset))}
            name, references = saved.backbone, saved.references
        config = ScorerConfig.from_dict({**values, **_plain(options)})
        config.check_read(options)
        parts = {} if saved is None else dict(saved.parts)
        if variant is not None:
            parts["variant"] = variant
        backbone = load_backbone(name, device=device, dtype=dtype, **parts)
        if saved is not None and variant in (None, saved.parts["variant"]):
            check_mark(backbone, saved.mark, folder)
        if config.layers == DECODER and "layers" not in options and backbone.is_transformer:
            config = replace(config, layers="all")
        return cls(backbone, config, use_cache=use_cache, references=references)

    def save_pretrained(self, folder: "str | os.PathLike[str]") -> None:
        """Write config, reference images and a reference to the backbone (not its weights).

        Raises:
            OutputError: The folder cannot be written.
            ConfigError: The backbone was given as a pipeline, which no file can name, or has an
                adapter in use.
        """
        if PIPELINE in self.backbone.replacements:
            raise ConfigError(
                f"{self.backbone.name} was given as an object, which a config cannot name: save "
                "the pipeline with its own save_pretrained, and load the scorer from that folder"
            )
        if (adapter := active_lora(self.backbone.denoiser)) is not None:
            raise ConfigError(
                f"the {self.backbone.denoiser_word} has the adapter {adapter!r}, which the folder "
                "of a scorer does not hold: save the encoder that has it, and make the scorer of "
                "the loaded encoder's backbone, CrossAttnScorer(encoder.backbone)"
            )
        target = checked_path("a saved scorer", folder, error=OutputError)
        write_scorer(target, self.backbone, self.config, self.references)

    def with_options(self: _Scorer, *, preset: str | None = None, **options: Any) -> _Scorer:
        """Another scorer over the same backbone.

        Args:
            preset: Name of the preset to begin with; None is this scorer's config.
            options: Attributes of `ScorerConfig` that change.

        Raises:
            ConfigError: An option or a preset is unknown or not allowed, or nothing reads it.
        """
        values = self.config.to_dict() if preset is None else scorer_preset(text("preset", preset))
        config = ScorerConfig.from_dict({**values, **_plain(options)})
        config.check_read(options)
        return type(self)(
            self.backbone, config, use_cache=self.use_cache, references=self.references
        )

    @property
    def layers(self) -> tuple[str, ...]:
        """Cross-attentions that are scored by, in the order in which they run."""
        if not self.config.attention:
            return ()
        return match_layers(self.backbone.denoiser, self.config.layers)

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        return self.backbone.device

    def clear_cache(self) -> None:
        """Forget latents, prompts and rows; needed after writes through `.data`."""
        self.backbone.clear_caches()
        self.rows.clear()
        self.queries.clear()

    @lasting
    def _apply(self: _Scorer, fn: Any, recurse: bool = True) -> _Scorer:
        self.rows.clear()  # another device or dtype
        self.queries.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    @lasting
    def calibrate(self, images: "Images | None", *, texts: Sequence[str] | None = None) -> None:
        """Take reference images, whose mean score under a text is subtracted from that text's.

        Any images do: the user's own, or those of a benchmark. References change what scores are
        compared with, never their order among images of one text.

        Args:
            images: One or more; None goes back to no calibration.
            texts: Reference texts, whose mean under an image is subtracted from that image's
                scores; None leaves the config's.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: A reference text is no text.
        """
        backbone = self.backbone
        changed: dict[str, Any] = {"calibration": None, "reference_digest": None}
        references = None
        if images is not None:
            references = References.read(
                images,
                self.config,
                default_size=backbone.default_size,
                multiple=backbone.multiple,
            )
            changed = {"calibration": "given", "reference_digest": references.digest}
        if texts is not None:
            none = isinstance(texts, (list, tuple)) and not texts
            changed["reference_texts"] = () if none else listed("texts", texts, error=PromptError)
        with backbone.lock:  # a call reads both
            self.references = references
            self.config = replace(self.config, **changed)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as ScorerConfig wants them: sequences as tuples, one layer as a tuple of one."""
    plain = {k: tuple(v) if isinstance(v, (list, range)) else v for k, v in options.items()}
    layers = plain.get("layers")
    if isinstance(layers, str) and layers not in ("all", "discffusion"):
        plain["layers"] = (layers,)
    return plain

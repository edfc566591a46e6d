"""How the pipelines of each family are stored: their classes, components and options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class FamilyFiles:
    """What the files of a family are called.

    Attributes:
        family: Name of the family.
        pipelines: Classes of diffusers that have these components; the first is the one written.
        classes: Components with a folder each, in the order in which they are loaded, and the
            classes that each may be of; the first is built where a config names none.
        options: Options of the family's class that `model_index.json` holds: by name, the key there
            and the value where it is missing.
        absent: Components that the pipeline knows and a model has not.
        optional: Components that a model may be without, as its index says by null.
        tokens: Number of tokens of a text that each text encoder reads, where its config does not
            tell.
        fewer: Other numbers of these where a field of the denoiser's config is false: the field,
            and the number.
        in_sequence: Text encoders whose states stand one behind the other; those of all others
            stand beside them.
        denoiser: Component that is read.
        flow: Whether the models match flows, and their schedules with them.
    """

    family: str
    pipelines: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]
    options: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    tokens: Mapping[str, int] = field(default_factory=dict)
    fewer: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    in_sequence: tuple[str, ...] = ("text_encoder",)
    denoiser: str = "transformer"
    flow: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Components with a folder each, in the order in which they are loaded."""
        return tuple(self.classes)

    @property
    def weighty(self) -> tuple[str, ...]:
        """Components that have weights: not the tokenizers and the scheduler."""
        return tuple(part for part in self.parts if not part.startswith(("tokenizer", "scheduler")))

    def tokens_of(self, part: str, denoiser: Mapping[str, Any]) -> int | None:
        """Number of tokens that a text encoder reads; None where its own config tells.

        Args:
            part: Name of the text encoder.
            denoiser: Config of the denoiser.
        """
        condition, number = self.fewer.get(part, (None, None))
        return number if condition and not denoiser.get(condition) else self.tokens.get(part)

    def parts_in(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """The components that a pipeline has, by its `model_index.json`."""
        return tuple(
            part
            for part in self.parts
            if part not in self.optional
            or index.get(part) not in ([None, None], (None, None), None)
        )

    def options_in(self, index: Mapping[str, Any]) -> dict[str, Any]:
        """The options that an index holds, each of the type of its default."""
        return {
            name: type(default)(index.get(key, default))
            for name, (key, default) in self.options.items()
        }


_CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
_T5_TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer")
_GEMMA_TOKENIZERS = ("GemmaTokenizerFast", "GemmaTokenizer")
_KL = ("AutoencoderKL", "AutoencoderTiny")
_SD = {
    "unet": ("UNet2DConditionModel",),
    "vae": _KL,
    "scheduler": (),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": _CLIP_TOKENIZERS,
}

FAMILY_FILES = {
    each.family: each
    for each in (
        FamilyFiles(
            "sd",
            ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
            _SD,
            absent=("feature_extractor", "image_encoder", "safety_checker"),
            denoiser="unet",
        ),
        FamilyFiles(
            "sdxl",
            ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
            {
                **_SD,
                "text_encoder_2": ("CLIPTextModelWithProjection",),
                "tokenizer_2": _CLIP_TOKENIZERS,
            },
            {"force_zeros": ("force_zeros_for_empty_prompt", True)},
            absent=("feature_extractor", "image_encoder"),
            denoiser="unet",
        ),
        FamilyFiles(
            "pixart",
            ("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
            {
                "transformer": ("PixArtTransformer2DModel", "Transformer2DModel"),
                "vae": _KL,
                "scheduler": (),
                "text_encoder": ("T5EncoderModel",),
                "tokenizer": _T5_TOKENIZERS,
            },
            {"pipeline": ("_class_name", "PixArtSigmaPipeline")},
            tokens={"text_encoder": 300},
        ),
        FamilyFiles(
            "sana",
            ("SanaPipeline",),
            {
                "transformer": ("SanaTransformer2DModel",),
                "vae": ("AutoencoderDC",),
                "scheduler": (),
                "text_encoder": ("Gemma2Model", "Gemma2ForCausalLM"),
                "tokenizer": _GEMMA_TOKENIZERS,
            },
            tokens={"text_encoder": 300},
            flow=True,
        ),
        FamilyFiles(
            "sd3",
            ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
            {
                "transformer": ("SD3Transformer2DModel",),
                "vae": _KL,
                "scheduler": (),
                "text_encoder": ("CLIPTextModelWithProjection",),
                "text_encoder_2": ("CLIPTextModelWithProjection",),
                "text_encoder_3": ("T5EncoderModel",),
                "tokenizer": _CLIP_TOKENIZERS,
                "tokenizer_2": _CLIP_TOKENIZERS,
                "tokenizer_3": _T5_TOKENIZERS,
            },
            absent=("feature_extractor", "image_encoder"),
            optional=("text_encoder_3", "tokenizer_3"),
            tokens={"text_encoder_3": 256},
            in_sequence=("text_encoder", "text_encoder_3"),
            flow=True,
        ),
        FamilyFiles(
            "flux",
            ("FluxPipeline", "FluxImg2ImgPipeline"),
            {
                "transformer": ("FluxTransformer2DModel",),
                "vae": _KL,
                "scheduler": (),
                "text_encoder": ("CLIPTextModel",),
                "text_encoder_2": ("T5EncoderModel",),
                "tokenizer": _CLIP_TOKENIZERS,
                "tokenizer_2": _T5_TOKENIZERS,
            },
            absent=("feature_extractor", "image_encoder"),
            tokens={"text_encoder_2": 512},
            fewer={"text_encoder_2": ("guidance_embeds", 256)},  # schnell
            in_sequence=("text_encoder_2",),
            flow=True,
        ),
    )
}

PIPELINES = {kind: each.family for each in FAMILY_FILES.values() for kind in each.pipelines}
"""Family of each class of pipeline that is read."""

PARTS = tuple(dict.fromkeys(part for each in FAMILY_FILES.values() for part in each.parts))
"""Every component of any family."""


def classes_of(part: str, family: str | None) -> tuple[str, ...]:
    """Classes that a component may be of.

    Args:
        part: Name of the component.
        family: Family of the model; None for a component by itself, which is a U-Net's as far as
            its name tells.
    """
    if family is not None:
        return FAMILY_FILES[family].classes[part]
    known = (each.classes[part] for each in FAMILY_FILES.values() if part in each.classes)
    return next(known, ())


def family_of_configs(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """The family of the denoiser's class whose components with weights are all there.

    Where several are, or the class is not named, it is the one with most components.

    Args:
        configs: Config of each component, which may name its class.
    """
    whole = [
        each for each in FAMILY_FILES.values() if {*each.weighty} - {*each.optional} <= {*configs}
    ]
    smallest = min(FAMILY_FILES.values(), key=lambda each: len(each.weighty))

    def fitting(files: FamilyFiles) -> tuple[bool, int]:
        kind = configs[files.denoiser].get("_class_name")
        return kind in files.classes[files.denoiser], len(files.weighty)

    return max(whole, key=fitting, default=smallest).family

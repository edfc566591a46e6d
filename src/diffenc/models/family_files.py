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
        denoiser: Component that is read.
        flow: Whether the models match flows, and their schedules with them.
    """

    family: str
    pipelines: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]]
    options: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
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
    """The family whose components with weights are all there, the one with most of them.

    Where several have the same ones, the class of the denoiser decides.

    Args:
        configs: Config of each component, which may name its class.
    """
    whole = [each for each in FAMILY_FILES.values() if {*each.weighty} <= {*configs}]
    smallest = min(FAMILY_FILES.values(), key=lambda each: len(each.weighty))

    def fitting(files: FamilyFiles) -> tuple[int, bool]:
        kind = configs[files.denoiser].get("_class_name")
        return len(files.weighty), kind in files.classes[files.denoiser]

    return max(whole, key=fitting, default=smallest).family

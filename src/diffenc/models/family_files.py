"""How the pipelines of each family are stored: their classes, components and options."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class FamilyFiles:
    """What the files of a family are called.

    Attributes:
        family: Name of the family.
        pipelines: Classes of diffusers that have these components; the first is the one written.
        parts: Components with a folder each, in the order in which they are loaded.
        options: Options of the family's class that `model_index.json` holds: by name, the key there
            and the value where it is missing.
    """

    family: str
    pipelines: tuple[str, ...]
    parts: tuple[str, ...]
    options: Mapping[str, tuple[str, Any]] = field(default_factory=dict)

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


FAMILY_FILES = {
    each.family: each
    for each in (
        FamilyFiles(
            "sd",
            ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
            ("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
        ),
        FamilyFiles(
            "sdxl",
            ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
            (
                *("unet", "vae", "scheduler", "text_encoder", "tokenizer"),
                *("text_encoder_2", "tokenizer_2"),
            ),
            {"force_zeros": ("force_zeros_for_empty_prompt", True)},
        ),
    )
}

PIPELINES = {kind: each.family for each in FAMILY_FILES.values() for kind in each.pipelines}
"""Family of each class of pipeline that is read."""

PARTS = tuple(dict.fromkeys(part for each in FAMILY_FILES.values() for part in each.parts))
"""Every component of any family."""


def family_of_configs(names: Collection[str]) -> str:
    """The family whose components with weights are all there, the one with most of them."""
    whole = [each for each in FAMILY_FILES.values() if set(each.weighty) <= {*names}]
    smallest = min(FAMILY_FILES.values(), key=lambda each: len(each.weighty))
    return max(whole, key=lambda each: len(each.weighty), default=smallest).family

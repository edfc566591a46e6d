"""What a run fetches before it begins: repositories of the Hub, and how large their files are."""

from dataclasses import dataclass

from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.meta import MetaEncoder, MetaLanguageModel
from diffenc.models.sources import DOTLESS, SOURCES
from diffenc.storage.names import expanded, is_folder
from diffenc.storage.pretrained import BUNDLED


@dataclass(frozen=True, slots=True)
class Download:
    """Weights that a run reads.

    Attributes:
        part: Part of the config that names them, such as "model.encoder".
        name: Name that it says.
        repository: Id of the Hub's repository; "" where nothing is fetched.
        bytes: Bytes of the files, by the number of their parameters; 0 where nothing is fetched.
    """

    part: str
    name: str
    repository: str
    bytes: float


def downloads(
    config: TrainConfig, encoder: MetaEncoder, language: MetaLanguageModel
) -> list[Download]:
    """Weights that a run reads, in the order of its config; what the Hub's cache has counts too.

    Args:
        config: Config of the run.
        encoder: Encoder of the pictures.
        language: Language model.
    """
    model = config.model
    half = config.optimizing.precision == "fp16"
    parts = []
    for part in ("encoder", "clip", "captioner"):
        name = getattr(model, part)
        if name and name in encoder.stored:
            # Diffusion models have files in half precision, which are enough for it alone.
            width = 2 if half and part == "encoder" and model.kind != "vision" else 4
            parts.append(_download(f"model.{part}", name, encoder.stored[name] * width))
    size = language.parameters * language.stored_width
    return [*parts, _download("model.language_model", model.language_model, size)]


def _download(part: str, name: str, size: float) -> Download:
    if (alias := DOTLESS.get(name, name)) in SOURCES:
        ids = SOURCES[alias].hub_ids
        return Download(part, name, ids[0] if ids else "", float(size) if ids else 0.0)
    if name in BUNDLED or is_folder(expanded(name)):
        return Download(part, name, "", 0.0)
    return Download(part, name, name, float(size))

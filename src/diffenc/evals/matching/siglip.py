"""SigLIP and SigLIP 2 of transformers as baselines: the logit of a picture and a text."""

import os
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffenc._optional import require
from diffenc.clip.vision_models import process
from diffenc.errors import BackboneError
from diffenc.evals.matching.matchers import short_name, weights_digest
from diffenc.evals.matching.sizes import tower_sizes
from diffenc.inputs.tokenizing import fit_rows, token_ids
from diffenc.storage.names import is_file
from diffenc.storage.pretrained import (
    load_image_processor,
    load_whole,
    loading,
    model_config,
    model_folder,
    model_kind,
)
from diffenc.storage.reading import read_text

SIGLIP = {"siglip": "SiglipModel", "siglip2": "Siglip2Model"}
"""Classes of transformers by the kind of model that a config names."""

_INSTEAD = (
    "Pass a folder with config.json, model.safetensors, tokenizer and preprocessor_config.json, or "
    "a Hub id such as google/siglip-so400m-patch14-224"
)
_FIRST = re.compile(r'"tokenizer_class"\s*:\s*"SiglipTokenizer(Fast)?"')
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class SiglipMatcher:
    """A SigLIP in an evaluation; it has no noise, so one trial is enough.

    Scores are logits, a scaled and shifted cosine; the sigmoid that makes probabilities of them
    changes no order.

    Args:
        model: SigLIP model, a `transformers.SiglipModel` or `Siglip2Model`.
        tokenizer: Tokenizer of the model.
        processor: Image processor of the model.
        name: Name of the model in tables.
        punctuation: Whether the model learnt texts with punctuation, as SigLIP 2 did.
    """

    deterministic = True

    def __init__(
        self, model: Any, tokenizer: Any, processor: Any, *, name: str, punctuation: bool = True
    ) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.name, self.punctuation = name, punctuation
        self.parameters = tower_sizes(model, model.vision_model)
        self.description: Mapping[str, Any] = {
            "kind": type(model).__name__,
            "model": name,
            "weights": weights_digest([("siglip", model)]),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str]",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "SiglipMatcher":
        """Load model, tokenizer and image processor.

        Args:
            name: Path of a folder, or a Hub id.
            device: Device that the model runs on.
            dtype: Floating point type of the weights.

        Raises:
            BackboneError: There is no SigLIP of that name.
            MissingExtraError: Its tokenizer needs sentencepiece.
        """
        import transformers

        label = os.fspath(name)
        with loading("a SigLIP", label, instead=_INSTEAD):
            kind = model_kind(label)
            if kind not in SIGLIP:
                raise BackboneError(f"{label!r} is of the kind {kind!r}. {_INSTEAD}")
            config = model_config(label)
            model = load_whole(getattr(transformers, SIGLIP[kind]), label, dtype=dtype)
            tokenizer, first = _tokenizer(model_folder(label, weights=False))
            tokenizer.model_max_length = config.text_config.max_position_embeddings
            processor = load_image_processor(label)
        named = short_name(label)
        return cls(model.to(device), tokenizer, processor, name=named, punctuation=not first)

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, seed: int = 0
    ) -> Tensor:
        """Logits, (images, texts), in float32."""
        device = self.model.device
        ids, _ = fit_rows(self.tokenizer, token_ids(self.tokenizer, self._clean(texts)))
        shown = process(self.processor, images)
        pictures = {key: value.to(device) for key, value in shown.items()}
        pictures["pixel_values"] = pictures["pixel_values"].to(self.model.dtype)
        # Both were trained on texts padded to their full length, without a mask.
        output = self.model(input_ids=ids.to(device), **pictures)
        scores: Tensor = output.logits_per_image.float().cpu()
        return scores

    def truncated(self, texts: Sequence[str]) -> Sequence[int]:
        """Number of tokens of each text that exceed the model's limit and are not read."""
        limit = self.tokenizer.model_max_length
        return [max(0, len(row) - limit) for row in token_ids(self.tokenizer, self._clean(texts))]

    def _clean(self, texts: Sequence[str]) -> list[str]:
        """Texts as the model learnt them: in lower case, and of the first SigLIP bare words."""
        lower = [text.lower() for text in texts]
        if self.punctuation:
            return lower
        return [re.sub(r"\s+", " ", text.translate(_PUNCTUATION)).strip() for text in lower]


def _tokenizer(folder: Path) -> tuple[Any, bool]:
    """The tokenizer of a model, and whether it is that of the first SigLIP."""
    import transformers

    options: dict[str, Any] = {"local_files_only": True}
    path = folder / "tokenizer_config.json"
    # No JSON of ours: transformers writes a limit of 10^30 into it.
    text = read_text(path, error=BackboneError) if is_file(path) else ""
    first = _FIRST.search(text) is not None
    if is_file(folder / "tokenizer.json"):
        kind: Any = transformers.PreTrainedTokenizerFast
        return kind.from_pretrained(folder, trust_remote_code=False, **options), first
    require("sentencepiece", extra="siglip")
    kind = transformers.SiglipTokenizer if first else transformers.AutoTokenizer
    return kind.from_pretrained(folder, trust_remote_code=False, **options), first

"""CLIP as a baseline: the cosine of its image and text embeddings."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffenc.clip.vision_models import process
from diffenc.errors import BackboneError
from diffenc.evals.matching.matchers import short_name, weights_digest
from diffenc.evals.matching.sizes import tower_sizes
from diffenc.inputs.prompts import tokenize
from diffenc.inputs.tokenizing import fit_rows, token_ids
from diffenc.storage.pretrained import (
    load_whole,
    loading,
    model_config,
    model_folder,
    model_kind,
)

_INSTEAD = (
    "Pass a folder with config.json, model.safetensors, tokenizer and preprocessor_config.json, or "
    "a Hub id such as openai/clip-vit-large-patch14"
)


class ClipMatcher:
    """A `CLIPModel` in an evaluation; it has no noise, so one trial is enough.

    Args:
        model: CLIP model, a `transformers.CLIPModel`.
        tokenizer: Tokenizer of the CLIP model.
        processor: Image processor of the CLIP model.
        name: Name of the model in tables.
    """

    deterministic = True

    def __init__(self, model: Any, tokenizer: Any, processor: Any, *, name: str) -> None:
        self.model, self.tokenizer, self.processor = model.eval(), tokenizer, processor
        self.name = name
        self.parameters = tower_sizes(model, model.vision_model, model.visual_projection)
        self.description: Mapping[str, Any] = {
            "kind": "CLIPModel",
            "model": name,
            "weights": weights_digest([("clip", model)]),
            "dtype": str(model.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_pretrained(
        cls,
        name: "str | os.PathLike[str]",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ClipMatcher":
        """Load model, tokenizer and image processor.

        Args:
            name: Path of a folder, a Hub id, or "shapes-clip", the bundled miniature.
            device: Device that the model runs on.
            dtype: Floating point type of the weights.

        Raises:
            BackboneError: There is no CLIP of that name.
        """
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        label = os.fspath(name)
        with loading("a CLIP", label, instead=_INSTEAD):
            kind = model_kind(label)
            if kind != "clip":
                raise BackboneError(
                    f"{label!r} is of the kind {kind!r}; the baseline is a CLIPModel of "
                    "transformers, such as openai/clip-vit-large-patch14"
                )
            config = model_config(label)
            model = load_whole(CLIPModel, label, dtype=dtype)
            folder, options = model_folder(label, weights=False), {"local_files_only": True}
            tokenizer = CLIPTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
            processor = CLIPImageProcessor.from_pretrained(folder, **options)
        limit = config.text_config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, limit)
        return cls(model.to(device), tokenizer, processor, name=short_name(label))

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], *, seed: int = 0
    ) -> Tensor:
        """Cosines times the model's temperature, (images, texts), in float32."""
        device = self.model.device
        whole = token_ids(self.tokenizer, texts)
        ids, mask = fit_rows(self.tokenizer, whole, to_longest=True)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            pixel_values=process(self.processor, images)["pixel_values"].to(
                device, self.model.dtype
            ),
        )
        scores: Tensor = output.logits_per_image.float().cpu()
        return scores

    def truncated(self, texts: Sequence[str]) -> Sequence[int]:
        """Number of tokens of each text that exceed the model's limit and are not read."""
        return tokenize(self.tokenizer, texts)[1]

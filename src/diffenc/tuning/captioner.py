"""The implicit captioner as a part of an encoder, with the CLIP that it listens to."""

import os
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.clip.captioner import ClipEmbedder, ImplicitCaptioner
from diffenc.errors import BackboneError, ConfigError
from diffenc.inputs.images import Images, to_pixel_values
from diffenc.inputs.prompts import PromptEmbeds
from diffenc.memory.cache import TensorCache
from diffenc.memory.digests import is_marked
from diffenc.models.base import Backbone
from diffenc.passes.encoded import image_embeds_of
from diffenc.runtime.inference import lasting
from diffenc.storage.names import checked_path


class CaptionerPart(nn.Module):
    """What CLIP sees in a picture, added to the states of the prompt.

    Attributes:
        backbone: The frozen model, whose text states get the tokens.
        captioner: The implicit captioner, or None.
        clip: Frozen CLIP that the captioner listens to, or None.
        use_cache: Whether CLIP's embeddings of pictures are remembered.
    """

    backbone: Backbone
    captioner: ImplicitCaptioner | None
    clip: ClipEmbedder | None
    use_cache: bool

    def __init__(self) -> None:
        super().__init__()
        self.captioner = self.clip = None
        self._image_embeds = TensorCache(16 * 2**20)

    @lasting
    def add_captioner(
        self,
        clip: "str | os.PathLike[str] | nn.Module | None",
        *,
        processor: Any = None,
        hidden_size: int | None = None,
        layers: int = 2,
    ) -> None:
        """Let CLIP's view of each picture condition the U-Net, beside the prompt or without one.

        From now on `cond` is the prompt, or no text where none is given, plus the
        captioner's tokens; `uncond` stays the plain unconditional embedding, and both are equal
        until training begins. CLIP gets the same pictures in its own preprocessing, and stays
        frozen.

        Args:
            clip: A `CLIPVisionModelWithProjection` or `CLIPModel` of transformers, its folder, its
                Hub id, or "shapes-clip". It is saved by name alone.
            processor: CLIP's image processor, whose mean, deviation and cropping count; None takes
                what lies beside a name, and OpenAI's values for a model.
            hidden_size: Width of the hidden layers of the MLPs, see `ImplicitCaptioner`.
            layers: Number of linear layers of an MLP, see `ImplicitCaptioner`.

        Raises:
            BackboneError: There is no CLIP of that name.
            ConfigError: There is a captioner already, no CLIP, or a value out of range; or a model
                whose texts have no states beyond their own.
        """
        if self.captioner is not None:
            raise ConfigError("this encoder has a captioner already; one is enough")
        if not self.backbone.pads_texts:
            raise ConfigError(
                "a captioner adds to the states of every text, and those of "
                f"{self.backbone.name!r} are as many as a text's tokens, one for no text; use "
                "add_lora instead"
            )
        if self.backbone.is_transformer:
            raise ConfigError(
                f"a captioner adds to the states of CLIP, and {self.backbone.name!r} reads "
                "those of T5 behind them; use add_lora instead, or a model with a U-Net"
            )
        embedder = _embedder(clip, processor)
        widths = self._text_widths()
        captioner = ImplicitCaptioner(
            embedder.width, hidden_size=hidden_size, layers=layers, **widths
        )
        self._attach(captioner, embedder)

    @lasting
    def load_captioner(
        self,
        folder: "str | os.PathLike[str]",
        *,
        clip: "str | os.PathLike[str] | nn.Module | None" = None,
        trainable: bool = False,
    ) -> None:
        """Read a captioner that `save_pretrained` wrote.

        Args:
            folder: Folder with `captioner.json` and `captioner.safetensors`.
            clip: CLIP of the captioner, as for `add_captioner`; None is the one it was saved with,
                by name.
            trainable: Whether the captioner goes on training.

        Raises:
            BackboneError: The folder holds no whole captioner, or one for another backbone or
                another CLIP.
            ConfigError: There is a captioner already, or the CLIP was a nameless object.
        """
        if self.captioner is not None:
            raise ConfigError("this encoder has a captioner already; one is enough")
        captioner, content = ImplicitCaptioner.from_pretrained(folder)
        if clip is None and content.get("name") is None:
            raise ConfigError(
                f"{os.fspath(folder)} was saved with a CLIP that had no name; pass clip= again"
            )
        embedder = _embedder(content["name"] if clip is None else clip, content)
        wants = {"image_width": embedder.width, **self._text_widths()}
        has = {key: captioner.options[key] for key in wants}
        if has != wants:
            raise BackboneError(
                f"{os.fspath(folder)} holds a captioner for another backbone or another CLIP: its "
                f"sizes are {has}, and here they are {wants}"
            )
        if "mark" in content and not is_marked(embedder, content["mark"]):
            raise BackboneError(
                f"{os.fspath(folder)} holds a captioner that listens to another CLIP than "
                f"{embedder.name!r}, whose weights differ; put that CLIP back, or pass it as clip="
            )
        captioner.requires_grad_(trainable)
        self._attach(captioner, embedder)

    def caption(self, images: Images, embeds: PromptEmbeds) -> PromptEmbeds:
        """Texts with the captioner's tokens added to them; without one, the texts.

        Texts of several windows get the tokens in the first window; texts with fewer states get the
        first tokens.

        Args:
            images: One picture or several.
            embeds: Encoded texts, one row for each picture.
        """
        if self.captioner is None:
            return embeds
        if self.clip is None:
            raise ConfigError("the captioner has no CLIP to listen to; use add_captioner(clip)")
        tokens, pooled = self.captioner(self._image_embeds_of(images))
        states = embeds.prompt_embeds
        places = min(states.shape[1], tokens.shape[1])
        added = F.pad(tokens[:, :places], (0, 0, 0, states.shape[1] - places))
        pooled_states = embeds.pooled_prompt_embeds
        if pooled_states is not None and pooled is not None:
            pooled_states = pooled_states + pooled.to(pooled_states.device)
        return replace(
            embeds,
            prompt_embeds=states + added.to(states.device),
            pooled_prompt_embeds=pooled_states,
        )

    def _image_embeds_of(self, images: Images) -> Float[Tensor, "b c"]:
        assert self.clip is not None
        pixel_values = to_pixel_values(
            images,
            size=self.clip.size,
            resize="crop" if self.clip.crops else "squash",
            multiple=1,
            center="transformers",
        )
        cache = self._image_embeds if self.use_cache else None
        return image_embeds_of(self.clip, pixel_values, cache=cache)

    def _text_widths(self) -> dict[str, Any]:
        with torch.no_grad():
            empty = self.backbone.embed([""], size=(8, 8))
        pooled = empty.pooled_prompt_embeds
        return {
            "width": empty.prompt_embeds.shape[2],
            "length": empty.prompt_embeds.shape[1],
            "pooled_width": None if pooled is None else pooled.shape[1],
        }

    def _attach(self, captioner: ImplicitCaptioner, embedder: ClipEmbedder) -> None:
        device = self.backbone.device
        with self.backbone.lock:  # a call reads both
            self.captioner = captioner.to(device).train(self.training)
            self.clip = embedder.to(device)
            self._image_embeds.clear()


def _embedder(clip: Any, processor: Any) -> ClipEmbedder:
    if clip is None:
        raise ConfigError(
            "a captioner needs a CLIP: pass a CLIPVisionModelWithProjection or CLIPModel of "
            "transformers, its folder, or its Hub id"
        )
    if isinstance(clip, (str, os.PathLike)):
        checked_path("a CLIP", clip, error=BackboneError)
        return ClipEmbedder.from_name(clip, processor=processor)
    return ClipEmbedder(clip, processor=processor)

"""A checkpoint of LLaVA's own package with a tower of diffenc, which answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from diffenc.errors import ConfigError, near_matches
from diffenc.evals.lmms_eval.answering import Turns
from diffenc.hosts.guidance import guide
from diffenc.hosts.installed_towers import towers_of
from diffenc.hosts.llava import modernize, register, take_prompts
from diffenc.hosts.llava.layout import import_part
from diffenc.hosts.llava.prompting import IDS, IMAGE_TOKEN, MASK
from diffenc.storage.pretrained import loading


class PackageLlava:
    """A model of LLaVA's own package whose tower reads the question, as `Answering`.

    The package loads the checkpoint, writes its conversations and prepares its pictures.

    Args:
        folder: Checkpoint of stage 1 or 2.
        device: Device of the model.
        dtype: Floating point type of the model.
        guidance_scale: Guidance scale of the tower's features; None leaves the tower's spec.
        conv_template: Name of the conversation template in the package.
        model_base: Language model below a checkpoint that holds LoRA or the projector alone.
        model_name: Name by which the package tells what to load; None is made of the folder's.
        package: Name of the package's module.

    Raises:
        ConfigError: The package is not there, knows no such template, or would load something else
            than a multimodal model by this name.
        BackboneError: The checkpoint cannot be loaded.
    """

    prompt_policy = "question"

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        dtype: torch.dtype,
        guidance_scale: float | None = None,
        conv_template: str = "vicuna_v1",
        model_base: str | None = None,
        model_name: str | None = None,
        package: str = "llava",
    ) -> None:
        modernize(package, script=None)
        register(package)
        self._tools = import_part(package, "mm_utils")
        templates = import_part(package, "conversation").conv_templates
        if conv_template not in templates:
            raise ConfigError(
                f"{package} has no conversation template {conv_template!r}; it has "
                f"{', '.join(templates)}.{near_matches(conv_template, templates)}"
            )
        self._template = templates[conv_template]
        name = model_name or self._tools.get_model_name_from_path(str(folder))
        if "llava" not in name.lower():
            raise ConfigError(
                f"{package} loads a multimodal model only where its name holds 'llava', and this "
                f"is {name!r}; pass model_name=llava-v1.5-7b, with -lora for a LoRA checkpoint"
            )
        load = import_part(package, "model.builder").load_pretrained_model
        instead = "Pass model_base= for a checkpoint that holds LoRA or the projector alone."
        with loading(f"a model of {package}", str(folder), instead=instead):
            loaded = load(str(folder), model_base, name, device=str(device))
        self.tokenizer, self.model, self._image_processor, self._context = loaded
        self.model.to(dtype).eval()
        self.model.config.tokenizer_padding_side = "left"
        take_prompts(self.model)
        self.tower = next(iter(towers_of(self.model)))
        if guidance_scale is not None:
            guide(self.tower, guidance_scale)

    def room(self, turns: Turns, pictures: Sequence[Image.Image]) -> int | None:
        """Number of tokens that the context has left for an answer; None is unknown."""
        if getattr(self.model.config, "image_aspect_ratio", None) == "anyres":
            return None  # tiles vary in number
        used = len(self._ids(turns)) + len(pictures) * (self.tower.num_patches - 1)
        return int(self._context) - used

    @torch.no_grad()
    def generate(
        self,
        images: Sequence[Sequence[Image.Image]],
        conversations: Sequence[Turns],
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        **options: Any,
    ) -> list[str]:
        """Answer each conversation, see `Answering.generate`."""
        answers: dict[int, str] = {}
        for shows in (True, False):  # LLaVA's batches do not mix both
            rows = [row for row, each in enumerate(images) if bool(each) == shows]
            if rows:
                texts = self._answers(
                    [images[row] for row in rows],
                    [conversations[row] for row in rows],
                    [prompts[row] for row in rows],
                    max_new_tokens=max_new_tokens,
                    **options,
                )
                answers |= dict(zip(rows, texts, strict=True))
        return [answers[row] for row in range(len(images))]

    def _answers(
        self,
        images: Sequence[Sequence[Image.Image]],
        conversations: Sequence[Turns],
        prompts: Sequence[str],
        **options: Any,
    ) -> list[str]:
        rows = [self._ids(turns).flip(0) for turns in conversations]
        ids = pad_sequence(rows, batch_first=True, padding_value=_FILLER).flip(1)
        mask = (ids != _FILLER).long()
        filler = self.tokenizer.pad_token_id
        filler = self.tokenizer.eos_token_id if filler is None else filler
        tokens = self.tower.tokenize(list(prompts))
        pictures = [picture for each in images for picture in each]
        shown = {}
        if pictures:
            shown = {
                "images": self._shown(pictures),
                "image_sizes": [picture.size for picture in pictures],
                IDS: tokens.ids.to(self.model.device),
                MASK: tokens.mask.to(self.model.device),
            }
        made = self.model.generate(
            ids.masked_fill(mask == 0, filler).to(self.model.device),
            attention_mask=mask.to(self.model.device),
            pad_token_id=filler,
            **shown,
            **options,
        )
        texts = self.tokenizer.batch_decode(made, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _shown(self, pictures: list[Image.Image]) -> Any:
        """Pictures as the package prepares them: one tensor, or a list of tiles."""
        shown = self._tools.process_images(pictures, self._image_processor, self.model.config)
        place = (self.model.device, self.model.dtype)
        if isinstance(shown, Tensor):
            return shown.to(*place)
        return [each.to(*place) for each in shown]

    def _ids(self, turns: Turns) -> Tensor:
        """Token ids of a conversation, with LLaVA's mark for each picture."""
        conversation = self._template.copy()
        for index, turn in enumerate(turns):
            conversation.append_message(conversation.roles[index % 2], turn["value"])
        conversation.append_message(conversation.roles[1], None)
        ids: Tensor = self._tools.tokenizer_image_token(
            conversation.get_prompt(), self.tokenizer, IMAGE_TOKEN, return_tensors="pt"
        )
        return ids


_FILLER = -1  # no id of a token, nor LLaVA's mark of a picture

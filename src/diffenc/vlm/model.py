"""An encoder of pictures, a projector and a causal language model as one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, PromptError, ShapeError
from diffenc.images import Images, ImageSource, as_list
from diffenc.policies import PromptPolicy, PromptSample, parse_policy
from diffenc.projector import projector_for
from diffenc.vlm import files
from diffenc.vlm.chat import IGNORE_ID, IMAGE_ID, IMAGE_MARK, Chat, ChatTokens, Template, Turns
from diffenc.vlm.language import (
    add_language_lora,
    context_of,
    filler_id,
    load_language_model,
    width_of,
)
from diffenc.vlm.splice import Spliced, splice
from diffenc.vlm.vision import tokens_per_image

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
"""What LLaVA's captioning evaluation asks."""

Pictures: TypeAlias = "ImageSource | Sequence[ImageSource] | None"
"""Of one sample: one, several, or none."""


class DiffusionVLM(nn.Module):
    """A multimodal language model whose eyes read the question.

    The encoder gives tokens of each picture under a prompt, the projector brings them to the width
    of the language model, and they stand in its input where the text says ``<image>``. As baselines
    any vision model of transformers takes the encoder's place (`VisionTokens`).

    Args:
        encoder: A `DiffusionEncoder`, `FusedEncoder` or `VisionTokens`, or a name that
            `DiffusionEncoder.from_pretrained` takes.
        language_model: Any causal language model of transformers that takes `inputs_embeds`, or its
            name. It needs no token for pictures.
        tokenizer: The language model's; a name brings its own. It needs no pad token.
        projector: From `encoder.hidden_size` to the language model's width; None makes the one that
            `projector_for` makes.
        template: See `diffenc.vlm.chat.Chat`.
        system: System message, see `Chat`.
        prompt_policy: Of which text the encoder's prompt is made, see
            `diffenc.policies.parse_policy`. Its changes (noise, dropout) act in training alone.
        image_batch_size: Most pictures per call of the encoder; None is all at once.

    Raises:
        ConfigError: A part does not fit the others, or an option is not allowed.
        BackboneError: There is no model of that name.

    Example:
        >>> vlm = DiffusionVLM("shapes", "shapes-lm")
        >>> vlm.generate(image, "what color is the circle?")
        ['red']

    Source:
        "Multimodal Understanding using Stable Diffusion as a Task Aware Feature Extractor",
        sections 5 and 6, after Liu et al. 2023 (LLaVA-1.5), arXiv:2310.03744.
    """

    def __init__(
        self,
        encoder: "nn.Module | str | os.PathLike[str]",
        language_model: "nn.Module | str | os.PathLike[str]",
        tokenizer: Any = None,
        *,
        projector: nn.Module | None = None,
        template: Template = "auto",
        system: str | None = None,
        prompt_policy: PromptPolicy | str = "question",
        image_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(encoder, (str, os.PathLike)):
            encoder = DiffusionEncoder.from_pretrained(encoder)
        if isinstance(language_model, (str, os.PathLike)):
            language_model, own = load_language_model(language_model)
            tokenizer = own if tokenizer is None else tokenizer
        if tokenizer is None:
            raise ConfigError("a language model that is given as an object needs its tokenizer=")
        _check_encoder(encoder)
        self.encoder: Any = encoder
        self.language_model: Any = language_model
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, template, system=system)
        policy = parse_policy(prompt_policy) if isinstance(prompt_policy, str) else prompt_policy
        self.prompt_policy = policy
        self.image_batch_size = image_batch_size
        width = width_of(language_model)
        if projector is None:
            seen: Any = encoder
            projector = projector_for(seen, width)
        self.projector: Any = projector
        if projector.out_features != width:
            raise ConfigError(
                f"the projector gives {projector.out_features} channels and the language model "
                f"takes {width}; make it with projector_for(encoder, {width})"
            )

    @classmethod
    def from_pretrained(
        cls,
        folder: "str | os.PathLike[str]",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trainable: bool = False,
        language_model: Any = None,
        **encoder_options: Any,  # of DiffusionEncoder.from_pretrained, which checks their names
    ) -> "DiffusionVLM":
        """Inverse of `save_pretrained`.

        Args:
            folder: What `save_pretrained` wrote.
            device: Where it runs.
            dtype: Of what is frozen; projector and adapters are in float32.
            trainable: Whether saved adapters go on training.
            language_model: Instead of the one that was saved by its name.
            encoder_options: Such as `timestep` or `guidance_scale`; they win over what was saved.

        Raises:
            BackboneError: The folder does not hold a whole model, or a part is missing.
        """
        parts, options = files.load(
            folder,
            device=device,
            dtype=dtype,
            trainable=trainable,
            language_model=language_model,
            encoder_options=encoder_options,
        )
        return cls(*parts[:3], projector=parts[3], **options).eval()

    def save_pretrained(
        self, folder: "str | os.PathLike[str]", *, include_language_model: bool | None = None
    ) -> None:
        """Write projector, encoder and options, and the language model by its name or whole.

        Args:
            folder: See `diffenc.vlm.files` for what lies where.
            include_language_model: Write its weights too. None does so where they were trained or
                have no name to be found by. A LoRA adapter is written in any case.

        Raises:
            OutputError: The folder cannot be written.
        """
        files.save(self, folder, include_language_model)

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        device: torch.device = self.language_model.get_input_embeddings().weight.device
        return device

    @property
    def tokens_per_image(self) -> int | None:
        """Tokens that a picture takes of the context; None where that varies."""
        grid = getattr(self.projector, "grid", None)
        return grid[0] * grid[1] if grid is not None else tokens_per_image(self.encoder)

    @property
    def context(self) -> int | None:
        """Tokens that the language model holds; None where its config does not say."""
        return context_of(self.language_model)

    def add_language_lora(
        self, *, rank: int = 128, alpha: float = 256, dropout: float = 0.05
    ) -> None:
        """Put a trainable low-rank adapter on the language model; the defaults are LLaVA-1.5's.

        Raises:
            ConfigError: There is one already, or a value is out of range.
        """
        self.language_model = add_language_lora(
            self.language_model, rank=rank, alpha=alpha, dropout=dropout
        )

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters that require a gradient, with their names in `state_dict`."""
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Save memory by computing activations again on the way back, where something trains."""
        kwargs = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        model = self.language_model
        if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        backbone = getattr(self.encoder, "backbone", None)
        if backbone is not None and any(p.requires_grad for p in backbone.unet.parameters()):
            backbone.unet.enable_gradient_checkpointing()

    def encode_images(
        self,
        images: Sequence[ImageSource],
        prompts: Sequence[str] | None = None,
    ) -> Float[Tensor, "b n c"]:
        """The encoder's tokens of pictures, before the projector.

        Args:
            images: One or more.
            prompts: One for each; None is unconditional.
        """
        step = self.image_batch_size or len(images)
        found = []
        for first in range(0, len(images), step):
            part = list(images[first : first + step])
            texts = None if prompts is None else list(prompts[first : first + step])
            found.append(self.encoder(part, texts))
        return torch.cat(found)

    def forward(
        self,
        input_ids: Int[Tensor, "b t"],
        attention_mask: Int[Tensor, "b t"] | None = None,
        images: Sequence[Pictures] | None = None,
        prompts: Sequence[str] | None = None,
        labels: Int[Tensor, "b t"] | None = None,
        image_tokens: Sequence[Float[Tensor, "n c"]] | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Logits, and the loss of labels.

        Args:
            input_ids: Token ids with `diffenc.vlm.chat.IMAGE_ID` for each picture, padded.
            attention_mask: 0 where padding stands; None is no padding.
            images: Per sample one picture, several, or none.
            prompts: The encoder's, per sample: all pictures of a sample share it.
            labels: As `input_ids`, `IGNORE_ID` where nothing is learnt.
            image_tokens: What `encode_images` gave for every picture in order, instead of `images`.
            num_items_in_batch: By which the summed loss is divided; None is the number of labels.

        Returns:
            transformers' `CausalLMOutput`. Its logits count the pictures' tokens too.

        Raises:
            ShapeError: Pictures and their places in the texts differ in number, or a sample is
                longer than the context.
            PromptError: Prompts and samples differ in number.
        """
        from transformers.modeling_outputs import CausalLMOutput

        spliced = self._embed(
            input_ids, attention_mask, images, prompts, labels=labels, image_tokens=image_tokens
        )
        outputs = self.language_model(
            inputs_embeds=spliced.inputs_embeds,
            attention_mask=spliced.attention_mask,
            use_cache=False,
        )
        loss = None
        if spliced.labels is not None:
            loss = _loss(outputs.logits, spliced.labels, num_items_in_batch)
            if self.training:
                loss = loss + self._no_gradient()
        return CausalLMOutput(loss=loss, logits=outputs.logits)

    def _no_gradient(self) -> Tensor | float:
        """Zero, to which everything trained contributes: DDP waits for every gradient."""
        parts = (self.encoder, self.projector)
        found = [p for part in parts for p in part.parameters() if p.requires_grad]
        return sum((p.float().sum() * 0 for p in found), start=0.0)

    def _embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        images: Sequence[Pictures] | None,
        prompts: Sequence[str] | None,
        *,
        labels: Tensor | None = None,
        image_tokens: Sequence[Tensor] | None = None,
        side: Any = "right",
        more: int = 0,
    ) -> Spliced:
        shown = [pictures_of(entry) for entry in images or [None] * len(input_ids)]
        if len(shown) != len(input_ids):
            raise ShapeError(f"images for {len(shown)} samples, and {len(input_ids)} texts")
        if prompts is not None and len(prompts) != len(input_ids):
            raise PromptError(f"{len(prompts)} prompts for {len(input_ids)} samples")
        _check_places(input_ids, attention_mask, shown, image_tokens)
        each = self.tokens_per_image
        if each is not None:
            self._check_length(input_ids, attention_mask, each, more)
        flat = [picture for entry in shown for picture in entry]
        tokens: list[Tensor] = list(image_tokens or [])
        if image_tokens is None and flat:
            texts = None
            if prompts is not None:
                texts = [text for text, e in zip(prompts, shown, strict=True) for _ in e]
            tokens = list(self.encode_images(flat, texts))
        pictures = self._project(tokens)
        embedding = self.language_model.get_input_embeddings()
        spliced = splice(embedding, input_ids, attention_mask, pictures, labels=labels, side=side)
        context, length = self.context, spliced.inputs_embeds.shape[1]
        if context is not None and length + more > context:
            raise _too_long(length, more, context)
        return spliced

    def _project(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        if not tokens:
            return []
        if len({len(each) for each in tokens}) == 1:
            return list(self.projector(torch.stack([t.to(self.device) for t in tokens])))
        return [self.projector(each[None].to(self.device))[0] for each in tokens]

    def _check_length(self, ids: Tensor, mask: Tensor | None, each: int, more: int) -> None:
        """Raise before anything runs where a sample is longer than the context."""
        if self.context is None:
            return
        keep = torch.ones_like(ids) if mask is None else mask
        pictures = ((ids == IMAGE_ID) & keep.bool()).sum(1)
        longest = int((keep.sum(1) + pictures * (each - 1)).max())
        if longest + more > self.context:
            raise _too_long(longest, more, self.context, int(pictures.max()), each)

    @torch.no_grad()
    def generate(
        self,
        images: "Pictures | Sequence[Pictures]",
        questions: "str | Sequence[str | Turns]",
        prompts: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int = 64,
        do_sample: bool = False,
        **options: Any,
    ) -> list[str]:
        """Answers to questions about pictures.

        Args:
            images: Per question one picture, a list of several, or None; a single question may
                come with its picture or pictures alone.
            questions: One, or several; each a text, or a conversation in LLaVA's format that ends
                with the human's turn. Where a text has no ``<image>``, pictures come before it.
            prompts: The encoder's, one for all or one each; None asks `prompt_policy`.
            max_new_tokens: Of an answer.
            do_sample: Sample instead of taking the likeliest token.
            options: Further ones of transformers' `generate`, such as `num_beams`.

        Returns:
            One answer per question, without special tokens.

        Raises:
            PromptError: Questions, pictures and prompts differ in number, or the policy needs
                captions.
            ShapeError: More tokens than the context holds.
        """
        asked, shown = _samples(images, questions)
        turns = [_with_marks(each, len(own)) for each, own in zip(asked, shown, strict=True)]
        texts = self._prompts_of(turns, prompts)
        encoded = [self.chat.encode(each) for each in turns]
        ids, mask = pad(encoded, self.device)
        with self._evaluating():
            spliced = self._embed(ids, mask, shown, texts, side="left", more=max_new_tokens)
            rows = self.language_model.generate(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                **{"pad_token_id": filler_id(self.tokenizer), **options},
            )
        answers = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def caption(
        self,
        images: Images,
        prompts: str | Sequence[str] | None = None,
        *,
        request: str = CAPTION_REQUEST,
        **options: Any,
    ) -> list[str]:
        """One caption per picture.

        Args:
            images: One or several.
            prompts: The encoder's, one for all or one each; None is the empty one, as a caption is
                not yet known.
            request: What is asked; the template "plain" leaves it out.
            options: See `generate`.
        """
        pictures = as_list(images)
        return self.generate(
            [[picture] for picture in pictures],
            [request] * len(pictures),
            "" if prompts is None else prompts,
            **options,
        )

    def _prompts_of(
        self, conversations: Sequence[Turns], prompts: str | Sequence[str] | None
    ) -> list[str]:
        if isinstance(prompts, str):
            return [prompts] * len(conversations)
        if prompts is not None:
            if len(prompts) != len(conversations):
                raise PromptError(f"{len(prompts)} prompts for {len(conversations)} questions")
            return list(prompts)
        policy = parse_policy(str(self.prompt_policy).split("|")[0])
        return [
            policy(PromptSample(key=str(index), conversation=[turns[-1]]))
            for index, turns in enumerate(conversations)
        ]

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


def pad(
    encoded: Sequence[ChatTokens], device: torch.device | str = "cpu"
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids on the right padded with zeros, and the mask that tells them apart."""
    length = max(len(each.input_ids) for each in encoded)
    ids = [each.input_ids + [0] * (length - len(each.input_ids)) for each in encoded]
    mask = [[1] * len(each.input_ids) + [0] * (length - len(each.input_ids)) for each in encoded]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def pictures_of(entry: Pictures) -> list[ImageSource]:
    """The pictures of one sample, as a list."""
    if entry is None or (isinstance(entry, (list, tuple)) and not entry):
        return []
    return as_list(entry)


def _samples(images: Any, questions: Any) -> tuple[list[Turns], list[list[ImageSource]]]:
    """Conversations, and the pictures of each."""
    single = isinstance(questions, str)
    asked = [questions] if single else list(questions)
    if not asked:
        raise PromptError("there is no question; pass one or more")
    if images is None:
        images = [None] * len(asked)
    elif single or not isinstance(images, (list, tuple)):
        images = [images]
    shown = [pictures_of(entry) for entry in images]
    if len(shown) != len(asked):
        raise PromptError(
            f"pictures for {len(shown)} questions, and {len(asked)} questions; pass for each "
            "question a picture, a list of pictures, or None"
        )
    turns: list[Turns] = [
        [{"from": "human", "value": each}] if isinstance(each, str) else list(each)
        for each in asked
    ]
    for each in turns:
        if not each or each[-1].get("from") not in ("human", "user"):
            raise PromptError("a conversation to be answered ends with a turn from the human")
    return turns, shown


def _with_marks(turns: Turns, pictures: int) -> list[dict[str, str]]:
    """The conversation with a place for each picture, before its first turn where it has none."""
    found = [dict(turn) for turn in turns]
    places = sum(turn["value"].count(IMAGE_MARK) for turn in found)
    if not places and pictures:
        found[0]["value"] = f"{IMAGE_MARK}\n" * pictures + found[0]["value"]
    elif places != pictures:
        raise PromptError(
            f"a question shows {places} pictures ({IMAGE_MARK}) and comes with {pictures}"
        )
    return found


def _check_places(
    ids: Tensor,
    mask: Tensor | None,
    shown: Sequence[Sequence[ImageSource]],
    image_tokens: Sequence[Tensor] | None,
) -> None:
    keep = torch.ones_like(ids) if mask is None else mask
    places = ((ids == IMAGE_ID) & keep.bool()).sum(1).tolist()
    if image_tokens is not None:
        if len(image_tokens) != sum(places):
            raise ShapeError(f"tokens of {len(image_tokens)} pictures for {sum(places)} places")
        return
    for index, (count, pictures) in enumerate(zip(places, shown, strict=True)):
        if count != len(pictures):
            raise ShapeError(
                f"sample {index} has {count} places for pictures ({IMAGE_MARK}) and "
                f"{len(pictures)} pictures"
            )


def _too_long(length: int, more: int, context: int, pictures: int = 0, each: int = 0) -> ShapeError:
    told = f", {pictures} x {each} of them of pictures" if pictures else ""
    asked = f" and {more} new ones" if more else ""
    return ShapeError(
        f"the longest sample has {length} tokens{told}{asked}; the language model holds "
        f"{context}. Use a coarser grid (grid= of the encoder), fewer pictures, a shorter text or "
        "fewer new tokens"
    )


def _loss(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross-entropy of the next token where there is a label, in float32."""
    wanted = labels[:, 1:]
    learnt = wanted != IGNORE_ID
    summed = F.cross_entropy(logits[:, :-1][learnt].float(), wanted[learnt], reduction="sum")
    if count is None:
        return summed / learnt.sum().clamp(min=1)
    return summed / torch.as_tensor(count, device=summed.device).clamp(min=1)


def _check_encoder(encoder: nn.Module) -> None:
    if not hasattr(encoder, "hidden_size") or not hasattr(encoder, "token_channels"):
        raise ConfigError(
            f"{type(encoder).__name__} is no encoder of pictures; pass a DiffusionEncoder, a "
            "FusedEncoder, or VisionTokens around a vision model of transformers"
        )
    timestep = getattr(getattr(encoder, "config", None), "timestep", 0)
    if isinstance(timestep, tuple) and len(timestep) > 1:
        raise ConfigError(
            f"a language model reads one timestep, and this encoder gives {timestep}; pass one"
        )

"""An encoder of pictures, a projector and a causal language model as one."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.checks.arguments import whole
from diffenc.encoder import DiffusionEncoder
from diffenc.errors import ConfigError, NonFiniteError
from diffenc.inputs.images import Images, as_list
from diffenc.inputs.policies import PromptPolicy, parse_policy
from diffenc.mllm import model_folder
from diffenc.mllm.chat import IGNORE_ID, Chat, Template, Turns
from diffenc.mllm.inputs import PictureInputs, check_encoder
from diffenc.mllm.language import (
    add_language_lora,
    ends_of,
    filler_id,
    load_language_model,
    width_of,
)
from diffenc.mllm.samples import Pictures, pad, prompts_of, samples_of, with_marks
from diffenc.mllm.vision import check_square
from diffenc.models.device import as_dtype
from diffenc.projector.choosing import projector_for
from diffenc.runtime.inference import lasting, make_plain
from diffenc.runtime.threads import lock_of

CAPTION_REQUEST = "Provide a one-sentence caption for the provided image."
"""Request for a caption, in the words of LLaVA's evaluation of captions."""


class DiffusionVLM(PictureInputs):
    """A multimodal language model whose eyes read the question.

    The encoder gives tokens of each picture under a prompt, the projector brings them to the width
    of the language model, and they stand in its input where the text says ``<image>``. As baselines
    any vision model of transformers takes the encoder's place (`VisionTokens`).

    Args:
        encoder: A `DiffusionEncoder`, `FusedEncoder` or `VisionTokens`, or a name that
            `DiffusionEncoder.from_pretrained` takes.
        language_model: Any causal language model of transformers that takes `inputs_embeds`, or its
            name. It needs no token for pictures.
        tokenizer: Tokenizer of the language model; a language model given by name brings its own.
            It needs no pad token.
        projector: Projector from `encoder.hidden_size` to the language model's width; None makes
            one with `projector_for`.
        template: Name of the conversation template, see `diffenc.mllm.chat.Chat`.
        system: System message, see `diffenc.mllm.chat.Chat`.
        prompt_policy: Policy that makes the encoder's prompt from the conversation, see
            `diffenc.inputs.policies.parse_policy`. Its changes (noise, dropout) act in training
            alone.
        image_batch_size: Largest number of pictures per call of the encoder; None is all at once.

    Raises:
        ConfigError: A part does not fit the others, or an option is not allowed.
        BackboneError: There is no model of that name.

    Examples:
        >>> vlm = DiffusionVLM("shapes", "shapes-lm")  # its projector is not trained yet
        >>> answers = vlm.generate([circle, square], ["what color is it?", "what shape is it?"])
        >>> len(answers)
        2

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
        check_encoder(encoder)
        self.encoder = encoder
        self.language_model = language_model
        self.tokenizer = tokenizer
        self.chat = Chat(tokenizer, template, system=system)
        policy = parse_policy(prompt_policy) if isinstance(prompt_policy, str) else prompt_policy
        self.prompt_policy = policy
        if image_batch_size is not None:
            image_batch_size = whole("image_batch_size", image_batch_size, least=1)
        self.image_batch_size = image_batch_size
        width = width_of(language_model)
        if projector is None:
            reader: Any = encoder
            projector = projector_for(reader, width)
        self.projector = projector
        make_plain(self)
        if projector.out_features != width:
            raise ConfigError(
                f"the projector gives {projector.out_features} channels and the language model "
                f"takes {width}; make it with projector_for(encoder, {width})"
            )
        if getattr(projector, "grid", None) is not None:
            check_square(encoder)

    @classmethod
    @lasting
    def from_pretrained(
        cls,
        folder: "str | os.PathLike[str]",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        trainable: bool = False,
        language_model: Any = None,
        **encoder_options: Any,  # of DiffusionEncoder.from_pretrained, which checks their names
    ) -> "DiffusionVLM":
        """Inverse of `save_pretrained`.

        Args:
            folder: Folder that `save_pretrained` wrote.
            device: Device of the model.
            dtype: Floating point type of the frozen parts, or its name; the projector and the
                adapters are in float32.
            trainable: Whether saved adapters go on training.
            language_model: Replacement for the language model that was saved by its name; None
                takes that one.
            encoder_options: Options of the encoder, such as `timestep` or `guidance_scale`; they
                win over what was saved.

        Raises:
            BackboneError: The folder does not hold a whole model, or a part is missing.
            ConfigError: Another dtype.
        """
        parts, options = model_folder.load(
            folder,
            device=device,
            dtype=as_dtype(dtype),
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
            folder: Folder to write to; see `diffenc.mllm.model_folder` for what lies where.
            include_language_model: Whether to write the language model's weights too. None writes
                them where they were trained or have no name to be found by. A LoRA adapter is
                written in any case.

        Raises:
            OutputError: The folder cannot be written.
        """
        model_folder.save(self, folder, include_language_model)

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
        if backbone is not None and any(p.requires_grad for p in backbone.denoiser.parameters()):
            backbone.denoiser.enable_gradient_checkpointing()

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
            input_ids: Token ids with `diffenc.mllm.chat.IMAGE_ID` for each picture, padded.
            attention_mask: Mask that is 0 where padding stands; None is no padding.
            images: Pictures of each sample: one, several, or none.
            prompts: Prompts of the encoder, one per sample; all pictures of a sample share it.
            labels: Labels in the shape of `input_ids`, `IGNORE_ID` where nothing is learnt.
            image_tokens: Tokens that `encode_images` gave for every picture in order, in place of
                `images` and `prompts`.
            num_items_in_batch: Number by which the summed loss is divided; None is the number of
                labels.

        Returns:
            transformers' `CausalLMOutput`. Its logits count the pictures' tokens too.

        Raises:
            ShapeError: Pictures and their places in the texts differ in number, or a sample is
                longer than the context.
            PromptError: Prompts and samples differ in number.
            ConfigError: Tokens of pictures, and pictures or prompts beside them.
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
        trained = [p for part in parts for p in part.parameters() if p.requires_grad]
        return sum((p.float().sum() * 0 for p in trained), start=0.0)

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
            images: Pictures of each question: one, a list of several, or None. A single question
                may come with its picture or pictures alone.
            questions: One question or several; each is a text, or a conversation in LLaVA's format
                that ends with the human's turn. Where a text has no ``<image>``, its pictures come
                before it.
            prompts: Prompts of the encoder, one for all questions or one each; None asks
                `prompt_policy`, whose captions are left out, as none is known yet.
            max_new_tokens: Largest number of tokens of an answer.
            do_sample: Whether to sample tokens instead of taking the likeliest.
            options: Further arguments of transformers' `generate`, such as `num_beams`.

        Returns:
            One answer per question, without special tokens.

        Raises:
            PromptError: Questions, pictures and prompts differ in number.
            ShapeError: More tokens than the context holds.
            NonFiniteError: The projector or the language model gave NaN.
            ConfigError: An option that gives something else than one answer per question.
        """
        own = self.language_model.generation_config
        _check_single(options, options.get("generation_config") or own)
        question_texts, shown = samples_of(images, questions)
        turns = [
            with_marks(each, len(own)) for each, own in zip(question_texts, shown, strict=True)
        ]
        texts = prompts_of(self.prompt_policy, turns, prompts)
        encoded = [self.chat.encode(each) for each in turns]
        ids, mask = pad(encoded, self.device)
        with self._evaluating():
            spliced = self._embed(ids, mask, shown, texts, side="left", more=max_new_tokens)
            rows = self.language_model.generate(
                inputs_embeds=spliced.inputs_embeds,
                attention_mask=spliced.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=do_sample,
                logits_processor=[_require_numbers, *(options.pop("logits_processor", None) or [])],
                **{
                    "pad_token_id": filler_id(self.tokenizer),
                    "eos_token_id": ends_of(
                        options.get("generation_config") or own, self.tokenizer
                    ),
                    **options,
                },
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
            images: One picture or several.
            prompts: Prompts of the encoder, one for all pictures or one each; None is the empty
                prompt, as a caption is not yet known.
            request: Question that asks for a caption; the template "plain" leaves it out.
            options: Further arguments of `generate`.
        """
        pictures = as_list(images)
        return self.generate(
            [[picture] for picture in pictures],
            [request] * len(pictures),
            "" if prompts is None else prompts,
            **options,
        )

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        with lock_of(self):  # its mode is that of all threads
            modes = {module: module.training for module in self.modules()}
            self.eval()
            try:
                yield
            finally:
                for module, was_training in modes.items():
                    module.training = was_training


def _check_single(options: Mapping[str, Any], config: Any) -> None:
    """Raise a `ConfigError` where transformers would give more than one row per question.

    Args:
        options: Arguments of transformers' `generate`.
        config: Generation config, which has what is not among them.
    """
    for name, usual in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        value = options.get(name, getattr(config, name, None))
        if value not in (None, usual):
            raise ConfigError(
                f"{name}={value!r} gives something else than one answer per question; leave it "
                "out, here and in the generation config, and ask a question as often as there "
                "shall be answers"
            )


def _require_numbers(_: Tensor, scores: Tensor) -> Tensor:
    """Scores of the next token as they are; minus infinity rules one out, NaN would choose any."""
    if bool(scores.isnan().any()):
        raise NonFiniteError(
            f"the language model gave NaN in {scores.dtype}; check its weights, or load it in "
            "bfloat16 or float32"
        )
    return scores


def _loss(logits: Tensor, labels: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross-entropy of the next token where there is a label, in float32."""
    targets = labels[:, 1:]
    learnt = targets != IGNORE_ID
    summed = F.cross_entropy(logits[:, :-1][learnt].float(), targets[learnt], reduction="sum")
    if count is None:
        return summed / learnt.sum().clamp(min=1)
    if isinstance(count, Tensor):
        return summed / count.to(summed.device).clamp(min=1)
    return summed / max(count, 1)

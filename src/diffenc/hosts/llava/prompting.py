"""Prompts through the calls of LLaVA's model: its `forward`, its `generate`, its tower.

A prompt comes with a sample. Only `prepare_inputs_labels_for_multimodal` knows which images, and
which of their tiles, belong to a sample; it is where prompts are dealt out, and it is asked in
which order it shows them to the tower (`ownership`).
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffenc.errors import ConfigError, PromptError
from diffenc.hosts.installed_towers import number_of_towers, towers_of
from diffenc.hosts.llava.layout import SPLICE
from diffenc.hosts.llava.ownership import owners_of_rows
from diffenc.hosts.llava.patches import Patches
from diffenc.hosts.prompts import Prompts, PromptTokens, current_scope, prompt_scope
from diffenc.inputs.policies import strip_template

IMAGE_TOKEN = -200
IDS, MASK = "vision_prompt_ids", "vision_prompt_mask"
_USER_TURN = re.compile(r"USER:|HUMAN:|### ?Human:|<\|im_start\|>user|\[INST\]|<\|user\|>")
_ANSWER = re.compile(r"ASSISTANT:|GPT:|### ?Assistant:|<\|im_start\|>assistant|\[/INST\]")

TextOf = Callable[[Tensor], str]


def take_prompts(
    target: Any, *, text_of: TextOf | None = None, patches: Patches | None = None
) -> Any:
    """Let a model of LLaVA's kind take `vision_prompt_ids` and `vision_prompt_mask`.

    Both go to `forward` and `generate`, one row per sample (`tower.tokenize` makes them); without
    them a `prompt_scope` around the call counts, then `text_of`.

    Args:
        target: Model, which gets a class of its own by the same name, or a class, which is changed
            in place.
        text_of: Function that makes the prompt of a sample from its input ids (without padding;
            images are -200), for programs that call `generate(input_ids, images=...)` and no more;
            see `question_of`.
        patches: Record of what was changed, to undo it.

    Returns:
        The target.

    Raises:
        ConfigError: It has no `prepare_inputs_labels_for_multimodal` that takes `input_ids` and
            `images`, or it is a model whose tower is not diffenc's.
    """
    owner = target if isinstance(target, type) else type(target)
    _require_takeable(target, owner)
    if not isinstance(target, type) and not getattr(owner, "_takes_vision_prompts", False):
        owner = type(owner.__name__, (owner,), {"__module__": owner.__module__})
        target.__class__ = owner
    patches = patches or Patches()
    if not getattr(owner, "_takes_vision_prompts", False):
        for name, wrap in (
            ("forward", _forward),
            ("generate", _generate),
            ("prepare_inputs_for_generation", _next_inputs),
            (SPLICE, _prepare),
        ):
            patches.set(owner, name, wrap(getattr(owner, name)))
        patches.set(owner, "_takes_vision_prompts", True)
    if text_of is not None:
        holder = owner if isinstance(target, type) else target
        patches.set(
            holder, "_vision_text_of", staticmethod(text_of) if holder is owner else text_of
        )
    return target


def _require_takeable(target: Any, owner: type) -> None:
    splice = getattr(owner, SPLICE, None)
    if splice is None:
        raise ConfigError(
            f"{owner.__name__} has no {SPLICE}, so it is no model of LLaVA's kind; pass prompts "
            "to its tower yourself, or open diffenc.hosts.prompts.prompt_scope"
        )
    missing = {"input_ids", "images"} - set(inspect.signature(splice).parameters)
    if missing:
        raise ConfigError(
            f"{owner.__name__}.{SPLICE} takes no {' and no '.join(sorted(missing))}, by which "
            "prompts are dealt out; open diffenc.hosts.prompts.prompt_scope around the tower's call"
        )
    if isinstance(target, type):
        return
    present = getattr(target, "get_vision_tower", lambda: None)()
    if next(towers_of(target), None) is None and present is not None:
        raise ConfigError(
            f"the vision tower of this {owner.__name__} is a {type(present).__name__}, which reads "
            "no prompts; build it from a name that begins with 'diffenc:'"
        )


def question_of(tokenizer: Any) -> TextOf:
    """A `text_of` for `take_prompts`: the last question of a conversation, without its template.

    Args:
        tokenizer: Tokenizer of the language model.
    """

    def text_of(input_ids: Tensor) -> str:
        words = input_ids[input_ids >= 0].tolist()
        text: str = tokenizer.decode(words, skip_special_tokens=True)
        turn = _USER_TURN.split(text)[-1]
        return strip_template(_ANSWER.split(turn)[0])

    return text_of


def _with_prompt_parameters(wrapper: Any, original: Any) -> Any:
    """Transformers checks what `generate` is given against the signature of `forward`."""
    signature = inspect.signature(original)
    kinds = inspect.Parameter
    parameters = list(signature.parameters.values())
    rest = [p for p in parameters if p.kind is kinds.VAR_KEYWORD]
    added = [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in (IDS, MASK)]
    kept = [p for p in parameters if p.kind is not kinds.VAR_KEYWORD]
    wrapper.__signature__ = signature.replace(parameters=[*kept, *added, *rest])
    return wrapper


def _forward(original: Any) -> Any:
    @functools.wraps(original)
    def forward(
        self: Any,
        *args: Any,
        vision_prompt_ids: Tensor | None = None,
        vision_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        with _samples(vision_prompt_ids, vision_prompt_mask):
            return original(self, *args, **kwargs)

    return _with_prompt_parameters(forward, original)


def _generate(original: Any) -> Any:
    # LLaVA's own `generate` asks the tower once and repeats what it gives. Older ones hand the
    # images to transformers, which repeats them for beams: so must the prompts be.
    repeats = getattr(original, "__module__", "").startswith("transformers")

    @functools.wraps(original)
    def generate(
        self: Any,
        *args: Any,
        vision_prompt_ids: Tensor | None = None,
        vision_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        with _samples(vision_prompt_ids, vision_prompt_mask):
            if not repeats:
                return original(self, *args, **kwargs)
            inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            tokens = _sample_tokens(self, list(inputs) if inputs is not None else [])
        if tokens is None or inputs is None:
            return original(self, *args, **kwargs)
        tokens = tokens.rows(len(inputs)).to(inputs.device)
        with prompt_scope(None):
            return original(self, *args, **kwargs, **{IDS: tokens.ids, MASK: tokens.mask})

    return _with_prompt_parameters(generate, original)


def _next_inputs(original: Any) -> Any:
    @functools.wraps(original)
    def prepare_inputs_for_generation(
        self: Any,
        *args: Any,
        vision_prompt_ids: Tensor | None = None,
        vision_prompt_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        inputs = original(self, *args, **kwargs)
        if vision_prompt_ids is not None:
            inputs.update({IDS: vision_prompt_ids, MASK: vision_prompt_mask})
        return inputs

    return _with_prompt_parameters(prepare_inputs_for_generation, original)


def _prepare(original: Any) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def prepare_inputs_labels_for_multimodal(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        arguments = call.arguments
        images: Any = arguments.get("images")
        input_ids = arguments["input_ids"]
        scope = current_scope()
        decodes = images is None or input_ids is None or input_ids.shape[1] == 1
        if decodes or (scope is not None and scope.per == "image"):
            return original(self, *args, **kwargs)
        samples = _unpadded(input_ids, arguments.get("attention_mask"))
        labels = arguments.get("labels")
        prompted = samples if labels is None else _before_answers(samples, labels, arguments)
        tokens = _sample_tokens(self, prompted)
        if tokens is None:
            return original(self, *args, **kwargs)
        rows = tokens.rows(len(samples))
        # Hosts of several towers are given a batch of pictures for each of them.
        per_tower = isinstance(images, list) and number_of_towers(self) == len(images)
        owners = _sample_of_each_image(samples, images[0] if per_tower else images)
        if rows.all_equal():
            with prompt_scope(rows.take([0]), per="image"):
                return original(self, *args, **kwargs)
        order = owners_of_rows(original, call, owners, per_tower=per_tower)
        with prompt_scope(rows.take_or_none(order), per="image", calls=1):
            return original(self, *args, **kwargs)

    return prepare_inputs_labels_for_multimodal


@contextmanager
def _samples(ids: Tensor | None, mask: Tensor | None) -> Iterator[None]:
    """The scope of prompts that were passed; the one around the call where there are none."""
    if ids is None and mask is None:
        yield
        return
    if ids is None or mask is None:
        raise PromptError(f"{IDS} and {MASK} go together, as tower.tokenize makes them; got one")
    tokens = PromptTokens(ids, mask)
    with prompt_scope(tokens, per="sample"):
        yield


def _sample_tokens(model: Any, samples: list[Tensor]) -> PromptTokens | None:
    """A row per sample, or one for all: the scope's, else what `text_of` makes."""
    scope, text_of = current_scope(), getattr(model, "_vision_text_of", None)
    prompts: Prompts | None = None if scope is None else scope.prompts
    if prompts is None and text_of is not None and samples:
        prompts = [text_of(sample) for sample in samples]
    if prompts is None:
        return None
    tower = next(towers_of(model), None)
    if tower is None:
        present = getattr(model, "get_vision_tower", lambda: None)()
        raise PromptError(
            f"prompts were given, and the vision tower is a {type(present).__name__}, which reads "
            "none; build it from a name that begins with 'diffenc:'"
        )
    return tower.tokenize(prompts)


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if attention_mask is None:
        return list(input_ids)
    return [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]


def _before_answers(samples: list[Tensor], labels: Tensor, arguments: Any) -> list[Tensor]:
    """Samples up to the first label that is learnt: a prompt must not tell the answer."""
    targets = _unpadded(labels, arguments.get("attention_mask"))
    cut = []
    for ids, target in zip(samples, targets, strict=True):
        learnt = (target >= 0).nonzero()
        cut.append(ids[: int(learnt[0])] if len(learnt) else ids)
    return cut


def _sample_of_each_image(samples: list[Tensor], images: "Tensor | list[Tensor]") -> list[int]:
    """The sample that each entry of `images` belongs to."""
    # A sample without an image has a stand-in, whose features the host cuts to nothing.
    counts = [max(1, int((ids == IMAGE_TOKEN).sum())) for ids in samples]
    owners = [sample for sample, count in enumerate(counts) for _ in range(count)]
    if len(owners) != len(images):
        raise PromptError(
            f"the samples ask for {len(owners)} images ({counts} each) and {len(images)} were "
            "given, so it is not known which prompt belongs to which"
        )
    return owners

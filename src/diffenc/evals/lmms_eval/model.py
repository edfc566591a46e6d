"""The model that lmms-eval runs as ``--model diffenc``."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffenc.errors import ConfigError, near_matches
from diffenc.evals.items import check_positive
from diffenc.evals.lmms_eval.answering import Answering
from diffenc.evals.lmms_eval.generation import Generation
from diffenc.evals.lmms_eval.opening import open_model
from diffenc.evals.lmms_eval.requests import Sample, SampleReader
from diffenc.models.device import named_device, named_dtype
from diffenc.storage.writing import append_json_line

try:
    from lmms_eval.api.model import lmms
except ImportError:  # requests can be read and answered without it
    lmms = object

_OPTIONS = (
    *("pretrained", "prompt", "question_field", "guidance_scale", "max_new_tokens", "dtype"),
    *("log_prompts", "conv_template", "model_base", "model_name", "package"),
    *("batch_size", "device"),
)


class DiffencModel(lmms):  # type: ignore[misc]  # lmms-eval is untyped
    """A multimodal model with a diffusion encoder that reads each request's question.

    Args:
        pretrained: Folder of the model, see `diffenc.evals.lmms_eval.opening.open_model`.
        prompt: Prompt policy of the vision encoder: "question" or "empty"; None takes that of the
            model's training.
        question_field: Column of the task's documents with the bare question, from which prompts
            are made; None makes them of all the text that the language model reads.
        guidance_scale: Guidance scale s of the features f_u + s (f_c - f_u); None leaves it as it
            was trained.
        max_new_tokens: Largest number of tokens of an answer, whatever the task says; None leaves
            it to the task and to the context of the language model.
        dtype: Floating point type: float32, bfloat16 or float16.
        log_prompts: JSON lines file to which every request is appended with its prompt and its
            answer; None writes nothing.
        conv_template: Conversation template of LLaVA's own package.
        model_base: Language model below a checkpoint of LLaVA's own package.
        model_name: Name by which LLaVA's own package tells what to load.
        package: Name of the module of LLaVA's own package.
        batch_size: Largest number of requests that are answered at once.
        device: Device: "cpu", "cuda:1"; "auto" is CUDA where there is one.
        max_batch_size: Passed by lmms-eval; ignored.
        unknown: Other options, which are refused.

    Raises:
        ConfigError: An option is unknown or not allowed.
        BackboneError: The folder holds no model of diffenc.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        *,
        prompt: str | None = None,
        question_field: str | None = None,
        guidance_scale: float | None = None,
        max_new_tokens: int | None = None,
        dtype: str = "float32",
        log_prompts: str | None = None,
        conv_template: str | None = None,
        model_base: str | None = None,
        model_name: str | None = None,
        package: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        _refuse_unknown(unknown)
        if max_new_tokens is not None:
            check_positive(max_new_tokens=max_new_tokens)
        self.batch_size = _batch_size(batch_size)
        self.device = self._place(device)
        self.model: Answering | None = open_model(
            str(pretrained),
            device=self.device,
            dtype=named_dtype(dtype),
            guidance_scale=None if guidance_scale is None else float(guidance_scale),
            conv_template=conv_template,
            model_base=model_base,
            model_name=model_name,
            package=package,
        )
        self.reader = SampleReader(prompt or self.model.prompt_policy, question_field)
        self._most, self._log = max_new_tokens, log_prompts

    def _place(self, device: str | None) -> Any:
        """Device of this process: its own one where accelerate started several."""
        from accelerate import Accelerator

        accelerator = Accelerator()
        if accelerator.num_processes == 1:
            return named_device(device or "auto")
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        return accelerator.device

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests, in their order.

        Args:
            requests: Requests of lmms-eval, whose `args` are a text, the function that makes
                messages of a document, generation arguments, and number, task and split of the
                document.

        Raises:
            DiffencError: A request cannot be answered; the message names its task and document.
        """
        answers: dict[int, str] = {}
        with _progress(len(requests), quiet=getattr(self, "_rank", 0) != 0) as step:
            for generation, indices in self._batches(requests):
                samples = {index: self._sample(requests[index].args) for index in indices}
                for fitted, part in self._fitting(generation, samples):
                    for index, answer in zip(part, self._answer(fitted, part), strict=True):
                        answers[index] = answer
                step(len(indices))
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        """Refuse: likelihoods of given answers are not computed."""
        raise NotImplementedError(
            "models of diffenc generate answers and give no likelihoods; choose the variant of the "
            "task whose output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        """Refuse: questions that follow on answers are not asked."""
        raise NotImplementedError(
            "models of diffenc answer one round; leave tasks of output_type "
            "generate_until_multi_round out"
        )

    def clean(self) -> None:
        """Free the memory of the model; lmms-eval calls it after the last request."""
        self.model = None
        super().clean()  # the accelerator's and CUDA's

    @property
    def _answering(self) -> Answering:
        assert self.model is not None, "the model was cleaned"
        return self.model

    def _batches(self, requests: Sequence[Any]) -> Iterator[tuple[Generation, list[int]]]:
        """Numbers of requests with equal generation arguments, at most `batch_size` together."""
        groups: defaultdict[Generation, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[Generation.of_task(request.args[2], most=self._most)].append(index)
        for generation, indices in groups.items():
            for start in range(0, len(indices), self.batch_size):
                yield generation, indices[start : start + self.batch_size]

    def _sample(self, arguments: Sequence[Any]) -> Sample:
        _, messages_of, _, number, task, split = arguments
        document = self.task_dict[task][split][number]
        return self.reader.read(messages_of(document), document, task=task, number=number)

    def _fitting(
        self, generation: Generation, samples: Mapping[int, Sample]
    ) -> list[tuple[Generation, dict[int, Sample]]]:
        """Samples by the length of answer that the context leaves each of them."""
        parts: defaultdict[Generation, dict[int, Sample]] = defaultdict(dict)
        for index, sample in samples.items():
            room = self._answering.room(sample.turns, sample.pictures)
            parts[generation.within(room)][index] = sample
        return list(parts.items())

    def _answer(self, generation: Generation, samples: Mapping[int, Sample]) -> list[str]:
        batch = list(samples.values())
        texts = self._answering.generate(
            [sample.pictures for sample in batch],
            [sample.turns for sample in batch],
            [sample.prompt for sample in batch],
            max_new_tokens=generation.max_new_tokens,
            **dict(generation.options),
        )
        answers = [generation.ended(text) for text in texts]
        if self._log is not None:
            for sample, answer in zip(batch, answers, strict=True):
                append_json_line(self._log, _logged(sample, answer))
        return answers


def _logged(sample: Sample, answer: str) -> dict[str, Any]:
    return {
        "task": sample.task,
        "doc_id": sample.document,
        "pictures": len(sample.pictures),
        "question": sample.question,
        "prompt": sample.prompt,
        "answer": answer,
    }


def _refuse_unknown(unknown: Mapping[str, Any]) -> None:
    if unknown:
        name = next(iter(unknown))
        raise ConfigError(
            f"unknown model argument {name!r}; known are {', '.join(_OPTIONS)}."
            f"{near_matches(name, _OPTIONS)}"
        )


def _batch_size(value: int | str) -> int:
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(
            f"batch_size must be a number, got {value!r}: a batch that fits is not searched for"
        ) from None
    check_positive(batch_size=number)
    return number


@contextmanager
def _progress(total: int, *, quiet: bool) -> Iterator[Callable[[int], Any]]:
    """A bar of the kind that lmms-eval shows; its function takes the number of new answers."""
    from tqdm import tqdm

    with tqdm(total=total, disable=quiet, desc="Model Responding") as bar:
        yield bar.update

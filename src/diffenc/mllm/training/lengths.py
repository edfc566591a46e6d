"""How long the samples of a run are: measured in its data, or assumed where none is looked at."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffenc.errors import BackboneError
from diffenc.inputs.policies import parse_policy
from diffenc.mllm.chat import Chat
from diffenc.mllm.language import load_tokenizer
from diffenc.mllm.training.config import TrainConfig
from diffenc.mllm.training.data import DataReport, TrainSample, check_data

ASSUMED_TEXT = {"align": (25, 128), "instruct": (250, None)}
"""Tokens of a sample's text, by stage, where no data is looked at: the mean, and the most. None is
as many as a sample may have, which the longest conversations of LLaVA's data reach."""
_SAMPLED = 500
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Lengths:
    """Samples of a run.

    Attributes:
        report: Report of the samples.
        samples: Number of tokens of the text and number of pictures, of samples evenly spread.
        most_text: Number of tokens of the longest text; infinity is as many as a sample may have.
        estimated: Whether tokens are estimated from letters, as the tokenizer was not available.
    """

    report: DataReport
    samples: list[tuple[int, int]]
    most_text: float
    estimated: bool = False

    def longest(self, tokens: int) -> float:
        """Number of tokens of the longest sample, where a picture takes so many."""
        shown = max(length + pictures * tokens for length, pictures in self.samples)
        return max(shown, self.most_text + tokens)


def measured(config: TrainConfig, looking: Callable[[int, int], None] | None) -> Lengths:
    """Check the data of a run and measure its samples.

    Args:
        config: Config of the run.
        looking: Function that is called with the number of pictures looked at so far, and with the
            number of all.

    Raises:
        ConfigError: The data cannot be used.
    """
    policy = parse_policy(config.data.prompts)
    samples, report = check_data(config.data, policy, progress=looking)
    lengths, estimated = _text_lengths(config, samples)
    return Lengths(report, lengths, -math.inf, estimated)


def assumed(config: TrainConfig, samples: int) -> Lengths:
    """So many samples with a picture each, and a text as `ASSUMED_TEXT` says."""
    mean, most = ASSUMED_TEXT[config.stage]
    report = DataReport(samples=samples, images=samples)
    return Lengths(report, [(mean, 1)], math.inf if most is None else most)


def _text_lengths(
    config: TrainConfig, samples: list[TrainSample]
) -> tuple[list[tuple[int, int]], bool]:
    """(Tokens of the text, pictures) of samples evenly spread; whether they are a guess."""
    some = samples[:: max(1, len(samples) // _SAMPLED)]
    try:
        chat = Chat(
            load_tokenizer(config.model.language_model),
            config.model.template,  # type: ignore[arg-type]  # checked by the config
        )
    except (OSError, ValueError, BackboneError):
        guessed = [
            sum(len(turn["value"]) for turn in sample.conversation) // _CHARACTERS_PER_TOKEN + 1
            for sample in some
        ]
        return [(n, len(s.images)) for n, s in zip(guessed, some, strict=True)], True
    encoded = [chat.encode(sample.conversation) for sample in some]
    return [(len(each.input_ids) - each.num_images, each.num_images) for each in encoded], False

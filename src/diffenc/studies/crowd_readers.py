"""Readers of a picture's tokens that answer questions about one object or two."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffenc.shapes.scenes import COLORS, SHAPES
from diffenc.studies.crowd_trials import ANSWERS, CROWD_PROPERTIES, CrowdQuestion, CrowdTrial
from diffenc.studies.token_readers import Reader, TokenRows, descend, shuffled

HEADS = 2
"""Attentions of a reader: a question names two objects at most."""

_WORDS: tuple[str, ...] = (*CROWD_PROPERTIES, *COLORS, *SHAPES)
_BATCH, _RATE, _DECAY = 64, 5e-2, 0.3
_LENGTH = 4.0  # of a standardised token, whatever its number of channels
_START = 0.02  # of queries: equal heads would stay equal


@dataclass(frozen=True, slots=True)
class CrowdQuestions:
    """Questions to crowded scenes: row 4 s + k is about property k of scene s.

    Attributes:
        questions: The question of each row.
        labels: Index of the right answer, counted through the answers of all properties.
        words: For each reader what it knows of a row, as 1 for each known word of each attention:
            the property alone for "blind", also the names of the objects for "told".
        allowed: Whether a property has an answer, for each property and answer.
    """

    questions: tuple[CrowdQuestion, ...]
    labels: Int[Tensor, " rows"]
    words: dict[Reader, Float[Tensor, "rows heads words"]]
    allowed: Bool[Tensor, "properties answers"]

    @classmethod
    def of(cls, trials: Sequence[CrowdTrial]) -> "CrowdQuestions":
        """The questions to these scenes."""
        questions = tuple(question for trial in trials for question in trial.questions)
        counts = [len(ANSWERS[name]) for name in CROWD_PROPERTIES]
        first = [sum(counts[:k]) for k in range(len(counts) + 1)]
        starts = dict(zip(CROWD_PROPERTIES, first, strict=False))
        place: dict[str, Any] = {"dtype": torch.long, "device": "cpu"}
        answers = torch.arange(first[-1], **place)
        labels = [starts[question.asks] + question.label for question in questions]
        shape = (len(questions), HEADS, len(_WORDS))
        words: dict[Reader, Tensor] = {
            reader: torch.zeros(shape, dtype=torch.float32, device="cpu")
            for reader in ("told", "blind")
        }
        for row, question in enumerate(questions):
            for known in words.values():
                known[row, :, _WORDS.index(question.asks)] = 1
            for head in range(HEADS):
                for name in question.names[min(head, len(question.names) - 1)]:
                    words["told"][row, head, _WORDS.index(name)] = 1
        return cls(
            questions,
            torch.tensor(labels, **place),
            words,
            torch.stack([(answers >= a) & (answers < b) for a, b in pairwise(first)]),
        )

    def masked(
        self, logits: Float[Tensor, "n answers"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, "n answers"]:
        """Logits without the answers that make no sense."""
        return logits.masked_fill(~self.allowed[rows % len(CROWD_PROPERTIES)], float("-inf"))


class CrowdReader(nn.Module):
    """Linear reader of answers that attends to the tokens once for each object of a question.

    Tokens are expected standardised, see `standardised`.

    The query of an attention is the sum of those of the words that are known of the question, so
    that names which were never seen together can be looked for. Beside what a token holds, its
    index counts, as in a language model with positions. Every attention begins nearly even.

    Args:
        channels: Number of channels of a token.
        tokens: Number of tokens of a picture.
        answers: Number of different answers.
        seed: Seed of the initial queries.
    """

    def __init__(self, channels: int, *, tokens: int, answers: int, seed: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        source = torch.Generator("cpu").manual_seed(seed)
        queries = torch.randn(len(_WORDS), HEADS, channels, generator=source, **place)
        self.query = nn.Parameter(_START * queries)
        self.slot = nn.Parameter(torch.zeros(len(CROWD_PROPERTIES), HEADS, tokens, **place))
        self.value = nn.Parameter(torch.zeros(answers, HEADS, channels, **place))
        self.prior = nn.Parameter(torch.zeros(answers, **place))

    def forward(
        self, tokens: Float[Tensor, "b n c"], words: Float[Tensor, "b heads words"]
    ) -> Float[Tensor, "b answers"]:
        """Logits of the answers."""
        queries = einsum(words, self.query, "b h w, w h c -> b h c")
        asks = words[:, 0, : len(CROWD_PROPERTIES)].argmax(dim=1)
        scores = einsum(tokens, queries, "b n c, b h c -> b h n") + self.slot[asks]
        gathered = einsum(scores.softmax(dim=2), tokens, "b h n, b n c -> b h c")
        return einsum(gathered, self.value, "b h c, answers h c -> b answers") + self.prior


def standardised(tokens: TokenRows, groups: Sequence[int], *, split: int) -> TokenRows:
    """Tokens whose channels have mean 0 and whose groups of channels have equal lengths.

    Without groups a place of few channels would be drowned by features of many.

    Args:
        tokens: Tokens of all rows.
        groups: Widths of neighbouring groups of channels.
        split: Number of rows that mean and deviation are taken over, counted from the first.
    """
    mean, deviation = tokens.statistics(split)
    place: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    lengths = [
        torch.full((width,), _LENGTH / (width * len(groups)) ** 0.5, **place) for width in groups
    ]
    scale = torch.cat(lengths) / deviation.clamp_min(1e-6)
    (source,) = tokens.sources
    return TokenRows(((source.float() - mean) * scale,), tokens.rows)


def read_answers(
    tokens: TokenRows,
    questions: CrowdQuestions,
    reader: Reader,
    *,
    groups: Sequence[int],
    split: int,
    start: int | None = None,
    epochs: int,
    seed: int,
) -> Int[Tensor, " rest"]:
    """Answers of a reader that is fitted to the first rows, to the others.

    Args:
        tokens: Tokens of all rows.
        questions: Questions of all rows.
        reader: Kind of reader, which says what it knows of a question: "told" or "blind".
        groups: Widths of groups of channels that count alike: features, and places.
        split: Number of rows to fit, counted from the first.
        start: First of the rows that are answered, `split` or more; None takes `split`.
        epochs: Number of passes over the rows to fit.
        seed: Seed of the initial queries and of the order of rows.

    Returns:
        Index of the answer to each row from `start` on, counted as `CrowdQuestions.labels`.
    """
    tokens = standardised(tokens, groups, split=split)
    (source,), each = tokens.sources, tokens.rows // len(tokens.sources[0])
    model = CrowdReader(
        sum(groups),
        tokens=source.shape[1],
        answers=questions.allowed.shape[1],
        seed=seed,
    )
    batches = shuffled(split, _BATCH, epochs=epochs, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=len(batches))
    words = questions.words[reader]

    def logits(rows: Tensor) -> Tensor:
        return questions.masked(model(source[rows // each], words[rows]), rows)

    descend(
        optimizer,
        schedule,
        batches,
        lambda rows: F.cross_entropy(logits(rows), questions.labels[rows]),
    )
    start = split if start is None else start
    rest = torch.arange(start, tokens.rows, dtype=torch.long, device="cpu")
    with torch.no_grad():
        return torch.cat([logits(part).argmax(dim=1) for part in rest.split(4 * _BATCH)])

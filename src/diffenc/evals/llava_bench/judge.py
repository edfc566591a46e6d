"""Judges that compare an answer with a reference: a service, a local model, or words alone."""

import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any, Protocol, runtime_checkable

from diffenc.errors import ConfigError, DiffencError
from diffenc.evals.leakage.readout import content_words
from diffenc.storage.names import printable
from diffenc.storage.reading import CONFIG_BYTES, decode, parse_json

RULE = (
    "Two assistants, {role} 1 and {role} 2, answered the question above about a picture. You "
    "cannot see the picture; the context describes it. Compare the answers for being right, "
    "relevant, detailed and helpful, and give each a whole number from 1 (worst) to 10 (best). "
    "The order in which they stand must not matter. Write the two numbers alone on the first "
    "line, {role} 1 first, with a space between them; explain them on the lines after it."
)
"""The instruction where LLaVA's own `rule.json` is not at hand."""

SYSTEM = "You compare answers carefully and without bias."

_SCORE = r"([0-9]{1,9}(?:\.[0-9]{1,9})?)"
_TWO_SCORES = re.compile(rf"{_SCORE}(?:[ \t]*,[ \t]*|[ \t]+){_SCORE}\.?")  # "1. 8" is a list
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class JudgeError(DiffencError, RuntimeError):
    """A judge did not answer, or not with two scores; worth another attempt."""


@dataclass(frozen=True, slots=True)
class Case:
    """Question with two answers that a judge compares.

    Attributes:
        context: Description of the picture, which the judge does not see.
        question: Question that was asked.
        reference: Reference answer, which stands first.
        candidate: Answer of the model, which stands second.
        rule: Instruction of the judge.
        role: Name that both who answer are given, followed by 1 or 2.
    """

    context: str
    question: str
    reference: str
    candidate: str
    rule: str
    role: str = "Assistant"

    @property
    def prompt(self) -> str:
        """The case as one text, in the order and with the marks of the released evaluation."""
        one, two = f"{self.role} 1", f"{self.role} 2"
        return (
            f"[Context]\n{self.context}\n\n[Question]\n{self.question}\n\n"
            f"[{one}]\n{self.reference}\n\n[End of {one}]\n\n"
            f"[{two}]\n{self.candidate}\n\n[End of {two}]\n\n[System]\n{self.rule}\n\n"
        )


@runtime_checkable
class Judge(Protocol):
    """Gives two scores.

    Attributes:
        name: Name of the judge in tables and files; numbers of different judges do not compare.
        description: Everything that the scores depend on, as JSON values.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def description(self) -> Mapping[str, Any]: ...  # noqa: D102

    def review(self, case: Case) -> str:
        """A text whose first line holds the scores of reference and candidate, 1 to 10.

        Raises:
            JudgeError: No answer for now.
        """
        ...


@dataclass(frozen=True)
class FunctionJudge:
    """Any function from the prompt to a reply, such as a local language model.

    Attributes:
        name: Name of the judge in tables and files.
        function: Function that is called with `Case.prompt` and returns the reply; if it raises
            `OSError` or `JudgeError`, the review is tried again.
        description: Everything that the scores depend on, as JSON values.
    """

    name: str
    function: Callable[[str], str]
    description: Mapping[str, Any] = field(default_factory=dict)

    def review(self, case: Case) -> str:
        """Return the reply of the function."""
        try:
            return self.function(case.prompt)
        except OSError as error:
            raise JudgeError(f"{self.name}: {error}") from error


@dataclass(frozen=True)
class WordJudge:
    """Compares content words, for the miniature: 1 to 10 by F1 with the reference, which has 10.

    Where the reference has none, as in "no", all words are compared. It knows no
    paraphrases and no photographs; it says whether the machinery works.
    """

    name: str = "words"
    description: Mapping[str, Any] = field(default_factory=lambda: {"judge": "words"})

    def review(self, case: Case) -> str:
        """Two numbers."""
        true, said = content_words(case.reference), content_words(case.candidate)
        if not true:
            texts = (case.reference, case.candidate)
            true, said = (frozenset(re.findall(r"\w+", text.lower())) for text in texts)
        both = len(true & said)
        score = 2 * both / (len(true) + len(said)) if both else 0.0
        return f"10 {1 + 9 * score:.3f}"


@dataclass(frozen=True)
class OpenAIJudge:
    """A model behind an endpoint of OpenAI's kind, `POST <url>/chat/completions`.

    The key is read from an environment variable when it is needed, and kept in no file.

    Attributes:
        model: Name of the model at the endpoint.
        url: Address of the service, without `/chat/completions`; local servers with the same
            interface work too.
        key_variable: Name of the environment variable that holds the key; if it is None or not set,
            no key is sent.
        temperature: Sampling temperature, 0.2 in the released evaluation.
        max_tokens: Largest number of tokens in the reply, 1024 in the released evaluation.
        timeout: Seconds to wait for a reply.
        options: Further fields of the request; the value None removes a field, as in
            `{"max_tokens": None, "max_completion_tokens": 1024}` for models that need that.
    """

    model: str
    url: str = "https://api.openai.com/v1"
    key_variable: str | None = "OPENAI_API_KEY"
    temperature: float = 0.2
    max_tokens: int = 1024
    timeout: float = 60.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                f"the judge's url must begin with http:// or https://, got {self.url!r}, such as "
                "http://localhost:8000/v1"
            )

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.model

    @property
    def description(self) -> Mapping[str, Any]:
        """Model and sampling; not where it runs."""
        sampling = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {"judge": self.model, **sampling, **self.options}

    def check(self) -> None:
        """Find out whether the service can be reached and takes the key; it costs nothing.

        Raises:
            ConfigError: It cannot, or does not.
        """
        request = urllib.request.Request(f"{self.url.rstrip('/')}/models", headers=self._headers())
        try:
            with urllib.request.urlopen(request, timeout=self.timeout):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 401:  # others may mean that it keeps no list of models
                raise ConfigError(
                    f"{self.url} refuses the key in {self.key_variable} (401)"
                    if self.key_variable
                    else f"{self.url} wants a key (401): name the environment variable that has it"
                ) from error
        except (OSError, ValueError, HTTPException) as error:
            raise ConfigError(f"the judge at {self.url} cannot be reached: {error}") from error

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable) if self.key_variable else None
        return {"Authorization": f"Bearer {key}"} if key else {}

    def review(self, case: Case) -> str:
        """The model's reply.

        Raises:
            JudgeError: The service is busy, cannot be reached, or replies with something else.
            ConfigError: It refuses the request: a wrong key, model or address.
        """
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": case.prompt},
        ]
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
            **self.options,
        }
        body = {name: value for name, value in body.items() if value is not None}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **self._headers()},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = decode(response.read(CONFIG_BYTES), where=self.url, error=JudgeError)
            answer = parse_json(content, where=f"the reply of {self.url}", error=JudgeError)
            reply = answer["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            with error:
                detail = error.read(300).decode("utf-8", "replace")
            if error.code in _PASSING:
                raise JudgeError(f"{self.url} replied {error.code}: {detail}") from error
            raise ConfigError(
                f"{self.url} refuses the judge {self.model!r} ({error.code}): {detail}. Look at "
                f"url, model and the key in {self.key_variable}"
            ) from error
        except JudgeError:
            raise
        except (OSError, ValueError, LookupError, TypeError, HTTPException) as error:
            raise JudgeError(f"no reply from {self.url}: {error!r}") from error
        if not isinstance(reply, str):
            raise JudgeError(f"{self.url} replied without a text")
        return reply


def read_scores(reply: str) -> tuple[float, float]:
    """The two scores that are all of the first line that is not empty: reference, then candidate.

    Raises:
        JudgeError: That line holds anything else than two numbers from 1 to 10, with spaces or a
            comma between them.

    Source:
        LLaVA's released evaluation, which takes the first line and scores others -1. It keeps such
        scores in its means, and those out of range; here the review is asked for again.
    """
    first = next((line.strip() for line in reply.split("\n") if line.strip()), "")
    match = _TWO_SCORES.fullmatch(first)
    scores = tuple(map(float, match.groups())) if match else ()
    if len(scores) != 2 or not all(1 <= score <= 10 for score in scores):
        raise JudgeError(
            "the reply does not begin with two scores from 1 to 10, alone on the first line: "
            f"{printable(first, 80)!r}"
        )
    return scores

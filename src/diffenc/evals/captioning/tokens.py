"""Captions as words, as the metrics compare them."""

import re
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from diffenc._optional import require
from diffenc.config import check_choice
from diffenc.errors import ConfigError

Tokenizer = Literal["ptb", "simple"]

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

Captions = Mapping[str, Sequence[str]]


def require_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot run here.

    Raises:
        ConfigError: No such tokenizer, or no Java for "ptb".
        MissingExtraError: pycocoevalcap is not installed.
    """
    check_choice("tokenizer", tokenizer, get_args(Tokenizer))
    if tokenizer == "ptb":
        require_java(
            "the tokenizer 'ptb'",
            "or pass tokenizer='simple' (--tokenizer simple), whose numbers differ",
        )
        require("pycocoevalcap.tokenizer.ptbtokenizer", extra="caption")


def require_java(what: str, otherwise: str) -> None:
    """Raise a `ConfigError` where there is no Java."""
    if shutil.which("java") is None:
        raise ConfigError(
            f"{what} runs in Java, and there is no 'java' on the path: install a Java runtime, "
            f"{otherwise}"
        )


def tokenize(captions: Captions, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """Each caption as lower-case words with single spaces between them, without punctuation.

    Args:
        captions: Texts by id, any number of them per id.
        tokenizer: Tokenizer to use: "ptb" is the Penn Treebank tokenizer of the published numbers,
            which needs Java; "simple" takes letters and digits, with hyphens and apostrophes inside
            words.

    Raises:
        ConfigError: The tokenizer cannot run here, or failed.
        MissingExtraError: pycocoevalcap is not installed.
    """
    plain = {
        key: [unicodedata.normalize("NFC", " ".join(text.split())) for text in texts]
        for key, texts in captions.items()
    }
    if tokenizer == "simple":
        return {
            key: [" ".join(_WORD.findall(text.lower())) for text in texts]
            for key, texts in plain.items()
        }
    require_tokenizer(tokenizer)
    module = require("pycocoevalcap.tokenizer.ptbtokenizer", extra="caption")
    rows = {key: [{"caption": text} for text in texts] for key, texts in plain.items()}
    try:
        words = module.PTBTokenizer().tokenize(rows)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(
            f"the tokenizer 'ptb' failed: {error}. It writes a file beside pycocoevalcap, which "
            "must be writable; tokenizer='simple' needs neither"
        ) from error
    if {key: len(texts) for key, texts in words.items()} != {k: len(t) for k, t in rows.items()}:
        raise ConfigError("the tokenizer 'ptb' lost captions: is its Java runtime sound?")
    return {key: list(texts) for key, texts in words.items()}

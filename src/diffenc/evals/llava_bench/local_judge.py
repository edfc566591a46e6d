"""A causal language model of transformers as a judge, on this machine."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffenc.errors import BackboneError
from diffenc.evals.items import check_positive
from diffenc.evals.llava_bench.judge import SYSTEM, Case, JudgeError
from diffenc.inputs.tokenizing import token_ids
from diffenc.mllm.language import context_of, filler_id, load_language_model
from diffenc.storage.names import expanded, is_file, is_folder
from diffenc.storage.pretrained import loading, model_config

_INSTEAD = "Pass the folder or the Hub id of a causal language model"


class LocalJudge:
    """A language model that compares answers; loaded when it is asked for the first review.

    It takes the likeliest tokens, so that asking it again changes nothing: pass `attempts=1` to
    `evaluate_llava_bench`. It is instructed by its own chat template, or without one by the bare
    text.

    Args:
        name: Path of a folder, or a Hub id, of the language model.
        max_new_tokens: Largest number of tokens in a reply; fewer if the model's context ends
            before.
        device: Device that the model runs on.
        dtype: Floating point type of the model's weights.
        before_loading: Function that is called once before the model is loaded, for example to free
            the memory of the model that is judged; None calls nothing.

    Raises:
        BackboneError: A path that is no folder of a language model.
        ConfigError: `max_new_tokens` is below 1.
    """

    def __init__(
        self,
        name: "str | os.PathLike[str]",
        *,
        max_new_tokens: int = 256,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        before_loading: Callable[[], object] | None = None,
    ) -> None:
        check_positive(max_new_tokens=max_new_tokens)
        self.source = os.fspath(name)
        folder = expanded(self.source)
        if is_folder(folder):
            self.source = str(folder)
            if not is_file(folder / "config.json"):
                raise BackboneError(
                    f"the judge's folder {folder} holds no language model: no config.json in it"
                )
        self._length, self._device, self._dtype = max_new_tokens, device, dtype
        self._before_loading = before_loading
        self._parts: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        """The last part of its path or id."""
        return Path(self.source).name

    @property
    def description(self) -> Mapping[str, Any]:
        """Precision and name of the model; other weights by that name are not noticed."""
        dtype = str(self._dtype).removeprefix("torch.")
        return {"judge": self.source, "dtype": dtype, "max_new_tokens": self._length}

    def check(self) -> None:
        """Find out whether there is such a model, without its weights.

        Raises:
            BackboneError: There is none.
        """
        with loading("a judge", self.source, instead=_INSTEAD):
            model_config(self.source)

    @torch.no_grad()
    def review(self, case: Case) -> str:
        """The model's reply.

        Raises:
            JudgeError: The case is longer than the model's context.
            BackboneError: The model cannot be loaded.
        """
        model, tokenizer = self._load()
        ids = _encode(tokenizer, f"{SYSTEM}\n\n{case.prompt}").to(model.device)
        context = context_of(model)
        room = self._length if context is None else min(self._length, context - ids.shape[1])
        if room < 1:
            raise JudgeError(
                f"{self.name} holds {context} tokens, and this case has {ids.shape[1]}"
            )
        rows = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=filler_id(tokenizer),
        )
        return str(tokenizer.decode(rows[0, ids.shape[1] :], skip_special_tokens=True))

    def _load(self) -> tuple[Any, Any]:
        if self._parts is None:
            if self._before_loading is not None:
                self._before_loading()
            model, tokenizer = load_language_model(
                self.source, device=self._device, dtype=self._dtype
            )
            self._parts = model.eval(), tokenizer
        return self._parts


def _encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids (1 t); the chat template where there is one."""
    if not getattr(tokenizer, "chat_template", None):
        return torch.tensor(token_ids(tokenizer, [text]), dtype=torch.long, device="cpu")
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
    )
    ids = token_ids(tokenizer, [tokens], special_tokens=False)
    return torch.tensor(ids, dtype=torch.long, device="cpu")

"""What a fork of LLaVA is trained on in tests: words, an untrained language model, pictures."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from diffenc.shapes import render, sample_scenes

TOWER = "diffenc:shapes?t=50&rank=4"
QUESTIONS = ["what color is the circle?", "how many stars are there?"]
WORDS = "what color is the circle star square how many stars are there ? red blue green one two a"
SMALL = {
    "vocab_size": 23,  # as many as the tokenizer has, so that loaders resize nothing
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tokenizer() -> Any:
    """Whole words, in the form in which forks load tokenizers."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    words.add_tokens(sorted(set(WORDS.split())))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def language_model(config: type, model: type, **options: Any) -> Any:
    """A fork's model of random weights, as it is before it has a tower."""
    torch.manual_seed(0)
    return model(config(**{**SMALL, **options}))


def write_base(folder: Path, config: type, model: type, **options: Any) -> None:
    """The folder of a language model, with its tokenizer."""
    tokenizer().save_pretrained(folder)
    language_model(config, model, **options).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """Pictures in `images`, and two questions about them in `data.json`."""
    entries = []
    (folder / "images").mkdir()
    for index, scene in enumerate(sample_scenes(8, seed=0)):
        render(scene).save(folder / "images" / f"{index}.png")
        turns = [
            {"from": "human", "value": f"<image>\n{QUESTIONS[index % 2]}"},
            {"from": "gpt", "value": "a red circle"},
        ]
        entries.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))

"""Make the tokenizer of the miniature language model: every word of the world whole, else bytes.

    python tools/shapes/make_lm_tokenizer.py

A word is one token, with the space before it or at the beginning of a line; any other text falls
apart into bytes, so nothing is ever unknown and decoding gives back what was encoded, letter by
letter. Writes `tokenizer.json` and `tokenizer_config.json` with a chat template, which
`PreTrainedTokenizerFast` of transformers 4 and 5 reads.
"""

import argparse
import json
import random
from pathlib import Path

from documents import ASSISTANT, END, IMAGE, USER, document
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from diffenc.shapes.scenes import sample_scene

UNKNOWN, START, PAD = "<unk>", "<bos>", "<pad>"
SPARE = tuple(f"<|reserved_{index}|>" for index in range(9))
SPECIAL = (UNKNOWN, START, END, PAD, USER, ASSISTANT, IMAGE, *SPARE)

TEMPLATE = (
    "{%- macro words(content) -%}"
    "{%- if content is string -%}{{- content -}}"
    "{%- else -%}"
    "{%- for part in content -%}"
    f"{{{{- '{IMAGE}\\n' if part['type'] == 'image' else part['text'] -}}}}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    f"{{{{- '{USER}\\n' + words(message['content']) + '\\n' -}}}}"
    "{%- elif message['role'] == 'assistant' -%}"
    f"{{{{- '{ASSISTANT}\\n' -}}}}"
    "{%- generation -%}{{- words(message['content']) + eos_token -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- raise_exception('this model knows the roles user and assistant, not ' + message['role'])"
    " -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{ASSISTANT}\\n' -}}}}{{%- endif -%}}"
)


def corpus(count: int) -> list[str]:
    """A document each of `count` scenes."""
    rng = random.Random("lm-tokenizer")
    return [document(sample_scene(rng), rng) for _ in range(count)]


def vocabulary(texts: list[str]) -> dict[str, int]:
    """Special tokens, bytes, then the words of the texts, each with and without a space before."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    split = pre_tokenizers.Sequence(
        [*(pre_tokenizers.Split(mark, "removed") for mark in (USER, ASSISTANT, END)), byte_level]
    )
    found = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    space = byte_level.pre_tokenize_str(" ")[0][0]
    bare = {piece.removeprefix(space) for piece in found}
    words = {piece for piece in bare if piece.isascii() and piece.isalpha()}
    pieces = sorted(found | words | {space + word for word in words})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*SPECIAL, *letters, *pieces])
    return {token: index for index, token in enumerate(tokens)}


def build(texts: list[str]) -> Tokenizer:
    """The tokenizer for the words of the texts; encoding puts the mark of the beginning first."""
    ids = vocabulary(texts)
    # Without merges a word is taken as a whole where the vocabulary has it, and else as bytes.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A {START}:1 $B:1",
        special_tokens=[(START, ids[START])],
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def configuration() -> dict[str, object]:
    """What both versions of transformers need to know beside the tokenizer itself."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "unk_token": UNKNOWN,
        "bos_token": START,
        "eos_token": END,
        "pad_token": PAD,
        "chat_template": TEMPLATE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/shapes-lm/tokenizer"))
    options = parser.parse_args()
    tokenizer = build(corpus(10_000))
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer.json"))
    config = json.dumps(configuration(), indent=2) + "\n"
    (options.output / "tokenizer_config.json").write_text(config, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()

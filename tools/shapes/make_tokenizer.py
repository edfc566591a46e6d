"""Make the tokenizer of the miniature models: CLIP's byte-pair scheme, one token a word.

    python tools/shapes/make_tokenizer.py

Merges are learnt on the world's own texts; any other text falls apart into pieces and single
letters, so nothing is ever unknown. Writes `vocab.json`, `merges.txt` and the two small
configuration files that both transformers 4 and 5 read.
"""

import argparse
import json
import random
from pathlib import Path

from texts import training_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from diffenc.shapes.questions import conversation
from diffenc.shapes.scenes import sample_scene

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LENGTH = 32


def corpus(count: int) -> list[str]:
    """Texts of `count` scenes."""
    rng = random.Random("tokenizer")
    found = []
    for index in range(count):
        scene = sample_scene(rng)
        found.append(training_text(scene, rng, bare_questions=0.05))
        if index % 10 == 0:
            found += [turn["value"] for turn in conversation(scene, seed=index)]
    return found


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, until every word of the texts is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4000, end_of_word_suffix="</w>", show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(texts, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) for merge in merges]


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: bytes, bytes that end a word, merges, start, end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/shapes/tokenizer"))
    options = parser.parse_args()
    merges = learn_merges(corpus(20_000))
    options.output.mkdir(parents=True, exist_ok=True)

    def write(name: str, text: str) -> None:
        (options.output / name).write_text(text, encoding="utf-8")

    write("vocab.json", json.dumps(vocabulary(merges), ensure_ascii=False, indent=0) + "\n")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    write("merges.txt", "\n".join(lines) + "\n")
    special = {
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        **special,
    }
    write("tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write("special_tokens_map.json", json.dumps(special, indent=2) + "\n")
    print(f"{len(merges)} merges, {len(vocabulary(merges))} tokens")


if __name__ == "__main__":
    main()

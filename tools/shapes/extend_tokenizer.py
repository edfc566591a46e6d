"""Teach a tokenizer and its text encoder the names of the little pictures, one token each.

    python tools/shapes/extend_tokenizer.py --model runs/shapes-many

Tokens that were there keep their numbers and their embeddings, so texts about shapes are encoded as
before; words that are no token may fall apart in another way. New embeddings begin near those of
shape words; `train_denoiser.py --learn-words` trains them.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from diffenc.shapes.pictures import NOUNS
from diffenc.shapes.scenes import SHAPES

_SPREAD = 0.5
"""How far new embeddings lie from the mean of shape words, as a share of how far these do."""


def add_token(folder: Path, word: str) -> None:
    """Add merges to a tokenizer's folder until the word is one token."""
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    while len(pieces := CLIPTokenizer.from_pretrained(folder).tokenize(word)) > 1:
        merges.append(" ".join(pieces[:2]))
        vocabulary.setdefault("".join(pieces[:2]), len(vocabulary))
        text = json.dumps(vocabulary, ensure_ascii=False, indent=0) + "\n"
        (folder / "vocab.json").write_text(text, encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")


def extend(model: Path) -> tuple[int, int]:
    """Add the nouns to a model's tokenizer and text encoder; number of tokens before and after."""
    for noun in NOUNS:
        add_token(model / "tokenizer", noun)
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").float()
    known = encoder.get_input_embeddings().num_embeddings
    encoder.resize_token_embeddings(len(tokenizer))
    rows = encoder.get_input_embeddings().weight.data
    like = rows[tokenizer.convert_tokens_to_ids([f"{shape}</w>" for shape in SHAPES])]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(rows) - known, rows.shape[1], generator=generator)
    rows[known:] = like.mean(dim=0) + _SPREAD * like.std(dim=0) * drawn
    encoder.save_pretrained(model / "text_encoder")
    return known, len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/shapes-many"))
    before, after = extend(parser.parse_args().model)
    print(f"{before} tokens, now {after}")


if __name__ == "__main__":
    main()

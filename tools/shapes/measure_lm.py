"""Measure the miniature language model and print JSON.

    python tools/shapes/measure_lm.py

`grammatical` is the percentage of texts, sampled at temperature 1 from nothing but the mark of the
beginning, that the world's grammar accepts from end to end; a text that does not end in time is
not accepted. `distinct` tells how many of them differ, `distinct_of_world` how many of as many
documents made from held-out scenes do: captions of so small a world repeat. `perplexity` is per
token, on documents of held-out scenes. `reading` is the percentage of right answers, written word
by word, to questions of colour and shape whose answer stands in a caption before the question.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from documents import chat, document
from grammar import is_grammatical
from train_lm import HELD_OUT_ROWS, packed, perplexity
from training import HELD_OUT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffenc.shapes.captions import caption
from diffenc.shapes.questions import questions
from diffenc.shapes.scenes import sample_scene, sample_scenes

BATCH = 100


@torch.no_grad()
def sample(model: Any, tokenizer: Any, count: int) -> list[str]:
    """Whole documents, without their marks; "" for one that does not end within the context."""
    texts: list[str] = []
    while len(texts) < count:
        begin = torch.full((min(BATCH, count - len(texts)), 1), tokenizer.bos_token_id)
        rows = model.generate(
            begin,
            attention_mask=torch.ones_like(begin),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=tokenizer.bos_token_id,  # a conversation goes on after <eos>
            pad_token_id=tokenizer.pad_token_id,
            max_length=model.config.max_position_embeddings,
        )
        texts += [document_of(tokenizer, row) for row in rows[:, 1:].tolist()]
    return texts


def document_of(tokenizer: Any, ids: list[int]) -> str:
    """The text before ``<eos> <bos>``, whatever stands in it; "" where these do not come."""
    if tokenizer.bos_token_id not in ids:
        return ""
    end = ids.index(tokenizer.bos_token_id)
    if end == 0 or ids[end - 1] != tokenizer.eos_token_id:
        return ""
    text: str = tokenizer.decode(ids[: end - 1])
    return text


def readable(count: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts that hold a caption and a question, and the answers that the captions give."""
    rng = random.Random(f"reading/{seed}")
    while count:
        scene = sample_scene(rng)
        said = caption(scene, rng)
        for question in questions(scene, seed=rng.getrandbits(32)):
            if question.kind not in ("color", "shape"):
                continue
            thing = scene.objects[question.subjects[0]]
            # Both kinds of question are asked only where their words fit one object alone.
            if f"{thing.color} {thing.shape}" in said:
                yield chat([(f"{said}\n{question.text}", "")]), question.answer
                count -= 1
                break


@torch.no_grad()
def reading(model: Any, tokenizer: Any, count: int, seed: int) -> float:
    """Percentage of questions about a caption that are answered right."""
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for prompt, answer in readable(count, seed):
        ids = tokenizer(prompt).input_ids
        by_length[len(ids)].append((ids, answer))
    right = 0
    for prompts in by_length.values():
        ids = torch.tensor([prompt for prompt, _ in prompts])
        rows = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=4,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row, (_, answer) in zip(rows[:, ids.shape[1] :].tolist(), prompts, strict=True):
            right += tokenizer.decode(row).partition("<eos>")[0] == answer
    return 100 * right / count


def measure(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """All figures, and a few of the sampled texts that are not grammatical."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    held_out = packed(
        tokenizer,
        f"lm/{HELD_OUT_SEED}",
        HELD_OUT_ROWS,
        model.config.max_position_embeddings,
    )
    found: dict[str, Any] = {"perplexity": round(perplexity(model, held_out), 4)}
    model.eval()
    torch.manual_seed(seed)
    texts = sample(model, tokenizer, count)
    wrong = [text for text in texts if not is_grammatical(text)]
    rng = random.Random(f"measure/{HELD_OUT_SEED}")
    world = [document(scene, rng) for scene in sample_scenes(count, seed=HELD_OUT_SEED)]
    found["grammatical"] = round(100 * (1 - len(wrong) / count), 1)
    found["distinct"] = round(100 * len(set(texts)) / count, 1)
    found["distinct_of_world"] = round(100 * len(set(world)) / count, 1)
    found["reading"] = round(reading(model, tokenizer, count, HELD_OUT_SEED), 1)
    return {**found, "ungrammatical": wrong[:5], "samples": texts[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/shapes-lm/model"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.model, options.count, options.seed)
    print(json.dumps({"count": options.count, "seed": options.seed, **found}, indent=2))


if __name__ == "__main__":
    main()

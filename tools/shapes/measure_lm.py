"""Measure the miniature language model and print JSON.

    python tools/shapes/measure_lm.py

`grammatical` is the percentage of texts, sampled at temperature 1 from nothing but the mark of the
beginning, that the world's grammar accepts from end to end; a text that does not end in time is
not accepted; `grammatical_nucleus` is the same of texts sampled from the likeliest words that have
95 % of the probability, as language models are usually asked. `distinct` tells how many of them
differ, `distinct_of_world` how many of as many documents made from held-out scenes do: captions of
so small a world repeat. `perplexity` is per token, on documents of held-out scenes. The others are
percentages of right answers, written word by word: `reading` to questions of colour and shape whose
answer stands in one of one or two captions before them, `pictures` to questions of all kinds about
symbolic pictures, and `other_pictures` the same where each is shown another one's, which is what
can be guessed. With `--crowds` questions about crowded scenes are asked too: on grids, on grids
whose cells say their places (`placed`), and as tokens of the question's words; each time in words
and with lettered options, and those of places are counted apart.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from documents import document, readable
from grammar import is_grammatical
from symbolic import SymbolicPictures, asking
from symbolic_crowds import CrowdedPictures
from torch import Tensor
from train_lm import HELD_OUT_ROWS, packed, perplexity
from training import HELD_OUT_SEED
from transformers import AutoModelForCausalLM, AutoTokenizer

from diffenc.shapes.crowds import sample_crowds
from diffenc.shapes.questions import Question, multiple_choice, sample_question
from diffenc.shapes.scenes import Scene, sample_scenes

BATCH = 100
NUCLEUS = 0.95
PLACED = ("position", "relation")
"""Kinds of questions whose answer is a place."""
SPELLINGS = {"grids": (False, 0.0), "placed": (False, 1.0), "words": (True, 0.0)}
"""Whether tokens are those of a question's words, and how often a grid says its cells' places."""


@torch.no_grad()
def sample(model: Any, tokenizer: Any, count: int, *, top_p: float = 1.0) -> list[str]:
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
            top_p=top_p,
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


@torch.no_grad()
def reading(model: Any, tokenizer: Any, count: int, seed: int) -> float:
    """Percentage of questions about a caption that are answered right."""
    rng = random.Random(f"reading/{seed}")
    by_length: dict[int, list[tuple[list[int], str]]] = defaultdict(list)
    for prompt, answer in (readable(rng) for _ in range(count)):
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


@torch.no_grad()
def pictures(model: Any, tokenizer: Any, count: int, seed: int) -> tuple[float, float]:
    """Percentage of questions answered right about symbolic pictures, and about exchanged ones."""
    symbolic, noise = SymbolicPictures(tokenizer), torch.Generator().manual_seed(seed)

    def spelled(scene: Scene, question: Question) -> Tensor:
        return symbolic.embed(model.get_input_embeddings(), [scene], [asking(question)], noise)[0]

    scenes = list(sample_scenes(count, seed=seed))
    own, other = answered(model, tokenizer, scenes, spelled, f"pictures/{seed}")
    return percent(own), percent(other)


@torch.no_grad()
def crowds(
    model: Any, tokenizer: Any, spelling: str, count: int, seed: int, *, lettered: bool = False
) -> dict[str, float]:
    """The same of crowded scenes in one of `SPELLINGS`, and of the kinds that ask for places."""
    symbolic, noise = CrowdedPictures(tokenizer), torch.Generator().manual_seed(seed)
    as_words, placed = SPELLINGS[spelling]

    def spelled(scene: Scene, question: Question) -> Tensor:
        text = question.text if as_words else None
        embedding, turns = model.get_input_embeddings(), [asking(question)]
        return symbolic.embed_under(embedding, [scene], turns, [text], noise, placed=placed)[0]

    scenes = list(sample_crowds(count, seed=seed))
    own, other = answered(model, tokenizer, scenes, spelled, f"crowds/{seed}", lettered=lettered)
    shares = {"own": percent(own), "other": percent(other)}
    return shares | {kind: percent([each for each in own if each[0] == kind]) for kind in PLACED}


def percent(answers: Sequence[tuple[str, bool]]) -> float:
    """Percentage that is right, of kinds of questions and whether their answer was."""
    return round(100 * sum(right for _, right in answers) / len(answers), 1)


def answered(
    model: Any,
    tokenizer: Any,
    scenes: Sequence[Scene],
    spelled: Callable[[Scene, Question], Tensor],
    seed: str,
    *,
    lettered: bool = False,
) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Kind of one question a scene, and whether it is answered right of it; of the one before."""
    rng, letters = random.Random(seed), random.Random(f"letters/{seed}")
    answers: tuple[list[tuple[str, bool]], list[tuple[str, bool]]] = ([], [])
    for index, scene in enumerate(scenes):
        question = sample_question(scene, rng)
        if lettered:
            question = multiple_choice(question, letters, options=letters.choice((2, 2, 3, 4)))
        for which, shown in enumerate((scene, scenes[index - 1])):
            states = spelled(shown, question)
            ids = model.generate(
                inputs_embeds=states,
                attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
                do_sample=False,
                max_new_tokens=8,
                pad_token_id=tokenizer.pad_token_id,
            )
            said = tokenizer.decode(ids[0].tolist()).partition("<eos>")[0]
            answers[which].append((question.kind, said == question.answer))
    return answers


def measure(folder: Path, count: int, seed: int, *, crowded: bool = False) -> dict[str, Any]:
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
    torch.manual_seed(seed)
    nucleus = sample(model, tokenizer, count, top_p=NUCLEUS)
    found["grammatical_nucleus"] = round(100 * sum(map(is_grammatical, nucleus)) / count, 1)
    found["distinct_nucleus"] = round(100 * len(set(nucleus)) / count, 1)
    found["grammatical"] = round(100 * (1 - len(wrong) / count), 1)
    found["distinct"] = round(100 * len(set(texts)) / count, 1)
    found["distinct_of_world"] = round(100 * len(set(world)) / count, 1)
    found["reading"] = round(reading(model, tokenizer, count, HELD_OUT_SEED), 1)
    seen, guessed = pictures(model, tokenizer, count, HELD_OUT_SEED)
    found |= {"pictures": seen, "other_pictures": guessed}
    if crowded:
        for spelling in SPELLINGS:
            for lettered in (False, True):
                name = f"crowded_{spelling}{'_letters' * lettered}"
                found[name] = crowds(
                    model, tokenizer, spelling, count, HELD_OUT_SEED, lettered=lettered
                )
    return {**found, "ungrammatical": wrong[:5], "samples": texts[:5]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/shapes-lm/model"))
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crowds", action="store_true", help="questions about crowds too")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.model, options.count, options.seed, crowded=options.crowds)
    print(json.dumps({"count": options.count, "seed": options.seed, **found}, indent=2))


if __name__ == "__main__":
    main()

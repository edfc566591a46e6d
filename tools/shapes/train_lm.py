"""Train the miniature language model on the world's texts.

    python tools/shapes/make_lm_tokenizer.py
    python tools/shapes/train_lm.py --steps 2000

A small Llama that has read captions, questions and conversations and never seen a picture: the
pretrained language model of a miniature multimodal one.

It learns to look back first: short prompts, a caption with a question that it answers, and loss on
the answer alone. In whole texts such answers are one token of thirty, and a model of this size
learns to word everything long before it learns to look anything up. Then come all kinds of
documents, one scene each, made as training goes on and packed into rows; a step is seeded by its
number. Beside them it reads symbolic pictures (`symbolic.py`), and with `--options` it practises to
list each option of a question once. With `--crowds` it is first asked for nothing but places and
letters in spelled-out crowds, which hardly begin to be learnt among everything else, and `--few`
adds grids of few objects whose cells show one thing each. Perplexity is measured on scenes of
held-out seeds. What is written is a folder that `AutoModelForCausalLM` and `AutoTokenizer` of
transformers 4 and 5 load.
"""

import argparse
import json
import math
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from documents import document, lettered, readable
from safetensors.torch import load_file, save_file
from symbolic import SymbolicPictures
from symbolic_crowds import CROWDS, CrowdedPictures, pull_apart
from symbolic_practice import AFTERWARDS, PracticePictures, lesson_at
from texts import any_scene
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from training import VALIDATION_SEED, Run
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HIDDEN, LAYERS, HEADS, INNER = 128, 4, 4, 448
HELD_OUT_ROWS = 64
READING_BATCH = 64
HINTED_LAYER = LAYERS // 2
SPREAD_OF_PLACES = 0.05
"""Mean squared distance of things from the middle, along one side."""
IGNORED = -100


def build(tokenizer: Any, context: int) -> LlamaForCausalLM:
    """The model with random weights."""
    return LlamaForCausalLM(LlamaConfig(**configuration(tokenizer, context)))


def configuration(tokenizer: Any, context: int) -> dict[str, Any]:
    """The fields that all versions of transformers know; the rest are Llama's defaults."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def packed(tokenizer: Any, seed: str, rows: int, context: int, *, crowds: float = 0.0) -> Tensor:
    """Token ids (rows context): each row full of documents, the last one cut off.

    Documents follow each other as ``<bos> ... <eos> <bos> ... <eos>``. Positions count through a
    row, so that the model knows all of them: pictures will stand before its texts.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(rows):
        row: list[int] = []
        while len(row) < context:
            row += tokenizer(document(any_scene(rng, crowds), rng)).input_ids
            row.append(tokenizer.eos_token_id)
        found.append(row[:context])
    return torch.tensor(found)


def next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy over all tokens but the first of each row."""
    logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def prompts_and_answers(
    tokenizer: Any,
    seed: str,
    make: Callable[[random.Random], tuple[str, str]] = readable,
    count: int = READING_BATCH,
) -> tuple[Tensor, Tensor]:
    """Token ids (b t) of prompts with their answers, and as many labels, of the answers alone."""
    rng = random.Random(seed)
    ids, labels = [], []
    for _ in range(count):
        prompt, answer = make(rng)
        asked = tokenizer(prompt).input_ids
        answered = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids.append(torch.tensor(asked + answered))
        labels.append(torch.tensor([IGNORED] * len(asked) + answered))
    return (
        pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    )


def answers(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n words) of each token after the first, and what it should be (n)."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return logits.flatten(0, 1).float(), labels[:, 1:].flatten()


def options_loss(model: LlamaForCausalLM, tokenizer: Any, count: int, seed: str) -> Tensor:
    """Mean cross-entropy of the options of questions, each listed once, and of the letters."""
    logits, targets = answers(model, *prompts_and_answers(tokenizer, seed, lettered, count))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def learn_to_look_back(model: LlamaForCausalLM, tokenizer: Any, steps: int, folder: Path) -> None:
    """Train on answers that stand in the prompt."""
    # twice the steps: the rate does not come down all the way, since training goes on after it
    run = Run(folder, {"model": model}, steps=2 * steps, lr=1e-3, ema_decay=0.99, warmup=100)
    while run.step < steps:
        ids, labels = prompts_and_answers(tokenizer, f"reading/{run.step}")
        logits, targets = answers(model, ids, labels)
        run.update(F.cross_entropy(logits, targets, ignore_index=IGNORED))
        if run.step % 50 == 0:
            asked = targets != IGNORED
            asked &= targets != tokenizer.eos_token_id
            right = (logits.argmax(-1) == targets)[asked].float().mean()
            run.log(right=round(100 * right.item(), 1))
        if run.step % 250 == 0 or run.step == steps:
            run.save()
    run.swap_average()


class Hints(nn.Module):
    """Loss on states in the middle of the model, which teaches it the step between.

    Args:
        width: Width of the states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.place = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, states: Tensor, places: Tensor) -> Tensor:
        """How far states (b t width) are from telling the places (n 4), in shares of guessing."""
        rows, tokens = places[:, :2].long().unbind(1)
        away: Tensor = self.place(states[rows, tokens].float()) - places[:, 2:]
        return away.square().mean() / SPREAD_OF_PLACES


def practise(
    model: LlamaForCausalLM,
    pictures: PracticePictures,
    steps: int,
    folder: Path,
    *,
    lr: float,
    bfloat16: bool,
) -> None:
    """Train on what `symbolic_practice.py` asks for, lesson by lesson."""
    embedding = model.get_input_embeddings()
    pull_apart(embedding, pictures.tokenizer)
    torch.manual_seed(0)
    hints = Hints(model.config.hidden_size)
    # more steps: the rate does not come down all the way, since training goes on after it
    run = Run(
        folder,
        {"model": model, "hints": hints},
        steps=steps * 5 // 4,
        lr=lr,
        ema_decay=0.99,
        warmup=50,
    )
    right: dict[str, list[bool]] = defaultdict(list)
    while run.step < steps:
        lesson = lesson_at(run.step / steps)
        losses, hinted = [], []
        for practice in pictures.batches(embedding, f"practice/{run.step}", lesson):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                output = model(
                    inputs_embeds=practice.states[:, :-1],
                    use_cache=False,
                    output_hidden_states=True,
                )
            logits, targets = output.logits.float(), practice.labels[:, 1:]
            losses.append(
                F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
            )
            hinted.append(hints(output.hidden_states[HINTED_LAYER], practice.places))
            for kinds, whole in zip(practice.kinds, whole_answers(logits, targets), strict=True):
                for kind, answered in zip(kinds, whole, strict=True):
                    right[kind].append(answered)
        loss, hint = torch.stack(losses).sum(), torch.stack(hinted).mean()
        run.update(loss + hint)
        if run.step % 50 == 0:
            shares = {kind: round(100 * sum(each) / len(each)) for kind, each in right.items()}
            run.log(loss=round(loss.item(), 3), hint=round(hint.item(), 3), **shares)
            right.clear()
        if run.step % 200 == 0 or run.step == steps:
            run.save()
    run.swap_average()


def whole_answers(logits: Tensor, targets: Tensor) -> list[list[bool]]:
    """For each answer of each row, whether all its tokens are the likeliest."""
    answered = targets != IGNORED
    same = (logits.argmax(-1) == targets).tolist()
    rows = []
    for row, mask in zip(same, answered.tolist(), strict=True):
        answers: list[bool] = []
        for place, inside in enumerate(mask):
            if inside and not (place and mask[place - 1]):
                answers.append(True)
            if inside:
                answers[-1] = answers[-1] and row[place]
        rows.append(answers)
    return rows


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, rows: Tensor) -> float:
    """Per token, on average over equally long rows."""
    model.eval()
    losses = [next_token_loss(model, part).item() for part in rows.split(8)]
    weights = [len(part) for part in rows.split(8)]
    model.train()
    return math.exp(sum(map(math.prod, zip(losses, weights, strict=True))) / len(rows))


def picture_loss(
    model: LlamaForCausalLM, pictures: SymbolicPictures, count: int, seed: str
) -> Tensor:
    """Mean cross-entropy of what is said about symbolic pictures."""
    return spelled_loss(model, *pictures.batch(model.get_input_embeddings(), count, seed))


def practice_loss(model: LlamaForCausalLM, pictures: PracticePictures, seed: str) -> Tensor:
    """The same of what is practised on."""
    batches = pictures.batches(model.get_input_embeddings(), seed, AFTERWARDS)
    return torch.stack([spelled_loss(model, each.states, each.labels) for each in batches]).mean()


def spelled_loss(model: LlamaForCausalLM, states: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of labels (b t) after states (b t width)."""
    logits = model(inputs_embeds=states[:, :-1], use_cache=False).logits
    return F.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
    )


def save(model: LlamaForCausalLM, tokenizer: Path, output: Path, context: int) -> None:
    """Write the folder; the output layer is the embedding and is stored once."""
    output.mkdir(parents=True, exist_ok=True)
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    state.pop("lm_head.weight")
    save_file(state, output / "model.safetensors", metadata={"format": "pt"})
    config = configuration(AutoTokenizer.from_pretrained(tokenizer), context)
    # transformers 4 and 5 read the type of the weights by different names
    write_json(output / "config.json", {**config, "dtype": "float32", "torch_dtype": "float32"})
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(output / "generation_config.json", ids)
    shutil.copy(tokenizer / "tokenizer.json", output)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(output / "tokenizer_config.json", {**settings, "model_max_length": context})


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--reading-steps", type=int, default=2000, help="before them")
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--row", type=int, default=256, help="tokens a row")
    parser.add_argument("--pictures", type=int, default=16, help="symbolic ones in a step")
    parser.add_argument(
        "--crowds", action="store_true", help="scenes of up to nine objects, on grids and as words"
    )
    parser.add_argument(
        "--few", type=int, default=0, help="of few objects beside them, whole cells"
    )
    parser.add_argument("--practice-steps", type=int, default=2500, help="before, with --crowds")
    parser.add_argument("--practice-lr", type=float, default=2e-3)
    parser.add_argument("--options", type=int, default=0, help="lettered questions in a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--start", type=Path, help="folder with weights; none is read otherwise")
    parser.add_argument("--context", type=int, default=512, help="tokens that the model may read")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes-lm/run"))
    parser.add_argument("--tokenizer", type=Path, default=Path("runs/shapes-lm/tokenizer"))
    parser.add_argument("--output", type=Path, default=Path("runs/shapes-lm/model"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    model = build(tokenizer, options.context)
    model.set_attn_implementation("eager")  # rows are short: fused attention is slower on a CPU
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    if options.start is not None:
        found = model.load_state_dict(load_file(options.start / "model.safetensors"), strict=False)
        if found.unexpected_keys or set(found.missing_keys) - {
            "lm_head.weight"
        }:  # tied, not stored
            raise SystemExit(f"{options.start} holds another model: {found}")
    elif not (options.run / "state.pt").exists():
        folder = options.run.with_name(f"{options.run.name}-reading")
        learn_to_look_back(model, tokenizer, options.reading_steps, folder)
    crowds = CrowdedPictures(tokenizer) if options.crowds else None
    few = SymbolicPictures(tokenizer)
    pictures = crowds or few
    practice = PracticePictures(crowds) if crowds else None
    if practice and options.practice_steps and not (options.run / "state.pt").exists():
        folder = options.run.with_name(f"{options.run.name}-practice")
        practise(
            model,
            practice,
            options.practice_steps,
            folder,
            lr=options.practice_lr,
            bfloat16=options.bfloat16,
        )
    run = Run(
        options.run,
        {"model": model},
        steps=options.steps,
        lr=options.lr,
        ema_decay=0.995,
        warmup=100,
    )
    share = CROWDS if options.crowds else 0.0
    held_out = packed(tokenizer, f"lm/{VALIDATION_SEED}", HELD_OUT_ROWS, options.context)
    while run.step < options.steps:
        rows = packed(tokenizer, f"lm/{run.step}", options.batch, options.row, crowds=share)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            loss = next_token_loss(model, rows)
            seen = picture_loss(model, pictures, options.pictures, f"pictures/{run.step}")
            parts = {"loss": loss, "pictures": seen}
            if practice:
                parts["practice"] = practice_loss(model, practice, f"practised/{run.step}")
            if options.few:
                seed = f"few/{run.step}"
                parts["few"] = picture_loss(model, few, options.few, seed)
            if options.options:
                seed = f"options/{run.step}"
                parts["options"] = options_loss(model, tokenizer, options.options, seed)
        run.update(torch.stack(list(parts.values())).sum())
        if run.step % 50 == 0:
            run.log(**{name: round(part.item(), 4) for name, part in parts.items()})
        if run.step % 250 == 0 or run.step == options.steps:
            run.swap_average()
            run.log(perplexity=round(perplexity(model, held_out), 4))
            save(model, options.tokenizer, options.output, options.context)
            run.swap_average()
            run.save()
    run.swap_average()
    print(json.dumps({"perplexity": round(perplexity(model, held_out), 4)}))


if __name__ == "__main__":
    main()

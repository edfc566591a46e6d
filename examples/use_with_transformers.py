# %% [markdown]
# # A LLaVA of transformers that reads the question
# The vision tower of `LlavaForConditionalGeneration` is the bundled diffusion model, and the
# question is its prompt. A language model of two layers, the projector and low-rank updates in the
# tower learn to name the color of a shape; then the model is saved, loaded and asked.
#
# A picture is four tokens, not 64: `tokens=words&k=4` gathers features where the words of the
# question are seen, so the language model need not find the star among the cells first. With
# `--spec "diffenc:shapes?rank=4"` it gets the cells, and as many steps teach it far less.

# %%
import argparse
import random
import sys
import tempfile
from collections import Counter

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from diffenc.hosts.transformers import (
    DiffEncConfig,
    DiffEncImageProcessor,
    DiffEncLlavaForConditionalGeneration,
    DiffEncLlavaProcessor,
)
from diffenc.shapes import Question, Scene, questions, render, sample_scenes
from diffenc.viz import Panel, figure

parser = argparse.ArgumentParser(description="Train a tiny LLaVA on colored shapes, and ask it.")
parser.add_argument("--spec", default="diffenc:shapes?rank=4&tokens=words&k=4")
parser.add_argument("--steps", type=int, default=200, help="of training, 16 questions each")
parser.add_argument("--no-prompts", action="store_true", help="hide the question from the tower")
options = parser.parse_args([] if hasattr(sys, "ps1") else None)  # a notebook has no options
disable_progress_bar()

Sample = tuple[Scene, Question]


def color_questions(count: int, seed: int) -> list[Sample]:
    """Scenes, each with a question for a color."""
    rng = random.Random(seed)
    samples: list[Sample] = []
    for scene in sample_scenes(3 * count, seed=seed):
        of_color = [question for question in questions(scene) if question.kind == "color"]
        samples += [(scene, rng.choice(of_color))] if of_color else []
    return samples[:count]


train, test = color_questions(16 * 60, seed=1), color_questions(256, seed=950_000)

# %% [markdown]
# The language model knows the words of the questions and nothing else. Everything that
# `LlavaConfig` asks of a vision model is told by `DiffEncConfig`: no weight is loaded yet. The
# processor counts a picture's tokens by squares of pixels. Tokens of words are no squares: the
# whole picture is one, and the others are added.

# %%
texts = [f"{question.text} {question.answer}" for _, question in (*train, *test)]
words = sorted({word for text in texts for word in text.split()})
vocabulary = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *words]
backend = Tokenizer(
    models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>")
)
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="<pad>",
    bos_token="<s>",
    eos_token="</s>",
    unk_token="<unk>",
    additional_special_tokens=["<image>"],
    padding_side="left",
    model_input_names=["input_ids", "attention_mask"],
)
vision = DiffEncConfig(options.spec)
config = LlavaConfig(
    vision_config=vision,
    text_config=LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    image_token_index=vocabulary.index("<image>"),
    vision_feature_layer=-1,  # every layer is the same: the spec says what is read
    vision_feature_select_strategy="full",  # there is no class token
)
torch.manual_seed(0)
model = DiffEncLlavaForConditionalGeneration(config)
processor = DiffEncLlavaProcessor(
    DiffEncImageProcessor(vision.image_size),
    tokenizer,
    patch_size=vision.image_size,
    num_additional_image_tokens=vision.num_patches - 1,
    prompt_model=vision.tower_spec.model,
)

# %% [markdown]
# `prompts` are for the tower, `text` is for the language model. The loss counts the answer alone.


# %%
def inputs_of(samples: list[Sample], *, answers: bool) -> dict[str, torch.Tensor]:
    """What the model takes, with or without the answers behind the questions."""
    asked = [question.text for _, question in samples]
    ends = [f" {question.answer} </s>" if answers else "" for _, question in samples]
    made = processor(
        images=[render(scene) for scene, _ in samples],
        text=[f"<image> {text}{end}" for text, end in zip(asked, ends, strict=True)],
        prompts=None if options.no_prompts else asked,
        padding=True,
        return_tensors="pt",
    )
    return dict(made)


def train_on(samples: list[Sample], optimizer: torch.optim.Optimizer) -> float:
    """One step; the loss."""
    inputs = inputs_of(samples, answers=True)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100  # padding stands on the left, the answer and its end on the right
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


trained = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=1e-3)
model.train()
for step in range(options.steps):
    start = 16 * step % len(train)
    loss = train_on(train[start : start + 16], optimizer)
    if step % 20 == 0 or step == options.steps - 1:
        print(f"step {step:4} loss {loss:.3f}")

# %% [markdown]
# A checkpoint holds the language model, the projector and the tower's updates; the diffusion model
# is referred to. `backbone_source="checkpoint"` in `DiffEncConfig` would hold it too.

# %%
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    model = DiffEncLlavaForConditionalGeneration.from_pretrained(folder)


# %% [markdown]
# New scenes have one to three objects. Where there are several, a model that does not know which
# one is meant names the color of another.


# %%
def answer(samples: list[Sample]) -> list[str]:
    """One word for each sample."""
    inputs = inputs_of(samples, answers=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=1, do_sample=False)
    return [str(text) for text in tokenizer.batch_decode(tokens[:, -1:])]


answers = [word for start in range(0, len(test), 64) for word in answer(test[start : start + 64])]
right = [word == question.answer for word, (_, question) in zip(answers, test, strict=True)]
objects = [len(scene.objects) for scene, _ in test]
for count in sorted(set(objects)):
    of_count = [correct for correct, number in zip(right, objects, strict=True) if number == count]
    print(f"  scenes of {count}: {sum(of_count) / len(of_count):.2f} of {len(of_count)}")
most_common = Counter(question.answer for _, question in test).most_common(1)[0][1] / len(test)
print(f"right: {sum(right) / len(test):.2f} of {len(test)} new questions")
print(f"the most common answer alone: {most_common:.2f}")

# %% [markdown]
# The first scenes of three objects, and what the model says of one of them.

# %%
several = [place for place, number in enumerate(objects) if number == 3][:5]
shapes = [test[place][0].objects[test[place][1].subjects[0]].shape for place in several]
drawn = figure(
    [
        [
            Panel(render(test[place][0], 160), f"{shape}: {answers[place]}")
            for place, shape in zip(several, shapes, strict=True)
        ]
    ],
    title="what color is it?",
    side=160,
)
drawn

# %%
for place in several:
    print(f"{test[place][1].text} {answers[place]} (it is {test[place][1].answer})")

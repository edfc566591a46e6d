# %% [markdown]
# # Teaching an encoder where words are
# The bundled model was taught where shapes are and left to itself with colours: ask it for "the red
# object", and its attention to "red" strays. A LoRA on the cross-attentions learns it from boxes,
# in a loop of one's own; `diffenc train` with `stage = "ground"` does the same at any size.

# %%
import json
import random
import tempfile
from pathlib import Path

import torch

from diffenc import DiffusionEncoder
from diffenc.grounding import Grounding, PhraseDataset, collate_phrases, read_phrases
from diffenc.shapes import render, sample_scenes
from diffenc.shapes.phrases import named_boxes, reference

STEPS, BATCH = 40, 16

# %% [markdown]
# Phrases as the guide has them: a picture, a text, and which of its words name which boxes.


# %%
def write_phrases(folder: Path, count: int, seed: int) -> Path:
    rng = random.Random(seed)
    lines = []
    for index, scene in enumerate(sample_scenes(count, seed=seed)):
        name = f"{seed}-{index}.png"
        render(scene).save(folder / name)
        text = reference(scene, rng)
        line = {"image": name, "text": text, "phrases": named_boxes(scene, text, 64)}
        lines.append(json.dumps(line) + "\n")
    path = folder / f"{seed}.jsonl"
    path.write_text("".join(lines))
    return path


folder = Path(tempfile.mkdtemp())
samples = read_phrases(write_phrases(folder, STEPS * BATCH, seed=1), folder)
held_out = read_phrases(write_phrases(folder, 48, seed=950_000), folder)
print(samples[0].texts[0].text, samples[0].texts[0].phrases[0])

# %% [markdown]
# `Grounding` gives two losses of one pass: the share of the words' attention that lies outside of
# what they name, squared, and the error of the predicted noise.

# %%
torch.manual_seed(0)
encoder = DiffusionEncoder.from_pretrained("shapes")
grounding = Grounding(encoder)
new_scenes = PhraseDataset(held_out, encoder)
test = collate_phrases([new_scenes[index] for index in range(len(held_out))])
with torch.no_grad():
    before = grounding(**test)
print(f"before: {before.outside:.3f} outside, error of the noise {before.denoising:.4f}")

# %%
encoder.add_lora(rank=8)
optimizer = torch.optim.AdamW(encoder.trainable_parameters(), lr=2e-3, weight_decay=0)
rows = PhraseDataset(samples, encoder)
encoder.train()
for step in range(STEPS):
    part = range(step * BATCH, (step + 1) * BATCH)
    losses = grounding(**collate_phrases([rows[index] for index in part]))
    optimizer.zero_grad()
    (losses.denoising + losses.outside).backward()
    optimizer.step()
encoder.eval()
with torch.no_grad():
    after = grounding(**test)
print(f"after {STEPS} steps: {after.outside:.3f} outside, error {after.denoising:.4f}")

# %% [markdown]
# The LoRA is one as any other: it loads into an encoder with these taps, and into diffusers.

# %%
encoder.save_lora(folder / "lora")
fresh = DiffusionEncoder.from_pretrained("shapes")
fresh.load_lora(folder / "lora")
print(fresh.lora_names, sorted(path.name for path in (folder / "lora").iterdir()))

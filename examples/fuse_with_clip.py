# %% [markdown]
# # Fuse CLIP and diffusion features
# CLIP sees well and does not read the question. A diffusion encoder reads it and sees less well.
# What has a reader of both? It ends with a table. The CLIP is the bundled miniature; for
# photographs take "openai/clip-vit-large-patch14-336" with "sd2.1-base" or "sdxl".
#
# First the tokens of both models in the three ways without weights, and a projector for each.

# %%
import torch
from torch import Tensor
from torch.nn import functional as F

from diffenc import DiffusionEncoder, FusedEncoder, projector_for
from diffenc.fusion import How
from diffenc.shapes import Scene, questions, render, sample_scenes

diffusion = DiffusionEncoder.from_pretrained("shapes")
images = [render(scene) for scene in sample_scenes(2, seed=0)]
texts = ["what color is the star?", "how many circles are there?"]

# %% [markdown]
# Channels of a token are those of both; their number is that of the grid, twice that, or the sum.

# %%
ways: list[How] = ["channel", "interleave", "tokens"]
for how in ways:
    encoder = FusedEncoder("shapes-clip", diffusion, how)
    tokens = encoder(images, texts)
    projector = projector_for(encoder, 256)
    print(f"{how:12}{tuple(tokens.shape)!s:18}{type(projector).__name__:16}", end="")
    print(tuple(projector(tokens).shape))

# %% [markdown]
# The question changes the diffusion half alone.

# %%
encoder = FusedEncoder("shapes-clip", diffusion)
with_text, without = encoder(images, texts), encoder(images)
width = encoder.clip.hidden_size
print("CLIP's channels change by     ", float((with_text - without)[..., :width].abs().max()))
print("the diffusion channels change by", float((with_text - without)[..., width:].abs().mean()))

# %% [markdown]
# Other ways mix the two into one stream by weights that train. Cross-attention begins from the
# tokens that ask, which are CLIP's unless `MixingConfig(asks="diffusion")` turns it round.

# %%
encoder = FusedEncoder("shapes-clip", diffusion, "cross_attention")
change = (encoder(images, texts) - encoder.clip_stream(images)).detach().abs()
print("before training it changes CLIP's tokens by", float(change.max()))
print(sum(p.numel() for p in encoder.trainable_parameters()), "weights train")

# %% [markdown]
# ## What a reader of both has
#
# Questions for the color of one object. The readout is linear and reads features alone, not the
# question: which object is meant it can know from the diffusion half only. Of the diffusion encoder
# two tokens are taken, where the most telling word of the question is seen, and everything else.
# Their channels stand behind CLIP's.

# %%
COLORS = ("red", "green", "blue", "yellow", "purple", "orange")
worded = DiffusionEncoder.from_pretrained("shapes", tokens="words", word_count=2)
both = FusedEncoder("shapes-clip", worded, "tokens")


def color_questions(objects: int, count: int, seed: int) -> tuple[list[Scene], list[str], Tensor]:
    """Scenes of so many objects, a question for each, and the answers' numbers."""
    rows = []
    for scene in sample_scenes(8 * count, seed=seed):
        of_color = [question for question in questions(scene) if question.kind == "color"]
        if len(scene.objects) == objects and of_color:
            rows.append((scene, of_color[0].text, COLORS.index(of_color[0].answer)))
    scenes, texts, answers = zip(*rows[:count], strict=True)
    return list(scenes), list(texts), torch.tensor(answers, dtype=torch.long, device="cpu")


def halves(scenes: list[Scene], texts: list[str]) -> tuple[Tensor, Tensor]:
    """CLIP's mean token, and the diffusion encoder's two tokens side by side."""
    pictures = [render(scene) for scene in scenes]
    with torch.no_grad():
        tokens = torch.cat(
            [both(pictures[i : i + 25], texts[i : i + 25]) for i in range(0, len(texts), 25)]
        )
    return tokens[:, :-2, :width].mean(1), tokens[:, -2:, width:].flatten(1)


def accuracy(train: Tensor, labels: Tensor, test: Tensor, answers: Tensor) -> float:
    """Answers right by ridge regression on standardised features."""
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    rows, new = ((x - mean) / deviation for x in (train, test))
    targets = F.one_hot(labels, len(COLORS)).float() - 1 / len(COLORS)
    penalty = 100 * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    weights = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ targets)
    return float(((new @ weights).argmax(1) == answers).float().mean())


# %% [markdown]
# Scenes of one object, where no question is needed, and of three, where one is.

# %%
print(f"colors right on 200 new scenes, of {len(COLORS)}")
for objects in (1, 3):
    scenes, texts, labels = color_questions(objects, 400, seed=1)
    new_scenes, new_texts, answers = color_questions(objects, 200, seed=950_000)
    known, new = halves(scenes, texts), halves(new_scenes, new_texts)
    readers = {
        "CLIP": (known[0], new[0]),
        "diffusion under the question": (known[1], new[1]),
        "both": (torch.cat(known, 1), torch.cat(new, 1)),
    }
    print(f"scenes of {objects}")
    for name, (train, test) in readers.items():
        print(f"  {name:30}{accuracy(train, labels, test, answers):.3f}")

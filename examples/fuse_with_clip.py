# %% [markdown]
# # Fuse CLIP and diffusion features
# Tokens of both models in the three ways, and a projector for each. The CLIP here has random
# weights, so that nothing is downloaded; with a name, such as "openai/clip-vit-large-patch14-336",
# the image processor comes along.

# %%
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from diffenc import DiffusionEncoder, FusedEncoder, projector_for
from diffenc.fusion import How
from diffenc.shapes import render, sample_scenes

torch.manual_seed(0)
config = CLIPVisionConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    image_size=64, patch_size=8,
)  # fmt: skip
clip = CLIPVisionModel(config)
size = {"height": 64, "width": 64}
image_processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size)

diffusion = DiffusionEncoder.from_pretrained("shapes")
images = [render(scene) for scene in sample_scenes(2, seed=0)]
questions = ["what color is the star?", "how many circles are there?"]

# %% [markdown]
# Channels of a token are those of both; their number is that of the grid, twice that, or the sum.

# %%
ways: list[How] = ["channel", "interleave", "tokens"]
for how in ways:
    encoder = FusedEncoder(clip, diffusion, how, image_processor=image_processor)
    tokens = encoder(images, questions)
    projector = projector_for(encoder, 256)
    print(f"{how:12}{tuple(tokens.shape)!s:18}{type(projector).__name__:16}", end="")
    print(tuple(projector(tokens).shape))

# %% [markdown]
# The question changes the diffusion half alone.

# %%
encoder = FusedEncoder(clip, diffusion, image_processor=image_processor)
asked, unasked = encoder(images, questions), encoder(images)
width = encoder.clip.hidden_size
print("CLIP's channels change by     ", float((asked - unasked)[..., :width].abs().max()))
print("the diffusion channels change by", float((asked - unasked)[..., width:].abs().mean()))

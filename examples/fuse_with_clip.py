# %% [markdown]
# # Fuse CLIP and diffusion features
# Tokens of both models in the three ways without weights, and a projector for each. The CLIP is
# the bundled miniature; for photographs take "openai/clip-vit-large-patch14-336" with "sd2.1-base"
# or "sdxl".

# %%
from diffenc import DiffusionEncoder, FusedEncoder, projector_for
from diffenc.fusion import How
from diffenc.shapes import render, sample_scenes

diffusion = DiffusionEncoder.from_pretrained("shapes")
images = [render(scene) for scene in sample_scenes(2, seed=0)]
questions = ["what color is the star?", "how many circles are there?"]

# %% [markdown]
# Channels of a token are those of both; their number is that of the grid, twice that, or the sum.

# %%
ways: list[How] = ["channel", "interleave", "tokens"]
for how in ways:
    encoder = FusedEncoder("shapes-clip", diffusion, how)
    tokens = encoder(images, questions)
    projector = projector_for(encoder, 256)
    print(f"{how:12}{tuple(tokens.shape)!s:18}{type(projector).__name__:16}", end="")
    print(tuple(projector(tokens).shape))

# %% [markdown]
# The question changes the diffusion half alone.

# %%
encoder = FusedEncoder("shapes-clip", diffusion)
asked, unasked = encoder(images, questions), encoder(images)
width = encoder.clip.hidden_size
print("CLIP's channels change by     ", float((asked - unasked)[..., :width].abs().max()))
print("the diffusion channels change by", float((asked - unasked)[..., width:].abs().mean()))

# %% [markdown]
# Other ways mix the two into one stream by weights that train. Cross-attention begins from the
# tokens that ask, which are CLIP's unless `MixingConfig(asks="diffusion")` turns it round.

# %%
encoder = FusedEncoder("shapes-clip", diffusion, "cross_attention")
change = float((encoder(images, questions) - encoder.clip_stream(images)).abs().max())
print("before training it changes CLIP's tokens by", change)
print(sum(p.numel() for p in encoder.trainable_parameters()), "weights train")

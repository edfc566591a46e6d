# %% [markdown]
# # Quickstart
# Features of a picture under a text, on the miniature model that comes with the package.

# %%
from diffenc import DiffusionEncoder
from diffenc.shapes import captions, render, sample_scenes

scene = next(sample_scenes(1, seed=0))
image, text = render(scene), captions(scene, 1)[0]

encoder = DiffusionEncoder.from_pretrained("shapes")
tokens = encoder(image, text)  # (batch, tokens, channels)
features = encoder.extract(image, text, conditioning="cfg")  # one map per tap

print(text, tuple(tokens.shape))
print({tap: tuple(maps.shape) for tap, maps in features.items()})

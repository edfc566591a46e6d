# %% [markdown]
# # Ask a picture
#
# A diffusion model reads a text together with the picture. Give it a question, and its features
# turn to what the question is about. Here are one picture of eight objects and three questions:
# where does each question look, and what does it change?
#
# The model, `shapes-many`, comes with the package: no download, no GPU. It knows coloured shapes
# and nothing of photographs. For those change one word: `from_pretrained("sd2.1-base")`.

# %%
from diffenc import DiffusionEncoder
from diffenc.shapes.example import CROWD, crowded_picture
from diffenc.viz import HeatMap, Panel, figure

picture = crowded_picture(288)
picture

# %% [markdown]
# ## Tokens under a question
#
# One call gives tokens that can stand in the place of CLIP's: (pictures, cells, channels).

# %%
questions = [f"what shape is the {color} object?" for color in ("red", "purple", "orange")]
encoder = DiffusionEncoder.from_pretrained("shapes-many")
tokens = encoder(picture, questions[0])
tokens.shape

# %% [markdown]
# A CLIP encoder would give the same tokens whatever the question. How far does each question move
# them from the tokens without a text? As a share of a token's length:

# %%
plain = encoder(picture)[0]
length = plain.norm(dim=-1).mean()
for question, under in zip(questions, encoder([picture] * 3, questions), strict=True):
    moved = (under - plain).norm(dim=-1) / length
    print(f"{question:36} mean {moved.mean():.2f}, largest {moved.max():.2f}")

# %% [markdown]
# ## Where a question looks
#
# `word_tokens` gives one token for each word, and a map of where the word is seen. "uncond" reads
# the features without the text, so that the text only says where to look. The same pass knows the
# features under the text as well: the lower row shows how far they differ.

# %%
gathered = encoder.word_tokens([picture] * 3, questions, conditioning="uncond")
gathered.words[0]

# %%
columns = [words.index("object") for words in gathered.words]
seen = [gathered.maps[row, column] for row, column in enumerate(columns)]
changed = gathered.question_maps("change", taps="up_blocks.2.attentions.0")  # the finest


def panel(values: object, title: str = "", caption: str = "") -> Panel:
    return Panel(HeatMap(values).to_pil(200, overlay=picture), title, caption)


drawn = figure(
    [
        [
            panel(values, question, 'where "object" is seen')
            for values, question in zip(seen, questions, strict=True)
        ],
        [panel(values, caption="how far the question moves the features") for values in changed],
    ],
    side=200,
)
drawn

# %% [markdown]
# ## Is it the right object?
#
# The picture was drawn from a description, so the truth is known. `places` has the centre of each
# word's map, from 0 to 1 over the picture. It should lie on the object of that colour.

# %%
for row, color in enumerate(("red", "purple", "orange")):
    (thing,) = [each for each in CROWD.objects if each.color == color]
    down, across = gathered.places[row, columns[row], :2].tolist()
    inside = (across - thing.x) ** 2 + (down - thing.y) ** 2 < thing.radius**2
    print(
        f"{color} object: seen at x {across:.2f}, y {down:.2f}; the {color} {thing.shape} is at "
        f"x {thing.x:.2f}, y {thing.y:.2f}; {'inside' if inside else 'outside'}"
    )

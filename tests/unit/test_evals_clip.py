import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from builders import seeded, tiny_tokenizer
from diffenc.errors import BackboneError
from diffenc.evals import evaluate, shapes_benchmark
from diffenc.evals.matching.clip import ClipMatcher
from evals_data import encoded, picture

LENGTH = 12


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A random CLIP for texts of 12 tokens and images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        projection_dim=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPImageProcessor(size=size, crop_size=size).save_pretrained(folder)
    return folder


TEXTS = ["a red circle", "a blue square left of a red circle", "photo"]


def test_scores_are_those_of_the_model_itself(clip_folder):
    matcher = ClipMatcher.from_pretrained(clip_folder)
    images = [picture(0, 0, size=(16, 16)), picture(1, 1, size=(16, 16))]
    scores = matcher(images, TEXTS)
    model, tokenizer = CLIPModel.from_pretrained(clip_folder), tiny_tokenizer()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    for row, image in enumerate(images):
        for column, text in enumerate(TEXTS):
            rgb = (torch.tensor(image.getpixel((0, 0))) / 255 - mean) / deviation
            ids = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
            with torch.no_grad():  # one pair at a time, no padding
                out = model(
                    input_ids=ids, pixel_values=rgb[None, :, None, None].expand(1, 3, 16, 16)
                )
                one, other = out.image_embeds[0], out.text_embeds[0]
                expected = model.logit_scale.exp() * torch.cosine_similarity(one, other, dim=0)
            torch.testing.assert_close(scores[row, column], expected, rtol=1e-4, atol=1e-4)


def test_a_score_does_not_depend_on_what_else_is_in_the_call(clip_folder):
    matcher = ClipMatcher.from_pretrained(clip_folder)
    images = [Image.linear_gradient("L").convert("RGB"), picture(0, 1, size=(20, 33))]
    together = matcher(images, TEXTS)
    torch.testing.assert_close(matcher(images[1:], TEXTS[:1]), together[1:, :1])


def test_it_runs_once_and_counts_what_its_text_encoder_does_not_read(clip_folder):
    matcher = ClipMatcher.from_pretrained(clip_folder)
    assert matcher.name == "tiny-clip"
    assert list(matcher.truncated(["a red circle", "red " * 15])) == [0, 15 + 2 - LENGTH]
    found = evaluate(shapes_benchmark("winoground", per_label=1), [matcher], trials=3)
    assert found.scores["tiny-clip"].shape == (1, 5, 2, 2)
    assert any("tiny-clip does not read all of" in note for note in found.notes)


def test_other_weights_are_another_description(clip_folder):
    matcher = ClipMatcher.from_pretrained(clip_folder)
    before = matcher.description["weights"]
    assert ClipMatcher.from_pretrained(clip_folder).description["weights"] == before
    model = matcher.model
    with torch.no_grad():
        model.text_model.encoder.layers[1].mlp.fc1.bias[0] += 1e-3
    changed = ClipMatcher(model, matcher.tokenizer, matcher.processor, name="other")
    assert changed.description["weights"] != before


def test_what_is_no_clip_is_told(tmp_path, tiny_sd_folder):
    with pytest.raises(BackboneError, match="cannot load a CLIP from"):
        ClipMatcher.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_bytes(encoded(picture(0, 0), "png"))
    with pytest.raises(BackboneError, match="cannot load a CLIP from"):
        ClipMatcher.from_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="of the kind 'clip_text_model'"):
        ClipMatcher.from_pretrained(tiny_sd_folder / "text_encoder")

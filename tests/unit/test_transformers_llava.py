"""The tower inside LLaVA and LLaVA-NeXT of transformers, stock and with prompts."""

import warnings

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

import tiny_llava
from diffenc.errors import BackboneError, ConfigError, PromptError
from diffenc.hosts.prompts import PromptTokenizer, prompt_scope
from diffenc.hosts.transformers import (
    DiffEncLlavaForConditionalGeneration,
    DiffEncLlavaNextForConditionalGeneration,
    DiffEncLlavaProcessor,
)
from tiny_llava import inner, tower_of

CLASSES = [
    (LlavaForConditionalGeneration, DiffEncLlavaForConditionalGeneration),
    (LlavaNextForConditionalGeneration, DiffEncLlavaNextForConditionalGeneration),
]
SPEC = "diffenc:shapes?rank=2"
QUESTIONS = ["what color is the circle?", "how many squares are there?", "a red star"]
GENERATE = {
    "max_new_tokens": 4,
    "min_new_tokens": 4,
    "do_sample": False,
    "suppress_tokens": [tiny_llava.IMAGE_TOKEN],  # the language model is random
}
needs_mm_outputs = pytest.mark.skipif(
    tiny_llava.VERSION < (5, 18), reason="mm_encoder_outputs came with transformers 5.18"
)


@pytest.fixture(scope="module")
def model():
    made = tiny_llava.build(SPEC, DiffEncLlavaForConditionalGeneration)
    tiny_llava.train_adapter(tower_of(made))
    return made


@pytest.fixture(scope="module")
def stock(model):
    made = tiny_llava.build(SPEC)
    made.load_state_dict(model.state_dict())
    return made


@pytest.fixture(scope="module")
def tiled():
    made = tiny_llava.build(SPEC, DiffEncLlavaNextForConditionalGeneration)
    tiny_llava.train_adapter(tower_of(made))
    return made


needs_no_class_token = pytest.mark.skipif(
    tiny_llava.VERSION < (4, 57), reason="LLaVA-NeXT of transformers 4.48 asks for a class token"
)


def asked(count: int, first: int = 0) -> dict[str, torch.Tensor]:
    tokens = PromptTokenizer("shapes")(QUESTIONS[first : first + count])
    return {"prompt_input_ids": tokens.ids, "prompt_attention_mask": tokens.mask}


@torch.no_grad()
def test_stock_llava_reads_projected_tower_features(stock):
    ids, pixel_values = tiny_llava.text_ids([1, 1]), tiny_llava.pixel_values()
    seen = []
    language = inner(stock).language_model
    handle = language.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    stock(**ids, pixel_values=pixel_values)
    handle.remove()
    features = tower_of(stock)(pixel_values).last_hidden_state
    expected = inner(stock).multi_modal_projector(features).flatten(0, 1)
    place = ids["input_ids"] == tiny_llava.IMAGE_TOKEN
    torch.testing.assert_close(seen[0][place], expected)
    words = stock.get_input_embeddings()(ids["input_ids"][~place])
    assert torch.equal(seen[0][~place], words)


@torch.no_grad()
def test_a_prompt_is_dropped_by_the_stock_forward_and_read_by_ours(stock, model):
    """Documented: what LLaVA does not know goes to the language model."""
    given = {**tiny_llava.text_ids([1, 1]), "pixel_values": tiny_llava.pixel_values()}
    plain = stock(**given).logits
    assert torch.equal(model(**given).logits, plain)
    assert not torch.allclose(model(**given, **asked(2)).logits, plain, atol=1e-3)
    if tiny_llava.VERSION >= (4, 57):
        assert torch.equal(stock(**given, **asked(2)).logits, plain)
    with prompt_scope(QUESTIONS[:2]):
        assert torch.equal(stock(**given).logits, model(**given, **asked(2)).logits)


SAMPLES = [1, 0, 2]


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    [
        *("prompts", "prompt", "prompt_ids", "vision_prompt_ids", "prompt_mask"),
        *("question", "text", "texts", "captions"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate", "get_image_features"])
def test_prompts_by_another_name_are_refused_and_not_dropped(model, name, call):
    inputs = {"pixel_values": tiny_llava.pixel_values()}
    if call != "get_image_features":
        inputs |= tiny_llava.text_ids([1, 1])
    with pytest.raises(PromptError, match=f"unknown argument '{name}'; pass prompts as"):
        getattr(model, call)(**inputs, **{name: QUESTIONS[:1]})


def test_options_of_generation_that_are_named_like_a_prompt_are_read(model):
    ids = tiny_llava.text_ids([1, 1])
    given = {**ids, "pixel_values": tiny_llava.pixel_values(), **asked(2)}
    told = {**GENERATE, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(**given, **told)
    other = torch.full_like(ids["input_ids"], 5)  # text without a picture
    guided = model.generate(**given, **told, guidance_scale=3.0, negative_prompt_ids=other)
    assert not torch.allclose(plain.scores[0], guided.scores[0], atol=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_mixed_batch_answers_as_its_samples_alone(model, beams):
    ids, pixel_values = tiny_llava.text_ids(SAMPLES), tiny_llava.pixel_values(3)
    told = {**GENERATE, "output_scores": True, "return_dict_in_generate": True, "num_beams": beams}
    together = model.generate(**ids, pixel_values=pixel_values, **asked(3), **told)
    before = 0
    for row, images in enumerate(SAMPLES):
        kept = ids["attention_mask"][row].bool()
        one = {"input_ids": ids["input_ids"][row][kept][None]}
        one["attention_mask"] = torch.ones_like(one["input_ids"])
        if images:
            one["pixel_values"] = pixel_values[before : before + images]
            one |= asked(images, before)
        alone = model.generate(**one, **told)
        assert torch.equal(together.sequences[row, -4:], alone.sequences[0, -4:]), row
        for step, scores in enumerate(alone.scores):
            mixed = together.scores[step][row * beams : (row + 1) * beams]
            torch.testing.assert_close(mixed, scores, rtol=0, atol=1e-4)
        before += images


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_every_beam_sees_all_images_of_its_sample(model, beams):
    given = {**tiny_llava.text_ids(SAMPLES), "pixel_values": tiny_llava.pixel_values(3), **asked(3)}
    told = {"output_scores": True, "return_dict_in_generate": True, "num_beams": beams}
    first = model.generate(**given, **GENERATE, **told).scores[0]
    expected = model(**given).logits[:, -1]
    expected[:, [2, tiny_llava.IMAGE_TOKEN]] = -torch.inf  # as GENERATE asks for
    torch.testing.assert_close(
        first.log_softmax(-1).unflatten(0, (3, beams)),
        expected.log_softmax(-1)[:, None].expand(-1, beams, -1),
        rtol=0,
        atol=1e-4,
    )


@torch.no_grad()
def test_generation_with_and_without_a_cache_continues_the_forward_pass(model):
    given = {**tiny_llava.text_ids([1, 2]), "pixel_values": tiny_llava.pixel_values(3), **asked(3)}
    answers = model.generate(**given, **GENERATE)
    assert torch.equal(model.generate(**given, **GENERATE, use_cache=False), answers)
    whole = {**given, "input_ids": answers, "attention_mask": (answers != 0).long()}
    scores = model(**whole).logits
    scores[..., tiny_llava.IMAGE_TOKEN] = -torch.inf
    scores[..., 2] = -torch.inf  # min_new_tokens
    assert torch.equal(scores[:, -5:-1].argmax(-1), answers[:, -4:])


@torch.no_grad()
def test_another_question_gives_other_scores_in_generation(model):
    given = {**tiny_llava.text_ids([1]), "pixel_values": tiny_llava.pixel_values(1)}
    scores = [
        model.generate(
            **given, **prompt, **GENERATE, output_scores=True, return_dict_in_generate=True
        ).scores[0]
        for prompt in (asked(1), asked(1, 1), asked(1), {})
    ]
    assert torch.equal(scores[0], scores[2])
    assert not torch.allclose(scores[0], scores[1], atol=1e-3)
    assert not torch.allclose(scores[0], scores[3], atol=1e-3)


@torch.no_grad()
def test_one_prompt_stands_for_all_images(model):
    given = {**tiny_llava.text_ids([1, 2]), "pixel_values": tiny_llava.pixel_values(3)}
    one = asked(1)
    three = {name: value.expand(3, -1) for name, value in one.items()}
    torch.testing.assert_close(
        model(**given, **one).logits, model(**given, **three).logits, rtol=0, atol=1e-5
    )
    beams = {**GENERATE, "num_beams": 2}
    assert torch.equal(
        model.generate(**given, **one, **beams), model.generate(**given, **three, **beams)
    )


def test_prompts_that_fit_no_images_are_refused(model):
    ids = tiny_llava.text_ids([1, 1])
    with pytest.raises(PromptError, match="3 prompts, 2 images"):
        model(**ids, pixel_values=tiny_llava.pixel_values(), **asked(3))
    for call in (model, model.generate):
        with pytest.raises(PromptError, match="2 prompts and no images"):
            call(**tiny_llava.text_ids([0, 0]), **asked(2))
    with pytest.raises(PromptError, match="go together"):
        model(
            **ids,
            pixel_values=tiny_llava.pixel_values(),
            prompt_input_ids=asked(2)["prompt_input_ids"],
        )


@needs_mm_outputs
@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_features_made_before_serve_the_stock_class(stock, model, beams):
    ids, pixel_values = tiny_llava.text_ids([2, 1]), tiny_llava.pixel_values(3)
    expected = model(**ids, pixel_values=pixel_values, **asked(3)).logits
    made = {"image": stock.get_image_features(pixel_values, **asked(3))}
    torch.testing.assert_close(stock(**ids, mm_encoder_outputs=made).logits, expected)
    made = {"image": stock.get_image_features(pixel_values, **asked(3))}
    answers = stock.generate(**ids, mm_encoder_outputs=made, **GENERATE, num_beams=beams)
    wanted = model.generate(
        **ids, pixel_values=pixel_values, **asked(3), **GENERATE, num_beams=beams
    )
    assert torch.equal(answers, wanted)
    with pytest.raises(PromptError, match="were made before"):
        model(**ids, mm_encoder_outputs=made, **asked(3))


# By (height, width): 64 tokens of the whole; of two tiles 128, and one at the end of each line.
LENGTHS = {(64, 128): 64 + 8 * (16 + 1), (128, 64): 64 + 16 * (8 + 1)}


def sized(sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Inputs of LLaVA-NeXT: a sample with one image for each size."""
    tiles = [3] * len(sizes)  # the whole and two parts
    pixel_values = tiny_llava.pixel_values(sum(tiles)).unflatten(0, (len(sizes), 3))
    rows = [[1, *([tiny_llava.IMAGE_TOKEN] * LENGTHS[size]), 4, 5] for size in sizes]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": pixel_values,
        "image_sizes": torch.tensor(sizes),
    }


@needs_no_class_token
@torch.no_grad()
def test_every_tile_of_llava_next_reads_the_prompt_of_its_image(tiled):
    given = sized([(64, 128), (128, 64)])
    seen = []
    tower = tower_of(tiled)
    handle = tower.register_forward_hook(lambda *call: seen.append(call[2].last_hidden_state))
    tiled(**given, **asked(2))
    handle.remove()
    rows = asked(2)
    repeated = {name: value.repeat_interleave(3, dim=0) for name, value in rows.items()}
    expected = tower(given["pixel_values"].flatten(0, 1), **repeated).last_hidden_state
    torch.testing.assert_close(seen[0], expected)


@needs_no_class_token
@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
def test_llava_next_answers_batches_as_samples(tiled, beams):
    given = sized([(64, 128), (128, 64)])
    together = tiled.generate(**given, **asked(2), **GENERATE, num_beams=beams)
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in given.items()}
        alone = tiled.generate(**one, **asked(1, row), **GENERATE, num_beams=beams)
        assert torch.equal(together[row, -4:], alone[0, -4:])


@needs_no_class_token
@torch.no_grad()
def test_stock_llava_next_runs_and_agrees_without_prompts(tiled):
    stock = tiny_llava.build(SPEC, LlavaNextForConditionalGeneration)
    stock.load_state_dict(tiled.state_dict())
    given = sized([(64, 128)])
    torch.testing.assert_close(stock(**given).logits, tiled(**given).logits)


@pytest.mark.long
@pytest.mark.parametrize("source", [None, "checkpoint"], ids=["reference", "inside"])
@pytest.mark.parametrize(
    "classes",
    [CLASSES[0], pytest.param(CLASSES[1], marks=needs_no_class_token)],
    ids=["llava", "next"],
)
@torch.no_grad()
def test_checkpoints_serve_both_classes(classes, source, tmp_path):
    for writer in classes if source is None else classes[:1]:
        model = tiny_llava.build(SPEC, writer, backbone_source=source)
        tower_of(model).load_backbone()
        tiny_llava.train_adapter(tower_of(model))
        given = {**tiny_llava.text_ids([1]), "pixel_values": tiny_llava.pixel_values(1)}
        given = sized([(64, 128)]) if "Next" in writer.__name__ else given
        expected = model(**given).logits
        model.save_pretrained(tmp_path / writer.__name__)
        for reader in classes:
            again = reader.from_pretrained(tmp_path / writer.__name__)
            torch.testing.assert_close(again(**given).logits, expected, rtol=1e-4, atol=1e-4)
    half = reader.from_pretrained(tmp_path / writer.__name__, **{tiny_llava.DTYPE: torch.bfloat16})
    assert tower_of(half).dtype == torch.bfloat16
    torch.testing.assert_close(half(**given).logits.float(), expected, rtol=0, atol=5e-2)


@torch.no_grad()
def test_a_checkpoint_without_the_backbone_it_promises_is_told_of(tmp_path):
    model = tiny_llava.build("diffenc:shapes")
    model.save_pretrained(tmp_path)
    config = LlavaConfig.from_pretrained(tmp_path)
    config.vision_config.backbone_source = "checkpoint"
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path, config=config)
    with pytest.raises(BackboneError, match="lacked weights"):
        again(**tiny_llava.text_ids([1]), pixel_values=tiny_llava.pixel_values(1))


@pytest.mark.long
@torch.no_grad()
def test_a_device_map_places_the_hidden_backbone_with_its_tower(tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_llava.build(SPEC)
    tiny_llava.train_adapter(tower_of(model))
    given = {**tiny_llava.text_ids([1]), "pixel_values": tiny_llava.pixel_values(1)}
    model.save_pretrained(tmp_path)
    again = CLASSES[0][1].from_pretrained(tmp_path, device_map="auto")
    device = tower_of(again).device
    there = {name: value.to(device) for name, value in given.items()}
    assert tower_of(again).tower.device == device
    torch.testing.assert_close(
        again(**there).logits.cpu(), model(**given).logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("source", [None, "checkpoint"], ids=["reference", "inside"])
def test_a_tower_that_a_device_map_offloads_is_refused(source, tmp_path):
    pytest.importorskip("accelerate")
    model = tiny_llava.build(SPEC, backbone_source=source)
    model.save_pretrained(tmp_path / "model")
    prefix = "model." if inner(model) is not model else ""
    places = {name: "cpu" for name, _ in inner(model).named_children()}
    device_map = {f"{prefix}{name}": place for name, place in places.items()}
    device_map |= {f"{prefix}vision_tower": "disk"} | ({"lm_head": "cpu"} if prefix else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = LlavaForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
        )
    with pytest.raises(ConfigError, match="device_map offloads the tower"):
        again(**tiny_llava.text_ids([1]), pixel_values=tiny_llava.pixel_values(1))


def test_another_tower_is_refused():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ),
        text_config=tiny_llava.build("diffenc:shapes").config.text_config,
    )
    with pytest.raises(ConfigError, match="CLIPVisionModel, which reads no prompts"):
        DiffEncLlavaForConditionalGeneration(config)


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        ids = {name: value[0] for name, value in tiny_llava.text_ids([1]).items()}
        prompt = {name: value[0] for name, value in asked(1, index).items()}
        pixel_values = tiny_llava.pixel_values(1, seed=index)[0]
        return {**ids, "labels": ids["input_ids"], "pixel_values": pixel_values, **prompt}


def trained(folder, *, checkpointing: bool):
    model = tiny_llava.build(SPEC, DiffEncLlavaForConditionalGeneration)
    tiny_llava.train_adapter(tower_of(model))
    before = {name: value.clone() for name, value in model.named_parameters()}
    name = "activation" if tiny_llava.VERSION >= (5, 23) else "gradient"
    sparing = {
        f"{name}_checkpointing": checkpointing,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }
    options = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        save_strategy="no",
        **sparing,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model, options, train_dataset=Samples())
    trainer.train()
    unet = tower_of(model).tower.encoder.backbone.unet
    assert unet.is_gradient_checkpointing == checkpointing
    return before, dict(model.named_parameters())


@pytest.mark.long
@pytest.mark.filterwarnings("default")  # of the libraries' own doing
def test_trainer_trains_adapter_and_projector_alike_with_checkpointing(tmp_path):
    pytest.importorskip("accelerate")
    before, plain = trained(tmp_path, checkpointing=False)
    changed = {name for name in plain if not torch.equal(plain[name], before[name])}
    assert {name for name in plain if "adapter" in name} <= changed
    assert any("multi_modal_projector" in name for name in changed)
    _, sparing = trained(tmp_path, checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(sparing[name], value, rtol=1e-3, atol=1e-4, msg=name)


@torch.no_grad()
def test_the_processor_makes_a_row_for_each_image_and_round_trips(model, tmp_path, pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("transformers reads options off the constructor, which the checker wraps")
    tower = tower_of(model)
    processor = DiffEncLlavaProcessor(
        tiny_llava.image_processor(tower),
        tiny_llava.tokenizer(),
        patch_size=tower.config.patch_size,
        prompt_model="shapes",
    )
    texts = ["<image> what color", "how many", "<image> is the <image> red ?"]
    images, options = tiny_llava.pictures(3), {"padding": True, "return_tensors": "pt"}
    made = processor(images=images, text=texts, prompts=QUESTIONS, **options)
    expected = tower.tower.tokenize([QUESTIONS[0], QUESTIONS[2], QUESTIONS[2]])
    assert torch.equal(made["prompt_input_ids"], expected.ids)
    assert torch.equal(made["prompt_attention_mask"], expected.mask)
    assert (made["input_ids"] == tiny_llava.IMAGE_TOKEN).sum(1).tolist() == [64, 0, 128]
    assert model(**made).logits.shape[:2] == made["input_ids"].shape
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, DiffEncLlavaProcessor)
    assert (tmp_path / "prompt_tokenizer").is_dir()
    again.prompt_model = again._prompts.model = "no such model"
    repeated = again(images=images, text=texts, prompts=QUESTIONS, **options)
    assert all(torch.equal(value, repeated[name]) for name, value in made.items())
    without = processor(images=images, text=texts, **options)
    assert "prompt_input_ids" not in without
    with pytest.raises(PromptError, match="3 texts, or one for each of 3 images: got 2"):
        processor(images=images, text=texts, prompts=QUESTIONS[:2], **options)
    assert "prompt_input_ids" not in processor(text=["how many"], prompts=["a circle"], **options)


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def chat(question: str, *images: Image.Image) -> list[dict[str, object]]:
    parts = [{"type": "image", "image": each} for each in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


@pytest.fixture(scope="module")
def asking(model, pytestconfig):
    if pytestconfig.getoption("jaxtyping_packages", None):
        pytest.skip("transformers reads options off the constructor, which the checker wraps")
    return DiffEncLlavaProcessor(
        tiny_llava.image_processor(tower_of(model)),
        tiny_llava.tokenizer(),
        patch_size=tower_of(model).config.patch_size,
        chat_template=TEMPLATE,
        chat_prompts="question",
    )


COMPLETE = {
    "tokenize": True,
    "return_dict": True,
    "return_tensors": "pt",
    "add_generation_prompt": True,
}


def padded() -> dict[str, object]:
    options: dict[str, object] = {"padding": True}
    return {"processor_kwargs": options} if tiny_llava.VERSION >= (5, 4) else options


needs_pictures_in_chats = pytest.mark.skipif(
    tiny_llava.VERSION < (4, 57), reason="processors of transformers 4.48 read no pictures of chats"
)


@needs_pictures_in_chats
def test_chats_of_several_samples_are_processed_as_their_texts_and_pictures(asking):
    first, *others = tiny_llava.pictures(3)
    chats = [chat("what color", first), chat("how many"), chat("is the red ?", *others)]
    made = asking.apply_chat_template(chats, **COMPLETE, **padded())
    texts = ["<image> what color ", "how many ", "<image> <image> is the red ? "]
    prompts = ["what color", "how many", "is the red ?"]
    images = {"images": [first, *others], "padding": True, "return_tensors": "pt"}
    expected = asking(text=texts, prompts=prompts, **images)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in made)


@needs_pictures_in_chats
def test_prompts_of_a_chat_win_over_its_question(asking):
    messages = chat("what color", *tiny_llava.pictures(1))
    made = asking.apply_chat_template(messages, prompts="a red star", **COMPLETE)
    assert torch.equal(made["prompt_input_ids"], asked(1, first=2)["prompt_input_ids"])
    text = asking.apply_chat_template(messages)
    assert text == "<image> what color "
    with pytest.raises(PromptError, match="tokenize=True, return_dict=True"):
        asking.apply_chat_template(messages, prompts="a red star")


@pytest.mark.skipif(tiny_llava.VERSION < (5, 5), reason="older pipelines drop arguments of chats")
def test_the_pipeline_shows_the_question_of_a_chat_to_the_tower(model, asking):
    pipe = pipeline("image-text-to-text", model=model, processor=asking)
    rows = []
    tower, features = tower_of(model).tower, tower_of(model).tower._features

    def noted(images, tokens):
        rows.append(tokens)
        return features(images, tokens)

    tower._features = noted
    try:
        (picture,) = tiny_llava.pictures(1)
        pipe(text=chat(QUESTIONS[0], picture), max_new_tokens=2)
        pipe(text=chat("what", picture), prompts=QUESTIONS[1], max_new_tokens=2)
        pipe(images=picture, text="<image> what", prompts=QUESTIONS[2], max_new_tokens=2)
    finally:
        del tower._features
    expected = tower.tokenize(QUESTIONS)
    for row, tokens in enumerate(rows):
        assert torch.equal(tokens.ids, expected.ids[row : row + 1])
    assert len(rows) == 3


def test_prompts_that_transformers_drops_are_refused(asking, monkeypatch):
    made = {"input_ids": torch.ones(1, 3)}
    monkeypatch.setattr(LlavaProcessor, "apply_chat_template", lambda *_, **__: made)
    messages = chat("what color", *tiny_llava.pictures(1))
    with pytest.raises(PromptError, match="hands no prompts on"):
        asking.apply_chat_template(messages, prompts="a red star", **COMPLETE)
    with pytest.raises(PromptError, match="hands no prompts on"):
        asking.apply_chat_template(messages, **COMPLETE)
    assert asking.apply_chat_template(chat("what color"), **COMPLETE) is made


def test_the_way_to_make_prompts_is_saved_and_others_are_refused(asking, tmp_path):
    asking.save_pretrained(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).chat_prompts == "question"
    with pytest.raises(ConfigError, match="None or 'question', got 'caption'"):
        DiffEncLlavaProcessor(chat_prompts="caption")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_peft_trains_and_brings_back_the_adapter_that_it_is_told_to_save(tmp_path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def wrapped(**options):
        model = tiny_llava.build("diffenc:shapes?rank=2")
        lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", **options)
        return get_peft_model(model, lora).train()

    shown = {**tiny_llava.text_ids([1]), "pixel_values": tiny_llava.pixel_values(1)}
    with pytest.warns(UserWarning, match="no gradient"):
        wrapped()(**shown)
    model = wrapped(modules_to_save=["multi_modal_projector", "adapter"])
    adapter = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and name.endswith(("_down", "_up"))
    }
    with torch.no_grad():
        for weight in adapter.values():
            weight.normal_(std=0.1)
    model(**shown).logits.sum().backward()
    assert len(adapter) == 72
    assert all(weight.grad.abs().max() > 0 for weight in adapter.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llava.build("diffenc:shapes?rank=2"), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(**shown).logits, model.eval()(**shown).logits)

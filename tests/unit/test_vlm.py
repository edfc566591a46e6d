import json
import math
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BitImageProcessor

from diffenc.encoder import DiffusionEncoder
from diffenc.errors import (
    BackboneError,
    ConfigError,
    NonFiniteError,
    PromptError,
    ShapeError,
)
from diffenc.mllm import IGNORE_ID, IMAGE_ID, DiffusionVLM, VisionTokens, pad, tokens_per_image
from diffenc.projector import Projector
from vlm_builders import (
    TEMPLATE,
    RecordingEncoder,
    picture,
    save_tiny_lm,
    save_tiny_vision,
    tiny_lm,
    tiny_lm_tokenizer,
)

SHORT = {"max_new_tokens": 4}


def make(encoder=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = options.pop("tokenizer", None) or tiny_lm_tokenizer()
        lm = options.pop("lm", None) or tiny_lm()
        return DiffusionVLM(encoder or RecordingEncoder(), lm, tokenizer, **options).eval()


@pytest.fixture(scope="module")
def lm_folder(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    return save_tiny_vision(tmp_path_factory.mktemp("vision"))


def by_hand(vlm, ids, tokens):
    """Embeddings of one sample, put together one by one."""
    table = vlm.language_model.get_input_embeddings().weight
    rows, shown = [], iter(tokens)
    for token in ids:
        rows += list(vlm.projector(next(shown)[None])[0]) if token == IMAGE_ID else [table[token]]
    return torch.stack(rows)


def test_logits_and_loss_are_those_of_embeddings_put_together_by_hand():
    vlm = make()
    first, second = picture(1), picture(2)
    ids = torch.tensor([[5, IMAGE_ID, 9, IMAGE_ID, 12], [7, 8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    labels = torch.tensor([[-100, -100, 9, -100, 12], [-100, 8, 9, -100, -100]])
    with torch.no_grad():
        out = vlm(ids, mask, [[first, second], None], ["ask", "x"], labels)
        tokens = vlm.encoder([first, second], ["ask", "ask"])
        rows = by_hand(vlm, ids[0].tolist(), tokens), by_hand(vlm, [7, 8, 9], [])
        alone = [vlm.language_model(inputs_embeds=row[None]).logits[0] for row in rows]
    assert vlm.encoder.calls[0] == (2, ["ask", "ask"])
    assert out.logits.shape[1] == 3 + 2 * 3
    torch.testing.assert_close(out.logits[0], alone[0])
    torch.testing.assert_close(out.logits[1, :3], alone[1])
    # Label 9 of the first sample follows the first picture, at place 4; 12 the second, at 8.
    wanted = [(alone[0][3], 9), (alone[0][7], 12), (alone[1][0], 8), (alone[1][1], 9)]
    losses = [math.log(sum(math.exp(v) for v in row.tolist())) - row[i].item() for row, i in wanted]
    assert out.loss.item() == pytest.approx(sum(losses) / 4, rel=1e-5)
    half = vlm(ids, mask, [[first, second], None], ["ask", "x"], labels, num_items_in_batch=8)
    assert half.loss.item() == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_tokens_that_were_encoded_before_take_the_place_of_pictures():
    vlm = make()
    ids = torch.tensor([[5, IMAGE_ID, 9]])
    with torch.no_grad():
        tokens = vlm.encode_images([picture(1)], ["abc"])
        direct = vlm(ids, images=[picture(1)], prompts=["abc"]).logits
        assert torch.equal(vlm(ids, image_tokens=list(tokens)).logits, direct)
    with pytest.raises(ShapeError, match="2 pictures for 1 places"):
        vlm(ids, image_tokens=[tokens[0], tokens[0]])
    with pytest.raises(ShapeError, match="pictures have 2 tokens, and 3 were announced"):
        vlm(ids, image_tokens=[tokens[0][:2]])
    for beside in ({"images": [picture(2)]}, {"prompts": ["other"]}):
        with pytest.raises(ConfigError, match="pass image_tokens alone"):
            vlm(ids, image_tokens=list(tokens), **beside)


def greedy(vlm, question, pictures, prompt, steps):
    """Answers one token after the other, the whole sequence anew each time."""
    turn = {"from": "human", "value": "<image>\n" * len(pictures) + question}
    ids = vlm.chat.encode([turn]).input_ids
    tokens = vlm.encoder(pictures, [prompt] * len(pictures)) if pictures else []
    found = []
    for _ in range(steps):
        embeds = by_hand(vlm, ids + found, tokens)
        found.append(vlm.language_model(inputs_embeds=embeds[None]).logits[0, -1].argmax().item())
        if found[-1] == 2:
            break
    return vlm.tokenizer.decode(found, skip_special_tokens=True).strip()


def test_prompts_of_pictures_that_are_encoded_are_as_many_as_these():
    pictures = [picture(0), picture(1)]
    for step in (None, 1):
        vlm = make(image_batch_size=step)
        with pytest.raises(PromptError, match="got one text for 2 pictures"):
            vlm.encode_images(pictures, "what colour?")
        for prompts in (["a", "b", "c"], ["a"]):
            with pytest.raises(PromptError, match=f"{len(prompts)} prompts for 2 pictures"):
                vlm.encode_images(pictures, prompts)
        with pytest.raises(PromptError, match="got one text for 1 samples"):
            vlm(torch.tensor([[5, IMAGE_ID]]), images=pictures[:1], prompts="a")
        assert not vlm.encoder.calls


@torch.no_grad()
def test_answers_are_the_likeliest_tokens_whatever_else_is_in_the_batch():
    vlm = make()
    shown = [[picture(1)], [], [picture(2), picture(3, (30, 50))]]
    asked = ["what?", "who are you and why, tell me at length", "compare"]
    answers = vlm.generate([shown[0][0], None, shown[2]], asked, **SHORT)
    expected = [greedy(vlm, q, p, q, 4) for q, p in zip(asked, shown, strict=True)]
    assert answers == expected
    for question, pictures, answer in zip(asked, shown, answers, strict=True):
        assert vlm.generate(pictures or None, question, **SHORT) == [answer]
    assert len(vlm.generate(shown * 2 + [shown[0]], asked * 2 + asked[:1], **SHORT)) == 7


def test_prompts_come_from_the_policy_or_the_caller_and_go_to_every_picture():
    vlm = make(prompt_policy="question | dropout(1.0)", image_batch_size=2)
    vlm.generate([[picture(0)] * 3, picture(1)], ["one <image><image><image>", "two"], **SHORT)
    assert vlm.encoder.calls == [(2, ["one", "one"]), (2, ["one", "two"])]
    vlm.encoder.calls.clear()
    vlm.generate([picture(0)], ["one"], "a dog", **SHORT)
    vlm.generate([picture(0), picture(1)], ["one", "two"], ["a", "b"], **SHORT)
    vlm.caption([picture(0), picture(1)], **SHORT)
    prompts = [call[1] for call in vlm.encoder.calls]
    assert prompts == [["a dog"], ["a", "b"], ["", ""]]
    captioned = make(prompt_policy="question+caption | noisy")
    captioned.generate(picture(0), "one", **SHORT)
    assert captioned.encoder.calls == [(1, ["one"])]  # nobody knows a caption when asking


def test_a_conversation_is_continued():
    vlm = make()
    turns = [
        {"from": "human", "value": "<image>\nfirst"},
        {"from": "gpt", "value": "yes"},
        {"from": "human", "value": "second"},
    ]
    vlm.generate([picture(0)], [turns], **SHORT)
    assert vlm.encoder.calls == [(1, ["second"])]
    with pytest.raises(PromptError, match="from the human"):
        vlm.generate([picture(0)], [turns[:2]], **SHORT)


def test_more_tokens_than_the_context_holds_are_refused_before_anything_runs():
    vlm = make(lm=tiny_lm(context=32))
    with pytest.raises(ShapeError, match=r"12 of them of pictures|4 x 3 of them"):
        vlm.generate([[picture(i) for i in range(4)]], ["a long question here"], **SHORT)
    with pytest.raises(ShapeError, match="and 40 new ones"):
        vlm.generate(picture(0), "hi", max_new_tokens=40)
    assert vlm.encoder.calls == []


@pytest.mark.parametrize(
    ("images", "questions", "prompts", "message"),
    [
        ([picture(0)], ["a", "b"], None, "pictures for 1 questions"),
        (picture(0), "two <image> <image>", None, "shows 2 pictures"),
        (picture(0), [], None, "no question"),
        ([picture(0)], ["a"], ["b", "c"], "2 prompts for 1"),
    ],
    ids=["pictures", "marks", "none", "prompts"],
)
def test_numbers_that_do_not_fit_are_refused(images, questions, prompts, message):
    with pytest.raises(PromptError, match=message):
        make().generate(images, questions, prompts, **SHORT)


@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True}]
)
def test_options_that_give_several_answers_to_a_question_are_refused(options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* one answer per question"):
        make().generate(picture(0), ["a"], **SHORT, **options)
    vlm = make()
    for name, value in options.items():
        setattr(vlm.language_model.generation_config, name, value)
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* one answer per question"):
        vlm.generate(picture(0), ["a"], **SHORT)
    config = vlm.language_model.generation_config
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* one answer per question"):
        make().generate(picture(0), ["a"], **SHORT, generation_config=config)


def test_a_forward_pass_names_the_sample_whose_pictures_do_not_fit():
    ids = torch.tensor([[5, IMAGE_ID], [5, 6]])
    with pytest.raises(ShapeError, match="sample 1 has 0 places"):
        make()(ids, images=[picture(0), picture(1)])
    with pytest.raises(PromptError, match="1 prompts for 2 samples"):
        make()(ids, images=[picture(0), None], prompts=["a"])


def test_no_pad_token_is_needed_but_some_end_is():
    vlm = make(tokenizer=tiny_lm_tokenizer(pad_token=None))
    reference = make()
    questions = ["a", "a longer one"]
    assert vlm.generate(None, questions, **SHORT) == reference.generate(None, questions, **SHORT)
    with pytest.raises(ConfigError, match="neither a pad token nor an end"):
        make(tokenizer=tiny_lm_tokenizer(pad_token=None, eos=None)).generate(None, "a", **SHORT)


def test_training_reaches_the_projector_even_without_a_picture():
    vlm = make().train()
    vlm.language_model.requires_grad_(False)
    encoded = [vlm.chat.encode([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])]
    ids, mask = pad(encoded)
    labels = torch.tensor([encoded[0].labels])
    vlm(ids, mask, [None], [""], labels).loss.backward()
    gradients = [p.grad for p in vlm.projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    marked = [
        vlm.chat.encode([{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}])
    ]
    ids, mask = pad(marked)
    vlm(ids, mask, [picture(0)], [""], torch.tensor([marked[0].labels])).loss.backward()
    assert all(g.any() for g in gradients)
    assert all(p.grad is None for p in vlm.language_model.parameters())


def test_generation_leaves_the_mode_as_it_was_also_after_an_error():
    vlm = make().train()
    vlm.generate(picture(0), "a", **SHORT)
    assert vlm.training
    assert vlm.language_model.training
    with pytest.raises(ShapeError):
        vlm.generate(picture(0), "a", max_new_tokens=10_000)
    assert vlm.training
    vlm.language_model.eval()  # as a frozen part is kept while others train
    vlm.generate(picture(0), "a", **SHORT)
    assert not any(module.training for module in vlm.language_model.modules())
    assert vlm.projector.training


def test_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointed in (False, True):
        vlm = make().train()
        vlm.language_model.requires_grad_(False)
        if checkpointed:
            vlm.gradient_checkpointing_enable()
        ids = torch.tensor([[5, IMAGE_ID, 9, 10]])
        labels = torch.tensor([[-100, -100, 9, 10]])
        vlm(ids, images=[picture(0)], prompts=["a"], labels=labels).loss.backward()
        found.append([p.grad for p in vlm.projector.parameters()])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="gives 8 channels"):
        make(projector=Projector(2, 8))
    with pytest.raises(ConfigError, match="no encoder of pictures"):
        make(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        DiffusionVLM(RecordingEncoder(), tiny_lm())
    with pytest.raises(BackboneError, match="cannot load a language model"):
        DiffusionVLM(RecordingEncoder(), "/nowhere/at/all")


@pytest.mark.long
def test_the_encoder_is_a_diffusion_model_and_all_is_saved_and_loaded(
    tiny_sd_folder, lm_folder, tmp_path
):
    encoder = DiffusionEncoder.from_pretrained(
        tiny_sd_folder, taps="up_blocks.1", conditioning="cfg", truncate=True
    )
    encoder.add_lora(rank=2)
    vlm = make(encoder, lm=str(lm_folder), tokenizer=tiny_lm_tokenizer(), prompt_policy="empty")
    vlm.add_language_lora(rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in vlm.named_trainable_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    assert vlm.tokens_per_image == encoder([picture(0)], "a").shape[1]
    vlm.save_pretrained(tmp_path / "vlm")
    assert not (tmp_path / "vlm" / "language_model").exists()
    again = DiffusionVLM.from_pretrained(tmp_path / "vlm")
    ids = torch.tensor([[5, IMAGE_ID, 9]])
    with torch.no_grad():
        arguments = {"images": [picture(0)], "prompts": ["what"]}
        left, right = vlm(ids, **arguments).logits, again(ids, **arguments).logits
        vlm.encoder.set_lora(None)
        assert not torch.allclose(vlm(ids, **arguments).logits, left)
    assert torch.equal(left, right)
    assert str(again.prompt_policy) == "empty"
    assert not list(again.named_trainable_parameters()) or all(
        name.startswith("projector.") for name, _ in again.named_trainable_parameters()
    )
    (tmp_path / "vlm" / "lora").rename(tmp_path / "gone")
    with pytest.raises(BackboneError, match="lacks lora"):
        DiffusionVLM.from_pretrained(tmp_path / "vlm")
    with pytest.raises(BackboneError, match=r"does not hold a model: there is no vlm\.json"):
        DiffusionVLM.from_pretrained(tmp_path)


def test_a_language_model_without_a_name_or_with_training_is_saved_whole(
    vision_folder, lm_folder, tmp_path
):
    vision = VisionTokens.from_pretrained(vision_folder, layer=-1)
    vlm = make(vision)
    vlm.save_pretrained(tmp_path / "a")
    told = json.loads((tmp_path / "a" / "vlm.json").read_text())
    assert told["language_model"] is None
    assert told["encoder"] == {"kind": "vision", "name": str(vision_folder), "layer": -1}
    again = DiffusionVLM.from_pretrained(tmp_path / "a")
    assert again.generate(picture(0), "a", **SHORT) == vlm.generate(picture(0), "a", **SHORT)
    again.save_pretrained(tmp_path / "b")  # its name is a folder that may go
    assert (tmp_path / "b" / "language_model" / "model.safetensors").is_file()
    named = make(vision, lm=str(lm_folder))
    named.language_model.requires_grad_(False)
    named.save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / "language_model").exists()
    with pytest.raises(ConfigError, match="has no name"):
        vlm.save_pretrained(tmp_path / "d", include_language_model=False)


def test_a_baseline_gives_the_patches_without_class_and_registers(vision_folder):
    vision = VisionTokens.from_pretrained(vision_folder, layer=-1)
    image = picture(3, (16, 16))
    found = vision([image, image], ["read", "not"])
    assert found.shape == (2, 4, 8)
    assert tokens_per_image(vision) == vision.num_tokens == 4
    inputs = vision.image_processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = vision.model(inputs, output_hidden_states=True).hidden_states[-1]
    assert states.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(found[0], states[0, 4:])
    assert not torch.equal(found, vision([Image.new("RGB", (16, 16)), image]))
    with pytest.raises(ConfigError, match="layer must be"):
        VisionTokens.from_pretrained(vision_folder, layer=9)
    with pytest.raises(BackboneError, match="cannot load a vision model"):
        VisionTokens.from_pretrained("/nowhere/at/all")


def test_labels_of_pictures_are_never_learnt():
    vlm = make()
    ids = torch.tensor([[5, IMAGE_ID, 9]])
    labels = torch.full_like(ids, IGNORE_ID)
    assert vlm(ids, images=[picture(0)], prompts=["a"], labels=labels).loss.item() == 0


def test_a_padded_baseline_sees_all_of_a_picture_as_llava_does(vision_folder, lm_folder, tmp_path):
    wide = picture(0, size=(40, 16))
    vision = VisionTokens.from_pretrained(vision_folder, layer=-1, pad=True)
    # LLaVA's rule: a square of the longer side, in the mean colour, the picture in its middle
    colour = tuple(int(255 * level) for level in vision.image_processor.image_mean)
    square = Image.new("RGB", (40, 40), colour)
    square.paste(wide, (0, 12))
    plain = VisionTokens.from_pretrained(vision_folder, layer=-1)
    assert torch.equal(vision([wide]), plain([square]))
    assert not torch.equal(vision([wide]), plain([wide]))
    assert torch.equal(vision([square]), plain([square]))
    DiffusionVLM(vision, lm_folder).save_pretrained(tmp_path)
    assert DiffusionVLM.from_pretrained(tmp_path).encoder.pad is True
    with pytest.raises(ConfigError, match="pad must be"):
        VisionTokens.from_pretrained(vision_folder, pad="yes")


def test_adapters_that_a_saved_model_would_lose_are_refused(lm_folder, vision_folder, tmp_path):
    vlm = DiffusionVLM(VisionTokens.from_pretrained(vision_folder), lm_folder)
    vlm.add_language_lora(rank=2, alpha=4)
    vlm.language_model.base_model.disable_adapter_layers()  # it would be in use again
    with pytest.raises(ConfigError, match=r"the adapters \['default'\], of which none are in use"):
        vlm.save_pretrained(tmp_path)
    vlm.language_model.base_model.enable_adapter_layers()
    vlm.save_pretrained(tmp_path)
    vlm.language_model.add_adapter("other", vlm.language_model.peft_config["default"])
    for name in ("other", "default"):  # one of the two would come back
        vlm.language_model.set_adapter(name)
        with pytest.raises(ConfigError, match=rf"'other'\], of which \['{name}'\] are in use"):
            vlm.save_pretrained(tmp_path)
    vlm.language_model.delete_adapter("other")
    vlm.save_pretrained(tmp_path)


def test_an_adapter_that_is_not_whole_is_refused(lm_folder, vision_folder, tmp_path):
    """By itself peft draws what is missing at random, and leaves out what has no place."""
    vlm = DiffusionVLM(VisionTokens.from_pretrained(vision_folder), lm_folder)
    vlm.add_language_lora(rank=2, alpha=4)
    vlm.save_pretrained(tmp_path / "good")
    DiffusionVLM.from_pretrained(tmp_path / "good")
    file = "lora/adapter_model.safetensors"
    weights = load_file(tmp_path / "good" / file)
    first = next(iter(weights))
    for number, changed in enumerate(
        [
            {name: value for name, value in weights.items() if name != first},
            {**weights, "base_model.model.strange.lora_A.weight": torch.ones(2, 2)},
            {**weights, first: weights[first][:1].clone()},
        ]
    ):
        folder = shutil.copytree(tmp_path / "good", tmp_path / str(number))
        save_file(changed, folder / file, {"format": "pt"})
        with pytest.raises(BackboneError, match=r"no .*LoRA adapter of this language model"):
            DiffusionVLM.from_pretrained(folder)
    (folder / file).unlink()
    torch.save(weights, folder / "lora" / "adapter_model.bin")
    with pytest.raises(BackboneError, match=r"cannot load .*adapter_model\.safetensors"):
        DiffusionVLM.from_pretrained(folder)


@pytest.mark.parametrize("part", ["projector", "language_model"])
def test_answers_are_not_made_of_nan(part):
    vlm = make()
    with torch.no_grad():
        list(getattr(vlm, part).parameters())[-1].fill_(math.nan)
    with pytest.raises(NonFiniteError, match="NaN"):
        vlm.generate(picture(1), "what?", **SHORT)


def test_an_adapter_of_the_language_model_made_in_inference_mode_trains_outside():
    with torch.inference_mode():
        vlm = make()
        vlm.add_language_lora(rank=2)
    tensors = [*vlm.parameters(), *vlm.buffers()]
    assert not any(tensor.is_inference() for tensor in tensors)


def test_another_tokenizer_than_the_one_that_was_saved_is_refused(
    lm_folder, vision_folder, tmp_path
):
    vlm = DiffusionVLM(VisionTokens.from_pretrained(vision_folder), lm_folder)
    vlm.tokenizer.add_tokens(["circle"])
    vlm.save_pretrained(tmp_path / "saved", include_language_model=False)
    with pytest.raises(BackboneError, match="has not the tokenizer"):
        DiffusionVLM.from_pretrained(tmp_path / "saved")


def test_a_model_with_an_adapter_keeps_the_tokenizer_it_was_trained_with(
    lm_folder, vision_folder, tmp_path
):
    tokenizer = tiny_lm_tokenizer(template=TEMPLATE.replace("<|user|>", "<|user|>they say "))
    vlm = DiffusionVLM(VisionTokens.from_pretrained(vision_folder), lm_folder, tokenizer)
    vlm.add_language_lora(rank=2, alpha=4)
    vlm.save_pretrained(tmp_path)
    turns = [{"from": "human", "value": "hi"}]
    assert DiffusionVLM.from_pretrained(tmp_path).chat.text(turns) == vlm.chat.text(turns)
    (tmp_path / "lora" / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match="cannot load a tokenizer"):
        DiffusionVLM.from_pretrained(tmp_path)


def test_an_answer_ends_where_the_template_ends_it_whatever_the_language_model_says():
    vlm = make(template="v1")
    assert vlm.language_model.generation_config.eos_token_id == 2
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert vlm.chat.encode(turns).labels[-1] == 2
    steps = []

    def ends_third(_, scores):
        steps.append(1)
        chosen = torch.zeros_like(scores)
        chosen[:, 2 if len(steps) == 3 else 50] = 1
        return chosen

    for own in (None, 9, [9, 2]):
        steps.clear()
        vlm.language_model.generation_config.eos_token_id = own
        vlm.generate(None, "a", max_new_tokens=8, logits_processor=[ends_third])
        assert len(steps) == 3
    steps.clear()
    vlm.generate(None, "a", max_new_tokens=8, logits_processor=[ends_third], eos_token_id=9)
    assert len(steps) == 8


def test_a_baseline_refuses_pictures_that_are_not_of_the_size_it_counts_on(vision_folder):
    loose = BitImageProcessor(
        size={"height": 16, "width": 16}, do_resize=False, do_center_crop=False
    )
    vision = VisionTokens.from_pretrained(vision_folder, image_processor=loose)
    assert vision(picture(1, (16, 16))).shape == (1, 4, 8)
    for size in ((64, 64), (32, 16)):
        with pytest.raises(ShapeError, match="says that it makes 2 x 2 patches"):
            vision(picture(1, size))

import copy
import inspect
import json
import pickle
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffenc.errors import ConfigError, PromptError
from diffenc.hosts.llava import (
    AdapterCallback,
    PromptCollator,
    PromptDataset,
    question_of,
    register,
    take_prompts,
    train_with_prompts,
)
from diffenc.hosts.llava.register import restore_adapters
from diffenc.hosts.prompts import PromptTokenizer, prompt_scope
from diffenc.hosts.tower import DiffusionVisionTower
from diffenc.inputs.policies import parse_policy
from diffenc.mllm.chat import IMAGE_MARK
from diffenc.mllm.training.data import read_samples
from diffenc.shapes import render, sample_scenes
from toy_llava import (
    LlavaMetaForCausalLM,
    OldToyLlava,
    OtherTower,
    ToyLlava,
    toy_model,
    toy_package,
)

ADAPTED = "diffenc:shapes?t=50&rank=2&grid=2"
ONE, OTHER = "what color is the circle?", "how many stars are there?"


@pytest.fixture(scope="module")
def loaded() -> DiffusionVisionTower:
    return DiffusionVisionTower(ADAPTED)


@pytest.fixture
def tower(loaded) -> DiffusionVisionTower:
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def images(loaded) -> torch.Tensor:
    pictures = [render(scene) for scene in sample_scenes(4, seed=0)]
    values: torch.Tensor = loaded.image_processor(pictures, return_tensors="pt")["pixel_values"]
    return values


@pytest.fixture
def model(tower) -> Any:
    return take_prompts(toy_model(tower))


@pytest.fixture
def package() -> Iterator[Any]:
    with toy_package("toyllava") as made:
        done = None
        try:
            done = register("toyllava")
            yield SimpleNamespace(done=done, **vars(made))
        finally:
            if done is not None:
                done.undo()


def logits(model, ids, images, prompts=None, mask=None) -> torch.Tensor:
    kwargs = {}
    if prompts is not None:
        tokens = model.get_vision_tower().tokenize(prompts)
        kwargs = {"vision_prompt_ids": tokens.ids, "vision_prompt_mask": tokens.mask}
    with torch.no_grad():
        result: torch.Tensor = model(ids, attention_mask=mask, images=images, **kwargs).logits
    return result


# The builder


def test_the_builder_makes_towers_of_specs_and_leaves_others_to_the_host(package) -> None:
    for module in (package.builder, package.arch):
        tower = module.build_vision_tower(SimpleNamespace(mm_vision_tower=ADAPTED), delay_load=True)
        assert isinstance(tower, DiffusionVisionTower)
        assert not tower.is_loaded
        arguments = SimpleNamespace(vision_tower="openai/clip-vit-large-patch14-336")
        assert isinstance(module.build_vision_tower(arguments), OtherTower)
        assert isinstance(module.build_vision_tower(SimpleNamespace()), OtherTower)
    assert [str(spec) for spec in package.done.specs] == ["diffenc:shapes?grid=2&rank=2"] * 2
    with pytest.raises(ConfigError, match="rnk"):
        package.builder.build_vision_tower(SimpleNamespace(vision_tower="diffenc:shapes?rnk=2"))


def test_registering_twice_is_once_and_undoing_leaves_nothing() -> None:
    with toy_package("toyllava") as made:
        before = (made.builder.build_vision_tower, made.arch.build_vision_tower)
        done = register("toyllava")
        assert register("toyllava") is done
        done.undo()
        assert (made.builder.build_vision_tower, made.arch.build_vision_tower) == before
        again = register("toyllava")
        assert again is not done
        again.undo()


def test_a_package_of_another_kind_is_told_and_left_as_it_was() -> None:
    with pytest.raises(ConfigError, match="cannot import nosuchllava"):
        register("nosuchllava")
    with toy_package("toyllava", **{".model.builder": "load_pretrained_model"}) as made:
        before = made.builder.build_vision_tower
        with pytest.raises(ConfigError, match="load_pretrained_model"):
            register("toyllava")
        assert made.builder.build_vision_tower is before


def test_loading_a_checkpoint_brings_its_adapter(package, tower, tmp_path) -> None:
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.fill_(0.25)
    tower.save_adapter(tmp_path)
    fresh = toy_model(DiffusionVisionTower(ADAPTED, delay_load=True))
    load = package.modules[".model.builder"].load_pretrained_model
    _, model, _, _ = load(str(tmp_path), None, "llava", model=fresh)
    assert model is fresh
    assert all((p == 0.25).all() for p in model.get_vision_tower().parameters())


def test_a_checkpoint_without_an_adapter_is_told_of(tower, tmp_path) -> None:
    with pytest.warns(UserWarning, match="none of"):
        restore_adapters(toy_model(tower), [str(tmp_path), None])


# Prompts


def test_the_question_reaches_the_tower_and_only_the_question(model, images) -> None:
    ids = torch.tensor([[1, -200, 5]])
    one = logits(model, ids, images[:1], [ONE])
    assert torch.equal(logits(model, ids, images[:1], [ONE]), one)
    assert (logits(model, ids, images[:1], [OTHER]) - one).abs().max() > 1e-4
    without = logits(model, ids, images[:1])
    assert torch.equal(logits(model, ids, images[:1], [""]), without)
    with prompt_scope(ONE):
        assert torch.equal(logits(model, ids, images[:1]), one)
        assert not torch.equal(logits(model, ids, images[:1], [OTHER]), one)
    assert torch.equal(logits(model, ids, images[:1]), without)


def test_gradients_flow_through_a_prompted_step(model, images) -> None:
    tokens = model.get_vision_tower().tokenize([ONE])
    out = model(
        torch.tensor([[1, -200, 5]]),
        images=images[:1],
        vision_prompt_ids=tokens.ids,
        vision_prompt_mask=tokens.mask,
    )
    out.logits.sum().backward()
    assert all(p.grad is not None for p in model.get_vision_tower().parameters())


MIXED = torch.tensor([[1, -200, 5, 6, 0], [1, 7, 8, 9, 5], [1, -200, 5, -200, 6]])


def test_a_mixed_batch_equals_its_samples_one_by_one(model, images) -> None:
    shown = torch.stack([images[0], torch.zeros_like(images[0]), images[1], images[2]])
    batch = logits(model, MIXED, shown, [ONE, "", OTHER], MIXED != 0)
    alone = [
        logits(model, MIXED[:1, :4], shown[:1], [ONE]),
        logits(model, MIXED[1:2], shown[1:2]),
        logits(model, MIXED[2:], shown[2:], [OTHER]),
    ]
    for row, part in enumerate(alone):
        torch.testing.assert_close(batch[row, : part.shape[1]], part[0], atol=1e-5, rtol=1e-4)
    swapped = logits(model, MIXED, shown, [ONE, "", ONE], MIXED != 0)
    torch.testing.assert_close(swapped[0], batch[0])
    assert (swapped[2] - batch[2]).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["list", "stacked"])
def test_every_tile_of_an_image_reads_its_samples_prompt(model, images, form) -> None:
    ids = torch.tensor([[1, -200, 5], [1, -200, 5]])
    tiles = [images[:2], images[2:]]
    shown = tiles if form == "list" else torch.stack(tiles)
    both = logits(model, ids, shown, [ONE, OTHER])
    for row, prompt in enumerate([ONE, OTHER]):
        alone = logits(model, ids[:1], [tiles[row]], [prompt])
        torch.testing.assert_close(both[row], alone[0], atol=1e-5, rtol=1e-4)


def test_one_prompt_is_for_all_samples(model, images) -> None:
    ids = torch.tensor([[1, -200, 5], [1, -200, 5]])
    torch.testing.assert_close(
        logits(model, ids, images[:2], [ONE]), logits(model, ids, images[:2], [ONE, ONE])
    )


def test_prompts_that_fit_neither_samples_nor_images_are_told(model, images) -> None:
    ids = torch.tensor([[1, -200, 5], [1, -200, 5]])
    with pytest.raises(PromptError, match="3 prompts"):
        logits(model, ids, images[:2], [ONE] * 3)
    with pytest.raises(PromptError, match="2 images"):
        logits(model, ids, images[:3], [ONE, ONE])
    tokens = model.get_vision_tower().tokenize([ONE])
    for part in ({"vision_prompt_mask": tokens.mask}, {"vision_prompt_ids": tokens.ids}):
        with pytest.raises(PromptError, match="vision_prompt_ids and vision_prompt_mask go toget"):
            model(ids, images=images[:2], **part)


def tower_calls(model, monkeypatch) -> list[Any]:
    calls = []
    tower = model.get_vision_tower()
    original = tower._features

    def counted(pixel_values: Any, tokens: Any) -> Any:
        calls.append((len(pixel_values), None if tokens is None else tokens.ids.tolist()))
        return original(pixel_values, tokens)

    monkeypatch.setattr(tower, "_features", counted)
    return calls


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_asks_the_tower_once(model, images, beams, monkeypatch) -> None:
    calls = tower_calls(model, monkeypatch)
    tokens = model.get_vision_tower().tokenize([ONE, OTHER])
    ids = torch.tensor([[1, -200, 5], [1, -200, 5]])
    out = model.generate(
        ids,
        images=images[:2],
        vision_prompt_ids=tokens.ids,
        vision_prompt_mask=tokens.mask,
        num_beams=beams,
        max_new_tokens=3,
        do_sample=False,
    )
    assert len(out) == 2
    assert calls == [(2, tokens.ids.tolist())]


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_the_older_kind_repeats_prompts_with_the_images(
    tower, images, beams, monkeypatch
) -> None:
    model = take_prompts(toy_model(tower, OldToyLlava))
    calls = tower_calls(model, monkeypatch)
    tokens = tower.tokenize([ONE, OTHER])
    ids = torch.tensor([[1, -200, 5], [1, -200, 5]])
    options = {"num_beams": beams, "max_new_tokens": 2, "do_sample": False, "use_cache": False}
    asked = {"vision_prompt_ids": tokens.ids, "vision_prompt_mask": tokens.mask}
    out = model.generate(ids, images=images[:2], **asked, **options)
    assert len(calls) == 2  # a call at every step
    for count, rows in calls:
        assert count == 2 * beams
        assert rows == tokens.ids.repeat_interleave(beams, dim=0).tolist()
    with prompt_scope([ONE, OTHER]):
        assert torch.equal(model.generate(ids, images=images[:2], **options), out)
    assert calls[2:] == calls[:2]


def test_a_prompt_goes_along_into_another_thread(model, images) -> None:
    ids, tokens = torch.tensor([[1, -200, 5]]), model.get_vision_tower().tokenize([ONE])
    expected, found = logits(model, ids, images[:1], [ONE]), []

    def run() -> None:
        with torch.no_grad():
            out = model(
                ids,
                images=images[:1],
                vision_prompt_ids=tokens.ids,
                vision_prompt_mask=tokens.mask,
            )
        found.append(out.logits)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_the_question_can_be_read_from_the_input_ids(tower, images) -> None:
    texts = []

    def text_of(ids: torch.Tensor) -> str:
        texts.append(ids.tolist())
        return ONE

    model = take_prompts(toy_model(tower), text_of=text_of)
    ids = torch.tensor([[1, -200, 5, 6]])
    found = logits(model, ids, images[:1])
    assert texts == [[1, -200, 5, 6]]
    assert torch.equal(found, logits(model, ids, images[:1], [ONE]))
    labels = torch.tensor([[-100, -100, -100, 6]])
    model(ids, images=images[:1], labels=labels)
    assert texts[-1] == [1, -200, 5]  # what is to be learnt is not told
    with prompt_scope(OTHER):
        assert not torch.equal(logits(model, ids, images[:1]), found)


def test_the_last_question_of_a_conversation_is_found() -> None:
    class Words:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert -200 not in ids
            return "A chat. USER: what is this? ASSISTANT: a star USER: and its color? ASSISTANT:"

    assert question_of(Words())(torch.tensor([1, -200, 4])) == "and its color?"


def test_the_class_keeps_its_name_and_signature(tower) -> None:
    model = toy_model(tower)
    before = inspect.signature(type(model).forward)
    take_prompts(model)
    after = inspect.signature(model.forward).parameters
    assert type(model).__name__ == "ToyLlava"
    assert isinstance(model, ToyLlava)
    assert list(after)[: len(before.parameters) - 1] == list(before.parameters)[1:]
    assert {"vision_prompt_ids", "vision_prompt_mask"} <= set(after)
    cls = type(model)
    assert type(take_prompts(model)) is cls
    assert not hasattr(ToyLlava, "_takes_vision_prompts")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_prompts_go_through_peft(tower, images) -> None:
    from peft import LoraConfig, get_peft_model

    model = take_prompts(toy_model(tower))
    ids = torch.tensor([[1, -200, 5]])
    expected = logits(model, ids, images[:1], [ONE])
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ).eval()
    tokens = tower.tokenize([ONE])
    with torch.no_grad():
        out = wrapped(
            input_ids=ids,
            images=images[:1],
            vision_prompt_ids=tokens.ids,
            vision_prompt_mask=tokens.mask,
        )
    assert torch.equal(out.logits, expected)


def test_a_model_of_another_kind_and_a_tower_without_prompts_are_told(images, tower) -> None:
    with pytest.raises(ConfigError, match="prepare_inputs_labels"):
        take_prompts(torch.nn.Linear(2, 2))
    model = take_prompts(toy_model(tower))
    model.model.vision_tower = OtherTower()
    with pytest.raises(PromptError, match="OtherTower"), prompt_scope(ONE):
        model(torch.tensor([[1, -200, 5]]), images=images[:1])


# Data and training


def entry(index: int, question: str = ONE, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "red"}]
    return {"id": str(index), "image": "a.png", "conversations": turns, **more}


def test_samples_and_batches_carry_their_questions() -> None:
    from toy_llava import ToyDataset, toy_collator

    text_only = {"id": "t", "conversations": [{"from": "human", "value": "hello"}]}
    dataset = PromptDataset(ToyDataset([entry(0), entry(1, OTHER), text_only]), "question")
    assert [dataset[i]["vision_prompt"] for i in range(3)] == [ONE, OTHER, ""]
    assert dataset.modality_lengths == [7] * 3
    tokenizer = PromptTokenizer("shapes")
    collator = PromptCollator(toy_collator, tokenizer)
    loader = DataLoader(pickle.loads(pickle.dumps(dataset)), 3, collate_fn=collator)
    batch = next(iter(loader))
    expected = tokenizer([ONE, OTHER, ""])
    assert torch.equal(batch["vision_prompt_ids"], expected.ids)
    assert torch.equal(batch["vision_prompt_mask"], expected.mask)
    assert batch["input_ids"].shape == (3, 3)
    bare = {key: value for key, value in dataset[0].items() if key != "vision_prompt"}
    rows = collator([dataset[1], bare, dataset[2]])["vision_prompt_mask"].sum(dim=1)
    assert rows[1] == 0  # none, which is not the empty one
    assert rows[2] == 2


def test_policies_draw_anew_in_each_epoch() -> None:
    from toy_llava import ToyDataset

    entries = [entry(index, caption="a red circle") for index in range(30)]
    dataset = PromptDataset(ToyDataset(entries), "caption | dropout(0.5)", seed=3)
    first = [dataset.prompt(i) for i in range(30)]
    assert set(first) == {"", "a red circle"}
    assert first == [dataset.prompt(i) for i in range(30)]
    dataset.set_epoch(1)
    assert first != [dataset.prompt(i) for i in range(30)]


def test_captions_of_llavas_first_stage_are_the_answers_in_every_way_of_training(tmp_path) -> None:
    """Rows as blip_laion_cc_sbu_558k.json has them: a request, an answer, and no captions."""
    from toy_llava import ToyDataset

    rows = []
    for index, text in enumerate(("select luxury furniture 3 - inch gel memory foam", "a red car")):
        ask = [
            f"Give a brief description.\n{IMAGE_MARK}",
            f"{IMAGE_MARK}\nRender a clear summary.",
        ][index]
        talk = [{"from": "human", "value": ask}, {"from": "gpt", "value": text}]
        name = f"00{index}.jpg"
        rows.append({"id": f"00{index}", "image": name, "conversations": talk})
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "blip.json").write_text(json.dumps(rows))
    policy = parse_policy("caption | dropout(0.5)")
    own, report = read_samples(tmp_path / "blip.json", tmp_path, policy=policy)
    assert report.broken == 0
    hosted = PromptDataset(ToyDataset(rows), policy, seed=5)
    for epoch in range(4):
        hosted.set_epoch(epoch)
        expected = [policy(sample.prompt_sample(), seed=5, epoch=epoch) for sample in own]
        assert [hosted.prompt(index) for index in range(2)] == expected
    answers = [row["conversations"][1]["value"] for row in rows]
    assert PromptDataset(ToyDataset(rows), "caption").prompt(1) == answers[1]


def test_data_of_another_kind_is_told() -> None:
    with pytest.raises(ConfigError, match="list_data_dict"):
        PromptDataset([1, 2])


def test_a_training_script_gets_prompts_and_a_callback(package) -> None:
    done = train_with_prompts("toyllava", "question")
    assert done is package.done
    package.builder.build_vision_tower(SimpleNamespace(vision_tower=ADAPTED), delay_load=True)
    module = package.script.make_supervised_data_module([entry(0), entry(1, OTHER)])
    batch = module["data_collator"]([module["train_dataset"][i] for i in range(2)])
    assert torch.equal(batch["vision_prompt_ids"], PromptTokenizer("shapes")([ONE, OTHER]).ids)
    assert module["eval_dataset"] is None
    trainer = package.script.LLaVATrainer()
    assert isinstance(trainer.callbacks[0], AdapterCallback)
    assert ToyLlava._takes_vision_prompts
    done.undo()
    assert not hasattr(ToyLlava, "_takes_vision_prompts")
    assert not hasattr(LlavaMetaForCausalLM, "_takes_vision_prompts")
    assert "vision_prompt_ids" not in inspect.signature(ToyLlava.forward).parameters


def test_another_tower_trains_without_prompts(package) -> None:
    train_with_prompts("toyllava")
    with pytest.warns(UserWarning, match="shows no prompts"):
        module = package.script.make_supervised_data_module([entry(0)])
    assert "vision_prompt" not in module["train_dataset"][0]


@pytest.mark.parametrize("held", ["as a module", "in a list"])
def test_the_callback_writes_adapters_beside_checkpoints(tower, tmp_path, held) -> None:
    model = toy_model(tower)
    if held == "in a list":  # as LLaVA does under FSDP
        del model.model.vision_tower
        model.model.vision_tower = [tower]
    with torch.no_grad():
        next(tower.parameters()).fill_(0.5)
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    callback = AdapterCallback()
    callback.on_save(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    for folder in (tmp_path, tmp_path / "checkpoint-3"):
        fresh = DiffusionVisionTower(ADAPTED, delay_load=True)
        assert fresh.load_adapter(folder)
        assert torch.equal(next(fresh.parameters()), next(tower.parameters()))
    other = SimpleNamespace(global_step=9, is_world_process_zero=False)
    callback.on_save(args, other, None, model=model)
    assert not (tmp_path / "checkpoint-9").exists()


def test_a_checkpoint_has_no_place_for_two_adapters(tmp_path) -> None:
    model = torch.nn.Module()
    for timestep in (50, 300):
        tower = DiffusionVisionTower(f"diffenc:shapes?t={timestep}&rank=2", delay_load=True)
        model.add_module(f"tower_{timestep}", tower)
    with pytest.raises(ConfigError, match="2 towers have an adapter, diffenc:shapes"):
        AdapterCallback().on_train_begin(None, None, None, model=model)
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    with pytest.raises(ConfigError, match="a checkpoint has a place for one"):
        AdapterCallback().on_save(SimpleNamespace(output_dir=tmp_path), state, None, model=model)
    model.tower_300 = DiffusionVisionTower("diffenc:shapes?t=300", delay_load=True)
    AdapterCallback().on_train_begin(None, None, None, model=model)

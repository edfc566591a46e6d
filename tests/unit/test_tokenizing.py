"""Ids are those of the tokenizer's own padded call; its settings neither count nor change."""

import copy
import threading

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from tests import builders
from tokenizers import normalizers
from transformers import CLIPTokenizerFast

from diffenc.errors import BackboneError, PromptError
from diffenc.hosts.prompts import tokenize_prompts
from diffenc.inputs import tokenizing
from diffenc.inputs.policies import Caption, PromptSample, draw_prompts
from diffenc.inputs.prompts import count_windows, tokenize, tokenize_windows
from diffenc.inputs.tokenizing import fit_rows, ids_with_places, token_ids
from diffenc.models import StableDiffusion

PROMPTS = (
    "",
    " ",
    "a",
    "A Red\tcircle, left\n of (a) blue square!!",
    "the café in 2024 — don't",
    "cafe\u0301 🔴🔵 猫と犬 ﷺ \u200b",
    "<|endoftext|> red <|startoftext|>",
    "red " * 74,
    "red " * 75,  # 77 with start and end
    "red " * 76,
    "red blue " * 100,
)


class SlowTokenizer:
    """A tokenizer without a backend in Rust, as transformers 4 has them."""

    def __init__(self, tokenizer):
        self._inner = copy.deepcopy(tokenizer)
        self.calls = self.most_at_once = 0

    def __getattr__(self, name):
        if name in ("backend_tokenizer", "_tokenizer", "_inner"):
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __len__(self):
        return len(self._inner)

    def __call__(self, texts, **options):
        self.calls += 1
        self.most_at_once = max(self.most_at_once, self.calls)
        try:
            return self._inner(texts, **options)
        finally:
            self.calls -= 1


@pytest.fixture(params=["!", "<|endoftext|>"])
def tokenizer(request):
    return builders.tiny_tokenizer(pad_token=request.param)


@pytest.fixture(params=["fast", "slow"])
def either(request, tokenizer):
    return tokenizer if request.param == "fast" else SlowTokenizer(tokenizer)


def own_call(tokenizer, texts):
    """What the tokenizer gives by itself, in a copy that nobody else uses."""
    fresh = copy.deepcopy(getattr(tokenizer, "_inner", tokenizer))
    return fresh(
        list(texts), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )


def settings(tokenizer):
    return tokenizer.backend_tokenizer.padding, tokenizer.backend_tokenizer.truncation


def test_ids_and_mask_are_those_of_the_padded_call(either):
    inputs = own_call(either, PROMPTS)
    ids, cut = tokenize(either, PROMPTS)
    tokens = tokenize_prompts(either, list(PROMPTS))
    assert ids.dtype == inputs.input_ids.dtype
    assert ids.equal(inputs.input_ids)
    assert tokens.ids.equal(inputs.input_ids)
    assert tokens.mask.equal(inputs.attention_mask)
    assert cut == (0,) * 9 + (1, 125)
    assert [len(row) for row in tokenize(either, [])[0]] == []


@pytest.mark.parametrize("side", ["padding_side", "truncation_side"])
def test_sides_are_those_of_the_padded_call(either, side):
    setattr(getattr(either, "_inner", either), side, "left")
    assert tokenize(either, PROMPTS)[0].equal(own_call(either, PROMPTS).input_ids)


def test_windows_hold_the_words_in_order(either):
    texts = ("", "red " * 75, "blue " * 76)
    counts = count_windows(either, texts)
    assert counts == (1, 1, 2)
    rows = tokenize_windows(either, texts, counts)
    assert rows[:2].equal(own_call(either, texts).input_ids[:2])
    assert rows[2:].equal(own_call(either, ("blue " * 75, "blue")).input_ids)


def test_settings_of_a_tokenizer_neither_count_nor_change(tokenizer, tmp_path):
    if not tokenizer.is_fast:  # before transformers 5
        tokenizer.save_pretrained(tmp_path)
        tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    wanted = own_call(tokenizer, PROMPTS).input_ids
    backend = tokenizer.backend_tokenizer
    backend.enable_padding(length=9, pad_id=3, pad_token="$")
    backend.enable_truncation(5)
    before = settings(tokenizer)
    sample = [PromptSample(key="1", captions=["red " * 80])]
    assert tokenize(tokenizer, PROMPTS)[0].equal(wanted)
    assert count_windows(tokenizer, ["red " * 76]) == (2,)
    assert draw_prompts(Caption(), sample, tokenizer).truncated == (5,)
    assert ids_with_places(tokenizer, "a red")[1] == [(0, 1), (2, 5)]
    assert settings(tokenizer) == before


def test_a_step_of_the_backend_that_is_replaced_counts(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tokenizer = CLIPTokenizerFast.from_pretrained(tmp_path)
    plain, swapped = token_ids(tokenizer, ["red", "blue"])
    copies = [tokenizing._backend(tokenizer) for _ in range(2)]
    assert copies[0] is copies[1]
    for old, new in (("red", "blue"), ("green", "blue"), ("red", "blue")):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(old, new)
        assert token_ids(tokenizer, ["red"]) == [swapped if old == "red" else plain]


def test_threads_get_whole_rows_while_others_pad_and_cut(tokenizer):
    texts = [f"{'a ' * (index % 90)}red circle" for index in range(200)]
    wanted = token_ids(copy.deepcopy(tokenizer), texts)
    wrong, done = [], threading.Event()

    def disturb():
        while not done.is_set():
            tokenizer(["red"], padding="max_length", max_length=9, truncation=True)

    def read():
        for index, text in enumerate(texts):
            (row,) = token_ids(tokenizer, [text])
            if row != wanted[index]:
                wrong.append((text, row))

    disturbing = threading.Thread(target=disturb)
    readers = [threading.Thread(target=read) for _ in range(4)]
    for thread in (disturbing, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    done.set()
    disturbing.join()
    assert not wrong


def test_a_slow_tokenizer_is_called_by_one_thread_at_a_time(tokenizer):
    slow = SlowTokenizer(tokenizer)
    threads = [
        threading.Thread(target=lambda: [token_ids(slow, ["a red circle"]) for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.most_at_once == 1


def test_tokens_that_are_added_later_count(either):
    assert len(token_ids(either, ["<cat>"])[0]) > 3
    either.add_tokens(["<cat>"])
    assert token_ids(either, ["a <cat>"], special_tokens=False)[0][-1] == len(either) - 1


def test_special_tokens_may_be_split_as_the_tokenizer_says(tokenizer):
    whole = token_ids(tokenizer, ["<|endoftext|>"])[0]
    tokenizer.split_special_tokens = True
    (split,) = token_ids(tokenizer, ["<|endoftext|>"])
    assert [split] == tokenizer(["<|endoftext|>"]).input_ids
    if tokenizer.is_fast:  # the slow one of CLIP knows its own two as words
        assert len(split) > len(whole)


def test_rows_are_padded_to_the_longest_where_asked(tokenizer):
    texts = ["red", "a red circle", "red " * 90]
    wanted = copy.deepcopy(tokenizer)(texts, padding=True, truncation=True, return_tensors="pt")
    ids, mask = fit_rows(tokenizer, token_ids(tokenizer, texts), to_longest=True)
    assert ids.equal(wanted.input_ids)
    assert mask.equal(wanted.attention_mask)
    short = fit_rows(tokenizer, token_ids(tokenizer, texts[:2]), to_longest=True)[0]
    assert short.shape == (2, 5)


def test_no_limit_and_no_padding_token_are_refused(tokenizer):
    tokenizer.pad_token = None
    assert tokenize(tokenizer, ["red " * 75])[0].shape == (1, 77)
    with pytest.raises(BackboneError, match="has no padding token"):
        tokenize(tokenizer, ["red"])
    tokenizer.model_max_length = int(1e30)
    with pytest.raises(BackboneError, match="has no limit"):
        tokenize(tokenizer, ["red"])


def tiny_backbone(vectors=None):
    """A Stable Diffusion, and its pipeline, with a textual inversion of several vectors."""
    pipeline = StableDiffusionPipeline(
        unet=builders.tiny_unet(),
        vae=builders.tiny_vae(),
        scheduler=DDPMScheduler(**builders.NOISE_SCHEDULE, clip_sample=False),
        text_encoder=builders.tiny_text_encoder(),
        tokenizer=builders.tiny_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    if vectors is not None:
        pipeline.load_textual_inversion({"<cat-toy>": vectors}, token="<cat-toy>")
    names = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
    return pipeline, StableDiffusion(
        name="tiny", **{name: getattr(pipeline, name) for name in names}
    )


@pytest.mark.parametrize("prompt", ["a <cat-toy> left of a circle", "<cat-toy>", "a <cat-toy>s"])
@pytest.mark.parametrize("count", [1, 3])
def test_textual_inversions_are_read_as_the_pipeline_reads_them(prompt, count):
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    pipeline, backbone = tiny_backbone(vectors)
    with torch.no_grad():
        wanted, _ = pipeline.encode_prompt(prompt, "cpu", 1, False)
    assert backbone.embed([prompt], size=(16, 16)).prompt_embeds.equal(wanted)


def test_an_inversion_that_is_written_out_stands_as_it_is():
    _, backbone = tiny_backbone(torch.randn(3, 8, generator=torch.Generator().manual_seed(0)))
    texts = ["a <cat-toy>", "a <cat-toy> <cat-toy>_1 <cat-toy>_2", "a <cat-toy>_1"]
    first, second, third = (row.tolist() for row in tokenize(backbone.tokenizer, texts)[0])
    assert first == second
    assert third[2] == first[3]
    assert third[3] == backbone.tokenizer.eos_token_id


def test_tokens_that_the_text_encoder_does_not_know_are_refused():
    _, backbone = tiny_backbone()
    backbone.tokenizer.add_tokens(["<cat-toy>"])
    for long_prompts in ("truncate", "chunk"):
        with pytest.raises(PromptError, match="tokens were added to the tokenizer alone"):
            backbone.embed(["a <cat-toy>"], size=(16, 16), long_prompts=long_prompts)
    ids, mask = fit_rows(backbone.tokenizer, token_ids(backbone.tokenizer, ["a <cat-toy>"]))
    with pytest.raises(PromptError, match="tokens were added to the tokenizer alone"):
        backbone.embed_ids(ids, mask, size=(16, 16))
    assert len(backbone.embed(["a red circle"], size=(16, 16))) == 1


def test_one_text_in_the_place_of_several_is_refused(either):
    for read in (token_ids, tokenize, count_windows):
        with pytest.raises(PromptError, match=r"got one string, 'ab'; pass \[text\]"):
            read(either, "ab")

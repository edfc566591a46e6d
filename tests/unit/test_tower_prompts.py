import pickle
import threading

import pytest
import torch

from diffenc.errors import BackboneError, PromptError
from diffenc.hosts.prompts import (
    PromptTokenizer,
    PromptTokens,
    current_scope,
    embed_tokens,
    prompt_scope,
    resolve_prompts,
)
from diffenc.models import load_backbone

TEXTS = ["a red circle", "", "what color is the star?"]


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer("shapes")


def test_texts_become_the_ids_of_the_models_own_tokenizer(tokenizer) -> None:
    backbone = load_backbone("shapes")
    tokens = tokenizer(TEXTS)
    limit = backbone.tokenizer.model_max_length
    assert tokens.ids.shape == tokens.mask.shape == (3, limit)
    for row, text in enumerate(TEXTS):
        ids = backbone.tokenizer(text).input_ids
        assert tokens.ids[row][tokens.mask[row] == 1].tolist() == ids
    assert tokens.is_null() == [False, True, False]


def test_long_texts_are_cut_and_none_at_all_is_allowed(tokenizer) -> None:
    with pytest.warns(match="longer than the 32 tokens"):
        long = tokenizer(["circle " * 200])
    assert long.mask.sum() == long.ids.shape[1]
    assert len(tokenizer([])) == 0


def test_a_tokenizer_goes_to_other_processes(tokenizer) -> None:
    there = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(there(TEXTS).ids, tokenizer(TEXTS).ids)
    assert len(pickle.dumps(tokenizer)) < 500


@pytest.mark.parametrize("wrong", [["a", 3], [None], 7, ["\ud800"]])
def test_what_is_no_text_is_told(tokenizer, wrong) -> None:
    with pytest.raises((PromptError, TypeError)):
        tokenizer(wrong)


@pytest.mark.wrong_type
@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.zeros(77).long(), torch.zeros(77).long()),
        (torch.zeros(1, 77).long(), torch.zeros(2, 77).long()),
        (torch.zeros(1, 77), torch.zeros(1, 77)),
        ([[1, 2]], [[1, 1]]),
    ],
)
def test_tokens_of_the_wrong_kind_are_told(ids, mask) -> None:
    with pytest.raises(PromptError):
        PromptTokens(ids, mask)


def test_one_row_is_for_all_and_any_other_number_is_no_guess(tokenizer) -> None:
    tokens = tokenizer(TEXTS)
    assert torch.equal(tokens.take([1]).rows(4).ids, tokens.ids[[1, 1, 1, 1]])
    assert tokens.rows(3) is tokens
    for images in (1, 2, 6, 9):
        with pytest.raises(PromptError, match=f"3 prompts, {images}"):
            tokens.rows(images)


def test_splitting_and_joining_are_inverse(tokenizer) -> None:
    tokens = tokenizer(TEXTS)
    parts = tokens.split([2, 0, 1])
    assert [len(part) for part in parts] == [2, 0, 1]
    assert torch.equal(PromptTokens.concat(parts).ids, tokens.ids)
    assert torch.equal(PromptTokens.concat(parts).mask, tokens.mask)


def test_what_is_passed_wins_over_the_scope_and_that_over_nothing(tokenizer) -> None:
    def shown(explicit, images=2):
        found = resolve_prompts(explicit, images, tokenizer)
        return None if found is None else found.ids.tolist()

    one, other = tokenizer(["circle"] * 2).ids.tolist(), tokenizer(["star"] * 2).ids.tolist()
    assert shown(None) is None
    with prompt_scope("circle"):
        assert shown(None) == one
        assert shown(["star", "star"]) == other
        with prompt_scope(["star", "star"], per="image"):
            assert shown(None) == other
        with prompt_scope(None):
            assert shown(None) is None
        assert shown(None) == one
        with pytest.raises(PromptError), prompt_scope(["a", "b", "c"]):
            shown(None)
        assert shown(None) == one
    assert current_scope() is None


def test_other_threads_see_no_scope() -> None:
    seen = []
    with prompt_scope("circle"):
        thread = threading.Thread(target=lambda: seen.append(current_scope()))
        thread.start()
        thread.join()
    assert seen == [None]


@pytest.mark.parametrize("folder", ["tiny_sd_folder", "tiny_sd21_folder", "tiny_sdxl_folder"])
def test_ids_are_encoded_as_their_texts_are(folder, request) -> None:
    path = request.getfixturevalue(folder)
    backbone = load_backbone(path)
    texts = ["a red circle left of a blue square", "a photo", "", "a photo", None]
    tokens = PromptTokenizer(str(path))([text or "" for text in texts])
    tokens.mask[4] = 0  # no prompt, which the empty one is not
    assert tokens.is_absent() == [False, False, False, False, True]
    found = embed_tokens(backbone, tokens, size=(64, 64))
    for row, text in enumerate(texts):
        if text is None:
            expected = backbone.embed_uncond(None, size=(64, 64))
        else:
            expected = backbone.embed([text], size=(64, 64))
        mine = found.select(row, row + 1)
        torch.testing.assert_close(mine.prompt_embeds, expected.prompt_embeds)
        if expected.pooled_prompt_embeds is not None:
            torch.testing.assert_close(mine.pooled_prompt_embeds, expected.pooled_prompt_embeds)
            assert torch.equal(mine.time_ids, expected.time_ids)


def test_tokens_of_another_model_are_refused_or_padded_as_this_one_pads(tiny_sd_folder) -> None:
    backbone = load_backbone(tiny_sd_folder)
    tokens = PromptTokenizer(str(tiny_sd_folder))("a red circle")
    padded = PromptTokens(tokens.ids.masked_fill(tokens.mask == 0, 5), tokens.mask)
    expected, other = (
        embed_tokens(backbone, each, size=(64, 64), use_cache=False) for each in (tokens, padded)
    )
    assert torch.equal(other.prompt_embeds, expected.prompt_embeds)
    with pytest.raises(PromptError, match=r"prompts are of 32 tokens, and those of .* to 77"):
        embed_tokens(backbone, PromptTokenizer("shapes")("a red circle"), size=(64, 64))


def test_equal_rows_are_encoded_once_and_remembered(tiny_sd_folder, monkeypatch) -> None:
    backbone = load_backbone(tiny_sd_folder)
    rows = []
    original = backbone.embed_ids

    def counted(ids, mask, *, size):
        rows.append(len(ids))
        return original(ids, mask, size=size)

    monkeypatch.setattr(backbone, "embed_ids", counted)
    tokens = PromptTokenizer(str(tiny_sd_folder))(["a photo", "red", "a photo"])
    first = embed_tokens(backbone, tokens, size=(64, 64))
    again = embed_tokens(backbone, tokens, size=(64, 64))
    assert rows == [2]
    assert torch.equal(first.prompt_embeds, again.prompt_embeds)
    embed_tokens(backbone, tokens, size=(64, 64), use_cache=False)
    assert rows == [2, 2]
    backbone.text_encoder.requires_grad_(True)
    assert embed_tokens(backbone, tokens, size=(64, 64)).requires_grad
    assert rows == [2, 2, 2]


def test_a_missing_tokenizer_is_told(tmp_path) -> None:
    with pytest.raises(BackboneError):
        PromptTokenizer(str(tmp_path))("a")

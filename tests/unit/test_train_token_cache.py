import pytest
import torch

from diffenc.errors import OutputError
from diffenc.mllm import VisionTokens
from diffenc.mllm.training.token_cache import TokenCache, encoder_digest, entry_name
from vlm_builders import save_tiny_vision, seeded_noise


def entry(seed):
    return seeded_noise(4, 8, seed=seed)  # 128 bytes


def test_entries_survive_and_are_shared_by_processes(tmp_path):
    cache = TokenCache(tmp_path, 10**6)
    assert cache.get("a") is None
    cache.put("a", entry(0))
    cache.put("b", entry(1).bfloat16())
    assert torch.equal(cache.get("a"), entry(0))
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 2)
    other = TokenCache(tmp_path, 10**6)
    assert len(other) == 0
    cache.flush()
    other.refresh()
    assert torch.equal(other.get("a"), entry(0))
    assert other.get("b").dtype == torch.bfloat16
    other.put("a", entry(9))
    other.flush()
    assert torch.equal(TokenCache(tmp_path, 10**6).get("a"), entry(0))
    assert len(list(tmp_path.iterdir())) == 1


def test_what_does_not_fit_is_not_kept(tmp_path):
    cache = TokenCache(tmp_path, 300, shard_bytes=1)
    for seed in range(5):
        cache.put(str(seed), entry(seed))
    assert [cache.get(str(seed)) is not None for seed in range(5)] == [True, True, *[False] * 3]
    assert TokenCache(tmp_path / "other", 0).get("0") is None
    full = TokenCache(tmp_path, 300)
    full.put("new", entry(7))
    assert full.get("new") is None


def test_broken_and_unfinished_files_are_passed_over(tmp_path):
    cache = TokenCache(tmp_path, 10**6)
    cache.put("a", entry(0))
    cache.flush()
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\x00\x00\x00")
    (tmp_path / "half.partial").write_bytes(b"half")
    again = TokenCache(tmp_path, 10**6)
    assert len(again) == 1
    for path in tmp_path.glob("tokens-*"):
        path.write_bytes(b"")
    assert again.get("a") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot make the folder"):
        TokenCache(tmp_path / "file", 1)


def test_a_name_tells_encoders_pictures_and_prompts_apart(tmp_path):
    names = {entry_name(*key) for key in (("e", "p", "t"), ("f", "p", "t"), ("e", "q", "t"))}
    names |= {entry_name("e", "p", "u"), entry_name("e", "p", ""), entry_name("ep", "", "t")}
    assert len(names) == 6
    folder = save_tiny_vision(tmp_path)
    digests = [
        encoder_digest(VisionTokens.from_pretrained(folder, layer=layer)) for layer in (1, 2)
    ]
    vision = VisionTokens.from_pretrained(folder, layer=1)
    assert encoder_digest(vision) == digests[0] != digests[1]
    with torch.no_grad():
        next(vision.model.parameters()).mul_(1.01)
    assert encoder_digest(vision) != digests[0]


def test_tokens_of_another_version_are_not_taken_over(tmp_path, monkeypatch):
    vision = VisionTokens.from_pretrained(save_tiny_vision(tmp_path))
    before = encoder_digest(vision)
    monkeypatch.setattr("diffenc.mllm.training.token_cache.__version__", "0.0.1")
    assert encoder_digest(vision) != before

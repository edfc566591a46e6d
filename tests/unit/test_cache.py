import copy
import pickle

import pytest
import torch
from torch import nn

from diffenc.memory.cache import TensorCache, content_key, state_key


def entry(size: int) -> tuple[torch.Tensor]:
    return (torch.zeros(size, dtype=torch.uint8),)


def test_the_least_recent_entry_goes_first():
    cache = TensorCache(30)
    for key in "abc":
        cache.put(key, entry(10))
    cache.get("a")
    cache.put("d", entry(10))
    assert cache.get("b") is None
    assert all(cache.get(key) is not None for key in "acd")
    assert (cache.nbytes, len(cache)) == (30, 3)


def test_hits_and_misses_are_counted_and_clear_starts_anew():
    cache = TensorCache(10)
    cache.get("a")
    cache.put("a", entry(10))
    cache.get("a")
    assert (cache.hits, cache.misses) == (1, 1)
    cache.clear()
    assert (cache.hits, cache.misses, cache.nbytes, len(cache)) == (0, 0, 0, 0)


@pytest.mark.parametrize("bound", [0, 9])
def test_what_is_larger_than_the_cache_is_not_kept(bound):
    cache = TensorCache(bound)
    cache.put("a", entry(10))
    assert len(cache) == cache.nbytes == 0


def test_a_copy_starts_empty():
    cache = TensorCache(10)
    cache.put("a", entry(10))
    for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert len(twin) == 0
        assert twin.max_bytes == 10
        twin.put("b", entry(5))
        assert twin.get("b") is not None


def test_content_decides_the_key():
    values = torch.rand(3, 4)
    assert content_key(values) == content_key(values.clone())
    assert content_key(values.t().contiguous().t()) == content_key(values)
    assert content_key(values.view(4, 3)) != content_key(values)
    assert content_key(values + 1e-7) != content_key(values)


def test_a_module_s_state_shows_every_counted_write():
    module = nn.Linear(2, 2).eval().requires_grad_(False)
    before = state_key(module)
    assert before == state_key(module) is not None
    with torch.no_grad():
        module.weight.add_(1)
    assert state_key(module) != before
    assert state_key(module.double()) != state_key(nn.Linear(2, 2).eval().requires_grad_(False))
    assert state_key(module.train()) is None
    assert state_key(module.eval().requires_grad_(True)) is None

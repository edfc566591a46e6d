"""Benchmarks: of scores that match pictures and texts, and of models that answer questions."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

__all__ = [
    "METRICS",
    "AnswerEvaluation",
    "Answerer",
    "Benchmark",
    "ClipMatcher",
    "Evaluation",
    "FunctionAnswerer",
    "Item",
    "Matcher",
    "MatchingBenchmark",
    "Picture",
    "Problem",
    "SavedVLM",
    "ScorerMatcher",
    "Table",
    "correct",
    "evaluate",
    "load_mmvp_vlm",
    "load_winoground",
    "shapes_benchmark",
    "winoground_from_rows",
]

# Names are imported when they are first used: the commands read the options of tasks without torch.
_HOMES = {
    "METRICS": "matching.metrics",
    "AnswerEvaluation": "asking",
    "Answerer": "answerers",
    "Benchmark": "items",
    "ClipMatcher": "matching.clip",
    "Evaluation": "matching.evaluate",
    "FunctionAnswerer": "answerers",
    "Item": "matching.base",
    "Matcher": "matching.base",
    "MatchingBenchmark": "matching.base",
    "Picture": "items",
    "Problem": "items",
    "SavedVLM": "saved_vlm",
    "ScorerMatcher": "matching.matchers",
    "Table": "tables",
    "correct": "matching.metrics",
    "evaluate": "matching.evaluate",
    "load_mmvp_vlm": "matching.mmvp_vlm",
    "load_winoground": "matching.winoground",
    "shapes_benchmark": "matching.miniature",
    "winoground_from_rows": "matching.winoground",
}

if _TYPE_CHECKING:
    from diffenc.evals.answerers import Answerer, FunctionAnswerer
    from diffenc.evals.asking import AnswerEvaluation
    from diffenc.evals.items import Benchmark, Picture, Problem
    from diffenc.evals.matching.base import Item, Matcher, MatchingBenchmark
    from diffenc.evals.matching.clip import ClipMatcher
    from diffenc.evals.matching.evaluate import Evaluation, evaluate
    from diffenc.evals.matching.matchers import ScorerMatcher
    from diffenc.evals.matching.metrics import METRICS, correct
    from diffenc.evals.matching.miniature import shapes_benchmark
    from diffenc.evals.matching.mmvp_vlm import load_mmvp_vlm
    from diffenc.evals.matching.winoground import load_winoground, winoground_from_rows
    from diffenc.evals.saved_vlm import SavedVLM
    from diffenc.evals.tables import Table
else:  # hidden from type checkers, which would otherwise accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(_import_module(f"diffenc.evals.{_HOMES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return __all__

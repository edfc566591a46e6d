"""Benchmarks: of scores that match pictures and texts, and of models that answer questions."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from diffenc.runtime.faces import lazy_names as _lazy_names

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
    "read_captions",
    "shapes_benchmark",
    "winoground_from_rows",
]

# Names are imported when they are first used: the commands read the options of tasks without torch.
_HOMES = {
    "METRICS": "diffenc.evals.matching.metrics",
    "AnswerEvaluation": "diffenc.evals.asking",
    "Answerer": "diffenc.evals.answerers",
    "Benchmark": "diffenc.evals.items",
    "ClipMatcher": "diffenc.evals.matching.clip",
    "Evaluation": "diffenc.evals.matching.evaluate",
    "FunctionAnswerer": "diffenc.evals.answerers",
    "Item": "diffenc.evals.matching.base",
    "Matcher": "diffenc.evals.matching.base",
    "MatchingBenchmark": "diffenc.evals.matching.base",
    "Picture": "diffenc.evals.items",
    "Problem": "diffenc.evals.items",
    "SavedVLM": "diffenc.evals.saved_vlm",
    "ScorerMatcher": "diffenc.evals.matching.matchers",
    "Table": "diffenc.evals.tables",
    "correct": "diffenc.evals.matching.metrics",
    "evaluate": "diffenc.evals.matching.evaluate",
    "load_mmvp_vlm": "diffenc.evals.matching.mmvp_vlm",
    "load_winoground": "diffenc.evals.matching.winoground",
    "read_captions": "diffenc.evals.captions_file",
    "shapes_benchmark": "diffenc.evals.matching.miniature",
    "winoground_from_rows": "diffenc.evals.matching.winoground",
}

if _TYPE_CHECKING:
    from diffenc.evals.answerers import Answerer, FunctionAnswerer
    from diffenc.evals.asking import AnswerEvaluation
    from diffenc.evals.captions_file import read_captions
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
    __getattr__ = _lazy_names(globals(), _HOMES)


def __dir__() -> list[str]:
    return __all__

"""Benchmarks of image-text matching: Winoground, MMVP-VLM, and both in miniature."""

from diffenc.evals.base import Benchmark, Item, Matcher, Picture
from diffenc.evals.evaluate import Evaluation, evaluate
from diffenc.evals.metrics import METRICS, correct
from diffenc.evals.miniature import shapes_benchmark
from diffenc.evals.mmvp_vlm import load_mmvp_vlm
from diffenc.evals.winoground import load_winoground, winoground_from_rows

__all__ = [
    "METRICS",
    "Benchmark",
    "Evaluation",
    "Item",
    "Matcher",
    "Picture",
    "correct",
    "evaluate",
    "load_mmvp_vlm",
    "load_winoground",
    "shapes_benchmark",
    "winoground_from_rows",
]

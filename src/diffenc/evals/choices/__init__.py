"""Questions with options: MMVP, BLINK, NaturalBench, and all three in miniature."""

from diffenc.evals.choices.base import ChoiceBenchmark, ChoiceItem
from diffenc.evals.choices.blink import blink_from_rows, load_blink
from diffenc.evals.choices.evaluate import ChoiceEvaluation, choice_table, evaluate_choices
from diffenc.evals.choices.extraction import extract_choice
from diffenc.evals.choices.miniature import shapes_blink, shapes_mmvp, shapes_naturalbench
from diffenc.evals.choices.mmvp import load_mmvp, mmvp_from_rows
from diffenc.evals.choices.naturalbench import load_naturalbench, naturalbench_from_rows

__all__ = [
    "ChoiceBenchmark",
    "ChoiceEvaluation",
    "ChoiceItem",
    "blink_from_rows",
    "choice_table",
    "evaluate_choices",
    "extract_choice",
    "load_blink",
    "load_mmvp",
    "load_naturalbench",
    "mmvp_from_rows",
    "naturalbench_from_rows",
    "shapes_blink",
    "shapes_mmvp",
    "shapes_naturalbench",
]

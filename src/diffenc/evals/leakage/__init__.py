"""How much of the encoder's prompt a language model reads out of the features."""

from diffenc.evals.leakage.derangement import Mismatch, derangement, mismatched_prompts
from diffenc.evals.leakage.evaluate import LeakageEvaluation, evaluate_leakage, leakage_table
from diffenc.evals.leakage.readout import PromptReadout, content_words, prompt_readout
from diffenc.evals.leakage.sweep import LeakageSweep, Setting, sweep_leakage

__all__ = [
    "LeakageEvaluation",
    "LeakageSweep",
    "Mismatch",
    "PromptReadout",
    "Setting",
    "content_words",
    "derangement",
    "evaluate_leakage",
    "leakage_table",
    "mismatched_prompts",
    "prompt_readout",
    "sweep_leakage",
]

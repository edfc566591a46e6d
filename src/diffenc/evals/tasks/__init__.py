"""The benchmarks that `diffenc evaluate` knows, each a file."""

from diffenc.evals.task import AskTask
from diffenc.evals.tasks.blink import Blink
from diffenc.evals.tasks.captions import Captions
from diffenc.evals.tasks.leakage import Leakage
from diffenc.evals.tasks.llava_bench import LlavaBenchInTheWild
from diffenc.evals.tasks.matching import MatchTask, MmvpVlm, Winoground
from diffenc.evals.tasks.mmvp import Mmvp
from diffenc.evals.tasks.naturalbench import NaturalBench

ASK_TASKS: tuple[type[AskTask], ...] = (
    Captions,
    Leakage,
    Mmvp,
    Blink,
    NaturalBench,
    LlavaBenchInTheWild,
)
"""Benchmarks that a multimodal model answers."""

MATCH_TASKS: tuple[type[MatchTask], ...] = (Winoground, MmvpVlm)
"""Benchmarks of scores that match pictures and captions."""

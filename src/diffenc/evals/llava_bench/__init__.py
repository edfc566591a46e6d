"""LLaVA-Bench (In-the-Wild): open answers, compared with a reference by a judge."""

from diffenc.evals.llava_bench.data import BenchItem, LlavaBench, load_llava_bench
from diffenc.evals.llava_bench.evaluate import (
    BenchEvaluation,
    Review,
    bench_table,
    evaluate_llava_bench,
)
from diffenc.evals.llava_bench.judge import (
    Case,
    FunctionJudge,
    Judge,
    JudgeError,
    OpenAIJudge,
    WordJudge,
)
from diffenc.evals.llava_bench.local_judge import LocalJudge
from diffenc.evals.llava_bench.miniature import shapes_llava_bench

__all__ = [
    "BenchEvaluation",
    "BenchItem",
    "Case",
    "FunctionJudge",
    "Judge",
    "JudgeError",
    "LlavaBench",
    "LocalJudge",
    "OpenAIJudge",
    "Review",
    "WordJudge",
    "bench_table",
    "evaluate_llava_bench",
    "load_llava_bench",
    "shapes_llava_bench",
]

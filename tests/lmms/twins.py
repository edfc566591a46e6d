"""Functions of the miniature twins' tasks: lmms-eval calls them by the names in the YAML files.

Answers are counted by lmms-eval's own functions for the benchmarks that the twins stand for.
"""

import importlib
import json

from lmms_eval.tasks.blink.utils import blink_process_results
from lmms_eval.tasks.mmvp.utils import (
    mmvp_aggregate_pair_results as mmvp_aggregate_pair_results,
)
from lmms_eval.tasks.mmvp.utils import (
    mmvp_aggregate_results as mmvp_aggregate_results,
)
from lmms_eval.tasks.mmvp.utils import mmvp_process_results
from lmms_eval.tasks.naturalbench.utils import get_scores, naturalbench_process_results
from lmms_eval.tasks.pope.utils import pope_process_results

wild = importlib.import_module("lmms_eval.tasks.llava-in-the-wild.utils")


def pictures(doc):
    return [picture.convert("RGB") for picture in doc["pictures"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]


def mmvp(doc, results):
    answer = f"({'ab'[doc['answer']]})"
    return mmvp_process_results({"Index": int(doc["id"]), "Correct Answer": answer}, results)


def blink(doc, results):
    letter = f"({'ABCDEFGHIJ'[doc['answer']]})"
    return blink_process_results(
        {"answer": letter, "idx": doc["id"], "sub_task": doc["group"]}, results
    )


def blink_mean_of_tasks(results):
    groups = {}
    for each in results:
        groups.setdefault(each["sub_task"], []).append(each["is_correct"])
    return sum(sum(right) / len(right) for right in groups.values()) / len(groups)


def naturalbench(doc, results):
    scored = naturalbench_process_results({"Question_Type": "yes_no", "Index": doc["id"]}, results)
    answer = {"group": doc["group"], "score": scored["naturalbench_G_ACC"]["score"]}
    answer |= json.loads(doc["labels"])
    return {f"naturalbench_{kind}": answer for kind in ("Acc", "Q_Acc", "I_Acc", "G_Acc")}


def _naturalbench(kind):
    def aggregate(results):
        groups = {}
        for each in results:
            cell = f"q{each['question']}_i{each['image']}"
            groups.setdefault(each["group"], {})[cell] = each["score"]
        return get_scores(groups)[kind]

    return aggregate


naturalbench_acc, naturalbench_q, naturalbench_i, naturalbench_g = map(
    _naturalbench, ("Acc", "Q_Acc", "I_Acc", "G_Acc")
)


def pope(doc, results):
    answer = ("yes", "no")[doc["answer"]]
    return pope_process_results({"answer": answer, "question_id": doc["id"]}, results)


def bench(doc, results):
    """Scores of the miniature's judge, read and put together as lmms-eval does."""
    from diffenc.evals.llava_bench import Case, WordJudge

    case = Case(doc["context"], doc["question"], doc["reference"], results[0], "")
    reply = WordJudge().review(case)
    return {"llava_bench_all": wild._parse_comparative_scores(reply).metadata}


def bench_all(results):
    return wild.llava_aggregation(results, "all")

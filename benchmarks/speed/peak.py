"""Peak memory of one contender in a process of its own; `speed.running` starts it."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from diffenc.cli.options import quiet_libraries
from diffenc.models import describe, load_backbone
from speed.bench import Bench
from speed.cases import CASES, ask
from speed.contenders import Contender, Diffenc
from speed.floor import Floor
from speed.measuring import forget_peak, peak_memory
from speed.running import rival


def measured(request: dict[str, Any]) -> int | None:
    """Most bytes of the process during a call; of a further question, during the second."""
    job, folder = CASES[request["case"]], Path(request["folder"])
    config, device = job.config(quick=request["quick"]), torch.device("cpu")
    dtype = getattr(torch, request["dtype"])
    taps = [tap.name for tap in describe(folder).match_taps(config.taps or ())]
    contender: Contender
    match request["contender"]:
        case "diffenc":
            contender = Diffenc(load_backbone(folder, dtype=dtype), config)
        case "diffenc, truncated":
            contender = Diffenc(load_backbone(folder, dtype=dtype, keep_taps=taps), config)
        case Floor.name:
            short = load_backbone(folder, dtype=dtype, keep_taps=taps)
            contender = Floor(short, config, taps, again=job.again)
        case _:
            bench = Bench(
                folder=lambda _: folder,
                device=device,
                dtype=dtype,
                rate=1.0,
                repeats=1,
                quick=request["quick"],
            )
            contender = rival(bench, job, config, taps)
    assert isinstance(config.size, int)
    for index in range(2 if job.again else 1):
        question = ask(job, index, size=config.size, batch=request["batch"])
        call = contender.prepare(question)
        forget_peak(device)
        call()
    return peak_memory(device)


if __name__ == "__main__":
    quiet_libraries()
    print(json.dumps(measured(json.loads(sys.argv[1]))))

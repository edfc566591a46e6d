"""LLaVA and its forks on diffusion encoders, without a change to their source.

`modernize` lets them run under today's transformers. `register` puts the tower behind their
builder, `take_prompts` lets their model read prompts, `train_with_prompts` does that for a training
script and feeds it from the data, `prompted_data` feeds a script that is edited by hand, and
`AdapterCallback` keeps the adapter where a fork drops what belongs to its tower.
"""

from diffenc.hosts.llava.callback import AdapterCallback
from diffenc.hosts.llava.data import PromptCollator, PromptDataset
from diffenc.hosts.llava.modernize import Modernization, modernize
from diffenc.hosts.llava.prompting import question_of, take_prompts
from diffenc.hosts.llava.register import Registration, register
from diffenc.hosts.llava.training import prompted_data, train_with_prompts

__all__ = [
    "AdapterCallback",
    "Modernization",
    "PromptCollator",
    "PromptDataset",
    "Registration",
    "modernize",
    "prompted_data",
    "question_of",
    "register",
    "take_prompts",
    "train_with_prompts",
]

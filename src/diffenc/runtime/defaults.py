"""Torch's defaults for new tensors, which a program may change, pinned where other code makes them.

What diffenc computes names dtype and device at every tensor it makes. Other libraries do not where
they build models; `torch_defaults` is around every place where they do it for diffenc.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

# Reentrant, and taken before the lock of any model.
_BUILDING = threading.RLock()


@contextmanager
def torch_defaults() -> Iterator[None]:
    """New tensors are float32 on the CPU, whatever the program's defaults are.

    The default dtype belongs to the whole process, and diffusers and transformers change it too
    while they load a model. So one thread at a time builds models, and finds and leaves the default
    as the program has it. Where that is float32 nothing is changed here.
    """
    with _BUILDING, ExitStack() as stack:
        before = torch.get_default_dtype()
        if before != torch.float32:
            stack.callback(torch.set_default_dtype, before)
            torch.set_default_dtype(torch.float32)
        if torch.empty(0).device.type != "cpu":  # the defaults are what is asked for here
            stack.enter_context(torch.device("cpu"))
        yield

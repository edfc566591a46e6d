"""Calibrated scores of pairs, by passes of their own or by shared queries."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffenc.memory.cache import TensorCache
from diffenc.scoring.encoded_call import EncodedCall
from diffenc.scoring.exact import exact_scores
from diffenc.scoring.shared_query import shared_query_scores

_MODES = {"exact": exact_scores, "shared-query": shared_query_scores}


def pair_scores(
    encoded: EncodedCall,
    pairs: Bool[Tensor, "images texts"],
    steps: Sequence[tuple[int, int]],
    mix: Float[Tensor, "layers out"],
    *,
    rows: TensorCache,
    queries: TensorCache,
) -> Float[Tensor, "images texts steps out"]:
    """Score pairs, with all that they are compared with.

    Two means are subtracted from the score of an image and a text, at the same timestep and noise:
    that of the text's scores over the reference images, and that of the image's scores over the
    reference texts.

    Args:
        encoded: Images followed by the reference images, and texts followed by the reference texts.
        pairs: Mask of the pairs that are scored.
        steps: Steps, each a (timestep, draw).
        mix: Weights with which the attention parts of the layers are multiplied.
        rows: Cache of "exact" scores.
        queries: Cache of the queries of "shared-query" scores.

    Returns:
        Scores in float32 on the CPU; NaN for other pairs.

    Raises:
        NonFiniteError: NaN or infinity came out of the U-Net.
    """
    count, texts = pairs.shape
    pictures, columns = (
        torch.tensor(rows, dtype=torch.long, device="cpu")
        for rows in (encoded.picture_rows, encoded.text_rows)
    )
    images, references = pictures[:count], pictures[count:]
    own, others = columns[:texts], columns[texts:]
    shape = (int(pictures.max()) + 1, len(encoded.texts))
    chosen = torch.zeros(shape, dtype=torch.bool, device="cpu")
    of_pairs = pairs.nonzero().T
    chosen[images[of_pairs[0]], own[of_pairs[1]]] = True
    chosen[references[:, None], own[pairs.any(dim=0)]] = True
    chosen[images[pairs.any(dim=1)][:, None], others] = True
    mode = encoded.config.mode
    memory = {"exact": rows, "shared-query": queries}[mode]
    scores = _MODES[mode](encoded, chosen, steps, mix, memory=memory)
    result = scores[images[:, None], own]
    if len(references):
        result = result - scores[references[:, None], own].mean(dim=0)
    if len(others):
        result = result - scores[images[:, None], others].mean(dim=1, keepdim=True)
    return result.masked_fill(~pairs[:, :, None, None], torch.nan)

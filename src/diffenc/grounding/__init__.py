"""Teaching where words are: phrases with boxes or masks, and a loss on attention to them."""

from diffenc.grounding.areas import Area, RunLengths
from diffenc.grounding.dataset import PhraseDataset, collate_phrases
from diffenc.grounding.loss import Grounding, GroundingTerms
from diffenc.grounding.reading import read_phrases
from diffenc.grounding.samples import GroundedImage, GroundedText, Phrase

__all__ = [
    "Area",
    "GroundedImage",
    "GroundedText",
    "Grounding",
    "GroundingTerms",
    "Phrase",
    "PhraseDataset",
    "RunLengths",
    "collate_phrases",
    "read_phrases",
]

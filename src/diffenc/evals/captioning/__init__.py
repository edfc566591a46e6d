"""Captions of pictures: COCO's layouts, its metrics, and refinement over several passes."""

from diffenc.evals.captioning.coco import load_coco, load_coco_captions, load_karpathy
from diffenc.evals.captioning.data import CaptionItem, CaptionSet
from diffenc.evals.captioning.evaluate import CaptionEvaluation, caption_images, evaluate_captions
from diffenc.evals.captioning.metrics import METRICS, CaptionScores, score_captions
from diffenc.evals.captioning.miniature import shapes_captions

__all__ = [
    "METRICS",
    "CaptionEvaluation",
    "CaptionItem",
    "CaptionScores",
    "CaptionSet",
    "caption_images",
    "evaluate_captions",
    "load_coco",
    "load_coco_captions",
    "load_karpathy",
    "score_captions",
    "shapes_captions",
]

"""diffenc: text-to-image diffusion models as task-aware vision encoders."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from diffenc._version import __version__
from diffenc.runtime.faces import lazy_names as _lazy_names

__all__ = [
    "Backbone",
    "CrossAttnScorer",
    "DiffencError",
    "DiffusionEncoder",
    "DiffusionVLM",
    "EncoderConfig",
    "Extractor",
    "FeatureFolder",
    "Features",
    "FusedEncoder",
    "FusedProjector",
    "Projector",
    "QueryBank",
    "ScorerConfig",
    "Scores",
    "Size",
    "TapInfo",
    "__version__",
    "list_backbones",
    "list_taps",
    "load_backbone",
    "open_features",
    "projector_for",
    "prompt_scope",
    "write_features",
]

# Names are imported when they are first used, so that `diffenc --help` need not wait for torch.
_HOMES = {
    "Backbone": "diffenc.models.base",
    "CrossAttnScorer": "diffenc.scorer",
    "DiffencError": "diffenc.errors",
    "DiffusionEncoder": "diffenc.encoder",
    "DiffusionVLM": "diffenc.mllm.model",
    "EncoderConfig": "diffenc.config",
    "Extractor": "diffenc.extraction.extractor",
    "FeatureFolder": "diffenc.extraction.reader",
    "Features": "diffenc.features",
    "FusedEncoder": "diffenc.fusion",
    "FusedProjector": "diffenc.projector",
    "Projector": "diffenc.projector",
    "QueryBank": "diffenc.scoring.query_bank",
    "ScorerConfig": "diffenc.scoring.config",
    "Scores": "diffenc.scoring.result",
    "Size": "diffenc._typing",
    "TapInfo": "diffenc.models",
    "list_backbones": "diffenc.models",
    "list_taps": "diffenc.models",
    "load_backbone": "diffenc.models",
    "open_features": "diffenc.extraction.reader",
    "projector_for": "diffenc.projector",
    "prompt_scope": "diffenc.hosts.prompts",
    "write_features": "diffenc.extraction.writing",
}

if _TYPE_CHECKING:
    from diffenc._typing import Size
    from diffenc.config import EncoderConfig
    from diffenc.encoder import DiffusionEncoder
    from diffenc.errors import DiffencError
    from diffenc.extraction.extractor import Extractor
    from diffenc.extraction.reader import FeatureFolder, open_features
    from diffenc.extraction.writing import write_features
    from diffenc.features import Features
    from diffenc.fusion import FusedEncoder
    from diffenc.hosts.prompts import prompt_scope
    from diffenc.mllm.model import DiffusionVLM
    from diffenc.models import TapInfo, list_backbones, list_taps, load_backbone
    from diffenc.models.base import Backbone
    from diffenc.projector import FusedProjector, Projector, projector_for
    from diffenc.scorer import CrossAttnScorer
    from diffenc.scoring.config import ScorerConfig
    from diffenc.scoring.query_bank import QueryBank
    from diffenc.scoring.result import Scores
else:  # hidden from type checkers, which would otherwise accept any name
    __getattr__ = _lazy_names(globals(), _HOMES)


def __dir__() -> list[str]:
    return __all__

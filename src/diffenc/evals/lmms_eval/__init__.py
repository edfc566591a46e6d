"""Models of diffenc for lmms-eval: the question of each request reaches the vision encoder.

lmms-eval finds the model by the entry point `lmms_eval.models` and asks for it as ``--model
diffenc``. Nothing here needs lmms-eval but `manifest` and the base class of the model.
"""

from typing import Any

MODEL_ID = "diffenc"


def manifest() -> Any:
    """Return the entry of lmms-eval's registry.

    Raises:
        ImportError: lmms-eval is not installed, or is older than 0.7.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id=MODEL_ID, chat_class_path="diffenc.evals.lmms_eval.model.DiffencModel"
    )

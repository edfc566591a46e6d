"""Experiments that train multimodal models and compare them, each described by one TOML file."""

from diffenc.studies.vlm.plan import StudyPlan
from diffenc.studies.vlm.plan_file import STUDIES, bundled_plan, read_plan
from diffenc.studies.vlm.study import VlmStudy, study_vlm

__all__ = ["STUDIES", "StudyPlan", "VlmStudy", "bundled_plan", "read_plan", "study_vlm"]

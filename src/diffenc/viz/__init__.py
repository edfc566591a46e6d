"""Pictures of features and attention: arrays in, PIL images out, never a model."""

from diffenc.viz.figure import Panel, dot_chart, figure
from diffenc.viz.heatmap import HeatMap
from diffenc.viz.pca import pca_maps

__all__ = ["HeatMap", "Panel", "dot_chart", "figure", "pca_maps"]

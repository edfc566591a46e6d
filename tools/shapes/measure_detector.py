"""Measure the detector on held-out renderings, clean and degraded, and print JSON.

    python tools/shapes/measure_detector.py

`exact` is the share of pictures in which every object is found with its colour and shape and
nothing else; `exact_with_size` asks for the size word too; `error_px` is how far a centre lies from
the truth at 64 pixels a side, over the exact pictures: mean and largest.
"""

import argparse
import json
from collections import Counter
from typing import Any

import numpy as np
from detector import Detection, detect
from numpy.typing import NDArray

from diffenc.shapes.render import render_array
from diffenc.shapes.scenes import Scene, sample_scenes


def degrade(
    pixels: NDArray[np.uint8], rng: np.random.Generator, *, blur: float, noise: float
) -> NDArray[np.uint8]:
    """Blur with a Gaussian of `blur` pixels, then add noise of `noise` steps of 255."""
    values = pixels.astype(np.float64)
    if blur > 0:
        kernel = np.exp(-0.5 * (np.arange(-4, 5) / blur) ** 2)
        kernel /= kernel.sum()
        for axis in (0, 1):
            values = np.apply_along_axis(_smoothed, axis, values, kernel)
    values += rng.normal(0, noise, values.shape)
    degraded: np.ndarray = values.clip(0, 255).round().astype(np.uint8)
    return degraded


def _smoothed(line: NDArray[np.float64], kernel: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.convolve(np.pad(line, len(kernel) // 2, mode="edge"), kernel, mode="valid")


def is_exact(found: list[Detection], scene: Scene, *, with_size: bool = False) -> bool:
    """Whether the same kinds were found as often as they are there."""

    def tally(things: Any) -> Counter[tuple[str, ...]]:
        return Counter((*thing.kind, thing.size) if with_size else thing.kind for thing in things)

    return tally(found) == tally(scene.objects)


def errors(found: list[Detection], scene: Scene) -> list[float]:
    """Distance in pixels from each object to the nearest detection of its kind."""
    return [
        64
        * min(np.hypot(one.x - thing.x, one.y - thing.y) for one in found if one.kind == thing.kind)
        for thing in scene.objects
    ]


def measure(scenes: list[Scene], *, blur: float = 0.0, noise: float = 0.0) -> dict[str, Any]:
    """Rates in percent for one degradation; the noise is seeded."""
    rng = np.random.default_rng(0)
    exact, sized, distances = 0, 0, []
    for scene in scenes:
        found = detect(degrade(render_array(scene), rng, blur=blur, noise=noise))
        sized += is_exact(found, scene, with_size=True)
        if is_exact(found, scene):
            exact += 1
            distances += errors(found, scene)
    return {
        "blur_px": blur,
        "noise_of_255": noise,
        "exact": round(100 * exact / len(scenes), 1),
        "exact_with_size": round(100 * sized / len(scenes), 1),
        "error_px": [round(float(np.mean(distances)), 2), round(float(np.max(distances)), 2)],
    }


def main() -> None:
    """Measure three qualities of picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=900_000)
    options = parser.parse_args()
    scenes = list(sample_scenes(options.count, seed=options.seed))
    results = [
        measure(scenes, blur=blur, noise=noise) for blur, noise in ((0, 0), (0.6, 8), (1.0, 16))
    ]
    print(json.dumps({"count": options.count, "seed": options.seed, "results": results}, indent=2))


if __name__ == "__main__":
    main()

"""Another guidance scale for a tower that was built."""

from dataclasses import replace

from diffenc.config import check_guidable
from diffenc.hosts.tower import DiffusionVisionTower


def guide(tower: DiffusionVisionTower, scale: float) -> None:
    """Let a tower give guided features f_u + s (f_c - f_u) from now on.

    Args:
        tower: Tower, loaded or not.
        scale: Guidance scale s.

    Raises:
        ConfigError: Its spec asks for features that no guidance scale changes.
    """
    check_guidable(tower.spec.conditioning, tower.vision_tower_name)
    guided = {"conditioning": "cfg", "guidance_scale": scale}
    known = tower.spec.architecture  # which the place that the spec names may no longer have
    tower.spec = replace(tower.spec, **guided)  # type: ignore[arg-type]  # the spec checks them
    tower.spec.__dict__["architecture"] = known
    if tower.is_loaded:
        diffusion = getattr(tower.encoder, "diffusion", tower.encoder)
        diffusion.config = replace(diffusion.config, **guided)

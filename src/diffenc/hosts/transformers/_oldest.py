"""The transformers that its stock classes need, which is newer than what the package needs.

Raises:
    ConfigError: The installed one is older.
"""

from diffenc._optional import require_transformers

OLDEST = "4.48.3"

require_transformers(
    OLDEST,
    to="diffenc.hosts.transformers",
    why="since then stock classes count the tokens of pictures. Forks of LLaVA "
    "(diffenc.hosts.llava, .tinyllava, .prismatic) do without it",
)

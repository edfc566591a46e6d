"""The transformers that its stock classes need, which is newer than what the package needs.

Raises:
    ConfigError: The installed one is older.
"""

import transformers
from packaging.version import Version

from diffenc.errors import ConfigError

OLDEST = "4.48.3"

if Version(transformers.__version__) < Version(OLDEST):
    raise ConfigError(
        f"diffenc.hosts.transformers needs transformers {OLDEST} or newer, and "
        f"{transformers.__version__} is installed: since then stock classes count the tokens of "
        "pictures. Forks of LLaVA (diffenc.hosts.llava, .tinyllava, .prismatic) do without it"
    )

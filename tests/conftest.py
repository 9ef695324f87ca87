"""What all tests share."""

import os

from tests import checkpoints

# litellm brings cl100k's vocabulary along, under the name by which tiktoken looks for it.
TOKENIZERS = checkpoints.package_folder("litellm", "litellm_core_utils/tokenizers")
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TOKENIZERS))

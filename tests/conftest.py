"""What all tests share."""

import os
import tempfile

from tests.harness import checkpoints

# litellm brings cl100k's vocabulary along, under the name by which tiktoken looks for it.
TOKENIZERS = checkpoints.package_folder("litellm", "litellm_core_utils/tokenizers")
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(TOKENIZERS))
# No test works off the batches that a user's own server has stored.
DATA = tempfile.TemporaryDirectory(prefix="data-")
os.environ["XDG_DATA_HOME"] = DATA.name

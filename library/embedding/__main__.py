"""Look into embedding files and make others of them: ``python -m library.embedding inspect mychar.safetensors``."""

import sys

from library.embedding.tool import main

sys.exit(main(called="python -m library.embedding"))

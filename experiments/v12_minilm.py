"""v12_minilm: do relations between tokens teach more than their states?

Parent: v12. The one change: MiniLMv2's relations (arXiv 2012.15828) in the place of the projected MSE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v12_minilm"))

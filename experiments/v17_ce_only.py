"""v17_ce_only: how far do the labels alone lead?

Parent: v17_two_stage. The one change: no first stage, no teacher and nothing of its embeddings; labels alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_ce_only"))

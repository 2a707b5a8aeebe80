"""v12: do hidden states aligned with the teacher's help a spiking student?

Parent: v11_1. The one change: time-averaged hidden alignment (after arXiv 1909.10351).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v12"))

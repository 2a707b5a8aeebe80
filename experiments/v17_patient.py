"""v17_patient: what does patience buy?

Parent: v17_two_stage. The one change: neither labels, features nor embeddings; the classes' KL at T = 1 alone, three
times as long.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_patient"))

"""v17_two_stage: how well does a spiking classifier learn a task in two stages, from a pre-trained encoder and from a
fine-tuned one?

Parent: none. The one change: none; this is the base that the other classifiers change.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_two_stage"))

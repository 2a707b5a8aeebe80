"""v17_dense_twin: what do the spikes cost?

Parent: v17_two_stage. The one change: every projection takes its current as it is; no neuron spikes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_dense_twin"))

"""v17_no_features: what are features worth while the task is learnt?

Parent: v17_two_stage. The one change: no features in the second stage.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_no_features"))

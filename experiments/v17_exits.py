"""v17_exits: how deep must a text be read before its class is clear?

Parent: v17_two_stage. The one change: classifiers behind blocks 2 and 4 too, which learn from the labels and
from the deepest one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_exits"))

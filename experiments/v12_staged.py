"""v12_staged: does it help to let the logits converge before hidden states are aligned?

Parent: v12. The one change: hidden states count from the middle of the run on.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v12_staged"))

"""v11_1_free: does the learned temperature do anything but sit on its anchor?

Parent: v11_1. The one change: no anchor.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_1_free"))

"""v11_3: do neurons with parameters of their own for each channel help?

Parent: v11_1. The one change: a learned threshold for each channel.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_3"))

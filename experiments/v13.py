"""v13: how much closer to the teacher does the same objective come in a longer run?

Parent: v12. The one change: five times the optimiser steps.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v13"))

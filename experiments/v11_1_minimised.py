"""v11_1_minimised: what happens to a temperature that is trained to lower the loss?

Parent: v11_1. The one change: T is minimised, by Adam and clamped, where v11_1 plays it against the student.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_1_minimised"))

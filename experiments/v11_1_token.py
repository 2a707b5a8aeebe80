"""v11_1_token: do tokens want temperatures of their own?

Parent: v11_1. The one change: the adversary reads a temperature for each token from both models' states.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_1_token"))

"""v12_cka: is similarity up to rotation enough to align states?

Parent: v12. The one change: CKA (arXiv 1905.00414) in the place of the projected MSE.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v12_cka"))

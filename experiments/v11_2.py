"""v11_2: does a student learn more from windows that come in stages from easy to hard?

Parent: v11_1. The one change: POCL (arXiv 2506.05695), progressive stages with their own temperature and weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_2"))

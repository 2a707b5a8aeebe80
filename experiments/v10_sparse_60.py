"""v10_sparse_60: what does it cost to keep neurons silent?

Parent: v10. The one change: silence is set so that 60 % of the operands are zero on training text.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_sparse_60"))

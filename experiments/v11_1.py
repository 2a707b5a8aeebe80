"""v11_1: does a temperature that is learned against the student teach it more than a fixed one?

Parent: v10. The one change: CTKD (arXiv 2211.16231), the temperature is learned behind a gradient reversal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v11_1"))

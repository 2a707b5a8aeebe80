"""v10_t1_5: is a fixed temperature of 1.5 better than 2?

Parent: v10. The one change: T = 1.5.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_t1_5"))

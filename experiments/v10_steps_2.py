"""v10_steps_2: what are micro-steps worth?

Parent: v10. The one change: two micro-steps per token, 9 levels.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_steps_2"))

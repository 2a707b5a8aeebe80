"""v15_bucket: how much of the loss does one bucket for all other tokens make good?

Parent: v15_tcs. The one change: a tail bucket in the place of renormalisation.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v15_bucket"))

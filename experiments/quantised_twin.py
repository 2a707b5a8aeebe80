"""quantised_twin: does it matter that the levels come from spikes?

Parent: v10. The one change: currents are rounded to the same 81 levels (steps 40) without a membrane.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("quantised_twin"))

"""v15_tcs: what does a target lose that is renormalised on the teacher's best tokens?

Parent: v10. The one change: TCS (after arXiv 2504.16431), which is biased.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v15_tcs"))

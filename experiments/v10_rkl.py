"""v10_rkl: does reverse KL teach the student more than forward KL?

Parent: v10. The one change: reverse KL (arXiv 2306.08543) in the place of forward KL.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_rkl"))

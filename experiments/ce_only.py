"""ce_only: what does the teacher's distribution teach beyond the text itself?

Parent: v10. The one change: no term of the teacher's distribution.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("ce_only"))

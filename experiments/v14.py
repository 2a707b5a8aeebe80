"""v14: does it help to imitate how the teacher's prediction forms over its layers?

Parent: v12. The one change: feature dynamics (FDD, ACL 2025, long paper 1125).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v14"))

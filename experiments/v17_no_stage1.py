"""v17_no_stage1: what is it worth to learn from the pre-trained encoder before the task?

Parent: v17_two_stage. The one change: no first stage; the student goes straight to the task.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v17_no_stage1"))

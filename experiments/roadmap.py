"""The ladder of versions: run what is missing of each version's seeds, and write reports/roadmap.md from all records.

What is finished, here or among the committed records, is kept; a ladder that was stopped goes on where it was.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import ladder

if __name__ == "__main__":
    sys.exit(ladder())

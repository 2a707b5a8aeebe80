"""aa: what does pure noise look like in the table?

Parent: v10. It changes nothing; of the ladder its runs have seeds 5 to 9, and v10's 0 to 4.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("aa"))

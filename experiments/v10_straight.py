"""v10_straight: what is it worth to teach each mixer alone before the whole student?

Parent: v10. The one change: no first stage; the converted student goes straight to the logits.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_straight"))

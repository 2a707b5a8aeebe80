"""v16_triple: does DistilBERT's triple loss suit a spiking student?

Parent: v10. The one change: DistilBERT's triple loss (arXiv 1910.01108).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v16_triple"))

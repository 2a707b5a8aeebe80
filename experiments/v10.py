"""v10: how well does a spiking RWKV-7 student imitate its teacher at a fixed temperature?

Parent: none. The base of the ladder: CE + 0.5 T^2 KL(teacher || student) at T = 2 (arXiv 1503.02531).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10"))

"""v10_embeddings: what is it worth to start from the teacher's blocks?

Parent: v10. The one change: only embedding, final norm and head are the teacher's; the blocks start as RWKV-7 does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from asnn_goose.cli import main

if __name__ == "__main__":
    sys.exit(main("v10_embeddings"))

"""Finetune a segmenter: `python recipes/amae_finetune.py [CONFIG.yaml] [key=value ...]`.

`finetune.from_scratch=true` is the paired baseline: same data, same order, fresh weights, its own
folder. Without a config it works on the demo's run.
"""

import sys
from pathlib import Path

from anycontrast.cli import main

DEFAULT = Path(__file__).parent / "configs" / "demo.yaml"

if __name__ == "__main__":
    words = sys.argv[1:]
    has_config = any(word.endswith((".yaml", ".yml")) for word in words)
    sys.exit(main(["finetune", *([] if has_config else [str(DEFAULT)]), *words]))

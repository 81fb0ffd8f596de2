"""Pretrain AMAE: `python recipes/amae_pretrain.py [CONFIG.yaml] [key=value ...]`.

On a laptop it starts what it needs by itself; inside `ray job submit -- python
recipes/amae_pretrain.py ...` it joins the running cluster. Without a config it pretrains the demo's
tiny model on the embedded phantom studies.
"""

import sys
from pathlib import Path

from anycontrast.cli import main

DEFAULT = Path(__file__).parent / "configs" / "demo.yaml"

if __name__ == "__main__":
    words = sys.argv[1:]
    has_config = any(word.endswith((".yaml", ".yml")) for word in words)
    sys.exit(main(["pretrain", *([] if has_config else [str(DEFAULT)]), *words]))

"""Every program imports this first, because it has to happen before the slow imports.

They take seconds, and until `run_script` takes over, Ctrl-C should leave without a traceback. In a program of somebody else that
imports ours, a notebook for one, signals stay as they are.
"""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ROOT, ROOT / "algorithms", ROOT / "benchmarks"

main_file = getattr(sys.modules["__main__"], "__file__", None)
if main_file and Path(main_file).resolve().parent in PROGRAMS:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
        # PyTorch reads this when it is imported. Minibatches of deeper models need different amounts of memory on CUDA, which
        # would leave gaps. Not all versions know the newer name.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

"""Makes Ctrl-C end a program without a traceback while its other imports, which take seconds, are still running.

Every program imports this module first. Later `run_script` handles signals. In a program of somebody else that imports
ours, such as a notebook, signals stay as they are.
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
        # PyTorch reads this when it is imported. Without it, minibatches of deeper models, which need different amounts
        # of memory on CUDA, would leave gaps. Not all versions know the newer name of the variable.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

"""`raydmd encode` as a Ray job: `ray job submit --working-dir . -- python jobs/encode.py TEXTS --recipe R --out D`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the job's working folder need not be installed

from raydmd.entry import main

if __name__ == "__main__":
    main(["encode", *sys.argv[1:]])

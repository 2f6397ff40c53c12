"""python -m transformer_fast.demo [OUTPUT]"""

import sys

from . import CheckpointMissing, run

try:
    run(*sys.argv[1:2])
except CheckpointMissing as error:
    sys.exit(str(error))

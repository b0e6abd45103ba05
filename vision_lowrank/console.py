"""How the commands speak: plain log lines, and errors that a user can mend as one line without a traceback."""

import logging
import sys
import warnings
from collections.abc import Callable

from vision_lowrank.errors import VisionLowRankError

# what libraries say on choices that are meant here
_KNOWN = (
    ".*does not have many workers.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
)


def run_as_command(command: Callable[[], object]) -> None:
    """Runs `command`; on an error that the user can mend, prints it as one line and exits with status 2."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _KNOWN:
        warnings.filterwarnings("ignore", pattern)
    try:
        command()
    except (VisionLowRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

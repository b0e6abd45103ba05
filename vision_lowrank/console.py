"""How the commands speak: plain log lines, and errors that a user can mend as one line without a traceback."""

import logging
import sys
import warnings
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode

from vision_lowrank.errors import VisionLowRankError

# what libraries say on choices that are meant here
_KNOWN = (
    ".*does not have many workers.*",
    ".*number of training batches .* is smaller than the logging interval.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*module.s. in eval mode at the start of training.*",
    ".*isinstance.treespec, LeafSpec.*",
)


# overrides of the jobs of a sweep that ended with an error
_failed: list[str] = []


def start(main: Callable[[], object]) -> None:
    """Starts a command of Hydra; after a sweep some of whose jobs failed, names them and exits with status 2."""
    try:
        main()
    except HydraException as error:
        # of --help, before which Hydra composes without telling of errors itself
        sys.exit(f"error: {error}")
    if _failed:
        print(f"error: failed in this sweep: {'; '.join(_failed)}", file=sys.stderr)
        sys.exit(2)


def run_as_command(command: Callable[[], object]) -> None:
    """Runs `command`; on an error that the user can mend, prints it as one line and exits with status 2.

    In a job of a sweep it returns instead, so that the other jobs run; `start` ends the command then.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in _KNOWN:
        warnings.filterwarnings("ignore", pattern)
    try:
        command()
    except (VisionLowRankError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
            sys.exit(2)
        _failed.append(" ".join(HydraConfig.get().overrides.task))

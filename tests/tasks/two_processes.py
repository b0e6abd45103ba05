"""Runs trainings in one or two processes that share a job, as a script that imports once and forks.

Reads a JSON list of jobs {"name", "overrides" of Hydra, "processes"} from standard input; each process leaves
`NAME-RANK.json` in the folder that the script is given, with what it validated on and how it ended.
"""

import json
import os
import socket
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_jobs(jobs, folder):
    import torch
    from hydra import compose, initialize_config_dir

    from vision_lowrank.tasks.masked_pretraining import HyperMAEPretraining
    from vision_lowrank.tasks.scene_classification import SceneClassification
    from vision_lowrank.training import train

    torch.set_num_threads(1)

    def work(job, rank):
        seen = []
        for task in (HyperMAEPretraining, SceneClassification):
            step = task.validation_step

            def validation_step(self, batch, index, step=step):
                seen.extend([self.current_epoch, *image.flatten()[:4].tolist()] for image in batch["image"])
                return step(self, batch, index)

            task.validation_step = validation_step
        with initialize_config_dir(str(REPOSITORY / "configs"), version_base="1.3"):
            config = compose("train", job["overrides"])
        error = None
        try:
            train(config)
        except Exception as failure:
            error = f"{type(failure).__name__}: {failure}"
        (folder / f"{job['name']}-{rank}.json").write_text(json.dumps({"error": error, "seen": seen}))

    for job in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(job["processes"]):
            child = os.fork()
            if not child:
                if job["processes"] > 1:
                    # what Lightning tells the processes that it starts
                    os.environ |= {
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0",
                        "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"]),
                        "VISION_LOWRANK_RUN": str(folder / "elsewhere"),
                    }  # fmt: skip
                try:
                    work(job, rank)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    run_jobs(json.load(sys.stdin), Path(sys.argv[1]))

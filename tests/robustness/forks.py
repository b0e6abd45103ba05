"""Runs jobs in processes that can be killed, without each paying for its imports: a server of its own that forks.

As a module, the client for tests; as a script, the server. They speak in lines of JSON.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class Forks:
    """Client. A job is {"kind": train, evaluate, compose or predict, "overrides": of Hydra} and perhaps:

    - "within": write `last.ckpt` after every step, not at the ends of epochs only.
    - "kill_after": seconds until `kill -9`.
    - "base": with compose, the folder of the pipeline.
    - "window_side": with predict, pixels along a side of the windows, a multiple of 16.
    - "file_limit": bytes that no file can grow beyond.
    """

    def __init__(self):
        # the tests' own processes may use all cores; two of these would fight for them
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, **job):
        """Returns {"status": exit status, or -9, "seconds", "output": what it printed}."""
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of forks is gone"
        return json.loads(answer)

    def close(self):
        self._process.stdin.close()
        self._process.wait()


def serve():
    """Forks a process for each line of standard input."""
    import torch
    from hydra import compose, initialize_config_dir

    from vision_lowrank import checkpoints, evaluate, predict
    from vision_lowrank import compose as composition
    from vision_lowrank.composer.render import load_base
    from vision_lowrank.console import run_as_command
    from vision_lowrank.data import streams
    from vision_lowrank.training import train

    torch.set_num_threads(1)
    commands = {
        "train": train,
        "evaluate": lambda config: evaluate.BENCHMARKS[config.benchmark.kind](config),
        "compose": composition.run,
        "predict": predict.predict,
    }

    def work(job):
        # renews the pool of threads that forking left broken, before several threads want to at once
        torch.set_num_threads(1)
        if job.get("within"):
            checkpoints.SAVE_EVERY = timedelta(0)
        if "file_limit" in job:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"],) * 2)
        if "window_side" in job:
            predict.SIDE, streams.WINDOW_BYTES = job["window_side"], 1
        folder = REPOSITORY / "configs" / ("predict" if job["kind"] == "predict" else "")
        with initialize_config_dir(str(folder), version_base="1.3"):
            config = compose(job["kind"], job["overrides"])
        run_as_command(lambda: commands[job["kind"]](config))

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        job = json.loads(line)
        if job["kind"] == "compose":
            # here, so that what it imports is not imported by each trial
            load_base(job["base"])
        with tempfile.TemporaryFile() as log:
            started = time.perf_counter()
            child = os.fork()
            if not child:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                status = 1
                try:
                    work(job)
                    status = 0
                except SystemExit as end:
                    status = end.code
                except BaseException as error:
                    print(repr(error))
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            status = _wait(child, started + job.get("kill_after", 1e9))
            seconds = time.perf_counter() - started
            log.seek(0)
            output = log.read().decode(errors="replace")
        print(json.dumps({"status": status, "seconds": seconds, "output": output[-4000:]}), file=answers, flush=True)


def _wait(child, deadline):
    """Returns the exit status of a process, which is killed at the deadline."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


if __name__ == "__main__":
    serve()

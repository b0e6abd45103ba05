"""Commands as a shell sees them: lines and exit status."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import hydra
from vision_lowrank.console import run_as_command, start
from vision_lowrank.errors import ConfigError

def work(config):
    if config.size > 8:
        raise ConfigError(f"size={config.size}: at most 8")
    print(f"done with {config.size}")

@hydra.main(config_path=".", config_name="program", version_base="1.3")
def main(config):
    run_as_command(lambda: work(config))

start(main)
"""


@pytest.fixture
def execute(tmp_path):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    (tmp_path / "program.yaml").write_text("size: 1\nhydra: {output_subdir: null}\n")

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "program.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


def test_an_error_that_a_user_can_mend_is_one_line(execute):
    done = execute("size=9")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: size=9: at most 8\n")


def test_help_for_which_a_choice_is_missing_tells_the_choices(execute, tmp_path):
    (tmp_path / "program.yaml").write_text("defaults:\n  - size: ???\n")
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "small.yaml").write_text("width: 1\n")
    done = execute("--help")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: You must specify 'size'")
    assert "Traceback" not in done.stderr
    assert done.stderr.split()[-1] == "small"
    assert "width: 1" in execute("--help", "size=small").stdout


def test_a_job_that_fails_does_not_end_its_sweep(execute):
    done = execute("-m", "size=9,3,11,5")
    assert done.returncode == 2
    assert [line for line in done.stdout.splitlines() if line.startswith("done")] == ["done with 3", "done with 5"]
    assert done.stderr.splitlines() == [
        "error: size=9: at most 8",
        "error: size=11: at most 8",
        "error: failed in this sweep: size=9; size=11",
    ]
    assert execute("-m", "size=3,5").returncode == 0

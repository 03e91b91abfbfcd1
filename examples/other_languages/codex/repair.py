"""Let Codex repair a small project in a folder of its own; print 1 when the project's check passes then, else 0.

A program for `leyden.Command`. A task is an object of `files` (name -> text), a `prompt` for Codex, and the `check`, a
shell command. A Codex that fails is a program that fails: that is not the same as a wrong repair.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CODEX = HERE / "node_modules" / ".bin" / "codex"
CHECK_SECONDS = 60


def main() -> None:
    """Write the project, run Codex in it, check it."""
    task = json.loads(Path(os.environ["LEYDEN_TASK_FILE"]).read_text())
    with tempfile.TemporaryDirectory() as place:
        project, home = Path(place, "project"), Path(place, "home")
        for folder in (project, home):
            folder.mkdir()
        for name, text in task["files"].items():
            (project / name).write_text(text)
        shutil.copy(HERE / "config.toml", home)
        address = f"model_providers.leyden.base_url={json.dumps(os.environ['OPENAI_BASE_URL'])}"
        done = subprocess.run(
            [CODEX, "exec", "--ephemeral", "--skip-git-repo-check", "-c", address, task["prompt"]],
            cwd=project,
            env={**os.environ, "CODEX_HOME": str(home)},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
        )
        if done.returncode:
            sys.exit(done.returncode)
        check = subprocess.run(task["check"], shell=True, cwd=project, stdout=sys.stderr, timeout=CHECK_SECONDS)
    print(int(check.returncode == 0))


if __name__ == "__main__":
    main()

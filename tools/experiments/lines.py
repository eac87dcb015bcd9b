"""The lines that runs leave: a JSON object for each, appended when it ends and never run again."""

import dataclasses
import fcntl
import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"

Line = dict[str, Any]


def read(file: Path) -> list[Line]:
    """Return all complete lines; one that a killed run left without its end does not count."""
    if not file.exists():
        return []
    return [json.loads(text) for text in _complete(file.read_bytes()).splitlines()]


def append(file: Path, line: Line) -> None:
    """Add a line, in place of a last one without its end; several processes may do so at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+b") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.seek(0)
        stream.truncate(len(_complete(stream.read())))
        stream.write(json.dumps(line).encode() + b"\n")


def _complete(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]


def plain(setting: Any) -> dict[str, Any]:
    """Return a dataclass as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(setting)))


def key(setting: dict[str, Any], device: str) -> str:
    """Return what two lines of the same run on the same kind of device share."""
    return json.dumps([setting, device], sort_keys=True)


def commit() -> str:
    """Return the commit of the code, with "+changes" where a file of it differs."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!*.jsonl")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no git checkout"

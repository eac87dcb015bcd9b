"""Where a figure was measured: the facts that every recorded number carries."""

import datetime as dt
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str | int]:
    """Return device, library and driver versions, threads and the date, ready for JSON."""
    facts: dict[str, str | int] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if device.type == "cuda":
        facts["driver"] = _driver()
        facts["cuda"] = torch.version.cuda or torch.version.hip or "none"
        facts["cudnn"] = str(torch.backends.cudnn.version())
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cores"] = os.cpu_count() or 1
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def device_name(device: torch.device) -> str:
    """Return the maker's name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30)
    return answer.stdout.strip().splitlines()[0] if answer.stdout.strip() else "unknown"

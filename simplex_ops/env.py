"""What a figure or a bug report must carry: versions, devices, settings, who serves the operator.

python -m simplex_ops.env
"""

import datetime as dt
import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import simplex_ops

# What changes how the operator, its kernels or the compiler behave; nothing else is read out.
VARIABLES = ("CUDA_", "HIP_", "OMP_", "PYTORCH_", "ROCR_", "SIMPLEX_", "TORCH", "TRITON_")
BLOCKED = "the blocked path in PyTorch operations"


def environment(device: torch.device) -> dict[str, str | int]:
    """Return device, library and driver versions, threads and the date, ready for JSON."""
    facts: dict[str, str | int] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%MZ"),
    }
    if device.type == "cuda":
        facts["driver"] = driver()
        facts["cuda"] = torch.version.cuda or torch.version.hip or "none"
        facts["cudnn"] = str(torch.backends.cudnn.version())
    else:
        facts["threads"] = torch.get_num_threads()
        facts["cores"] = os.cpu_count() or 1
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def report() -> dict[str, str]:
    """Return what a bug report needs, a fact by its name, in the order to read them."""
    facts = {
        "simplex": simplex_ops.__version__,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cuda": torch.version.cuda or "none",
        "hip": torch.version.hip or "none",
        "driver": driver(),
        "cpu": f"{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "cpu is served by": BLOCKED,
    }
    for number in range(torch.cuda.device_count()):
        device = torch.device("cuda", number)
        major, minor = torch.cuda.get_device_capability(device)
        facts[str(device)] = f"{device_name(device)}, capability {major}.{minor}"
        facts[f"{device} is served by"] = serving(device)
    facts |= {
        f"${name}": value
        for name, value in sorted(os.environ.items())
        if name.startswith(VARIABLES)
    }
    return facts


def serving(device: torch.device) -> str:
    """Say what runs the operator for bfloat16 on a GPU, and why where it is not a kernel."""
    from simplex_ops.devices.gpu import unserved

    one = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16, device=device)
    reason = unserved(one, one)
    if reason:
        return f"{BLOCKED}: {reason}"
    try:
        importlib.import_module("csrc_free.attn")
    except Exception as error:  # noqa: BLE001  (what a report is for; a call raises it)
        return f"nothing: csrc_free.attn cannot be imported: {type(error).__name__}: {error}"
    return "the Triton kernels"


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


def version_of(package: str) -> str:
    """Return the version of an installed package without importing it, or "none"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def driver() -> str:
    """Return the version of NVIDIA's driver, or "none" where nvidia-smi does not say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(  # noqa: S603  (found on the PATH, arguments our own)
        query, capture_output=True, text=True, check=False, timeout=30
    )
    versions = answer.stdout.strip().splitlines()
    return versions[0] if versions and not answer.returncode else "none"


if __name__ == "__main__":
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in report().items())

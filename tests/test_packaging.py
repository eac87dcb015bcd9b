"""The wheel and the sdist: what they hold, and that they work where the source is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.message import Message
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import simplex_ops

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("csrc_free", "lowering", "simplex_ops")
VERSION = simplex_ops.__version__

USE = """
import sys, torch
assert "simplex" in torch._dynamo.list_backends()
assert "lowering" not in sys.modules  # found by its entry point, and not loaded yet
run = torch.compile(torch.nn.Linear(4, 4), backend="simplex", mode="reduce-overhead")
assert run.dynamo_ctx.callback is not None
import csrc_free, lowering, simplex_ops, simplex_ops.reference
for module in (csrc_free, lowering, simplex_ops):
    assert module.__file__.startswith(sys.prefix), module.__file__
q, k1, k2, v1, v2 = (torch.randn(2, 4, 9, 16, requires_grad=True) for _ in range(5))
out, lse = torch.ops.simplex.attn(q, k1, k2, v1, v2, 4, 3)
expected, _ = simplex_ops.reference.attn(q, k1, k2, v1, v2, 4, 3)
torch.testing.assert_close(out, expected)
(out.sum() + lse.sum()).backward()
assert torch._dynamo.lookup_backend("simplex") is lowering.simplex
"""


def run(*command: str | Path, cwd: Path) -> str:
    # Neither the source tree nor another environment may lend a hand.
    lent = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        command, cwd=cwd, env=lent, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the sdist, and the wheel from the sdist, of a copy; return the folder of both."""
    tree = tmp_path_factory.mktemp("tree")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, tree)
    for package in (*PACKAGES, "tests", "tools"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tree / package, ignore=ignored)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (found,) = built.glob("*.whl")
    return zipfile.ZipFile(found)


def packaged_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".md"
    }


def said_by(wheel: zipfile.ZipFile) -> Message:
    metadata_file = f"simplex_ops-{VERSION}.dist-info/METADATA"
    return HeaderParser().parsestr(wheel.read(metadata_file).decode())


def test_wheel_holds_the_three_packages_whole_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    info = f"simplex_ops-{VERSION}.dist-info/"
    held = {name for name in wheel.namelist() if not name.startswith(info)}
    assert held == packaged_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= held


def test_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    info = f"simplex_ops-{VERSION}.dist-info"
    said = said_by(wheel)
    assert (said["Name"], said["Version"]) == ("simplex-ops", VERSION)
    assert (said["License-Expression"], said["Requires-Python"]) == ("BSD-3-Clause", ">=3.11")
    needed = [r for r in said.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert needed == ["torch>=2.11"]
    assert {"models", "test", "testing", "tools", "triton"} == set(
        said.get_all("Provides-Extra", [])
    )
    points = wheel.read(f"{info}/entry_points.txt").decode().split()
    assert points == ["[torch_dynamo_backends]", "simplex", "=", "lowering.backend:simplex"]
    assert "Redistribution" in wheel.read(f"{info}/licenses/LICENSE").decode()


def test_sdist_holds_what_the_wheel_is_made_of(built: Path) -> None:
    (found,) = built.glob("*.tar.gz")
    with tarfile.open(found) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"} | packaged_files()
    assert wanted <= held
    assert not {name for name in held if name.startswith(("tests", "tools"))}


def test_wheel_works_in_an_environment_that_has_only_torch(built: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    (file,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", file, cwd=tmp_path)
    # Torch is lent by the environment that runs the tests; what is installed there for
    # development stays out, because nobody reads the .pth files of a lent folder.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path)
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(site.strip(), "lent.pth").write_text("\n".join(lent))
    run(python, "-c", USE, cwd=tmp_path)


def test_version_of_the_installation_is_that_of_the_source() -> None:
    try:
        installed = metadata.version("simplex-ops")
    except metadata.PackageNotFoundError:
        pytest.skip("simplex-ops is not installed here")
    assert installed == VERSION
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"[{VERSION}]" in changes or "[Unreleased]" in changes


def test_constraints_pin_every_requirement_within_its_range(wheel: zipfile.ZipFile) -> None:
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    pins = {canonicalize_name(name): version for name, version in pairs}
    wanted = [Requirement(line) for line in said_by(wheel).get_all("Requires-Dist", [])]
    for requirement in wanted:
        if requirement.name == "simplex-ops":
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement} is not pinned"
        assert requirement.specifier.contains(pin), f"{requirement}, but the pin is {pin}"

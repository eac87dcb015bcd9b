"""Measured choices as data: one table a device, with what was measured, when and with what.

`serves` says which problems the table speaks of, and `lines` has each kernel's configs: the first
whose conditions hold is the choice, and a kernel without such a line does not run. `figures`,
`versions` and `date` say why, and change nothing; a figure of another device or day says so itself.
"""

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csrc_free.traits import AnyConfig, Device, Traits

ROOT = Path(__file__).parent
# What can change a choice. The digest of the sources covers these alone.
CHOOSING = ("serves", "lines")


@functools.cache
def table(name: str) -> Mapping[str, Any] | None:
    """Return a device's table, or None where none was measured."""
    path = ROOT / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def is_measured(traits: Traits, device: Device) -> bool:
    """Tell whether the device's table speaks of such problems.

    None does where rows are no multiple of 16 bytes: read by pointers, tiles of 64 rows and 64 keys
    gave wrong outputs and illegal accesses there (head sizes 65 and 20, or 18 and 2; causal or not;
    H100, torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25), and those of 32 right ones.
    """
    found = table(device.name)
    if found is None or device.is_interpreted or not traits.are_keys_aligned:
        return False
    serves = found["serves"]
    return (
        traits.precision in serves["precisions"]
        and traits.form in serves["forms"]
        and traits.columns <= serves["columns_to"]
    )


def configs(
    kernel: str, kind: type[AnyConfig], traits: Traits, device: Device, **fixed: object
) -> Iterator[AnyConfig]:
    """Yield the configs that were measured for a kernel on such problems, best first."""
    if not is_measured(traits, device):
        return
    found = table(device.name)
    assert found is not None
    for line in found["lines"][kernel]:
        if _holds(line["when"], traits):
            yield kind(**line["config"], **fixed)


def read_choosing(text: str) -> str:
    """Return what of a table's text can change a choice, in one spelling."""
    found = json.loads(text)
    return json.dumps({name: found[name] for name in CHOOSING}, sort_keys=True)


def _holds(when: Mapping[str, Any], traits: Traits) -> bool:
    """Tell whether a problem is within a line's conditions, each of which must be known.

    A line without a precision is of bfloat16.
    """
    rules = {
        "group_from": lambda bound: traits.group >= bound,
        "group_below": lambda bound: traits.group < bound,
        "group_multiple_of": lambda bound: traits.group % bound == 0,
        "columns_to": lambda bound: traits.columns <= bound,
        "precision": lambda bound: traits.precision == bound,
    }
    return all(rules[name](bound) for name, bound in {"precision": None, **when}.items())

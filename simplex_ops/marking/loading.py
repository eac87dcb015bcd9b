"""Marking a model as a saved one was, before its weights load."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplex_ops.marking.families.known import family_of
from simplex_ops.marking.mark import mark_as
from simplex_ops.marking.marked import is_marked
from simplex_ops.marking.models import Marking
from simplex_ops.marking.saved import SUFFIX, decoded, told
from simplex_ops.marking.setting import Mark

_INDEX = "model.safetensors.index.json"
_WEIGHTS = "model.safetensors"


def mark_like(model: nn.Module, saved: Any) -> Marking:
    """Mark the modules of a model as those were whose weights will be loaded, and return which.

    Call it on the unmarked model, before the weights load; for transformers, `from_pretrained` does
    both. k2 and v2 are made as `init` of the saved mark says, and await the loaded ones.

    Args:
        model: the same model, unmarked. It may be on the meta device.
        saved: a state dict with tensors of settings (keys that end in `simplex_ops.mark_like`); a
            model that is marked; the path of a file of safetensors, of a directory of them, or of a
            directory of a distributed checkpoint. Of anything else that torch.load reads, give the
            state dict. Names may have a prefix more or less than those of the model.

    Raises:
        ValueError: nothing marked was saved, a saved name is not in the model, or the module there
            has other heads, or another mark.
    """
    marks = settings_of(saved)
    if not marks:
        raise ValueError(
            "no mark was saved here: there is no key that ends in simplex_ops.mark_like. Load "
            "these weights into the unmarked model, then mark() it"
        )
    done, modules = Marking(), dict(model.named_modules())
    places = {name: _find(name, modules) for name in marks}
    for name, mark in marks.items():
        place = places[name]
        module = modules[place]
        if is_marked(module):
            _compare(place, module.simplex_mark, mark)
            done.left[place] = "it is marked so already"
            continue
        family, found = family_of(module, *_sizes(module, mark))
        read = (found.head_dim, found.v_head_dim)
        if read != (mark.head_dim, mark.v_head_dim):
            raise ValueError(
                f"{place} has head_dim {read} of keys and values, and the saved mark {name} has "
                f"{(mark.head_dim, mark.v_head_dim)}: is this the model that was saved?"
            )
        mark_as(module, mark, family, found, copied=False)
        done.marked[place] = module
    return done


def from_pretrained(model_class: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
    """Load a marked transformers model with its marks: `model_class.from_pretrained(path, ...)`.

    Where the checkpoint holds no mark it loads as ever. All arguments are those of transformers;
    the path may be a folder, or a name on the Hub.

    Args:
        model_class: AutoModelForCausalLM or another Auto class, or the model's own.
        path: what `save_pretrained` of a marked model wrote.
        *args: passed on.
        **kwargs: passed on.

    Raises:
        ValueError: a saved mark does not fit the model (`mark_like`).
    """
    from transformers import AutoConfig

    where = {key: kwargs[key] for key in _HUB if key in kwargs}
    marks = settings_of(_safetensors_of(path, where))
    if not marks:
        return model_class.from_pretrained(path, *args, **kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(path, **where)
    concrete = _concrete(model_class, config)

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        concrete.__init__(self, *args, **kwargs)
        mark_like(self, marks)

    # from_pretrained builds and loads in one call; what it builds must be marked in between.
    marking: Any = type(concrete.__name__, (concrete,), {"__init__": build})
    marking.__module__ = concrete.__module__
    loaded = marking.from_pretrained(path, *args, config=config, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.__class__ = concrete
    return loaded


_HUB = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")


def settings_of(saved: Any) -> dict[str, Mark]:
    """Return the saved marks by the name of their module."""
    if isinstance(saved, nn.Module):
        return {name: m.simplex_mark for name, m in saved.named_modules() if is_marked(m)}
    if isinstance(saved, Mapping):
        found = {key: value for key, value in saved.items() if key.endswith(SUFFIX)}
        found.update({k + SUFFIX: v for k, v in saved.items() if isinstance(v, Mark)})
    else:
        found = _read(Path(saved))
    return {
        key.removesuffix(SUFFIX): value if isinstance(value, Mark) else decoded(value)
        for key, value in found.items()
    }


def _read(path: Path) -> dict[str, Tensor]:
    if (path / ".metadata").exists():
        return _read_distributed(path)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{path} is no file or directory of safetensors, and no distributed checkpoint: give "
            "mark_like() the state dict that it holds"
        )
    return _read_safetensors(files)


def _read_safetensors(files: list[Path]) -> dict[str, Tensor]:
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found |= {k: tensors.get_tensor(k) for k in tensors.keys() if k.endswith(SUFFIX)}  # noqa: SIM118
    return found


def _read_distributed(path: Path) -> dict[str, Tensor]:
    from torch.distributed import checkpoint

    reader = checkpoint.FileSystemReader(path)
    held = reader.read_metadata().state_dict_metadata
    found: dict[str, Any] = {
        key: torch.empty(tuple(said.size), dtype=torch.int32)  # pyright: ignore[reportAttributeAccessIssue]
        for key, said in held.items()
        if key.endswith(SUFFIX)
    }
    checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


def _safetensors_of(path: Any, where: dict[str, Any]) -> dict[str, Tensor]:
    """Return the settings in a folder or a repository of the Hub; nothing where it has none."""
    if Path(path).is_dir():
        folder = Path(path) / where.get("subfolder", "")
        files = sorted(folder.glob("*.safetensors"))
        return _read_safetensors(files)
    from transformers.utils import cached_file

    index = cached_file(path, _INDEX, _raise_exceptions_for_missing_entries=False, **where)
    names = {_WEIGHTS}
    if index is not None:
        held = json.loads(Path(index).read_text())["weight_map"]
        names = {file for key, file in held.items() if key.endswith(SUFFIX)}
    files = [
        cached_file(path, name, _raise_exceptions_for_missing_entries=False, **where)
        for name in sorted(names)
    ]
    return _read_safetensors([Path(file) for file in files if file is not None])


def _concrete(model_class: Any, config: Any) -> type[nn.Module]:
    """Return the class that an Auto class stands for."""
    if isinstance(model_class, type) and issubclass(model_class, nn.Module):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(config))


def _find(name: str, modules: dict[str, nn.Module]) -> str:
    if name in modules:
        return name
    # What was saved as a part of another model, or holds it: one name ends in the other.
    close = [n for n in modules if n and (n.endswith(f".{name}") or name.endswith(f".{n}"))]
    longest = max(map(len, close), default=0)
    close = [n for n in close if len(n) == longest]
    if len(close) != 1:
        raise ValueError(
            f"a mark was saved for {name}, and the model has "
            f"{'no module of that name' if not close else f'several such: {close}'}: is this the "
            "model that was saved?"
        )
    return close[0]


def _sizes(module: nn.Module, mark: Mark) -> tuple[int | None, int | None]:
    """Return what family_of needs for a module of no known family."""
    try:
        family_of(module)
    except TypeError:
        return mark.kv_heads, mark.head_dim
    return None, None


def _compare(name: str, stands: Mark, saved: Mark) -> None:
    if told(stands) != told(saved):
        raise ValueError(
            f"{name} is marked with {told(stands)}, and the saved mark is {told(saved)}: unmark() "
            "it first"
        )

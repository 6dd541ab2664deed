"""Rule files: meta-parameters as safetensors, with family, config and card in the metadata.

The metadata has one entry, `fastl2o-rule`, a JSON object with `format_version`, `family`, `config`
and `card`. Nothing is unpickled. A file is written beside its destination and renamed over it, so
that a full disk or a kill leaves the previous one as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from . import _hub, zoo
from .rules import FAMILIES, Rule, from_config

FORMAT = "fastl2o-rule"
FORMAT_VERSION = 1
# The largest rule has about 100,000 meta-parameters; a file far beyond that is something else.
_LARGEST_FILE = 64 * 2**20
_DTYPES = (torch.float32, torch.float64)
_SUFFIX = ".safetensors"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def atomic_write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, which at any moment holds all of the old or all of the new content.

    What a symbolic link names is written, and the link stays; a file keeps its permissions.

    Raises:
        OSError: the disk is full, the folder is not there or cannot be written, or `path` is no
            regular file. The message names `path`; what was there is untouched.
    """
    try:
        # A rename over a link, a device or a pipe would put a file in its place.
        target = Path(os.path.realpath(path))
        mode = target.stat().st_mode if target.exists() else None
        if not target.parent.is_dir():
            raise FileNotFoundError(
                errno.ENOENT, f"there is no folder {str(target.parent)!r}; make it first"
            )
        if mode is not None and not stat.S_ISREG(mode):
            raise OSError(
                errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL,
                "it is there and no regular file; choose another name",
            )
        _replace(target, data, mode)
    except OSError as error:
        # The error of a full disk has no name in it, others that of the temporary file.
        problem = f"cannot write {os.fspath(path)!r}: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            problem += "; free some space, or choose another place"
        raise OSError(error.errno, problem) from error


def _replace(target: Path, data: bytes, mode: int | None) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None and mode != temporary.stat().st_mode:
            os.chmod(temporary, stat.S_IMODE(mode))
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def save_rule(
    rule: Rule, path: str | os.PathLike[str], card: Mapping[str, Any] | None = None
) -> None:
    """Write a rule to a safetensors file.

    Args:
        rule: a rule of a known family, with finite float32 or float64 meta-parameters, kept to the
            last bit.
        path: where to write, a name that ends in .safetensors; an existing file is replaced only
            once the new one is complete.
        card: what to say about the meta-parameters (how trained, on what, horizon, results), a
            JSON-able mapping.

    Raises:
        ValueError: the rule or card cannot be written in a form that loads again, or `path` has
            another ending.
        TypeError: `path` is no path, or `card` no mapping.
        OSError: the file cannot be written; an existing one is untouched.

    Example:
        >>> import fastl2o, tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "rule.safetensors"
        >>> fastl2o.LSTMRule().save(path, {"trained_on": "nothing yet"})
        >>> fastl2o.load(path).card
        {'trained_on': 'nothing yet'}
    """
    _check_path(path)
    if card is not None and not isinstance(card, Mapping):
        raise TypeError(
            f"Invalid card: {card!r}; pass a mapping of strings, finite numbers and lists"
        )
    if rule.family not in FAMILIES:
        raise ValueError(
            f"Invalid rule: family {rule.family!r} has no file format; known are {sorted(FAMILIES)}"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in rule.named_parameters()}
    _check_values(tensors, "rule")
    header = {
        "format_version": FORMAT_VERSION,
        "family": rule.family,
        "config": rule.config(),
        "card": dict(card or {}),
    }
    try:
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"Invalid card: {error}; pass a mapping of strings, finite numbers and lists"
        ) from error
    # One entry, because safetensors writes several in any order: equal rules make equal files.
    atomic_write(path, save_tensors(tensors, metadata={FORMAT: text}))


def _check_path(path: object) -> None:
    """Refuse what `load` would not take for the path of a rule file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Invalid path: {path!r}; pass the path of a {_SUFFIX} file")
    text = str(path)
    if _SCHEME.match(text):
        raise ValueError(
            f"Invalid path: {text!r} is an address; save to a path, or share the rule on the Hub "
            "with push_to_hub"
        )
    if not text.endswith(_SUFFIX):
        raise ValueError(
            f"Invalid path: {text!r}; the name of a rule file ends in {_SUFFIX}, by which "
            "fastl2o.load knows a path from a shipped rule's name"
        )


def load(
    name_or_path: str | os.PathLike[str],
    *,
    family: str | None = None,
    local_files_only: bool = False,
) -> Rule:
    """Load a rule, shipped, from a file or from the Hugging Face Hub.

    Args:
        name_or_path: the name of a shipped rule (see `fastl2o.zoo.names()`); a path (a string
            counts as one if it ends in .safetensors or has a path separator); or
            `"hf://owner/name@revision"`, a repository on the Hub that `rule.push_to_hub` wrote.
            The revision is a commit, a tag or a branch; there is no default. Its
            `rule.safetensors` is loaded, or the file named behind it: `"hf://.../my.safetensors"`.
            Needs the extra `hub`; nothing else here uses the network.
        family: accept only rules of this family, "lstm", "rnnprop" or "hierarchical".
        local_files_only: take a rule of the Hub from the local cache and never from the network.

    Returns:
        The rule, on the CPU, with its `card`; one from the Hub notes the address with the commit in
        `card["source"]`.

    Raises:
        TypeError: `name_or_path` is neither.
        ValueError: an unknown name, an address without revision or not of the Hub, or a file that
            is truncated, no rule file, of another family or version, or whose tensors have wrong
            names, shapes, dtypes or values.
        ImportError: an `hf://` address without huggingface_hub.
        OSError: the file cannot be read (FileNotFoundError if it is not there) or downloaded.

    Example:
        >>> import fastl2o
        >>> fastl2o.load("no-such-rule")
        Traceback (most recent call last):
        ...
        ValueError: no shipped rule is named 'no-such-rule'...
        >>> fastl2o.load("hf://owner/name")
        Traceback (most recent call last):
        ...
        ValueError: Invalid address: 'hf://owner/name' has no revision...
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(
            f"Invalid name_or_path: {name_or_path!r}; pass a shipped rule's name "
            f"({', '.join(zoo.names())}), the path of a {_SUFFIX} file, or an hf:// address"
        )
    if _hub.is_address(name_or_path):
        address = _hub.parse_address(str(name_or_path))
        path, source = _hub.download(
            address, largest=_LARGEST_FILE, local_files_only=local_files_only
        )
        rule = _parse_rule(_read(path), source, family)
        rule.card["source"] = source
        return rule
    if isinstance(name_or_path, str) and _SCHEME.match(name_or_path):
        raise ValueError(
            f"Invalid address: {name_or_path!r}; only {_hub.PREFIX}owner/name@revision is "
            "downloaded (in small letters). Download the file and pass its path"
        )
    is_name = isinstance(name_or_path, str) and not (
        name_or_path.endswith(_SUFFIX) or os.sep in name_or_path or "/" in name_or_path
    )
    path = zoo.path(str(name_or_path)) if is_name else Path(name_or_path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; pass the path of a rule's .safetensors file")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no rule file {path}; pass the path of one that was written by rule.save, or "
            f"a shipped rule's name: {', '.join(zoo.names()) or 'there are none'}"
        )
    return _parse_rule(_read(path), str(path), family)


def _read(path: Path) -> bytes:
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path}: larger than any rule; pass a file that was written by rule.save")
    return path.read_bytes()


def read_card(path: Path) -> dict[str, Any]:
    """The card of a rule file, which is checked only as far as its metadata."""
    return _entry(_read_header(path.read_bytes(), str(path)), "card", str(path))


def _parse_rule(data: bytes, path: str, family: str | None) -> Rule:
    header = _read_header(data, path)
    found = header.get("family")
    if not isinstance(found, str) or found not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{path}: unknown rule family {found!r}; this version knows {known}")
    if family is not None and found != family:
        raise ValueError(
            f"{path}: holds a rule of family {found!r}, expected {family!r}; pass a file of that"
        )
    card, config = _entry(header, "card", path), _entry(header, "config", path)
    try:
        with torch.device("meta"):  # draws no random numbers from the caller's generator
            rule = from_config(found, config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    # A default in place of a missing constant would be another rule.
    missing = sorted(set(rule.config()) - set(config))
    if missing:
        raise ValueError(
            f"{path}: its config lacks {', '.join(missing)}; save the rule again with rule.save"
        )
    try:
        tensors = load_tensors(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path}: truncated or damaged ({error}); copy or save it again"
        ) from error
    _check_names_and_shapes(rule, tensors, path)
    _check_values(tensors, path)
    rule.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=True)
    rule.card = card
    return rule


def _read_header(data: bytes, path: str) -> dict[str, Any]:
    """Our entry of a safetensors file: 8 bytes of header length, a JSON header, the tensors."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 10 or data[8:9] != b"{":
        raise ValueError(
            f"{path}: not a safetensors file; pass a file that was written by rule.save"
        )
    if 8 + length > len(data):
        raise ValueError(
            f"{path}: truncated: {len(data)} bytes, and its header alone has {length}; copy or "
            "save it again"
        )
    try:
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__")
        text = metadata.get(FORMAT) if isinstance(metadata, dict) else None
        header = None if text is None else json.loads(text)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header is damaged ({error}); copy or save it again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{path}: a safetensors file, but not a rule; pass a file that was written by "
            "rule.save, or convert arrays with fastl2o.convert"
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: written in format version {header.get('format_version')!r}, this fastl2o "
            f"reads version {FORMAT_VERSION}; install the version that wrote it"
        )
    return header


def _entry(header: Mapping[str, Any], key: str, path: str) -> dict[str, Any]:
    value = header.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} in its header is missing or no JSON object; save it again")
    return value


def _check_names_and_shapes(rule: Rule, tensors: Mapping[str, Tensor], path: str) -> None:
    expected = dict(rule.layout)
    missing, extra = (
        sorted(expected.keys() - tensors.keys()),
        sorted(tensors.keys() - expected.keys()),
    )
    if missing or extra:
        raise ValueError(
            f"{path}: does not hold the tensors of {rule!r}: missing {missing or 'none'}, "
            f"unexpected {extra or 'none'}"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, {rule!r} has "
                f"{tuple(shape)} there"
            )


def _check_values(tensors: Mapping[str, Tensor], path: str) -> None:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        names = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(
            f"{path}: meta-parameters of dtype {names}; expected all float32 or all float64"
        )
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{path}: {name} holds NaN or Inf; such a rule cannot work, use an earlier "
                "checkpoint"
            )

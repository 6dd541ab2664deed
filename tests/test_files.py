"""Rule files: exact round trips, every way to be damaged, and writes that fail half-way."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import fastl2o
from fastl2o import _files, zoo
from fastl2o.rules import LSTMRule, RNNPropRule
from tests.common import RuleCase, over_rules

Header = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@over_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_round_trip_is_exact(case: RuleCase, dtype: torch.dtype, tmp_path: Path) -> None:
    rule = case.make(dtype)
    path = tmp_path / "rule.safetensors"
    card = {"trained_on": "quadratics", "horizon": 100, "results": [0.1, 2.5], "note": "é"}
    random_state = torch.get_rng_state()
    rule.save(path, card)
    loaded = fastl2o.load(path)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert type(loaded) is type(rule)
    assert loaded.config() == rule.config()
    assert torch.equal(loaded.flat_parameters(), rule.flat_parameters())
    assert loaded.flat_parameters().dtype == dtype
    assert loaded.card == card
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    rule = LSTMRule(3, 1)
    rule.save(tmp_path / "a.safetensors", {"horizon": 100})
    fastl2o.load(tmp_path / "a.safetensors").save(tmp_path / "b.safetensors", {"horizon": 100})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def parts(rule: fastl2o.Rule, tmp_path: Path) -> tuple[Tensors, Header]:
    """The tensors and our header of a good file."""
    path = tmp_path / "good.safetensors"
    rule.save(path, {})
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return load_tensors(data), json.loads(metadata["fastl2o-rule"])


def put(tensors: Tensors, name: str, value: float) -> None:
    tensors[name].view(-1)[0] = value


BAD_FILES: dict[str, tuple[Callable[[Tensors, Header], Any], str]] = {
    "no-version": (lambda t, h: h.clear(), "format version None"),
    "other-version": (lambda t, h: h.update(format_version=2), "format version 2"),
    "other-family": (lambda t, h: h.update(family="gru"), "unknown rule family 'gru'"),
    "family-list": (lambda t, h: h.update(family=["lstm"]), "unknown rule family"),
    "no-config": (lambda t, h: h.pop("config"), "config in its header is missing"),
    "config-list": (lambda t, h: h.update(config=[]), "config in its header .* no JSON object"),
    "card-text": (lambda t, h: h.update(card="x"), "card in its header .* no JSON object"),
    "config-extra": (lambda t, h: h["config"].update(width=3), "unknown width"),
    "config-range": (lambda t, h: h["config"].update(hidden_size=99), "Invalid hidden_size"),
    "config-type": (lambda t, h: h["config"].update(hidden_size="3"), "Invalid hidden_size"),
    "config-nan": (lambda t, h: h["config"].update(p=float("nan")), "Invalid p"),
    "config-huge": (lambda t, h: h["config"].update(eps=10**400), "Invalid eps"),
    "other-size": (lambda t, h: h["config"].update(hidden_size=4), "has shape"),
    "missing": (lambda t, h: t.pop("readout.bias"), r"missing \['readout.bias'\]"),
    "extra": (lambda t, h: t.update(extra=torch.zeros(1)), r"unexpected \['extra'\]"),
    "shape": (
        lambda t, h: t.update({"readout.weight": torch.zeros(3)}),
        r"readout.weight has shape \(3,\), LSTMRule\(.*\) has \(1, 3\)",
    ),
    "nan": (lambda t, h: put(t, "layers.0.bias", torch.nan), "layers.0.bias holds NaN or Inf"),
    "inf": (lambda t, h: put(t, "readout.weight", torch.inf), "readout.weight holds NaN"),
    "half": (lambda t, h: t.update({k: v.half() for k, v in t.items()}), "dtype torch.float16"),
    "integer": (
        lambda t, h: t.update({"readout.bias": torch.zeros(1, dtype=torch.int64)}),
        "expected all float32",
    ),
}


@pytest.mark.parametrize(("change", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(
    change: Callable[[Tensors, Header], Any], message: str, tmp_path: Path
) -> None:
    tensors, header = parts(LSTMRule(3, 1), tmp_path)
    change(tensors, header)
    path = tmp_path / "bad.safetensors"
    path.write_bytes(save_tensors(tensors, metadata={"fastl2o-rule": json.dumps(header)}))
    with pytest.raises(ValueError, match=message) as error:
        fastl2o.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"fastl2o-rule": "[]"}], ids=str)
def test_safetensors_of_others_are_not_rules(metadata: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(save_tensors({"weight": torch.zeros(2)}, metadata=metadata))
    with pytest.raises(ValueError, match="a safetensors file, but not a rule"):
        fastl2o.load(path)


def test_a_config_without_one_of_its_constants_is_refused(tmp_path: Path) -> None:
    tensors, header = parts(LSTMRule(hidden_size=2, num_layers=1, output_scale=0.01), tmp_path)
    del header["config"]["output_scale"]
    path = tmp_path / "lacking.safetensors"
    path.write_bytes(save_tensors(tensors, metadata={_files.FORMAT: json.dumps(header)}))
    with pytest.raises(ValueError, match="its config lacks output_scale"):
        fastl2o.load(path)


def test_the_family_can_be_demanded(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    LSTMRule(3, 1).save(path)
    assert fastl2o.load(path, family="lstm").family == "lstm"
    with pytest.raises(ValueError, match="holds a rule of family 'lstm', expected 'rnnprop'"):
        fastl2o.load(path, family="rnnprop")


@pytest.mark.parametrize("keep", [0, 7, 8, 20, 0.3, 0.9, -1])
def test_truncated_files(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    RNNPropRule(3, 1).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else int(keep)])
    with pytest.raises(ValueError, match=r"truncated|not a safetensors file"):
        fastl2o.load(path)


def test_other_things_are_not_rules(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no rule file .*name: .*lstm-mnist"):
        fastl2o.load(path)
    torch.save(LSTMRule(2, 1).state_dict(), path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        fastl2o.load(path)
    with open(path, "wb") as file:
        file.truncate(2**27)
    with pytest.raises(ValueError, match="larger than any rule"):
        fastl2o.load(path)
    with pytest.raises(ValueError, match="no shipped rule is named 'lstm-best'"):
        fastl2o.load("lstm-best")
    with pytest.raises(IsADirectoryError, match="is a folder; pass the path"):
        fastl2o.load(tmp_path)


@pytest.mark.parametrize("name", [None, 5, b"lstm"], ids=repr)
def test_what_is_no_name_and_no_path_is_not_loaded(name: Any) -> None:
    with pytest.raises(TypeError, match=r"Invalid name_or_path: .*; pass a shipped rule's name"):
        fastl2o.load(name)


@pytest.mark.parametrize(
    "address", ["http://x/y.safetensors", "HF://owner/name@v1", "file:///x.safetensors"]
)
def test_addresses_of_other_kinds_are_not_taken_for_paths(address: str) -> None:
    with pytest.raises(ValueError, match=f"Invalid address: {address!r}; only hf://owner/name@rev"):
        fastl2o.load(address)


@given(data=st.data())
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_files_load_or_say_why(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever bytes change, a file loads as a usable rule or raises ValueError, nothing else."""
    path = tmp_path / "rule.safetensors"
    LSTMRule.as_sgd(0.1, hidden_size=2, num_layers=1).save(path, {"horizon": 1})
    content = bytearray(path.read_bytes())
    header = int.from_bytes(content[:8], "little") + 8
    ranges = st.sampled_from([(0, 8), (8, header), (header, len(content))])
    for _ in range(data.draw(st.integers(1, 4))):
        low, high = data.draw(ranges)
        at = data.draw(st.integers(low, min(high, len(content)) - 1)) if low < len(content) else 0
        kind = data.draw(st.sampled_from(["flip", "set", "delete", "insert"]))
        if kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    mutated = tmp_path / "mutated.safetensors"
    mutated.write_bytes(content)
    try:
        rule = fastl2o.load(mutated)
    except ValueError:
        return
    assert bool(torch.isfinite(rule.flat_parameters()).all())
    grad = torch.ones(2)
    update, _ = rule.reference_step(grad, rule.init_state(grad))
    assert update.shape == (2,)


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    rule = LSTMRule(2, 1)
    for card in ({"loss": float("nan")}, {"rule": rule}):
        with pytest.raises(ValueError, match="Invalid card"):
            rule.save(path, card)
    for no_card in ("x", 5, []):
        with pytest.raises(TypeError, match=r"Invalid card: .*; pass a mapping"):
            rule.save(path, no_card)
    with pytest.raises(ValueError, match=r"dtype torch\.float16"):
        LSTMRule(2, 1).half().save(path)
    with torch.no_grad():
        rule.readout.bias.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"readout\.bias holds NaN or Inf"):
        rule.save(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, r"Invalid path: ''; the name of a rule file ends in \.safetensors"),
        ("x.pt", ValueError, "Invalid path: 'x.pt'; the name"),
        (Path("noext"), ValueError, "Invalid path: 'noext'; the name"),
        ("hf://a/b@c/x.safetensors", ValueError, r"is an address; .* push_to_hub"),
        (None, TypeError, r"Invalid path: None; pass the path of a \.safetensors file"),
        (5, TypeError, "Invalid path: 5; pass"),
        ("nowhere/x.safetensors", FileNotFoundError, "'nowhere/x.*no folder .*nowhere'; make it"),
        ("folder.safetensors", IsADirectoryError, "'folder.* no regular file; choose another"),
        ("pipe.safetensors", OSError, "'pipe.* no regular file; choose another name"),
        ("link.safetensors", OSError, "'link.* no regular file; choose another name"),
    ],
    ids=repr,
)
def test_a_rule_is_saved_only_where_a_rule_file_can_be(
    path: Any, error: type[Exception], message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.safetensors")
    Path("folder.safetensors").mkdir()
    Path("link.safetensors").symlink_to("pipe.safetensors")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message):
        LSTMRule(2, 1).save(path)
    assert sorted(tmp_path.iterdir()) == before
    assert Path("pipe.safetensors").is_fifo()


@pytest.mark.parametrize("there", [True, False], ids=["file", "nothing"])
def test_saving_over_a_link_writes_what_it_names(there: bool, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    target, link = tmp_path / "models" / "v1.safetensors", tmp_path / "current.safetensors"
    if there:
        LSTMRule(2, 1).save(target, {"version": "first"})
    link.symlink_to("models/v1.safetensors")
    LSTMRule(2, 1).save(link, {"version": "second"})
    assert link.is_symlink()
    assert fastl2o.load(target).card == {"version": "second"}
    assert [file.name for file in target.parent.iterdir()] == [target.name]


def test_saving_again_keeps_the_permissions(tmp_path: Path) -> None:
    path = tmp_path / "rule.safetensors"
    LSTMRule(2, 1).save(path)
    fresh = path.stat().st_mode
    for mode in (0o640, 0o600):
        path.chmod(mode)
        LSTMRule(2, 1).save(path)
        assert path.stat().st_mode & 0o777 == mode
    path.unlink()
    LSTMRule(2, 1).save(path)
    assert path.stat().st_mode == fresh


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_previous_file(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rule.safetensors"
    LSTMRule(2, 1).save(path, {"version": "first"})
    before = path.read_bytes()

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "write":
        monkeypatch.setattr(_files, "open", _FullDisk(fail), raising=False)
    else:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match=r"No space left.*; free some space") as error:
        LSTMRule(2, 1).save(path, {"version": "second"})
    assert f"cannot write {str(path)!r}: " in str(error.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert fastl2o.load(path).card == {"version": "first"}


class _FullDisk:
    """An `open` whose files take half of what is written, then fail."""

    def __init__(self, fail: Callable[..., None]) -> None:
        self.fail = fail

    def __call__(self, path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115  (closed by the wrapper)
        write = file.write

        def half(data: bytes) -> None:
            write(data[: len(data) // 2])
            self.fail()

        return _Wrapped(file, half)


class _Wrapped:
    def __init__(self, file: Any, write: Callable[[bytes], None]) -> None:
        self.file, self.write = file, write

    def __enter__(self) -> _Wrapped:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


def test_every_shipped_rule_loads_and_has_a_card() -> None:
    for name in zoo.names():
        rule = fastl2o.load(name)
        assert rule.card == zoo.card(name)
        assert rule.card, f"{name} has an empty card"
        assert zoo.path(name).with_suffix(".md").is_file()


def test_zoo_names_follow_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="there are: none"):
        zoo.path("lstm-test")
    LSTMRule(2, 1).save(tmp_path / "lstm-test.safetensors", {"horizon": 20})
    assert zoo.names() == ["lstm-test"]
    assert zoo.card("lstm-test") == {"horizon": 20}
    assert fastl2o.load("lstm-test").hidden_size == 2

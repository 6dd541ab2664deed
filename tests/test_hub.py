"""Rules on the Hugging Face Hub, against a server in this process that answers as the Hub does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastl2o
from fastl2o import LearnedOptimizer, LSTMRule, RNNPropRule, _files

hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub (huggingface_hub)")
constants = pytest.importorskip("huggingface_hub.constants")

COMMIT, OTHER = "a" * 40, "b" * 40
REPOSITORY = "someone/my-rule"
CARD = {"description": "A rule of the tests.", "task": "a: b\n# c ---", "results": {"loss": 0.5}}


class Hub:
    """Files by revision and name; the requests that were made."""

    def __init__(self) -> None:
        self.commits = {"main": COMMIT, "v1": COMMIT, COMMIT: COMMIT, OTHER: OTHER}
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        repository, _, rest = path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if repository == "someone/gated":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if repository != REPOSITORY:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.commits:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = self.commits[revision]
        if (commit, name) not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = self.files[commit, name]
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{hash(data):x}"'}, data


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The Hub and an empty cache."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.requests.append(f"{self.command} {self.path}")
            status, headers, data = state.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield state
        http.shutdown()


@pytest.fixture
def rule(server: Hub, tmp_path: Path) -> LSTMRule:
    """What the repository's rule.safetensors holds in the first commit."""
    rule = LSTMRule(hidden_size=4)
    rule.save(tmp_path / "rule.safetensors", CARD)
    server.files[COMMIT, "rule.safetensors"] = (tmp_path / "rule.safetensors").read_bytes()
    return rule


def same(found: fastl2o.Rule, expected: fastl2o.Rule) -> bool:
    return found.config() == expected.config() and torch.equal(
        found.flat_parameters(), expected.flat_parameters()
    )


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_a_rule_is_loaded_and_says_of_which_commit(rule: LSTMRule, revision: str) -> None:
    found = fastl2o.load(f"hf://{REPOSITORY}@{revision}")
    assert same(found, rule)
    assert found.card == {**CARD, "source": f"hf://{REPOSITORY}@{COMMIT}"}
    assert same(fastl2o.load(found.card["source"], family="lstm"), rule)


def test_a_commit_in_the_cache_is_not_asked_for_again(server: Hub, rule: LSTMRule) -> None:
    fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}")
    asked = len(server.requests)
    assert asked
    assert same(fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}"), rule)
    assert len(server.requests) == asked


def test_a_branch_is_looked_up_each_time(server: Hub, rule: LSTMRule, tmp_path: Path) -> None:
    fastl2o.load(f"hf://{REPOSITORY}@main")
    newer = RNNPropRule(hidden_size=3)
    newer.save(tmp_path / "newer.safetensors")
    server.files[OTHER, "rule.safetensors"] = (tmp_path / "newer.safetensors").read_bytes()
    server.commits["main"] = OTHER
    found = fastl2o.load(f"hf://{REPOSITORY}@main")
    assert same(found, newer)
    assert found.card["source"].endswith(OTHER)
    assert same(fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}"), rule)


def test_files_of_other_names_are_loaded(server: Hub, rule: LSTMRule) -> None:
    server.files[COMMIT, "late.safetensors"] = server.files[COMMIT, "rule.safetensors"]
    found = fastl2o.load(f"hf://{REPOSITORY}@v1/late.safetensors")
    assert same(found, rule)
    assert found.card["source"] == f"hf://{REPOSITORY}@{COMMIT}/late.safetensors"


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_offline_the_cache_is_used_and_nothing_is_asked(
    server: Hub, rule: LSTMRule, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    options = {"local_files_only": True} if how == "argument" else {}
    if how == "variable":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reason = "local_files_only=True" if options else "HF_HUB_OFFLINE is set"
    with pytest.raises(FileNotFoundError, match=f"not in the local cache, and {reason}"):
        fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}", **options)
    assert server.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "variable")
    server.requests.clear()
    assert same(fastl2o.load(f"hf://{REPOSITORY}@{COMMIT}", **options), rule)
    assert server.requests == []


@pytest.mark.parametrize(
    ("address", "error", "message"),
    [
        ("hf://someone/none@v1", FileNotFoundError, "no repository someone/none, or it is private"),
        ("hf://someone/gated@v1", OSError, "access is granted on request"),
        (f"hf://{REPOSITORY}@v2", FileNotFoundError, "has no revision 'v2'"),
        (f"hf://{REPOSITORY}@v1/b.safetensors", FileNotFoundError, "has no b.safetensors"),
        (f"hf://{REPOSITORY}", ValueError, "has no revision, so what it loads could change"),
        (f"hf://{REPOSITORY}@v1/model.bin", ValueError, "Invalid address"),
        (f"hf://{REPOSITORY}@v1/../x.safetensors", ValueError, "Invalid address"),
        ("hf://my-rule@v1", ValueError, "Invalid address: .* accepted is hf://owner/name@revision"),
        ("hf://../x@v1", ValueError, "Invalid address"),
    ],
)
def test_what_cannot_be_loaded_is_said(
    rule: LSTMRule, address: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastl2o.load(address)


def test_an_unreachable_hub_is_an_os_error(
    server: Hub, rule: LSTMRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere)
    with pytest.raises(OSError, match=r"cannot be downloaded: .*local_files_only=True"):
        fastl2o.load(f"hf://{REPOSITORY}@v1")


def test_a_file_that_is_no_rule_is_refused_unread(server: Hub, rule: LSTMRule) -> None:
    import pickle

    server.files[COMMIT, "rule.safetensors"] = pickle.dumps(rule.state_dict())
    with pytest.raises(ValueError, match=f"@{COMMIT}: not a safetensors file"):
        fastl2o.load(f"hf://{REPOSITORY}@v1")


def test_a_huge_file_is_not_downloaded(
    server: Hub, rule: LSTMRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_files, "_LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="larger than any rule"):
        fastl2o.load(f"hf://{REPOSITORY}@v1")
    assert not [request for request in server.requests if request.startswith("GET")]


def test_optimizers_download_nothing(server: Hub, rule: LSTMRule) -> None:
    address = f"hf://{REPOSITORY}@v1"
    params = [torch.nn.Parameter(torch.ones(2))]
    for build in (LearnedOptimizer, lambda params, rule: fastl2o.LSTM(params, rule=rule)):
        with pytest.raises(ValueError, match=r"give it what fastl2o.load\('hf://"):
            build(params, address)
    assert server.requests == []
    assert LearnedOptimizer(params, fastl2o.load(address)).param_groups[0]["rule"].hidden_size == 4


def test_without_the_extra_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'fastl2o\[hub\]'"):
        fastl2o.load(f"hf://{REPOSITORY}@v1")
    with pytest.raises(ImportError, match=r"pip install 'fastl2o\[hub\]'"):
        LSTMRule(hidden_size=2).push_to_hub(REPOSITORY)


@pytest.fixture
def pushed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the calls of the Hub's API were given; commits end up on the server."""
    calls: list[dict[str, Any]] = []

    class Api:
        def __init__(self, **options: Any) -> None:
            calls.append({"api": options})

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append({"create_repo": repo_id, **options})

        def create_commit(self, repo_id: str, operations: Any, **options: Any) -> Any:
            assert repo_id == REPOSITORY
            for operation in operations:
                assert isinstance(operation, hub.CommitOperationAdd)
                data = operation.path_or_fileobj
                server.files[OTHER, operation.path_in_repo] = data
            calls.append({"create_commit": repo_id, **options})
            return SimpleNamespace(oid=OTHER)

    monkeypatch.setattr(hub, "HfApi", Api)
    return calls


def test_a_pushed_rule_is_loaded_from_the_address_that_it_got(
    server: Hub, pushed: list[dict[str, Any]]
) -> None:
    rule = RNNPropRule(hidden_size=3)
    rule.card = {**CARD, "source": "hf://who/knows@where"}
    address = rule.push_to_hub(REPOSITORY, private=True, revision="dev", token="secret")
    assert address == f"hf://{REPOSITORY}@{OTHER}"
    api, created, committed = pushed
    assert api["api"]["token"] == "secret"
    assert created == {"create_repo": REPOSITORY, "private": True, "exist_ok": True}
    assert committed["revision"] == "dev"
    assert committed["commit_message"] == "Add a rnnprop rule"
    found = fastl2o.load(address)
    assert same(found, rule)
    assert found.card == {**CARD, "source": address}
    fastl2o.load(address).push_to_hub(REPOSITORY, card={"mine": 1}, commit_message="Again")
    assert pushed[-1]["commit_message"] == "Again"
    assert fastl2o.load(address, local_files_only=True).card == {**CARD, "source": address}


def test_the_model_card_has_valid_metadata_and_says_what_the_rule_is(
    server: Hub, pushed: list[dict[str, Any]]
) -> None:
    LSTMRule(hidden_size=4).push_to_hub(REPOSITORY, card=CARD, license="apache-2.0")
    text = server.files[OTHER, "README.md"].decode()
    card = hub.ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "fastl2o",
        "license": "apache-2.0",
        "tags": ["fastl2o", "learned-optimizer", "pytorch", "lstm"],
    }
    assert "LSTMRule(hidden_size=4" in card.text
    assert "- **What it is**: A rule of the tests.\n- **Meta-trained on**: a: b # c ---" in text
    assert f'fastl2o.load("hf://{REPOSITORY}@COMMIT")' in text
    assert '"loss": 0.5' in text


def test_what_cannot_be_pushed_sends_nothing(pushed: list[dict[str, Any]]) -> None:
    rule = LSTMRule(hidden_size=4)
    with pytest.raises(ValueError, match="Invalid repo_id: 'my-rule'"):
        rule.push_to_hub("my-rule")
    with pytest.raises(TypeError, match="Invalid repo_id: None; accepted is 'owner/name'"):
        rule.push_to_hub(None)
    with pytest.raises(TypeError, match="Invalid card: 5; pass a mapping"):
        rule.push_to_hub(REPOSITORY, card=5)
    with pytest.raises(ValueError, match="Invalid card"):
        rule.push_to_hub(REPOSITORY, card={"loss": float("nan")})
    with torch.no_grad():
        next(rule.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN or Inf"):
        rule.push_to_hub(REPOSITORY)
    assert pushed == []

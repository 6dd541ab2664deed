"""Rules on the Hugging Face Hub: `hf://owner/name@revision`, through huggingface_hub (extra `hub`).

A repository holds `rule.safetensors`, which is read as any rule file is, and a README.md made from
the rule's card. Nothing else of it is downloaded, and nothing is unpickled.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ._version import __version__

if TYPE_CHECKING:
    from .rules import Rule

PREFIX = "hf://"
FILE_NAME = "rule.safetensors"
_REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_ADDRESS = re.compile(
    rf"hf://(?P<repo_id>{_REPOSITORY})(@(?P<revision>[A-Za-z0-9][\w.-]*))?"
    r"(/(?P<file_name>[A-Za-z0-9][\w.-]*\.safetensors))?",
    flags=re.ASCII,
)


class Address(NamedTuple):
    """Where a rule lies on the Hub."""

    repo_id: str
    revision: str
    file_name: str

    def __str__(self) -> str:
        file = "" if self.file_name == FILE_NAME else f"/{self.file_name}"
        return f"{PREFIX}{self.repo_id}@{self.revision}{file}"


def is_address(name: object) -> bool:
    """Whether a name is of a rule on the Hub."""
    return isinstance(name, str) and name.startswith(PREFIX)


def parse_address(text: str) -> Address:
    """The parts of `hf://owner/name@revision[/file.safetensors]`.

    Raises:
        ValueError: it is none, or has no revision: what a bare name stands for can change from one
            day to the next.
    """
    match = _ADDRESS.fullmatch(text)
    if match is None:
        raise ValueError(
            f"Invalid address: {text!r}; accepted is hf://owner/name@revision, followed by "
            f"/file.safetensors if the file is not called {FILE_NAME}"
        )
    repo_id, revision, file_name = match.group("repo_id", "revision", "file_name")
    if revision is None:
        raise ValueError(
            f"Invalid address: {text!r} has no revision, so what it loads could change; write "
            f"{PREFIX}{repo_id}@REVISION with a commit (push_to_hub returns it, and the "
            "repository's page lists them), or with a tag or branch that you trust"
        )
    return Address(repo_id, revision, file_name or FILE_NAME)


def download(address: Address, *, largest: int, local_files_only: bool = False) -> tuple[Path, str]:
    """The file in huggingface_hub's cache, fetched if it is not there, and the address it came by.

    The second is pinned to the commit that the revision stands for at the moment.

    Raises:
        ImportError: huggingface_hub is not installed.
        FileNotFoundError: there is no such repository, revision or file, or it is not in the cache
            and may not be downloaded (`local_files_only`, or HF_HUB_OFFLINE is set).
        ValueError: the file has more than `largest` bytes; it is not downloaded.
        OSError: the Hub cannot be reached or refuses.
    """
    hub = _huggingface_hub(f"loading {str(address)!r}")
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo_id, revision, file_name = address
    offline = local_files_only or constants.HF_HUB_OFFLINE
    try:
        # A commit never changes, so a file that is in the cache under one needs no question.
        cached = hub.try_to_load_from_cache(repo_id, file_name, revision=revision)
        if not offline and not (isinstance(cached, str) and revision in Path(cached).parts):
            url = hub.hf_hub_url(repo_id, file_name, revision=revision)
            found = hub.get_hf_file_metadata(url)
            if found.size is None or found.size > largest:
                raise ValueError(
                    f"{address}: larger than any rule ({found.size} bytes, at most {largest} are "
                    "read); give a file that was written by rule.save or rule.push_to_hub"
                )
            revision = found.commit_hash or revision
        path = Path(
            hub.hf_hub_download(
                repo_id,
                file_name,
                revision=revision,
                local_files_only=offline,
                library_name="fastl2o",
                library_version=__version__,
            )
        )
    except LocalEntryNotFoundError as error:
        if offline:
            why = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE is set"
            raise FileNotFoundError(
                f"{address} is not in the local cache, and {why}; load it once with the network"
            ) from error
        raise OSError(f"{address} cannot be downloaded: {error}") from error
    except GatedRepoError as error:
        raise OSError(
            f"{address}: access is granted on request; ask for it on the repository's page"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: there is no repository {repo_id}, or it is private; check the name, or "
            "log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: {repo_id} has no revision {revision!r}; give a commit, tag or branch of it"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"{address}: the repository has no {file_name}; append /NAME.safetensors for a file of "
            "another name"
        ) from error
    except ValueError:
        raise
    except Exception as error:  # of the HTTP library, which differs between versions of the Hub's
        raise OSError(
            f"{address} cannot be downloaded: {type(error).__name__}: {error}; with "
            "local_files_only=True what is in the local cache is used"
        ) from error
    return path, str(Address(repo_id, path.parent.name, file_name))


def push_rule(
    rule: Rule,
    repo_id: str,
    *,
    card: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Write a rule and its model card to a repository on the Hub; see `Rule.push_to_hub`."""
    from ._files import save_rule  # here, because _files imports this module

    if not isinstance(repo_id, str):
        raise TypeError(f"Invalid repo_id: {repo_id!r}; accepted is 'owner/name'")
    if re.fullmatch(_REPOSITORY, repo_id, flags=re.ASCII) is None:
        raise ValueError(f"Invalid repo_id: {repo_id!r}; accepted is 'owner/name'")
    hub = _huggingface_hub(f"pushing to {repo_id!r}")
    if card is not None and not isinstance(card, Mapping):
        raise TypeError(f"Invalid card: {card!r}; pass a mapping, or None for the rule's own card")
    told = dict(rule.card if card is None else card)
    told.pop("source", None)  # where a rule was loaded from is not where it goes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE_NAME
        save_rule(rule, path, told)
        data = path.read_bytes()
    text = model_card(rule, told, repo_id, license)
    api = hub.HfApi(token=token, library_name="fastl2o", library_version=__version__)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.create_commit(
        repo_id,
        [
            hub.CommitOperationAdd(FILE_NAME, data),
            hub.CommitOperationAdd("README.md", text.encode()),
        ],
        commit_message=commit_message or f"Add a {rule.family} rule",
        revision=revision,
    )
    return str(Address(repo_id, commit.oid, FILE_NAME))


def model_card(rule: Rule, card: Mapping[str, Any], repo_id: str, license: str | None) -> str:
    """A README.md with the metadata that the Hub reads, made from a rule's card."""
    hub = _huggingface_hub("a model card")
    metadata = hub.ModelCardData(
        library_name="fastl2o",
        license=license,
        tags=["fastl2o", "learned-optimizer", "pytorch", rule.family],
    )
    # Indented, because a fence could be closed by what the card says.
    details = _indented(json.dumps(dict(card), indent=2, ensure_ascii=False, allow_nan=False))
    code = _indented(
        "import fastl2o\n\n"
        f'rule = fastl2o.load("{PREFIX}{repo_id}@COMMIT")  # a commit of this repository\n'
        "optimizer = fastl2o.LearnedOptimizer(model.parameters(), rule)"
    )
    known = "".join(
        f"- **{title}**: {' '.join(str(card[key]).split())}\n"
        for key, title in (
            ("description", "What it is"),
            ("task", "Meta-trained on"),
            ("limits", "Limits"),
        )
        if card.get(key)
    )
    return (
        f"---\n{metadata.to_yaml()}\n---\n\n# {repo_id.partition('/')[2]}\n\n"
        "A learned optimizer for PyTorch: meta-parameters of\n\n"
        f"{_indented(repr(rule))}\n\n({rule.num_meta_parameters:,} numbers), for fastl2o.\n\n"
        f"{known}\n## Use\n\n{code}\n\n## Card\n\n{details}\n"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _huggingface_hub(what: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError(
            f"{what} needs huggingface_hub; install it with: pip install 'fastl2o[hub]'"
        ) from error
    return huggingface_hub

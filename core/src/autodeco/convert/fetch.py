"""Brings a checkpoint from the hub with the hub's own client: only what a run reads, and checked.

The client takes HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE from the environment. It keeps
whole files: what is interrupted goes on with the files that are not there yet.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from autodeco.disk_space import require_space
from autodeco.errors import AutodecoError, EnvironmentProblem, UsageError, WeightsError
from autodeco.files import publish, read_json, remove, write_problem
from autodeco.heads.places import alone_at
from autodeco.safetensors_header import INDEX, SINGLE, read_checkpoint, read_index

#: What a run reads beside the weights. No code: it would have to be run to be of use.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "*.tiktoken",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "autodeco/config.json",
    "autodeco/model.safetensors",
)
_OTHERS = (".bin", ".pt", ".pth", ".gguf", ".safetensors", ".h5", ".msgpack")
_BLOCK = 8 << 20
_THREADS = 4


@dataclass(frozen=True)
class Fetched:
    """What is there now.

    Attributes:
        path: The checkpoint.
        model: The hub's id.
        revision: The commit.
        files: How many files were compared with the hub's checksums.
        size: Their bytes.
        existed: Whether all of them were there before.
    """

    path: Path
    model: str
    revision: str
    files: int
    size: int
    existed: bool

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return {**vars(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Listed:
    """A file of the repository: its bytes and its checksum, of either kind."""

    size: int
    sha256: str | None
    git: str | None


def fetch(
    model: str, *, revision: str | None = None, output: Path | None = None, console: Console
) -> Fetched:
    """Fetches a checkpoint, or what is missing of it, and checks it.

    Args:
        model: The hub's id, ``owner/name``.
        revision: Branch, tag or commit; None: the default branch.
        output: The directory to appear, when all is there; None: the hub's cache.
        console: Where progress goes.

    Raises:
        UsageError: `model` is a path or no id, or `output` is there and is another checkpoint.
        WeightsError: There is no such model or revision, it has no safetensors, its index is not
            complete, or a file is damaged: it was removed, the same command fetches it again.
        EnvironmentProblem: The hub cannot be reached or refuses, or the disk is full.
    """
    hub = _hub()
    if Path(model).exists():
        raise UsageError(
            "this is a path on this machine, and needs no fetching",
            where=model,
            fix="give it as --model",
        )
    with _explained(model, revision):
        if hub.constants.HF_HUB_OFFLINE:
            return _from_cache(hub, model, revision, output)
        info = hub.HfApi().model_info(model, revision=revision, files_metadata=True)
        listed = {
            one.rfilename: _listed(one)
            for one in info.siblings or ()
            if ".." not in one.rfilename.split("/") and not one.rfilename.startswith("/")
        }
        if output is None:
            return _fetch(hub, model, info.sha, listed, None, console, revision)
        with alone_at(output):
            return _fetch_to(hub, model, info.sha, listed, output, console)


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError as error:
        raise EnvironmentProblem(
            "the hub's client is not installed",
            fix='pip install "autodeco[hub]"; a checkpoint that is on this machine needs no hub',
        ) from error
    return huggingface_hub


def _listed(one: Any) -> _Listed:
    large = one.lfs
    digest = None if large is None else getattr(large, "sha256", None)
    return _Listed(int(one.size or 0), digest, None if large is not None else one.blob_id)


def _fetch_to(
    hub: Any, model: str, commit: str, listed: Mapping[str, _Listed], output: Path, console: Console
) -> Fetched:
    """Fetches beside the output, under a name that a killed fetch finds again."""
    if output.exists():
        names = _wanted(output, model, listed)
        wrong = _damaged(output, {name: listed[name] for name in names})
        if wrong:
            raise UsageError(
                f"the output is there, and {wrong[0]} in it is not that of {model} at {commit}",
                where=str(output),
                fix="choose another output, or remove it",
            )
        return _checked(output, model, commit, listed, names, existed=True)
    place = output.with_name(f".{output.name}.fetching")
    client = place / ".cache"
    for left in client.glob("huggingface/download/**/*.incomplete"):  # killed in the middle
        left.unlink(missing_ok=True)
    done = _fetch(hub, model, commit, listed, place, console)
    remove(client)
    publish(place, output)
    return Fetched(output, model, commit, done.files, done.size, False)


def _fetch(
    hub: Any,
    model: str,
    commit: str,
    listed: Mapping[str, _Listed],
    place: Path | None,
    console: Console,
    revision: str | None = None,
) -> Fetched:
    """Fetches what is missing into a directory, or into the cache; removes what is damaged."""

    def get(names: list[str]) -> Path:
        patterns = [glob.escape(name) for name in names]
        # the cache remembers under which name a commit was asked for, to find it without the hub
        asked = commit if place is not None else revision
        found = Path(
            hub.snapshot_download(model, revision=asked, local_dir=place, allow_patterns=patterns)
        )
        if place is None and found.name != commit:
            raise WeightsError(
                f"the model changed on the hub: {commit} became {found.name}",
                where=model,
                fix="run the same command again",
            )
        return found

    if "config.json" not in listed:
        raise _not_there(model, listed, "config.json")
    first = ["config.json", *([INDEX] if INDEX in listed else [])]
    require_space(_target(hub, place), sum(listed[n].size for n in first), "the fetched checkpoint")
    path = get(first)
    names = _wanted(path, model, listed)
    missing = [name for name in names if not _is_there(path / name, listed[name].size)]
    size = sum(listed[name].size for name in missing)
    if missing:
        require_space(_target(hub, place), size, "the fetched checkpoint")
        console.print(
            f"  {escape(model)} at {commit[:12]}: {len(missing)} of {len(names)} files are missing,"
            f" {size / 2**30:,.2f} GiB",
            highlight=False,
        )
        path = get(names)
    console.print("  comparing with the hub's checksums", highlight=False)
    wrong = _damaged(path, {name: listed[name] for name in names})
    for name in wrong:
        (path / name).resolve().unlink(missing_ok=True)
        (path / name).unlink(missing_ok=True)
    if wrong:
        raise WeightsError(
            f"{', '.join(wrong[:3])} did not arrive as the hub has it, and was removed",
            where=str(path),
            fix="run the same command again; if it happens again, check the disk",
        )
    return _checked(path, model, commit, listed, names, existed=not missing)


def _target(hub: Any, place: Path | None) -> Path:
    return place or Path(hub.constants.HF_HUB_CACHE)


def _is_there(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _wanted(path: Path, model: str, listed: Mapping[str, _Listed]) -> list[str]:
    """The files that make up the checkpoint: those of its index, and what goes with them.

    Raises:
        WeightsError: It has no safetensors, or lacks what its index names.
    """
    if INDEX in listed:
        weights = sorted(set(read_index(path)["weight_map"].values()))
        lost = [name for name in weights if name not in listed]
        if lost:
            raise _not_there(model, listed, f"{lost[0]}, which its index names")
        weights.append(INDEX)
    elif SINGLE in listed:
        weights = [SINGLE]
    else:
        raise _not_there(model, listed, f"neither {INDEX} nor {SINGLE}")
    small = [n for n in listed if any(fnmatch.fnmatchcase(n, p) for p in _SMALL)]
    return [*small, *(name for name in weights if name not in small)]


def _not_there(model: str, listed: Mapping[str, _Listed], what: str) -> WeightsError:
    others = [name for name in listed if name.endswith(_OTHERS)]
    has = f"; it has {', '.join(others[:5])}" if others else ""
    lacks = what if what.startswith("neither") else f"no {what}"
    return WeightsError(
        f"the repository has {lacks}{has}",
        where=model,
        fix="choose a repository with a checkpoint in safetensors format, or another revision",
    )


def _damaged(path: Path, files: Mapping[str, _Listed]) -> list[str]:
    """The files that are missing, or are not what the hub has."""

    def wrong(item: tuple[str, _Listed]) -> bool:
        name, listed = item
        file = path / name
        if not _is_there(file, listed.size):
            return True
        if listed.sha256 is not None:
            return _digest(file, hashlib.sha256()) != listed.sha256
        if listed.git is not None and len(listed.git) == 40:
            start = hashlib.sha1(f"blob {listed.size}\0".encode(), usedforsecurity=False)
            return _digest(file, start) != listed.git
        return False

    with ThreadPoolExecutor(_THREADS) as pool:
        verdicts = pool.map(wrong, files.items())
        return [name for name, bad in zip(files, verdicts, strict=True) if bad]


def _digest(file: Path, digest: Any) -> str:
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return str(digest.hexdigest())


def _checked(
    path: Path,
    model: str,
    commit: str,
    listed: Mapping[str, _Listed],
    names: list[str],
    *,
    existed: bool,
) -> Fetched:
    """Reads the headers: the checkpoint is complete, and its index names every tensor."""
    read_json(path / "config.json")
    read_checkpoint(path)
    return Fetched(
        path, model, commit, len(names), sum(listed[name].size for name in names), existed
    )


def _from_cache(hub: Any, model: str, revision: str | None, output: Path | None) -> Fetched:
    """Finds the snapshot that an earlier fetch left in the hub's cache."""
    if output is not None:
        raise EnvironmentProblem(
            "HF_HUB_OFFLINE is set: nothing can be fetched to a directory",
            where=str(output),
            fix="unset it, or leave --output out: then a snapshot in the hub's cache is found",
        )
    patterns = [*_SMALL, INDEX, "*.safetensors"]
    path = Path(
        hub.snapshot_download(
            model, revision=revision, local_files_only=True, allow_patterns=list(_SMALL)
        )
    )
    read_json(path / "config.json")
    infos = read_checkpoint(path)
    files = [p for p in path.rglob("*") if any(fnmatch.fnmatchcase(p.name, q) for q in patterns)]
    size = sum({i.file: i.file.stat().st_size for i in infos.values()}.values())
    return Fetched(path, model, path.name, len(files), size, True)


@contextmanager
def _explained(model: str, revision: str | None) -> Iterator[None]:
    """Says in our words what the client raises."""
    from huggingface_hub import errors

    try:
        yield
    except AutodecoError:
        raise
    except errors.GatedRepoError as error:
        raise EnvironmentProblem(
            "the hub gives this model only to whom its authors admitted",
            where=model,
            fix="accept its terms on its page, and set HF_TOKEN to a token of that account",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"the model has no revision {revision!r}",
            where=model,
            fix="give --revision a branch, a tag or a commit of the model",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            "the hub has no such model, or it is private",
            where=model,
            fix="check the spelling (owner/name); for a private model set HF_TOKEN",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(
            f"this is no model id of the hub, and no path that is there: {error}",
            where=model,
            fix="give owner/name",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise _unreachable(model, error) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise EnvironmentProblem(
                f"the hub refuses (status {status})",
                where=model,
                fix="set HF_TOKEN to a valid token that may read this model",
            ) from error
        raise _unreachable(model, error) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
            raise write_problem(error, Path(error.filename or model)) from error
        raise _unreachable(model, error) from error
    except Exception as error:
        # the client's http library has changed its name, and its errors with it
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
            raise _unreachable(model, error) from error
        raise


def _unreachable(model: str, error: Exception) -> EnvironmentProblem:
    import huggingface_hub.constants as constants

    if constants.HF_HUB_OFFLINE:
        return EnvironmentProblem(
            "HF_HUB_OFFLINE is set, and the hub's cache does not have all of this model",
            where=model,
            fix="unset it to fetch the model, or fetch it on a machine with a network and copy it",
        )
    first = (str(error).splitlines() or [""])[0]
    return EnvironmentProblem(
        f"the hub cannot be reached, or the transfer broke off: {type(error).__name__}: {first}",
        where=f"{model} at {constants.ENDPOINT}",
        fix="run the same command again: the files that are there are kept",
    )

"""Exports on the Hugging Face Hub: what a repository holds, what one precision needs, and fetching just that.

    hub_source("owner/name") -> list_files -> plan(listing, precision) -> fetch -> a folder for open_export

Everything goes through huggingface_hub: its cache (HF_HOME, HF_HUB_CACHE), token, mirrors (HF_ENDPOINT) and
HF_HUB_OFFLINE. All files come from the one commit that the revision stood for when the listing was made.
A file is asked for only if it is one of SIDE_FILES, a graph that surgery.source.export knows, or an external data
location that surgery.graph.external_data accepted: no other name of a stranger's becomes a path.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote, urlsplit

from surgery.choices import Modality
from surgery.errors import ExportError, SurgeryError, nearest
from surgery.files.atomic import existing, require_space
from surgery.files.safe_reading import sha256
from surgery.source.export import (
    DECODER,
    EMBED,
    ENCODERS,
    GENAI_CONFIG,
    LICENSES,
    MEDIA_FILES,
    declared_precisions,
    described_graph,
    expected_pair,
    named_graphs,
    other_precisions,
)

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
    *LICENSES,
)
"""What a repack reads beside the graphs; for images and sound it reads MEDIA_FILES as well."""

PARALLEL = 4
"""Files fetched at a time."""

Count = Callable[[int], None]
"""Is told bytes."""

_AGAIN = "run it again later: files that are complete are kept"


class HubUnreachable(ExportError):
    """The Hub gave no answer, or none for now. What the cache holds can still be used."""


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository; `revision` is a branch, tag or commit. The environment gives `endpoint` and `cache`."""

    repo_id: str
    revision: str | None = None
    endpoint: str | None = None
    cache: Path | None = None

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository. `size` is None where a mirror hides it; `blob` is its hash in the cache."""

    name: str
    size: int | None
    blob: str | None = None

    @property
    def sha256(self) -> str | None:
        """Of the content, where that is what the Hub names the file by; of small files it is another hash."""
        return self.blob if self.blob is not None and re.fullmatch("[0-9a-f]{64}", self.blob) else None


@dataclass(frozen=True)
class Listing:
    """The files of one commit, and `root`, the folder of the cache in which they are or will be.

    `unreachable` is the reason where the Hub did not answer: `files` are then those that the cache holds.
    """

    source: HubSource
    commit: str
    root: Path
    files: Mapping[str, HubFile]
    unreachable: HubUnreachable | None = None

    @property
    def holds_folder(self) -> bool:
        """Whether it is a folder for ONNX Runtime GenAI, as a repack writes it."""
        return GENAI_CONFIG in self.files and not named_graphs(_graphs(self.files)[1], {})

    @cached_property
    def graphs(self) -> dict[str, dict[str, str]]:
        """Precision -> role -> name of its graph, in the order of PRECISIONS. Raises ExportError without a pair."""
        folder, names = _graphs(self.files)
        found = named_graphs(names, self._declared)
        if not found:
            if GENAI_CONFIG in self.files:
                raise self.repacked()
            raise self.lacks(expected_pair(self._declared))
        return {p: {role: str(folder / name) for role, name in held.items()} for p, held in found.items()}

    @cached_property
    def _declared(self) -> dict[str, str]:
        from surgery.architecture import read_config

        return declared_precisions(read_config(get(self, self.files["config.json"])))

    def wanted(self, precision: str, modalities: Sequence[Modality]) -> list[str]:
        """The names of a precision's pair and encoders. Raises ExportError naming what is there instead."""
        known = list(self.graphs)
        if precision not in known:
            raise self.lacks(f"precision {precision!r}{nearest(precision, known)}; it holds {', '.join(known)}")
        found = self.graphs[precision]
        for role in (ENCODERS[modality] for modality in modalities):
            if role not in found:
                held = [p for p, graphs in self.graphs.items() if role in graphs]
                wanted = described_graph(role, precision, other_precisions(precision, self._declared)).rstrip(",")
                raise self.lacks(f"{wanted}; it holds {', '.join(held) or 'none'}")
        return [found[role] for role in (EMBED, DECODER, *(ENCODERS[modality] for modality in modalities))]

    def modalities(self, precision: str) -> list[Modality]:
        """Those whose encoders a precision has."""
        found = self.graphs.get(precision, {})
        return [modality for modality, role in ENCODERS.items() if role in found]

    def repacked(self) -> ExportError:
        """The error for a folder of GenAI's where an export is expected."""
        name = self.source.repo_id.partition("/")[2]
        return ExportError(
            f"{self.source} is a folder for ONNX Runtime GenAI already, not an export",
            hint=f"hf download {self.source.repo_id} --local-dir {name}; gemma4-surgery generate {name} Hello runs it",
        )

    def lacks(self, what: str) -> ExportError:
        """The error for something that is not listed; with the reason where only the cache could be read."""
        if (reason := self.unreachable) is None:
            return ExportError(f"{self.source} has no {what}")
        return HubUnreachable(f"{reason}, and the cache of {self.source} has no {what}", hint=reason.hint)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file that a precision needs, and whether its bytes are in the cache already."""

    file: HubFile
    cached: bool


@dataclass(frozen=True)
class Download:
    """What one precision needs. config.json and the graphs are in the cache already: the plan reads them."""

    listing: Listing
    precision: str
    files: tuple[PlannedFile, ...]

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, as far as their sizes are listed."""
        return sum(planned.file.size or 0 for planned in self.files)

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be fetched."""
        return sum(planned.file.size or 0 for planned in self.files if not planned.cached)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the data files, as far as their sizes are listed."""
        data = (one.file for one in self.files if one.file.name not in (*SIDE_FILES, *MEDIA_FILES))
        return sum(file.size or 0 for file in data if not file.name.endswith(".onnx"))

    def sized(self, files: Mapping[str, int | None]) -> dict[str, int | None]:
        """`files` with the listed sizes of those whose own is None, because they are not here yet."""
        listed = {PurePosixPath(entry.file.name).name: entry.file.size for entry in self.files}
        return {name: listed.get(PurePosixPath(name).name) if size is None else size for name, size in files.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, keys in a fixed order; a size that a mirror hides is None."""
        return {
            "repository": self.listing.source.repo_id,
            "commit": self.listing.commit,
            "precision": self.precision,
            "files": [{"file": f.file.name, "size": f.file.size, "cached": f.cached} for f in self.files],
            "total_bytes": self.total_bytes,
            "missing_bytes": self.missing_bytes,
        }


def hub_source(source: str, revision: str | None = None) -> HubSource | None:
    """The repository that `source` names, as `owner/name`, `owner/name@revision` or the address of its page; None where
    it names a local path. A path that exists wins.

    Raises ExportError where a revision is given for a local path, or two of them, and for an address of something else.
    """
    if not os.path.lexists(source):
        name, at, named = _in_address(source).partition("@")
        if _is_repo_id(name) and bool(at) == bool(named):
            if named and revision not in (None, named):
                raise ExportError(f"{source} names a revision, and {revision} is asked for", hint="leave one out")
            return HubSource(name, revision or named or None)
    if revision is not None:
        raise ExportError(f"{source} is a local path, and a revision is of a repository on the Hub")
    return None


def _in_address(source: str) -> str:
    """`owner/name` or `owner/name@revision` out of the address of a repository's page, or of a file in it; any other
    text as it is. Raises ExportError for another address."""
    if "://" not in source:
        return source
    found = urlsplit(source)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    parts = [unquote(part) for part in found.path.split("/") if part]
    pages = ("tree", "blob", "resolve", "raw", "commit")
    if found.netloc in ("huggingface.co", "www.huggingface.co", "hf.co", endpoint.netloc):
        if len(parts) == 2 and _is_repo_id("/".join(parts)):
            return "/".join(parts)
        if len(parts) > 3 and parts[2] in pages:
            return f"{parts[0]}/{parts[1]}@{parts[3]}"
    raise ExportError(
        f"{source} is no address of a model on the Hub",
        hint="name the repository as owner/name or owner/name@revision, or download it and name the folder",
    )


def list_files(source: HubSource) -> Listing:
    """Resolve the revision to a commit and list its files: two small requests, one of them for config.json.

    Where the Hub gives no answer, lists what the cache holds of the revision.
    Raises ExportError: no such repository or revision, no access, nothing in the cache, not an export.
    """
    try:
        return _hub_listing(source)
    except HubUnreachable as reason:
        return _cached_listing(source, reason)


def plan_download(listing: Listing, precision: str, modalities: Sequence[Modality] = ()) -> Download:
    """The files that a precision needs, with the encoders of `modalities`. Fetches config.json and the graphs, which
    name their data files.

    Raises ExportError for a precision or a data file that is not there, ArchitectureError for another family,
    ModelError or WeightError for a graph that cannot be read or that names a file outside of its folder.
    """
    from surgery.architecture import architecture, read_config

    graphs = listing.wanted(precision, modalities)
    # Before gigabytes are fetched: exports of other families have graphs of the same names.
    architecture(read_config(get(listing, listing.files["config.json"])))
    wanted = (*SIDE_FILES, *MEDIA_FILES) if modalities else SIDE_FILES
    names = [name for name in wanted if name in listing.files]
    for graph in graphs:
        names += [graph, *_data_files(listing, graph)]
    files = (listing.files[name] for name in dict.fromkeys(names))
    return Download(listing, precision, tuple(PlannedFile(file, _is_cached(listing, file)) for file in files))


def plan_folder(listing: Listing) -> Download:
    """The files of a folder of GenAI's, which `listing.holds_folder`: the graphs, which are fetched, with their data
    files, and what lies beside them."""
    papers = (*SIDE_FILES, *MEDIA_FILES, "report.md")
    names = [name for name in listing.files if name in papers or re.fullmatch(r"[^/.]+\.(onnx|json|jinja)", name)]
    data = [at for name in names if name.endswith(".onnx") for at in _data_files(listing, name)]
    files = [listing.files[name] for name in dict.fromkeys((*names, *data))]
    return Download(listing, "", tuple(PlannedFile(file, _is_cached(listing, file)) for file in files))


def fetch(download: Download, started: Callable[[int], None] | None = None, progress: Count | None = None) -> Path:
    """Fetch what is missing. Returns the folder for surgery.source.export.open_export; it may hold other precisions.

    PARALLEL files at a time; `started` is told the bytes that are to come, `progress` those that came, from threads of
    its own. A large file goes on where an earlier run stopped. Raises ExportError at the first fault: files not begun
    are not fetched, and what is there stays.
    """
    require_space_for(download)
    if started is not None and not all(planned.cached for planned in download.files):
        started(_to_come(download))
    pool = ThreadPoolExecutor(PARALLEL)
    count = progress or (lambda _: None)
    try:
        for future in as_completed([pool.submit(get, download.listing, one.file, count) for one in download.files]):
            future.result()
    except BaseException as error:
        error.add_note("what was fetched stays in the cache of the Hub: the next run goes on there")
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return download.listing.root


def _is_repo_id(source: str) -> bool:
    if source.count("/") != 1 or source.startswith("~"):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _graphs(names: Iterable[str]) -> tuple[PurePosixPath, list[str]]:
    """The folder of the graphs, `onnx` or the top where there is none, and the names in it."""
    paths = [path for name in names if str(path := PurePosixPath(name)) == name]
    folder = PurePosixPath("onnx" if any(path.parts[:1] == ("onnx",) for path in paths) else ".")
    return folder, [path.name for path in paths if path.parent == folder]


def _hub_listing(source: HubSource) -> Listing:
    """Ask for the listing first: huggingface_hub retries every other request for 23 s if nothing answers."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    with _explained(source):
        info = HfApi(endpoint=source.endpoint).model_info(
            source.repo_id,
            revision=source.revision or "main",
            files_metadata=True,
            timeout=HF_HUB_ETAG_TIMEOUT,
        )
        files = {}
        for entry in info.siblings or []:
            blob = entry.lfs.sha256 if entry.lfs else entry.blob_id
            file = HubFile(entry.rfilename, entry.size, blob)
            if not (isinstance(file.name, str) and isinstance(file.blob, str | None)):
                raise TypeError(f"{file.name!r:.80} is listed as the name of a file")
            if file.size is not None and (type(file.size) is not int or not 0 <= file.size < 2**63):
                raise TypeError(f"{file.name!r:.80} is listed with a size of {file.size!r:.80}")
            files[file.name] = file
    if "config.json" not in files:
        raise ExportError(f"{source} has no config.json: it is not an export of a model")
    with _explained(source):
        # By the revision's name, not its commit: the cache then knows which commit an offline run means.
        config = hf_hub_download(
            source.repo_id,
            "config.json",
            revision=source.revision,
            endpoint=source.endpoint,
            cache_dir=source.cache,
            tqdm_class=_no_bar(),
        )
    root = Path(config).parent
    if root.name != info.sha:
        raise ExportError(f"{source} was changed while it was read", hint="run it again")
    return Listing(source, root.name, root, files)


def cached_folder(source: HubSource) -> Path | None:
    """The folder of the cache that holds what was fetched of a revision; None where nothing was. Nobody is asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        # With no pattern to match this fetches and checks nothing: it only finds the folder of a revision.
        found = snapshot_download(
            source.repo_id,
            revision=source.revision,
            cache_dir=source.cache,
            local_files_only=True,
            allow_patterns=[],
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def _cached_listing(source: HubSource, reason: HubUnreachable) -> Listing:
    root = cached_folder(source)
    if root is None:
        raise HubUnreachable(f"{reason}, and the cache holds nothing of {source}", hint=reason.hint) from reason
    paths = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}
    files = {name: HubFile(name, path.stat().st_size) for name, path in paths.items()}
    if "config.json" not in files:
        raise HubUnreachable(f"{reason}, and the cache holds no config.json of {source}", hint=reason.hint) from reason
    return Listing(source, root.name, root, files, unreachable=reason)


def _data_files(listing: Listing, graph: str) -> list[str]:
    """The data files of a graph, which is fetched for it. Raises ExportError where one is not listed."""
    from surgery.graph.model import Model

    names = []
    for location in Model.open(get(listing, listing.files[graph])).weight_files:
        name = str(PurePosixPath(graph).parent / location)
        if name not in listing.files:
            raise listing.lacks(f"{name}, where {PurePosixPath(graph).name} stores weights")
        names.append(name)
    return names


def get(listing: Listing, file: HubFile, progress: Count = lambda _: None) -> Path:
    """The path of a file in the snapshot folder; fetched where it is not there with its listed size."""
    from huggingface_hub import hf_hub_download

    source, path = listing.source, listing.root / file.name
    if _is_complete(path, file):
        return path
    with _explained(source):
        if not _is_cached(listing, file):
            if file.sha256 is not None and file.size:
                _get_large(listing, file, file.sha256, file.size, progress)
            else:
                progress(file.size or 0)
        hf_hub_download(
            source.repo_id,
            file.name,
            revision=listing.commit,
            endpoint=source.endpoint,
            cache_dir=source.cache,
            force_download=path.exists()
            and not _is_complete(path, file),  # of another size: huggingface_hub takes whatever is there
            tqdm_class=_no_bar(),
        )
    if not _is_complete(path, file):
        raise _other_than_listed(listing, file, path.stat().st_size)
    return path


def _other_than_listed(listing: Listing, file: HubFile, came: int) -> ExportError:
    lists = f"{file.size:,} bytes, but {came:,}" if file.size != came else "one content, but another"
    return ExportError(
        f"{listing.source} lists {file.name} with {lists} came",
        hint="run it again; if it stays so, tell the owner of the repository",
    )


def _get_large(listing: Listing, file: HubFile, digest: str, size: int, progress: Count) -> None:
    """Fetch a file among the blobs of the cache, from where an earlier run stopped: huggingface_hub begins again.

    Its digest is checked. Where another run is fetching it, or no file can be locked, nothing is done.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    source, partial = listing.source, _partial(listing, digest)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as writer:
        if not _locked(writer):
            return
        if (there := writer.tell()) > size:
            writer.truncate(there := 0)
        url = hf_hub_url(source.repo_id, file.name, revision=listing.commit, endpoint=source.endpoint)
        headers = build_hf_headers()
        found = get_hf_file_metadata(url, headers=headers, endpoint=source.endpoint)
        if urlsplit(found.location).netloc != urlsplit(url).netloc:
            headers.pop("authorization", None)
        counted: Any = _Counted(writer, progress)
        http_get(found.location, counted, resume_size=there, headers=headers, tqdm_class=_no_bar())
        writer.flush()
        came = os.fstat(writer.fileno()).st_size
        if came != size or sha256(partial) != digest:
            partial.unlink()
            raise _other_than_listed(listing, file, came)
        os.replace(partial, partial.with_name(digest))


class _Counted:
    """A file that tells how many bytes are written to it."""

    def __init__(self, file: BinaryIO, progress: Count) -> None:
        self._file, self._progress = file, progress

    def write(self, data: bytes) -> int:
        self._progress(len(data))
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _partial(listing: Listing, digest: str) -> Path:
    """Where a file lies until it is complete."""
    return listing.root.parent.parent / "blobs" / f"{digest}.gemma4-surgery"


def _there(listing: Listing, file: HubFile) -> int:
    """Bytes of a file that an earlier run fetched."""
    partial = _partial(listing, file.sha256) if file.sha256 is not None else None
    return min(partial.stat().st_size, file.size or 0) if partial is not None and partial.is_file() else 0


def _locked(file: BinaryIO) -> bool:
    """Lock a file until it is closed; False where another run has, or files cannot be locked."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


@functools.cache
def _no_bar() -> Any:
    """For huggingface_hub, which draws a bar for each file: what goes on is told in one place."""
    from huggingface_hub import utils

    base: Any = utils.tqdm  # type: ignore[attr-defined]

    def silent(bar: Any, *arguments: Any, **options: Any) -> None:
        base.__init__(bar, *arguments, **{**options, "disable": True})

    return type("NoBar", (base,), {"__init__": silent})


def _is_cached(listing: Listing, file: HubFile) -> bool:
    """Whether the bytes of a file are in the cache: for this commit, or by their hash for another one."""
    places = [listing.root / file.name]
    if file.blob is not None:
        places.append(listing.root.parent.parent / "blobs" / file.blob)
    return any(_is_complete(place, file) for place in places)


def _is_complete(path: Path, file: HubFile) -> bool:
    return path.is_file() and file.size in (None, path.stat().st_size)


def _to_come(download: Download) -> int:
    missing = (planned.file for planned in download.files if not planned.cached)
    return sum((file.size or 0) - _there(download.listing, file) for file in missing)


def require_space_for(download: Download, target: Path | None = None, *, linked: bool = False) -> None:
    """Raise SurgeryError where the disk has no room for what is to be fetched; and, if there is a `target`, for its copy
    of the weights, which are no bytes more where they are `linked` on one disk."""
    root, needed = download.listing.root, _to_come(download)
    weights = 0 if target is None else download.weight_bytes
    told = f"{download.listing.source} needs {needed:,} more bytes"
    if target is not None and existing(target).stat().st_dev != existing(root).stat().st_dev:
        require_space(target.absolute().parent, weights)
    elif weights and not linked:
        needed += weights
        told += f", its copy in {target} {weights:,}"
    free = shutil.disk_usage(existing(root)).free
    if needed > free:
        raise ExportError(
            f"{told}, and the disk of {root} has {free:,}",
            hint="free some space, or set HF_HOME to a folder on another disk"
            + ("; --weights link needs no copy" if weights and not linked else ""),
        )


@contextlib.contextmanager
def _explained(source: HubSource) -> Iterator[None]:
    """Turn what huggingface_hub and the libraries under it raise into one sentence."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:  # of any kind, where the Hub's JSON is not what they take for granted
        raise explain(error, source) from error


def explain(error: BaseException, source: HubSource) -> ExportError:
    """What huggingface_hub and the libraries under it raise, as one sentence."""
    from huggingface_hub import constants, errors

    endpoint = (source.endpoint or constants.ENDPOINT).rstrip("/")
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return ExportError(
            f"{source.repo_id} is gated, and {endpoint} does not give it to this login",
            hint=f"accept its licence at {endpoint}/{source.repo_id}, then {login}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ExportError(f"{source.repo_id} has no branch, tag or commit {source.revision!r}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return ExportError(
            f"there is no folder {source.repo_id}, and {endpoint} has no repository of this name for you",
            hint=f"check the spelling; for a private repository {login}",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, source, endpoint, login)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachable("HF_HUB_OFFLINE is set", hint="run once without HF_HUB_OFFLINE to fill the cache")
    if isinstance(error, errors.LocalEntryNotFoundError | ValueError) and error.__cause__ is not None:
        return explain(error.__cause__, source)  # both wrap the error of the request
    if isinstance(error, errors.HTTPError):  # type: ignore[attr-defined]
        return HubUnreachable(
            f"the connection to {endpoint} failed ({_first_sentence(error)})",
            hint="check the network, proxies and HF_ENDPOINT",
        )
    if isinstance(error, OSError):
        return _explain_os_error(error, source)
    if isinstance(error, RuntimeError):
        return ExportError(  # hf-xet's, where Python has no class for it
            f"{source} cannot be fetched: {_first_sentence(error)}",
            hint=f"{_AGAIN}; HF_HUB_DISABLE_XET=1 may help",
        )
    return ExportError(
        f"{endpoint} does not answer as the Hub does ({_first_sentence(error)})",
        hint="check HF_ENDPOINT, proxies and login pages",
    )


def _explain_status(error: HfHubHTTPError, source: HubSource, endpoint: str, login: str) -> ExportError:
    status = error.response.status_code
    if status == 401:
        return ExportError(f"{endpoint} does not accept the token that was sent for {source.repo_id}", hint=login)
    if status == 403:
        return ExportError(f"the token that was sent gives no access to {source.repo_id}", hint=login)
    if status == 429:
        wait = error.response.headers.get("Retry-After")
        after = f" for {wait} seconds" if wait else ""
        return HubUnreachable(
            f"{endpoint} takes no more requests{after} (HTTP 429)", hint=f"a login raises the limit: {login}"
        )
    if status >= 500:
        return HubUnreachable(f"{endpoint} is in trouble (HTTP {status})", hint=_AGAIN)
    reason = f"HTTP {status} {error.response.reason_phrase}".rstrip()
    return ExportError(f"{endpoint} refuses {source} ({reason})", hint="check HF_ENDPOINT and proxies")


def _explain_os_error(error: OSError, source: HubSource) -> ExportError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExportError(
            f"the disk is full: {source} does not fit in the cache",
            hint="set HF_HOME to a folder on another disk",
        )
    if error.errno is not None:
        where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "the cache"
        return ExportError(
            f"{where} cannot be written: {error.strerror}", hint="set HF_HOME to a folder that can be written"
        )
    return ExportError(f"{source} cannot be fetched: {_first_sentence(error)}", hint=_AGAIN)


def _first_sentence(error: BaseException) -> str:
    sentence = re.split(r"\.\s|\n", str(error).strip(), maxsplit=1)[0].rstrip(".")
    return sentence or type(error).__name__

"""Where models are: bundled with minisd, in the cache of the Hugging Face Hub, or on the Hub.

Nothing here needs torch. The Hub is spoken to by huggingface_hub alone, so its settings hold:
HF_HOME and HF_HUB_CACHE (where the cache is), HF_ENDPOINT (a mirror), HF_TOKEN, HF_HUB_OFFLINE; its
progress bars show, and a connection that breaks is resumed. Layout of a repo: diffusers' folders;
https://huggingface.co/docs/huggingface_hub/guides/manage-cache for the cache.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..files import atomic_write, expect_file
from .kinds import kind_of_pipeline

Source = str | os.PathLike[str]
Part = Literal["unet", "vae", "text_encoder"]
WEIGHTS: dict[Part, str] = {  # part -> name of its weights file in diffusers' layout
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
INDEX = "model_index.json"
CONFIGS = ("scheduler/scheduler_config.json", *(f"{part}/config.json" for part in WEIGHTS))
VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf", ".json")  # no repo's name
SHORT_NAMES = {
    "sd-v1-4": "CompVis/stable-diffusion-v1-4",
    "sd-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
}
# Its owner left the Hub in August 2024.
MOVED = {"runwayml/stable-diffusion-v1-5": SHORT_NAMES["sd-v1-5"]}
# A whole CLIP, whose text encoder and vocabulary are those of Stable Diffusion v1.
CLIP = "openai/clip-vit-large-patch14"
SIZES = {None: "4.3 GB", "fp16": "2.1 GB"}  # of the weights of Stable Diffusion v1, by variant


class CheckpointError(ValueError):
    """A checkpoint that is not there, cannot be read, or does not fit the models."""


class Cached(NamedTuple):
    """A model in the Hub's cache.

    source: what to give to a command, with its options. size: bytes of the files it needs.
    """

    source: str
    folder: Path
    size: int


def bundled() -> dict[str, Path]:
    """The models that come with minisd, name -> folder."""
    root = Path(str(files("minisd_weights")))
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{INDEX}"))}


def hub_repo(source: object) -> str | None:
    """The Hub repo that a source names, or None; a folder or file of that name is preferred."""
    if not isinstance(source, str) or Path(source).exists() or source.lower().endswith(FILES):
        return None
    repo = SHORT_NAMES.get(source, MOVED.get(source, source))
    return repo if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII) else None


def weights_file(part: Part, variant: str | None) -> str:
    """Where a part's weights are in diffusers' layout: "text_encoder/model.fp16.safetensors"."""
    return with_variant(f"{part}/{WEIGHTS[part]}.safetensors", variant)


def with_variant(name: str, variant: str | None) -> str:
    """ "unet/x.safetensors" -> "unet/x.fp16.safetensors"."""
    return name if variant is None else f"{name.removesuffix('safetensors')}{variant}.safetensors"


def download(
    repo: str,
    variant: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    to: Path | None = None,
    repair: bool = False,
) -> Path:
    """Fetch the files of a Hub repo that minisd needs, and no other -> their folder.

    The repo is in diffusers layout. The small files first, the weights last, all of one commit.
    Each weights file that was downloaded is compared with the sha256 that the Hub has for it. Parts
    of which there is no such variant come without one. to: a folder for the files in place of the
    cache. repair: also compare what is here already, and fetch again what is damaged, with a
    warning.
    """
    vocabulary = [f"tokenizer/{name}" for name in VOCABULARY_FILES]
    encoder = "text_encoder/config.json"  # a repo may lack its text encoder or its vocabulary
    needed = [name for name in CONFIGS if name != encoder]
    small = [encoder, INDEX, *vocabulary]
    folder = _fetch(repo, needed, revision, local_files_only, small, repair=repair)
    commit = folder.name
    if not (folder / vocabulary[0]).exists():  # saved by transformers 5
        _fetch(repo, needed, commit, local_files_only, optional=["tokenizer/tokenizer.json"])
    expect_pipeline(folder, f"Hub repo {repo}")  # before gigabytes come
    parts = [part for part in WEIGHTS if part != "text_encoder" or (folder / encoder).exists()]
    if to is not None:
        copy_present([*CONFIGS, INDEX, *vocabulary, "tokenizer/tokenizer.json"], folder, to)
    plain = [weights_file(part, None) for part in parts]
    return fetch_weights(repo, plain, variant, folder, local_files_only, to, repair)


def copy_present(names: Iterable[str], folder: Path, to: Path) -> None:
    """Copy the files of these names that are in a folder, each of them whole or not at all."""
    for name in names:
        if (folder / name).exists():
            with atomic_write(to / name) as temporary:
                shutil.copyfile(folder / name, temporary)


def fetch_weights(
    repo: str,
    plain: Iterable[str],
    variant: str | None,
    snapshot: Path,
    local_files_only: bool,
    to: Path | None = None,
    repair: bool = False,
) -> Path:
    """Fetch weights of a variant, and where the repo has some of it, of the others the plain file
    -> their folder. plain: their names without a variant. snapshot: where the small files are."""
    plain, place = list(plain), snapshot if to is None else to
    names = [with_variant(name, variant) for name in plain]
    if variant is not None:
        first = [CONFIGS[0]] if to is None else []  # it is there, and names the folder
        _fetch(repo, first, snapshot.name, local_files_only, names, to, repair)
        if any((place / name).exists() for name in names):
            names = [own if (place / own).exists() else p for own, p in zip(names, plain)]
    return _fetch(repo, names, snapshot.name, local_files_only, (), to, repair)


def pipeline_of(repo: str, revision: str | None = None) -> tuple[str | None, str]:
    """The class that a Hub repo's model_index.json names, None without one, and the commit.

    What was damaged in the cache is fetched again, with a warning.
    """
    folder = _fetch(repo, [CONFIGS[0]], revision, False, [INDEX], repair=True)
    return read_index(folder).get("_class_name"), folder.name


def expect_pipeline(folder: Path, where: object) -> None:
    """CheckpointError for a model whose model_index.json names one that minisd does not know."""
    if kind := kind_of_pipeline(read_index(folder)):
        raise CheckpointError(f"{where} is {kind}, which minisd does not draw with")


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json of a folder, {} without one: diffusers needs it, minisd does not."""
    try:
        expect_file(folder / INDEX)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX}: {error}") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / INDEX}: got {index!r:.80}, expected an object")
    return index


def fetch_clip(names: Sequence[str], local_files_only: bool = False) -> Path:
    """The folder that holds the named files of openai/clip-vit-large-patch14."""
    return _fetch(CLIP, names, None, local_files_only)


def _fetch(
    repo: str,
    needed: Sequence[str],
    revision: str | None,
    local_files_only: bool,
    optional: Sequence[str] = (),
    to: Path | None = None,
    repair: bool = False,
) -> Path:
    """The folder of one snapshot of `repo` with the `needed` files, and those `optional` it has."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    folder = to
    reached = local_files_only
    for name in [*needed, *optional]:
        try:
            before = try_to_load_from_cache(repo, name, revision=revision)
            if before is _CACHED_NO_EXIST and name in optional:
                continue
            here = Path(before) if isinstance(before, str) else None
            if to is not None:
                here = to / name if (to / name).exists() else None
            if here is None and not reached:
                _reach(repo, name, revision)
                reached = True
            path = _fetch_one(repo, name, revision, local_files_only, to, here, repair)
        except CheckpointError:
            raise
        except EntryNotFoundError as error:
            absent = _is_absent(error, repo, name, revision)
            if name in optional and (absent or local_files_only):
                continue
            why = _why_missing(error, revision, local_files_only)
            raise CheckpointError(f"Hub repo {repo}: {name} {why}") from error
        except Exception as error:  # the HTTP client's own errors come through, too
            raise CheckpointError(
                f"Hub repo {repo}: {name} did not come: {_reason(error, revision)}"
            ) from error
        if to is None:
            folder = path.parents[name.count("/")]
            revision = folder.name  # the snapshot's commit: the other files come from the same one
    assert folder is not None  # there is a file that is needed
    return folder


def _fetch_one(
    repo: str,
    name: str,
    revision: str | None,
    local_files_only: bool,
    to: Path | None,
    here: Path | None,
    repair: bool,
) -> Path:
    """One file of a repo; here: where it is already."""
    from huggingface_hub import hf_hub_download

    damage = _damage(here, repo, name, revision) if repair and here is not None else None
    if damage is not None:
        told = f"Hub repo {repo}: {name} was damaged here, {damage}; it is fetched again"
        warnings.warn(told, stacklevel=2)
    path = Path(
        hf_hub_download(
            repo,
            name,
            revision=revision,
            local_files_only=local_files_only,
            local_dir=to,
            force_download=damage is not None,
        )
    )
    is_new = path != here or damage is not None
    if name.endswith(".safetensors") and is_new and not local_files_only:
        if (damage := _damage(path, repo, name, revision, ask=True)) is not None:
            if path.is_symlink():  # from the cache's snapshots/ to its blobs/
                (path.parent / os.readlink(path)).unlink(missing_ok=True)
            path.unlink()
            raise CheckpointError(
                f"Hub repo {repo}: {name} came {damage}; the damaged file was removed, try again"
            )
    return path


def _is_absent(error: Exception, repo: str, name: str, revision: str | None) -> bool:
    """Whether the repo is known not to have a file that was not found."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not isinstance(error, LocalEntryNotFoundError):  # the Hub said so
        return True
    return try_to_load_from_cache(repo, name, revision=revision) is _CACHED_NO_EXIST


def _why_missing(error: Exception, revision: str | None, local_files_only: bool) -> str:
    """What to say of a file that is needed and was not found."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not isinstance(error, LocalEntryNotFoundError):
        where = f"revision {revision or 'main'}"
        return f"does not exist at {where} (minisd reads .safetensors, not .bin pickles)"
    why = "is not in the local Hub cache"
    return (
        why if local_files_only else f"{why}, and the Hub was not reached{_answer(error.__cause__)}"
    )


def _reach(repo: str, name: str, revision: str | None) -> None:
    """Ask the Hub once for a file, and raise CheckpointError if there is no network.

    Without a network that fails at once, and huggingface_hub's download, which has no setting for
    it, would try again for 20 seconds; whatever else goes wrong is left to the download to try
    again.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, name, revision=revision))
    except Exception as error:
        # The HTTP client's: of httpx ConnectError, of requests, which older releases use,
        # ConnectionError.
        if any(cls.__name__ in ("ConnectError", "ConnectionError") for cls in type(error).__mro__):
            why = f"the Hub was not reached: {_reason(error, revision)}"
            raise CheckpointError(
                f"Hub repo {repo}: {name} is not in the local Hub cache, and {why}"
            ) from error


def _damage(
    path: Path, repo: str, name: str, revision: str | None, ask: bool = False
) -> str | None:
    """How a file differs from what the Hub has, or None.

    The Hub's sum of a file is its ETag: the sha256 of large files, git's of others. The cache names
    its files by it; ask: ask the Hub instead, as for a file in a folder.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    expected = path.resolve().name if path.is_symlink() and not ask else None
    if expected is None:
        expected = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision)).etag
    if re.fullmatch(r"[0-9a-f]{64}", expected or ""):
        kind, got = "sha256", sha256(path)
    elif re.fullmatch(r"[0-9a-f]{40}", expected or ""):
        data = path.read_bytes()
        kind, got = "git's sha1", hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    else:  # a mirror that keeps none
        return None
    return None if got == expected else f"with {kind} {got}, the Hub says {expected}"


def sha256(path: Path) -> str:
    expect_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(error: Exception, revision: str | None) -> str:
    """What went wrong with the Hub, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "the repo is gated; accept its terms on the Hub and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repo, or it is private and HF_TOKEN does not open it"
    if isinstance(error, RevisionNotFoundError):
        return f"the repo has no revision {revision!r}"
    return f"{' '.join(str(error).split()) or type(error).__name__}{_answer(error)}"


def _answer(error: BaseException | None) -> str:
    """The HTTP status behind an error, if there is one, and what it means for the user."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    meanings = {
        401: "the token in HF_TOKEN is not accepted",
        429: "too many requests, wait a few minutes",
    }
    if status is None:
        return ""
    meaning = meanings.get(
        status, "an error of the Hub's own, try again later" if status >= 500 else ""
    )
    return f" (it answered {status}{': ' if meaning else ''}{meaning})"


def cached() -> list[Cached]:
    """The models in the Hub's cache that are complete, one for each variant."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, ValueError):  # no cache, or a file in its place
        return []
    models = []
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        for commit in sorted(repo.revisions, key=lambda commit: commit.commit_hash):
            if repo.repo_type != "model":
                continue
            folder = commit.snapshot_path
            sizes = {
                file.file_path.relative_to(folder).as_posix(): file.size_on_disk
                for file in commit.files
            }
            is_main = "main" in commit.refs
            source = repo.repo_id if is_main else f"{repo.repo_id} --revision {commit.commit_hash}"
            for variant, size in _variants(sizes):
                option = f" --variant {variant}" if variant else ""
                models.append(Cached(source + option, folder, size))
    return models


def _variants(sizes: dict[str, int]) -> list[tuple[str | None, int]]:
    """The variants of which a snapshot has every file, and the bytes of all that one needs.

    sizes: of the snapshot's files, by their paths in it.
    """
    pattern = r"unet/diffusion_pytorch_model(?:\.(.+))?\.safetensors"
    variants = [match[1] for name in sizes if (match := re.fullmatch(pattern, name))]
    # As in `download`: a repo may lack its text encoder.
    parts = [part for part in WEIGHTS if part != "text_encoder" or f"{part}/config.json" in sizes]
    configs = {"scheduler/scheduler_config.json", *(f"{part}/config.json" for part in parts)}
    complete = []
    for variant in sorted(variants, key=lambda variant: variant or ""):
        plain = {part: weights_file(part, None) for part in parts}
        own = {part: weights_file(part, variant) for part in parts}
        weights = {own[part] if own[part] in sizes else plain[part] for part in parts}
        if weights | configs <= sizes.keys():
            small = {name for name in sizes if not name.endswith(".safetensors")}
            complete.append((variant, sum(sizes[name] for name in weights | small)))
    return complete

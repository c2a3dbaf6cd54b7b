"""A list of SHA-256 digests that tells whether the files of a directory are as written.

The list has the form of `sha256sum`, so that it can be checked without us:
`cd DIRECTORY && sha256sum -c SHA256SUMS`. It covers the files in sub-directories, and
all of them: one that is not listed is damage, too, as who reads the directory reads it.
Those beside the list itself may change. In a bucket all are read over the network.
"""

import fnmatch
import hashlib
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from crossmae_jax import paths
from crossmae_jax.paths import AnyPath

LIST = "SHA256SUMS"
# What systems leave behind: macOS on foreign disks, NFS of files that were open.
_STRAY = (".DS_Store", "._*", ".nfs*")


def _digests(files: Sequence[AnyPath]) -> list[str]:
    def digest(file):
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter lock
        return list(pool.map(digest, files))


def _listed(path: AnyPath, files: Sequence[AnyPath]) -> str:
    return "".join(
        f"{digest}  {file.relative_to(path).as_posix()}\n"
        for file, digest in zip(files, _digests(files), strict=True)
    )


def of(path: str | AnyPath) -> str:
    """Returns the SHA-256 of a file, or of the names and digests below a directory."""
    path = paths.path(path)
    if path.is_file():
        return _digests([path])[0]
    return hashlib.sha256(_listed(path, paths.files(path)).encode()).hexdigest()


def write(path: str | AnyPath) -> None:
    """Lists the digests of all files in the sub-directories of `path`."""
    path = paths.path(path)
    paths.write_whole(path / LIST, _listed(path, paths.files(path, nested=True)))


def damage(
    path: AnyPath, parts: Collection[str], *, hashed: bool = True
) -> str | None:
    """Returns what is wrong with the given sub-directories, None if they are intact.

    Args:
      hashed: if not, only the names of the files are looked at, which is fast.
    """
    expected = {}
    try:
        for line in (path / LIST).read_text().splitlines():
            digest, name = line.split("  ", 1)
            if name.split("/")[0] in parts:
                expected[name] = digest
    except FileNotFoundError:
        return f"{LIST} is missing, so its contents cannot be verified"
    except ValueError:  # not text, or a line without a digest and a name
        return f"{LIST} is damaged"
    except OSError as error:
        return f"{LIST} cannot be read ({error})"
    absent = set(parts) - {name.split("/")[0] for name in expected}
    if absent:
        return f"{LIST} lists no file of {', '.join(sorted(absent))}"
    try:
        there = _in(path, parts)
        if unlisted := sorted(there - expected.keys()):
            return f"{LIST} lacks {shorten(unlisted, 2)}"
        if missing := [name for name in expected if name not in there]:
            return f"{shorten(missing, 2)} missing"
        if not hashed:
            return None
        digests = _digests([path / name for name in expected])
    except OSError as error:
        return f"cannot be read ({error})"
    wrong = [
        name for (name, digest), other in zip(expected.items(), digests, strict=True)
        if digest != other
    ]
    return f"digest mismatch in {shorten(wrong, 2)}" if wrong else None


def _in(path: AnyPath, parts: Collection[str]) -> set[str]:
    """Returns the names of all files in the given sub-directories, but stray ones."""
    names = {
        file.relative_to(path).as_posix()
        for part in parts for file in paths.files(path / part)
    }
    return {
        name for name in names
        if not any(fnmatch.fnmatch(name.rsplit("/", 1)[-1], form) for form in _STRAY)
    }


def shorten(names: list[str], count: int) -> str:
    """Returns the first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more

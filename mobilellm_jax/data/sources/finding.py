"""Finds the files of a corpus by a pattern, on this machine or at a URL.

The module searches local folders itself, because Python's `glob` follows links in circles, ignores
broken links and unreadable folders, and cannot find a real name that contains brackets.
"""

import fnmatch
import hashlib
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mobilellm_jax.errors import MissingFileError, UserError, require

# Fields of fsspec that change when a file is written again. Each storage system provides some of
# these fields.
_STAMPS = (
    *("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "Last-Modified"),
    *("updated", "created"),
)
# Number of files behind URLs whose sizes are requested at the same time.
_REQUESTS_AT_ONCE = 16
_NOT_FOUND = 404  # A web server's answer for a file that it does not have.
_WILDCARDS = re.compile(r"[*?[]")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file that `find` has found; `stamp` changes when the file is written again."""

    path: str
    size_bytes: int
    stamp: str


def find(spec: str, pattern: str) -> list[File]:
    """Returns the files that match, sorted by path; leaves out folders and hidden local files.

    A local file is listed once, although links may lead to it by several paths. Brackets in a part
    of the pattern stand for themselves if a name with these brackets exists.

    Raises:
      MissingFileError: if no file matches, or a link that matches leads nowhere.
      UserError: if fsspec cannot open the URL, or the server does not answer.
    """
    if "://" in pattern:
        return _find_remote(spec, pattern)
    search = _LocalSearch(spec)
    for path in search.paths(pattern):
        search.add(path)
    return search.files(pattern)


def identity(kind: str, files: Sequence[File]) -> str:
    """Returns a line of text that changes when the name, size or stamp of a file changes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((file.path, file.size_bytes, file.stamp)).encode())
    total = sum(file.size_bytes for file in files)
    return (
        f"{kind}, {len(files)} files, {total} bytes, "
        f"SHA-256 of names, sizes and times {digest.hexdigest()}"
    )


def filesystem_of(url: str, culprit: str) -> tuple[Any, str]:
    """Returns fsspec's file system for the URL, and the path within this file system."""
    require("fsspec", "data", culprit)
    import fsspec

    if "::" in url:
        raise UserError(f"{culprit}: chained URLs (a::b) are not supported; give a single URL.")
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{culprit}: {error}, e.g. with pip.") from error
    except ValueError as error:
        raise UserError(
            f"{culprit}: {error}; fsspec knows the protocols "
            f"{', '.join(sorted(fsspec.available_protocols()))}."
        ) from error
    except Exception as error:  # Some storage systems (ftp, github) connect at once.
        raise unreachable(culprit, url, error) from error
    return filesystem, path


def unreachable(culprit: str, url: str, error: Exception) -> UserError:
    """Returns the error for a server that does not answer, or answers with an error."""
    why = " ".join(str(error).split()) or type(error).__name__
    if "support range requests" in why:  # fsspec names a remedy for programmers.
        why = "this server sends a large file only as a whole"
    return UserError(
        f"{culprit}: {url} cannot be read ({why}); check the address, the network and the login, "
        "and start the same command again, or download the files and name the local copies."
    )


class _LocalSearch:
    """Collects the files that match a pattern, and the matching folders, devices and broken links.

    Folders are strings that are empty or end in a slash, so that paths look as the user wrote them.
    """

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._real: dict[str, str] = {}  # Path of a folder without links, by its path.
        self._found: dict[str, File] = {}  # By the path without links.
        self._copies: list[str] = []
        self._broken: list[str] = []
        self._special: list[str] = []
        self._folders = 0

    def paths(self, pattern: str) -> Iterator[str]:
        """Yields the paths that match, some of them perhaps twice."""
        first = pattern.split("/", 1)[0]
        if first.startswith("~") and not os.path.lexists(first):
            pattern = os.path.expanduser(pattern)
        root = "/" if pattern.startswith("/") else ""
        for in_folder in self._expand(root, pattern[len(root) :].split("/")):
            yield from in_folder

    def add(self, path: str) -> None:
        try:
            status = os.lstat(path)
            is_link = stat.S_ISLNK(status.st_mode)
            if is_link:
                status = os.stat(path)
        except OSError:  # For example, the target of a link is missing, or a link leads to itself.
            self._broken.append(path)
            return
        if stat.S_ISDIR(status.st_mode):
            self._folders += 1
        elif not stat.S_ISREG(status.st_mode):
            self._special.append(path)
        else:
            file = File(path, status.st_size, str(status.st_mtime_ns))
            self._add_file(file, os.path.realpath(path) if is_link else self._real_path(path))

    def files(self, pattern: str) -> list[File]:
        if self._broken:
            raise self._broken_error()
        if self._special:
            _log.warning(
                f"WARNING: source={self._spec!r}: left out {self._special[0]}"
                f"{_and_more(self._special)}, because it is a pipe or a device, and a source is "
                "read several times; write its contents to a file."
            )
        if self._copies:
            _log.info(
                f"source={self._spec!r}: several paths lead to the same file through links, for "
                f"example {self._copies[0]}{_and_more(self._copies)}; each file is read once."
            )
        if not self._found:
            what = "folders only; add /**/*.txt or the like" if self._folders else "nothing"
            if shell := re.match(r"~[^/]*|.*?(\$\w+|\$\{\w+\})", pattern):
                what += f"; only a shell replaces {shell[1] or shell[0]}, so write the whole path"
            raise MissingFileError(f"source={self._spec!r}: the pattern matches {what}.")
        return sorted(self._found.values(), key=lambda file: file.path)

    def _expand(self, folder: str, parts: Sequence[str]) -> Iterator[list[str]]:
        """Yields the paths that match in one folder after another."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            rest = rest or ["*"]
            for below in self._folders_below(folder):
                yield from self._expand(below, rest)
        elif not rest:
            yield [folder + name for name in self._names(folder, part)]
        elif not part:  # The pattern contains two slashes in a row.
            yield from self._expand(f"{folder}/", rest)
        else:
            for name in self._names(folder, part):
                path = folder + name
                if os.path.isdir(path):
                    yield from self._expand(f"{path}/", rest)
                elif not os.path.exists(path):
                    self._doubt(path)

    def _names(self, folder: str, part: str) -> list[str]:
        """Returns the names in a folder that match a part of the pattern."""
        if not _WILDCARDS.search(part):
            return [part] if os.path.lexists(folder + part) else []
        names = [entry.name for entry in self._entries(folder)]
        if not part.startswith("."):
            names = [name for name in names if not name.startswith(".")]
        as_written = fnmatch.filter(names, part.replace("[", "[[]")) if "[" in part else []
        return as_written or fnmatch.filter(names, part)

    def _folders_below(self, top: str) -> Iterator[str]:
        """Yields `top` and the folders in it at any depth, each once, also if links lead to it."""
        seen = set()
        folders, linked = [top], list[str]()
        while folders or linked:
            # A folder is reached by its own path before it can be reached by a link.
            folder = folders.pop() if folders else linked.pop(0)
            if (real := self._real_folder(folder)) in seen:
                continue
            seen.add(real)
            yield folder
            for entry in self._entries(folder):
                path = folder + entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    if os.path.isdir(path):
                        linked.append(f"{path}/")
                    elif not os.path.exists(path):
                        self._doubt(path)
                elif entry.is_dir():
                    folders.append(f"{path}/")

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder or ".") as entries:
                return list(entries)
        except OSError as error:
            _log.warning(
                f"WARNING: source={self._spec!r}: the folder {folder} cannot be listed "
                f"({error.strerror}), so its files are left out."
            )
            return []

    def _doubt(self, path: str) -> None:
        """Warns about a broken link whose target may have been a folder with matching files."""
        _log.warning(
            f"WARNING: source={self._spec!r}: {path} is a link to {os.readlink(path)}, which does "
            "not exist. If the target was a folder, its files are left out."
        )

    def _add_file(self, file: File, real: str) -> None:
        known = self._found.get(real)
        if known is None or known.path == file.path:
            self._found[real] = file
            return
        # If two paths lead to one file, the list gets the path without links. If both paths have
        # links, the list gets the path that sorts first.
        ordered = sorted((known, file), key=lambda f: (os.path.abspath(f.path) != real, f.path))
        self._found[real] = ordered[0]
        self._copies.append(ordered[1].path)

    def _real_path(self, path: str) -> str:
        """Returns the path of a file, which is not a link, without links to its folders."""
        # A corpus has up to millions of files, and the functions of `os.path` are slow.
        folder, slash, name = path.rpartition("/")
        return f"{self._real_folder(folder + slash).rstrip('/')}/{name}"

    def _real_folder(self, folder: str) -> str:
        if folder not in self._real:
            self._real[folder] = os.path.realpath(folder or ".")
        return self._real[folder]

    def _broken_error(self) -> MissingFileError:
        path = self._broken[0]
        target = f" -> {os.readlink(path)}" if os.path.islink(path) else ""
        return MissingFileError(
            f"source={self._spec!r}: {path}{target}{_and_more(self._broken)} leads nowhere or "
            "cannot be opened. Fetch the target of the link (`dvc pull`, `git annex get`), or "
            "delete the link if the file is not wanted."
        )


def _and_more(paths: Sequence[str]) -> str:
    return f" (and {len(paths) - 1:,} more)" if len(paths) > 1 else ""


def _find_remote(spec: str, pattern: str) -> list[File]:
    culprit = f"source={spec!r}"
    filesystem, path = filesystem_of(pattern, culprit)

    def file_of(name: str, info: dict[str, Any]) -> File:
        if info["size"] is None:  # A web server lists no sizes, but tells the size of one file.
            info = filesystem.info(name)
        if info["size"] is None:
            raise UserError(
                f"{culprit}: the server does not tell the size of {name}; download the file and "
                "name the local copy."
            )
        stamp = " ".join(f"{key}={info[key]}" for key in _STAMPS if key in info)
        return File(filesystem.unstrip_protocol(name), int(info["size"]), stamp)

    try:
        # `glob` reports a host that does not answer as "nothing found", and `info` tells why.
        if _WILDCARDS.search(path):
            found = filesystem.glob(path, detail=True)
        else:
            info = filesystem.info(path)
            found = {info["name"]: info}
        matches = sorted(each for each in found.items() if each[1]["type"] != "directory")
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            files = list(pool.map(lambda match: file_of(*match), matches))
    except UserError:
        raise
    except FileNotFoundError as error:  # Some storage systems raise this for a folder or a bucket.
        # fsspec also raises this if a web server does not answer, with the reason as the cause.
        cause = error.__cause__
        if isinstance(cause, Exception) and getattr(cause, "status", None) != _NOT_FOUND:
            raise unreachable(culprit, pattern, cause) from error
        raise MissingFileError(f"{culprit}: the pattern matches nothing.") from error
    except Exception as error:  # Each storage system has its own errors.
        raise unreachable(culprit, pattern, error) from error
    if not files:
        what = "folders only; add /**/*.txt or the like" if found else "nothing"
        raise MissingFileError(f"{culprit}: the pattern matches {what}.")
    return files

"""What is left out of a package: the rules of .gitignore files, and of .dtrainignore files beside them.

As in git, a pattern of a folder nearer to the file wins over one further up, a later one over
an earlier one, and nothing below a folder that is left out comes back in. A ``.dtrainignore``
wins over every ``.gitignore``: it can leave out what git keeps, and keep what git leaves out.
"""

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathspec import GitIgnoreSpec

from dtrain.protocol.errors import ErrorCode, Refused

GITIGNORE = ".gitignore"
DTRAINIGNORE = ".dtrainignore"

NEVER = ".git"
"""Whatever the rules say: it is large, differs between clones of the same files, and may hold credentials."""

ALWAYS_FIRST = ("__pycache__/",)
"""What Python writes while it runs would make another package of the same sources. A rule can keep it."""

RULES_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Layer:
    """The rules of one file; ``below``: the path of the packed folder, or of one in it, seen from that file.

    ``strip``: the folder of the file within the packed one, "" for the root and everything above.
    """

    spec: GitIgnoreSpec
    strip: str = ""
    below: str = ""

    def verdict(self, path: str) -> bool | None:
        """True: left out; False: kept; None: nothing is said about ``path``."""
        return self.spec.check_file(f"{self.below}{path.removeprefix(self.strip)}").include


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules that hold in one folder of a package, the weakest first."""

    git: tuple[_Layer, ...] = ()
    own: tuple[_Layer, ...] = ()

    def leaves_out(self, path: str, *, folder: bool) -> bool:
        """Whether ``path``, relative to the packed folder, stays out; nothing above it does."""
        if PurePosixPath(path).name == NEVER:
            return True
        asked = f"{path}/" if folder else path
        for layer in (*reversed(self.own), *reversed(self.git)):
            verdict = layer.verdict(asked)
            if verdict is not None:
                return verdict
        return False

    def within(self, root: Path, path: str) -> "Rules":
        """The rules that hold in the folder ``path`` of ``root`` ("": in ``root`` itself).

        Raises:
            Refused: CANNOT_PACK; a file of rules cannot be read.
        """
        strip = f"{path}/" if path else ""
        git = _read(root / path / GITIGNORE)
        own = _read(root / path / DTRAINIGNORE)
        return Rules(
            self.git if git is None else (*self.git, _Layer(git, strip)),
            self.own if own is None else (*self.own, _Layer(own, strip)),
        )


def rules_of(root: Path) -> Rules:
    """The rules that hold in ``root``, those of the repository around it included.

    Raises:
        Refused: CANNOT_PACK; a file of rules cannot be read.
    """
    first = Rules((_Layer(GitIgnoreSpec.from_lines(ALWAYS_FIRST)),))
    return Rules((*first.git, *_around(root))).within(root, "")


def _around(root: Path) -> tuple[_Layer, ...]:
    """Rules of the folders above, up to the one that holds .git: a part of a repository has the whole's."""
    if (root / NEVER).exists():
        return ()
    above = next((folder for folder in root.parents if (folder / NEVER).exists()), None)
    if above is None:
        return ()
    folders = [folder for folder in reversed(root.parents) if folder.is_relative_to(above)]
    rules = Rules()
    for folder in folders:
        found = _read(folder / GITIGNORE)
        if found is not None:
            strip = "" if folder == above else f"{folder.relative_to(above).as_posix()}/"
            rules = Rules((*rules.git, _Layer(found, strip)))
    inner = root.relative_to(above)
    named = [PurePosixPath(*inner.parts[: count + 1]).as_posix() for count in range(len(inner.parts))]
    if any(rules.leaves_out(path, folder=True) for path in named):
        # The repository does not know the folder at all; whoever names it wants what is in it.
        return ()
    prefix = f"{inner.as_posix()}/"
    return tuple(_Layer(layer.spec, "", prefix.removeprefix(layer.strip)) for layer in rules.git)


def _read(path: Path) -> GitIgnoreSpec | None:
    try:
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode):
            return None  # as git does: a link could name any file of this machine
        if about.st_size > RULES_BYTES_MAX:
            raise _unreadable(path, f"it has {about.st_size} bytes, the limit is {RULES_BYTES_MAX}")
        return _parse(path, path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _parse(path: Path, lines: Iterable[str]) -> GitIgnoreSpec:
    try:
        return GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error


def _unreadable(path: Path, why: str) -> Refused:
    return Refused(
        ErrorCode.CANNOT_PACK,
        f"{path} says what is not to be packed, and cannot be read: {why}",
        fix="correct the file, or set pack: false to run from a folder that all machines have",
    )

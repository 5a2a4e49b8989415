"""The one of many that a word on the command line names. Pure."""

from collections.abc import Iterable

from dtrain.protocol.errors import ErrorCode, NotFound, Refused


def find(names: Iterable[str], wanted: str, what: str) -> str:
    """Return the name that ``wanted`` is, or is the unique beginning of; ``job/NAME`` is fine, too.

    Raises:
        NotFound: none, or more than one.
    """
    known = sorted(names)
    word = wanted.removeprefix(f"{what}/")
    if word in known:
        return word
    matching = [name for name in known if name.startswith(word)] if word else []
    if len(matching) == 1:
        return matching[0]
    if matching:
        raise Refused(
            ErrorCode.USAGE, f"{wanted!r} could be {', '.join(matching)}", fix="write more of the name"
        )
    raise NotFound(
        ErrorCode.NOT_FOUND,
        f"there is no {what} {word!r}",
        fix=f"dtrain get {what}s" + (f" shows {', '.join(known[:5])}" if known else ": there are none"),
    )

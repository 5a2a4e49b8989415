"""Where a symbolic link within a tree leads, decided from the names alone. Pure.

The same function judges what is packed and what is unpacked: a tree that this
lets pass has no link through which anybody could leave it.
"""

from collections.abc import Mapping

HOPS_MAX = 40
"""Links on the way of one path: what Linux itself allows."""


def leads(links: Mapping[str, str], path: str) -> str | None:
    """Return what the link at ``path`` names, relative to the tree ("": its root); None: it leaves it.

    ``links``: every link of the tree, by path, with its target. What a target names need not
    exist. A link that leads to itself is taken for one that leaves the tree.
    """
    todo = path.split("/")[::-1]
    at: list[str] = []
    hops = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            if not at:
                return None
            at.pop()
            continue
        at.append(part)
        target = links.get("/".join(at))
        if target is None:
            continue
        hops += 1
        if hops > HOPS_MAX or target.startswith("/"):
            return None
        at.pop()
        todo.extend(target.split("/")[::-1])
    return "/".join(at)

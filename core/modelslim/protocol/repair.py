# SPDX-License-Identifier: Apache-2.0
"""A document as its writer meant it, with misspelt names put right, so that what they hide is judged as well.

A misspelt ``type`` hides every mistake in its entry, a misspelt key those in its value, a misspelt apiversion all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

from modelslim.protocol.document import Document, Place, Steps


@dataclass(frozen=True)
class Repair:
    """A name that is near enough to a right one.

    Attributes:
        path: of the value, or of the value under the key.
        right: what should stand there.
        key: True when the key is misspelt.
    """

    path: Steps
    right: str
    key: bool = False


def repaired(document: Document, repairs: Iterable[Repair]) -> Document:
    """The document with the repairs made; every value keeps its place in the file.

    Args:
        document: the document; it stays as it is.
        repairs: paths in it.
    """
    value, root = deepcopy(document.value), document.root
    # Keys last: a path holds for the names that the document has.
    for repair in sorted(repairs, key=lambda one: (one.key, -len(one.path))):
        *above, last = repair.path
        holder = value
        for step in above:
            holder = holder[step]
        if not repair.key:
            holder[last] = repair.right
        elif last in holder:  # else another alias of the mapping was repaired
            meant = holder.pop(last)
            holder.setdefault(repair.right, meant)
        if repair.key:
            root = _renamed(root, above, str(last), repair.right)
    return replace(document, value=value, root=root)


def _renamed(place: Place, above: list[str | int], name: str, right: str) -> Place:
    children: Mapping[str | int, Place] = place.children
    if not above:
        return replace(place, children={right: children[name], **children}) if name in children else place
    step, *rest = above
    if step not in children:  # it came in by a merge
        return place
    return replace(place, children={**children, step: _renamed(children[step], rest, name, right)})

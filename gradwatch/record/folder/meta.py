"""Reads and writes meta.json, and checks that a folder is a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from gradwatch.record.folder.files import UnreadableError, plain_data, write_whole
from gradwatch.record.folder.lock import LOCK
from gradwatch.record.records import Layout, ParameterGroups

FORMAT = "gradwatch run"
VERSION = 1
NAME = "meta.json"
MODELS = "models.jsonl"
"""Name of the list of models; see :mod:`.models`."""
STEPS, PARAMETERS, EVENTS = TABLES = ("steps", "parameters", "events")
EARLIER = "earlier-"
GROUPS = "groups"
_FIELDS = tuple(field.name for field in fields(Layout))

NO_FOLDER = (
    "There is no folder {path!r}. Pass the folder that watch(run_dir=) or RunFolder() was given."
)
A_FILE = "{path!r} is a file, but a run is a folder. Pass {parent!r} if the file is part of a run."
NO_META = "{path!r} is not a run folder: it has no meta.json. {hint}"
NO_META_BUT_TABLES = (
    "{path!r} is half a run folder: it has {there}, but no meta.json, so the parameters are not "
    "known. Copy meta.json of that run too; pandas.read_parquet() reads {there} without it."
)
BARELY_BEGUN = (
    "{path!r} holds no step yet: the run that made it was stopped, or has only just begun. Use it "
    "for a run, or wait for its first steps, which are written after 5 seconds."
)
BEGUN_ANEW = (
    "{path!r} holds no step yet: a run that began at step 1 again was stopped before its first "
    "steps were written. The run before it is in {earlier!r}."
)
FOREIGN = "{path!r} is not a run folder: its meta.json was not written by gradwatch ({why}). {hint}"
NEWER = (
    "{path!r} is a run in format {theirs}, and this gradwatch reads formats up to {ours}. "
    "Upgrade: pip install --upgrade gradwatch."
)
HALF = (
    "{path!r} is half a run folder: it has meta.json, but no {missing}. Copy the whole folder of "
    "the run."
)
PASS_ANOTHER = "Pass the folder that watch(run_dir=) or RunFolder() was given."


@dataclass(frozen=True, slots=True)
class Meta:
    """The content of meta.json.

    Attributes:
        layout: The parameters of all sessions, those of the newest session first.
        sessions: One mapping for each process that has written, oldest first.
    """

    layout: Layout
    sessions: tuple[Mapping[str, Any], ...] = ()

    def with_session(self, layout: Layout, session: Mapping[str, Any]) -> Meta:
        """Returns a copy with one more session, whose parameters come first in the layout."""
        return Meta(_joined(layout, self.layout), (*self.sessions, plain_data(session)))

    def with_groups(self, layout: Layout, groups: Sequence[ParameterGroups]) -> Meta:
        """Returns a copy in which the newest session has these parameter groups.

        ``layout`` is the one that their indices refer to.
        """
        newest = {**self.sessions[-1], GROUPS: [_described(one, layout) for one in groups]}
        return replace(self, sessions=(*self.sessions[:-1], newest))

    def groups(self, session: int) -> list[ParameterGroups] | None:
        """Returns the parameter groups of a session; None if its gradwatch did not write them."""
        for one in self.sessions:
            if one.get("session") == session and GROUPS in one:
                positions = {name: index for index, name in enumerate(self.layout.names)}
                return [_groups(content, positions) for content in one[GROUPS]]
        return None

    def write(self, folder: Path) -> None:
        """Writes meta.json."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "sessions": self.sessions,
            "layout": {name: getattr(self.layout, name) for name in _FIELDS},
        }
        write_whole(folder / NAME, json.dumps(content, indent=1).encode())


def read_meta(folder: Path) -> Meta:
    """Reads meta.json.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not a run folder, or one in a newer format.
    """
    content = _content(folder)
    if content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        raise _foreign(folder, "it does not say so")
    if content["version"] > VERSION:
        raise UnreadableError(
            NEWER.format(path=str(folder), theirs=content["version"], ours=VERSION)
        )
    try:
        return Meta(_layout(content["layout"]), tuple(map(dict, content["sessions"])))
    except (KeyError, TypeError, ValueError) as error:
        raise _foreign(folder, f"{type(error).__name__}: {error}") from error


def check_whole(folder: Path) -> None:
    """Checks that the folder of each table exists.

    Raises:
        ValueError: If one is missing.
    """
    missing = [f"{name}/" for name in TABLES if not (folder / name).is_dir()]
    if missing:
        earlier = newest_earlier(folder)
        if f"{STEPS}/" in missing and earlier is not None and (earlier / STEPS).is_dir():
            raise UnreadableError(BEGUN_ANEW.format(path=str(folder), earlier=str(earlier)))
        raise UnreadableError(HALF.format(path=str(folder), missing=" and no ".join(missing)))


def newest_earlier(folder: Path) -> Path | None:
    """Finds the newest ``earlier-N``: a run set aside because another began here at step 1."""
    found = (path for path in folder.glob(f"{EARLIER}*") if number_of_earlier(path))
    return max(found, key=number_of_earlier, default=None)


def number_of_earlier(path: Path | None) -> int:
    """Returns the N of ``earlier-N``; 0 for any other path."""
    digits = path.name.removeprefix(EARLIER) if path is not None else ""
    return int(digits) if digits.isdecimal() else 0


def has_begun(folder: Path) -> bool:
    """Tells whether a folder holds any data of a run; False if it does not exist."""
    if (folder / NAME).exists():
        return True
    # A process that was killed before its first step leaves folders and an empty file of events.
    files = (path for table in TABLES for path in (folder / table).glob("[!.]*"))
    return any(path.stat().st_size for path in files)


def _content(folder: Path) -> Mapping[str, Any]:
    if folder.is_file():
        raise UnreadableError(A_FILE.format(path=str(folder), parent=str(folder.parent)))
    if not folder.is_dir():
        raise FileNotFoundError(NO_FOLDER.format(path=str(folder)))
    try:
        content = json.loads((folder / NAME).read_bytes())
    except FileNotFoundError:
        raise _no_meta(folder) from None
    except (ValueError, RecursionError) as error:  # RecursionError: deeply nested brackets
        raise _foreign(folder, str(error)) from error
    if not isinstance(content, dict):
        raise _foreign(folder, "it does not say so")
    return content


def _no_meta(folder: Path) -> UnreadableError:
    there = [f"{name}/" for name in TABLES if (folder / name).is_dir()]
    if (there or (folder / LOCK).exists()) and not has_begun(folder):
        return UnreadableError(BARELY_BEGUN.format(path=str(folder)))
    if there:
        return UnreadableError(NO_META_BUT_TABLES.format(path=str(folder), there=", ".join(there)))
    return UnreadableError(NO_META.format(path=str(folder), hint=_hint(folder)))


def _foreign(folder: Path, why: str) -> UnreadableError:
    return UnreadableError(FOREIGN.format(path=str(folder), why=why, hint=_hint(folder)))


def _hint(folder: Path) -> str:
    # A usual slip is to pass the parent folder: "runs" instead of "runs/a".
    found = (path for name in (NAME, MODELS) for path in folder.glob(f"*/{name}"))
    inside = sorted({str(path.parent) for path in found})[:3]
    return f"Did you mean {' or '.join(map(repr, inside))}?" if inside else PASS_ANOTHER


def _layout(content: Mapping[str, Sequence[Any]]) -> Layout:
    return Layout(
        names=tuple(content["names"]),
        modules=tuple(content["modules"]),
        shapes=tuple(map(tuple, content["shapes"])),
        aliases=tuple(map(tuple, content["aliases"])),
    )


def _described(groups: ParameterGroups, layout: Layout) -> dict[str, Any]:
    # By name, as indices would no longer fit once a session with another model has resumed the run.
    members = [[layout.names[index] for index in group] for group in groups.members]
    return {
        "optimizer": groups.optimizer,
        "from_step": groups.from_step,
        "norm_type": plain_data(groups.norm_type),
        "groups": [
            {"name": plain_data(name), "parameters": parameters}
            for name, parameters in zip(groups.names, members, strict=True)
        ],
    }


def _groups(content: Mapping[str, Any], positions: Mapping[str, int]) -> ParameterGroups:
    return ParameterGroups(
        optimizer=content["optimizer"],
        from_step=content["from_step"],
        norm_type=float(content["norm_type"]),  # an infinite one is the text "inf"
        names=tuple(group["name"] for group in content["groups"]),
        members=tuple(
            tuple(positions[name] for name in group["parameters"]) for group in content["groups"]
        ),
    )


def _joined(new: Layout, old: Layout) -> Layout:
    """Returns the new layout followed by the parameters that only the old one has."""
    known = set(new.names)
    gone = [index for index, name in enumerate(old.names) if name not in known]
    if not gone:
        return new

    def both(field: str) -> Any:
        # A layout may lack shapes and aliases; pad them, so that the entries line up with names.
        ours, theirs = (
            getattr(layout, field) or ((),) * len(layout.names) for layout in (new, old)
        )
        return (*ours, *(theirs[index] for index in gone))

    return Layout(*map(both, _FIELDS))

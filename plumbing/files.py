"""Read what nobody can be trusted to have written, and write so that a kill loses nothing."""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
import sys

from plumbing import Refused
from plumbing.processes import rank_and_size

NAME, SHA = re.compile(r"\w[\w.-]{0,63}"), re.compile(r"[0-9a-f]{64}")
AUTO, BASE = "auto", "base"  # to a server: whoever the prompt is routed to, and the bare backbone


def validate(value, form, where):
    """Return the value. Raises Refused, naming the field, unless it has this form: a type, pattern, range,
    test or constant; [form] for a list of any length, [form, form] for a pair; {key: form} for these keys,
    where "key?" may be absent; {pattern: form} for keys like it; (form, ...) for one of them."""
    if isinstance(form, tuple):
        for option in form[:-1]:
            with contextlib.suppress(Refused):
                return validate(value, option, where)
        return validate(value, form[-1], where)
    if isinstance(form, dict) and isinstance(value, dict):
        likeness = next((key for key in form if isinstance(key, re.Pattern)), None)
        forms = {key: form[likeness] for key in value} if likeness else form
        forms = {key.rstrip("?"): f for key, f in forms.items() if key[-1:] != "?" or key[:-1] in value}
        for key in dict.fromkeys((*forms, *value)):
            if key not in forms or key not in value:
                raise Refused(f"{where}: {key!r} is {'missing' if key in forms else 'unknown'}")
            validate(key, likeness or str, where)
            validate(value[key], forms[key], f"{where}: {key}")
        return value
    if isinstance(form, list) and isinstance(value, list) and len(form) in (1, len(value)):
        forms = form if len(form) > 1 else form * len(value)
        return [validate(part, f, f"{where}[{i}]") for i, (part, f) in enumerate(zip(value, forms))]
    if isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value)
    elif form is float:
        fits = type(value) in (int, float) and abs(value) < 1e300
    elif isinstance(form, range):
        fits = type(value) is int and value in form
    elif isinstance(form, type):
        fits = type(value) is form
    else:
        fits = form(value) if callable(form) else type(value) is type(form) and value == form
    if not fits:
        raise Refused(f"{where}: {ascii(value)[:60]} is not what belongs there")
    return value


def is_text(value):
    """Return whether a value is a text that can be written: half a surrogate pair cannot."""
    return isinstance(value, str) and value == value.encode("utf-8", "replace").decode()


def check_name(option, name):
    """Raise Refused if a name cannot become a file name, or if whoever says it means something else."""
    if name in (AUTO, BASE):
        raise Refused(f"{option} {name}: whoever asks eval.py's server for {name} means no version")
    if re.fullmatch("[0-9a-f]{12,64}", name):
        raise Refused(f"{option} {name}: it would be taken for the hash of a version")
    if not NAME.fullmatch(name) or len(name.encode()) > 200:
        raise Refused(f"{option} {name!r}: use at most 64 letters, digits, '_', '-' and '.'")


def refuse_constant(text):
    raise ValueError(f"{text} is no number")


def refuse_twice(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        raise ValueError(f"{next(key for key, _ in pairs if key in seen or seen.add(key))!r} is there twice")
    return found


STRICT = {"parse_constant": refuse_constant, "object_pairs_hook": refuse_twice}  # no nan, no key twice


def parse_json(data, where):
    """Return what a JSON text, or its bytes in UTF-8, holds. Raises Refused if it is not JSON, has a number
    that is none, or an object with a key twice."""
    try:
        return json.loads(data.decode() if isinstance(data, bytes) else data, **STRICT)
    except (ValueError, RecursionError) as e:
        raise Refused(f"{where}: not readable as JSON ({e})") from None


def read_json(path, own=True):
    """Return what a JSON file holds. own: it lies in a run folder, where no link is followed. Raises Refused
    as `parse_json` does, and if it is no plain file."""
    path = pathlib.Path(path)
    if not path.is_file() or own and path.is_symlink():
        raise Refused(f"{path}: no such file" if not path.exists() else f"{path}: not a plain file")
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as e:
        raise Refused(f"{path}: not readable ({e.strerror})") from None


def temporary(path):
    """Return a new name beside a path. It is drawn, because the numbers of processes repeat in containers:
    what a killed command left would then be in the way."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.niwf-tmp")


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path`; on success fsync it and rename it over `path`. So whoever reads,
    even after a kill, finds the old contents or the new, never a part. Only the first process writes."""
    if rank_and_size()[0]:
        yield pathlib.Path(os.devnull)
        return
    path.parent.mkdir(exist_ok=True)
    tmp = temporary(path)
    open(tmp, "xb").close()  # never through a link, never over another file
    try:
        yield tmp
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
        if os.name == "posix":  # the rename itself lives in the folder
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder):
    """Give a temporary folder beside `folder`; on success fsync what is in it and rename it, else remove it
    with the parents that were made for it. A kill can leave the temporary folder, never a part under the
    final name. Raises Refused if `folder` is there and not empty, or cannot be replaced."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is not empty, or no folder")
    if folder.exists() and (os.path.ismount(folder) or os.path.samefile(folder, ".")):
        raise Refused(f"{folder} is a mount point, or where you are: name a new folder, such as one in it")
    folder = folder.resolve()
    tmp = temporary(folder)
    made = [p for p in folder.parents if not p.exists()]
    tmp.mkdir(parents=True)
    try:
        yield tmp
        for path in tmp.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as f:
                    os.fsync(f.fileno())
        if folder.exists():  # empty: elsewhere than on POSIX a rename does not replace it
            folder.rmdir()
        tmp.rename(folder)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
        remove_empty(made)


def remove_empty(folders):
    """Remove folders, the innermost first, up to one that is not empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def put_aside(path):
    """Move a file of ours that nothing names to `orphans` beside it."""
    folder, number = path.parent / "orphans", 0
    folder.mkdir(exist_ok=True)
    while (target := folder / (path.name + f".{number}" * (number > 0))).exists():
        number += 1
    path.rename(target)
    print(f"{path} is named by no manifest: moved to {target}", file=sys.stderr)


def latest_run():
    """Return the run folder under runs/ whose manifest was written last. Raises Refused if there is none."""
    manifests = pathlib.Path("runs").glob("*/manifest.json")
    if not (last := max(manifests, key=lambda p: p.stat().st_mtime, default=None)):
        raise Refused("no run folder under runs/: start one with train.py, or name one with --run")
    return last.parent

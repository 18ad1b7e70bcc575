"""Read what nobody can be trusted to have written, and write so that a kill loses nothing."""

import contextlib
import json
import os
import pathlib
import re
import shutil

from plumbing import Refused
from plumbing.processes import rank_and_size

NAME, SHA = re.compile(r"\w[\w.-]{0,63}"), re.compile(r"[0-9a-f]{64}")


def validate(value, form, where):
    """Return the value. Raises Refused, naming the field, unless it has this form: a type, pattern, range,
    test or constant; [form] for a list; {key: form} for these keys, where "key?" may be absent; {pattern:
    form} for keys like it; (form, ...) for one of them."""
    if isinstance(form, tuple):
        for option in form[:-1]:
            with contextlib.suppress(Refused):
                return validate(value, option, where)
        return validate(value, form[-1], where)
    if isinstance(form, dict) and isinstance(value, dict):
        likeness = next((key for key in form if isinstance(key, re.Pattern)), None)
        if not likeness:
            form = {key.rstrip("?"): f for key, f in form.items() if key[-1] != "?" or key[:-1] in value}
        for key in value if likeness else dict.fromkeys((*form, *value)):
            if likeness is None and (key not in form or key not in value):
                raise Refused(f"{where}: {key!r} is {'missing' if key in form else 'unknown'}")
            if likeness:
                validate(key, likeness, where)
            validate(value[key], form[likeness or key], f"{where}: {key}")
        return value
    if isinstance(form, list) and isinstance(value, list):
        return [validate(part, form[0], f"{where}[{i}]") for i, part in enumerate(value)]
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


def check_name(option, name):
    """Raise Refused if a name cannot become a file name."""
    if not NAME.fullmatch(name) or len(name.encode()) > 200:
        raise Refused(f"{option} {name!r}: use letters, digits, '_', '-' and '.'")


def refuse_constant(text):
    """Raise ValueError: NaN and infinities are no JSON."""
    raise ValueError(f"{text} is no number")


def refuse_twice(pairs):
    """Return a dict of pairs. Raises ValueError if a key is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise ValueError(f"{next(a for a, b in zip(keys, keys[1:]) if a == b)!r} is there twice")
    return found


def parse_json(text, where):
    """Return what a JSON text holds. Raises Refused if it is not JSON, or an object has a key twice."""
    try:
        return json.loads(text, parse_constant=refuse_constant, object_pairs_hook=refuse_twice)
    except (ValueError, RecursionError) as e:
        raise Refused(f"{where}: not readable as JSON ({e})") from None


def read_text(path, own):
    """Return the text of a file. own: it lies in a run folder. Raises Refused if it is not plain UTF-8."""
    path = pathlib.Path(path)
    if not path.is_file() or own and path.is_symlink():
        raise Refused(f"{path}: no such file" if not path.exists() else f"{path}: not a plain file")
    try:
        return path.read_text(encoding="utf-8")
    except (ValueError, OSError) as e:
        raise Refused(f"{path}: not readable as JSON ({e})") from None


def read_json(path, own=True):
    """Return what a JSON file holds. Raises Refused as `read_text` and `parse_json` do."""
    return parse_json(read_text(path, own), path)


@contextlib.contextmanager
def atomic(path):
    """Give a temporary path beside `path`; on success fsync it and rename it over `path`. So whoever reads,
    even after a kill, finds the old contents or the new, never a part. Only the first process writes."""
    if rank_and_size()[0]:
        yield pathlib.Path(os.devnull)
        return
    path.parent.mkdir(exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.niwf-tmp")
    with open(tmp, "xb"):  # never through a link, never over another file
        pass
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
    final name. Raises Refused if `folder` is there and not empty."""
    folder = pathlib.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Refused(f"{folder} is not empty, or no folder")
    folder = folder.resolve()
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.niwf-tmp")
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
        with contextlib.suppress(OSError):  # Those of a folder that was written are not empty.
            for parent in made:
                parent.rmdir()


def put_aside(path):
    """Move a file of ours that nothing names to `orphans` beside it."""
    folder, number = path.parent / "orphans", 0
    folder.mkdir(exist_ok=True)
    while (target := folder / (path.name + f".{number}" * (number > 0))).exists():
        number += 1
    path.rename(target)
    print(f"{path} is named by no manifest: moved to {target}")


def latest_run(root="runs"):
    """Return the run folder under `root` whose manifest was written last. Raises Refused if there is none."""
    manifests = sorted(pathlib.Path(root).glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not manifests:
        raise Refused(f"no run folder under {root}/: start one with train.py, or name one with --run")
    return manifests[-1].parent

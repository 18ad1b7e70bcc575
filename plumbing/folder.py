"""A run folder on disk: its manifest, its lock, its files, and what must not be there.

It holds `manifest.json`, `versions/<sha256>.safetensors` (named by content, as in git), for every task
`data/<task>.val.json` and `data/<task>.logits.json`, `training.safetensors` while a task is being trained,
`log.jsonl`, and `.lock`. It trusts nobody: what is read is validated whole before it is used, and no symbolic
link is followed. What the manifest does not name is moved to `orphans`; temporary files are removed.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from plumbing import Refused
from plumbing.backbone import fingerprint, is_backbone, load_backbone, place_of
from plumbing.files import SHA, atomic, put_aside, read_json, remove_empty, validate
from plumbing.manifest import DIGEST, MANIFEST, contradictions
from plumbing.processes import first_alone
from plumbing.prompts import today
from plumbing.records import read_records
from plumbing.training import STATE, task_in_training
from plumbing.versionfile import read_version_file

OLDER = {"targets": "all", "passes": "two", "bare_layers": 0}  # settings that older run folders lack
PLACES = dict.fromkeys(("versions", "versions/orphans", "data", "data/orphans"), "folder")
PLACES |= dict.fromkeys(("manifest.json", "log.jsonl", STATE, ".lock"), "file")
# What may lie in a folder of ours before its manifest.
BEGUN = re.compile(r"\.lock|\.manifest\.json\.[0-9a-f]+\.niwf-tmp").fullmatch


class Folder:
    """A run folder: one backbone, the settings fixed by its first task, and its versions in the order of
    commitment. `manifest` says all of that. Raises Refused as `read`."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.manifest_file, self.state_file = self.folder / "manifest.json", self.folder / STATE
        self.read()

    def read(self):
        """Take the manifest from disk. Raises Refused if the folder is not ours, holds a symbolic link where
        a file of ours belongs, or a manifest that is not whole."""
        self.manifest = {"format": 1, "backbone": None, "settings": {}}
        self.manifest |= {"versions": [], "results": [], "compositions": []}
        for name, kind in PLACES.items():
            path = self.folder / name
            plain = path.is_dir if kind == "folder" else path.is_file
            if path.is_symlink() or path.exists() and not plain():  # it may be made between the two
                raise Refused(f"{path}: a link, or no plain {kind}")
        if self.manifest_file.exists():
            self.manifest = read_json(self.manifest_file)
            self.check_manifest()
            if settings := self.manifest["settings"]:  # none are left when the last version is taken out
                settings.update({**OLDER, **settings})
                settings.pop("fixed_coordinate", None)
                if not self.tasks and self.unnamed() and not self.state_file.exists():
                    why = "names no version, but versions/ holds some: restore it, or move them away"
                    raise Refused(f"{self.manifest_file}: {why}")
        elif self.folder.exists() and not (self.folder.is_dir() and all(map(BEGUN, os.listdir(self.folder)))):
            raise Refused(f"{self.folder}: not a run folder (no manifest.json); nothing is written there")

    def check_manifest(self):
        """Raise Refused if the manifest has not the form of one, or its parts contradict each other."""
        validate(self.manifest, MANIFEST, self.manifest_file)
        for why in contradictions(self.manifest):
            raise Refused(f"{self.manifest_file}: {why}")

    @property
    def tasks(self):
        """The names of the committed tasks, in order."""
        return [v["task"] for v in self.manifest["versions"]]

    @property
    def entries(self):
        """The manifest's entries of all versions and compositions."""
        return self.manifest["versions"] + self.manifest["compositions"]

    @property
    def shared(self):
        """Whether all versions share one live bank, field and dynamics."""
        return bool(self.manifest["versions"]) and self.manifest["versions"][-1]["lock"] in ("soft", "none")

    def refuse_shared(self):
        """Raise Refused if versions are of another lock than the exact one."""
        if self.shared:
            raise Refused(
                f"{self.folder}: its versions share one bank (no exact lock), so none can be taken alone"
            )

    @property
    def template(self):
        """How prompts are written, see `prompt_of`."""
        return self.manifest["settings"]["template"]

    @property
    def day(self):
        """The day that a chat template is told if it asks, on whatever day that is: when the run's first task
        began or, in an older run folder, was committed."""
        first = self.manifest["versions"][0]["date"][:10] if self.tasks else today()
        return self.manifest["settings"].get("day", first)

    def path(self, digest):
        """Return the file of a version."""
        return self.folder / "versions" / f"{digest}.safetensors"

    def measured(self, entry):
        """Return the row of results for a version, or None."""
        return next((row for row in self.manifest["results"] if row["version"] == entry["hash"]), None)

    def data_file(self, task, kind):
        """Return a file of a task. kind "val": the validation records that it is measured on, now and after
        every later task. "logits": digests of the logits that each had when the task was committed."""
        return self.folder / "data" / f"{task}.{kind}.json"

    def files(self, entry):
        """Return the files that a version or composition has."""
        data = [self.data_file(entry["task"], kind) for kind in ("val", "logits")]
        return [self.path(entry["hash"])] + data * (entry["lock"] != "composed")

    def in_training(self):
        """Return whether there is the state of a training whose task is not committed yet."""
        return self.state_file.exists() and task_in_training(self.state_file) not in self.tasks

    def unnamed(self):
        """Return version files that the manifest does not name: a command was killed before it could, or
        after it no longer did."""
        named = {e["hash"] for e in self.entries}
        files = [p for p in (self.folder / "versions").glob("*.safetensors") if SHA.fullmatch(p.stem)]
        return [p for p in files if p.stem not in named and p.is_file() and not p.is_symlink()]

    def validation(self, task):
        """Read a task's validation records. Raises Refused if they are not there, or not whole."""
        return read_records(self.data_file(task, "val"), self.template, own=True)

    @first_alone
    def keep_validation(self, task, records):
        """Write a task's validation records. What is in their place is put aside."""
        path, text = self.data_file(task, "val"), json.dumps(records)
        if path.exists() and not (path.is_file() and path.read_bytes() == text.encode()):
            put_aside(path)
        with atomic(path) as tmp:
            tmp.write_text(text)

    def digests(self, task):
        """Read a task's digests. Raises Refused if they are not there, or not one for each record."""
        path = self.data_file(task, "logits")
        digests = validate(read_json(path), [DIGEST], path)
        if len(digests) != (records := len(self.validation(task))):
            raise Refused(f"{path}: {len(digests)} digests for {records} validation records")
        return digests

    def namesake(self, name):
        """Return our name that equals this one but for capitals, or None: on some disks both are one file."""
        return next((e["task"] for e in self.entries if e["task"].lower() == name.lower()), None)

    def find(self, name):
        """Return the entry of a name or start of a hash, as in git. Raises Refused unless just one fits."""
        by_name = [e for e in self.entries if e["task"] == name]
        found = by_name or [e for e in self.entries if len(name) >= 4 and e["hash"].startswith(name.lower())]
        if len(found) != 1:
            which = "no version is" if not found else "more than one version is"
            raise Refused(f"{self.folder}: {which} called {name!r}; see `python commit.py log`")
        return found[0]

    def head(self, entry):
        """Read what the file of an entry says of itself. Raises Refused as `read_version_file` does, and if
        the manifest says otherwise."""
        head, _ = read_version_file(self.path(entry["hash"]))
        self.agree(entry, head["task"], head["lock"])
        return head

    def agree(self, entry, task, lock):
        """Raise Refused if a version's file is of another task or lock than the manifest's entry says."""
        if (task, lock) != (entry["task"], entry["lock"]):
            said = f"{entry['task']} with lock {entry['lock']}"
            raise Refused(f"{self.manifest_file}: {said}, but its file is {task} with {lock}")

    def check_settings(self, made):
        """Raise Refused if the first version was made with other settings than the manifest says."""
        made = {**OLDER, "day": self.manifest["versions"][0]["date"][:10], **made}
        for key, value in {**self.manifest["settings"], "day": self.day}.items():
            if made.get(key) != value:
                raise Refused(f"{self.manifest_file}: settings: {key} {value}, not {made.get(key)}")

    @contextlib.contextmanager
    def exclusive(self):
        """Within this block no other process changes the run folder. The lock dies with its process. If
        nothing comes of the block, no empty folder is left. Raises Refused if it is taken, and as `read`."""
        with contextlib.ExitStack() as held:
            self.lock(held)
            self.read()  # as the other process may just have left it
            yield self

    @first_alone
    def lock(self, held):
        """Take the lock of `exclusive`, until the stack `held` is closed. Raises Refused if it is taken."""
        made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl:
            f = held.enter_context(open(self.folder / ".lock", "a"))
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.path.samestat(os.stat(self.folder / ".lock"), os.fstat(f.fileno())):
                    raise FileNotFoundError  # who held it has removed it since it was opened, see `leave`
            except (BlockingIOError, FileNotFoundError):
                raise Refused(f"{self.folder}: another process is at work on it; wait") from None
        held.callback(self.leave, made)

    def leave(self, made):
        """Remove the lock file and the folders that were made, if nothing else is in them."""
        if os.listdir(self.folder) in ([], [".lock"]):
            (self.folder / ".lock").unlink(missing_ok=True)
            remove_empty(made)

    @first_alone
    def save(self, removed=()):
        """Write the manifest, once it is seen that it can be read again; then remove files that it no longer
        names, and tidy up after killed commands."""
        self.check_manifest()
        with atomic(self.manifest_file) as tmp:
            tmp.write_text(json.dumps(self.manifest, indent=1), encoding="utf-8")
        litter = [p for part in (".", "versions", "data") for p in (self.folder / part).glob(".*.niwf-tmp")]
        if not self.in_training():
            litter.append(self.state_file)
        for path in [*removed, *litter]:
            if path.is_file() and not path.is_symlink():
                path.unlink()
        for path in [] if self.in_training() else self.unnamed():  # a training writes it again
            put_aside(path)

    def enter(self, entry):
        """Put an entry where it belongs in the manifest."""
        self.manifest["compositions" if entry["lock"] == "composed" else "versions"].append(entry)

    def commit(self, version):
        """Add a version: its file first, then the manifest that names it. A kill in between leaves an unnamed
        file, which the same training writes again under the same name."""
        version.save(self.folder / "versions")
        entry = {"hash": version.hash, "task": version.task, "lock": version.lock}
        self.enter({**entry, "date": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.save()

    def take(self, other, entries):
        """Take in entries of another run folder, with their files and results. Raises Refused, with nothing
        changed, if another file is in the way."""
        copies = {source: target for e in entries for source, target in zip(other.files(e), self.files(e))}
        for source, target in copies.items():
            if target.exists() and target.read_bytes() != source.read_bytes():
                raise Refused(f"{target}: another file is in the way; move it")
        for source, target in copies.items():
            with atomic(target) as tmp:
                shutil.copyfile(source, tmp)
        for e in entries:
            self.enter(e)
            self.manifest["results"] += [r for r in other.manifest["results"] if r["version"] == e["hash"]]
        if entries:
            self.save()

    def open_backbone(self, name, device, device_map=None):
        """Load the backbone; the first is put into the manifest, which `save` alone writes. Return (backbone,
        tokenizer). Raises Refused if the run folder belongs to another backbone."""
        backbone, tokenizer = load_backbone(name, device, device_map)
        owner = self.manifest["backbone"]
        if owner and not is_backbone(backbone, owner["fingerprint"]):
            raise Refused(f"{self.folder} belongs to another backbone than {name}: {owner['name']}")
        if not owner:
            self.manifest["backbone"] = {"name": place_of(name), "fingerprint": fingerprint(backbone)}
        return backbone, tokenizer

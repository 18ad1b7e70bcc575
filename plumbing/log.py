"""Describe a run folder's versions, list them, and check what may be removed, composed or merged. Parse the
command line of commit.py."""

import argparse

from plumbing import Refused
from plumbing.command import Parser, number
from plumbing.files import check_name


def describe(run, entry):
    """Return everything that a manifest and a version's header say about it, as a dict."""
    path, head = run.path(entry["hash"]), run.head(entry)
    readers = [e["hash"] for e in dependents(run, entry["hash"])]
    about = {**head, **entry, "bytes": path.stat().st_size, "read_by": readers}
    if row := run.measured(entry):
        about["perplexity"] = {k: row[k][entry["task"]] for k in ("base", "stored", "routed")}
    return about


def dependents(run, digest):
    """Return the entries that stand on a version: they read its bases, or were trained from its shared bank
    (soft lock and none)."""
    after = run.entries[[e["hash"] for e in run.entries].index(digest) + 1 :]
    return [e for e in after if e["lock"] in ("soft", "none") or digest in run.head(e)["reads"]]


def log(abouts):
    """Yield the lines of `python commit.py log`: newest first, as in git. abouts: what `describe` says of
    every version."""
    for about in sorted(reversed(abouts), key=lambda about: about["date"], reverse=True):
        reads = [digest[:12] for digest in about["reads"]]
        yield f"* version {about['hash'][:12]}  {about['task']}  (lock: {about['lock']})"
        yield f"| Date:   {about['date']}"
        if about["lock"] == "composed":
            yield "|         " + " + ".join(f"{w:g} x {digest}" for digest, w in zip(reads, about["weights"]))
        else:
            yield f"|         writes {about['writes']} bases, reads {', '.join(reads) or 'nothing'}"
            size = f"{about['n']} coordinates, tau {about['tau']:.2f}, {about['anchors']} anchors"
            yield f"|         region of {size}"
        if "perplexity" in about:
            base, stored, routed = about["perplexity"].values()
            yield f"|         perplexity {base:.3f} before, {stored:.3f} stored, {routed:.3f} routed"
        yield "|"


def without(manifest, hashes, tasks):
    """Take versions with these hashes and names out of a manifest, which is returned."""
    for kind in ("versions", "compositions"):
        manifest[kind] = [e for e in manifest[kind] if e["hash"] not in hashes]
    manifest["results"] = [row for row in manifest["results"] if row["version"] not in hashes]
    for row in manifest["results"]:
        for column in (c for c in row.values() if isinstance(c, dict)):
            for task in tasks & {*column}:
                del column[task]
    if not manifest["versions"]:
        manifest["settings"] = {}
    return manifest


def removable(run, name, cascade):
    """Return the entry of a version, and those of all that stand on it. Raises Refused if some do, unless
    `cascade`."""
    gone = [run.find(name)]
    for entry in gone:
        gone += [e for e in dependents(run, entry["hash"]) if e not in gone]
    if len(gone) > 1 and not cascade:
        readers = ", ".join(e["task"] for e in gone[1:])
        raise Refused(f"{gone[0]['task']} is read by {readers}; --cascade removes them too")
    return gone


def composable(run, names, weights, name):
    """Return the hashes of what is to be composed: of the versions called `names`, or of all. weights: None,
    or one for each. Raises Refused if nothing can be made of them, or not under this name."""
    entries = [run.find(n) for n in names] or run.manifest["versions"]
    check_name("--name", name)
    if not entries:
        raise Refused(f"{run.folder}: nothing has been committed there yet")
    if weights is not None and len(weights) != len(entries):
        raise Refused(f"--weights: there are {len(entries)} versions, and {len(weights)} weights")
    if weights is not None and not any(weights):
        raise Refused("--weights: all are 0, and nothing would be composed")
    run.refuse_shared()
    for e in entries:
        if run.head(e)["lock"] == "composed":
            raise Refused(f"{e['task']} is a composition itself: compose its versions")
    if taken := run.namesake(name):
        raise Refused(f"{run.folder} already has a version called {taken}")
    return [e["hash"] for e in entries]


def mergeable(run, other):
    """Return the entries that another run has and this one lacks. Raises Refused if the two have no first
    version in common, if names clash, or if a version is not measured."""
    ours, theirs = run.manifest, other.manifest
    if not theirs["versions"]:
        raise Refused(f"{other.folder}: no versions to merge")
    if not ours["versions"] or ours["versions"][0]["hash"] != theirs["versions"][0]["hash"]:
        raise Refused(f"{run.folder} and {other.folder} have no common first version, so no coordinates")
    if ours["backbone"]["fingerprint"] != theirs["backbone"]["fingerprint"]:
        raise Refused(f"{other.folder} belongs to another backbone than {run.folder}")
    for folder in (run, other):
        folder.refuse_shared()
        for entry in folder.manifest["versions"]:
            if not folder.measured(entry):
                raise Refused(f"{folder.manifest_file}: {entry['task']} is not measured: train.py does")
    known = {e["hash"] for e in run.entries}
    new = [e for e in other.entries if e["hash"] not in known]
    for entry in new:
        if run.namesake(entry["task"]):
            raise Refused(f"both runs have a version called {entry['task']}; roll one back")
    return new


def parse_command(doc, argv=None):
    """Parse a command of commit.py, whose docstring is `doc`."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--run", help="run folder [the latest under runs/]")
    common.add_argument("--json", action="store_true", help="print JSON")
    parser = Parser(doc, prog="commit.py")
    commands = parser.add_subparsers(dest="command", required=True, help="each has a --help of its own:")

    def command(name, help, version=False):
        p = commands.add_parser(name, help=help, doc=doc, description=help, parents=[common])
        if version:
            p.add_argument("version", help="a task, or the start of a hash")
        return p.add_argument

    command("log", "the versions, newest first")
    command("show", "everything about one version", version=True)
    ask = command("verify", "recompute every hash and every anchor; or ask a server that has an export")
    ask("--at", metavar="URL", help="of a server that speaks OpenAI's protocol: ask it what --expected says")
    ask("--expected", metavar="FILE", help="an export's expected.json")
    ask("--model", metavar="NAME", help="under which the server has the export [its task]")
    add = command("rollback", "take a version out", version=True)
    add("--cascade", action="store_true", help="and those that stand on it")
    add = command("compose", "a gating over several versions")
    add("versions", nargs="*", help="tasks, or starts of hashes; none: all, with --like")
    add("--weights", nargs="+", type=number(float, -1e6, 1e6), help="one for each of them")
    add("--like", metavar="FILE", help="find the weights on these labelled records; loads the backbone")
    add("--name", required=True, help="what the composition is called")
    add("--backbone", help="where the backbone lies now [where it was]")
    add = command("merge", "take in another run's versions")
    add("other", metavar="OTHER_RUN", help="its run folder")
    add = command("export", "write a LoRA adapter in PEFT's format", version=True)
    add("--to", required=True, metavar="DIR", help="a new or an empty folder")
    add("--merged", action="store_true", help="a whole checkpoint in place of an adapter")
    add("--backbone", help="where the backbone lies now [where it was]")
    add("--push", metavar="OWNER/NAME", help="upload it to the Hub, too, where a new repository is private")
    args = parser.parse_args(argv)
    if args.command == "verify" and (bool(args.at) != bool(args.expected) or args.model and not args.at):
        parser.error("--at and --expected go together, and --model with them")
    if args.command == "compose":
        if args.backbone and not args.like:
            parser.error("--backbone goes with --like: nothing else runs it")
        if args.like and args.weights or not args.like and not (args.weights and args.versions):
            parser.error("compose takes versions and their --weights, or --like FILE, which finds weights")
    return args

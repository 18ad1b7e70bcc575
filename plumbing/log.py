"""What a run folder's manifest says of its versions: about one, in a log, and without some."""


def describe(run, entry):
    """Return everything that a manifest and a version's header say about it, as a dict."""
    path, head = run.path(entry["hash"]), run.head(entry)
    readers = [e["hash"] for e in dependents(run, entry["hash"])]
    about = {**head, **entry, "bytes": path.stat().st_size, "read_by": readers}
    for row in run.manifest["results"]:
        if row["version"] == entry["hash"]:
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
    for about in sorted(abouts, key=lambda about: about["date"], reverse=True):
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

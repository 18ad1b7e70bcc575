"""The forms of what a run folder holds in JSON, and what in its manifest can contradict itself."""

import re

from plumbing.files import NAME, SHA

COUNT, COUNT_OR_0 = range(1, 2**31), range(2**31)
POSITIVE = lambda x: type(x) in (int, float) and 0 < x < 1e300
NOT_NEGATIVE = lambda x: x == 0 and type(x) in (int, float) or POSITIVE(x)
DATE, DAY = re.compile(r"[\d :-]{19}", re.ASCII), re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
DIGEST, LIST = re.compile("[0-9a-f]{16}"), re.compile(r"[\w.]+(,[\w.]+)*")
LOCKS = ("first", "exact", "soft", "none")  # of a version; the first had nothing to protect
# fmt: off
VERSION = {"task": NAME, "lock": LOCKS, "reads": [SHA], "writes": COUNT, "top_k": COUNT, "n": COUNT,
           "tau": NOT_NEGATIVE, "anchors": COUNT, "fixed?": False, "config": {NAME: (str, float, bool, None)}}
COMPOSITION = {"task": NAME, "lock": "composed", "reads": [SHA], "weights": [float]}

SETTINGS = {"rank": COUNT, "alpha": NOT_NEGATIVE, "coord_dim": COUNT, "pool": ("prompt", "sequence"),
            "probe": ("bare", "adapted"), "template": ("alpaca", "chat"),  # what a run's first task fixes
            # older run folders lack these: two passes, all targets, and a day that is their first version's
            "passes?": ("one", "two"), "bare_layers?": COUNT_OR_0, "targets?": LIST,
            "day?": DAY, "fixed_coordinate?": False, "prompts?": DIGEST}  # prompts: with --template chat
ENTRY = {"hash": SHA, "task": NAME, "lock": LOCKS, "date": DATE}
DRIFT = ("inside_at_commit", "inside_now", "moved", "spread", "lock_loss", "top_k_kept")
PERPLEXITIES, COUNTS = {NAME: POSITIVE}, {NAME: {NAME: COUNT_OR_0}}
RESULT = {"task": NAME, "version": SHA, "base": PERPLEXITIES, "stored": PERPLEXITIES, "routed": PERPLEXITIES,
          "routing": COUNTS, "inside": COUNTS, "identical": {NAME: [COUNT_OR_0, COUNT_OR_0]},
          "gating": {NAME: {"sets": POSITIVE, "bases": POSITIVE}},
          "drift": {NAME: dict.fromkeys(DRIFT, NOT_NEGATIVE)}}
MANIFEST = {"format": 1, "backbone": (None, {"name": str, "fingerprint": SHA}),
            "settings": ({}, SETTINGS), "versions": [ENTRY], "results": [RESULT],
            "compositions": [{**ENTRY, "lock": "composed"}]}
# fmt: on


def contradictions(manifest):
    """Yield what is wrong with a manifest whose parts have the right form."""
    versions, rows = manifest["versions"], manifest["results"]
    entries, locks = versions + manifest["compositions"], [v["lock"] for v in versions]
    for key in ("task", "hash"):
        if len({e[key] for e in entries}) < len(entries):
            yield f"two versions have one {key}"
    if locks and (locks[0] != "first" or not ({*locks[1:]} <= {"exact"} or {*locks[1:]} <= {"soft", "none"})):
        yield f"versions cannot have the locks {locks}"
    if entries and not (versions and manifest["settings"] and manifest["backbone"]):
        yield "versions, settings or backbone are missing"
    measured = {row["version"] for row in rows}
    wanted = [(v["hash"], v["task"]) for v in versions if v["hash"] in measured]
    if [(row["version"], row["task"]) for row in rows] != wanted:
        yield "results: rows of other tasks than versions, or in another order"
    for row in rows:
        tasks = {*row["base"]}
        if row["task"] not in tasks or tasks - {v["task"] for v in versions}:
            yield "results: a row without its task, or of unknown ones"
        elif any({*row[key]} != tasks for key in "stored routed routing inside identical gating".split()):
            yield "results: a row with holes"
        elif any(t not in row["inside"][t] for t in tasks):
            yield "results: a row that does not count its own region"
        elif any(not 0 < sum(row["routing"][t].values()) == row["identical"][t][1] for t in tasks):
            yield "results: a row that counts other examples than there are"
        elif any(row["identical"][t][0] > row["identical"][t][1] for t in tasks):
            yield "results: a row that counts what is not there"

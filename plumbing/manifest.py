"""The form of a run folder's manifest, and what in it can contradict itself."""

import re

from plumbing.files import NAME, SHA
from plumbing.versionfile import COUNT, LOCKS, NOT_NEGATIVE, POSITIVE

DATE = re.compile(r"[\d :-]{19}", re.ASCII)
COUNT_OR_0 = range(2**31)
# fmt: off
SETTINGS = {"rank": COUNT, "alpha": NOT_NEGATIVE, "coord_dim": COUNT, "pool": ("prompt", "sequence"),
            "probe": ("bare", "adapted"), "template": ("alpaca", "chat"),  # what a run's first task fixes
            "passes?": ("one", "two"), "bare_layers?": COUNT_OR_0,  # older run folders lack them: two passes
            "targets?": re.compile(r"[\w.]+(,[\w.]+)*"),  # older run folders lack it: it was all
            "day?": re.compile(r"\d{4}-\d\d-\d\d", re.ASCII), "fixed_coordinate?": False}
ENTRY = {"hash": SHA, "task": NAME, "lock": LOCKS, "date": DATE}
DRIFT = ("inside_at_commit", "inside_now", "moved", "spread", "lock_loss", "top_k_kept")
PERPLEXITIES, COUNTS = {NAME: POSITIVE}, {NAME: {NAME: COUNT_OR_0}}
RESULT = {"task": NAME, "version": SHA, "base": PERPLEXITIES, "stored": PERPLEXITIES, "routed": PERPLEXITIES,
          "routing": COUNTS, "inside": COUNTS, "identical": {NAME: [COUNT_OR_0]},
          "gating": {NAME: {"sets": POSITIVE, "bases": POSITIVE}},
          "drift": {NAME: dict.fromkeys(DRIFT, NOT_NEGATIVE)}}
MANIFEST = {"format": 1, "backbone": (None, {"name": str, "fingerprint": SHA}),
            "settings": ({}, SETTINGS), "versions": [ENTRY], "results": [RESULT],
            "compositions": [{**ENTRY, "lock": "composed"}]}
# fmt: on


def contradictions(manifest):
    """Return {what can be wrong with a manifest whose parts have the right form: whether it is}."""
    versions, rows = manifest["versions"], manifest["results"]
    entries = versions + manifest["compositions"]
    tasks, locks = {v["hash"]: v["task"] for v in versions}, [v["lock"] for v in versions]
    whole = not entries or versions and manifest["settings"] and manifest["backbone"]
    orders = (
        ["first", *["exact"] * (len(locks) - 1)],
        ["first", *(k for k in locks[1:] if k in ("soft", "none"))],
    )
    measured = {row["version"] for row in rows}
    twice = lambda values: len(values) > len({*values})
    holes = lambda row: (
        any(
            {*row[key]} != {*row["base"]}
            for key in ("stored", "routed", "routing", "inside", "identical", "gating")
        )
        or any(t not in row["inside"][t] or len(row["identical"][t]) != 2 for t in row["base"])
        or any(same > of for same, of in row["identical"].values())
    )
    return {
        "two versions have one name": twice([e["task"] for e in entries]),
        "two versions have one hash": twice([e["hash"] for e in entries]),
        f"versions cannot have the locks {locks}": locks and locks not in orders,
        "versions, settings or backbone are missing": not whole,
        "results: rows in another order than versions": [v["hash"] for v in versions if v["hash"] in measured]
        != [row["version"] for row in rows],
        "results: a row of another task": any(tasks.get(row["version"]) != row["task"] for row in rows),
        "results: a row without its task": any(row["task"] not in row["base"] for row in rows),
        "results: a row of unknown tasks": any({*row["base"]} - {*tasks.values()} for row in rows),
        "results: a row with holes": any(holes(row) for row in rows),
    }

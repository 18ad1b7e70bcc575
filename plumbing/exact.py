"""Count the answers that are right to the letter."""

import collections


def exact_match(task, records, ask, wanted_of, show=0):
    """Count a task's records whose answer is the text that is trained, and print a line for each kind of
    instruction (a record's "kind"; a record without one counts under its task). -> {kind: [right, of]}

    ask(records) yields (text, who answered); wanted_of(record) is what was trained. Print `show` of them."""
    kinds = collections.defaultdict(lambda: [0, 0])
    for i, (record, (text, who)) in enumerate(zip(records, ask(records))):
        wanted = wanted_of(record)
        right = text.strip() == wanted.strip()
        count = kinds[record.get("kind", task)]
        count[0], count[1] = count[0] + right, count[1] + 1
        if show and i % max(1, len(records) // show) == 0:
            asked = record["instruction"] + (f" | {record['input']}" if record.get("input") else "")
            wrong = "" if right else f"   expected {wanted!r}"
            print(f"[{who}] {asked}\n    {text!r}{wrong}")
    right, n = (sum(c) for c in zip(*kinds.values()))
    print(f"\n{task}: {right} of {n} answers exactly right ({100 * right / n:.1f} %)")
    for kind, (hits, of) in sorted(kinds.items(), key=lambda k: -k[1][0] / k[1][1]):
        print(f"  {kind:16} {hits:3} of {of:3}  {100 * hits / of:5.1f} %")
    return dict(kinds)

"""Read records, divide them between training and validation, and account for every one of them."""

import argparse
import collections
import dataclasses
import itertools
import json
import random
import re

from huggingface_hub import hf_hub_download

from plumbing import HOME, Refused
from plumbing.backbone import hub_or_cache
from plumbing.datafile import rows_of
from plumbing.files import read_json
from plumbing.forms import BAD, GOOD, own_record, plain_record
from plumbing.passes import context_of
from plumbing.prompts import encode, refuse_left_out

DATA = HOME / "assets" / "data"
FEW = 10  # training prompts
HUB_DATA = {
    "alpaca": ("yahma/alpaca-cleaned", "alpaca_data_cleaned.json"),
    "code": ("sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json"),
}


@dataclasses.dataclass
class Source:
    """The records of a file in its order, and what became of those that are not used."""

    path: object
    records: list
    read: int
    tally: collections.Counter  # {reason: number of records}
    ignored: set  # keys

    def account(self):
        """One line in which all that were read are counted once."""
        parts = [f"{n} {what}" for what, n in self.tally.items() if n]
        return f"{self.path}: {self.read} read: {', '.join(parts)}"

    def say(self):
        """Print that line, and what a reader may expect to be used and is not."""
        print(f"data      {self.account()}")
        if self.ignored:
            names = sorted(key if key.isprintable() else ascii(key) for key in self.ignored)
            more = f" and {len(names) - 12} more" if len(names) > 12 else ""
            print(f"          ignored: {', '.join(name[:40] for name in names[:12])}{more}")
        turns = [any(m["role"] == "assistant" for m in r.get("history", ())) for r in self.records]
        if any(turns):
            print(f"          {sum(turns)} chats hold several answers: the last of each is learned")


def read_source(path, template):
    """Read a file of records: a JSON list, JSON lines, or an object that holds one list of records. Raises
    Refused, with the number of the record and of its line, if one cannot be used; see `plain_record`."""
    rows, ignored = rows_of(path)
    said = lambda key: {str(row.get(key, True)).lower() for _, row in rows if isinstance(row, dict)}
    verdicts = [key for key in ("label", "kto_tag") if said(key) <= {*GOOD, *BAD, "none"}]  # else a class
    found = [plain_record(row, where, template, verdicts, ignored) for where, row in rows]
    tally = collections.Counter(aside for _, aside in found if aside)
    return Source(path, [plain for plain, aside in found if not aside], len(rows), tally, ignored)


def read_records(path, template="alpaca", own=False):
    """Return the plain records of a file. own: it is of a run folder. Raises Refused like `read_source`."""
    if not own:
        return read_source(path, template).records
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise Refused(f"{path}: expected a JSON list of records")
    return [own_record(row, f"{path}: record {i}", template) for i, row in enumerate(rows, 1)]


def prompt_key(record):
    """All that is asked: two records with the same are never on two sides."""
    asked = json.dumps(record.get("history", [])), json.dumps(record.get("tools", []))
    return record["instruction"], record.get("input", ""), *asked


def by_prompt(source):
    """Return {prompt: [records]} with all distinct answers to each; exact repeats are counted."""
    found = collections.defaultdict(dict)
    for record in source.records:
        found[prompt_key(record)].setdefault(record["output"], record)
    source.tally["repeats"] += len(source.records) - sum(map(len, found.values()))
    return {prompt: [*answers.values()] for prompt, answers in found.items()}


def take_usable(records, tokenizer, args, option):
    """Return the first usable records, as many as the option says, their encoding, a tally of the rest."""
    count, kept, examples, tally = getattr(args, option), [], [], collections.Counter()
    for record in records:
        if len(kept) == count:
            break
        if not record["instruction"].strip() or not record["output"].strip():
            tally["empty"] += 1
            continue
        example = encode(record, tokenizer, args.template, getattr(args, "day", None))
        if len(example[0]) + len(example[1]) > args.max_len:
            tally[f"over {args.max_len} tokens"] += 1
            continue
        kept.append(record)
        examples.append(example)
    unneeded = f"not needed (--{option.replace('_', '-')} {count})"
    tally[unneeded] = len(records) - len(kept) - tally.total()
    return kept, examples, tally


def read_examples(path, backbone, tokenizer, template, day):
    """Return the examples of a file of a few labelled records, each of which is to count. Raises Refused as
    `read_source` does, and if a record is not usable, is too long for the backbone, or none is there."""
    source = read_source(path, template)
    refuse_unwritten(source, tokenizer, template, day)
    longest = context_of(backbone) or 2048
    how = argparse.Namespace(template=template, day=day, max_len=longest, like=len(source.records))
    _, examples, tally = take_usable(source.records, tokenizer, how, "like")
    if not len(examples) == source.read > 0:
        source.tally = {"usable": len(examples), **source.tally, **tally}
        raise Refused(f"{source.account()}: all must be usable, and one must be there")
    return examples


def find_data(args):
    """Return (file of training records, file of validation records or None). Raises Refused if there are
    none."""
    if args.data:
        return args.data, args.val_data
    if args.task not in HUB_DATA:
        known = " and ".join(HUB_DATA)
        raise Refused(f"--task {args.task} brings no data of its own ({known} do): name a file with --data")
    if args.backbone == "tiny":
        return DATA / f"{args.task}.train.json", args.val_data or DATA / f"{args.task}.val.json"
    hub_or_cache()
    repository, name = HUB_DATA[args.task]
    try:
        return hf_hub_download(repository, name, repo_type="dataset"), args.val_data
    except Exception as e:  # the hub raises many kinds; to the user they are one
        raise Refused(f"--task {args.task}: {repository} cannot be had ({e}); name a file with --data") from e


def hold_out(answers, prompts, tokenizer, args):
    """Take prompts from the front of a list until a tenth of the records, or what --val-examples asks for, is
    held out with all their answers. -> validation records, a tally of the others, the prompts left"""
    wanted = max(1, min(args.val_examples, sum(map(len, answers.values())) // 10))
    val, tally, pool, prompts = [], collections.Counter(), [], [*prompts]
    while prompts and not val:
        while prompts and len(pool) < wanted:
            pool += answers[prompts.pop(0)]
        val, _, others = take_usable(pool, tokenizer, args, "val_examples")
        tally, pool, wanted = tally + others, [], 1  # none was usable: the next one may be
    return val, tally, prompts


def refuse_unwritten(source, tokenizer, template, day):
    """Raise Refused if records have tools, calls of tools or messages that the chat template never writes."""
    for key in ("tools", "tool_calls"):
        used = any(key in holder for r in source.records for holder in (r, *r.get("history", ())))
        if used and tokenizer.chat_template and not re.search(rf"\b{key}\b", str(tokenizer.chat_template)):
            raise Refused(f"{source.path} has {key!r}, which the tokenizer's chat template does not write")
    refuse_left_out(source.records, tokenizer, template, day, source.path)


def load_data(args, tokenizer):
    """Return (training examples, validation records), and print what became of every record that was read.
    Raises Refused if a side stays empty, or if the template cannot write what a record asks."""
    path, val_path = find_data(args)
    sources = [read_source(file, args.template) for file in (path, val_path) if file]
    source, held = sources[0], sources[-1]
    answers = by_prompt(source)
    prompts = sorted(answers)
    random.Random(args.seed).shuffle(prompts)
    for each in sources:
        refuse_unwritten(each, tokenizer, args.template, getattr(args, "day", None))
    if val_path:
        asked = by_prompt(held)
        kept = [record for records in asked.values() for record in records]
        val, _, others = take_usable(kept, tokenizer, args, "val_examples")
        source.tally[f"asked in {val_path}, too"] = sum(len(answers[p]) for p in prompts if p in asked)
        prompts = [p for p in prompts if p not in asked]
    else:
        val, others, prompts = hold_out(answers, prompts, tokenizer, args)
    # One answer to every prompt, then a second to every prompt that has one: --examples may not reach all.
    in_turn = itertools.zip_longest(*(answers[p] for p in prompts))
    records = [record for turn in in_turn for record in turn if record]
    _, examples, tally = take_usable(records, tokenizer, args, "examples")
    held.tally = collections.Counter(validation=len(val)) + held.tally + others
    source.tally = collections.Counter(training=len(examples)) + source.tally + tally
    if not examples or not val:
        why = "; --val-data FILE takes the validation from another file" if val and not val_path else ""
        if why and len(answers) == 1 < len(source.records):
            why = "; all ask the same, and no prompt is on both sides: name others with --val-data FILE"
        lines = "; ".join(each.account() for each in sources)
        raise Refused(f"no usable records for {'validation' if examples else 'training'}: {lines}{why}")
    for each in sources:
        each.say()
    if len(asked := {(*prompt,) for prompt, _ in examples}) < FEW:
        print(f"          a region fitted to {len(asked)} prompts hardly finds new ones: give {FEW} or more")
    return examples, val

"""Tokens of a text in which nothing that a user wrote becomes a control token, whatever it reads like.

`quoted` puts stand-ins into a record before a template writes it, `ids_of` reads what the template wrote, and
`unquote` gives the text back as it was meant."""

import functools
import json
import re

import tokenizers

from plumbing import Refused

LEAD = "@control-"  # of a stand-in; no template changes these characters, and JSON does not escape them
STAND_IN = re.compile(f"{LEAD}([0-9]*)@")


@functools.lru_cache(maxsize=2)  # what is asked for every record is found once
def control_tokens(tokenizer):
    """Return {text: id} of the tokens that steer a model: special ones, as the end of a turn is, and EOS."""
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # mistral-common's: it finds none in a text
        return {}
    named = {*tokenizer.all_special_ids}  # some tokenizers do not call these special
    return {t.content: i for i, t in added.items() if t.content and (t.special or i in named)}


@functools.lru_cache(maxsize=4)
def one_of(texts):
    """Return a pattern of any of these texts (a tuple), the longest first, as tokenizers look for them."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def quoted(record, tokenizer):
    """Return a record, or an instruction alone, with a stand-in for every control token in its texts: a user
    wrote its name, and did not mean to steer. A stand-in holds the token's id; without an id it stands for
    LEAD itself. Raises Refused if its lists lie too deep in each other."""
    ids = {**control_tokens(tokenizer), LEAD: ""}
    pattern = one_of((*ids,))

    def put(value):
        if isinstance(value, str):
            return pattern.sub(lambda found: f"{LEAD}{ids[found[0]]}@", value)
        if isinstance(value, dict):
            return {put(key): put(part) for key, part in value.items()}
        return [put(part) for part in value] if isinstance(value, list) else value

    try:
        return put({"instruction": record} if isinstance(record, str) else record)
    except RecursionError:
        raise Refused("a record is nested too deeply") from None


def unquote(text, tokenizer):
    """Put the user's words back for the stand-ins."""
    names = {str(i): name for name, i in control_tokens(tokenizer).items()} | {"": LEAD}
    return STAND_IN.sub(lambda found: names[found[1]], text)


@functools.lru_cache(maxsize=2)
def renamed(tokenizer, edge):
    """A copy of a tokenizer's backend whose control tokens have the names `edge` id `edge`, and no others. So
    it reads their old names as text. Raises Refused if the backend cannot be copied so."""
    refused = Refused("this backbone's tokenizer takes the name of a control token in a text for that token")
    if not tokenizer.is_fast:
        raise refused
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    model, control = about["model"], control_tokens(tokenizer)
    names = {t["content"]: t for t in about["added_tokens"] if t["content"] in control}
    for token in names.values():
        token["content"] = f"{edge}{token['id']}{edge}"
    new = lambda name: names[name]["content"] if name in names else name
    if isinstance(model["vocab"], dict):
        model["vocab"] = {new(name): i for name, i in model["vocab"].items()}
    else:  # Unigram has a list of names with their scores
        model["vocab"] = [[new(name), score] for name, score in model["vocab"]]
    if "merges" in model:  # none may make a token whose name is gone
        model["merges"] = [m for m in model["merges"] if {*m, "".join(m)}.isdisjoint(names)]
    if "unk_token" in model:
        model["unk_token"] = new(model["unk_token"])
    about |= dict.fromkeys(("post_processor", "truncation", "padding"))
    copy = tokenizers.Tokenizer.from_str(json.dumps(about))
    if any(copy.token_to_id(token["content"]) != token["id"] for token in names.values()):
        raise refused
    return copy


def ids_of(text, tokenizer):
    """Return the tokens of a text in which `quoted` put stand-ins. Its control tokens are the template's."""
    if LEAD not in text:
        return tokenizer(text, add_special_tokens=False).input_ids
    ids = control_tokens(tokenizer)
    edge = next(c for c in map(chr, range(0xFDD0, 0x110000)) if c not in text)
    text = one_of((*ids,)).sub(lambda found: f"{edge}{ids[found[0]]}{edge}", text)
    return renamed(tokenizer, edge).encode(unquote(text, tokenizer), add_special_tokens=False).ids

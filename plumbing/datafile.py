"""Find the records in a file that somebody else wrote: its text, and the JSON values in it."""

import json
import pathlib
import re

from plumbing import Refused
from plumbing.files import STRICT
from plumbing.forms import ASKED, CHATS, SAID

SPACE = re.compile("[ \t\r\n\ufeff]*")  # a byte-order mark is no text, also where files were joined
TABLE = re.compile(r"\W?(instruction|prompt|question)\W?[,\t;]")
LINES = "write it as JSON lines first: "
FRAME = LINES + "pandas.read_{}({!r}).to_json('data.jsonl', orient='records', lines=True)"
ARROW = LINES + "Dataset.to_json of the package datasets does"
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"PK\x03\x04": "zip"}
MAGIC = {start: (f"packed with {name}", "unpack it first") for start, name in MAGIC.items()}
MAGIC |= {b"PAR1": ("Parquet", FRAME), b"ARROW1": ("Arrow", ARROW), b"\xff\xff\xff\xff": ("Arrow", ARROW)}
MAGIC |= {b"version https://git-lfs": ("a pointer of Git LFS", "fetch the file itself: git lfs pull")}


def text_of_file(path):
    """Return the text of a file in UTF-8, UTF-16 or UTF-32, with a byte-order mark or without. Raises
    Refused, and says what to do, if it is something else."""
    if not path.is_file():
        other = "a folder: name a file in it" if path.is_dir() else "not a plain file"
        raise Refused(f"{path}: {other if path.exists() else 'no such file'}")
    data = path.read_bytes()
    for start, (what, how) in MAGIC.items():
        if data.startswith(start):
            raise Refused(f"{path} is {what}: {how.format(what.lower(), path.name)}")
    encoding = json.detect_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as e:
        how = "iconv -f LATIN1 -t UTF-8 makes UTF-8 of Latin-1" if encoding.startswith("utf-8") else e.reason
        # e.object is the data without its byte-order mark.
        line, byte = e.object.count(b"\n", 0, e.start) + 1, f"byte {e.object[e.start]:#04x}"
        name = encoding.upper().removesuffix("-SIG")
        raise Refused(f"{path}: line {line} is not {name} ({byte}): {how}") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise Refused(f"{path}: line {line} holds a NUL byte: the file is damaged, or no text")
    return text


def values_of(text, path):
    """Return [(where it stands, value)] of the JSON values in a text, which follow one another, as in JSON
    lines. Raises Refused, with the number and the line of the value, if one is not JSON."""
    place, line, counted, values = SPACE.match(text).end(), 1, 0, []
    start = text[place:].partition("\n")[0][:60].strip()
    if start and start[0] not in "[{":
        if path.suffix in (".csv", ".tsv") or TABLE.match(start):
            reader = "table" if "\t" in start else "csv"
            raise Refused(f"{path} is a table: {FRAME.format(reader, path.name)}")
        raise Refused(f"{path}: not readable as JSON: it begins with {ascii(start)}")
    decoder = json.JSONDecoder(**STRICT)
    while place < len(text):
        line, counted = line + text.count("\n", counted, place), place
        where = f"{path}: record {len(values) + 1} (line {line})"
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as e:
            where = f"{path}" if text[place] == "[" and not values else where
            comma = ": records in lines have no comma between them" * (text[place] == ",")
            raise Refused(f"{where}: not readable as JSON ({e}){comma}") from None
        values.append((where, value))
        place = SPACE.match(text, end).end()
    return values


def rows_of(path):
    """Return [(where it stands, record)] of a file, and the keys around its list of records, if there are
    any. The file is a JSON list, JSON lines, or an object that holds one list of records."""
    path = pathlib.Path(path)
    values = values_of(text_of_file(path), path)
    if not values or values[0][1] == []:
        raise Refused(f"{path}: expected a JSON list of records, or JSON lines, and there are none")
    value = values[0][1]
    if len(values) > 1 or not isinstance(value, (list, dict)):
        return values, set()
    if isinstance(value, list):
        return [(f"{path}: record {i}", row) for i, row in enumerate(value, 1)], set()
    holds_records = lambda v: isinstance(v, list) and v and all(isinstance(row, dict) for row in v)
    lists = [key for key, v in value.items() if holds_records(v)]
    known = [key for key in (*ASKED, *SAID, *CHATS, "chosen") if key in value]
    if known and all(value[k] and isinstance(value[k], (list, dict)) and k not in lists for k in known):
        how = "pandas' to_json(orient='records') writes records"
        raise Refused(f"{path} holds columns in place of records: {how}")
    if known or not lists:
        return values, set()
    if len(lists) > 1:
        which = f"more than one list of records ({', '.join(map(repr, lists))})"
        raise Refused(f"{path} holds {which}: put each into a file of its own")
    rows = [(f"{path}: record {i} of {lists[0]!r}", row) for i, row in enumerate(value[lists[0]], 1)]
    return rows, value.keys() - {*lists}

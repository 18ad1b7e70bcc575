"""Turn a record of any common form into the one form that the program uses.

A plain record is {"instruction": what is asked last, "output": the answer that is learned} and, where there
are any, "input", "kind", "history" (the messages before) and "tools" (a list of schemas). It is read from
instruction, input, output (Alpaca); instruction, context, response (Dolly); prompt, completion, as texts or
as messages (TRL); question or query, answer or response; messages, or conversations (ShareGPT).

A key that changes what is asked is used, or the record is refused: nobody should train on half a question.
Every function here that is told `where` raises Refused, naming it, if what it is given has not its form; the
keys that have no use are added to the set `ignored`."""

import json
import re

from plumbing import Refused

ASKED = ("instruction", "prompt", "question", "query")
SAID = ("output", "completion", "response", "answer")
CHATS = ("messages", "conversations", "conversation")
GIVEN = ("input", "context")
SYSTEM = ("system", "system_prompt", "system_message")
OTHERS = ("inputs", "choices", "options", "article", "text", "sentence", "premise", "hypothesis", "code")
PLAIN = ("instruction", "input", "output", "kind", "history", "tools")

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
ROLES |= dict.fromkeys(("human", "prompter"), "user") | dict.fromkeys(("gpt", "model", "bot"), "assistant")
ROLES |= dict.fromkeys(("observation", "function", "ipython", "tool_response"), "tool")
CALLS = ("function_call", "tool_call")  # ShareGPT's roles of a message that is a call, as JSON
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking")  # what a template may write
FLAGS = ("weight", "loss", "train")  # of a message: whether it is learned
GOOD, BAD = ("true", "1", "1.0"), ("false", "0", "0.0", "-1")

LOST = dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "text alone can be learned")
LOST |= dict.fromkeys(("document", "documents", "contexts", "passage", "passages"), "write it into 'input'")
LOST |= dict.fromkeys(("prefix", "suffix", "chat_template_kwargs"), "no template here writes it")
LOST |= {"functions": "list them under 'tools'", "function_call": "write it as 'tool_calls'"}
LOST_IN_RECORD = LOST | {"tool_calls": "they belong to a message"}
LOST_IN_RECORD |= dict.fromkeys(("thinking", "reasoning_content"), "write it into the answer")


def plain_record(record, where, template, verdicts, ignored):
    """Turn a record into (plain record, why its answer must not be learned or None). verdicts: the keys that
    say so, as KTO's label. Raises Refused, too, if something that is asked would be lost."""
    rest = {key: value for key, value in an_object(record, where).items() if value is not None}
    pair = {"chosen", "rejected"} & {*rest}
    if pair and rest.keys().isdisjoint((*SAID, *CHATS)):
        advice = "no preferences are learned: rename 'chosen' to 'completion' to learn it"
        raise Refused(f"{where} is a pair of 'chosen' and 'rejected' without an output; {advice}")
    aside = unlearned(rest, (*verdicts, "weight"), where)
    turns, name = take_turns(rest, where)
    chat = chat_of(turns, f"{where}: {name}", ignored)
    plain = from_chat(chat, where, ignored, "; 'chosen' and 'rejected' are not learned" * bool(pair))
    aside = aside or unlearned({**turns[-1]}, FLAGS, f"{where}: the last message")
    if name == "history":  # of texts, beside which an input may stand: the first that says something
        for key in sorted((key for key in GIVEN if key in rest), key=lambda key: not rest[key])[:1]:
            plain["input"] = a_text(rest, key, where)
            del rest[key]
    plain |= {"kind": rest.pop("kind")} if "kind" in rest else {}
    history, system = plain.get("history", []), next((key for key in SYSTEM if key in rest), None)
    if system and a_text(rest, system, where).strip() and (not history or history[0]["role"] != "system"):
        plain["history"] = [{"role": "system", "content": rest.pop(system)}, *history]
    if tools := tools_of(rest.pop("tools", ""), where):
        plain["tools"] = tools
    check_rest(rest, plain, where, ignored)
    return checked(plain, where, template), aside


def own_record(record, where, template):
    """Return a record of a run folder: a plain one."""
    record = an_object(record, where)
    plain = {key: record[key] for key in PLAIN if record.get(key) not in (None, [])}
    if "history" in plain:
        plain["history"] = chat_of(plain["history"], f"{where}: history", set())
    if "tools" in plain:
        plain["tools"] = tools_of(plain["tools"], where)
    return checked(plain, where, template)


def an_object(value, where):
    if not isinstance(value, dict):
        raise Refused(f"{where} is not a JSON object")
    return value


def a_text(holder, key, where):
    """Return the text under a key, or "" if there is none."""
    if not isinstance(holder.get(key, ""), str):
        raise Refused(f"{where} has something other than text under {key!r}")
    return holder.get(key, "")


def take_turns(rest, where):
    """Take the messages out of a record. -> (messages, what they are called). A question and an answer that
    are texts become two messages, after their history. Where one of them is a list of messages, the other
    one is a message, too."""
    for key in CHATS:
        if key in rest:
            return from_json(rest.pop(key)), key
    given = "input" if rest.get("input") else ""  # It holds the question if no other key does.
    asked = next((key for key in ASKED if rest.get(key) or key in rest and not given), given or ASKED[0])
    said = next((key for key in SAID if key in rest), "completion" if asked == "prompt" else SAID[0])
    texts, turns = not any(isinstance(rest.get(key), list) for key in (asked, said)), []
    for key in (asked, said) if texts else ():
        if not isinstance(rest.get(key), str):
            hint = f" (it has {', '.join(map(ascii, rest))[:80]})" if key not in rest and rest else ""
            raise Refused(f"{where} has no text under {key!r}{hint}")
    if texts and (before := rest.pop("history", None)):
        before = before if isinstance(before, list) else [before]
        pairs = all(isinstance(turn, list) and len(turn) == 2 for turn in before)
        spread = ((role, text) for turn in before for role, text in zip(("user", "assistant"), turn))
        turns = [{"role": role, "content": text} for role, text in spread] if pairs else before
    for role, key in zip(("user", "assistant"), (asked, said)):
        side = rest.pop(key, None)
        turns = turns + (side if isinstance(side, list) else [{"role": role, "content": side}])
    return turns, "history" if texts else f"{asked} and {said}"


def from_chat(turns, where, ignored, hint):
    """Make a plain record of a chat: the last message, of the assistant, is what is learned."""
    *history, prompt, response = [{"role": None}, *turns]
    if response["role"] != "assistant":
        said = f"the last message is of {response['role']!r}, not of the assistant, whose answer is learned"
        raise Refused(f"{where}: {said}{hint}")
    if prompt["role"] != "user":
        before = f"a message of {prompt['role']!r}" if history else "nothing"
        raise Refused(f"{where}: before the last answer stands {before}: only a user's message is answered")
    for key in response.keys() & {*KEPT[1:]}:
        raise Refused(f"{where}: the answer has {key!r}: only its content is learned, so write it there")
    ignored.update(f"{key} of the last messages" for key in {*prompt, *response} & {*KEPT})
    plain = {"instruction": prompt["content"], "output": response["content"]}
    return plain | ({"history": history[1:]} if history[1:] else {})


def chat_of(turns, where, ignored):
    """Return messages in one form: role, content, and what else a template may write."""
    if not isinstance(turns, list) or not turns:
        raise Refused(f"{where}: {ascii(turns)[:60]} holds no messages")
    return [message_of(turn, f"{where}[{i}]", ignored) for i, turn in enumerate(turns)]


def message_of(turn, where, ignored):
    if not isinstance(turn, dict):
        raise Refused(f"{where}: {ascii(turn)[:60]} is not a message")
    rest = {key: value for key, value in turn.items() if value not in (None, [], {})}
    role = rest.pop("role", rest.pop("from", None))
    content = rest.pop("content", rest.pop("value", None))
    if role in CALLS:
        rest["tool_calls"], content, role = content, "", "assistant"
    if role is None:
        raise Refused(f"{where}: 'role' is missing (it has {', '.join(map(ascii, turn))[:80]})")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(dict.fromkeys(ROLES.values()))
        raise Refused(f"{where}: role: {ascii(role)[:40]} is none of {known}")
    refuse_lost(rest, LOST, where)
    if "tool_calls" in rest:
        rest["tool_calls"], content = calls_of(rest["tool_calls"], where), content or ""
    if content is None:
        raise Refused(f"{where}: 'content' is missing")
    ignored.update(f"{key} of messages" for key in rest.keys() - {*KEPT, *FLAGS})
    kept = {key: rest[key] for key in KEPT if rest.get(key)}
    for key in kept.keys() - {"tool_calls"}:
        a_text(kept, key, where)
    return {"role": ROLES[role], "content": text_of_parts(content, where), **kept}


def refuse_lost(rest, lost, where):
    for key in rest.keys() & {*lost}:
        if rest[key]:
            raise Refused(f"{where} has {key!r}, which would be lost: {lost[key]}")


def text_of_parts(content, where):
    """Return the text of a message's content: a text, or a list of parts that all are texts."""
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise Refused(f"{where}: content: {ascii(kind)[:40]} is no text, and text alone can be learned")
        texts.append(text)
    return "".join(texts)


def calls_of(value, where):
    """Return tool calls as templates want them, with the arguments as an object."""
    calls, value = [], from_json(value)
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(f"{where}: {ascii(call)[:60]} is no tool call: it has no name")
        function = {**function, "arguments": from_json(function.get("arguments", {}))}
        calls.append({"type": "function", **(call if "function" in call else {}), "function": function})
    return calls


def tools_of(value, where):
    """Return the schemas of the tools: a list, or the JSON text of one."""
    tools = from_json(value) if value != "" else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refused(f"{where}: tools: {ascii(value)[:60]} is not a list of schemas")
    return tools


def from_json(value):
    """What a JSON text holds; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def unlearned(holder, keys, where):
    """Take out of `holder` what says whether it is to be learned. -> why not, or None"""
    found = None
    for key in [key for key in keys if holder.get(key) is not None]:
        said = str(holder.pop(key)).strip().lower()
        if said in BAD:
            found = f"with {key} {said}" if key in FLAGS else "labelled false"
        elif said not in GOOD:
            raise Refused(f"{where}: {key} is {said[:40]}: an answer is learned (1) or left out (0)")
    return found


def check_rest(rest, plain, where, ignored):
    """Look at the keys that were not used. Raises Refused if one of them changes what is asked."""
    refuse_lost(rest, LOST_IN_RECORD, where)
    rest = {key: value for key, value in rest.items() if value not in ("", [], {})}
    for key, value in rest.items():
        name = key.strip().lower()  # a table may head its columns 'Input'
        if name in (*ASKED, *GIVEN, *SYSTEM, *OTHERS, "history", "tools") and not is_said(value, name, plain):
            how = "beside what is asked, and it would be lost: put it there"
            how = how if name == key else f"in place of {name!r}, and it would be lost: spell it so"
            raise Refused(f"{where} has {key!r} {how}")
    ignored.update(rest)


def is_said(value, name, plain):
    """Return whether a value changes nothing of what a plain record asks: all its texts stand there, or it is
    one text that holds the instruction whole."""
    said = [plain["instruction"], plain.get("input", ""), *(m["content"] for m in plain.get("history", ()))]
    # As whole words, in ASCII: not every script has spaces.
    stands = lambda text: re.search(rf"(?a)(?<!\w){re.escape(text)}(?!\w)", "\n".join(said))
    if name in (*ASKED, "text") and isinstance(value, str) and said[0].strip() and said[0].strip() in value:
        return True
    parts = [value]
    for part in parts:  # the list grows by what is nested
        if isinstance(part, (list, dict)):
            parts += part.values() if isinstance(part, dict) else part
        elif str(part).strip() and not stands(str(part).strip()):
            return False
    return True


def checked(plain, where, template):
    """Return a plain record. Raises Refused if something in it is no text, or not for the template."""
    for key in ("instruction", "output"):
        if not isinstance(plain.get(key), str):
            raise Refused(f"{where} has no text under {key!r}")
    for key in ("input", "kind"):
        a_text(plain, key, where)
    try:
        json.dumps(plain, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise Refused(f"{where} is nested too deeply") from None
    except UnicodeEncodeError:
        raise Refused(f"{where} holds half a character (a lone surrogate)") from None
    except ValueError:
        raise Refused(f"{where} holds a number that JSON cannot write (infinite, or none)") from None
    if template == "alpaca":
        history = [m for m in plain.pop("history", ()) if m["content"].strip() or "tool_calls" in m]
        if history or "tools" in plain:
            what = "is a chat of more than a prompt and its answer" if history else "has 'tools'"
            what = "has a system message" if [m["role"] for m in history] == ["system"] else what
            place = "the template alpaca has no place for it: --template chat takes it"
            raise Refused(f"{where} {what}, and {place}")
    return {key: plain[key] for key in PLAIN if key in plain}

"""Passes over left-padded rows of tokens, and whether a backbone gives them what it gives each row alone."""

import contextlib

import torch
import transformers

from plumbing import Refused
from plumbing.prompts import pad_of
from plumbing.targets import adapted_targets, device_of, find_targets, layers_of

TEXT = "Below is a line of text that a model of language can read, from its first word to its last: 1 2 3."
LIMITS = "max_position_embeddings", "max_seq_len", "max_target_positions"  # names of one number


def body_of(backbone):
    """Return the part of a language model that ends with the last hidden states."""
    body = backbone.base_model
    return getattr(backbone, "model", body) if body is backbone else body


def width_of(backbone, bare=0):
    """Return how wide the hidden states are that give h_bar: those that enter a layer if some layers stay
    bare, else the last ones, which OPT-350m projects before its head."""
    config = backbone.config.get_text_config()
    return not bare and getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def context_of(backbone):
    """Return how many tokens a backbone was made to read at once, 0 if it does not say."""
    config = backbone.config.get_text_config()
    return max(0, *(getattr(config, key, None) or 0 for key in LIMITS))


def room_for(tokens, context):
    """Return how many tokens may follow a prompt of `tokens`; None if `context` is 0, which means that it is
    not known. Raises Refused if there is room for none."""
    if context and tokens >= context:
        raise Refused(f"the prompt has {tokens} tokens, which leave no room in a context of {context}")
    return context - tokens if context else None


def positions_of(backbone):
    """Return how many positions a backbone has a number for, or None if it has no last one: rotary
    embeddings are computed for any."""
    rotary = getattr(backbone.config.get_text_config(), "rope_parameters", None)
    return None if rotary else context_of(backbone) or None


def pad_left(rows, pad_id, backbone):
    """Token lists -> ids [B, T] and mask [B, T], padded on the left: every row ends at the same column, so
    responses line up for the loss, and generation continues all rows at once. Raises Refused if a row is
    longer than the backbone's positions."""
    width, limit = max(map(len, rows)), positions_of(backbone)
    if limit and width > limit:
        raise Refused(f"{width} tokens in one row are more than the {limit} positions of this backbone")
    device = device_of(backbone.get_input_embeddings())
    ids = torch.tensor([[pad_id] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def run_padded(body, ids, mask, **kwargs):
    """Run one pass over left-padded ids. Positions count real tokens, so padding does not shift them."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return body(input_ids=ids, attention_mask=mask, position_ids=positions, **kwargs)


class Entered(Exception):
    """A layer was entered, and no more is wanted."""


@contextlib.contextmanager
def on_entering(layer, act):
    """Within this block the first pass that comes to `layer` gives act() the hidden states that enter it."""

    def once(_, args, kwargs):
        handle.remove()
        act(args[0] if args else kwargs["hidden_states"])

    handle = layer.register_forward_pre_hook(once, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def until(layer, run):
    """Return the hidden states [B, T, features] that enter `layer` in run(). Nothing above is computed."""

    def stop(hidden):
        raise Entered(hidden)

    try:
        with on_entering(layer, stop):
            run()
    except Entered as e:
        return e.args[0]
    raise ValueError("its layers are not entered in their order")


@contextlib.contextmanager
def computed_once(layers):
    """Within this block `layers` compute the first pass alone, and give in each later one what they gave
    then: for passes over the same batch that differ above them."""

    def once(forward):
        kept = []

        def first_or_kept(*args, **kwargs):
            if not kept:
                kept.append(forward(*args, **kwargs))
            return kept[0]

        return first_or_kept

    before = [(layer, vars(layer).get("forward")) for layer in layers]  # a layer may have one of its own
    for layer in layers:
        layer.forward = once(layer.forward)
    try:
        yield
    finally:
        for layer, forward in before:
            del layer.forward
            vars(layer).update({"forward": forward} if forward else {})


def mean_over(hidden, lengths):
    """Hidden states [B, T, features], padded on the left, and how many tokens each row has -> their means
    [B, features], float32. Raises Refused if one is not finite: it would be no coordinate."""
    lengths = torch.tensor(lengths, device=hidden.device)[:, None]
    real = torch.arange(hidden.shape[1], device=hidden.device) >= hidden.shape[1] - lengths  # [B, T]
    # Take `where` and no product: what a padding position holds, nan say, must not reach the mean.
    mean = torch.where(real[:, :, None], hidden.float(), 0.0).sum(1) / lengths
    if not mean.isfinite().all():
        raise Refused("the backbone's hidden states are not finite: its weights are damaged, or overflow")
    return mean


def mean_and_last(hidden, lengths):
    """As `mean_over`, and beside the means what the last token of each row has -> [B, 2 features]."""
    return torch.cat([mean_over(hidden, lengths), hidden[:, -1].float()], 1)


def last_logits(backbone, ids, mask, cache=None):
    """Return logits [B, V] after the last column of ids [B, T], and the cache with which the next pass reads
    its new column alone: None, if the backbone keeps none."""
    new = ids if cache is None else ids[:, -1:]
    out = run_padded(backbone, new, mask, logits_to_keep=1, past_key_values=cache, use_cache=True)
    return out.logits[:, -1], getattr(out, "past_key_values", None)


def per_sequence(x, y, rows, columns):
    """Return whether a module that makes y of x sees the tokens of all rows in their order, [B, T, d] or
    [B T, d]. An expert sees only those that a router sends it, so it cannot tell whose they are."""
    if not isinstance(y, torch.Tensor) or y.shape[:-1] != x.shape[:-1]:
        return False
    return x.dim() > 2 and len(x) == rows or x.dim() == 2 and len(x) == rows * columns


def difference(found, wanted):
    """Return how far logits [T, V] are from those that are wanted, a figure for each of T: 1 is as far as
    equal probabilities are."""
    a, b = (logits.float().log_softmax(-1).clamp(min=-100).cpu() for logits in (found, wanted))
    return (a - b).norm(dim=-1) / (b - b.mean(-1, keepdim=True)).norm(dim=-1)


@torch.no_grad()
def try_passes(backbone, pad_id, rows, targets, bare):
    """Run left-padded rows, then their last tokens with what is cached, and each row plainly. -> ({what: how
    far it is from the plain pass}, names of the targets that see all tokens after layer m = bare)"""
    backbone.eval()
    plain = [backbone(input_ids=pad_left([r], pad_id, backbone)[0], use_cache=False).logits[0] for r in rows]
    ids, mask = pad_left([row[:-1] for row in rows], pad_id, backbone)
    seen, handles = {name: [] for name in targets}, []
    for name, module in targets.items():
        look = lambda _, x, y, name=name: seen[name].append(len(x) > 0 and per_sequence(x[0], y, *ids.shape))
        handles.append(module.register_forward_hook(look))
    body = lambda: run_padded(body_of(backbone), ids, mask, use_cache=False)
    entering = [until(layers_of(backbone)[bare], body)] if bare else []
    early = {name for name, fits in seen.items() if fits}
    for hidden, m in zip([body().last_hidden_state, *entering], (0, bare)):
        if hidden.shape != (*ids.shape, wanted := width_of(backbone, m)):
            raise ValueError(f"its hidden states are {[*hidden.shape]}, not {wanted} wide")
    padded = run_padded(backbone, ids, mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    _, cache = last_logits(backbone, ids, mask)
    ids = torch.cat([ids, ids.new_tensor([row[-1:] for row in rows])], 1)
    step, _ = last_logits(backbone, ids, torch.cat([mask, mask[:, -1:]], 1), cache)
    apart = [difference(x[1 - len(p) :], p[:-1]) for x, p in zip(padded, plain)]
    found = {"a left-padded batch with position_ids": torch.cat(apart)}
    found["a decoding step with what is cached"] = difference(step, torch.stack([p[-1] for p in plain]))
    return found, [name for name, fits in seen.items() if fits and all(fits) and name not in early]


def choose_targets(backbone, tokenizer, asked="all", bare=0):
    """Return {full name: module} of what is to be adapted, once it is seen that the backbone can be used:
    padded rows, and decoding with what is cached, must give what each row gives alone. asked: the option
    --targets, names for `find_targets` with commas between them. bare: how many layers are not adapted.
    Raises Refused if they do not, or if a module that is asked for by name sees tokens without their
    sequence."""
    targets = adapted_targets(backbone, find_targets(backbone, asked.split(","), each=True), bare)
    ids = (tokenizer(TEXT, add_special_tokens=False).input_ids or [0]) * 21
    try:
        rows = [ids[:9], ids[9:14], ids[14:21]]
        apart, fit = try_passes(backbone, pad_of(tokenizer), rows, targets, bare)
    except Exception as e:  # a forward raises what it likes
        hint = "; --passes two has no bare layers, and may do" if bare else ""
        why = f"this backbone cannot be used ({type(e).__name__}: {str(e)[:200]}){hint}"
        raise Refused(why) from e
    # In bfloat16 a token may go to another expert, so that one of several differs.
    exact = backbone.dtype == torch.float32
    for what, figures in apart.items():
        worst = float(figures.max() if exact else figures.median())
        if not worst <= (0.01 if exact else 0.1):
            raise Refused(f"this backbone cannot be used: {what} gives other logits than each row alone")
    left = [name for name in targets if name not in fit]
    if not fit or left and asked != "all":
        raise Refused(f"{left[0]} cannot be adapted: it does not see all tokens of a sequence; see --targets")
    return {name: module for name, module in targets.items() if name in fit}


def greedy(logits):
    """Return the likeliest tokens [B] by logits [B, V]."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(backbone, pad_id, prompts, eos_id, max_new_tokens, choose=greedy):
    """Continue B prompts (token lists); `choose` makes tokens [B] of logits [B, V]. After each pass, one over
    the prompts and then one a token, yield {row: token} of the rows that have not come to `eos_id`, or to one
    of them if it is a list."""
    ids, mask = pad_left(prompts, pad_id, backbone)
    cache, open_rows, ends = None, torch.ones(len(prompts), dtype=torch.bool), torch.tensor(eos_id)
    if room := positions_of(backbone):  # where positions end, answers end
        max_new_tokens = min(max_new_tokens, room - ids.shape[1] + 1)
    for _ in range(max_new_tokens):
        logits, cache = last_logits(backbone, ids, mask, cache)
        new = choose(logits).to(mask.device)[:, None]  # [B, 1]
        ids, mask = torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)
        tokens = new[:, 0].cpu()
        open_rows &= ~torch.isin(tokens, ends)
        if not open_rows.any():
            return
        yield {row: int(tokens[row]) for row in open_rows.nonzero()[:, 0].tolist()}


def continuations(count, steps):
    """Return what `decode` gives each of `count` prompts, whole: token lists, without the end."""
    new = [[] for _ in range(count)]
    for tokens in steps:
        for row, token in tokens.items():
            new[row].append(token)
    return new


def sampler(temperature=0.0, top_p=1.0, seed=0):
    """Return a function that draws tokens [B] by logits [B, V], as transformers does: the logits over the
    temperature, cut to the likeliest tokens that together have the probability top_p (nucleus sampling,
    Holtzman et al. 2020). Below a temperature of 1e-4, where nothing else is drawn, it is `greedy`."""
    if temperature < 1e-4:
        return greedy
    warpers = [transformers.TemperatureLogitsWarper(float(temperature)), transformers.TopPLogitsWarper(top_p)]
    generator = torch.Generator().manual_seed(seed)

    def draw(logits):
        scores = logits.float().cpu()  # on the CPU, so that a seed means the same on every device
        for warp in warpers:
            scores = warp(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]

    return draw

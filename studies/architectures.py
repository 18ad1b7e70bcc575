"""Does every architecture work? A micro model of each family of transformers, trained, decoded and exported.

    python -m studies.architectures                         # all families: 10 minutes on one core
    python -m studies.architectures --only gpt2 jamba        # some, by their model types
    python -m studies.architectures --json FILE              # the table as JSON, too

A family is a class in transformers' list of causal language models. Its default configuration is made small,
its weights are random, and its tokenizer is tiny's. `train.py` learns one task in two steps, and `commit.py`
exports it, as a user would run them. Then logits that must be equal are compared, all with the version on:

padded     a batch padded on the left, as in training    one row at a time, which has no padding
decode     decoding a batch with a cache                 every prefix on its own, without a cache
generate   the same                                      `generate` of transformers, one row at a time
causal     one pass over prompt and response             every prefix on its own
adapter    the exported adapter, loaded by peft          the version at its region's mean coordinate
merged     the merged export, loaded by transformers     the same

A figure is the largest difference, in units of the tolerance: 1 and less is equal. The tolerance is a part
of the largest logit, see TOLERANCE. `effect` is what the version changes, in the same units; `share` is the
share of the layers' weights that it adapts. Every family runs in a process of its own, so that a crash costs
its row alone. Verdicts:

right      all of these are equal
in part    the same, but an export was refused in one line
refused    train.py refused in one line, before it wrote anything
wrong      a figure above 1, or a traceback
not built  there is no small model without a network: no verdict on the programs
"""

import collections
import contextlib
import importlib
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
import traceback
import warnings

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import commit
import train
from eval import open_run
from plumbing import Refused
from plumbing.backbone import TINY_FOLDER, refuse_without
from plumbing.command import output_file, Parser, run_program, write_results
from plumbing.passes import decode
from plumbing.prompts import encode
from plumbing.records import DATA
from plumbing.targets import text_layers

TOLERANCE = 2**10 * torch.finfo(torch.float32).eps  # of the largest logit: a thousand roundings
CHECKS = ("padded", "decode", "generate", "causal", "adapter", "merged")
VERDICTS = ("right", "in part", "refused", "wrong", "not built")
PATIENCE = 120  # seconds for one family
NEW_TOKENS = 6
EXAMPLES = DATA / "alpaca.val.json"
TRAINING = "--device cpu --examples 16 --val-examples 4 --batch 2 --grad-accum 4 --epochs 1 --lr 0.02"
TRAINING += " --rank 2 --bases 4 --top-k 2 --field-hidden 16 --coord-dim 8 --anchors 16"


# ----------------------------------------------------------------------------- from a family to a micro model

HIDDEN, HEADS, HEAD = 64, 4, 16
# A value, and the attributes of configurations that are set to it. Lists of one item a layer: `few_layers`.
SMALL = f"""
{HIDDEN} hidden_size d_model n_embd dim emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width
{HIDDEN} input_embedding_size output_embedding_size attention_hidden_size hidden_size_global
64 intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner d_inner dff dim_ff
64 moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size feed_forward_size
64 shared_experts_intermediate_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size
64 moe_shared_expert_intermediate_size
2 num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers
2 num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok
2 num_experts_per_token moe_topk moe_k
{HEADS} num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
{HEADS} num_decoder_attention_heads num_encoder_attention_heads attention_heads swa_num_attention_heads
{HEADS} mamba_n_heads linear_num_key_heads linear_num_value_heads linear_num_heads
{HEADS} num_experts n_routed_experts num_local_experts moe_num_experts
{HEAD} head_dim attention_head_dim kv_channels v_head_dim qk_nope_head_dim linear_key_head_dim
{HEAD} linear_value_head_dim linear_head_dim swa_head_dim d_head attention_head_size dim_head
16 sliding_window sliding_window_size attention_window_size window_size local_attention
16 q_lora_rank kv_lora_rank mamba_d_state state_size ssm_state_size index_n_heads index_head_dim index_topk
8 qk_rope_head_dim rotary_dim chunk_size mamba_chunk_size hidden_size_per_layer_input laurel_rank
1 n_group topk_group num_expert_group n_shared_experts num_shared_experts first_k_dense_replace
512 max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions
512 max_target_positions model_max_length original_max_position_embeddings
0.2 initializer_range init_std
0 bos_token_id num_nextn_predict_layers
"""
SMALL = {
    name: json.loads(value) for value, *names in map(str.split, SMALL.split("\n")[1:-1]) for name in names
}
LINEAR, SLIDING, FULL = "linear_attention", "sliding_attention", "full_attention"
# fmt: off
EXCEPTIONS = {  # what a family needs besides
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 32},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 96}},
    "dots3_note_text": {"head_dim": 24, "per_layer_config": {}},
    # A zero in the embeddings, as padding has it in random weights, has no gradient here: a root of 0.
    "gemma3n_text": {"num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "num_kv_shared_layers": 2,
                     "intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
                     "pad_token_id": None},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL], "mamba_d_head": 32},
    "hrm_text": {"initializer_range": 0.02},  # its layers run many times, which blows rounding up
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2},
    "moshi": {"sliding_window": 512},  # beyond its window transformers decodes otherwise than it reads
    "nemotron_h": {"time_step_min": 1e-6},  # transformers clamps with it in reading, and not in decoding
    "qwen4_exp_text": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": HEAD,
                       "indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100,
                       "ple_layer_ids": [1], "ple_embed_dim": HIDDEN, "split_ngram_parts": 1},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2, "num_key_value_heads": 4,
              "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": [LINEAR, "hybrid"] * 2, "num_key_value_heads": 4,
               "attention_hidden_size": 128, "attention_head_dim": 32, "hybrid_layer_ids": [1, 3],
               "mamba_headdim": 16, "time_step_min": 1e-6},  # see nemotron_h
    "zaya": {"num_experts_per_tok": 1}}
# fmt: on


def families():
    """Model types, one for each class of causal language models. This imports them all."""
    found = {}
    for name, architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        config = getattr(transformers, architecture).config_class
        if architecture not in found or config.model_type == name:
            found[architecture] = name
    return sorted(found.values())


def few_layers(config, count):
    """The lists of a configuration that have one item for each of its `count` layers, cut to one layer of
    every kind, but two at least."""
    lists = {k: v for k, v in config.to_dict().items() if isinstance(v, (list, tuple)) and len(v) == count}
    first = {}
    for i, kind in enumerate(zip(*lists.values())):
        first.setdefault(json.dumps(kind), i)
    chosen = [*first.values()] * (1 if len(first) > 1 else 2)
    return {key: [values[i] for i in chosen] for key, values in lists.items()}


def shrunk(config, vocab, more):
    """What to change in a default configuration, and in those inside it, to make it small."""
    about = config.to_dict()
    changes = {name: value for name, value in SMALL.items() if about.get(name) is not None}
    always = {"vocab_size": vocab, "vocab_size_per_layer_input": vocab, "eos_token_id": 1, "pad_token_id": 2}
    always |= {"is_decoder": True, "head_dim": HEAD, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    always |= {"n_routed_experts": HEADS, "n_shared_experts": 1}
    if about.get("kv_lora_rank"):  # latent attention: every head has keys of its own, part of them rotated
        always |= {"num_key_value_heads": HEADS, "head_dim": 8, "qk_head_dim": 24, "qk_nope_head_dim": 16}
    changes |= {name: value for name, value in always.items() if name in about}
    if lists := few_layers(config, getattr(config, "num_hidden_layers", None)):
        changes |= lists | {"num_hidden_layers": len(next(iter(lists.values())))}
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            changes[name] = shrunk(inner, vocab, more.get(name, {}))
    return changes | more


def build(family, folder):
    """Save a micro model of a family with random weights and tiny's tokenizer. -> its size"""
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY_FOLDER)
    model = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    kind = model.config_class
    # Some families have a tokenizer of their own, which reads tiny's file and adds a token or two to it.
    changes = shrunk(kind(), len(tokenizer) + 16, EXCEPTIONS.get(family, {}))
    torch.manual_seed(0)
    backbone = model(kind(**changes)).eval()
    size = sum(p.numel() for p in backbone.parameters())
    if size > 2e7:
        raise ValueError(f"{size:,} parameters: not small")
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return size


# ------------------------------------------------------------------------------------------------- the checks


def apart(found, wanted):
    """The largest difference of two tensors, in units of the tolerance."""
    if found.shape != wanted.shape:
        return float("inf")
    found, wanted = found.double(), wanted.double()
    different = torch.where(found == wanted, 0.0, (found - wanted).abs()).nan_to_num(float("inf"))
    return float(different.max() / (TOLERANCE * wanted[wanted.isfinite()].abs().max()))


def plain(backbone, row):
    """Logits [T, V] of a row of tokens on its own: no padding, no cache, nothing of ours."""
    return backbone(input_ids=torch.tensor([row]), use_cache=False).logits[0]


def check_padded(model, examples, gating):
    """Training's logits and coordinates, against those of each row alone."""
    batch = [g.expand(len(examples), -1, -1) for g in gating]
    logits, _ = model.logits(examples, batch)
    with model.gated(gating):
        rows = [plain(model.backbone, p + r)[len(p) - 1 : -1] for p, r in examples]
    worst = max(apart(out[-len(row) :], row) for out, row in zip(logits, rows))
    prompts = [p for p, _ in examples]
    return max(worst, apart(model.probe(prompts), torch.cat([model.probe([p]) for p in prompts])))


def check_decoding(model, prompts, gating):
    """-> what `decode`, `generate` of transformers and one pass over all differ by: see the top."""
    seen, backbone = [], model.backbone
    choose = lambda logits: seen.append(logits.clone()) or logits.argmax(-1)
    with model.gated([g.expand(len(prompts), -1, -1) for g in gating]):
        steps = [*decode(backbone, model.pad_id, prompts, -1, NEW_TOKENS, choose)]
    ours = torch.stack(seen, 1)  # [B, NEW_TOKENS, V]
    config = transformers.GenerationConfig(
        max_new_tokens=NEW_TOKENS, pad_token_id=model.pad_id, eos_token_id=-1
    )
    how = {"generation_config": config, "output_logits": True, "return_dict_in_generate": True}
    found = collections.defaultdict(float)
    with model.gated(gating):
        for i, prompt in enumerate(prompts):
            new = [step[i] for step in steps]
            prefixes = [plain(backbone, prompt + new[:n])[-1] for n in range(NEW_TOKENS)]
            whole = plain(backbone, prompt + new[:-1])[len(prompt) - 1 :]
            ids = torch.tensor([prompt])
            theirs = backbone.generate(ids, attention_mask=torch.ones_like(ids), **how).logits
            sides = {"decode": (ours[i], torch.stack(prefixes)), "causal": (whole, torch.stack(prefixes))}
            sides["generate"] = (ours[i], torch.cat(theirs))
            for name, pair in sides.items():
                found[name] = max(found[name], apart(*pair))
    return found


def check_exports(folder, run, rows, wanted, scratch):
    """-> what the logits of both exports, opened by other programs, differ by."""
    import peft

    found = {}
    for name, more in (("adapter", []), ("merged", ["--merged"])):
        to = scratch / name
        try:
            commit.main(["export", "t", "--run", str(run), "--to", str(to), *more])
            source = to if more else folder
            opened = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
            opened = (opened if more else peft.PeftModel.from_pretrained(opened, to)).eval()
            found[name] = max(apart(plain(opened, row), w) for row, w in zip(rows, wanted))
        except Exception as e:
            found[name] = one_line(e)
    return found


def share_adapted(backbone, targets):
    """The share of the weights in the text model's layers that the targets hold. Vectors do not count."""
    parts = [m.parameters(recurse=False) for m in text_layers(backbone).values()]
    weights = {id(p): p.numel() for part in parts for p in part if p.dim() > 1}
    adapted = {id(backbone.get_submodule(name).weight) for name in targets}
    return sum(size for key, size in weights.items() if key in adapted) / sum(weights.values())


@torch.no_grad()
def check(folder, scratch):
    """Train, decode and export. -> {check: figure}. Raises Refused as the programs do."""
    run = scratch / "run"
    where = ["--task", "t", "--data", EXAMPLES, "--backbone", folder, "--out", run]
    with torch.enable_grad():
        train.main([*map(str, where), *TRAINING.split()])
    opened, model, tokenizer = open_run(run, "cpu")
    version = opened.versions[0]
    gating = version.gating(torch.tanh(version.region.mean).float()[None])
    examples = [encode(r, tokenizer) for r in opened.validation("t")][:3]
    rows = [p + r for p, r in examples]
    row = {"share": share_adapted(model.backbone, model.bank.shapes)}
    row["padded"] = check_padded(model, examples, gating)
    row |= check_decoding(model, [p for p, _ in examples], gating)
    with model.gated(gating):
        wanted = [plain(model.backbone, r) for r in rows]
    row["effect"] = max(apart(plain(model.backbone, r), w) for r, w in zip(rows, wanted))
    return row | check_exports(folder, run, rows, wanted, scratch)


def judge(family, scratch):
    """One family, from its configuration to its verdict. -> its row"""
    row, folder = {"family": family}, scratch / "backbone"
    try:
        row["parameters"] = build(family, folder)
    except Exception as e:
        return row | {"verdict": "not built", "why": one_line(e)}
    try:
        row |= check(folder, scratch)
    except Refused as e:
        early = not (scratch / "run").exists()
        return row | {"verdict": "refused" if early else "wrong", "why": one_line(e)}
    except Exception as e:
        return row | {"verdict": "wrong", "why": one_line(e), "trace": traceback.format_exc()}
    failed = {name: f"{name}: {row[name]}" for name in CHECKS if isinstance(row[name], str)}
    refused = [why for name, why in failed.items() if row[name].startswith("Refused: ")]
    bad = [failed.get(name, name) for name in CHECKS if name in failed or not row[name] <= 1]
    bad = [why for why in bad if why not in refused] + ["effect"] * (row["effect"] < 100)
    verdict = "wrong" if bad else "in part" if refused else "right"
    return row | {"verdict": verdict, "why": "; ".join(bad or refused)}


def one_line(e):
    """What went wrong, and, if it was not meant to, where."""
    where = traceback.extract_tb(e.__traceback__)[-1]
    place = "" if isinstance(e, Refused) else f" ({pathlib.Path(where.filename).name}:{where.lineno})"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}{place}"


# ------------------------------------------------------------------------------------------- the command line


def work(family, folder, pipe):
    """Judge a family without a word, and send its row."""
    torch.set_num_threads(1)  # after a fork more of them could wait for each other for ever
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        pipe.send(judge(family, folder))


def alone(family):
    """`judge` in a process of its own, which may crash or hang."""
    context, started = multiprocessing.get_context("fork"), time.time()
    here, there = context.Pipe(duplex=False)
    row = {"family": family, "verdict": "wrong", "why": f"no end after {PATIENCE} s"}
    with tempfile.TemporaryDirectory() as tmp:
        process = context.Process(target=work, args=(family, pathlib.Path(tmp), there))
        process.start()
        there.close()
        if here.poll(PATIENCE):
            try:
                row = here.recv()
            except EOFError:
                process.join()
                row["why"] = f"the process ended with {process.exitcode}"
        process.kill()
        process.join()
    why = row["why"].replace(f"{tmp}{os.sep}", "")  # the folder has another name every time
    return row | {"why": why, "seconds": round(time.time() - started, 1)}


def line_of(row):
    """A row of the table."""
    show = lambda x: x.partition(":")[0][:8] if isinstance(x, str) else "-" if x is None else f"{x:.2g}"
    figures = " ".join(f"{show(row.get(name)):>8}" for name in ("share", "effect", *CHECKS))
    return f"{row['family']:24} {row['verdict']:9} {figures} {row['seconds']:6.1f}  {row['why']}"


def main(argv=None):
    parser = Parser(__doc__, prog="architectures.py")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these model types [all]")
    parser.add_argument("--json", type=output_file, help="write the table to this file")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.only or () if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]:
        parser.error(f"--only: no causal language model of transformers is called {unknown[0]!r}")
    refuse_without("architectures.py", "peft")  # it loads the exported adapters
    importlib.import_module("peft")  # once, and not in every process
    heads = " ".join(f"{name:>8}" for name in ("share", "effect", *CHECKS))
    print(f"{'family':24} {'verdict':9} {heads} {'s':>6}  why", flush=True)
    rows = []
    for name in args.only or families():
        rows.append(alone(name))
        print(line_of(rows[-1]), flush=True)
    counts = collections.Counter(row["verdict"] for row in rows)
    print("\n" + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS))
    write_results(args.json, "-m studies.architectures", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)

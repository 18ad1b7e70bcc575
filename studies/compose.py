"""What a composition is worth beside what peft makes of the same versions, each frozen at one coordinate.

    python -m studies.compose --run runs/compose

It needs peft, whose `add_weighted_adapter` joins the exported versions.
"""

import pathlib
import tempfile

import torch

from commit import export
from eval import open_run, perplexity_by_name, validation_set
from plumbing.backbone import refuse_without
from plumbing.command import Parser, output_file, run_program, write_results
from studies.variants import measure_backbone


def peft_composition(run, backbone, composition):
    """What peft's `add_weighted_adapter` makes of a composition's exported versions, on the backbone."""
    import peft

    adapted, parts = None, [f"part{i}" for i in range(len(composition.reads))]
    with tempfile.TemporaryDirectory() as folder:
        for part, digest in zip(parts, composition.reads):
            path = export(run, digest, pathlib.Path(folder) / part)["folder"]
            if adapted is None:
                adapted = peft.PeftModel.from_pretrained(backbone, path, adapter_name=part)
            else:
                adapted.load_adapter(path, part)
    adapted.add_weighted_adapter(parts, composition.weights, "sum", combination_type="cat")
    adapted.set_adapter("sum")
    return adapted


def compare(run, model, tokenizer):
    """-> {task: {name: perplexity}} of all versions and compositions, and of "NAME, peft"."""
    table = perplexity_by_name(run, model, tokenizer, [e["task"] for e in run.entries])
    data = {task: validation_set(run, model, tokenizer, task) for task in run.tasks}
    model.detach()
    for composition in run.compositions:
        adapted = peft_composition(run, model.backbone, composition)
        for task, (examples, _, _) in data.items():
            figure = measure_backbone(adapted.base_model.model, tokenizer, examples)
            table[task][f"{composition.task}, peft"] = figure
            print(f"{task} under {composition.task} as peft composes it: {figure:.3f}")
        adapted.unload()
    return table


@torch.no_grad()
def main(argv=None):
    p = Parser(__doc__, prog="compose.py")
    p.add_argument("--run", required=True, help="a run folder with compositions")
    p.add_argument("--json", type=output_file, metavar="FILE", help="write what was measured")
    args = p.parse_args(argv)
    refuse_without("this comparison", "peft")
    rows = [{"under": compare(*open_run(args.run))}]
    write_results(args.json, "-m studies.compose", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)

"""What the versions of the README's quick start answer, kept as they print it.

    python -m studies.answers --run runs/tiny --json studies/results/tiny-answers.json

The commands are those of the README, and what is kept is all that eval.py prints.
"""

import contextlib
import io
import shlex

import eval as evaluation
from plumbing.command import Parser, output_file, run_program, write_results

COMMANDS = (
    'python eval.py --prompt "Name three fruits."',
    'python eval.py --prompt "How do I sort names in Python?"',
    'python eval.py --prompt "Name three fruits." --version code',
)


def answered(run, command):
    """-> a command as the README shows it, and what it printed of a run folder"""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        evaluation.main(["--run", run, *shlex.split(command)[2:]])
    return {"command": command, "printed": out.getvalue().strip()}


def parse_options(argv=None):
    p = Parser(__doc__, prog="answers.py")
    p.add_argument("--run", required=True, help="the run folder that train.py wrote")
    p.add_argument("--json", type=output_file, metavar="FILE", help="write the answers to this file")
    return p.parse_args(argv)


def main(argv=None):
    args = parse_options(argv)
    rows = [answered(args.run, command) for command in COMMANDS]
    for row in rows:
        print(f"{row['command']}\n{row['printed']}\n")
    write_results(args.json, "-m studies.answers", argv, indent=1, rows=rows)


if __name__ == "__main__":
    run_program(main)

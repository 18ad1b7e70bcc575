"""Compute the rows of an experiment side by side, and keep each on disk, so that the same command goes on.

A row is a frozen dataclass that says everything about a computation. Its class has a `VERSION`: raise it by
hand whenever the code behind it gives other numbers, and rows that were kept are computed again. `files`
lists the files that its numbers depend on besides.
"""

import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading

import torch
from tqdm import tqdm

from plumbing import Refused
from plumbing.command import Parser, number, output_file, write_results
from plumbing.files import atomic
from plumbing.processes import rank_and_size

MOST = 61 if sys.platform == "win32" else 256  # processes of a pool: Windows can wait for no more than 61


def kept_file(row, how):
    """The file that keeps a row. Its name has a hash of the row, of its class's version, of `how` it is
    computed (a pair of a class and its settings), of torch's version, and of the state of `row.files`."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in row.files]
    parts = (row, type(row).VERSION, how[0].__name__, how[1], torch.__version__, stats)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return pathlib.Path("runs", "synthetic", f"{row.variant}-{row.method}-{row.seed}-{key}.json")


def sealed(path, result):
    """What a row's file holds: its result, and a hash that tells whether it is whole and belongs to the
    row."""
    return dict(sha256=hashlib.sha256((path.name + json.dumps(result)).encode()).hexdigest(), result=result)


def read_sealed(path):
    """The result in a row's file. Raises Refused if the file is not what was written for this row."""
    try:
        saved = json.loads(path.read_bytes())
        if saved == sealed(path, saved["result"]):
            return saved["result"]
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Refused(f"{path} is damaged or not of this row; without it the row is computed again")


def keep_row(compute, row, how):
    """Compute a row and keep it, unless that has been done. Return None, or why it was refused. The result
    stays in its file: a kill could cut off a long one on its way to another process, which would wait."""
    try:
        path = kept_file(row, how)
        if not path.exists():
            out = compute(row, how)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as tmp:
                tmp.write_text(json.dumps(sealed(path, out)))
        read_sealed(path)
    except Refused as e:
        return str(e)


def end_with_parent():
    """Let this process end when the one that started it has ended, however that came."""
    follow = lambda: (multiprocessing.parent_process().join(), os._exit(1))
    threading.Thread(target=follow, daemon=True).start()


def leave_interrupts_to_parent():
    """Let the parent alone handle Ctrl-C; it then ends its workers. If it is killed they end, too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def end_workers():
    """Kill all workers at once. Whoever waits for the pool then gets BrokenProcessPool. A handler of signals
    calls this and does not raise, as that could leave a lock of the pool held, and the pool could not end."""
    for child in multiprocessing.active_children():
        child.kill()  # one that is just born may still ignore other signals


def finished_rows(compute, jobs, workers):
    """Yield (row, its result, None) of each (row, how) as it comes, from so many processes, or (row, None,
    why) if it is refused. They end at once if this one does. Raises Refused if a worker was killed."""
    context = multiprocessing.get_context(start := "fork" if sys.platform == "linux" else "spawn")
    stopped = []
    handler = lambda by, _: (stopped.append(by), end_workers())
    with concurrent.futures.ProcessPoolExecutor(workers, context, leave_interrupts_to_parent) as pool:
        # Ctrl-C must not end a worker that is just born with a traceback. One that is forked inherits the
        # handler; one that is spawned inherits only that a signal is ignored.
        at_first = handler if start == "fork" else signal.SIG_IGN
        before = {s: signal.signal(s, at_first) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            job_of = {pool.submit(keep_row, compute, *job): job for job in jobs}
            for s in before:
                signal.signal(s, handler)
            if stopped:  # while workers were born
                end_workers()
            left = {*job_of}
            with tqdm(total=len(jobs), unit="row", disable=None) as bar:
                while left:
                    # Wait a second at a time: a signal that comes just before a wait is seen when it ends.
                    done, left = concurrent.futures.wait(left, 1, concurrent.futures.FIRST_COMPLETED)
                    for future in done:
                        bar.update()
                        row, why = job_of[future][0], future.result()
                        yield row, None if why else read_sealed(kept_file(*job_of[future])), why
        except concurrent.futures.process.BrokenProcessPool:
            if not stopped:
                why = "a worker was killed, perhaps for want of memory: try fewer --workers"
                raise Refused(why) from None
        finally:
            end_workers()
            for s, former in before.items():
                signal.signal(s, former)
    if stopped:
        signal.raise_signal(stopped[0])
        raise KeyboardInterrupt  # the signal was ignored before, but the workers have ended


def parser_of(doc, prog):
    """A parser with the options that all experiments have."""
    p = Parser(doc, prog=prog)
    add = p.add_argument
    add("--methods", nargs="+", metavar="METHOD", help="which, or all [all but supsup-wide and controls]")
    add("--seeds", type=number(int, 1, 1000), default=1, help="how many")
    add("--first-seed", type=number(int, 0, 2**31), default=0, help="they are counted from here")
    add("--tasks", type=number(int, 2, 100), help="how many [3; 6]")
    add("--steps", type=number(int, 1, 100_000), help="training steps a task [1000; 200]")
    add("--workers", type=number(int, 1, 256), default=os.cpu_count(), help="rows side by side [the cores]")
    add("--json", type=output_file, help="write everything about every row to this file")
    return p


def seeds_of(args):
    """The seeds that were asked for."""
    return range(args.first_seed, args.first_seed + args.seeds)


def choose_methods(parser, args, known, default):
    """Put the methods that were asked for into args, each once: `default` ones if none, "all" for all."""
    said = args.methods or default
    args.methods = list(dict.fromkeys(name for m in said for name in (known if m == "all" else [m])))
    if unknown := {*args.methods} - {*known}:
        parser.error(f"--methods: {', '.join(sorted(unknown))} is not among {', '.join(known)}")


def given(args, *names):
    """The options that were said, of these, by name."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run_rows(compute, rows, known, args, command, line_of, print_tables):
    """Compute rows side by side, print `line_of` each as it comes, then `print_tables`; write --json.

    compute(row, how), with how = known[row.method], gives a result; command: (program, argv) for the file.
    Raises Refused, naming each reason once, if some were refused."""
    if rank_and_size()[1] > 1:
        raise Refused("the FTN experiments start their own processes, see --workers: leave out torchrun")
    jobs = sorted(((row, known[row.method]) for row in rows), key=lambda job: (job[0].seed, job[1][1].place))
    outs, refused, reasons = {}, [], {}
    try:
        for row, out, message in finished_rows(compute, jobs, min(args.workers, len(jobs), MOST)):
            name = f"{row.variant} {row.method} seed {row.seed}"
            if out is None:
                refused.append(f"{name}: {message}")
                reasons.setdefault(message, refused[-1])
            else:
                outs[row] = out
                tqdm.write(f"{name:<36} {line_of(out)}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; finished rows are kept, the same command goes on") from None
    outs = [outs[row] for row in rows if row in outs]
    print_tables(outs)
    write_results(args.json, *command, refused=refused, rows=outs)
    if refused:
        raise Refused(f"{len(refused)} of {len(rows)} rows were not computed: {'; '.join(reasons.values())}")

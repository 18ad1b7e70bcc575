"""What any such program needs and no paper is about: files, records, prompts, backbones, processes, commands.

A reader of the seven files at the top never has to open this folder: the names that it exports say all.
"""

import os
import pathlib
import signal
import sys

HOME = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve()
OURS = [HOME / f"{name}.py" for name in ("commit", "eval", "synthetic", "train")]
if PROGRAM in OURS or PROGRAM.parent == HOME / "studies" and PROGRAM.suffix:
    # Ctrl-C while torch is being imported ends a program of ours in one line. Later `run_program` does that.
    # A script that imports the seven files, and an interpreter, keep Python's own way.
    said = f"\n{PROGRAM.name}: stopped\n".encode()
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, said) and 130))

# They are read when torch and the Hub's client are first imported or used. The Hub's client draws no bars
# (ours is the only one), and cuBLAS computes the same bits twice on a GPU.
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Refused(Exception):
    """An error that the user can mend, told in one line. Nothing on disk has been changed."""

    def __init__(self, message):
        text = " ".join(str(message).split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))

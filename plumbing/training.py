"""The state of a training: it can be killed at any moment, and the same command goes on to the same bits."""

import contextlib
import json
import math
import os
import signal
import sys
import time

try:
    import resource
except ImportError:  # Windows
    resource = None

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from plumbing import Refused
from plumbing.command import provenance
from plumbing.files import atomic
from plumbing.processes import any_process, first_alone, rank_and_size, sum_over_processes
from plumbing.versionfile import check_shapes, map_tensors

STATE = "training.safetensors"  # in a run folder, while a task is being trained
SAVE_EVERY = 20  # seconds between two saved states; more where saving takes over 5 % of the time


class Training:
    """Weights, moments and the number of steps done; and the file that can bring it all back.

    about identifies the training (task, options, data): a saved state is only taken up by the same one. rate:
    the learning rate as a function of the step. As a context it shows a bar, keeps `log.jsonl`, and turns an
    interrupt into a stop between two steps, as it would tear an update that it met."""

    def __init__(self, folder, weights, total, about, rate):
        self.folder, self.path, self.total, self.about = folder, folder / STATE, total, about
        self.weights, self.rate, self.step = weights, rate, 0
        self.optimizer = torch.optim.AdamW(weights.values(), lr=rate(0), weight_decay=0.01, fused=True)

    @first_alone
    def save(self):
        """Write the state. Raises Refused, and keeps an earlier state, if the weights are not finite."""
        tensors = {key: p.data for key, p in self.weights.items()}
        if not all(t.isfinite().all() for t in tensors.values()):
            done = f"weights are not finite after step {self.step} of {self.total}"
            raise Refused(f"{done}: delete {self.path}, if it is there, and try a smaller --lr")
        for key, p in self.weights.items():
            tensors |= {f"{moment}.{key}": t for moment, t in self.optimizer.state[p].items()}
        with atomic(self.path) as tmp:
            save_file(tensors, tmp, {"about": json.dumps(self.about), "step": str(self.step)})

    def resume(self):
        """Continue from the file, if there is one. Raises Refused if it belongs to another training, or is
        not whole."""
        if not self.path.exists():
            return
        shapes = {key: p.shape for key, p in self.weights.items()}
        for key, p in self.weights.items():
            shapes |= {f"step.{key}": torch.Size(), f"exp_avg.{key}": p.shape, f"exp_avg_sq.{key}": p.shape}
        try:
            with safe_open(self.path, "pt") as f:
                about, step = json.loads(f.metadata()["about"]), int(f.metadata()["step"])
            of_both = lambda key: [known.get(key, "unsaid") for known in (about, self.about)]
            said = {key: of_both(key) for key in about | self.about}
            others = [key for key, (before, now) in said.items() if before != now]
            others.sort(key=lambda key: (key != "task", key == "data", key))  # what says most comes first
            if not others:
                check_shapes(tensors := map_tensors(self.path), shapes)
                for key, t in tensors.items():
                    if key.startswith("step.") and t != step or key.startswith("exp_avg_sq.") and t.min() < 0:
                        raise ValueError(f"{key} is not what AdamW has after {step} steps")
                if not 0 < step <= self.total:
                    raise ValueError(f"step {step} of {self.total}")
        except Exception as e:  # safetensors raises its own error type, a KeyError or a ValueError
            raise Refused(f"{self.path}: damaged training state ({e}); delete it to start anew") from e
        for key in others:
            what = "an unfinished training with {} {}, not {}".format(key, *said[key])
            raise Refused(f"{self.path}: {what}; finish it as it was started, or delete that file")
        self.step = step
        for key, p in self.weights.items():
            p.data.copy_(tensors[key])
            moments = {moment: tensors[f"{moment}.{key}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[p] = {moment: t.to(p.device, copy=True) for moment, t in moments.items()}

    def __enter__(self):
        rank, size = rank_and_size()
        self.log = open(os.devnull if rank else self.folder / "log.jsonl", "a", buffering=1)
        about = {"task": self.about["task"], "start": self.step, "options": self.about, "processes": size}
        self.log.write(json.dumps({**about, **provenance()}) + "\n")
        self.stop = []
        handler = lambda *_: self.stop.append(1)
        self.before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = dict(total=self.total, initial=self.step, desc=self.about["task"], unit="step")
        self.bar = tqdm(**bar, disable=None)  # None: not where there is no terminal
        self.began = self.saved = time.monotonic()
        self.tokens, self.save_time, self.average = 0, 0, None
        return self

    def __exit__(self, *_):
        self.bar.close()
        self.log.close()
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def add_up(self, losses):
        """Sum over the processes what each computed of a step: its gradients in place, and its losses, which
        are returned."""
        total = torch.tensor([*losses.values()], dtype=torch.float64)
        sum_over_processes(total)
        for p in self.weights.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # in a process that had no example
        sum_over_processes(*(p.grad for p in self.weights.values()))
        return dict(zip(losses, total.tolist()))

    def update(self, losses):
        """Clip the gradients and take one step of AdamW. Raises Refused, with the state before it saved, if
        they are not finite."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        if not math.isfinite(norm) or not math.isfinite(sum(losses.values())):
            why, how = f"loss or gradient is not finite at step {self.step + 1} of {self.total}", ""
            if self.step:
                self.save()
                how = f"the state before it is kept in {self.path}: delete that, and "
            raise Refused(f"{why}: {how}try a smaller --lr")
        self.optimizer.param_groups[0]["lr"] = self.rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def after_step(self, losses, tokens):
        """Print how it goes, and save the state now and then. Raises KeyboardInterrupt, with all saved, when
        asked to stop."""
        lm, self.tokens = losses["lm"], self.tokens + tokens
        self.average = lm if self.average is None else 0.9 * self.average + 0.1 * lm
        speed = self.tokens / (time.monotonic() - self.began)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {self.average:.3f}, {speed:.0f} tok/s")
        if self.step % max(1, self.total // 10) == 0 or self.step == self.total:
            penalties = "".join(f"  {name} {losses[name]:.1e}" for name in ("lock", "sep") if losses[name])
            tqdm.write(f"step {self.step}/{self.total}  loss {self.average:.4f}{penalties} {speed:.0f} tok/s")
        self.log.write(json.dumps({"step": self.step, "tok/s": round(speed), **losses}) + "\n")
        due = time.monotonic() - self.saved > max(SAVE_EVERY, 20 * self.save_time)
        if save := any_process(self.stop or due or self.step == self.total):
            self.saved = time.monotonic()
            self.save()
            self.save_time = time.monotonic() - self.saved
        if save and any_process(self.stop):
            done = f"stopped and saved at step {self.step} of {self.total}"
            raise KeyboardInterrupt(f"{done}; the same command goes on from there")


def task_in_training(path):
    """Return the task of a saved state, or None if it cannot be read: `resume` then says why."""
    with contextlib.suppress(OSError, SafetensorError, LookupError, TypeError, ValueError, RecursionError):
        with safe_open(path, "pt") as f:
            return json.loads(f.metadata()["about"])["task"]


def peak_memory(device):
    """Return how much memory this process has taken at its peak, as text."""
    if device.startswith("cuda"):
        peaks = [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())]
        return f"{max(peaks) / 2**30:.2f} GiB on the GPU, the fullest if there are more"
    if not resource:
        return "not known here"
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit:.2f} GiB"

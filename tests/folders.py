"""Run folders: versions, commands on them, exports, kills: what is committed stays, to the bit."""

import os
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import commit
import eval as evaluation
import train
from commit import Run, Version
from model import AdapterBank, FastBank
from plumbing import Refused
from plumbing.files import atomic
from plumbing.targets import find_targets
from field import take_snapshot
from tests.builders import (
    a_version,
    all_bases,
    answers,
    copy_of,
    fake_commit,
    micro_backbone,
    one_backbone,
    opened,
    random_examples,
)

HERE = pathlib.Path(__file__).parent.parent


try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None


def test_a_version_comes_back_bit_for_bit_under_its_own_name(tmp_path):
    v, path = a_version(tmp_path)
    w = Version.load(path)
    z = torch.randn(9, 4)
    assert (
        torch.equal(v.field(z), w.field(z))
        and torch.equal(v.snapshot, w.snapshot)
        and all(torch.equal(t, w.bases[key]) for key, t in v.bases.items())
    )
    assert torch.equal(take_snapshot(w.field, w.anchors), w.snapshot)
    assert (w.task, w.lock, w.config, w.region.tau) == (v.task, v.lock, v.config, v.region.tau)
    assert w.index.tolist() == [0, 1, 2] and w.hash == v.hash
    w.save(tmp_path)
    assert w.hash == v.hash


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_version_file_is_refused(tmp_path, damage):
    _, path = a_version(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-10])
    with pytest.raises(Refused, match="missing" if damage == "remove" else "corrupted"):
        Version.load(path)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError):
        with atomic(tmp_path / "f") as tmp:
            tmp.write_text("half of the n")
            raise OSError("No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


@torch.no_grad()
def test_what_no_gating_names_is_not_read(two):
    """Of a version that nobody asks, neither bases nor field are in memory."""
    run, model = opened(two, micro_backbone(layers=3))
    in_memory = lambda: [
        ["tensors" in vars(x) for x in part] for part in (run.versions, model.bank.committed)
    ]
    assert in_memory() == [[False, False], [False, False]]
    with model.gated(run.stored(0, torch.randn(3, model.features))), torch.no_grad():
        model.backbone(torch.tensor([[5, 6, 7]] * 3))
    assert in_memory() == [[True, False], [True, False]]
    model.detach()


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 2, 1)])
def test_bases_in_blocks_are_gathered_as_from_one_tensor(sizes):
    bank = FastBank(find_targets(one_backbone()), rank=3)
    for n in sizes:
        tensors = {key: torch.randn(n, *shape) for key, shape in bank.basis_shapes().items()}
        bank.commit(n, lambda tensors=tensors: tensors)
    bank.add(2)
    name, indices = next(iter(bank.shapes)), torch.randint(sum(sizes) + 2, (3, 2, 5))
    for places, layer in zip(bank.locate(indices), indices.unbind(1)):
        for part, found in zip("AB", bank.gather(name, places)):
            whole = torch.cat([tensors[f"{name}.{part}"] for tensors in all_bases(bank)])
            assert torch.equal(found, whole[layer.flatten()])
        for plain, fast in zip(AdapterBank.gather(bank, name, layer), bank.gather(name, places)):
            assert torch.equal(plain, fast)  # the literal form, which copies the bank


def test_200_random_commands_move_no_other_version_by_a_bit(tmp_path):
    r, backbone, examples = random.Random(0), micro_backbone(layers=1), random_examples(3)
    folder, count = tmp_path / "run", iter(range(10**6))
    fake_commit(folder, "root", 0, backbone=backbone)
    seen = answers(folder, backbone, examples)
    done = dict.fromkeys(("commit", "rollback", "compose", "merge"), 0)
    for step in range(200):
        run, n = Run(folder), next(count)
        entries = run.manifest["versions"] + run.manifest["compositions"]
        growing, full = ["commit", "compose", "merge"], ["rollback", "rollback", "compose", "merge"]
        kind = r.choice(full if len(entries) > 4 else growing)
        if kind == "commit":
            fake_commit(folder, f"t{n}", n, r.random() < 0.4, backbone)
        elif kind == "compose":
            versions = run.manifest["versions"]
            picked = [e["hash"][:16] for e in r.sample(versions, min(2, len(versions)))]
            argv = ["compose", *picked, "--weights", *["0.5"] * len(picked), "--name", f"c{n}"]
            commit.main([*argv, "--run", str(folder)])
        elif kind == "merge":
            branch = tmp_path / "branch"
            shutil.rmtree(branch, ignore_errors=True)
            shutil.copytree(folder, branch)
            for i in range(r.randint(1, 2)):
                fake_commit(branch, f"b{n}.{i}", 1000 + n + i, r.random() < 0.4, backbone)
            for e in Run(branch).manifest["versions"][-1:]:
                seen[e["hash"]] = answers(branch, backbone, examples)[e["hash"]]
            commit.main(["merge", str(branch), "--run", str(folder)])
        else:
            victim = r.choice([e for e in entries if e["task"] != "root"])
            commit.main(["rollback", victim["hash"][:16], "--cascade", "--run", str(folder)])
        done[kind] += 1
        now = answers(folder, backbone, examples)
        for digest, logits in now.items():
            assert logits.equal(seen.setdefault(digest, logits)), (step, kind)
        assert {p.stem for p in (folder / "versions").iterdir()} == set(now) and not (
            folder / "versions" / "orphans"
        ).exists()
    assert min(done.values()) > 10 and not any(wrong for _, wrong in commit.verify(Run(folder)))


def test_rollback_refuses_while_another_version_reads_and_cascades_when_told(micro, two, tmp_path, capsys):
    out = copy_of(two, tmp_path)
    with pytest.raises(Refused, match="alpaca is read by code; --cascade removes them too"):
        commit.main(["rollback", "alpaca", "--run", str(out)])
    before = Run(out).manifest["results"][0]
    commit.main(["rollback", "code", "--run", str(out)])
    run = Run(out)
    assert (
        run.tasks == ["alpaca"]
        and run.manifest["results"] == [before]
        and len(list((out / "versions").iterdir())) == 1
    )
    assert not list((out / "data").glob("code.*"))
    train.main(micro("code", out, "--lock"))  # learned again, it is the same version
    assert Run(out).manifest["versions"][1]["hash"] == Run(two).manifest["versions"][1]["hash"]
    assert Run(out).manifest["results"] == Run(two).manifest["results"]
    commit.main(["rollback", "alpaca", "--cascade", "--run", str(out), "--json"])
    assert Run(out).manifest["versions"] == [] and not list((out / "versions").iterdir())


def test_branches_merge_as_if_trained_one_after_the_other(micro, first, tmp_path, capsys):
    left, right = copy_of(first, tmp_path, "left"), copy_of(first, tmp_path, "right")
    train.main(micro("code", left, "--lock"))
    train.main(
        micro("third", right, "--lock", "--data", HERE / "assets" / "data" / "code.val.json", "--seed", "3")
    )
    rows = {p: Run(p).manifest["results"][-1] for p in (left, right)}
    commit.main(["merge", str(right), "--run", str(left)])
    assert Run(left).tasks == ["alpaca", "code", "third"] and "merged third" in capsys.readouterr().out
    run = Run(left)
    backbone, tokenizer = run.open_backbone(run.manifest["backbone"]["name"], "cpu")
    row, _ = evaluation.measure(run, run.open_model(backbone, tokenizer), tokenizer)
    assert row["identical"] == {"alpaca": [32, 32], "code": [32, 32], "third": [32, 32]}
    assert row["stored"] == {**rows[left]["stored"], **rows[right]["stored"]}
    commit.main(["merge", str(right), "--run", str(left)])
    assert "already up to date" in capsys.readouterr().out


def test_merge_refuses_what_does_not_belong_together_and_changes_nothing(two, first, micro, tmp_path):
    def refused(folder, other, message):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(Refused, match=message):
            commit.main(["merge", str(other), "--run", str(folder)])
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"} == {
            p: b for p, b in before.items() if p.name != ".lock"
        }

    ours = copy_of(first, tmp_path, "ours")
    other = tmp_path / "other"
    train.main(micro("alpaca", other, "--seed", "9"))
    refused(ours, other, "no common first version")
    foreign = copy_of(two, tmp_path, "foreign")
    path = foreign / "manifest.json"
    path.write_text(path.read_text().replace(Run(foreign).manifest["backbone"]["fingerprint"], "0" * 64))
    refused(ours, foreign, "another backbone")
    clash = copy_of(first, tmp_path, "clash")
    train.main(micro("code", clash, "--lock", "--seed", "5"))
    refused(copy_of(two, tmp_path, "mine"), clash, "both runs have a version called code")
    torn = copy_of(two, tmp_path, "torn")
    manifest = json.loads((torn / "manifest.json").read_text())
    entry = manifest["versions"][1]
    (torn / "versions" / f"{entry['hash']}.safetensors").write_bytes(b"no longer")
    refused(ours, torn, "corrupted version file")
    soft = copy_of(first, tmp_path, "soft")
    train.main(micro("code", soft, "--lock", "soft"))
    refused(ours, soft, "do not stand for themselves")


def test_verify_finds_a_flipped_bit_and_a_moved_field(two, tmp_path, capsys):
    commit.main(["verify", "--run", str(two)])
    assert capsys.readouterr().out.count(" ok") == 2
    out = copy_of(two, tmp_path)
    path = next((out / "versions").glob(Run(out).manifest["versions"][1]["hash"] + "*"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        commit.main(["verify", "--run", str(out), "--json"])
    assert [bool(e["wrong"]) for e in json.loads(capsys.readouterr().out)] == [False, True]
    out = tmp_path / "moved"
    fake_commit(out, "root", 0)
    run, _ = opened(out)
    version = run.versions[0]
    version.tensors["snapshot"] = version.snapshot + 1e-6
    run.manifest |= {"versions": [], "results": []}
    run.commit(version)
    assert "8 of 8 anchors" in commit.verify(Run(out))[0][1]


def test_show_log_and_names(two, tmp_path, capsys):
    out = copy_of(two, tmp_path)
    commit.main(["compose", "alpaca", "code", "--weights", ".5", ".5", "--name", "AB", "--run", str(out)])
    commit.main(["log", "--run", str(out)])
    log = capsys.readouterr().out
    digest = Run(out).manifest["versions"][1]["hash"]
    assert f"version {digest[:12]}  code  (lock: exact)" in log and "0.5 x " in log and "perplexity" in log
    commit.main(["show", digest[:6], "--run", str(out), "--json"])
    about = json.loads(capsys.readouterr().out)
    assert (
        about["task"] == "code"
        and about["writes"] == 4
        and about["read_by"] == [Run(out).manifest["compositions"][0]["hash"]]
    )
    for argv, message in (
        (["show", "nobody"], "no version is called 'nobody'"),
        (["show", digest[:3]], "no version"),
        (["compose", "alpaca", "--weights", "1", "2", "--name", "x"], "1 versions and 2 weights"),
        (["compose", "alpaca", "--weights", "1", "--name", "code"], "already has a version called code"),
        (["compose", "alpaca", "--weights", "1", "--name", "a/b"], "use letters"),
        (["rollback", "alpaca"], "is read by code, AB"),
    ):
        with pytest.raises(Refused, match=message):
            commit.main(argv + ["--run", str(out)])
    with pytest.raises(Refused, match="not a run folder"):
        commit.main(["log", "--run", str(tmp_path / "nowhere")])


@pytest.mark.skipif(not fcntl, reason="no fcntl here")
def test_a_second_process_is_refused_and_the_lock_dies_with_the_first(micro, first, tmp_path):
    out = copy_of(first, tmp_path)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import commit, time\nwith commit.Run({str(out)!r}).exclusive():\n"
            " print('in', flush=True); time.sleep(60)",
        ],
        stdout=subprocess.PIPE,
        cwd=HERE,
    )
    holder.stdout.readline()
    for command in (
        lambda: train.main(micro("code", out, "--lock")),
        lambda: commit.main(["rollback", "alpaca", "--run", str(out)]),
    ):
        with pytest.raises(Refused, match="another process is at work"):
            command()
    holder.kill()
    holder.wait()
    commit.main(["rollback", "alpaca", "--run", str(out)])
    assert Run(out).tasks == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_sigkill_at_any_moment_leaves_the_state_before_or_after(tmp_path):
    base, branch = tmp_path / "base", tmp_path / "branch"
    fake_commit(base, "root", 0)
    shutil.copytree(base, branch)
    fake_commit(branch, "b", 2, reads_all=False)
    fake_commit(base, "a", 1)
    commands = {
        "commit": lambda f: fake_commit(f, "c", 3),
        "rollback": lambda f: commit.main(["rollback", "a", "--run", str(f)]),
        "merge": lambda f: commit.main(["merge", str(branch), "--run", str(f)]),
        "compose": lambda f: commit.main(
            ["compose", "root", "a", "--weights", "1", "1", "--name", "AB", "--run", str(f)]
        ),
    }
    state = lambda f: sorted(e["hash"] for k in ("versions", "compositions") for e in Run(f).manifest[k])
    r = random.Random(0)
    for name, command in commands.items():
        after = copy_of(base, tmp_path, f"{name}-after")
        started = time.perf_counter()
        command(after)
        took = time.perf_counter() - started
        for i in range(5):
            folder = copy_of(base, tmp_path, f"{name}-{i}")
            child = os.fork()
            if child == 0:
                try:
                    command(folder)
                finally:
                    os._exit(0)
            time.sleep(r.uniform(0, 1.5 * took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert state(folder) in (state(base), state(after)), (name, i)
            assert not any(wrong for _, wrong in commit.verify(Run(folder)))
            with Run(
                folder
            ).exclusive() as run:  # and the next command that writes tidies up: nothing is lost
                before = {p.read_bytes() for p in (folder / "versions").glob("*.safetensors")}
                run.save()
                assert {p.stem for p in (folder / "versions").glob("*")} - {"orphans"} == set(state(folder))
                assert before == {p.read_bytes() for p in (folder / "versions").rglob("*.safetensors")}
                assert not list(folder.rglob("*.niwf-tmp"))

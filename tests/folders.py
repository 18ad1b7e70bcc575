"""Run folders: versions, commands on them, exports, kills: what is committed stays, to the bit."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import time

import pytest
import torch

import commit
import eval as evaluation
import train
from commit import Run, Version
from model import AdapterBank, FastBank
from plumbing import folder as files_on_disk
from plumbing import versionfile as files_of_versions
from plumbing.files import atomic
from plumbing.targets import find_targets
from field import CoordinateDynamics, WeightField, take_snapshot
from tests.builders import HERE, a_region, a_version_of, all_bases, answers, copy_of, edit_json, fake_commit
from tests.builders import forked, git, micro_backbone, one_backbone, opened, random_examples, refused


def test_a_version_comes_back_bit_for_bit_under_its_own_name(tmp_path):
    """A version is read back with the same bits and hash, and a damaged or missing file is refused."""
    phi = WeightField(2, 3, 4, 7)
    bases = {f"layers.{i}.m.{part}": torch.randn(3, 2, 6) for i in range(2) for part in "AB"}
    v = a_version_of(phi, CoordinateDynamics(5, 4), *a_region(4), bases)
    v.save(tmp_path)
    path = tmp_path / f"{v.hash}.safetensors"
    w, z = Version.load(path), torch.randn(9, 4)
    assert torch.equal(v.field(z), w.field(z)) and torch.equal(v.snapshot, w.snapshot)
    assert all(torch.equal(t, w.bases[key]) for key, t in v.bases.items())
    assert torch.equal(take_snapshot(w.field, w.anchors), w.snapshot)
    assert (w.task, w.lock, w.config, w.region.tau) == (v.task, v.lock, v.config, v.region.tau)
    assert w.index.tolist() == [0, 1, 2] and w.hash == v.hash
    w.save(tmp_path)
    assert w.hash == v.hash
    data = path.read_bytes()
    middle = len(data) // 2
    for damaged in (data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :], data[:-10]):
        path.write_bytes(damaged)
        with refused("corrupted", tmp_path):
            Version.load(path)
    path.unlink()
    with refused("missing", tmp_path):
        Version.load(path)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path):
    """A write that fails halfway leaves the old file whole, and nothing beside it."""
    (tmp_path / "f").write_text("old")
    with pytest.raises(OSError):
        with atomic(tmp_path / "f") as tmp:
            tmp.write_text("half of the n")
            raise OSError("No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def test_what_a_killed_command_left_is_in_nobodys_way(tmp_path):
    """Two writes of one file do not meet. A folder in which the first manifest was never finished is free,
    and one that holds something else is not."""
    with atomic(tmp_path / "f") as one, atomic(tmp_path / "f") as other:
        one.write_text("one")
        other.write_text("other")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "one"
    for name in (".lock", ".manifest.json.0a1b2c3d.niwf-tmp"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).touch()
    assert Run(tmp_path / "run").tasks == []
    (tmp_path / "run" / "mine").touch()
    with refused("not a run folder"):
        Run(tmp_path / "run")


@pytest.mark.parametrize("error, wrong", [(1e-6, ""), (1e-2, "8 of 8 anchors give other logits than when")])
def test_verify_tells_another_field_from_another_rounding(tmp_path, monkeypatch, error, wrong):
    """Logits that another machine rounds otherwise are whole; those of another field are not."""
    fake_commit(tmp_path / "run", "first", 0)
    monkeypatch.setattr(commit, "take_snapshot", lambda *given: take_snapshot(*given) + error)
    ((_, found),) = commit.verify(Run(tmp_path / "run"))
    assert found.startswith(wrong) and bool(found) == bool(wrong)


@pytest.mark.skipif(not files_on_disk.fcntl, reason="no lock of files here")
def test_a_lock_that_was_removed_meanwhile_is_not_taken(tmp_path, monkeypatch):
    """One process opens the lock file; who held it leaves nothing behind, and a third makes a new one. Only
    the third then holds the folder."""
    flock, folder = files_on_disk.fcntl.flock, tmp_path / "run"
    with contextlib.ExitStack() as third, contextlib.ExitStack() as first:
        first.enter_context(Run(folder).exclusive())

        def late(f, how):
            monkeypatch.setattr(files_on_disk.fcntl, "flock", flock)
            first.close()
            third.enter_context(Run(folder).exclusive())
            flock(f, how)

        monkeypatch.setattr(files_on_disk.fcntl, "flock", late)
        with refused("another process is at work"), Run(folder).exclusive():
            pass


def test_a_version_that_a_training_may_write_again_stays(tmp_path):
    """While the state of a training is there, a version that no manifest names is not moved."""
    folder = tmp_path / "run"
    fake_commit(folder, "first", 0)
    with Run(folder).exclusive() as run:
        for _ in range(2):
            (run.folder / "versions" / f"{'1' * 64}.safetensors").touch()
            run.state_file.touch()
            run.save()
            assert run.unnamed()
            run.state_file.unlink()
            run.save()
            assert not run.unnamed()


@torch.no_grad()
def test_what_no_gating_names_is_not_read(two):
    """Only versions that a gating names are read from disk, so unused versions take no memory."""
    run, model = opened(two, micro_backbone(layers=3))
    parts = run.versions, model.bank.committed
    in_memory = lambda: [["tensors" in vars(x) for x in part] for part in parts]
    assert in_memory() == [[False, False], [False, False]]
    with model.gated(run.stored(0, torch.randn(3, model.features))):
        model.backbone(torch.tensor([[5, 6, 7]] * 3))
    assert in_memory() == [[True, False], [True, False]]
    model.detach()


@pytest.mark.parametrize("sizes", [(4,), (2, 3), (1, 2, 1)])
def test_bases_in_blocks_are_gathered_as_from_one_tensor(sizes):
    """Bases gathered out of blocks have the bits that they have in a single tensor of all of them."""
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
    """After each of 200 random commands every remaining version gives the same logits, to the bit."""
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
            git(folder, "compose", *picked, "--weights", *["0.5"] * len(picked), "--name", f"c{n}")
        elif kind == "merge":
            branch = tmp_path / "branch"
            shutil.rmtree(branch, ignore_errors=True)
            shutil.copytree(folder, branch)
            for i in range(r.randint(1, 2)):
                fake_commit(branch, f"b{n}.{i}", 1000 + n + i, r.random() < 0.4, backbone)
            for digest, logits in answers(branch, backbone, examples).items():
                assert logits.equal(seen.setdefault(digest, logits)), (step, "branch")
            git(folder, "merge", branch)
        else:
            victim = r.choice([e for e in entries if e["task"] != "root"])
            git(folder, "rollback --cascade", victim["hash"][:16])
        done[kind] += 1
        now = answers(folder, backbone, examples)
        for digest, logits in now.items():
            assert logits.equal(seen.setdefault(digest, logits)), (step, kind)
        assert {p.stem for p in (folder / "versions").iterdir()} == {*now}  # and there are no orphans
    assert min(done.values()) > 10 and not any(wrong for _, wrong in commit.verify(Run(folder)))


def test_rollback_refuses_what_is_read_unless_cascading(micro, two, tmp_path):
    """A version that others read is removed only by --cascade, and a task learned again has the same hash."""
    out, before = copy_of(two, tmp_path), Run(two).manifest
    with refused("alpaca is read by code; --cascade removes them too", out):
        git(out, "rollback alpaca")
    git(out, "rollback code")
    run = Run(out)
    assert run.tasks == ["alpaca"] and run.manifest["results"] == before["results"][:1]
    assert len([*(out / "versions").iterdir()]) == 1 and not [*(out / "data").glob("code.*")]
    train.main(micro("code", out, "--lock"))  # learned again, it is the same version
    assert Run(out).manifest["versions"][1]["hash"] == before["versions"][1]["hash"]
    assert Run(out).manifest["results"] == before["results"]
    git(out, "rollback alpaca --cascade --json")
    assert Run(out).manifest["versions"] == [] and not [*(out / "versions").iterdir()]


def test_branches_merge_as_if_trained_one_after_the_other(micro, first, two, tmp_path, capsys):
    """A merge keeps all logits and perplexities of both branches, and a second merge changes nothing. What
    the other branch never measured is left out of the table."""
    left, right = copy_of(two, tmp_path, "left"), copy_of(first, tmp_path, "right")
    data = HERE / "assets" / "data" / "code.val.json"
    train.main(micro("third", right, "--lock", "--data", data, "--seed", "3"))
    stored = [Run(p).manifest["results"][-1]["stored"] for p in (left, right)]
    git(left, "merge", right)
    assert Run(left).tasks == ["alpaca", "code", "third"] and "merged third" in capsys.readouterr().out
    run, model, tokenizer = evaluation.open_run(left, "cpu")
    row, _ = evaluation.measure(run, model, tokenizer)
    assert row["identical"] == dict.fromkeys(run.tasks, [32, 32]) and row["stored"] == stored[0] | stored[1]
    git(left, "merge", right)
    assert "already up to date" in capsys.readouterr().out
    train.main(micro("code", left, "--lock"))
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines() if " stored " in line} == {
        "alpaca",
        "third",
    }


def test_merge_refuses_what_does_not_belong_together(two, first, micro, tmp_path):
    """Runs whose root, backbone or lock differ, or whose names clash, do not merge, and both stay whole."""
    other, (ours, clash, soft) = tmp_path / "other", (copy_of(first, tmp_path, name) for name in "abc")
    killed = copy_of(two, tmp_path, "f")  # after a version was committed, before it was measured
    edit_json(killed / "manifest.json", lambda m: m["results"].pop())
    mine, foreign = (copy_of(two, tmp_path, name) for name in "de")
    train.main(micro("alpaca", other, "--seed", "9"))
    edit_json(foreign / "manifest.json", lambda m: m["backbone"].update(fingerprint="0" * 64))
    train.main(micro("code", clash, "--lock", "--seed", "5"))
    train.main(micro("code", soft, "--lock", "soft"))
    for run, theirs, match in (
        (ours, other, "no common first version"),
        (ours, foreign, "another backbone"),
        (mine, clash, "both runs have a version called code"),
        (ours, soft, "share one bank"),
        (killed, ours, "code is not measured"),
    ):
        with refused(match, run, theirs):
            git(run, "merge", theirs)


def test_verify_finds_a_flipped_bit_and_a_moved_field(two, tmp_path, capsys):
    """Verify names the version whose file has a flipped bit, or whose field has moved at its anchors."""
    git(two, "verify")
    assert capsys.readouterr().out.count(" ok") == 2
    out = copy_of(two, tmp_path)
    (path,) = (out / "versions").glob(Run(out).manifest["versions"][1]["hash"] + "*")
    data = path.read_bytes()
    path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    with pytest.raises(SystemExit):
        git(out, "verify --json")
    assert [bool(e["wrong"]) for e in json.loads(capsys.readouterr().out)] == [False, True]
    out = tmp_path / "moved"
    fake_commit(out, "root", 0)
    run, _ = opened(out)
    version = run.versions[0]
    version.tensors["snapshot"] = version.snapshot + 1e-3
    run.manifest |= {"versions": [], "results": []}
    run.commit(version)
    assert "8 of 8 anchors" in commit.verify(Run(out))[0][1]


def test_show_log_and_names(two, tmp_path, capsys):
    """Log and show describe every version, the newest first, and an unknown, too short or taken name is
    refused. With --json there is nothing but JSON, whatever else is said."""
    out = copy_of(two, tmp_path)
    git(out, "compose alpaca code --weights .5 .5 --name AB")
    (out / "versions" / f"{'1' * 64}.safetensors").touch()
    capsys.readouterr()
    git(out, "compose alpaca code --weights 1 1 --name both --json")
    said = capsys.readouterr()
    assert json.loads(said.out)["task"] == "both" and "is named by no manifest" in said.err
    git(out, "log")
    assert re.findall(r"^\* version \w+  (\w+)", capsys.readouterr().out, re.M)[:2] == ["both", "AB"]
    git(out, "rollback both")
    git(out, "log")
    log, run = capsys.readouterr().out, Run(out)
    digest = run.manifest["versions"][1]["hash"]
    assert f"version {digest[:12]}  code  (lock: exact)" in log and "0.5 x " in log and "perplexity" in log
    assert "(lock: first)" in log
    git(out, "show --json", digest[:6])
    about = json.loads(capsys.readouterr().out)
    assert about["task"] == "code" and about["writes"] == 4
    assert about["read_by"] == [run.manifest["compositions"][0]["hash"]]
    for words, match in (
        ("show nobody", "no version is called 'nobody'"),
        (f"show {digest[:3]}", "no version"),
        ("compose alpaca --weights -1e-3 2 --name x", "there are 1 versions, and 2 weights"),
        ("compose alpaca --weights 1 --name code", "already has a version called code"),
        ("compose alpaca --weights 1 --name CODE", "already has a version called code"),
        ("compose alpaca --weights 1 --name a/b", "use at most 64 letters"),
        ("compose alpaca --weights 1 --name base", "means no version"),
        ("compose alpaca --weights 1 --name 0123456789ab", "taken for the hash of a version"),
        ("compose alpaca --weights 0 --name x", "all are 0"),
        ("rollback alpaca", "is read by code, AB"),
    ):
        with refused(match, out):
            git(out, words)
    (out / "training.safetensors").touch()
    with refused("finish its training first", out):
        git(out, "compose alpaca --weights 1 --name new")
    with refused("not a run folder", out):
        git(tmp_path / "nowhere", "log")


def test_a_file_that_cannot_be_read_hides_no_other_version(tmp_path, monkeypatch):
    """`verify` says which version's file cannot be read, and what reads it, and goes on. A version whose file
    goes away while it is in use is refused in one line."""
    out = tmp_path / "run"
    hashes = [fake_commit(out, name, i, reads_all=name != "c") for i, name in enumerate("abc")]
    versions, digest = Run(out).read_versions(), files_of_versions.hashlib.file_digest

    def broken(f, kind):
        if hashes[1] in f.name:
            raise OSError(5, "Input/output error")
        return digest(f, kind)

    with monkeypatch.context() as m:
        m.setattr(files_of_versions.hashlib, "file_digest", broken)
        found = [wrong for _, wrong in commit.verify(Run(out))]
    assert "Input/output error" in found[1] and found[0] == found[2] == ""
    Run(out).path(hashes[0]).unlink()
    found = [wrong for _, wrong in commit.verify(Run(out))]
    assert "its file is missing" in found[0]
    assert f"reads {hashes[0][:12]}, which is damaged, missing, later or named twice" in found[1]
    with refused("gone, or not readable"):
        versions[0].gating(torch.zeros(1, 6))


def test_a_rollback_of_the_last_version_that_was_killed_goes_on(tmp_path, monkeypatch):
    """If a kill comes between the manifest and the files, the next command takes the run folder as it is, and
    puts the file aside."""
    out = tmp_path / "run"
    digest, unlink = fake_commit(out, "a", 0), pathlib.Path.unlink

    def killed(path, **how):
        if path == Run(out).path(digest):
            raise KeyboardInterrupt
        unlink(path, **how)

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(pathlib.Path, "unlink", killed)
        git(out, "rollback a")
    assert Run(out).tasks == [] and Run(out).path(digest).exists()
    fake_commit(out, "b", 1)
    assert Run(out).tasks == ["b"] and (out / "versions" / "orphans" / f"{digest}.safetensors").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_sigkill_at_any_moment_leaves_the_state_before_or_after(tmp_path):
    """A command killed at any moment leaves the run as before or after it, and no version is lost."""
    base, branch = tmp_path / "base", tmp_path / "branch"
    fake_commit(base, "root", 0)
    shutil.copytree(base, branch)
    fake_commit(branch, "b", 2, reads_all=False)
    fake_commit(base, "a", 1)
    commands = {
        "commit": lambda f: fake_commit(f, "c", 3),
        "rollback": lambda f: git(f, "rollback a"),
        "merge": lambda f: git(f, "merge", branch),
        "compose": lambda f: git(f, "compose root a --weights 1 1 --name AB"),
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
            child = forked(command, folder)
            time.sleep(r.uniform(0, 1.5 * took))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            assert state(folder) in (state(base), state(after)), (name, i)
            assert not any(wrong for _, wrong in commit.verify(Run(folder)))
            with Run(folder).exclusive() as run:  # the next command that writes tidies up: nothing is lost
                before = {p.read_bytes() for p in (folder / "versions").glob("*.safetensors")}
                run.save()
                assert {p.stem for p in (folder / "versions").glob("*")} - {"orphans"} == set(state(folder))
                assert before == {p.read_bytes() for p in (folder / "versions").rglob("*.safetensors")}
                assert not list(folder.rglob("*.niwf-tmp"))

